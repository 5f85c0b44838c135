"""Faults on purpose: what was tried, and what held.

    make chaos                                            # everything, an hour at most
    python benchmarks/chaos --families kills --kills 8 --seed 3

Families: kills, disk, damage, losses, hosts. The seed draws kinds and moments and is printed; a table goes to the
terminal and, with --output, to a file. Nothing is left behind but WORK, where every process's words are.
"""

from __future__ import annotations

import argparse
import importlib
import os
import secrets
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
os.environ["OMP_NUM_THREADS"] = "1"  # before torch is loaded: forks of this process train

from world import Outcome

from llava_genhancer.run import write_text

FAMILIES = ("kills", "disk", "damage", "losses", "hosts")


def main(argv: list[str] | None = None) -> int:
    """Run the families, print the table; 1 if anything did not hold, else 3 if the machine was too slow to judge."""
    parser = argparse.ArgumentParser(description="Faults on purpose: what was tried, and what held.")
    parser.add_argument(
        "--families", default=",".join(FAMILIES), help=f"comma-separated (default: {','.join(FAMILIES)})"
    )
    parser.add_argument("--kills", type=int, default=80, help="kills in all (default: 80)")
    parser.add_argument("--launchers", help="that the kills go over (default: plain,torchrun,deepspeed)")
    parser.add_argument("--seed", type=int, help="draws kinds and moments (default: drawn)")
    parser.add_argument("--work", type=Path, help="where the runs go (default: a new temporary folder)")
    parser.add_argument("--output", type=Path, help="write the table here")
    args = parser.parse_args(argv)
    if unknown := set(args.families.split(",")) - set(FAMILIES):
        parser.error(f"unknown families: {', '.join(sorted(unknown))}")
    seed = secrets.randbelow(10**6) if args.seed is None else args.seed
    work = args.work or Path(tempfile.mkdtemp(prefix="chaos-"))
    say(f"seed {seed}, work in {work}")
    outcomes: list[Outcome] = []
    head = f"Seed {seed}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.0f} before"
    for family in args.families.split(","):
        started = time.monotonic()
        chosen = {"launchers": tuple(args.launchers.split(","))} if args.launchers and family == "kills" else {}
        whole = Outcome(family, "all that were left", "are tried", tried=1)
        with whole.complaints():
            outcomes += importlib.import_module(family).run_family(work / family, seed=seed, total=args.kills, **chosen)
        outcomes += [whole] if whole.broken or whole.slow else []
        head += f"; {family} {time.monotonic() - started:.0f} s"
        say(head.rpartition("; ")[2])
        if args.output:  # after each family: an hour is long
            write_text(args.output, table(outcomes, head) + "\n")
    print(table(outcomes, head))
    if any(not outcome.held and not outcome.unjudged for outcome in outcomes):
        return 1
    return 3 if any(outcome.unjudged for outcome in outcomes) else 0


def say(text: str) -> None:
    """Progress, beside the table."""
    print(f"chaos: {text}", file=sys.stderr, flush=True)


def table(outcomes: list[Outcome], head: str) -> str:
    """Markdown: a row for each fault, then what did not hold."""
    lines = [f"{head}.", "", "| family | fault | tried | what must hold | held |", "|---|---|---|---|---|"]
    lines += [f"| {o.family} | {o.fault} | {o.tried} | {o.must} | {o.verdict} |" for o in outcomes]
    complaints = [f"* {o.family}, {o.fault}: {what}" for o in outcomes for what in (*o.broken, *o.slow)]
    return "\n".join([*lines, *([""] if complaints else []), *complaints])


if __name__ == "__main__":
    sys.exit(main())
