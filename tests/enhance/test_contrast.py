"""DCR's contrast: InfoNCE by hand, every noisy image under every condition, what learns, and exact resumption."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from llava_genhancer import recipes
from llava_genhancer.enhance.conditions import Condition
from llava_genhancer.enhance.denoisers import DENOISERS
from llava_genhancer.enhance.objectives import contrast_loss
from llava_genhancer.enhance.stages import build_stage
from llava_genhancer.errors import InputError


def by_hand(anchors: Tensor, positives: list[Tensor], negatives: Tensor, temperature: float) -> float:
    """InfoNCE as a classification of the positive among the negatives, one image after the other."""
    losses = []
    for positive in positives:
        for i, anchor in enumerate(anchors):
            others = [positive[i], *negatives[:, i]]
            cosines = torch.stack([F.cosine_similarity(anchor.flatten(), o.flatten(), dim=0) for o in others])
            losses.append(F.cross_entropy(cosines[None] / temperature, torch.tensor([0])))
    return float(torch.stack(losses).mean())


# --- the loss ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.05, 0.1, 2.0])
def test_it_is_infonce(temperature: float) -> None:
    anchors, first, second = torch.randn(3, 4, 2, 5, 5)
    negatives = torch.randn(3, 4, 2, 5, 5)
    loss = contrast_loss(anchors, [first, second], negatives, temperature)
    assert float(loss) == pytest.approx(by_hand(anchors, [first, second], negatives, temperature), rel=1e-5)


def test_known_values_and_what_it_does_not_see() -> None:
    anchors, opposite = torch.eye(4), -torch.eye(4)
    alone = contrast_loss(anchors, [anchors], anchors.roll(1, 0)[None], 0.5)  # one orthogonal negative
    assert float(alone) == pytest.approx(math.log1p(math.exp(-2)), rel=1e-5)
    blind = contrast_loss(anchors, [anchors], torch.stack([anchors] * 3), 0.1)  # negatives that equal the positive
    assert float(blind) == pytest.approx(math.log(4))
    assert float(contrast_loss(anchors, [opposite], anchors[None], 0.1)) == pytest.approx(20, rel=1e-4)
    scaled = contrast_loss(7 * anchors, [3 * anchors], 0.2 * anchors.roll(1, 0)[None], 0.5)
    assert torch.allclose(scaled, alone)


# --- every noisy image under every condition ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["unet", "flow"])
def test_the_denoisers_loss_is_every_pair_computed_alone(unet_recipe_of, recipe_of, tiny_target, kind: str) -> None:
    recipe = {"unet": unet_recipe_of, "flow": recipe_of}[kind](objective="contrast")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        denoiser = DENOISERS[kind].from_recipe(recipe, tiny_target, 32).requires_grad_(False)
    g = torch.Generator().manual_seed(1)
    told, view = (
        Condition(
            torch.randn(3, recipe.vec_dim, generator=g) if kind == "flow" else None,
            3 * torch.randn(3, 1, recipe.txt_dim, generator=g),
        )
        for _ in range(2)
    )
    latents = torch.randn(3, 8, 8, 8, generator=g)
    noise = torch.randn(denoiser.pack(latents).shape, generator=g)
    t = torch.tensor([400, 700, 950]) if kind == "unet" else torch.tensor([0.4, 0.7, 0.95])
    loss = denoiser(latents, told, view, noise=noise, t=t)

    def alone(i: int, condition: Condition, j: int) -> Tensor:
        one = Condition(*(None if c is None else c[j : j + 1] for c in condition))
        x_t, _ = denoiser.path(denoiser.pack(latents[i : i + 1]), noise[i : i + 1], t[i : i + 1])
        return denoiser.predict(x_t, t[i : i + 1], one)[0]

    anchors = torch.stack([alone(i, told, i) for i in range(3)])
    views = torch.stack([alone(i, view, i) for i in range(3)])
    truth = denoiser.path(denoiser.pack(latents), noise, t)[1]
    negatives = torch.stack([torch.stack([alone(i, told, (i + k) % 3) for i in range(3)]) for k in (1, 2)])
    assert float(loss) == pytest.approx(by_hand(anchors, [views, truth], negatives, 0.1), rel=1e-4)


# --- what learns ---------------------------------------------------------------------------------------------------


def test_what_learns_is_dcrs_and_gets_a_gradient(unet_recipe_of, tiny_target) -> None:
    recipe = unet_recipe_of(objective="contrast")
    for stage in (1, 2):
        enhancer = build_stage(recipe, stage, tiny_target).train()
        learning = {n: p for n, p in enhancer.named_parameters() if p.requires_grad}
        if stage == 1:
            heads = {f"projector.to_txt.{i}.{kind}" for i in (0, 1, 3) for kind in ("weight", "bias")}
            assert set(learning) == heads
        else:
            assert all(n.startswith("backbone.") and ("lora_" in n or n.endswith(".bias")) for n in learning)
        g = torch.Generator().manual_seed(0)
        pixels, views = torch.randn(2, 3, 3, 32, 32, generator=g)
        enhancer(pixels, torch.randn(3, 8, 8, 8, generator=g), views).backward()
        assert not {n for n, p in learning.items() if p.grad is None}
        assert any(p.grad.any() for p in learning.values())
        assert all(p.grad is None for p in enhancer.denoiser.parameters())


def test_named_recipes_are_the_papers() -> None:
    recipe = recipes.get_recipe("metaclip-l14-224-dcr")
    assert recipe.denoiser_weights == recipe.vae == "stabilityai/stable-diffusion-2-1"
    assert (recipe.objective, recipe.contrast_temperature, recipe.condition) == ("contrast", 0.1, "cls")
    assert (recipe.stage1.trains, recipe.stage1.max_steps) == (("projector",), 100_000)
    assert (recipe.stage2.trains, recipe.stage2.max_steps, recipe.lora_rank) == (("backbone",), 4600, 16)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"per_device_batch_size": 1}, "per_device_batch_size of 2 at least"),
        ({"draws_per_image": 2}, "one draw per image"),
        ({"contrast_temperature": 0.0}, "must be positive"),
    ],
)
def test_contrasts_of_nothing_are_refused(unet_recipe_of, changes: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        unet_recipe_of(objective="contrast", **changes)
