"""The whole enhancement in one process: resume, skipping, snapshots, refusals, NaN."""

import hashlib
import json
import multiprocessing
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from llava_genhancer import cli, recipes, run
from llava_genhancer.enhance import train
from llava_genhancer.enhance.train import EnhanceTrainer, enhance
from llava_genhancer.errors import InputError
from llava_genhancer.trainer import ExactTrainer, NonFiniteLoss


class Crash(BaseException):
    """Stands for kill -9: nothing of ours may catch it."""


def recipe_from(fields: dict, **changes) -> recipes.Recipe:
    return recipes.override(recipes.Recipe(name="test"), {**fields, **changes})


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def weights(run_dir: Path) -> dict[str, str]:
    """Hashes of every result a run leaves."""
    names = ("stage1/weights.safetensors", "stage2/weights.safetensors", "tower/model.safetensors")
    names += tuple(f"stage2/snapshots/{p.name}" for p in (run_dir / "stage2" / "snapshots").iterdir())
    return {name: digest(run_dir / name) for name in names}


def crash_at(monkeypatch: pytest.MonkeyPatch, stage: str, step: int, when: str = "on_step_end") -> None:
    """End the process (by exception) in the given stage and step."""

    class Bomb(TrainerCallback):
        pass

    def go_off(self, args, state, control, **kwargs):
        if Path(args.output_dir).name == stage and state.global_step == step:
            raise Crash

    setattr(Bomb, when, go_off)
    original = EnhanceTrainer.__init__

    def init(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.add_callback(Bomb())

    monkeypatch.setattr(EnhanceTrainer, "__init__", init)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_fields: dict) -> Path:
    """An uninterrupted run with dropout, random crops, accumulation and noise all on."""
    run_dir = tmp_path_factory.mktemp("run") / "whole"
    enhance(recipe_from(tiny_fields), run_dir)
    return run_dir


def test_a_run_leaves_what_it_should(finished: Path, tiny_fields: dict) -> None:
    manifest = run.read_json(finished / "manifest.json")
    assert recipes.from_dict(manifest["recipe"], recipes.Recipe) == recipe_from(tiny_fields)
    for stage, steps in (("stage1", 12), ("stage2", 8)):
        result = run.read_json(finished / stage / "result.json")
        assert result["steps"] == steps
        assert result["images_seen"] == steps * 8
        assert result["skipped"]["skipped"] == 0
        history = run.read_json(finished / stage / "log_history.json")
        assert [e["step"] for e in history] == [1, *range(2, steps + 1, 2)]
        assert all(e["images_per_second"] > 0 for e in history)
        assert (finished / stage / "samples" / f"step-{steps:06}.png").exists()
        assert any((finished / stage / "tensorboard").iterdir())
        complete = [p.name for p in run.checkpoints(finished / stage) if run.complete_facts(p, verify=True)]
        assert len(complete) == 2, "two checkpoints are kept, the last of them the final one"
        assert complete[-1] == f"checkpoint-{steps}"
    assert "Not measured yet" in (finished / "tower" / "README.md").read_text()


def test_modes_of_all_that_a_run_leaves_follow_the_umask(finished: Path) -> None:
    mask = os.umask(0)
    os.umask(mask)
    for path in (finished, *finished.rglob("*")):
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~mask, path


def test_skipped_images_are_reported_at_the_end(tiny_fields, images_folder, tmp_path, caplog) -> None:
    folder = Path(shutil.copytree(images_folder, tmp_path / "images"))
    (folder / "bad.jpg").write_bytes(b"no image")
    recipe = recipe_from(tiny_fields, data=str(folder), **{"stage1.max_steps": 6})
    stage = enhance(recipe, tmp_path / "run", stages=(1,))
    skipped = run.read_json(stage / "result.json")["skipped"]
    assert skipped["skipped"] == 1
    assert f"stage1: 1 of {skipped['read']} images could not be used (bad.jpg: " in caplog.text


def test_checkpoints_hold_no_frozen_weights(finished: Path) -> None:
    stage1 = load_file(finished / "stage1" / "weights.safetensors")
    stage2 = load_file(finished / "stage2" / "weights.safetensors")
    assert {n.split(".")[0] for n in stage1} == {"projector", "denoiser"}
    assert {n.split(".")[0] for n in stage2} == {"backbone"}
    assert all("lora_" in n or n.endswith(".base_layer.bias") for n in stage2)
    trained = load_file(finished / "stage2" / "checkpoint-8" / "trained.safetensors")
    assert set(trained) == set(stage2)


@pytest.mark.parametrize(
    ("stage", "step", "when", "workers"),
    [
        ("stage1", 7, "on_step_end", 0),  # between checkpoints
        ("stage2", 8, "on_train_end", 0),  # after the last checkpoint, before the stage is declared finished
        ("stage2", 6, "on_step_end", 1),  # with a data worker
    ],
)
def test_crash_and_resume_is_bit_identical(
    finished, tiny_fields, tmp_path, monkeypatch, stage, step, when, workers
) -> None:
    recipe = recipe_from(tiny_fields, num_workers=workers)
    reference = finished
    if workers:
        reference = tmp_path / "whole"
        enhance(recipe, reference)
    with monkeypatch.context() as patch:
        crash_at(patch, stage, step, when)
        with pytest.raises(Crash):
            enhance(recipe, tmp_path / "run")
    assert not multiprocessing.active_children(), "a worker outlived its training: the interpreter would never end"
    assert not (tmp_path / "run" / "tower").exists()
    torch.manual_seed(12345)  # whatever the next process's RNG is
    enhance(recipe, tmp_path / "run")
    assert weights(tmp_path / "run") == weights(reference)
    assert not multiprocessing.active_children()
    # The first entry after a resume averages over fewer steps; everything later is the same.
    ours, theirs = (run.read_json(d / stage / "log_history.json") for d in (tmp_path / "run", reference))
    assert [e["step"] for e in ours] == [e["step"] for e in theirs]
    assert [e["loss"] for e in ours][-1] == [e["loss"] for e in theirs][-1]
    ours, theirs = (run.read_json(d / stage / "result.json") for d in (tmp_path / "run", reference))
    assert ours["skipped"] == theirs["skipped"]
    assert ours["skipped"]["read"] > 0


def test_half_written_and_damaged_checkpoints_are_passed_over(finished, tiny_fields, tmp_path, monkeypatch) -> None:
    recipe = recipe_from(tiny_fields)
    with monkeypatch.context() as patch:
        crash_at(patch, "stage1", 11)
        with pytest.raises(Crash):
            enhance(recipe, tmp_path / "run")
    stage = tmp_path / "run" / "stage1"
    (stage / "checkpoint-99").mkdir()  # what a kill in the middle of a save leaves
    damaged = stage / "checkpoint-10" / "optimizer.pt"
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    assert run.last_complete_checkpoint(stage) == stage / "checkpoint-5"
    enhance(recipe, tmp_path / "run")
    assert weights(tmp_path / "run") == weights(finished)
    assert not (stage / "checkpoint-99").exists()


def test_a_finished_run_is_left_alone(finished, tiny_fields, monkeypatch) -> None:
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*.safetensors")}
    monkeypatch.setattr(train, "load_target", lambda *a, **k: pytest.fail("a finished stage loaded its VAE"))
    enhance(recipe_from(tiny_fields), finished)
    assert {p: p.stat().st_mtime_ns for p in finished.rglob("*.safetensors")} == before


def test_another_recipe_is_refused_with_the_difference(finished, tiny_fields) -> None:
    with pytest.raises(InputError, match=r"another recipe \(lora_rank: 16 -> 4\)"):
        enhance(recipe_from(tiny_fields, lora_rank=4), finished)


def test_other_workers_are_refused(tiny_fields, tmp_path, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        crash_at(patch, "stage1", 6)
        with pytest.raises(Crash):
            enhance(recipe_from(tiny_fields), tmp_path / "run")
    manifest = run.read_json(tmp_path / "run" / "manifest.json")
    manifest["recipe"]["num_workers"] = 2
    run.write_json(tmp_path / "run" / "manifest.json", manifest)
    with pytest.raises(InputError, match="num_workers was 0, is 2"):
        enhance(recipe_from(tiny_fields, num_workers=2), tmp_path / "run")


def test_other_images_are_refused(tiny_fields, images_folder, tmp_path, monkeypatch) -> None:
    others = tmp_path / "others"
    shutil.copytree(images_folder, others)
    with monkeypatch.context() as patch:
        crash_at(patch, "stage1", 6)
        with pytest.raises(Crash):
            enhance(recipe_from(tiny_fields, data=str(others)), tmp_path / "run")
    next(others.iterdir()).unlink()
    with pytest.raises(InputError, match="cannot be resumed exactly: data was"):
        enhance(recipe_from(tiny_fields, data=str(others)), tmp_path / "run")


def test_nan_stops_the_run_and_names_the_batch(tiny_fields, tmp_path, monkeypatch) -> None:
    original, calls, seen = EnhanceTrainer.compute_loss, iter(range(10_000)), []

    def poisoned(self, model, inputs, *args, **kwargs):
        loss = original(self, model, inputs, *args, **kwargs)
        if next(calls) == 13:  # second micro-batch of step 7
            seen.extend(inputs["keys"])
            loss = loss * float("nan")
        return loss

    monkeypatch.setattr(EnhanceTrainer, "compute_loss", poisoned)
    with pytest.raises(NonFiniteLoss, match="loss is nan in step 7") as caught:
        enhance(recipe_from(tiny_fields), tmp_path / "run")
    report = json.loads((tmp_path / "run" / "stage1" / "bad-steps-rank0.jsonl").read_text())
    assert report["keys"] == seen
    assert seen[0] in str(caught.value)
    kept = run.checkpoints(tmp_path / "run" / "stage1")
    assert [p.name for p in kept] == ["checkpoint-5"]
    state = load_file(kept[0] / "trained.safetensors")
    assert all(torch.isfinite(v).all() for v in state.values())


def test_a_gradient_that_overflows_leaves_no_checkpoint(tiny_fields, tmp_path, monkeypatch) -> None:
    """The loss of step 10 is finite, its gradient is not, and step 10 is one that is saved."""
    original, calls = EnhanceTrainer.compute_loss, iter(range(10_000))

    def steep(self, model, inputs, *args, **kwargs):
        loss = original(self, model, inputs, *args, **kwargs)
        return loss + torch.sqrt(loss - loss) if next(calls) == 19 else loss  # 0, with an infinite slope

    monkeypatch.setattr(EnhanceTrainer, "compute_loss", steep)
    with pytest.raises(NonFiniteLoss, match="is not finite after step 10 on rank 0, though every loss was"):
        enhance(recipe_from(tiny_fields), tmp_path / "run")
    assert [p.name for p in run.checkpoints(tmp_path / "run" / "stage1")] == ["checkpoint-5"]


def test_noise_differs_between_ranks(monkeypatch) -> None:
    """Trainer seeds every rank alike; ours must not."""
    from types import SimpleNamespace

    from llava_genhancer.callbacks import Flow

    draws = []
    for rank in (0, 1):
        trainer = SimpleNamespace(rank=rank, last_log=None)
        Flow(trainer).on_train_begin(SimpleNamespace(seed=0), SimpleNamespace(global_step=0), None)
        draws.append(torch.randn(4))
    assert not torch.equal(*draws)


def test_the_export_is_the_trained_model(finished, tiny_fields, tiny_clip) -> None:
    from transformers import CLIPModel

    original = CLIPModel.from_pretrained(tiny_clip).state_dict()
    tower = CLIPModel.from_pretrained(finished / "tower").state_dict()
    changed = {n for n in tower if not torch.equal(tower[n], original[n])}
    assert changed
    assert all(n.startswith(("vision_model.", "visual_projection.")) for n in changed)
    update = load_file(finished / "stage2" / "weights.safetensors")
    name = "vision_model.encoder.layers.0.mlp.fc1"
    a, b = (update[f"backbone.{name}.lora_{x}.default.weight"] for x in "AB")
    expected = original[f"{name}.weight"] + b @ a * (16 / 16)
    assert torch.allclose(tower[f"{name}.weight"], expected, atol=1e-7)


def run_cli(capsys, *argv: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as caught:
        cli.main(list(argv))
    return int(caught.value.code), capsys.readouterr().err


def as_arguments(fields: dict) -> list[str]:
    return [f"--{k}={','.join(map(str, v)) if isinstance(v, tuple) else v}" for k, v in fields.items()]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data": "no/such/folder"}, "no/such/folder"),
        ({"backbone": "/no/clip"}, "no config.json there"),
        ({"vae": "/no/vae"}, "/no/vae does not exist"),
        ({"lora_rnk": 3}, "did you mean 'lora_rank'"),
        ({"stage1.max_steps": "many"}, "needs a value of type int"),
        ({"global_batch_size": 10}, "not a multiple of"),
        ({"image_size": 30}, "not a multiple of"),
        ({"denoiser_rope_axes": "4,6,8"}, "sum to"),
    ],
)
def test_bad_input_is_one_line_and_status_2(tiny_fields, tmp_path, capsys, change, words) -> None:
    arguments = as_arguments({**tiny_fields, **change})
    status, err = run_cli(capsys, "enhance", "openai-l14-224", "--output_dir", str(tmp_path / "run"), *arguments)
    assert status == 2
    lines = [line for line in err.splitlines() if line.startswith("llava-genhancer")]
    assert len(lines) == 1
    assert words in lines[0]
    assert "Traceback" not in err


def test_a_refused_batch_leaves_no_folder_of_another_recipe(tiny_fields, tmp_path) -> None:
    with pytest.raises(InputError, match="not a multiple of"):
        enhance(recipe_from(tiny_fields, global_batch_size=10), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_repeats_from_its_manifest(finished, tmp_path, capsys) -> None:
    status, _ = run_cli(
        capsys, "enhance", "--config", str(finished / "manifest.json"), "--output_dir", str(tmp_path / "again")
    )
    assert status == 0
    assert weights(tmp_path / "again") == weights(finished)


def test_two_runs_in_one_folder(finished, tiny_fields) -> None:
    with run.exclusive(finished), pytest.raises(InputError, match="in use by another process"):
        enhance(recipe_from(tiny_fields), finished)


def test_export_at_another_strength_and_step(finished, tiny_clip, tmp_path, capsys) -> None:
    for scale, folder in ((0.0, "zero"), (0.5, "half")):
        status, _ = run_cli(
            capsys, "export", str(finished), "--output_dir", str(tmp_path / folder), "--lora_scale", str(scale)
        )
        assert status == 0
    original = load_file(tiny_clip / "model.safetensors")
    zero, half, one = (
        load_file(p / "model.safetensors") for p in (tmp_path / "zero", tmp_path / "half", finished / "tower")
    )
    assert all(torch.equal(zero[n], original[n]) for n in original)
    for n in original:
        assert torch.allclose(half[n], (original[n] + one[n]) / 2, atol=1e-6)
    again = ("export", str(finished), "--output_dir", str(tmp_path / "half"), "--lora_scale")
    assert run_cli(capsys, *again, "0.5")[0] == 0, "the same tower is up to date"
    status, err = run_cli(capsys, *again, "0.25")
    assert status == 2
    assert "holds another tower" in err
    assert "--overwrite" in err
    assert run_cli(capsys, *again, "0.25", "--overwrite")[0] == 0
    assert json.loads((tmp_path / "half" / "llava_genhancer.json").read_text())["lora_scale"] == 0.25
    status, err = run_cli(capsys, "export", str(finished), "--output_dir", str(tmp_path / "s"), "--step", "5")
    assert status == 2
    assert "kept are: 4" in err
    status, _ = run_cli(capsys, "export", str(finished), "--output_dir", str(tmp_path / "s4"), "--step", "4")
    assert status == 0
    assert json.loads((tmp_path / "s4" / "llava_genhancer.json").read_text())["step"] == 4


@pytest.mark.parametrize("step", [7, 12])  # 12 is stage 1's last: stage 2 must not start
def test_a_stop_signal_saves_and_the_run_goes_on(finished, tiny_fields, tmp_path, monkeypatch, capsys, step) -> None:
    import os
    import signal

    original, calls = ExactTrainer.training_step, iter(range(10_000))

    def interrupted(self, *args, **kwargs):
        if next(calls) == 2 * step - 1:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, *args, **kwargs)

    arguments = as_arguments(tiny_fields)
    start = ("enhance", "openai-l14-224", "--name=test", "--output_dir", str(tmp_path / "run"), *arguments)
    with monkeypatch.context() as patch:
        patch.setattr(ExactTrainer, "training_step", interrupted)
        status, err = run_cli(capsys, *start)
    assert status == 128 + signal.SIGINT
    assert f"stopped at step {step} by SIGINT" in err
    assert run.last_complete_checkpoint(tmp_path / "run" / "stage1").name == f"checkpoint-{step}"
    assert not (tmp_path / "run" / "stage2").exists()
    # The command line's defaults are the paper's, the reference run's are Recipe()'s: the same.
    status, err = run_cli(capsys, *start)
    assert status == 0, err
    assert weights(tmp_path / "run") == weights(finished)


@pytest.mark.parametrize(
    "settings",
    [
        {"ACCELERATE_MIXED_PRECISION": "bf16"},
        {"ACCELERATE_MIXED_PRECISION": "fp8", "ACCELERATE_FP8_BACKEND": "TE"},
        {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "7", "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR",
         "ACCELERATE_USE_FSDP": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true", "FSDP_VERSION": "2",
         "ACCELERATE_USE_MEGATRON_LM": "true", "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
         "PARALLELISM_CONFIG_TP_SIZE": "2"},
        {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
         "ACCELERATE_CONFIG_DS_FIELDS": "bf16"},
    ],
)  # fmt: skip
def test_what_accelerate_launch_leaves_behind_changes_no_bit(
    settings, finished, tiny_fields, tmp_path, monkeypatch, caplog
) -> None:
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    enhance(recipe_from(tiny_fields), tmp_path / "run")
    assert weights(tmp_path / "run") == weights(finished)
    (message,) = [r.message for r in caplog.records if r.message.startswith("ignored: ")]
    assert all(f"{name}={value}" in message for name, value in settings.items())


def test_pictures_are_drawn_in_the_arithmetic_of_the_training(tiny_fields, tmp_path, monkeypatch) -> None:
    from llava_genhancer.enhance.enhancer import Enhancer

    drawn, rebuild = [], Enhancer.rebuild

    def watched(self, *args, **kwargs):
        drawn.append(torch.is_autocast_enabled("cpu"))
        return rebuild(self, *args, **kwargs)

    monkeypatch.setattr(Enhancer, "rebuild", watched)
    short = {"stage1.max_steps": 1, "stage2.max_steps": 0, "stage1.sample_steps": 1}
    for precision, wanted in (("bf16", True), ("fp32", False)):
        enhance(recipe_from(tiny_fields, precision=precision, **short), tmp_path / precision, stages=(1,))
        assert drawn
        assert set(drawn) == {wanted}
        drawn.clear()


def refused_before_training(recipe: recipes.Recipe, run_dir: Path, words: str) -> None:
    """By `enhance` before a stage is begun, and by `doctor` with the same sentence."""
    from llava_genhancer import doctor
    from llava_genhancer.doctor.findings import PROBLEM

    with pytest.raises(InputError, match=words) as caught:
        enhance(recipe, run_dir)
    assert not (run_dir / "stage1").exists()
    found = [f for f in doctor.inspect(recipe, run_dir=str(run_dir)) if f.what == "export"]
    assert [(f.status, f.found) for f in found] == [(PROBLEM, str(caught.value))]


@pytest.mark.parametrize(
    ("removed", "words"),
    [(("tokenizer.json", "vocab.json"), "has no tokenizer to go with the tower: add"),
     (("tokenizer.json", "merges.txt"), "its tokenizer cannot be loaded"),
     (("preprocessor_config.json",), "preprocessor_config.json")],
)  # fmt: skip
def test_a_backbone_that_cannot_be_exported_is_refused_before_training(
    removed, words, tiny_clip, tiny_fields, tmp_path
) -> None:
    shutil.copytree(tiny_clip, tmp_path / "clip")
    for name in removed:
        (tmp_path / "clip" / name).unlink(missing_ok=True)
    refused_before_training(recipe_from(tiny_fields, backbone=str(tmp_path / "clip")), tmp_path / "run", words)


def test_a_place_that_cannot_take_the_tower_is_refused_before_training(tiny_fields, tmp_path, monkeypatch) -> None:
    recipe, run_dir = recipe_from(tiny_fields), tmp_path / "run"
    enhance(recipe, run_dir, stages=(1,))
    shutil.rmtree(run_dir / "stage1")
    (run_dir / "tower").mkdir()
    (run_dir / "tower" / "notes.txt").write_text("mine")
    refused_before_training(recipe, run_dir, "not one of our towers")
    shutil.rmtree(run_dir / "tower")
    (run_dir / "tower").write_text("mine")
    refused_before_training(recipe, run_dir, "is a file")
    (run_dir / "tower").unlink()
    monkeypatch.setattr("llava_genhancer.tower.export.free_bytes", lambda path: 1000.0)
    refused_before_training(recipe, run_dir, "No space left on device: the tower needs")
