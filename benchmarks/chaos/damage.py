"""Read-only folders, vanished shards, damaged checkpoints: refused by their hash, and the one before is used."""

from __future__ import annotations

import io
import itertools
import random
import signal
import tarfile
from pathlib import Path

from processes import ended, kill, started, wait_for
from world import Outcome, arguments, hashes, mount, mounts, newest, small_disk

from llava_genhancer import run

STEPS = 40
MUST = "refused by its hash, the one before is used, same weights"


def run_family(work: Path, *, seed: int, total: int) -> list[Outcome]:
    """The seed draws which file is damaged, and where."""
    rng = random.Random(seed)
    rows = [
        Outcome("damage", "a checkpoint's file cut short", MUST),
        Outcome("damage", "a bit flipped in a checkpoint", MUST),
        Outcome(
            "damage", "a bit flipped in a finished stage's weights", "refused in one line; removed, it is made anew"
        ),
    ]
    for launcher in ("plain", "torchrun"):
        ended(started(launcher, stage(work / launcher / "whole"), work / launcher / "whole.log"))
        for row, damage in zip(rows, (cut, flip), strict=False):
            with row.complaints():
                damaged(launcher, damage, work / launcher, row, rng)
    with rows[2].complaints():
        weights(work / "plain", rows[2], rng)
    return [*rows, *vanished(work / "shards"), *read_only(work / "read-only")]


def stage(run_dir: Path, steps: int = STEPS) -> list[str]:
    """Stage 1 alone."""
    return arguments("stage1", run_dir, steps, **{"stage2.max_steps": 0})


def cut(path: Path, rng: random.Random) -> None:
    """Leave a part of it."""
    with open(path, "r+b") as f:
        f.truncate(rng.randrange(path.stat().st_size))


def flip(path: Path, rng: random.Random) -> None:
    """One bit."""
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def stopped(launcher: str, command: list[str], log: Path, stage_dir: Path, step: int) -> None:
    """Start, and stop politely once the checkpoint of that step is there."""
    job = started(launcher, command, log)
    wait_for(job, lambda: newest(stage_dir) >= step)
    kill(job.process.pid, signal.SIGTERM)
    ended(job)


def damaged(launcher: str, damage, work: Path, row: Outcome, rng: random.Random) -> None:
    """Stop a run, damage a drawn file of its newest checkpoint, go on."""
    row.tried += 1
    run_dir, log = work / damage.__name__, work / f"{damage.__name__}.log"
    stopped(launcher, stage(run_dir), log, run_dir / "stage1", 15)
    last = run.last_complete_checkpoint(run_dir / "stage1")
    if not row.check(last is not None, f"{launcher}: no checkpoint to damage"):
        return
    assert last is not None
    victim = rng.choice(sorted(p for p in last.rglob("*") if p.is_file() and p.stat().st_size and p.name != run.MARKER))
    damage(victim, rng)
    where = f"{launcher}, {victim.name}"
    row.check(
        run.last_complete_checkpoint(run_dir / "stage1") not in (None, last), f"{where}: still counts, or none does"
    )
    again = ended(started(launcher, stage(run_dir), log))
    row.check(again.process.returncode == 0, f"{where}: did not go on: {again.lines()}")
    row.check("it is not whole" in again.output(), f"{where}: not a word about it")
    same = hashes(run_dir, ("stage1",)) == hashes(work / "whole", ("stage1",))
    row.check(same, f"{where}: other weights in the end")


def weights(work: Path, row: Outcome, rng: random.Random) -> None:
    """Between the stages: stage 1 is finished, one bit of its result falls over, stage 2 would build on it."""
    row.tried += 1
    run_dir, log = work / "weights", work / "weights.log"
    command = arguments("stage2", run_dir, STEPS, **{"stage2.max_steps": 5})
    ended(started("plain", [*command, "--stage", "1"], log))
    before = hashes(run_dir, ("stage1",))
    victim = run_dir / "stage1" / "weights.safetensors"
    damage = victim.read_bytes()
    victim.unlink()  # the last checkpoint has it too, under another name
    victim.write_bytes(damage)
    flip(victim, rng)
    job = ended(started("plain", command, log))
    row.check(job.process.returncode == 2 and len(job.lines()) == 1, f"{job.process.returncode}: {job.lines()}")
    victim.unlink()
    again = ended(started("plain", command, log))
    row.check(again.process.returncode == 0, f"did not go on: {again.lines()}")
    row.check(hashes(run_dir, ("stage1",)) == before, "other weights of stage 1")


def vanished(work: Path) -> list[Outcome]:
    """Shards that go between two starts, and while they are read."""
    between = Outcome("damage", "a shard is gone on resume", "refused in one line; put back, same weights", tried=1)
    reading = Outcome(
        "damage", "a shard vanishes while it trains", "its name in the report of what was skipped", tried=1
    )
    victim, elsewhere = small_shards(work / "data")[-1], work / "victim.tar"
    data = [f"--data={work / 'data'}", "--shuffle_block=20"]
    with between.complaints():
        log, command = work / "log", [*stage(work / "run"), *data]
        whole = ended(started("plain", [*stage(work / "whole"), *data], log))
        between.check(whole.process.returncode == 0, f"the run beside it: {whole.lines()}")
        stopped("plain", command, log, work / "run" / "stage1", 10)
        victim.rename(elsewhere)
        refused = ended(started("plain", command, log))
        between.check(refused.process.returncode == 2 and len(refused.lines()) == 1, f"said {refused.lines()}")
        elsewhere.rename(victim)
        again = ended(started("plain", command, log))
        between.check(again.process.returncode == 0, f"did not go on: {again.lines()}")
        same = hashes(work / "run", ("stage1",)) == hashes(work / "whole", ("stage1",))
        between.check(same, "other weights in the end")
    with reading.complaints():
        stage_dir = work / "reading" / "stage1"
        job = started("plain", [*stage(work / "reading", 3 * STEPS), *data], work / "reading.log")
        wait_for(job, lambda: newest(stage_dir) >= 5)
        victim.rename(elsewhere)  # some passes are still to come
        reading.check(job.wait() == 0, f"ended with {job.process.returncode}: {job.lines()}")
        job.end()
        reading.check(victim.name in job.output(), "not a word about it")
    return [between, reading]


def small_shards(folder: Path) -> list[Path]:
    """Eight tars of thirty of the toy world's images."""
    from llava_genhancer.data.images import open_source
    from llava_genhancer.toyworld.writers import prepare

    folder.mkdir(parents=True)
    samples = open_source(str(prepare().shards)).read(0)  # type: ignore[union-attr]  # it is one of shards
    shards = [folder / f"{number}.tar" for number in range(8)]
    for shard in shards:
        with tarfile.open(shard, "w") as archive:
            for sample in itertools.islice(samples, 30):
                member = tarfile.TarInfo(f"{sample.key.rpartition(':')[2]}.jpg")
                member.size = len(sample.data)
                archive.addfile(member, io.BytesIO(sample.data))
    return shards


def read_only(work: Path) -> list[Outcome]:
    """A run folder that has become read-only, and one that always was."""
    became = Outcome(
        "damage", "a run's folder has become read-only", "refused in one line; goes on to the same weights"
    )
    was = Outcome("damage", "a new run in a read-only folder", "refused in one line")
    if not mounts():
        became.skipped = was.skipped = "needs root, for a tmpfs"
        return [became, was]
    with became.complaints(), small_disk(work / "disk", 300) as disk:
        run_dir, log = disk / "run", work / "log"
        command = stage(run_dir)
        stopped("plain", command, log, run_dir / "stage1", 10)
        mount("-o", "remount,ro", str(disk))
        for row, refused in ((became, command), (was, stage(disk / "new"))):
            row.tried += 1
            said = ended(started("plain", refused, log))
            row.check(said.process.returncode == 2 and len(said.lines()) == 1, f"said {said.output()[-500:]}")
        mount("-o", "remount,rw", str(disk))
        again = ended(started("plain", command, log))
        became.check(again.process.returncode == 0, f"did not go on: {again.lines()}")
        ended(started("plain", stage(work / "whole"), log))
        same = hashes(run_dir, ("stage1",)) == hashes(work / "whole", ("stage1",))
        became.check(same, "other weights in the end")
    return [became, was]
