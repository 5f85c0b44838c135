"""The work of a whole training step: what is counted before is what runs, and nothing is done for frozen weights."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from llava_genhancer import costs, recipes
from llava_genhancer.enhance.inputs import FreshInputs
from llava_genhancer.enhance.stages import build_stage, trainable_names
from llava_genhancer.enhance.targets import load_target

BATCH = 2


def step_of(recipe: recipes.Recipe, stage: int) -> tuple[Any, Callable[[], torch.Tensor]]:
    """A stage's enhancer, and its loss of one batch as training computes it."""
    target = load_target(recipe)
    enhancer = build_stage(recipe, stage, target).train()
    inputs = FreshInputs(enhancer.backbone, target, enhancer.backbone.image_size)
    size = enhancer.backbone.image_size
    images = torch.randint(0, 256, (BATCH, 3, size, size), dtype=torch.uint8)
    return enhancer, lambda: enhancer(*inputs(images))


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("denoiser", ["flow", "masked"])
def test_flops_are_those_counted(
    recipe_of: Callable[..., recipes.Recipe],
    masked_recipe_of: Callable[..., recipes.Recipe],
    denoiser: str,
    stage: int,
) -> None:
    recipe = (recipe_of if denoiser == "flow" else masked_recipe_of)()
    _, loss = step_of(recipe, stage)
    facts = costs.facts_of(recipe)
    assert facts is not None
    # Plain matmuls in attention: whether a fused kernel's work is counted depends on torch's version.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss().backward()
    counted = BATCH * sum(costs.step_flops(recipe, stage, *facts).values())
    assert counter.get_total_flops() == pytest.approx(counted, rel=0.05)


@pytest.mark.parametrize("stage", [1, 2])
def test_gradients_reach_what_learns_and_nothing_else(recipe_of: Callable[..., recipes.Recipe], stage: int) -> None:
    recipe = recipe_of()
    enhancer, loss = step_of(recipe, stage)
    loss().backward()
    reached = {name for name, parameter in enhancer.named_parameters() if parameter.grad is not None}
    assert reached <= trainable_names(enhancer, recipe, stage)
    assert len(reached) == sum(parameter.requires_grad for parameter in enhancer.parameters())


def kept_inputs(transformer: torch.nn.Module, loss: Callable[[], torch.Tensor]) -> dict[str, bool]:
    """Of each linear layer in the blocks, whether its input is saved for the backward pass.

    Those that read attention's output are left out: attention's own backward pass needs it.
    """
    inputs: dict[str, torch.Tensor] = {}
    saved: list[torch.Tensor] = []
    for name, module in transformer.named_modules():
        if isinstance(module, torch.nn.Linear) and "block" in name and not name.endswith(("to_out.0", "to_add_out")):
            module.register_forward_pre_hook(lambda module, args, name=name: inputs.update({name: args[0]}))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        loss()
    storages = {x.untyped_storage()._cdata for x in saved}
    return {name: x.untyped_storage()._cdata in storages for name, x in inputs.items()}


def test_no_input_of_a_frozen_layer_is_kept(recipe_of: Callable[..., recipes.Recipe]) -> None:
    """A linear layer keeps its input for its weight's gradient alone: in stage 2 the denoiser keeps none."""
    first, second = (
        kept_inputs(enhancer.denoiser.transformer, loss)
        for enhancer, loss in (step_of(recipe_of(), stage) for stage in (1, 2))
    )
    assert len(first) > 15
    assert all(first.values()), "stage 1 needs them all"
    assert not [name for name, kept in second.items() if kept]
