"""A stage-1 step beside the same step on the libraries alone, and beside every change that might make it faster.

Steps of all variants take turns within one process, so that other work on the machine meets all of them; a variant's
figure is the median of its ratios to our step of the same round. The losses of ours and of the libraries' step are
compared first: both compute the same thing. Last, the trainer itself runs, and what it spends outside backbone, target
tokenizer, denoiser and optimizer is set against the whole.

    python benchmarks/step_variants.py                                    # a CPU, reduced width, under two minutes
    python benchmarks/step_variants.py --size full --compile --output F.json   # a GPU with 80 GB
"""

# ruff: noqa: E402 - the path is set before the imports that need it
from __future__ import annotations

import argparse
import contextlib
import copy
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import torch
from enhance_step import build, images_of, rates_of, write_shards
from measure import Clock, machine, peak_bytes, summary
from torch import Tensor

from llava_genhancer import costs, recipes
from llava_genhancer.enhance.targets import VaeTarget
from llava_genhancer.recipes import Recipe

REDUCED = {
    "denoiser_layers": 2, "denoiser_single_layers": 4, "denoiser_heads": 8, "denoiser_head_dim": 32,
    "denoiser_rope_axes": "8,12,12", "vec_dim": 128, "txt_dim": 256, "num_workers": 0,
    "per_device_batch_size": 16, "global_batch_size": 16,
}  # fmt: skip


class World:
    """Models, one batch, and the two ways to take a step."""

    def __init__(self, recipe: Recipe, device: torch.device, images: Tensor, libraries: bool):
        self.recipe, self.device, self.images = recipe, device, images
        self.enhancer, self.target, self.facts, self.vae_facts = build(recipe, 1, device)
        self.optimizer = self.new_optimizer(self.enhancer, fused=True)
        self.moments = self.target.moments(images)
        with torch.no_grad(), self.autocast():
            self.tokens = self.enhancer.tokens(self.enhancer.backbone.normalise(images)).float()
        kept = self.enhancer.denoiser.transformer
        if libraries:  # their own modules with our weights, no hook of ours
            self.reference = copy.deepcopy(self.enhancer)
            self.reference.denoiser.transformer = bare = type(kept).from_config(kept.config).to(device)
            bare.load_state_dict(kept.state_dict())
            self.reference_optimizer = self.new_optimizer(self.reference, fused=True)
        keep = kept.pos_embed.register_forward_hook(lambda module, inputs, output: setattr(self, "rope", output))
        with torch.no_grad(), self.autocast():
            self.enhancer(self.tokens, self.target.draw(self.moments))
        keep.remove()

    def new_optimizer(self, model: torch.nn.Module, **options: Any) -> torch.optim.Optimizer:
        """The recipe's AdamW."""
        trained = [p for p in model.parameters() if p.requires_grad]
        return torch.optim.AdamW(trained, lr=1e-5, weight_decay=self.recipe.weight_decay, **options)

    def autocast(self) -> Any:
        """The recipe's arithmetic."""
        half = self.recipe.precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16) if half else contextlib.nullcontext()

    def update(self, loss: Tensor, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Tensor:
        """Backward, clip, step."""
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], self.recipe.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def ours(
        self,
        *,
        cached: bool = False,
        target: VaeTarget | None = None,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> Tensor:
        """What training does."""
        tokenizer = target or self.target
        latents = tokenizer.draw(self.moments) if cached else tokenizer.encode(self.images)
        with self.autocast():
            seen = self.tokens if cached else self.enhancer.backbone.normalise(self.images)
            loss = self.enhancer(seen, latents)
        return self.update(loss, self.enhancer, optimizer or self.optimizer)

    def libraries(self) -> Tensor:
        """The same on transformers, diffusers and torch alone, as a script would write it."""
        model, vae, recipe = self.reference, self.target.vae, self.recipe
        backbone, transformer = model.backbone, model.denoiser.transformer
        with torch.no_grad():
            pixels = self.images.float() / 127.5 - 1
            z = vae.encode(pixels.to(vae.dtype)).latent_dist.sample().float()
            clean = (z - (vae.config.shift_factor or 0)) * vae.config.scaling_factor
            mean = torch.tensor(backbone.image_mean, device=self.device).view(3, 1, 1)
            std = torch.tensor(backbone.image_std, device=self.device).view(3, 1, 1)
            with self.autocast():
                pooled = backbone.vision_model((self.images.float() / 255 - mean) / std).pooler_output
                token = backbone.visual_projection(pooled)
        b, c, h, w = clean.shape
        clean = clean.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)
        t = torch.sigmoid(recipe.t_scale * torch.randn(b, device=self.device))
        noise = torch.randn_like(clean)
        x_t = (1 - t[:, None, None]) * clean + t[:, None, None] * noise
        ids = torch.zeros(h // 2, w // 2, 3, device=self.device)
        ids[..., 1] += torch.arange(h // 2, device=self.device)[:, None]
        ids[..., 2] += torch.arange(w // 2, device=self.device)[None]
        with self.autocast():
            predicted = transformer(
                hidden_states=x_t,
                encoder_hidden_states=model.projector.to_txt(token)[:, None],
                pooled_projections=model.projector.to_vec(token),
                timestep=t,
                guidance=torch.full_like(t, recipe.guidance),
                img_ids=ids.view(-1, 3),
                txt_ids=torch.zeros(1, 3, device=self.device),
                return_dict=False,
            )[0]
        loss = torch.nn.functional.mse_loss(predicted.float(), noise - clean)
        return self.update(loss, model, self.reference_optimizer)


def with_constant_rope(world: World) -> Tensor:
    """The rotary tables computed once."""
    embed = world.enhancer.denoiser.transformer.pos_embed
    forward = embed.forward
    embed.forward = lambda ids: world.rope
    try:
        return world.ours()
    finally:
        embed.forward = forward


def encoder_as(world: World, dtype: torch.dtype, layout: torch.memory_format) -> VaeTarget:
    """The target tokenizer in another dtype and layout, without its decoder."""
    vae = copy.deepcopy(world.target.vae)
    vae.decoder = None
    return VaeTarget(torch.nn.Module.to(vae, dtype=dtype, memory_format=layout), world.recipe.vae_posterior)


def variants(world: World, libraries: bool, compiled: bool) -> dict[str, Callable[[], Tensor]]:
    """Steps by name."""
    plain = world.new_optimizer(world.enhancer)
    found: dict[str, Callable[[], Tensor]] = {"ours": world.ours}
    if libraries:
        found["the libraries alone"] = world.libraries
    found |= {
        "targets and tokens cached": lambda: world.ours(cached=True),
        "rotary tables once": lambda: with_constant_rope(world),
        "AdamW not fused": lambda: world.ours(optimizer=plain),
    }
    encoders = {"VAE channels-last": encoder_as(world, torch.float32, torch.channels_last)}
    if world.device.type == "cuda":  # convolutions in bf16 are not what CPUs are made for
        encoders["VAE bf16"] = encoder_as(world, torch.bfloat16, torch.contiguous_format)
        encoders["VAE bf16 channels-last"] = encoder_as(world, torch.bfloat16, torch.channels_last)
    found |= {name: partial(world.ours, target=target) for name, target in encoders.items()}
    if compiled:
        twin = copy.copy(world)
        twin.enhancer = copy.deepcopy(world.enhancer)
        twin.optimizer = twin.new_optimizer(twin.enhancer, fused=True)
        twin.enhancer.denoiser.transformer.compile_repeated_blocks(fullgraph=True)
        found["denoiser's blocks compiled"] = twin.ours
    return found


def loss_difference(world: World) -> float:
    """Of our step and the libraries' with the same draws, relative."""
    torch.manual_seed(0)
    mine = world.ours()
    torch.manual_seed(0)
    theirs = world.libraries()
    difference = abs(float(mine) - float(theirs)) / float(theirs)
    if difference > (1e-5 if world.recipe.precision == "fp32" else 1e-2):
        raise AssertionError(f"ours and the libraries' step differ: {float(mine)} and {float(theirs)}")
    return difference


def compare(world: World, rounds: int, libraries: bool, compiled: bool) -> dict[str, Any]:
    """Every variant once a round, in turn."""
    difference = loss_difference(world) if libraries else None
    table = variants(world, libraries, compiled)
    seconds: dict[str, list[float]] = {name: [] for name in table}
    for number in range(-2, rounds):
        turn = number % len(table)  # another one begins each round: the first one's caches are the coldest
        for name, step in [*list(table.items())[turn:], *list(table.items())[:turn]]:
            clock = Clock(world.device)
            clock.mark()
            step()
            clock.mark()
            if number >= 0:
                seconds[name] += clock.seconds()
    ours = seconds["ours"]
    return {
        "loss_difference": difference,
        "variants": {
            name: summary(times) | {"ratio_to_ours": statistics.median(t / o for t, o in zip(times, ours, strict=True))}
            for name, times in seconds.items()
        },
    }


def floors(world: World) -> dict[str, float]:
    """Counted FLOPs at the measured rates plus the optimizer's bytes at the measured copy rate, seconds a step."""
    rates = rates_of(world.recipe, world.device)
    batch = world.recipe.per_device_batch_size
    flops = costs.step_flops(world.recipe, 1, world.facts, world.vae_facts)
    trained = sum(p.numel() for p in world.enhancer.parameters() if p.requires_grad)
    cached = batch * flops["denoiser"] / rates.model + 40 * trained / rates.copy
    frozen = batch * (flops["backbone"] / rates.model + flops["target encoding"] / rates.vae)
    return {"ours": cached + frozen, "targets and tokens cached": cached}


def trainer_overhead(recipe: Recipe, device: torch.device, folder: Path, steps: int) -> dict[str, float]:
    """Seconds a step in the trainer, and those of them outside the models, their backward pass and the optimizer.

    On a GPU the marks wait for the device, which the trainer itself does not: the overhead is then an upper bound.
    """
    from transformers import TrainerCallback

    from llava_genhancer import engine
    from llava_genhancer.enhance.train import EnhanceTrainer, training_arguments

    recipe = recipes.override(
        recipe,
        {"stage1.max_steps": steps, "stage1.warmup_steps": 0, "stage1.save_steps": steps + 1, "stage1.log_steps": 10},
    )
    with tempfile.TemporaryDirectory() as out:
        args = training_arguments(recipe, 1, Path(out) / "stage1", None)
        args.save_strategy = "no"
        enhancer, target, *_ = build(recipe, 1, device)
        batches = _Batches(images_of(recipe, folder, enhancer.backbone.image_size, torch.device("cpu")))
        inside: list[float] = []

        def timed(owner: Any, name: str) -> None:
            work = getattr(owner, name)

            def wrapped(*inputs: Any, **options: Any) -> Any:
                _wait(device)
                started = time.perf_counter()
                result = work(*inputs, **options)
                _wait(device)
                inside.append(time.perf_counter() - started)
                return result

            setattr(owner, name, wrapped)

        marks: list[tuple[float, float]] = []

        class Steps(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                marks.append((time.perf_counter(), sum(inside)))

            def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if not isinstance(trainer.optimizer.step, _Once):
                    timed(trainer.optimizer, "step")
                    trainer.optimizer.step = _Once(trainer.optimizer.step)

        trainer = EnhanceTrainer(enhancer, args, batches, target=target, keep_checkpoints=2, facts={})
        trainer.add_callback(Steps())
        timed(trainer.target, "encode")
        timed(enhancer, "forward")
        timed(trainer.accelerator, "backward")
        timed(trainer.accelerator, "clip_grad_norm_")
        timed(batches, "next")  # reading data is another benchmark's matter
        trainer.train()
        engine.forget()
    whole = [b[0] - a[0] for a, b in pairwise(marks[2:])]
    within = [b[1] - a[1] for a, b in pairwise(marks[2:])]
    share = statistics.median((w - i) / w for w, i in zip(whole, within, strict=True))
    return {"step_s": statistics.median(whole), "outside_share": share}


class _Once:
    """A step that is timed already."""

    def __init__(self, call: Callable[..., Any]):
        self.call = call

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        return self.call(*inputs, **options)


class _Batches:
    """A loader for the trainer, with reading as a method of its own."""

    def __init__(self, stream: Iterator[Tensor]):
        self.stream = stream

    def next(self) -> Tensor:
        return next(self.stream)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while True:
            images = self.next()
            yield {"images": images, "keys": ["-"] * len(images)}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass

    def report(self) -> Any:
        return None

    def close(self) -> None:
        pass


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def table(result: dict[str, Any]) -> str:
    """For reading."""
    lines = [f"{'':30}{'ms':>10}{'of ours':>9}{'floor ms':>10}{'of floor':>10}"]
    for name, row in result["variants"].items():
        floor = result["floors"].get(name)
        against = f"{floor * 1e3:>10.2f}{row['median_s'] / floor:>10.2f}" if floor else ""
        lines.append(f"{name:30}{row['median_s'] * 1e3:>10.2f}{row['ratio_to_ours']:>9.2f}{against}")
    trainer = result["trainer"]
    lines.append(
        f"the trainer: {trainer['step_s'] * 1e3:.2f} ms a step, {trainer['outside_share']:.1%} outside its parts"
    )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--size", choices=("reduced", "full"), default="reduced")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--compile", action="store_true", help="also the denoiser's blocks through torch.compile")
    parser.add_argument("--no-libraries", action="store_true", help="save the memory of a second model and optimizer")
    parser.add_argument("--device", help="default: cuda where there is one")
    parser.add_argument("--output", metavar="JSON")
    args = parser.parse_args(argv)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    full = args.size == "full"
    recipe = recipes.get_recipe("openai-l14-224" if full else "tiny")
    recipe = recipes.override(recipe, {"num_workers": 0, "global_batch_size": 16} if full else REDUCED)
    with tempfile.TemporaryDirectory() as folder:
        write_shards(Path(folder), 64, 360 if full else 96)
        size = 224 if full else 48
        libraries = not args.no_libraries
        world = World(recipe, device, next(images_of(recipe, Path(folder), size, device)), libraries)
        result = compare(world, args.rounds, libraries, args.compile) | {"floors": floors(world)}
        result |= {"size": args.size, "recipe": recipe.name, "machine": machine(device)}
        result["peak_bytes"] = peak_bytes(device)
        del world
        result["trainer"] = trainer_overhead(recipe, device, Path(folder), max(8, args.rounds))
    print(table(result), flush=True)
    if args.output:
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        Path(args.output).write_text(json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    main()
