"""What the recipe's optimisation fields really do: schedules, accumulation, clipping, decay, arithmetic, snapshots."""

import json
from pathlib import Path

import pytest
import torch
from fixed_batches import main as train_fixed_batches
from safetensors.torch import load_file

from llava_genhancer import recipes, run
from llava_genhancer.enhance.denoisers.flow import FlowDenoiser
from llava_genhancer.enhance.targets import VaeTarget
from llava_genhancer.enhance.train import EnhanceTrainer, enhance

QUIET = {"sample_images": 0, "stage1.log_steps": 1, "stage2.snapshot_steps": ""}


def stage_1(fields: dict, run_dir: Path, **changes: object) -> Path:
    """Train a short stage 1 alone."""
    recipe = recipes.override(recipes.Recipe(name="test"), {**fields, **QUIET, "stage1.max_steps": 6, **changes})
    return enhance(recipe, run_dir, stages=(1,))


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        ("constant", [0, 0.5, 1, 1, 1, 1]),
        ("cosine", [0, 0.5, 1, 0.853553, 0.5, 0.146447]),  # (1 + cos(pi k / 4)) / 2 after the warm-up
    ],
)
def test_schedules_with_warm_up(tiny_fields, tmp_path, scheduler: str, expected: list[float]) -> None:
    changes = {"stage1.lr_scheduler": scheduler, "stage1.warmup_steps": 2, "stage1.learning_rate": 0.01}
    folder = stage_1(tiny_fields, tmp_path / "run", **changes)
    rates = [e["learning_rate"] for e in run.read_json(folder / "log_history.json")]
    assert rates == pytest.approx([0.01 * e for e in expected], abs=1e-7)


@pytest.mark.parametrize("denoiser", ["flow", "masked"])
def test_accumulated_micro_batches_are_one_batch(tiny_fields, masked_fields, tmp_path, denoiser: str) -> None:
    """Eight samples a step at once and as 4 x 2; clipping sees the whole gradient."""
    tiny = {"flow": tiny_fields, "masked": masked_fields}[denoiser]
    fields = {**tiny, **QUIET, "lora_dropout": 0.0, "stage1.max_steps": 3, "stage2.max_steps": 3}
    weights, norms = {}, {}
    for micro in (8, 2):
        name = f"micro-{micro}"
        config = {"fields": fields, "output": str(tmp_path), "half_batch": micro / 2, "runs": [(name, None, "fp32")]}
        train_fixed_batches(json.loads(json.dumps(config)))
        weights[micro] = [load_file(tmp_path / f"{name}-stage{stage}.safetensors") for stage in (1, 2)]
        history = run.read_json(tmp_path / name / "stage1" / "log_history.json")
        norms[micro] = [e["grad_norm"] for e in history]
    assert norms[2] == pytest.approx(norms[8], rel=1e-4)
    for ours, whole in zip(weights[2], weights[8], strict=True):
        assert max(float((ours[n] - whole[n]).abs().max()) for n in whole) < 1e-5


def test_clipping_bounds_the_step(tiny_fields, tmp_path, monkeypatch) -> None:
    """The norm that reaches the optimizer; 0 switches clipping off."""
    seen: list[float] = []
    original = torch.optim.AdamW.step

    def spy(self, *args, **kwargs):
        gradients = [p.grad for g in self.param_groups for p in g["params"] if p.grad is not None]
        seen.append(float(torch.linalg.vector_norm(torch.stack([g.norm() for g in gradients]))))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    stage_1(tiny_fields, tmp_path / "clipped", max_grad_norm=0.01, **{"stage1.max_steps": 3})
    clipped, seen[:] = list(seen), []
    stage_1(tiny_fields, tmp_path / "free", max_grad_norm=0, **{"stage1.max_steps": 3})
    assert clipped == pytest.approx([0.01] * 3, rel=1e-3)
    assert min(seen) > 0.02


@pytest.mark.parametrize("decay_all", [True, False])
def test_weight_decay_of_biases_and_norms(tiny_fields, tmp_path, monkeypatch, decay_all: bool) -> None:
    groups: list[dict] = []
    original = EnhanceTrainer.create_optimizer

    def spy(self, *args, **kwargs):
        optimizer = original(self, *args, **kwargs)
        names = {id(p): n for n, p in self.model.named_parameters()}
        groups.extend(
            {"decay": g["weight_decay"], "names": [names[id(p)] for p in g["params"]]} for g in optimizer.param_groups
        )
        return optimizer

    monkeypatch.setattr(EnhanceTrainer, "create_optimizer", spy)
    stage_1(tiny_fields, tmp_path / "run", decay_biases_and_norms=decay_all, **{"stage1.max_steps": 1})
    spared = [n for g in groups if g["decay"] == 0 for n in g["names"]]
    decayed = [n for g in groups if g["decay"] == 0.01 for n in g["names"]]
    assert {g["decay"] for g in groups} == ({0.01} if decay_all else {0.0, 0.01})
    if not decay_all:
        assert spared
        assert all(n.endswith("bias") or "norm" in n or n.split(".")[2] == "0" for n in spared), (
            "heads open with a norm"
        )
        assert not [n for n in decayed if n.endswith("bias")]


def test_bf16_is_for_the_trained_model_alone(tiny_fields, tmp_path, monkeypatch) -> None:
    """Under autocast the denoiser computes in bf16, while the frozen VAE keeps its own fp32."""
    seen: dict[str, set[object]] = {"vae": set(), "denoiser": set()}
    encode, velocity = VaeTarget.encode, FlowDenoiser.velocity

    def spy_encode(self, images):
        seen["vae"].add(torch.is_autocast_enabled("cpu"))
        return encode(self, images)

    def spy_velocity(self, x_t, t, condition):
        seen["denoiser"].add((torch.is_autocast_enabled("cpu"), x_t.dtype, t.dtype, self.transformer.dtype))
        return velocity(self, x_t, t, condition)

    monkeypatch.setattr(VaeTarget, "encode", spy_encode)
    monkeypatch.setattr(FlowDenoiser, "velocity", spy_velocity)
    folder = stage_1(tiny_fields, tmp_path / "run", precision="bf16", **{"stage1.max_steps": 2})
    assert seen["vae"] == {False}
    assert seen["denoiser"] == {(True, torch.float32, torch.float32, torch.float32)}
    assert {v.dtype for v in load_file(folder / "weights.safetensors").values()} == {torch.float32}


def test_sgd_with_momentum_is_sgd_with_momentum(tiny_fields, tmp_path) -> None:
    """Two steps by the recipe against two steps written out: v <- m v + (g + decay w), w <- w - lr v."""
    fields = {**tiny_fields, **QUIET, "optimizer": "sgd", "momentum": 0.5, "weight_decay": 0.1, "max_grad_norm": 0}
    seen: list[dict[str, torch.Tensor]] = []
    original = torch.optim.SGD.step

    def spy(self, *args, **kwargs):
        parameters = [p for g in self.param_groups for p in g["params"]]
        before = [p.detach().clone() for p in parameters]
        gradients = [p.grad.clone() for p in parameters]
        result = original(self, *args, **kwargs)
        seen.append({"before": before, "gradients": gradients, "after": [p.detach().clone() for p in parameters]})
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.SGD, "step", spy)
        stage_1(fields, tmp_path / "run", **{"stage1.max_steps": 2, "stage1.learning_rate": 0.1})
    velocity = [torch.zeros_like(w) for w in seen[0]["before"]]
    for now in seen:
        velocity = [0.5 * v + g + 0.1 * w for v, g, w in zip(velocity, now["gradients"], now["before"], strict=True)]
        expected = [w - 0.1 * v for w, v in zip(now["before"], velocity, strict=True)]
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(now["after"], expected, strict=True))
