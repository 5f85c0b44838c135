"""What might make our LLaVA trainings faster: other orders of samples, packing, the tower's features from a cache.

Padding is counted, not timed, at LLaVA-1.5's own shapes: lengths are drawn, batches made by the project's own sampler,
and a step costs what its slowest rank computes. Then the model's steps are timed at a reduced size, variants in turns
within one process, losses compared first.

    python benchmarks/llava_variants.py                # a CPU, some minutes
    python benchmarks/llava_variants.py --rounds 3 --output F.json

The mixture's counts are LLaVA-1.5's (arXiv 2310.03744); it publishes no lengths. Ours are estimates: of the 158 000
instructions from the bytes of their published files, of the question sets from their questions per image, about twenty
tokens a question and forty a box.
"""

# ruff: noqa: E402 - the path is set before the imports that need it
from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]  # works uninstalled: `measure` beside this file, the package above it

import torch
from llava_train import SIZES, write_inputs
from measure import machine, matmul_rate, peak_bytes
from torch.utils.flop_counter import FlopCounterMode

from llava_genhancer import recipes
from llava_genhancer.llava.batches import build_loader, global_batches
from llava_genhancer.llava.conversation import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava_genhancer.llava.dataset import Collator
from llava_genhancer.llava.features import open_features
from llava_genhancer.llava.model import Llava, build_llava
from llava_genhancer.llava.recipes import LlavaRecipe
from llava_genhancer.llava.samples import read_samples

CPU = torch.device("cpu")
IMAGE = 576  # tokens of ViT-L/14 at 336 px
MAX_LENGTH = 2048
# Thousands of samples, median tokens of text with its template, spread of their logarithm, tokens per word.
MIXTURE = {
    "conversations": (58, 420, 0.35, 1.35), "descriptions": (23, 190, 0.3, 1.35), "reasoning": (77, 230, 0.3, 1.35),
    "ShareGPT": (40, 1100, 0.6, 1.5), "VQAv2": (83, 170, 0.5, 1.6), "GQA": (72, 310, 0.4, 1.6),
    "OKVQA": (9, 80, 0.2, 1.6), "OCRVQA": (80, 175, 0.2, 1.6), "A-OKVQA": (66, 130, 0.2, 1.6),
    "TextCaps": (22, 85, 0.2, 1.4), "RefCOCO": (48, 370, 0.35, 3.0), "VG": (86, 450, 0.15, 3.0),
}  # fmt: skip
TEXT_ONLY = "ShareGPT"
CAPTIONS = {"captions": (558, 15, 0.5, 1.35)}
VICUNA_7B = {"layers": 32, "width": 4096, "weights": 32 * (4 * 4096**2 + 3 * 4096 * 11008)}
VIT_L = {"layers": 24, "width": 1024, "weights": 24 * 12 * 1024**2}


# --- padding, counted -------------------------------------------------------------------------------------------------


def draw(sources: dict[str, tuple[float, ...]], count: int, image: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens of drawn samples, and their words as LLaVA's sampler counts them, negative where there is no image."""
    generator = torch.Generator().manual_seed(0)
    names, table = list(sources), torch.tensor(list(sources.values()))
    kind = torch.multinomial(table[:, 0], count, replacement=True, generator=generator)
    _, median, spread, per_word = table[kind].T
    text = median * torch.exp(spread * torch.randn(count, generator=generator))
    shown = torch.ones(count, dtype=torch.bool)
    if TEXT_ONLY in names:
        shown = kind != names.index(TEXT_ONLY)
    words = (text / per_word * torch.exp(0.1 * torch.randn(count, generator=generator))).clamp(min=1).long()
    tokens = (text.long().clamp(min=4) + image * shown).clamp(max=MAX_LENGTH)
    return tokens, torch.where(shown, words, -words)


def alike(batch: list[int], tokens: torch.Tensor) -> list[int]:
    """A global batch dealt so that a micro-batch's samples are equally long; not LLaVA's order."""
    return sorted(batch, key=lambda i: -int(tokens[i]))


def count_padding(
    tokens: torch.Tensor, words: torch.Tensor, *, size: int, ranks: int, steps: int, grouped: bool
) -> Any:
    """Share of padding, and work of the slowest rank beside LLaVA's order padded, of each order, padded and packed."""
    signs = torch.where(words > 0, 1, -1)
    orders: dict[str, tuple[torch.Tensor, Callable[[list[int]], list[int]]]] = {"LLaVA's order": (words, lambda b: b)}
    if grouped:
        orders["exact lengths"] = (tokens * signs, lambda batch: batch)
    orders["alike in length"] = (words, lambda batch: alike(batch, tokens))
    found: dict[str, dict[str, float]] = {}
    for name, (lengths, deal) in orders.items():
        batches = global_batches(lengths.tolist(), size, ranks * steps, seed=0, epoch=0, by_modality=grouped)
        for way in ("padded", "packed"):
            real = places = work = 0.0
            for batch in batches:
                rows = tokens[torch.tensor(deal(batch))].view(steps, ranks, size)
                computed = rows.amax(-1, keepdim=True).expand_as(rows) if way == "padded" else rows
                real, places = real + float(rows.sum()), places + float(computed.sum())
                work += float(forward_flops(computed.double()).sum(-1).amax(-1).sum())
            found[f"{name}, {way}"] = {"padding_share": 1 - real / places, "work": work}
    first = found["LLaVA's order, padded"]["work"]
    return {name: {**row, "work": row["work"] / first} for name, row in found.items()}


def forward_flops(lengths: torch.Tensor) -> torch.Tensor:
    """Of Vicuna-7B's layers, samples of so many tokens each, attention causal."""
    return 2 * VICUNA_7B["weights"] * lengths + 2 * VICUNA_7B["layers"] * VICUNA_7B["width"] * lengths**2


def tower_share() -> float:
    """Of ViT-L/14 at 336 px in the FLOPs of a pretraining step of Vicuna-7B: forward, once more, and to the input."""
    tokens = IMAGE + 1
    tower = 2 * VIT_L["weights"] * tokens + 4 * VIT_L["layers"] * VIT_L["width"] * tokens**2
    caption, _ = draw(CAPTIONS, 1000, IMAGE)
    return tower / (tower + 3 * float(forward_flops(caption.double()).mean()))


def count_all(samples: int) -> dict[str, Any]:
    """Both steps at LLaVA's published shapes, and finetuning on one GPU."""
    result = {}
    for image in (IMAGE, 256):
        tokens, words = draw(MIXTURE, samples, image)
        for ranks, steps in ((8, 1), (1, 8)):
            name = f"finetune, {image} tokens an image, {ranks} x 16, {steps} micro-batches"
            result[name] = count_padding(tokens, words, size=16, ranks=ranks, steps=steps, grouped=True)
    tokens, words = draw(CAPTIONS, samples, IMAGE)
    result[f"pretrain, {IMAGE} tokens an image, 8 x 32, 1 micro-batches"] = count_padding(
        tokens, words, size=32, ranks=8, steps=1, grouped=False
    )
    return result


# --- steps, timed -----------------------------------------------------------------------------------------------------


def in_turns(variants: dict[str, Callable[[int], torch.Tensor]], rounds: int) -> dict[str, Any]:
    """Median seconds of each variant, and its median ratio to the first one; who goes first changes."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(-1, rounds):
        names = list(variants)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            begun = time.perf_counter()
            variants[name](turn + 1)
            if turn >= 0:
                seconds[name].append(time.perf_counter() - begun)
    first = next(iter(variants))
    return {
        name: {
            "median_s": statistics.median(each),
            "ratio": statistics.median(a / b for a, b in zip(each, seconds[first], strict=True)),
        }
        for name, each in seconds.items()
    }


def step_of(model: Llava, batch: dict[str, Any]) -> torch.Tensor:
    """Loss, forward and backward."""
    model.zero_grad()
    loss: torch.Tensor = model(batch["input_ids"], batch["labels"], batch["pixel_values"], None, batch["lengths"])
    loss.backward()
    return loss.detach()


def drawn_items(size: int, image: int, side: int, words: int, batches: int) -> list[list[dict[str, Any]]]:
    """Micro-batches of LLaVA's order over the mixture, all lengths by the ratio of the images' tokens."""
    tokens, counted = draw(MIXTURE, 64 * size * batches, IMAGE)
    scaled = (tokens * image / IMAGE).round().long()
    order = global_batches(counted.tolist(), size, 8, seed=0, epoch=0, by_modality=True)
    generator = torch.Generator().manual_seed(1)
    chosen = [i for batch in order[:: len(order) // batches][:batches] for i in batch[3 * size : 4 * size]]
    items = []
    for i in chosen:
        shown = int(counted[i]) > 0
        length = max(int(scaled[i]) - (image - 1) * shown, 6)
        ids = torch.randint(3, words, (length,), generator=generator)
        labels = ids.clone()
        labels[: length // 2] = IGNORE_INDEX
        if shown:
            ids[1] = IMAGE_TOKEN_INDEX
        pixels = torch.randn(1, 3, side, side, generator=generator) if shown else None
        items.append(
            {"input_ids": ids, "labels": labels, "images": pixels, "key": str(i), "skipped": [], "truncated": False}
        )
    return [items[start : start + size] for start in range(0, len(items), size)]


def time_packing(folder: Path, rounds: int, size: int) -> dict[str, Any]:
    """A finetuning step without its optimizer: padded, packed our way, packed by transformers' mask."""
    models = {}
    for name, packing in (("padded", False), ("packed", True)):
        recipe = recipe_of(folder, "finetune", size, **{"finetune.packing": packing})
        models[name] = checkpointed(build_llava(recipe, "finetune"))
    models["packed, one mask"] = copy.deepcopy(models["packed"])
    models["packed, one mask"].language_model.set_attn_implementation("sdpa")
    config = models["padded"].config
    drawn = drawn_items(
        size, config.image_seq_length, config.vision_config.image_size, config.text_config.vocab_size, rounds + 1
    )
    collators = {name: Collator(0, config.image_seq_length, packing=name != "padded") for name in models}
    batches = {name: [collate(items) for items in drawn] for name, collate in collators.items()}
    losses = {name: [float(step_of(models[name], batch)) for batch in batches[name][:2]] for name in models}
    for name in models:
        if not all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(losses[name], losses["padded"], strict=True)):
            raise RuntimeError(f"{name}: losses {losses[name]}, padded {losses['padded']}")
    timed = in_turns({n: lambda turn, n=n: step_of(models[n], batches[n][turn]) for n in models}, rounds)
    tokens = [sum(batch["lengths"]) for batch in batches["packed"]]
    places = sum(batch["input_ids"].numel() for batch in batches["padded"][1:])
    with FlopCounterMode(display=False) as counter:
        step_of(models["packed"], batches["packed"][1])
    flops = counter.get_total_flops() / tokens[1]
    return {
        "variants": {
            n: {**row, "tokens_per_second": statistics.median(tokens[1:]) / row["median_s"]} for n, row in timed.items()
        },
        "padding_share": 1 - sum(tokens[1:]) / places,
        "floor_tokens_per_second": matmul_rate(CPU, torch.float32) / flops,
        "peak_bytes": peak_bytes(CPU),
    }


def time_features(folder: Path, rounds: int, size: int) -> dict[str, Any]:
    """A pretraining step without its optimizer, reading of its data included: with the tower, and on its cache."""
    recipe = recipe_of(folder, "pretrain", size)
    models, streams = {}, {}
    for name in ("with the tower", "on the cache"):
        models[name] = checkpointed(build_llava(recipe, "pretrain"))
        loader = build_loader(recipe, recipe.pretrain, read_samples(folder / "pretrain.json", folder / "images"))
        if name == "on the cache":
            begun = time.perf_counter()
            loader.dataset.features = open_features(
                recipe, "pretrain", folder / "cache", loader.dataset, models[name], CPU, autocast=False
            )
            filling = time.perf_counter() - begun
            models[name].vision_tower = None
        streams[name] = iter(loader)
    losses = {n: float(step_of(models[n], next(streams[n]))) for n in models}
    if len(set(losses.values())) != 1:
        raise RuntimeError(f"the cache changes the loss: {losses}")
    timed = in_turns({n: lambda turn, n=n: step_of(models[n], next(streams[n])) for n in models}, rounds)
    with FlopCounterMode(display=False) as counter:
        step_of(models["on the cache"], next(streams["on the cache"]))
    return {
        "variants": timed,
        "fill_s": filling,
        "cache_bytes": sum(p.stat().st_size for p in (folder / "cache").rglob("*.bin")),
        "floor_s": counter.get_total_flops() / matmul_rate(CPU, torch.float32),
        "peak_bytes": peak_bytes(CPU),
    }


def checkpointed(model: Llava) -> Llava:
    """As training runs it."""
    model.language_model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def recipe_of(folder: Path, step: str, size: int, **fields: Any) -> LlavaRecipe:
    """The reduced LLaVA in ``folder``, fp32, no data workers."""
    common = {
        "llm": str(folder / "llm"), "tower": str(folder / "tower"), "precision": "fp32", "num_workers": 0,
        f"{step}.per_device_batch_size": size, f"{step}.global_batch_size": size,
    }  # fmt: skip
    return recipes.override(LlavaRecipe(), {**common, **fields})


def show(result: dict[str, Any]) -> str:
    """The figures for reading."""
    lines = []
    for name, rows in result["counted"].items():
        lines.append(f"{name}\n  {'':34}{'padding':>8}{'slowest rank, times LLaVA padded':>36}")
        lines += [f"  {way:34}{row['padding_share']:8.1%}{row['work']:36.3f}" for way, row in rows.items()]
    lines.append(f"tower's share of a 7B's pretraining step: {result['tower_share']:.1%}")
    for name in ("packing", "features"):
        lines.append(name)
        rows = result[name]["variants"].items()
        lines += [f"  {way:34}{row['median_s']:8.3f} s{row['ratio']:8.3f}" for way, row in rows]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Count, time, print, write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--size", choices=tuple(SIZES), default="small")
    parser.add_argument("--batch", type=int, default=8, help="samples per timed step")
    parser.add_argument("--rounds", type=int, default=8, help="turns of each variant")
    parser.add_argument("--samples", type=int, default=100_000, help="drawn for the counts")
    parser.add_argument("--output", metavar="JSON", help="write the figures here")
    args = parser.parse_args(argv)
    result: dict[str, Any] = {"format": 1, "size": args.size, "batch": args.batch, "machine": machine(CPU)}
    result["counted"] = count_all(args.samples)
    result["tower_share"] = tower_share()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(folder, SIZES[args.size], args.batch * (args.rounds + 3))
        result["packing"] = time_packing(folder, args.rounds, args.batch)
        result["features"] = time_features(folder, args.rounds, args.batch)
    print(show(result))
    if args.output:
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        Path(args.output).write_text(json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    main()
