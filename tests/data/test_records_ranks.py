"""Several ranks and several runs on one cache folder: real processes, with a gloo process group or without."""

import errno
import io
import json
import multiprocessing
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from PIL import Image

from llava_genhancer.data import records, records_fill
from llava_genhancer.data.images import IndexedSource, RawSample
from llava_genhancer.data.records import Layer, open_layer
from llava_genhancer.errors import InputError

UNITS, CHUNK = 10, 3
SIDE = 8


def encoded(number: int) -> bytes:
    image = io.BytesIO()
    Image.new("RGB", (SIDE, SIDE), (number, number, number)).save(image, "PNG")
    return image.getvalue()


def sample(number: int) -> RawSample:
    return RawSample(str(number), encoded(number))


def view(image: Any, key: str) -> torch.Tensor:
    return torch.tensor(list(image.getdata()), dtype=torch.uint8).T.reshape(1, 3, SIDE, SIDE)


def opened(folder: Path) -> Layer:
    return open_layer(folder, "targets", {"shape": [3, SIDE, SIDE]}, torch.float32, crops=1)


Encode = Callable[[torch.Tensor], torch.Tensor]


def rank_of_a_run(
    folder: Path, rank: int, world: int, store: Path | None, encode: Encode, result: Path, minutes: float
) -> None:
    """Fill a cache as one rank; how it ended goes to ``result``."""
    records.CHUNK = CHUNK
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    if store is not None:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    outcome = "done"
    try:
        layer = opened(folder)
        records_fill.fill(
            IndexedSource(UNITS * CHUNK, sample), view, {"targets": layer}, {"targets": encode}, torch.device("cpu"),
            announce=lambda missing: None, batch_size=1, num_workers=0, max_bad_fraction=0.5, timeout_minutes=minutes,
        )  # fmt: skip
    except (InputError, OSError, ZeroDivisionError) as error:
        outcome = str(error)
    result.write_text(outcome)
    os._exit(0)  # no group teardown: the other rank may have ended


class Run:
    """Ranks of one run as processes."""

    def __init__(self, work: Path, name: str, encodes: list[Encode], *, grouped: bool = True, minutes: float = 30.0):
        self.results = [work / f"{name}-{rank}.txt" for rank in range(len(encodes))]
        store = work / f"{name}.store" if grouped else None
        fork = multiprocessing.get_context("fork")
        self.ranks = [
            fork.Process(
                target=rank_of_a_run,
                args=(work / "cache", rank, len(encodes), store, encode, self.results[rank], minutes),
            )
            for rank, encode in enumerate(encodes)
        ]
        for process in self.ranks:
            process.start()

    def outcomes(self, seconds: float = 60.0) -> list[str]:
        deadline = time.monotonic() + seconds
        for process in self.ranks:
            process.join(max(0.0, deadline - time.monotonic()))
        hung = [rank for rank, process in enumerate(self.ranks) if process.is_alive()]
        for process in self.ranks:
            process.kill()
            process.join()
        assert not hung, f"ranks {hung} were still waiting"
        return [result.read_text() if result.exists() else "killed" for result in self.results]


def plain(views: torch.Tensor) -> torch.Tensor:
    return views.float()


def slow(views: torch.Tensor) -> torch.Tensor:
    time.sleep(0.15)
    return views.float()


def values(work: Path) -> list[float]:
    """The first number of each record, which is the number of its image."""
    layer = opened(work / "cache")
    return [
        float(layer.numbers(layer.read(unit, position, 0)[None])[0, 0, 0, 0])
        for unit in range(UNITS)
        for position in range(CHUNK)
    ]


def until(condition: Callable[[], Any], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def written(work: Path) -> list[str]:
    return sorted(p.name for p in (work / "cache").glob("*/*.json"))


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("others", [2, 3])
def test_a_second_run_is_refused_on_all_ranks_and_touches_nothing(tmp_path: Path, grouped: bool, others: int) -> None:
    first = Run(tmp_path, "first", [slow, slow], grouped=grouped)
    until(lambda: {"00000.json", "00001.json"} <= set(written(tmp_path)))
    second = Run(tmp_path, "second", [plain] * others, grouped=grouped)
    refusals = second.outcomes()
    assert all(process.is_alive() for process in first.ranks), "the first run was over before the second one"
    assert all("is in use by another process" in outcome for outcome in refusals), refusals
    assert first.outcomes() == ["done", "done"]
    assert values(tmp_path) == list(range(UNITS * CHUNK))
    left = [
        p.name for p in (tmp_path / "cache").rglob("*") if "partial" in p.name or p.name.startswith((".rank", ".s"))
    ]
    assert not left


def test_two_runs_at_once_leave_whole_records_whoever_is_refused(tmp_path: Path) -> None:
    runs = [Run(tmp_path, name, [plain, plain]) for name in ("one", "two")]
    outcomes = [run.outcomes() for run in runs]
    assert ["done", "done"] in outcomes
    assert all(len({outcome == "done" for outcome in run}) == 1 for run in outcomes), outcomes
    assert values(tmp_path) == list(range(UNITS * CHUNK))


def fails(views: torch.Tensor) -> torch.Tensor:
    raise InputError("this image cannot be encoded")


def crashes(views: torch.Tensor) -> torch.Tensor:
    raise ZeroDivisionError("a bug")


def full_disk(views: torch.Tensor) -> torch.Tensor:
    """Nothing can be written any more, not even that."""

    def write(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    records_fill.run.write_json = write
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def kills_itself(views: torch.Tensor) -> torch.Tensor:
    os.kill(os.getpid(), signal.SIGKILL)
    return views


def hangs(views: torch.Tensor) -> torch.Tensor:
    time.sleep(600)
    return views


def test_an_error_of_one_rank_ends_the_others_with_the_same_words(tmp_path: Path) -> None:
    began = time.monotonic()
    assert Run(tmp_path, "run", [plain, fails, slow]).outcomes() == ["this image cannot be encoded"] * 3
    assert time.monotonic() - began < 30
    # The same command goes on, with what the first one left.
    assert Run(tmp_path, "again", [plain, plain, plain]).outcomes() == ["done"] * 3
    assert values(tmp_path) == list(range(UNITS * CHUNK))


@pytest.mark.parametrize(
    ("encode", "minutes", "words"),
    [
        (crashes, 30.0, "rank 1 could not write its share of the cache: a bug"),
        (full_disk, 30.0, r"rank 1 \(process \d+ on .*\) has ended and left .* incomplete"),
        (kills_itself, 30.0, r"rank 1 \(process \d+ on .*\) has ended and left .* incomplete"),
        (
            hangs,
            0.05,
            r"no progress for 0\.05 minutes .* waited for 5 units of other ranks \(rank 1: (starting|writing unit 1)",
        ),
    ],
)
def test_rank_0_does_not_wait_for_a_rank_that_is_gone(
    tmp_path: Path, encode: Encode, minutes: float, words: str
) -> None:
    run = Run(tmp_path, "run", [plain, encode], minutes=minutes)
    run.ranks[0].join(40)
    for process in run.ranks:
        process.kill()
    outcome = run.outcomes()[0]
    assert re.search(words, outcome), outcome
    assert "\n" not in outcome
    assert Run(tmp_path, "again", [plain, plain]).outcomes() == ["done", "done"]
    assert values(tmp_path) == list(range(UNITS * CHUNK))
    assert not list((tmp_path / "cache").rglob("*.partial")), "what the killed rank had staged is removed"


def test_a_hole_in_a_file_is_not_read_as_a_record(tmp_path: Path) -> None:
    """Any layer, not only those with the sizes of images: a page of zeros, a bit, a cut end."""
    assert Run(tmp_path, "run", [plain], grouped=False).outcomes() == ["done"]
    layer = opened(tmp_path / "cache")
    path = layer.file(2, ".bin")
    whole = path.read_bytes()
    size = layer.stored_bytes
    for damaged in (
        whole[:size] + bytes(size) + whole[2 * size :],
        whole[: size + 5] + bytes([whole[size + 5] ^ 1]) + whole[size + 6 :],
        whole[:size] + b"\xff" * size + whole[2 * size :],
        whole[: size + 9],
    ):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"00002\.bin: record 1 is damaged: remove the file"):
            layer.read(2, 1, 0)
        layer.read(2, 0, 0)
    path.unlink()
    assert Run(tmp_path, "again", [plain], grouped=False).outcomes() == ["done"]
    assert path.read_bytes() == whole
    assert json.loads(layer.file(2, ".json").read_text())["keys"] == ["6", "7", "8"]
