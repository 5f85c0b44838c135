"""Commands of the four trainings as processes that can be watched and hurt: under launchers, or as cheap forks."""

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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from world import TooSlow

from llava_genhancer.resources import resource_dir

BIN = Path(sys.executable).parent
ZERO2 = str(resource_dir("configs") / "deepspeed" / "zero2.json")
PATIENCE = 240.0  # seconds for anything that must end by itself
LOOK = 10.0  # seconds over which it is measured whether a command that took longer is still at work
AT_WORK = 0.3  # CPU seconds that a working command gets or waits for in each second; one that hangs: under 0.05


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
        """Its exit status once no process of it is left; None if one is after that time, though it hangs.

        Raises:
            TooSlow: it is still at work after that time.
        """
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.process.poll() is not None and not self.alive():
                return self.process.returncode
            time.sleep(0.1)
        self.check_speed(seconds)
        return None

    def check_speed(self, seconds: float) -> None:
        """To be called when its time is up.

        Raises:
            TooSlow: its processes compute, or wait for a core: the machine is slow, or busy with other things.
        """
        before = _wanted(self.alive())
        time.sleep(LOOK)
        if (_wanted(self.alive()) - before) / LOOK > AT_WORK:
            load = os.getloadavg()[0]
            raise TooSlow(
                f"{self.log.name}: still at work after {seconds:.0f} s, load {load:.0f} on {os.cpu_count()} cores"
            )

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


def _wanted(pids: list[int]) -> float:
    """CPU seconds that all threads of the processes got, or waited for while others had the core."""
    total = 0
    for pid in pids:
        try:
            for thread in Path(f"/proc/{pid}/task").iterdir():
                ran, waited, _ = (thread / "schedstat").read_text().split()
                total += int(ran) + int(waited)
        except OSError:
            continue
    return total / 1e9


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
    try:
        job.wait()
    finally:
        job.end()
    return job


def wait_for(job: Job, sign: Callable[[], bool]) -> None:
    """Until a sign, the job's end, or the time is up.

    Raises:
        TooSlow: the time is up, and the job is still at work.
    """
    deadline = time.monotonic() + PATIENCE
    while not sign() and job.process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    if not sign() and job.process.poll() is None:
        job.check_speed(PATIENCE)
