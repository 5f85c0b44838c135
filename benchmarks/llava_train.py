"""Tokens per second and memory of our two LLaVA trainings beside those of llava-torch's own trainer.

The same language model, tower and LLaVA JSON of the toy world, the same batch, fp32, one process and one thread each;
each is a process of its own in its own environment (`make test-compat` builds llava-torch's). The two take turns step
by step, one waiting while the other works, so that a busy machine is busy for both. One callback times the steps of
both, data included, the first ones left out.

    python benchmarks/llava_train.py                  # a CPU, seven minutes
    python benchmarks/llava_train.py --output F.json --stages finetune --repeats 3
"""

# ruff: noqa: E402 - the path is set before the imports that need it
from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]  # works uninstalled: `measure` beside this file, the package above it

import torch
from measure import machine

TRAINERS = ("ours", "theirs")
STAGES = ("pretrain", "finetune")
COMPAT = HERE.parent / ".venv-compat" / "bin" / "python"
PATCH = 8  # pixels, of the toy world's towers


@dataclass(frozen=True)
class Size:
    """Shapes of the language model and of its tower.

    Args:
        side: of the tower's image in pixels.
    """

    width: int
    layers: int
    tower_width: int
    tower_layers: int
    side: int

    @property
    def tokens_per_image(self) -> int:
        """Patches of an image."""
        return (self.side // PATCH) ** 2


SIZES = {"small": Size(256, 4, 192, 4, 96), "tiny": Size(32, 2, 32, 2, 32)}


# --- what is measured ---------------------------------------------------------------------------------------------


def write_inputs(folder: Path, size: Size, samples: int) -> None:
    """``llm``, ``tower``, ``pretrain.json``, ``finetune.json`` and ``images`` that both trainers read."""
    from transformers import CLIPModel

    from llava_genhancer.tower.export import save_tower
    from llava_genhancer.toyworld.language import build_llama, save_llama
    from llava_genhancer.toyworld.models import build_clip_config, save_clip
    from llava_genhancer.toyworld.tokenizer import write_tokenizer
    from llava_genhancer.toyworld.writers import write_llava

    torch.manual_seed(0)
    save_llama(build_llama(width=size.width, layers=size.layers), folder / "llm")
    words = len(write_tokenizer(folder / "clip"))
    config = build_clip_config(
        words, width=size.tower_width, layers=size.tower_layers, text_layers=1, image_size=size.side
    )
    clip = CLIPModel(config)
    save_tower(clip, folder / "tower", source=str(save_clip(clip, folder / "clip")), marker={})
    write_llava(folder, samples, seed=0)
    for stage in STAGES:  # whole batches, so that an epoch shows every sample once to both
        path = folder / f"{stage}.json"
        path.write_text(json.dumps(json.loads(path.read_text())[:samples]))


def train(stage: str, pythons: dict[str, str], folder: Path, first: str) -> dict[str, dict[str, Any]]:
    """Both trainings at once, step by step in turns: what `llava_worker.py` saw of each.

    Raises:
        RuntimeError: a training failed, with the end of what it said.
    """
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    pipes = {name: os.pipe() for name in TRAINERS}
    running: dict[str, subprocess.Popen] = {}
    try:
        for name, other in zip(TRAINERS, reversed(TRAINERS), strict=True):
            turns = (pipes[name][0], pipes[other][1])
            command = [pythons[name], str(HERE / "llava_worker.py"), name, stage, str(folder)]
            command += [str(folder / f"{name}.json"), *map(str, turns)]
            path = {"PYTHONPATH": str(HERE.parent) if name == "ours" else ""}
            with open(folder / f"{name}.log", "w") as said:
                running[name] = subprocess.Popen(
                    command, env=environment | path, stdout=said, stderr=subprocess.STDOUT, pass_fds=turns
                )
        os.write(pipes[first][1], b"x")
        while None in (states := [process.poll() for process in running.values()]):
            if any(states):
                break  # one failed, and the other one would wait for its turn for ever
            time.sleep(0.1)
    finally:
        for process in running.values():
            process.kill()
            process.wait()
        for descriptor in sum(pipes.values(), ()):
            os.close(descriptor)
    for name in sorted(running, key=lambda name: -running[name].returncode):  # who failed, before who was ended for it
        if running[name].returncode:
            said_last = (folder / f"{name}.log").read_text()[-4000:]
            raise RuntimeError(f"{name}, {stage}: exit status {running[name].returncode}\n{said_last}")
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in TRAINERS}


def figures(seen: dict[str, Any], warmup: int) -> dict[str, Any]:
    """A run's rates after the first ``warmup`` steps, and its memory."""
    seconds, cpu = seen["seconds"][warmup:], seen["cpu_seconds"][warmup:]
    tokens = sum(seen["tokens"][warmup:])
    return {
        "tokens_per_second": tokens / sum(seconds),
        "tokens_per_cpu_second": tokens / sum(cpu),
        "step_s": statistics.median(seconds),
        "peak_bytes": seen["peak_bytes"],
        "growth_bytes": seen["peak_bytes"] - seen["start_bytes"],
        "first_loss": seen["losses"][0],
        "last_loss": seen["losses"][-1],
    }


def compare(pairs: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """Medians of each trainer's runs, and of the ratios ours / theirs taken pair by pair."""
    result: dict[str, Any] = {
        name: {key: statistics.median(pair[name][key] for pair in pairs) for key in pairs[0][name]} for name in TRAINERS
    }
    for key in ("tokens_per_second", "tokens_per_cpu_second", "peak_bytes", "growth_bytes"):
        ratios = [pair["ours"][key] / pair["theirs"][key] for pair in pairs]
        result[f"{key}_ratio"] = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
    return result | {"runs": pairs}


def measure_stage(stage: str, pythons: dict[str, str], folder: Path, *, repeats: int, warmup: int) -> dict[str, Any]:
    """``repeats`` pairs of trainings, theirs first every second time.

    Raises:
        RuntimeError: a training failed, or the two did not train on the same tokens.
    """
    pairs, facts = [], {}
    for repeat in range(repeats):
        seen = train(stage, pythons, folder, TRAINERS[repeat % 2])
        tokens = {name: sum(seen[name]["tokens"]) for name in TRAINERS}
        if tokens["ours"] != tokens["theirs"]:
            raise RuntimeError(f"{stage}: an epoch has {tokens['ours']} tokens in ours, {tokens['theirs']} in theirs")
        pairs.append({name: figures(seen[name], warmup) for name in TRAINERS})
        facts = {"tokens_per_epoch": tokens["ours"]}
        facts |= {name: {key: seen[name][key] for key in ("torch", "transformers")} for name in TRAINERS}
        rates = ", ".join(f"{name} {pairs[-1][name]['tokens_per_second']:.0f}" for name in TRAINERS)
        print(f"{stage} {repeat + 1}/{repeats}: tokens/s {rates}", file=sys.stderr, flush=True)
    return {"tokens_per_epoch": facts.pop("tokens_per_epoch"), "versions": facts, **compare(pairs)}


# --- showing ------------------------------------------------------------------------------------------------------


def table(stage: str, result: dict[str, Any]) -> str:
    """A stage's result for reading."""
    lines = [f"{stage + ', medians':22}{'ours':>12}{'llava-torch':>13}{'ours/theirs, pair by pair':>28}"]
    rows = (
        ("tokens/s", "tokens_per_second", 1.0, ".0f"),
        ("tokens/CPU second", "tokens_per_cpu_second", 1.0, ".0f"),
        ("step, s", "step_s", 1.0, ".3f"),
        ("peak, MiB", "peak_bytes", 2.0**20, ".0f"),
        ("  of it training", "growth_bytes", 2.0**20, ".0f"),
    )
    for name, key, unit, form in rows:
        ours, theirs = (format(result[trainer][key] / unit, form) for trainer in TRAINERS)
        ratio = result.get(f"{key}_ratio")
        pairwise = f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})" if ratio else ""
        lines.append(f"{name:22}{ours:>12}{theirs:>13}{pairwise:>28}")
    return "\n".join(lines)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--size", choices=tuple(SIZES), default="small")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--batch", type=int, default=8, help="samples per step")
    parser.add_argument("--steps", type=int, default=12, help="of a training, an epoch")
    parser.add_argument("--warmup", type=int, default=2, help="steps left out at the beginning")
    parser.add_argument("--repeats", type=int, default=4, help="pairs of trainings per stage")
    parser.add_argument("--packing", action="store_true", help="ours packs its batches; llava-torch cannot")
    parser.add_argument("--compat", metavar="PYTHON", default=str(COMPAT), help="llava-torch's environment")
    parser.add_argument("--output", metavar="JSON", help="write the figures here")
    args = parser.parse_args(argv)
    if min(args.batch, args.repeats) < 1 or not 0 <= args.warmup < args.steps:
        parser.error("needs a batch and a repeat at least, and more steps than are left out")
    if not Path(args.compat).is_file():
        parser.error(f"--compat {args.compat} is not there: `make test-compat` builds llava-torch's environment")
    return args


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure, print the tables, write the JSON."""
    args = parse(argv)
    size = SIZES[args.size]
    job = {
        "batch": args.batch,
        "steps": args.steps,
        "learning_rate": 1e-3,
        "max_length": 512,
        "tokens_per_image": size.tokens_per_image,
        "packing": args.packing,
    }
    result: dict[str, Any] = {
        "format": 1,
        "size": args.size,
        **dataclasses.asdict(size),
        **job,
        "warmup": args.warmup,
        "precision": "fp32",
        "gradient_checkpointing": True,
        "machine": machine(torch.device("cpu")) | {"threads": 1},
        "stages": {},
    }
    pythons = {"ours": sys.executable, "theirs": args.compat}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(folder, size, args.batch * args.steps)
        (folder / "job.json").write_text(json.dumps(job))
        for stage in args.stages:
            found = measure_stage(stage, pythons, folder, repeats=args.repeats, warmup=args.warmup)
            result["stages"][stage] = found
            print("\n" + table(stage, found), flush=True)
    if args.output:
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        Path(args.output).write_text(json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    main()
