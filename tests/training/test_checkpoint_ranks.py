"""Two ranks hash, mark, rotate and verify their checkpoints together, on a shared disk and on one each."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import pytest

from llava_genhancer import run
from llava_genhancer.resources import resource_dir

pytestmark = pytest.mark.launch
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def fields(tiny_fields) -> list[str]:
    changes = {
        **tiny_fields,
        "sample_images": 0,
        "keep_checkpoints": 2,
        "stage1.max_steps": 24,
        "stage1.save_steps": 4,
        "stage2.max_steps": 6,
        "stage2.save_steps": 4,
        "stage2.snapshot_steps": "3",
    }
    return [f"--{name}={value}" for name, value in changes.items()]


def zero2() -> list[str]:
    return ["--deepspeed", str(resource_dir("configs") / "deepspeed" / "zero2.json")]


class Ranks:
    """Two ranks, started by hand: of one host with a common run folder, or of two hosts with a folder each."""

    def __init__(self, work: Path, fields: list[str], *, disks: int, word: str):
        self.work = work
        self.folders = [work / f"disk-{rank % disks}" / "run" for rank in range(2)]
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        self.ranks = []
        for rank in range(2):
            environment = {
                **os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu",
                "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "RANK": str(rank),
                "LOCAL_RANK": str(rank if disks == 1 else 0), "LOCAL_WORLD_SIZE": str(3 - disks),
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": "",
            }  # fmt: skip
            command = [sys.executable, str(HERE / "noted_hashes.py"), str(work / f"{word}-{rank}.jsonl"), "enhance"]
            command += ["openai-l14-224", "--output_dir", str(self.folders[rank]), *fields]
            log = open(work / f"{word}-{rank}.log", "w")  # noqa: SIM115
            self.ranks.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
        self.notes = [work / f"{word}-{rank}.jsonl" for rank in range(2)]
        self.logs = [work / f"{word}-{rank}.log" for rank in range(2)]

    def done(self) -> None:
        for process, log in zip(self.ranks, self.logs, strict=True):
            assert process.wait(240) == 0, log.read_text()[-3000:]

    def kill_after(self, stage: str, step: int) -> None:
        deadline = time.monotonic() + 120
        while not all((folder / stage / f"checkpoint-{step}" / run.MARKER).exists() for folder in self.folders):
            assert time.monotonic() < deadline
            assert all(process.poll() is None for process in self.ranks), self.logs[0].read_text()[-3000:]
            time.sleep(0.01)
        for process in self.ranks:
            process.send_signal(signal.SIGKILL)
            process.wait()


def weights(folder: Path) -> list[str]:
    return [run.sha256(folder / stage / "weights.safetensors") for stage in ("stage1", "stage2")]


@pytest.fixture(scope="module")
def whole(fields, tmp_path_factory) -> Path:
    """Under ZeRO-2, one disk, never interrupted."""
    work = tmp_path_factory.mktemp("ranks")
    Ranks(work, [*fields, *zero2()], disks=1, word="whole").done()
    return work


def hashed_by(work: Path, word: str) -> dict[str, list[set[str]]]:
    """By checkpoint, the files that each rank hashed when it was written."""
    found: dict[str, list[set[str]]] = defaultdict(lambda: [set(), set()])
    for rank in range(2):
        for line in (work / f"{word}-{rank}.jsonl").read_text().splitlines():
            folder, names = json.loads(line)
            found[folder][rank] |= set(names)
    return found


def test_each_rank_hashes_its_own_files_and_none_twice(whole) -> None:
    stage = whole / "disk-0" / "run" / "stage1"
    assert [p.name for p in run.checkpoints(stage)] == ["checkpoint-20", "checkpoint-24"]
    for folder in run.checkpoints(stage):
        listed = run.read_json(folder / run.MARKER)["files"]
        assert set(listed) == set(run.content(folder))
        assert run.complete_facts(folder, verify=True) is not None
    mine, other = hashed_by(whole, "whole")["checkpoint-24"]
    assert not mine & other
    assert mine | other == set(listed)
    for rank, names in enumerate((mine, other)):
        own = {name for name in listed if name.endswith((f"rng_state_{rank}.pth", f"loader_{rank}.pt"))}
        own |= {name for name in listed if f"zero_pp_rank_{rank}_" in name}
        assert len(own) == 3
        assert own <= names
    sizes = [sum(listed[name]["bytes"] for name in names) for names in (mine, other)]
    assert max(sizes) < 0.7 * sum(sizes), sizes


@pytest.mark.parametrize("deepspeed", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_without_a_shared_disk_each_marks_rotates_and_resumes_its_own(fields, whole, tmp_path, deepspeed) -> None:
    options = [*fields, *(zero2() if deepspeed else [])]
    first = Ranks(tmp_path, options, disks=2, word="first")
    first.kill_after("stage1", 16)
    stages = [folder / "stage1" for folder in first.folders]
    for rank, stage in enumerate(stages):
        names = [p.name for p in run.checkpoints(stage)]
        assert "checkpoint-4" not in names, "each disk is rotated"
        folder = stage / "checkpoint-16"
        assert run.complete_facts(folder, verify=True) is not None
        listed = set(run.read_json(folder / run.MARKER)["files"])
        assert {"trainer_state.json", "guard.json", "scheduler.pt", f"loader_{rank}.pt"} <= listed
        assert f"loader_{1 - rank}.pt" not in listed
    # The newest that is whole on both disks counts: on the second one a bit of a later checkpoint fell over.
    last = run.checkpoints(stages[1])[-1]
    file = last / "loader_1.pt"
    if file.exists():
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    again = Ranks(tmp_path, options, disks=2, word="again")
    again.done()
    assert weights(first.folders[0]) == weights(first.folders[1])
    if deepspeed:
        assert weights(first.folders[0]) == weights(whole / "disk-0" / "run")
    read = hashed_by(tmp_path, "again")
    assert all(ranks[0] and ranks[1] for ranks in read.values()), "both verified, neither alone"


@pytest.mark.slow
def test_damage_in_the_file_of_any_rank_is_found(fields, whole, tmp_path) -> None:
    shutil.copytree(whole / "disk-0", tmp_path / "disk-0")
    stage = tmp_path / "disk-0" / "run" / "stage1"
    shutil.rmtree(tmp_path / "disk-0" / "run" / "stage2")
    for name in ("result.json", "weights.safetensors"):
        (stage / name).unlink()
    (file,) = (stage / "checkpoint-24").rglob("*zero_pp_rank_1_*")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    Ranks(tmp_path, [*fields, *zero2()], disks=1, word="again").done()
    assert weights(tmp_path / "disk-0" / "run") == weights(whole / "disk-0" / "run")
    assert "checkpoint-20" in hashed_by(tmp_path, "again")
