"""The stage table at work: what exists, what is loaded and what learns in stage 1 and stage 2.

A stage's result is one file of the weights that it trained (fp32 safetensors). Stage N is built from the pre-trained
backbone plus the results of the stages before it, so nothing frozen is ever copied.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from llava_genhancer.engine import load_trained
from llava_genhancer.enhance.backbones import add_lora, trainable_backbone_names
from llava_genhancer.enhance.enhancer import Enhancer, build_enhancer
from llava_genhancer.enhance.tokenizer import Target
from llava_genhancer.recipes import Recipe

WEIGHTS = "weights.safetensors"
STAGES = (1, 2)


def trainable_names(enhancer: Enhancer, recipe: Recipe, stage: int) -> set[str]:
    """Exactly the parameters that learn in a stage."""
    names: set[str] = set()
    for part in recipe.stage(stage).trains:
        if part == "backbone":
            names |= {f"backbone.{n}" for n in trainable_backbone_names(enhancer.backbone, recipe)}
        else:
            names |= {f"{part}.{n}" for n, _ in enhancer.get_submodule(part).named_parameters()}
    return names


def build_stage(recipe: Recipe, stage: int, target: Target, results: Iterable[Path] = ()) -> Enhancer:
    """The enhancer ready to train ``stage``.

    LoRA is injected at the first stage that trains the backbone and stays from then on.

    Args:
        results: weight files of the earlier stages that trained, in order; none leaves their parts as initialised.

    Raises:
        InputError: a weight file does not fit this recipe.
    """
    enhancer = build_enhancer(recipe, target)
    earlier = [s for s in STAGES[: stage - 1] if recipe.stage(s).max_steps > 0]
    if any("backbone" in recipe.stage(s).trains for s in (*earlier, stage)) and recipe.lora_rank > 0:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            add_lora(enhancer.backbone, recipe)
    for before, file in zip(earlier, results, strict=False):
        load_trained(enhancer, file, trainable_names(enhancer, recipe, before))
    learns = trainable_names(enhancer, recipe, stage)
    for name, parameter in enhancer.named_parameters():
        parameter.requires_grad_(name in learns)
    return enhancer
