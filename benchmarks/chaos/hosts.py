"""Two hosts as network namespaces: torchrun's rendezvous and ZeRO-2 over a link that is cut, or to a host that dies."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from processes import BIN, ZERO2, Job, kill, wait_for
from world import Outcome, arguments, hashes, newest

STEPS = 40
TIMEOUT = 0.5  # minutes; a busy machine may need long for a step
GRACE = 30.0  # seconds beyond it until every rank has spoken
TORCHRUN = 100.0  # seconds for the launchers to end once their connections are given up
RETRIES = 5  # of a packet, some 13 s; the system's 15 are a quarter of an hour
NAMES = (f"chaos-a-{os.getpid()}", f"chaos-b-{os.getpid()}")  # two of these may run at a time
ADDRESSES = ("10.201.77.1", "10.201.77.2")
PORT = 29417


def run_family(work: Path, *, seed: int, total: int) -> list[Outcome]:
    """The link first, then the host; each in the middle of a run that one host holds the rendezvous of."""
    must = f"an error on all living ranks within {60 * TIMEOUT:.0f} s, resumes to the same weights"
    rows = [
        Outcome("hosts", "the link between two hosts is cut", must),
        Outcome("hosts", "one of two hosts dies", must),
    ]
    if os.geteuid() != 0:
        for row in rows:
            row.skipped = "needs root, for network namespaces"
        return rows
    with Hosts() as hosts:
        whole = Pair(work / "whole", "whole")
        for row in rows:
            with row.complaints():
                row.check(whole.wait() == [0, 0], f"without faults: {whole.said()}")
        with rows[0].complaints():
            lost(work / "cut", rows[0], hosts, strike=lambda pair: hosts.cut())
        with rows[1].complaints():
            lost(work / "dead", rows[1], hosts, strike=lambda pair: pair.die(1))
        for row, name in zip(rows, ("cut", "dead"), strict=True):
            if row.slow:
                continue
            same = hashes(work / name / "run", ("stage1",)) == hashes(work / "whole" / "run", ("stage1",))
            row.check(same, "other weights in the end")
    return rows


class Hosts:
    """Two namespaces and a pair of virtual cards between them."""

    def __enter__(self) -> Hosts:
        self.remove()
        for name in NAMES:
            ip("netns", "add", name)
        ip("link", "add", "va", "netns", NAMES[0], "type", "veth", "peer", "name", "vb", "netns", NAMES[1])
        for name, card, address in zip(NAMES, ("va", "vb"), ADDRESSES, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", card)
            ip("-n", name, "link", "set", "lo", "up")
        self.join()
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def cut(self) -> None:
        """Packets are lost from now on; nobody is told."""
        ip("-n", NAMES[1], "link", "set", "vb", "down")

    def join(self) -> None:
        """Both ends up."""
        for name, card in zip(NAMES, ("va", "vb"), strict=True):
            ip("-n", name, "link", "set", card, "up")

    def retry(self, times: int) -> None:
        """How often a packet is sent before its connection is given up (net.ipv4.tcp_retries2), from now on."""
        for name in NAMES:
            ip("netns", "exec", name, "sysctl", "-qw", f"net.ipv4.tcp_retries2={times}")

    def remove(self) -> None:
        """Take the namespaces away, and the cards with them."""
        for name in NAMES:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def ip(*arguments: str) -> None:
    """The system's command."""
    subprocess.run(["ip", *arguments], check=True)


@dataclass
class Pair:
    """A run of two hosts with one rank each, in one folder that both see."""

    work: Path
    word: str

    def __post_init__(self) -> None:
        fields = arguments("stage1", self.work / "run", STEPS, timeout_minutes=TIMEOUT, **{"stage2.max_steps": 0})
        self.jobs = [
            Job(
                ["ip", "netns", "exec", name, str(BIN / "torchrun"), "--nnodes=2", "--nproc_per_node=1",
                 f"--node_rank={number}", "--rdzv_backend=c10d", f"--rdzv_id={self.word}",
                 f"--rdzv_endpoint={ADDRESSES[0]}:{PORT}", f"--local_addr={ADDRESSES[number]}",
                 f"--rdzv_conf=is_host={'true' if number == 0 else 'false'}",
                 "-m", "llava_genhancer", *fields, "--deepspeed", ZERO2],
                self.work / f"{name}.log",
                {"GLOO_SOCKET_IFNAME": card},
            )
            for number, (name, card) in enumerate(zip(NAMES, ("va", "vb"), strict=True))
        ]  # fmt: skip

    @property
    def stage_dir(self) -> Path:
        return self.work / "run" / "stage1"

    def wait(self, seconds: float = 240.0) -> list[int | None]:
        """Both exit statuses; what is left after the time is killed."""
        try:
            return [job.wait(seconds) for job in self.jobs]
        finally:
            for job in self.jobs:
                job.end()

    def die(self, number: int) -> None:
        """All processes of a host at once, launcher and rank."""
        for pid in self.jobs[number].alive():
            kill(pid, signal.SIGKILL)

    def said(self) -> list[str]:
        """Both hosts' lines."""
        return [line for job in self.jobs for line in job.lines()]


def lost(work: Path, row: Outcome, hosts: Hosts, *, strike: Callable[[Pair], None]) -> None:
    """Strike in mid-step, see both ends come to an end in time, mend, go on."""
    row.tried += 1
    hosts.retry(15)
    pair = Pair(work, "first")
    wait_for(pair.jobs[0], lambda: newest(pair.stage_dir) >= 10)
    kept = newest(pair.stage_dir)
    strike(pair)
    words = ("timeout_minutes", "lost another rank")
    deadline = time.monotonic() + 60 * TIMEOUT + GRACE
    silent = list(pair.jobs)
    while silent and time.monotonic() < deadline:
        silent = [job for job in silent if job.alive() and not any(w in line for line in job.lines() for w in words)]
        time.sleep(0.2)
    row.check(not silent, f"no error on {len(silent)} hosts after {60 * TIMEOUT + GRACE:.0f} s")
    # A launcher asks the rendezvous as long as the kernel keeps its connection; no setting of torchrun's is shorter.
    hosts.retry(RETRIES)
    statuses = pair.wait(TORCHRUN)
    row.check(not {0, None} & set(statuses), f"ended with {statuses}: {pair.said()}")
    row.check(newest(pair.stage_dir) >= kept, f"checkpoint {kept} was lost")
    hosts.join()
    again = Pair(work, "again")
    row.check(again.wait() == [0, 0], f"did not go on: {again.said()}")
