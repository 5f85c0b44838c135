"""The shipped Stable Diffusion and FLUX: whole, small, and guided by what they are told."""

from pathlib import Path
from random import Random

import pytest
import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from safetensors import safe_open
from transformers import CLIPTokenizer

from llava_genhancer.toyworld import diffusion, paths, scenes, training

CLASSES = {"sd/unet": UNet2DConditionModel, "flux/transformer": FluxTransformer2DModel}


def folder_of(name: str) -> Path:
    model, _, part = name.partition("/")
    return Path(paths.resolve(f"toyworld:{model}")) / part


@pytest.mark.parametrize("name", CLASSES)
def test_shipped_weights_are_whole_and_half_precision(name: str) -> None:
    with safe_open(folder_of(name) / "diffusion_pytorch_model.safetensors", "pt") as weights:
        stored = {key: weights.get_slice(key).get_dtype() for key in weights.keys()}  # noqa: SIM118
    model, report = CLASSES[name].from_pretrained(folder_of(name), output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert set(stored.values()) == {"F16"}
    assert set(stored) == {n for n, _ in model.named_parameters()}
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("model", ["sd", "flux"])
def test_shipped_folders_are_small(model: str) -> None:
    files = [path for path in Path(paths.resolve(f"toyworld:{model}")).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 4_000_000


@pytest.mark.parametrize("name", CLASSES)
@torch.no_grad()
def test_the_right_caption_lowers_the_loss(name: str) -> None:
    """Fresh scenes, the same noise, each image's own caption against another image's."""
    rng = Random(31)
    drawn = [scenes.sample_scene(rng, "test") for _ in range(48)]
    means, _ = diffusion.encode_images(training.to_tensor(drawn))
    tokenizer = CLIPTokenizer.from_pretrained(paths.resolve("toyworld:clip"))
    captions = [scenes.caption(scene, rng, 0.5) for scene in drawn]
    states, pooled = diffusion.encode_text(diffusion.load_text_encoder(), tokenizer, captions)
    model = CLASSES[name].from_pretrained(folder_of(name), torch_dtype=torch.float32).eval()
    loss_at = (diffusion.unet_loss if name == "sd/unet" else diffusion.flux_loss)(model)
    losses = []
    for shift in (0, 1, 7):
        torch.manual_seed(0)
        losses.append(float(loss_at(means, states.roll(shift, 0), pooled.roll(shift, 0))))
    print(f"{name}: {losses[0]:.4f} with its caption, {losses[1]:.4f} and {losses[2]:.4f} with others'")
    assert losses[0] < 0.99 * min(losses[1:])


def test_training_repeats_exactly() -> None:
    pool = training.render_pool(8, 0)
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(diffusion.build_unet((16, 16)))
        diffusion.train(models[-1], diffusion.unet_loss, pool, seed=1, steps=2, batch_size=2)
    assert all(torch.equal(a, b) for a, b in zip(*(m.parameters() for m in models), strict=True))
