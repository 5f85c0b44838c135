"""What every family of faults needs: tiny trainings, their processes, and the words of a result."""

from __future__ import annotations

import atexit
import os
import random
import signal
import subprocess
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from llava_genhancer import run
from llava_genhancer.resources import resource_dir

BIN = Path(sys.executable).parent
ZERO2 = str(resource_dir("configs") / "deepspeed" / "zero2.json")
PATIENCE = 240.0  # seconds for anything that must end by itself; a busy machine is slow
COMMON = {"num_workers": 1, "seed": 0}
SAVE_STEPS = 5
# Each training: its verb, its folder in the run, and the files that must come out bit-identical.
RESULTS = {
    "stage1": ("stage1/weights.safetensors",),
    "stage2": ("stage2/weights.safetensors", "tower/model.safetensors"),
    "pretrain": ("llava-pretrain/weights.safetensors",),
    "finetune": ("llava-finetune/weights.safetensors", "llava-finetune/hf/model.safetensors"),
}
FOLDERS = {"stage1": "stage1", "stage2": "stage2", "pretrain": "llava-pretrain", "finetune": "llava-finetune"}


@dataclass
class Outcome:
    """A row of the table: how often a fault was tried, and what did not hold."""

    family: str
    fault: str
    must: str  # what has to hold
    tried: int = 0
    broken: list[str] = field(default_factory=list)
    skipped: str = ""

    def check(self, holds: bool, what: str) -> bool:
        """Note ``what`` where it does not hold."""
        if not holds:
            self.broken.append(what)
        return holds

    @property
    def held(self) -> bool:
        return not self.broken


def enhance_fields(steps: int, **changes: object) -> dict[str, object]:
    """An enhancement of the toy world's CLIP, both stages of so many steps of some milliseconds."""
    fields: dict[str, object] = {
        **COMMON,
        "global_batch_size": 8,
        "per_device_batch_size": 4,
        "sample_images": 0,
        "stage2.snapshot_steps": "",
    }
    for stage in ("stage1", "stage2"):
        fields |= {f"{stage}.max_steps": steps, f"{stage}.save_steps": SAVE_STEPS, f"{stage}.log_steps": 1}
        fields |= {f"{stage}.warmup_steps": 0}
    return {**fields, **changes}


def llava_fields(steps: int, **changes: object) -> dict[str, object]:
    """Both steps of the toy world's LLaVA."""
    fields: dict[str, object] = dict(COMMON)
    for step in ("pretrain", "finetune"):
        fields |= {f"{step}.global_batch_size": 8, f"{step}.per_device_batch_size": 4, f"{step}.max_steps": steps}
        fields |= {f"{step}.save_steps": SAVE_STEPS, f"{step}.log_steps": 1}
    return {**fields, **changes}


def arguments(training: str, run_dir: Path, steps: int, **changes: object) -> list[str]:
    """What follows ``llava-genhancer`` for one of the four trainings."""
    if training in ("stage1", "stage2"):
        verb, fields = ["enhance", "tiny"], enhance_fields(steps, **changes)
    else:
        verb, fields = ["llava", training, "tiny"], llava_fields(steps, **changes)
    return [*verb, "--output_dir", str(run_dir), *(f"--{name}={value}" for name, value in fields.items())]


def launched(launcher: str, arguments: list[str], *, script: Path | None = None) -> list[str]:
    """The whole command: ``plain`` one process, ``ddp`` and ``torchrun`` (ZeRO-2) and ``deepspeed`` two ranks.

    Args:
        script: stands in for the package's own entry.
    """
    zero = [] if launcher in ("plain", "ddp") else ["--deepspeed", ZERO2]
    if launcher == "plain":
        start = [sys.executable]
    elif launcher == "deepspeed":
        start = [
            str(BIN / "deepspeed"),
            "--num_gpus=2",
            f"--master_port={random.SystemRandom().randrange(20000, 60000)}",
        ]
    else:
        start = [str(BIN / "torchrun"), "--standalone", "--nproc_per_node=2"]
    module = ["--module"] if launcher == "deepspeed" else ["-m"]
    return [*start, *([str(script)] if script else [*module, "llava_genhancer"]), *arguments, *zero]


class Job:
    """A command and everything that it starts; ``alive`` finds those by a word in their environment."""

    def __init__(self, command: list[str], log: Path, environment: dict[str, str] | None = None):
        self.word = f"CHAOS={uuid.uuid4().hex}"
        environment = {
            **os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu",
            "TOKENIZERS_PARALLELISM": "false", "PATH": f"{BIN}:{os.environ['PATH']}",
            "CHAOS": self.word.partition("=")[2], **(environment or {}),
        }  # fmt: skip
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "ab") as output:
            self.start = output.tell()
            self.process = subprocess.Popen(
                command, env=environment, stdout=output, stderr=output, start_new_session=True
            )

    def output(self) -> str:
        """What it said so far."""
        return self.log.read_bytes()[self.start :].decode(errors="replace")

    def lines(self) -> list[str]:
        """What the command line itself said."""
        return [line for line in self.output().splitlines() if line.startswith("llava-genhancer: ")]

    def alive(self) -> list[int]:
        """All its processes that still run."""
        self.process.poll()
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and self.word.encode() in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
        return found

    def ranks(self) -> list[int]:
        """Its training processes, by rank; the one process without a launcher."""
        ranks = [
            (rank, pid) for pid in self.alive() if (rank := _rank(pid)) is not None and _rank(_parent(pid)) is None
        ]
        return [pid for _, pid in sorted(ranks)] or [self.process.pid]

    def workers(self) -> list[int]:
        """Its data workers: forked from a rank, so with its command line."""
        ranks = {pid: _cmdline(pid) for pid in self.ranks()}
        return [pid for pid in self.alive() if ranks.get(_parent(pid), b"-") == _cmdline(pid)]

    def wait(self, seconds: float = PATIENCE) -> int | None:
        """Its exit status once no process of it is left; None if one is after that time."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.process.poll() is not None and not self.alive():
                return self.process.returncode
            time.sleep(0.1)
        return None

    def end(self) -> None:
        """Kill what is left."""
        for pid in self.alive():
            kill(pid, signal.SIGKILL)
        self.process.wait()


class ForkedJob(Job):
    """The command in a fork of this process, which has imported all of it: kills come cheaper by its start-up time."""

    def __init__(self, arguments: list[str], log: Path):
        import llava_genhancer.enhance.train
        import llava_genhancer.llava.train  # noqa: F401

        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "ab") as output:
            self.start = output.tell()
            sys.stdout.flush()
            self.process = _Child(os.fork())  # type: ignore[assignment]  # it answers to the same few calls
            if self.process.pid == 0:
                _be_the_command(arguments, output.fileno())

    def alive(self) -> list[int]:
        """All its processes that still run: they are a session of their own."""
        self.process.poll()
        found = []
        for entry in Path("/proc").iterdir():
            try:
                state, *numbers = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            if entry.name.isdigit() and numbers[2] == str(self.process.pid) and state != "Z":
                found.append(int(entry.name))
        return found


@dataclass
class _Child:
    """A forked process, as much of it as Popen would show."""

    pid: int
    returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self) -> int:
        while self.poll() is None:
            time.sleep(0.05)
        assert self.returncode is not None
        return self.returncode


def _be_the_command(arguments: list[str], output: int) -> NoReturn:
    """What `python -m llava_genhancer` does once it is loaded; never comes back."""
    from llava_genhancer import cli

    status: object = 1
    try:
        os.setsid()
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.argv = ["llava-genhancer", *arguments]
        cli.main(arguments)
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        os._exit(status if isinstance(status, int) else 0 if status is None else 1)


def started(launcher: str, arguments: list[str], log: Path) -> Job:
    """A job of either kind."""
    return ForkedJob(arguments, log) if launcher == "plain" else Job(launched(launcher, arguments), log)


def kill(pid: int, signum: int) -> bool:
    """Send a signal; False if the process is gone."""
    try:
        os.kill(pid, signum)
        return True
    except ProcessLookupError:
        return False


def _cmdline(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def _rank(pid: int) -> int | None:
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    return next((int(v[5:]) for v in variables if v.startswith(b"RANK=")), None)


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    except OSError:
        return 0


def finish(command: list[str], log: Path, **environment: str) -> Job:
    """Run to the end; whatever happens nothing is left behind."""
    return ended(Job(command, log, environment))


def ended(job: Job) -> Job:
    """Wait for it, and kill it where that takes too long."""
    job.wait()
    job.end()
    return job


def wait_for(job: Job, sign: Callable[[], bool]) -> None:
    """Until a sign, the job's end, or the time is up."""
    deadline = time.monotonic() + PATIENCE
    while not sign() and job.process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)


def step_of(checkpoint: Path | None) -> int:
    """Its number, 0 for none."""
    return int(checkpoint.name.split("-")[1]) if checkpoint else 0


def newest(stage_dir: Path) -> int:
    """Step of the newest checkpoint that has its marker; quick, for watching."""
    return max((step_of(p) for p in run.checkpoints(stage_dir) if (p / run.MARKER).exists()), default=0)


def hashes(run_dir: Path, trainings: tuple[str, ...]) -> dict[str, str]:
    """SHA-256 of every result of the trainings; an absent file has the hash ``absent``."""
    names = [name for training in trainings for name in RESULTS[training]]
    return {n: run.sha256(run_dir / n) if (run_dir / n).is_file() else "absent" for n in names}


def mounts() -> bool:
    """Whether this user can mount a small disk."""
    return os.geteuid() == 0 and subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode == 0


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[Path]:
    """A tmpfs of its own at ``folder``, which takes no byte more."""
    folder.mkdir(parents=True, exist_ok=True)
    mount("-t", "tmpfs", "-o", f"size={megabytes}m", "none", str(folder))
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def mount(*arguments: str) -> None:
    """The system's command."""
    subprocess.run(["mount", *arguments], check=True)
