"""Files that no rule describes: libFuzzer changes them by what they reach in our readers (and in Pillow's own Python).

    make fuzz-guided                                            # a minute for each sort of file, and a table
    python benchmarks/fuzz_guided.py "tar shards" -max_total_time=600   # one; what follows it is libFuzzer's
    python benchmarks/fuzz_guided.py "tar shards" CRASH-FILE    # a finding once more

What counts as a case that holds is `fuzz.py`'s. Needs atheris, which nothing else here asks for: `make fuzz-guided`
installs it. Corpora and findings stay in `build/fuzz`, and a later run goes on from there. Each sort of file has a
process of its own: `atheris.Fuzz()` ends it without coming back, and in a fork ends it without a word.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import fuzz

ROOT = Path(__file__).resolve().parent.parent
OURS = ["llava_genhancer", "PIL"]
TARGETS = ("images", "tar shards", "LLaVA JSON", "recipe files", "MMVP CSVs", "safetensors", "markers")
SEEDS = 100  # drawn by fuzz.py's rules, beside the valid examples: they know the formats
LIMITS = ("-max_len=8192", "-timeout=10", "-rss_limit_mb=4096", "-print_final_stats=1")
FIGURES = {"tried": "number_of_executed_units", "MiB": "peak_rss_mb"}


def guided(name: str, arguments: list[str], corpus: Path) -> None:
    """Fuzz one sort of file in this process, which does not outlive it."""
    import atheris

    with atheris.instrument_imports(include=OURS):
        import fuzz_cases
    scratch = Path(tempfile.mkdtemp(prefix="fuzz-"))
    kind = next(k for k in fuzz_cases.kinds(scratch) if k.name == name)
    path, tally, guard = scratch / kind.file, fuzz.Tally(name), fuzz.Guard()
    path.parent.mkdir(parents=True, exist_ok=True)
    fuzz.read_examples(kind, path)
    if not corpus.exists():
        corpus.mkdir(parents=True)
        for number, case in enumerate([*kind.examples, *fuzz.drawn(kind, SEEDS)]):
            (corpus / f"seed-{number:03}").write_bytes(case)
    sys.dont_write_bytecode = True
    logging.disable()  # skipped samples are warned of
    files = [] if any(not a.startswith("-") for a in arguments) else [str(corpus)]
    limits = [*LIMITS, f"-artifact_prefix={corpus.parent}/"]
    atheris.Setup([sys.argv[0], *limits, *arguments, *files], lambda data: fuzz.attempt(kind, path, data, guard, tally))
    atheris.Fuzz()


def row(name: str, seconds: int, folder: Path) -> tuple[str, bool]:
    """Fuzz one sort of file in a process of its own; a line about it, and whether all held."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "log"
    with open(log, "wb") as said:
        command = [sys.executable, __file__, name, f"-max_total_time={seconds}"]
        status = subprocess.run(command, stdout=said, stderr=said).returncode
    text = log.read_text(errors="replace")
    figures = {word: found[1] for word, key in FIGURES.items() if (found := re.search(rf"stat::{key}:\s+(\d+)", text))}
    reached = re.findall(r"cov: (\d+)", text) or ["0"]
    finding = re.search(r"^.*Finding: (.*)$|^(==\d+== ERROR: .*)$", text, re.MULTILINE)
    said_of_it = "held" if status == 0 else f"{(finding and (finding[1] or finding[2])) or f'exit {status}'}; see {log}"
    tried = " ".join(f"{figures.get(word, '?'):>8} {word}" for word in FIGURES)
    return f"{name:14}{tried} {reached[0]:>6} to {reached[-1]:>5} branches  {said_of_it}", status == 0


def main(argv: list[str] | None = None) -> int:
    """One sort of file if the first argument names it, else all; 1 if anything did not hold."""
    arguments = sys.argv[1:] if argv is None else argv
    work = ROOT / "build" / "fuzz"
    if arguments and not arguments[0].startswith("-"):
        if arguments[0] not in TARGETS:
            sys.exit(f"fuzz_guided.py: no {arguments[0]!r}; there are {', '.join(TARGETS)}")
        folder = work / arguments[0].replace(" ", "-")
        guided(arguments[0], arguments[1:], folder / "corpus")
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=int, default=60, help="for each sort of file (default: 60)")
    args = parser.parse_args(arguments)
    os.environ["OMP_NUM_THREADS"] = "1"
    all_held = True
    for name in TARGETS:
        line, held = row(name, args.seconds, work / name.replace(" ", "-"))
        print(line, flush=True)
        all_held = all_held and held
    return int(not all_held)


if __name__ == "__main__":
    sys.exit(main())
