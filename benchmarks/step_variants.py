"""A training step beside the same step on the libraries alone, and beside every change that might make it faster.

Steps of all variants take turns within one process, so that other work on the machine meets all of them; a variant's
figure is the median of its ratios to our step of the same round (on one CPU thread in its own CPU seconds). Loss and
gradients of ours and of the libraries' step are compared first: both compute the same thing; every other variant's loss
is set against ours with the same draws. A variant that fails is named with its reason, and the rest go on. Last, the
trainer itself runs: what it spends outside backbone, target tokenizer, denoiser and optimizer, and how often a step
makes the host wait for a GPU.

    python benchmarks/step_variants.py                                         # a CPU, reduced width, some minutes
    python benchmarks/step_variants.py --size full --compile --output F.json   # a GPU with 80 GB
"""

# ruff: noqa: E402 - the path is set before the imports that need it
from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import torch
from enhance_step import OPTIMIZER_BYTES, Rates, free, images_of, rates_of, write_shards
from measure import Clock, machine, own_time, peak_bytes, reset_peak, summary
from step_candidates import CACHED, LIBRARIES, OURS, Variant, World, candidates
from torch import Tensor
from trainer_step import host_syncs, trainer_step

from llava_genhancer import costs, recipes

REDUCED = {
    "denoiser_layers": 2, "denoiser_single_layers": 4, "denoiser_heads": 8, "denoiser_head_dim": 32,
    "denoiser_rope_axes": "8,12,12", "vec_dim": 128, "txt_dim": 256, "num_workers": 0,
    "per_device_batch_size": 16, "global_batch_size": 16,
}  # fmt: skip


# --- comparing ----------------------------------------------------------------------------------------------------


def same_draws(loss: Callable[[], Tensor]) -> Tensor:
    """A loss with the draws that all variants are compared on."""
    torch.manual_seed(0)
    return loss()


def gradients(variant: Variant) -> dict[int, Tensor]:
    """Of every trained weight, by its place."""
    same_draws(variant.loss).backward()
    found = {i: p.grad for i, p in enumerate(variant.world.trained) if p.grad is not None}
    for parameter in variant.world.enhancer.parameters():
        parameter.grad = None
    return found


def gradient_difference(ours: Variant, theirs: Variant) -> float:
    """Largest difference of a gradient, relative to the norm of ours; both must reach the same weights."""
    mine, other = gradients(ours), gradients(theirs)
    if mine.keys() != other.keys():
        raise AssertionError(f"ours reaches {len(mine)} weights, the libraries' step {len(other)}")
    return max(float((mine[i] - other[i]).norm() / mine[i].norm().clamp_min(1e-12)) for i in mine)


def prepare(world: World, libraries: bool, compiled: bool) -> tuple[dict[str, Variant], dict[str, Any], dict[str, str]]:
    """Variants that work, what was found of each before timing, and why the others do not."""
    variants: dict[str, Variant] = {}
    facts: dict[str, Any] = {}
    failed: dict[str, str] = {}
    for name, make in candidates(world, libraries, compiled).items():
        started = time.perf_counter()
        try:
            variant = make()
            loss = float(same_draws(variant.loss).detach())
            variant()
            facts[name] = {"first_s": time.perf_counter() - started, "loss": loss}
            if name == LIBRARIES:
                facts[name]["gradient_difference"] = gradient_difference(variants[OURS], variant)
            variants[name] = variant
        except Exception as error:  # one variant that cannot run here must not hide the others' figures
            if name == OURS:
                raise
            failed[name] = f"{type(error).__name__}: {(str(error).strip().splitlines() or ['?'])[0][:200]}"
            world.optimizer.zero_grad(set_to_none=True)
            free(world.device)
    return variants, facts, failed


def compare(world: World, rounds: int, libraries: bool, compiled: bool) -> dict[str, Any]:
    """Every variant once a round, in turn."""
    variants, facts, failed = prepare(world, libraries, compiled)
    set_against(variants, facts)
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(-1, rounds):
        turn = number % len(variants)  # another one begins each round: the first one's caches are the coldest
        order = [*list(variants)[turn:], *list(variants)[:turn]]
        clock = Clock(world.device, own_time())
        clock.mark()
        for name in order:
            variants[name]()
            clock.mark()
        for name, time_taken in zip(order, clock.seconds(), strict=True):
            if number >= 0:
                seconds[name].append(time_taken)
    ours = seconds[OURS]
    with host_syncs(world.device) as syncs:
        variants[OURS]()
    rows = {
        name: facts[name]
        | summary(times)
        | {"ratio_to_ours": statistics.median(t / o for t, o in zip(times, ours, strict=True))}
        for name, times in seconds.items()
    }
    return {"variants": rows, "failed": failed, "host_syncs": dict(syncs)}


def set_against(variants: dict[str, Variant], facts: dict[str, Any]) -> None:
    """Note how far each variant's loss is off ours; in fp32 the libraries' step must have our loss and gradients."""
    base = float(same_draws(variants[OURS].loss).detach())
    for name, variant in variants.items():
        facts[name]["loss_difference"] = abs(float(same_draws(variant.loss).detach()) - base) / base
    theirs, exact = facts.get(LIBRARIES), variants[OURS].world.recipe.precision == "fp32"
    if theirs and exact and (theirs["loss_difference"] > 1e-5 or theirs["gradient_difference"] > 1e-4):
        raise AssertionError(f"ours and the libraries' step do not compute the same: {theirs}")


def floors(world: World, rates: Rates) -> dict[str, float]:
    """Counted FLOPs at the measured rates plus the optimizer's bytes at the measured copy rate, seconds a step."""
    optimizer = OPTIMIZER_BYTES * sum(p.numel() for p in world.trained) / rates.copy
    found = {}
    for name, crops in ((OURS, 0), (CACHED, 1)):
        recipe = dataclasses.replace(world.recipe, cache_crops=crops)
        flops = costs.step_flops(recipe, world.stage, world.facts, world.vae_facts)
        seconds = {part: n / (rates.vae if part == "target encoding" else rates.model) for part, n in flops.items()}
        found[name] = recipe.per_device_batch_size * sum(seconds.values()) + optimizer
    return found


# --- showing ------------------------------------------------------------------------------------------------------


def table(stage: str, result: dict[str, Any]) -> str:
    """A stage for reading."""
    lines = [f"stage {stage:34}{'ms':>10}{'of ours':>9}{'floor ms':>10}{'of floor':>10}{'loss off':>10}"]
    for name, row in result["variants"].items():
        floor = result["floors"].get(name)
        against = f"{floor * 1e3:>10.2f}{row['median_s'] / floor:>10.2f}" if floor else f"{'':20}"
        off = f"{row['loss_difference']:>10.1e}" if row.get("loss_difference") else ""
        lines.append(f"{name:40}{row['median_s'] * 1e3:>10.2f}{row['ratio_to_ours']:>9.2f}{against}{off}")
    lines += [f"{name:40} failed: {why}" for name, why in result["failed"].items()]
    lines.append(f"host syncs in one step: {sum(result['host_syncs'].values())}")
    return "\n".join(lines)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--size", choices=("reduced", "full"), default="reduced")
    parser.add_argument("--stages", type=int, nargs="+", choices=(1, 2), default=[1, 2])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--compile", action="store_true", help="also the denoiser's blocks through torch.compile")
    parser.add_argument("--no-libraries", action="store_true", help="leave the libraries' step out")
    parser.add_argument("--device", help="default: cuda where there is one")
    parser.add_argument("--output", metavar="JSON", help="written anew after each part")
    return parser.parse_args(argv)


def write(output: str | None, result: dict[str, Any]) -> None:
    """What there is so far."""
    if output:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        Path(output).write_text(json.dumps(result, indent=1) + "\n")


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure, print, write."""
    args = parse(argv)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    full = args.size == "full"
    recipe = recipes.get_recipe("openai-l14-224" if full else "tiny")
    recipe = recipes.override(recipe, {"num_workers": 0, "global_batch_size": 16} if full else REDUCED)
    rates = rates_of(recipe, device)
    result: dict[str, Any] = {
        "format": 2, "size": args.size, "recipe": recipe.name, "machine": machine(device),
        "rates": dataclasses.asdict(rates), "stages": {},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        write_shards(Path(folder), 64, 360 if full else 96)
        images = next(images_of(recipe, Path(folder), 224 if full else 48, device))
        for stage in args.stages:
            reset_peak(device)
            world = World(recipe, stage, device, images)
            found = compare(world, args.rounds, not args.no_libraries, args.compile) | {"floors": floors(world, rates)}
            result["stages"][str(stage)] = found | {"peak_bytes": peak_bytes(device)}
            del world
            free(device)
            print(table(str(stage), found), flush=True)
            write(args.output, result)
        for stage in args.stages:
            trainer = trainer_step(recipe, stage, device, Path(folder), max(4, args.rounds // 2))
            result["stages"][str(stage)]["trainer"] = trainer
            print(
                f"stage {stage} in the trainer: {trainer['step_s'] * 1e3:.2f} ms a step, "
                f"{trainer['outside_share']:.1%} outside its parts, {trainer['host_syncs_per_step']:.1f} host syncs",
                flush=True,
            )
            write(args.output, result)
    return result


if __name__ == "__main__":
    main()
