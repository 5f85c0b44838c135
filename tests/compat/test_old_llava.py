"""Towers that this environment exports load in old LLaVA's (`make test-compat`): every key found, outputs equal."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

PYTHON = os.environ.get("LLAVA_GENHANCER_COMPAT_PYTHON")
pytestmark = pytest.mark.skipif(not PYTHON, reason="needs old LLaVA's environment: make test-compat")
ROOT = Path(__file__).parents[2]
TOLERANCE = 1e-5  # largest absolute difference, fp32


def original(name: str, folder: Path) -> str:
    """A folder to export from: random CLIP and SigLIP, and the CLIP that the package ships."""
    from transformers import CLIPModel

    from llava_genhancer.toyworld.models import build_clip_config, save_clip, save_siglip
    from llava_genhancer.toyworld.paths import resolve
    from llava_genhancer.toyworld.tokenizer import write_tokenizer

    if name == "shipped":
        return resolve("toyworld:clip")
    torch.manual_seed(0)
    if name == "siglip":
        return str(save_siglip(folder))
    words = len(write_tokenizer(folder))
    return str(save_clip(CLIPModel(build_clip_config(words, width=64, layers=3)), folder))


@torch.no_grad()
@pytest.mark.parametrize("name", ["clip", "siglip", "shipped"])
def test_tower_in_old_transformers(name: str, tmp_path: Path) -> None:
    import transformers

    from llava_genhancer.tower.export import save_tower

    family = "Siglip" if name == "siglip" else "CLIP"
    source = original(name, tmp_path / "original")
    model = getattr(transformers, f"{family}Model").from_pretrained(source, dtype=torch.float32).eval()
    tower = tmp_path / "tower"
    save_tower(model, tower, source=source, marker={"recipe": {"name": name}})

    generator = torch.Generator().manual_seed(1)
    side = model.config.vision_config.image_size
    text = model.config.text_config
    inputs = {
        "pixel_values": torch.randn(4, 3, side, side, generator=generator),
        "input_ids": torch.randint(3, text.vocab_size - 3, (4, 9), generator=generator),
        # Of the model's own size: resizing is not what is compared here, its arithmetic differs between versions.
        "image": torch.randint(0, 256, (side, side, 3), generator=generator, dtype=torch.uint8),
    }
    inputs["input_ids"][:, -1] = text.eos_token_id if family == "CLIP" else 1
    both = model(pixel_values=inputs["pixel_values"], input_ids=inputs["input_ids"])
    hidden = model.vision_model(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2]
    processor = getattr(transformers, f"{family}ImageProcessor").from_pretrained(tower)
    expected = {
        "hidden": hidden,
        "tower": hidden,
        "image_embeds": both.image_embeds,
        "text_embeds": both.text_embeds,
        "logits_per_image": both.logits_per_image,
        "processed": torch.as_tensor(processor(inputs["image"], return_tensors="pt")["pixel_values"]),
    }
    if family == "CLIP":
        tokenizer = transformers.CLIPTokenizer.from_pretrained(tower)
        expected["tokens"] = torch.tensor(tokenizer(["a red critter on a table", "two"], padding=True)["input_ids"])
    save_file({k: v.contiguous() for k, v in inputs.items()}, tmp_path / "inputs.safetensors")

    files = [tower, tmp_path / "inputs.safetensors", tmp_path / "outputs.safetensors"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    command = [str(PYTHON), str(Path(__file__).with_name("load_tower.py")), *map(str, files)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]

    report = json.loads(done.stdout.splitlines()[-1])
    assert report["transformers"] == "4.37.2"
    nothing: dict[str, list[str]] = {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}
    assert report["full"] == nothing
    # The vision class alone leaves the other tower and the projections aside, and nothing else.
    aside = ("text_model.", "text_projection.", "visual_projection.", "logit_scale", "logit_bias")
    assert [k for k in report["vision"].pop("unexpected_keys") if not k.startswith(aside)] == []
    assert report["vision"] == {"missing_keys": [], "mismatched_keys": []}
    outputs = load_file(tmp_path / "outputs.safetensors")
    assert outputs.keys() == expected.keys()
    for key, value in expected.items():
        assert outputs[key].shape == value.shape, key
        error = float((outputs[key].double() - value.double()).abs().max())
        assert error <= TOLERANCE, f"{key} differs by {error}"
