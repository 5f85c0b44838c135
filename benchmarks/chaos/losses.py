"""NaN and spikes stop or are skipped on every rank alike; ranks that hang become errors; one run per folder."""

from __future__ import annotations

import json
import signal
from pathlib import Path

from processes import Job, ended, finish, kill, launched, started, wait_for
from safetensors.torch import load_file
from world import Outcome, arguments, hashes, newest

FAULTY = Path(__file__).with_name("faulty.py")
STEPS, STEP, RANK = 20, 13, 1  # where the fault is; a spike needs ten steps before it
TIMEOUT = 0.5  # minutes; a busy machine may need long for a step
GRACE = 45.0  # seconds beyond it for the launcher to end the other rank


def run_family(work: Path, *, seed: int, total: int) -> list[Outcome]:
    """Every fault under DDP and ZeRO-2 on two ranks; nothing is drawn here."""
    outcomes = []
    for fault, what in (("nan", "NaN in the loss"), ("spike", "a loss 1000 times the usual")):
        stopped = Outcome("losses", f"{what}, on_bad_step=stop", "ends, keys logged, checkpoint kept, goes on")
        skipped = Outcome("losses", f"{what}, on_bad_step=skip", "no weight moves in that step, keys logged")
        for launcher in ("ddp", "torchrun"):
            with stopped.complaints():
                stop(launcher, fault, work / f"{fault}-stop-{launcher}", stopped)
            with skipped.complaints():
                skip(launcher, fault, work / f"{fault}-skip-{launcher}", skipped)
        outcomes += [stopped, skipped]
    return [*outcomes, *hung(work), two_runs(work / "two")]


def command(launcher: str, run_dir: Path, **changes: object) -> list[str]:
    """Stage 1 alone, with its fault."""
    changes = {"spike_factor": 20, "stage2.max_steps": 0, **changes}
    return launched(launcher, arguments("stage1", run_dir, STEPS, **changes), script=FAULTY)


def logged(run_dir: Path) -> list[dict]:
    """What the faulty rank wrote of the bad step."""
    path = run_dir / "stage1" / f"bad-steps-rank{RANK}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def stop(launcher: str, fault: str, work: Path, row: Outcome) -> None:
    """The default."""
    row.tried += 1
    log, run_dir = work / "log", work / "run"
    job = finish(command(launcher, run_dir), log, CHAOS_FAULT=f"{fault}:{STEP}:{RANK}")
    row.check(job.process.returncode not in (0, None), f"{launcher}: did not end with an error")
    row.check(
        any(f"step {STEP}" in line and "batch keys" in line for line in job.lines()), f"{launcher}: {job.lines()}"
    )
    row.check(
        [e["step"] for e in logged(run_dir)] == [STEP] and len(logged(run_dir)[0]["keys"]) > 0, f"{launcher}: log"
    )
    row.check(newest(run_dir / "stage1") == STEP // 5 * 5, f"{launcher}: last checkpoint {newest(run_dir / 'stage1')}")
    again = finish(command(launcher, run_dir), log)  # the images are mended
    row.check(again.process.returncode == 0, f"{launcher}: did not go on: {again.lines()}")


def skip(launcher: str, fault: str, work: Path, row: Outcome) -> None:
    """By recipe; snapshots show which steps moved the weights."""
    row.tried += 1
    run_dir = work / "run"
    around = {"stage1.snapshot_steps": f"{STEP - 1},{STEP},{STEP + 1}", "on_bad_step": "skip"}
    job = finish(command(launcher, run_dir, **around), work / "log", CHAOS_FAULT=f"{fault}:{STEP}:{RANK}")
    if not row.check(job.process.returncode == 0, f"{launcher}: {job.output()[-300:]}"):
        return
    before, at, after = (load_file(run_dir / f"stage1/snapshots/step-{STEP + i}.safetensors") for i in (-1, 0, 1))
    row.check(all(before[n].equal(at[n]) for n in before), f"{launcher}: weights moved in the bad step")
    row.check(any(not at[n].equal(after[n]) for n in at), f"{launcher}: weights stand still after it")
    row.check(json.loads((run_dir / "stage1/result.json").read_text())["skipped_steps"] == [STEP], f"{launcher}: count")
    row.check([e["step"] for e in logged(run_dir)] == [STEP], f"{launcher}: log")


def hung(work: Path) -> list[Outcome]:
    """A rank that sleeps in mid-step, whose own watchdog speaks, and one that the system stops: only others can."""
    must = f"an error within {60 * TIMEOUT:.0f} s, goes on to the same weights"
    rows = [Outcome("losses", "a rank hangs in mid-step", must), Outcome("losses", "a rank freezes (SIGSTOP)", must)]
    finish(patient(work / "whole"), work / "whole.log")
    faults = ({"CHAOS_FAULT": f"hang:{STEP}:{RANK}"}, {})
    for row, name, fault in zip(rows, ("hang", "freeze"), faults, strict=True):
        with row.complaints():
            run_dir = work / name / "run"
            job = Job(patient(run_dir), work / name / "log", fault)
            wait_for(job, lambda stage_dir=run_dir / "stage1": newest(stage_dir) >= 10)
            if not fault:
                kill(job.ranks()[RANK], signal.SIGSTOP)
            silent(job, work / name, row)
            same = hashes(run_dir, ("stage1",)) == hashes(work / "whole", ("stage1",))
            row.check(same, "other weights in the end")
    return rows


def patient(run_dir: Path) -> list[str]:
    """Two ranks for some seconds, with little patience."""
    fields = arguments("stage1", run_dir, 4 * STEPS, timeout_minutes=TIMEOUT, **{"stage2.max_steps": 0})
    return launched("torchrun", fields, script=FAULTY)


def silent(job: Job, work: Path, row: Outcome) -> None:
    """From the fault on: the error in time, its words, nothing left, going on."""
    row.tried += 1
    row.check(job.wait(60 * TIMEOUT + GRACE) not in (0, None), f"no error within {60 * TIMEOUT + GRACE:.0f} s")
    job.end()
    row.check(any(f"rank {RANK}" in line and "timeout_minutes" in line for line in job.lines()), f"said {job.lines()}")
    again = finish(patient(work / "run"), work / "log")
    row.check(again.process.returncode == 0, f"did not go on: {again.lines()}")


def two_runs(work: Path) -> Outcome:
    """Two starts on one folder at the same time."""
    row = Outcome("losses", "two runs on one folder", "the second refuses, the first ends", tried=1)
    fields = arguments("stage1", work / "run", 10 * STEPS, **{"stage2.max_steps": 0})
    with row.complaints():  # forks: the second is there long before the first is done
        first = started("plain", fields, work / "first.log")
        wait_for(first, lambda: newest(work / "run" / "stage1") >= 5)
        second = ended(started("plain", fields, work / "second.log"))
        row.check(first.process.poll() is None, "the first had ended before the second refused")
        row.check(second.process.returncode == 2, f"the second ended with {second.process.returncode}")
        row.check(any("in use by another process" in line for line in second.lines()), f"it said {second.lines()}")
        row.check(first.wait() == 0, "the first did not end well")
        first.end()
    return row
