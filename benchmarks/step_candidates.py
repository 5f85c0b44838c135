"""The ways to take a training step that step_variants.py compares: ours, the libraries', and candidates for better.

None of the candidates is in the product unless it won; results/negative.md says what became of each.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from enhance_step import build, tower_config
from library_step import LibraryStep
from torch import Tensor

from llava_genhancer.enhance.targets import VaeTarget
from llava_genhancer.recipes import Recipe

OURS, LIBRARIES, CACHED = "ours", "the libraries alone", "cached"


class World:
    """A stage's models, one batch, and our step on them."""

    def __init__(self, recipe: Recipe, stage: int, device: torch.device, images: Tensor):
        self.recipe, self.stage, self.device, self.images = recipe, stage, device, images
        self.enhancer, self.target, self.facts, self.vae_facts = build(recipe, stage, device)
        self.trained = [p for p in self.enhancer.parameters() if p.requires_grad]
        self.optimizer = self.adamw(fused=True)
        self.moments = self.target.moments(images)
        self.frozen_eye = recipe.frozen_backbone(stage)
        self.tokens = self.eye().float() if self.frozen_eye else None

    def adamw(self, **options: Any) -> torch.optim.Optimizer:
        """The recipe's AdamW."""
        return torch.optim.AdamW(self.trained, lr=1e-5, weight_decay=self.recipe.weight_decay, **options)

    def autocast(self) -> Any:
        """The recipe's arithmetic."""
        half = self.recipe.precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16) if half else contextlib.nullcontext()

    @torch.no_grad()
    def eye(self) -> Tensor:
        """A frozen backbone's tokens."""
        with self.autocast():
            return self.enhancer.tokens(self.enhancer.backbone.normalise(self.images))

    def loss(self, *, cached: bool = False, target: VaeTarget | None = None) -> Tensor:
        """Of the batch, as training computes it."""
        tokenizer = target or self.target
        latents = tokenizer.draw(self.moments) if cached else tokenizer.encode(self.images)
        known = self.tokens if cached else None
        return self.rebuild(latents, self.enhancer.backbone.normalise(self.images) if known is None else known)

    def rebuild(self, latents: Tensor, seen: Tensor) -> Tensor:
        """The loss of given targets and tokens or pixels."""
        with self.autocast():
            loss: Tensor = self.enhancer(seen, latents)
        return loss

    def update(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Clip and step."""
        optimizer = optimizer or self.optimizer
        torch.nn.utils.clip_grad_norm_(self.trained, self.recipe.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


@dataclass(frozen=True)
class Variant:
    """A step by its loss; those that do more around it than backward and update have a ``step`` of their own."""

    world: World
    loss: Callable[[], Tensor]
    optimizer: torch.optim.Optimizer | None = None
    step: Callable[[], None] | None = None

    def __call__(self) -> None:
        """One step."""
        if self.step is not None:
            self.step()
        else:
            self.loss().backward()
            self.world.update(self.optimizer)


# --- the candidates -----------------------------------------------------------------------------------------------


def constant_rope(world: World) -> Variant:
    """The rotary tables computed once."""
    embed = world.enhancer.denoiser.transformer.pos_embed
    tables: list[Any] = []
    keep = embed.register_forward_hook(lambda module, inputs, output: tables.append(output))
    with torch.no_grad():
        world.loss(cached=True)
    keep.remove()

    def loss() -> Tensor:
        forward = embed.forward
        embed.forward = lambda ids: tables[0]
        try:
            return world.loss()
        finally:
            embed.forward = forward

    return Variant(world, loss)


def fused_norms(world: World) -> Variant:
    """Norms of queries and keys with weights in the activations' dtype: torch fuses no other under autocast."""
    transformer = world.enhancer.denoiser.transformer
    norms = [m for m in transformer.modules() if isinstance(m, torch.nn.RMSNorm) and m.weight is not None]

    def fused(norm: torch.nn.RMSNorm, x: Tensor) -> Tensor:
        return torch.rms_norm(x, norm.normalized_shape, norm.weight.to(x.dtype), norm.eps)

    def loss() -> Tensor:
        for norm in norms:
            norm.forward = partial(fused, norm)  # type: ignore[method-assign]
        try:
            return world.loss()
        finally:
            for norm in norms:
                del norm.forward

    return Variant(world, loss)


def compiled_blocks(world: World, **options: Any) -> Variant:
    """The denoiser's repeated blocks through torch.compile; the other variants go on without."""
    transformer = world.enhancer.denoiser.transformer
    transformer.compile_repeated_blocks(fullgraph=True)
    blocks = [m for m in transformer.modules() if m._compiled_call_impl is not None]
    calls = [block._compiled_call_impl for block in blocks]

    def switch(values: list[Any]) -> None:
        for block, value in zip(blocks, values, strict=True):
            block._compiled_call_impl = value

    def loss() -> Tensor:
        switch(calls)
        try:
            return world.loss(**options)
        finally:
            switch([None] * len(blocks))

    switch([None] * len(blocks))
    return Variant(world, loss)


def encoder_as(world: World, dtype: torch.dtype, layout: torch.memory_format) -> VaeTarget:
    """The target tokenizer in another dtype and layout, without its decoder."""
    vae = copy.deepcopy(world.target.module)
    vae.decoder = None
    return VaeTarget(torch.nn.Module.to(vae, dtype=dtype, memory_format=layout), world.recipe.vae_posterior)


def overlapped(world: World, beside: str) -> Variant:
    """The next batch's frozen work on a stream of its own, beside this batch's whole step or its optimizer alone."""
    side = torch.cuda.Stream()

    def frozen() -> tuple[Tensor, Tensor]:
        latents = world.target.encode(world.images)
        return latents, world.eye() if world.frozen_eye else world.enhancer.backbone.normalise(world.images)

    def ahead() -> tuple[Tensor, Tensor]:
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side), torch.no_grad():
            return frozen()

    ready = [ahead()]

    def step() -> None:
        main = torch.cuda.current_stream()
        main.wait_stream(side)
        latents, seen = ready.pop()
        for tensor in (latents, seen):
            tensor.record_stream(main)
        if beside == "step":
            ready.append(ahead())
        world.rebuild(latents, seen).backward()
        if beside == "optimizer":
            ready.append(ahead())
        world.update()
        main.wait_stream(side)  # a step's figure holds all that it queued

    return Variant(world, lambda: world.rebuild(*frozen()), step=step)


def candidates(world: World, libraries: bool, compiled: bool) -> dict[str, Callable[[], Variant]]:
    """What makes each variant, by name."""

    def with_encoder(dtype: torch.dtype, layout: torch.memory_format) -> Variant:
        return Variant(world, partial(world.loss, target=encoder_as(world, dtype, layout)))

    def alone() -> Variant:
        config = tower_config(world.recipe)
        step = LibraryStep(world.enhancer, config, world.target.module, world.recipe, world.device)
        return Variant(world, lambda: step.loss(world.images, world.autocast))

    found: dict[str, Callable[[], Variant]] = {OURS: lambda: Variant(world, world.loss)}
    if libraries:
        found[LIBRARIES] = alone
    found |= {
        CACHED: lambda: Variant(world, partial(world.loss, cached=True)),
        "rotary tables once": lambda: constant_rope(world),
        "AdamW not fused": lambda: Variant(world, world.loss, world.adamw()),
        "VAE channels-last": lambda: with_encoder(torch.float32, torch.channels_last),
        "VAE bf16": lambda: with_encoder(torch.bfloat16, torch.contiguous_format),
        "VAE bf16 channels-last": lambda: with_encoder(torch.bfloat16, torch.channels_last),
    }
    if world.recipe.precision == "bf16":  # elsewhere they are fused
        found["q and k norms fused"] = lambda: fused_norms(world)
    if compiled:
        found["blocks compiled"] = lambda: compiled_blocks(world)
    if world.device.type == "cuda":
        found["next batch beside the step"] = lambda: overlapped(world, "step")
        found["next batch beside the optimizer"] = lambda: overlapped(world, "optimizer")
        if compiled:
            found["VAE bf16 channels-last, blocks compiled"] = lambda: compiled_blocks(
                world, target=encoder_as(world, torch.bfloat16, torch.channels_last)
            )
    return found
