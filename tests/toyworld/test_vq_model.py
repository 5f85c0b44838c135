"""The shipped VQ-VAE: it loads strictly, stays small, uses its codes, and keeps what the scenes differ in."""

from pathlib import Path
from random import Random

import pytest
import torch
from diffusers import VQModel
from safetensors import safe_open

from llava_genhancer.enhance.vq import VqTarget, load_vq_target
from llava_genhancer.toyworld import paths, scenes, training

VQ = Path(paths.resolve("toyworld:vq"))


@pytest.fixture(scope="module")
def target() -> VqTarget:
    return load_vq_target("toyworld:vq")


def test_shipped_weights_are_half_precision_and_under_a_megabyte() -> None:
    assert sum(path.stat().st_size for path in VQ.iterdir()) < 1_000_000
    with safe_open(VQ / "diffusion_pytorch_model.safetensors", "pt") as weights:
        stored = {name: weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118
    assert set(stored.values()) == {"F16"}
    model, report = VQModel.from_pretrained(VQ, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert set(stored) == {name for name, _ in model.named_parameters()}
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_fresh_scenes_are_rebuilt_from_144_tokens(target: VqTarget) -> None:
    rng = Random(21)
    images = training.to_tensor([scenes.sample_scene(rng, "test") for _ in range(64)])
    ids = target.encode(images)
    assert ids.shape == (64, 144)
    error = (target.decode(ids).float() - images.float()) / 127.5
    psnr = float(10 * torch.log10(4 / error.square().mean()))
    used = len(ids.unique())
    print(f"VQ reconstruction: {psnr:.1f} dB with {used} of {target.codes} codes")
    assert psnr > 24
    assert used > 0.75 * target.codes


def test_the_tokens_tell_apart_what_the_benchmark_asks_about(target: VqTarget) -> None:
    """Every pattern's pairs differ in some token: what the tokens do not hold no denoiser could ask for."""
    rng = Random(5)
    for pattern in scenes.PATTERNS:
        pairs = [scenes.pair(pattern, rng, "test") for _ in range(8)]
        first, second = (target.encode(training.to_tensor([pair[side] for pair in pairs])) for side in (0, 2))
        assert (first != second).any(1).all(), pattern.type


def test_training_repeats_exactly_and_revives_unused_codes() -> None:
    pool = training.render_pool(24, 0)
    first, second = (training.train_vq(pool, seed=3, steps=6, batch_size=4, settle=2) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    images = training.normalise(pool.images, (0.5,) * 3, (0.5,) * 3)
    with torch.no_grad():
        _, _, (_, _, ids) = first.quantize(first.encode(images).latents)
        torch.manual_seed(3)
        untrained = training.models.build_vq()
        _, _, (_, _, before) = untrained.quantize(untrained.encode(images).latents)
    assert len(ids.unique()) > 2 * len(before.unique()), "the codebook started as encodings"
