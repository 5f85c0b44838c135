"""All benchmarks one after the other, and one table of what they found.

Each benchmark is a process of its own and writes its JSON; the table reads those files alone, so that it can be made
again from any folder of them. A row is our figure, the reference's or library's from the same run, the counted floor,
our ratio to each, and peak memory. Units differ from row to row; a ratio above one means ours is better beside the
other, and how far ours is from the floor beside that.

    python benchmarks/table.py                           # make bench: everything at CPU size, into build/bench
    python benchmarks/table.py --only data --results F   # one benchmark
    python benchmarks/table.py --show F                  # the table of a folder
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
COMPAT = Path(os.environ.get("LLAVA_GENHANCER_COMPAT_PYTHON", HERE.parent / ".venv-compat" / "bin" / "python"))


@dataclass(frozen=True)
class Row:
    """One line: seconds where ``rate`` is false (less is better), else a rate (more is better)."""

    what: str
    unit: str
    ours: float
    other: float | None = None
    other_name: str = ""
    floor: float | None = None
    peak_bytes: float | None = None
    rate: bool = False
    ratio: float | None = None  # of interleaved pairs, where the benchmark has it

    def cells(self) -> list[str]:
        """The line's cells."""
        better = (lambda a, b: a / b) if self.rate else (lambda a, b: b / a)
        ratio = self.ratio if self.ratio is not None else better(self.ours, self.other) if self.other else None
        distance = 1 / better(self.ours, self.floor) if self.floor else None
        return [
            self.what,
            f"{self.ours:.4g} {self.unit}",
            f"{self.other:.4g} ({self.other_name})" if self.other else "",
            f"{ratio:.2f}" if ratio else "",
            f"{self.floor:.4g}" if self.floor else "",
            f"{distance:.2f}" if distance else "",
            f"{self.peak_bytes / 2**20:.0f} MiB" if self.peak_bytes else "",
        ]


HEAD = ["what", "ours", "beside", "times better", "floor", "ours to floor", "peak"]


# --- from a benchmark's JSON to rows --------------------------------------------------------------------------------


def step_rows(found: dict[str, Any]) -> Iterator[Row]:
    """enhance_step.py: whole steps and their parts against the counted floor."""
    for stage, figures in found["stages"].items():
        step = figures["step_without_data"]["median_s"]
        yield Row(
            f"stage {stage}, step", "ms", step * 1e3, floor=figures["floor_s"] * 1e3, peak_bytes=figures["peak_bytes"]
        )
        for name, part in figures["parts"].items():
            if part["floor_s"]:
                yield Row(f"stage {stage}, {name}", "ms", part["median_s"] * 1e3, floor=part["floor_s"] * 1e3)


def variant_rows(found: dict[str, Any]) -> Iterator[Row]:
    """step_variants.py: our step beside the libraries', beside each candidate, and in the trainer."""
    for stage, figures in found["stages"].items():
        variants, floors = figures["variants"], figures["floors"]
        library = variants.get("the libraries alone", {})
        yield Row(
            f"stage {stage}, wider step", "ms", variants["ours"]["median_s"] * 1e3, library.get("median_s", 0) * 1e3,
            "libraries alone", floors["ours"] * 1e3, figures["peak_bytes"], ratio=library.get("ratio_to_ours"),
        )  # fmt: skip
        for name, row in variants.items():
            if name not in ("ours", "the libraries alone"):
                floor = floors.get(name)
                yield Row(
                    f"stage {stage}, {name}", "ms", row["median_s"] * 1e3, variants["ours"]["median_s"] * 1e3,
                    "ours without", floor and floor * 1e3, ratio=1 / row["ratio_to_ours"],
                )  # fmt: skip
        if "trainer" in figures:
            yield Row(f"stage {stage}, trainer outside its parts", "%", 100 * figures["trainer"]["outside_share"])


def data_rows(found: dict[str, Any]) -> Iterator[Row]:
    """data_stream.py."""
    name = "webdataset + torchvision"
    yield Row(
        "data, one worker", "images/s", found["per_worker"]["ours"], found["per_worker"][name], name, found["floor"],
        found["peak_bytes"], rate=True, ratio=found["ratio"],
    )  # fmt: skip
    for shards, size in found["resident_bytes_by_shards"].items():
        yield Row(f"data, resident with {shards} shards", "MiB", size / 2**20)
    for samples, seconds in found["start_up_s_by_samples"].items():
        yield Row(f"data, first batch of {int(samples):,} samples", "ms", seconds * 1e3)
    for kind, counts in found.get("open_s_by_kind", {}).items():
        for count, seconds in counts.items():
            yield Row(f"data, {int(count):,} in {kind}: open", "ms", seconds * 1e3)


def scaling_rows(found: dict[str, Any]) -> Iterator[Row]:
    """scaling.py: bytes counted with two ranks beside the model's."""
    for row in found["two_ranks"]:
        name = "DDP" if row["zero"] is None else f"ZeRO-{row['zero']}"
        yield Row(f"two ranks, {name}, exchanged a step", "MB", row["bytes"] / 1e6, floor=row["model_bytes"] / 1e6)
    speed = found["images_per_second"]
    yield Row("two ranks, DDP", "images/s", speed["2"], speed["1"], "one rank", rate=True)


def mllm_rows(found: dict[str, Any]) -> Iterator[Row]:
    """mllm_eval.py: questions per second against batch size."""
    other = "lmms-eval's llava_hf"
    theirs = found["ways"][other]["questions_per_second"]
    for name, way in found["ways"].items():
        if name != other:
            rate, times = way["questions_per_second"], found["times_llava_hf"][name]
            yield Row(f"MLLM, {name}", "questions/s", rate, theirs, "llava_hf", rate=True, ratio=times)


def mllm_memory_rows(found: dict[str, Any]) -> Iterator[Row]:
    """mllm_memory.py: a batch's tensors at their peak beside what is counted."""
    for batch, row in found["batches"].items():
        for way, size in row["tensor_bytes"].items():
            counted = row["counted_bytes"] / 2**20
            yield Row(
                f"MLLM's memory, {way}, batch {batch}", "MiB", size / 2**20, floor=counted, peak_bytes=row["peak_bytes"]
            )


def llava_rows(found: dict[str, Any]) -> Iterator[Row]:
    """llava_train.py: tokens per second beside llava-torch."""
    for stage, figures in found["stages"].items():
        ours, theirs = figures["ours"], figures["theirs"]
        yield Row(
            f"LLaVA {stage}", "tokens/s", ours["tokens_per_second"], theirs["tokens_per_second"], "llava-torch",
            peak_bytes=ours["peak_bytes"], rate=True, ratio=figures["tokens_per_second_ratio"]["median"],
        )  # fmt: skip


def llava_variant_rows(found: dict[str, Any]) -> Iterator[Row]:
    """llava_variants.py: padding counted, packing and cached features timed."""
    for name, ways in found["counted"].items():
        if "8 x" in name:
            padded, packed = (ways[f"LLaVA's order, {way}"] for way in ("padded", "packed"))
            yield Row(f"LLaVA {name}: padding", "%", 100 * padded["padding_share"])
            yield Row(f"LLaVA {name}: work packed", "times padded", packed["work"])
    packing, features = found["packing"], found["features"]
    ours, other = (packing["variants"][name] for name in ("packed", "padded"))
    yield Row(
        "LLaVA finetune step, packed", "tokens/s", ours["tokens_per_second"], other["tokens_per_second"], "padded",
        packing["floor_tokens_per_second"], packing["peak_bytes"], rate=True, ratio=1 / ours["ratio"],
    )  # fmt: skip
    ours, other = (features["variants"][name] for name in ("on the cache", "with the tower"))
    yield Row(
        "LLaVA pretrain step, features cached", "ms", ours["median_s"] * 1e3, other["median_s"] * 1e3, "with the tower",
        features["floor_s"] * 1e3, features["peak_bytes"], ratio=1 / ours["ratio"],
    )  # fmt: skip


# Name: the script, its options at CPU size, and what is made of its JSON.
BENCHMARKS: dict[str, tuple[str, list[str], Callable[[dict[str, Any]], Iterator[Row]]]] = {
    "step": ("enhance_step.py", ["--size", "tiny"], step_rows),
    "variants": ("step_variants.py", ["--rounds", "8"], variant_rows),
    "data": ("data_stream.py", ["--rounds", "6"], data_rows),
    "scaling": ("scaling.py", [], scaling_rows),
    "mllm": ("mllm_eval.py", ["--repeats", "5"], mllm_rows),
    "mllm-memory": ("mllm_memory.py", [], mllm_memory_rows),
    "llava-variants": ("llava_variants.py", ["--rounds", "4", "--samples", "20000"], llava_variant_rows),
    "llava": ("llava_train.py", ["--repeats", "1", "--compat", str(COMPAT)], llava_rows),
}


def table(folder: Path) -> str:
    """Markdown of every result in a folder."""
    lines = [HEAD, ["---"] * len(HEAD)]
    for name, (_, _, rows) in BENCHMARKS.items():
        file = folder / f"{name}.json"
        if file.is_file():
            lines += [row.cells() for row in rows(json.loads(file.read_text()))]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Run, write ``table.md``, print it; 1 if a benchmark failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=list(BENCHMARKS), default=list(BENCHMARKS))
    parser.add_argument("--results", type=Path, default=HERE.parent / "build" / "bench")
    parser.add_argument("--show", type=Path, metavar="FOLDER", help="only the table of these results")
    args = parser.parse_args(argv)
    if args.show:
        print(table(args.show))
        return 0
    args.results.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in args.only:
        script, options, _ = BENCHMARKS[name]
        if name == "llava" and not COMPAT.is_file():
            print("llava: left out, as llava-torch's environment is not here (make bench-llava builds it)", flush=True)
            continue
        output = args.results / f"{name}.json"
        output.unlink(missing_ok=True)
        started = time.monotonic()
        done = subprocess.run(
            [sys.executable, str(HERE / script), *options, "--output", str(output)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        print(f"{name}: {script}, {time.monotonic() - started:.0f} s", flush=True)
        if done.returncode:
            failed.append(name)
            print(f"{name} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}", flush=True)
    text = table(args.results)
    (args.results / "table.md").write_text(text)
    print("\n" + text)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
