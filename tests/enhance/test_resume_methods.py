"""Methods beside the default one: killed in mid-run, they end with the same weights."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from llava_genhancer.enhance.train import EnhanceTrainer, enhance


class Crash(BaseException):
    """Stands for kill -9: nothing of ours may catch it."""


class Bomb(TrainerCallback):
    """Ends the process between two checkpoints."""

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == 3:
            raise Crash


@pytest.fixture
def methods(flux_of, unet_recipe_of, recipe_of):
    """FLUX in half precision, told in both ways; Stable Diffusion's UNet, or the light denoiser, under the contrast."""
    return {
        "flux": lambda **changes: flux_of(denoiser_dtype="bfloat16", **changes),
        "dcr": lambda **changes: unet_recipe_of(objective="contrast", **changes),
        "contrast": lambda **changes: recipe_of(objective="contrast", **changes),
    }


@pytest.mark.parametrize(
    ("method", "stage", "learns"),
    [
        ("flux", 1, {"projector"}),
        ("flux", 2, {"backbone"}),
        ("dcr", 1, {"projector"}),
        ("dcr", 2, {"backbone"}),
        ("contrast", 1, {"projector", "denoiser"}),
    ],
)
def test_a_method_resumes_bit_identically(
    methods, method: str, stage: int, learns: set[str], tmp_path: Path, monkeypatch
) -> None:
    """Either stage alone, without a step of the other; chance, second views among it, is drawn again as it was."""
    short = {f"stage{s}.max_steps": 4 * (s == stage) for s in (1, 2)} | {f"stage{stage}.save_steps": 2}
    short |= {"stage2.snapshot_steps": "", "sample_images": 0, "global_batch_size": 4, "per_device_batch_size": 2}
    recipe = methods[method](**short)
    stages = tuple(range(1, stage + 1))
    enhance(recipe, tmp_path / "whole", stages=stages)
    original = EnhanceTrainer.__init__

    def init(self, *args, **kwargs) -> None:
        original(self, *args, **kwargs)
        self.add_callback(Bomb())

    with monkeypatch.context() as patch:
        patch.setattr(EnhanceTrainer, "__init__", init)
        with pytest.raises(Crash):
            enhance(recipe, tmp_path / "cut", stages=stages)
    torch.manual_seed(12345)  # whatever the next process's RNG is
    enhance(recipe, tmp_path / "cut", stages=stages)

    name = f"stage{stage}/weights.safetensors"
    assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    learnt = load_file(tmp_path / "cut" / name)
    assert {n.partition(".")[0] for n in learnt} == learns
    halfway = load_file(tmp_path / "cut" / f"stage{stage}" / "checkpoint-2" / "trained.safetensors")
    assert any(not torch.equal(halfway[n], learnt[n]) for n in learnt)
