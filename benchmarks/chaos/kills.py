"""kill -9 of a rank, a launcher, a data worker, SIGTERM with 30 s notice: at drawn moments of the four trainings."""

from __future__ import annotations

import random
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from processes import PATIENCE, Job, ended, kill, started
from world import FOLDERS, SAVE_STEPS, Outcome, arguments, hashes, newest, step_of

from llava_genhancer import run

TRAININGS = ("stage1", "stage2", "pretrain", "finetune")
SHARES = {"plain": 0.7, "torchrun": 0.2, "deepspeed": 0.1}  # of the kills; the launchers take long to start
NAMES = {"plain": "one process", "torchrun": "torchrun, ZeRO-2", "deepspeed": "deepspeed, ZeRO-2"}
MUST = "no orphan, no checkpoint lost, same weights in the end"
KINDS = {
    "plain": ("rank", "worker", "notice"),
    "torchrun": ("rank", "launcher", "worker", "notice"),
    "deepspeed": ("rank", "launcher", "worker", "notice"),
}
FAULTS = {
    "rank": "kill -9 of a rank",
    "launcher": "kill -9 of the launcher",
    "worker": "kill -9 of a data worker",
    "notice": "SIGTERM, 30 s notice",
}
NOTICE = 30.0


@dataclass(frozen=True)
class Kill:
    """A drawn fault.

    Attributes:
        moment: "saving" as soon as a checkpoint's folder appears, "stepping" some time after its marker does.
        checkpoints: how many checkpoints this start may finish before.
        delay: seconds after that.
        which: picks among ranks or workers.
    """

    kind: str
    moment: str
    checkpoints: int
    delay: float
    which: float


def draw(rng: random.Random, kind: str) -> Kill:
    """A moment for a kind."""
    moment = rng.choice(("saving", "stepping", "stepping"))
    delay = rng.uniform(0, 0.05) if moment == "saving" else rng.uniform(0, 0.4)
    return Kill(kind, moment, rng.choice((1, 1, 1, 2)), delay, rng.random())


def run_family(work: Path, *, seed: int, total: int, launchers: tuple[str, ...] = tuple(SHARES)) -> list[Outcome]:
    """Draw ``total`` kills over launchers and trainings, survive them, and compare with runs that met none."""
    outcomes, shares = [], sum(SHARES[launcher] for launcher in launchers)
    for launcher in launchers:
        rng = random.Random(f"{launcher} {seed}")
        plans = plan_of(launcher, round(total * SHARES[launcher] / shares / len(TRAININGS)), rng)
        drawn = {planned.kind for plan in plans.values() for planned in plan}
        rows = {k: Outcome("kills", f"{FAULTS[k]}, {NAMES[launcher]}", MUST) for k in KINDS[launcher] if k in drawn}
        if rows:
            survive(launcher, plans, work / launcher, rows)
            outcomes += rows.values()
    return outcomes


def plan_of(launcher: str, each: int, rng: random.Random) -> dict[str, list[Kill]]:
    """So many kills for each training; over all of them every kind comes equally often."""
    kinds = [KINDS[launcher][i % len(KINDS[launcher])] for i in range(each * len(TRAININGS))]
    rng.shuffle(kinds)
    return {t: [draw(rng, kind) for kind in kinds[i * each : (i + 1) * each]] for i, t in enumerate(TRAININGS)}


def survive(launcher: str, plans: dict[str, list[Kill]], work: Path, rows: dict[str, Outcome]) -> None:
    """One run through all kills of a launcher beside one without any."""
    # A start gets little further than one checkpoint, and the last one needs some to go on with.
    steps = SAVE_STEPS * (3 * max(map(len, plans.values())) // 2 + 4)
    for training, plan in plans.items():
        for planned in plan:
            with rows[planned.kind].complaints():
                one(launcher, training, planned, steps, work, rows[planned.kind])
        if training != "stage1":  # whose command goes on to stage 2
            last = started(launcher, arguments(training, work / "killed", steps), work / "killed.log")
            for kind in {k.kind for k in plan}:
                with rows[kind].complaints():
                    ended(last)
                    rows[kind].check(last.process.returncode == 0, f"{launcher} {training}: did not end: {tail(last)}")
    for training, plan in plans.items():
        if training != "stage1":
            whole_run = started(launcher, arguments(training, work / "whole", steps), work / "whole.log")
            for kind in {k.kind for k in plan}:
                with rows[kind].complaints():
                    ended(whole_run)
    for training, plan in plans.items():
        if any(rows[k.kind].slow for k in plan):  # a run that was not finished has no weights to compare
            continue
        whole, killed = (hashes(work / name, (training,)) for name in ("whole", "killed"))
        same = whole == killed and "absent" not in whole.values()
        for kind in {k.kind for k in plan}:
            rows[kind].check(same, f"{launcher} {training}: other weights than without kills")


def one(launcher: str, training: str, planned: Kill, steps: int, work: Path, row: Outcome) -> None:
    """Start, kill at the drawn moment, and look at what is left."""
    run_dir = work / "killed"
    stage_dir = run_dir / FOLDERS[training]
    where = f"{launcher} {training} {planned.moment}"
    born = time.time()
    job = started(launcher, arguments(training, run_dir, steps), work / "killed.log")
    try:
        before = newest(stage_dir)
        goal = SAVE_STEPS * (before // SAVE_STEPS + planned.checkpoints)
        target = stage_dir / f"checkpoint-{goal}"
        sign = target if planned.moment == "saving" else target / run.MARKER
        deadline = time.monotonic() + PATIENCE
        while not written_since(sign, born):
            if job.process.poll() is None and time.monotonic() > deadline:
                job.check_speed(PATIENCE)
            if job.process.poll() is not None or time.monotonic() > deadline:
                # Too late, which is nobody's fault and not counted, or something is wrong.
                row.check(job.process.poll() == 0, f"{where}: ended before the kill: {tail(job)}")
                return
            time.sleep(0.002)
        time.sleep(planned.delay)
        kept = newest(stage_dir)
        if not strike(job, planned):
            row.check(False, f"{where}: nothing was left to kill")
            return
        row.tried += 1
        status = job.wait(NOTICE if planned.kind == "notice" else 60)
        row.check(status is not None, f"{where}: processes were left: {tail(job)}")
        row.check(status != 0, f"{where}: exit status 0")
        whole = step_of(run.last_complete_checkpoint(stage_dir))
        row.check(whole >= kept, f"{where}: checkpoint {kept} was lost, {whole} is the last")
        if planned.kind == "notice":
            row.check("saving at the end of this step" in job.output(), f"{where}: the notice was not taken")
            if launcher == "plain":  # torchrun has one of its own for every end
                row.check("Traceback" not in job.output(), f"{where}: traceback: {tail(job)}")
    finally:
        job.end()


def written_since(path: Path, born: float) -> bool:
    """Whether it is there and new: an earlier kill may have left a half-written checkpoint of that name."""
    try:
        return path.stat().st_mtime >= born
    except FileNotFoundError:
        return False


def strike(job: Job, planned: Kill) -> bool:
    """Do it; False if there was nothing to do it to."""
    if planned.kind == "notice":
        return kill(job.process.pid, signal.SIGTERM)
    if planned.kind == "launcher":
        return kill(job.process.pid, signal.SIGKILL)
    victims = job.ranks() if planned.kind == "rank" else job.workers()
    return bool(victims) and kill(victims[int(planned.which * len(victims))], signal.SIGKILL)


def tail(job: Job) -> str:
    """The last of what it said, for a table's cell."""
    said = job.lines() or job.output().splitlines()
    return " / ".join(said[-2:])[-300:].replace("|", "/")
