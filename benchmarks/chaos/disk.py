"""A disk that fills up during a checkpoint, an export, a report: one clear line, nothing lost, and going on."""

from __future__ import annotations

import shutil
from pathlib import Path

from processes import Job, ended, started, wait_for
from world import Outcome, arguments, hashes, mount, mounts, newest, small_disk

from llava_genhancer import run

STEPS = 40
FULL = "No space left on device"
# Words that a full disk may end with: torch's writer does not pass on what the system said.
WORDS = (FULL, "torch could not write a file to its end")
MUST = "one line, last checkpoint whole, goes on"


def run_family(work: Path, *, seed: int, total: int) -> list[Outcome]:
    """Checkpoints of one process and of ZeRO-2 on two ranks, then what is written after training."""
    rows = [
        Outcome("disk", "full during a checkpoint, one process", MUST),
        Outcome("disk", "full during a checkpoint, ZeRO-2 on two ranks", MUST),
        Outcome("disk", "full during the export of a tower", "one line, no half tower, goes on"),
        Outcome("disk", "full during the export of a LLaVA", "one line, no half checkpoint, goes on"),
        Outcome("disk", "full during the report", "one line, goes on"),
    ]
    if not mounts():
        for row in rows:
            row.skipped = "needs root, for a tmpfs"
        return rows
    for launcher, row in zip(("plain", "torchrun"), rows, strict=False):
        with row.complaints():
            checkpoint(launcher, work / launcher, row)
    whole = work / "plain" / "whole"
    with rows[2].complaints():
        export(["export", str(whole)], work / "export", rows[2])
    with rows[3].complaints():
        for training in ("pretrain", "finetune"):
            ended(started("plain", arguments(training, work / "llava", 5), work / "llava.log"))
        export(["llava", "export", str(work / "llava")], work / "llava-export", rows[3])
    with rows[4].complaints():
        report(whole, work / "report", rows[4])
    return rows


def fill(disk: Path) -> Path:
    """A file that takes all that is left."""
    ballast = disk / "ballast"
    with open(ballast, "wb", buffering=0) as f:
        try:
            while f.write(bytes(2**16)):
                pass
        except OSError:
            pass
    return ballast


def one_line(row: Outcome, job: Job, who: str) -> None:
    """The refusal as it should be: one line that says why; torchrun has a traceback of its own for every end."""
    status, lines = job.process.returncode, job.lines()
    row.check(status not in (0, None), f"{who}: exit status {status}")
    row.check(any(word in line for line in lines for word in WORDS), f"{who}: said {lines}")
    row.check(who == "torchrun" or "Traceback" not in job.output(), f"{who}: a traceback: {job.output()[-600:]}")


def checkpoint(launcher: str, work: Path, row: Outcome) -> None:
    """Fill the disk while training goes on; beside it a run that meets no full disk."""
    command = arguments("stage2", work / "whole", STEPS, **{"stage2.max_steps": 10})
    whole = ended(started(launcher, command, work / "whole.log"))
    row.check(whole.process.returncode == 0, f"the run beside it: {whole.lines()}")
    row.tried += 1
    with small_disk(work / "disk", 300) as disk:
        run_dir = disk / "run"
        command = arguments("stage2", run_dir, STEPS, **{"stage2.max_steps": 10})
        job = started(launcher, command, work / "log")
        try:
            wait_for(job, lambda: newest(run_dir / "stage1") >= 10)
            ballast = fill(disk)
            kept = newest(run_dir / "stage1")
            row.check(job.wait() is not None, f"{launcher}: did not end")
        finally:
            job.end()
        one_line(row, job, launcher)
        last = run.last_complete_checkpoint(run_dir / "stage1")
        row.check(
            last is not None and int(last.name.split("-")[1]) >= kept, f"{launcher}: {kept} lost, {last} is the last"
        )
        ballast.unlink()
        again = ended(started(launcher, command, work / "log"))
        row.check(again.process.returncode == 0, f"{launcher}: did not go on: {again.lines()}")
        both = (hashes(folder, ("stage1", "stage2")) for folder in (work / "whole", run_dir))
        row.check(len({tuple(sorted(h.items())) for h in both}) == 1, f"{launcher}: other weights in the end")


def export(verb: list[str], work: Path, row: Outcome) -> None:
    """Onto a disk of one megabyte, then onto a larger one of the same name."""
    row.tried += 1
    command = [*verb, "--output_dir"]
    with small_disk(work / "disk", 1) as disk:
        target = disk / "out"
        job = ended(started("plain", [*command, str(target)], work / "log"))
        one_line(row, job, verb[0])
        left = sorted(str(p.relative_to(disk)) for p in disk.rglob("*") if p.is_file())
        row.check(not left, f"{verb[0]}: left {left}")
        mount("-o", "remount,size=300m", str(disk))
        again = ended(started("plain", [*command, str(target)], work / "log"))
        row.check(again.process.returncode == 0, f"{verb[0]}: did not go on: {again.lines()}")


def report(whole: Path, work: Path, row: Outcome) -> None:
    """Of a finished run that lies on a full disk."""
    row.tried += 1
    with small_disk(work / "disk", 300) as disk:
        run_dir = Path(shutil.copytree(whole, disk / "run"))
        command = ["report", str(run_dir)]
        ballast = fill(disk)
        one_line(row, ended(started("plain", command, work / "log")), "report")
        ballast.unlink()
        again = ended(started("plain", command, work / "log"))
        row.check(again.process.returncode == 0 and (run_dir / "report.md").exists(), f"did not go on: {again.lines()}")
