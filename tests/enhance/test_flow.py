"""The continuous denoiser: FLUX's packing, sizes of Table 5, t in fp32, and the ODE sampler."""

import dataclasses

import pytest
import torch
from torch import Tensor

from llava_genhancer import recipes
from llava_genhancer.enhance.conditions import Condition
from llava_genhancer.enhance.denoisers.flow import FlowDenoiser, patchify, unpatchify

PAPER = recipes.get_recipe("openai-l14-224")


def denoiser_of(recipe: recipes.Recipe, channels: int = 8, side: int = 8) -> FlowDenoiser:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return FlowDenoiser(recipe, channels, side).requires_grad_(False)


def condition_of(recipe: recipes.Recipe, batch: int) -> Condition:
    generator = torch.Generator().manual_seed(1)
    vec = torch.randn(batch, recipe.vec_dim, generator=generator)
    return Condition(vec, torch.randn(batch, 1, recipe.txt_dim, generator=generator))


# --- packing -------------------------------------------------------------------------------------------------------


def test_patchify_round_trip() -> None:
    latents = torch.randn(3, 5, 6, 6)
    assert torch.equal(unpatchify(patchify(latents)), latents)
    tokens = torch.randn(3, 9, 20)
    assert torch.equal(patchify(unpatchify(tokens)), tokens)


def test_patchify_is_flux_packing() -> None:
    """FLUX: "b c (h ph) (w pw) -> b (h w) (c ph pw)", written out as loops and by ``unfold``."""
    latents = torch.randn(2, 3, 4, 6)
    tokens = patchify(latents)
    for row in range(2):
        for column in range(3):
            patch = latents[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            assert torch.equal(tokens[:, 3 * row + column], patch.flatten(1))
    assert torch.equal(tokens, torch.nn.functional.unfold(latents, kernel_size=2, stride=2).mT)


def test_positions_are_row_then_column(recipe_of) -> None:
    denoiser = denoiser_of(recipe_of())
    seen = {}

    def spy(module, args, kwargs):
        seen.update(kwargs)

    denoiser.transformer.register_forward_pre_hook(spy, with_kwargs=True)
    denoiser.velocity(torch.randn(1, 16, 32), torch.tensor([0.5]), condition_of(recipe_of(), 1))
    assert seen["img_ids"].tolist() == [[0, row, column] for row in range(4) for column in range(4)]
    assert seen["txt_ids"].tolist() == [[0, 0, 0]]


# --- sizes ---------------------------------------------------------------------------------------------------------


def flux_parameters(double: int, single: int) -> int:
    """Counted on FLUX's architecture: width 3072, heads of 128, MLP x 4, inputs 64 / 768 / 4096, guidance."""
    d, head, mlp = 3072, 128, 4 * 3072
    embedders = 2 * (256 * d + d + d * d + d) + (768 * d + d + d * d + d)  # time, guidance, vec
    inputs = (64 * d + d) + (4096 * d + d)
    one_stream = (d * 6 * d + 6 * d) + (d * 3 * d + 3 * d) + (d * d + d) + 2 * head + (d * mlp + mlp) + (mlp * d + d)
    single_block = (d * 3 * d + 3 * d) + (d * (3 * d + mlp) + 3 * d + mlp) + ((d + mlp) * d + d) + 2 * head
    final = (d * 2 * d + 2 * d) + (d * 64 + 64)
    return embedders + inputs + double * 2 * one_stream + single * single_block + final


@pytest.mark.parametrize(("double", "single", "billions"), [(1, 2, 0.687), (2, 4, 1.310), (3, 6, 1.933), (4, 8, 2.556)])
def test_sizes_of_table_5(double: int, single: int, billions: float) -> None:
    recipe = dataclasses.replace(PAPER, denoiser_layers=double, denoiser_single_layers=single)
    with torch.device("meta"):
        denoiser = FlowDenoiser(recipe, latent_channels=16, latent_side=28)
    count = sum(p.numel() for p in denoiser.parameters())
    assert count == flux_parameters(double, single)
    assert round(count / 1e9, 3) == billions
    if (double, single) == (2, 4):
        assert count == 1_310_154_816


# --- t in fp32 -----------------------------------------------------------------------------------------------------


class Reached(Exception):
    """Carries what came to the sinusoid; the blocks behind it need not run."""


def reached(denoiser: FlowDenoiser, recipe: recipes.Recipe, t: Tensor) -> Tensor:
    """What the sinusoid is given for times t."""

    def stop(module: torch.nn.Module, args: tuple[Tensor]) -> None:
        raise Reached(args[0])

    denoiser.transformer.time_text_embed.time_proj.register_forward_pre_hook(stop)
    with pytest.raises(Reached) as caught:
        denoiser.velocity(torch.zeros(len(t), 1, 32), t, condition_of(recipe, len(t)))
    return caught.value.args[0]


@pytest.mark.parametrize("setting", ["fp32", "bf16 weights", "autocast"])
def test_t_reaches_the_sinusoid_in_fp32(recipe_of, setting: str) -> None:
    recipe = recipe_of()
    denoiser = denoiser_of(recipe)
    if setting == "bf16 weights":
        denoiser.bfloat16()
    t = torch.rand(4000, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16, enabled=setting == "autocast"):
        got = reached(denoiser, recipe, t)
    assert torch.equal(got.float(), t * 1000)
    assert len(got.unique()) == len(t.unique())


def test_t_in_bfloat16_reproduces_the_reference(recipe_of) -> None:
    """About 630 distinct values and a mean error of .94 (of 1000) were measured on the reference's modules."""
    recipe = recipe_of(t_dtype="bfloat16")
    t = torch.sigmoid(torch.randn(100_000, generator=torch.Generator().manual_seed(0)))
    got = reached(denoiser_of(recipe), recipe, t)
    assert 600 < len(got.unique()) < 660
    assert float((got.float() - 1000 * t).abs().mean()) == pytest.approx(0.94, abs=0.02)


def test_t_is_not_left_from_the_call_before(recipe_of) -> None:
    recipe = recipe_of()
    denoiser = denoiser_of(recipe)
    x, condition = torch.randn(2, 16, 32), condition_of(recipe, 2)
    early = denoiser.velocity(x, torch.full((2,), 0.1), condition)
    late = denoiser.velocity(x, torch.full((2,), 0.9), condition)
    assert not torch.allclose(early, late)
    assert torch.equal(denoiser.velocity(x, torch.full((2,), 0.1), condition), early)


# --- loss and memory -----------------------------------------------------------------------------------------------


def test_noise_and_t_are_drawn_from_the_global_rng(recipe_of) -> None:
    recipe = recipe_of()
    denoiser, condition = denoiser_of(recipe), condition_of(recipe, 3)
    latents = torch.randn(3, 8, 8, 8)
    torch.manual_seed(5)
    drawn = denoiser(latents, condition)
    torch.manual_seed(5)
    t, noise = torch.sigmoid(torch.randn(3)), torch.randn(3, 16, 32)
    assert torch.equal(denoiser(latents, condition, noise=noise, t=t), drawn)


def test_recomputed_activations_change_nothing(recipe_of) -> None:
    gradients = []
    for checkpointing in (False, True):
        recipe = recipe_of(gradient_checkpointing=checkpointing)
        denoiser = denoiser_of(recipe).requires_grad_(True).train()
        assert denoiser.transformer.is_gradient_checkpointing == checkpointing
        vec, txt = (c.requires_grad_() for c in condition_of(recipe, 2))
        generator = torch.Generator().manual_seed(2)
        latents, noise = torch.randn(2, 8, 8, 8, generator=generator), torch.randn(2, 16, 32, generator=generator)
        denoiser(latents, Condition(vec, txt), noise=noise, t=torch.tensor([0.2, 0.7])).backward()
        gradients.append([vec.grad, txt.grad, *(p.grad for p in denoiser.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


# --- sampling ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 7])
def test_the_sampler_follows_straight_lines_to_the_data(recipe_of, monkeypatch, steps: int) -> None:
    """For one data point per condition the true velocity at (x, t) is (x - clean) / t: Euler is exact at any step."""
    recipe = recipe_of(sample_ode_steps=steps)
    denoiser = denoiser_of(recipe)
    clean = torch.randn(3, 8, 8, 8)
    times: list[float] = []

    def velocity(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        times.append(float(t[0]))
        return (x - patchify(clean)) / t[:, None, None]

    monkeypatch.setattr(denoiser, "velocity", velocity)
    sampled = denoiser.sample(condition_of(recipe, 3), torch.Generator().manual_seed(0))
    assert torch.allclose(sampled, clean, atol=1e-5)
    assert len(times) == steps
    assert times[0] == 1, "sampling starts from noise"


def test_pictures_leave_training_as_it_was(recipe_of, tiny_target) -> None:
    from llava_genhancer.enhance.enhancer import build_enhancer

    enhancer = build_enhancer(recipe_of(), tiny_target).train()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    first = enhancer.rebuild(pixels, torch.Generator().manual_seed(0))
    assert first.shape == (2, 8, 8, 8)
    assert torch.equal(enhancer.rebuild(pixels, torch.Generator().manual_seed(0)), first)
    assert torch.equal(torch.get_rng_state(), before)
    assert enhancer.training
