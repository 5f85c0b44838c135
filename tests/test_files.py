"""Staging, locks and modes: real processes that race, are killed, or have no flock."""

import errno
import fcntl
import json
import multiprocessing
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from llava_genhancer import files
from llava_genhancer.errors import InputError

FORK = multiprocessing.get_context("fork")


def started(work: Callable[..., Any], *args: Any) -> Any:
    process = FORK.Process(target=work, args=args)
    process.start()
    return process


def until(condition: Callable[[], Any], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# --- staging ------------------------------------------------------------------------------------------------------


def write(folder: Path, word: str) -> None:
    """Two files that belong together."""
    for name in ("a", "b"):
        (folder / name).write_text(word)
        time.sleep(0.002)


def words(folder: Path) -> set[str]:
    return {(folder / name).read_text() for name in ("a", "b")}


def test_processes_that_stage_one_folder_leave_it_whole_at_every_moment(tmp_path: Path) -> None:
    target = tmp_path / "out"

    def stage(number: int) -> None:
        for _ in range(20):
            with files.staged_folder(target) as staging:
                write(staging, str(number))

    processes = [started(stage, number) for number in range(3)]
    seen = set()
    while any(process.is_alive() for process in processes):
        try:
            fd = os.open(target, os.O_RDONLY)
        except FileNotFoundError:
            continue  # between two renamings
        seen.add(tuple(sorted(os.listdir(fd))))
        os.close(fd)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len(words(target)) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_the_first_whole_folder_stays_where_it_is_kept(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with files.staged_folder(target, keep=lambda folder: (folder / "b").exists()) as slow:
        with files.staged_folder(target, keep=lambda folder: (folder / "b").exists()) as fast:
            write(fast, "fast")
        write(slow, "slow")
    assert words(target) == {"fast"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_a_killed_process_staged_does_not_count_and_is_removed_later(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with files.staged_folder(target) as staging:
        write(staging, "old")

    def stage() -> None:
        with files.staged_folder(target) as staging:
            (staging / "a").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)

    killed = started(stage)
    until(lambda: not killed.is_alive())
    assert words(target) == {"old"}
    (half,) = (p for p in tmp_path.iterdir() if p.name != "out")
    other = tmp_path / half.name.replace(files.Process.current().host, "0123abcd")  # of another host, an hour ago
    other.mkdir()
    with files.staged_folder(target) as staging:
        assert not half.exists()
        write(staging, "new")
    assert words(target) == {"new"}
    assert {p.name for p in tmp_path.iterdir()} == {"out", other.name}
    os.utime(other, (0, 0))
    files.remove_leftovers(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_staging_that_goes_on_is_left_alone(tmp_path: Path) -> None:
    with files.staged_folder(tmp_path / "out") as one:
        with files.staged_folder(tmp_path / "out"):
            files.remove_leftovers(tmp_path)
            assert one.exists()
        write(one, "1")
    assert words(tmp_path / "out") == {"1"}


@pytest.mark.parametrize("name", ["x" * 255, "ü" * 120, "a.b.partial", ".hidden"])
def test_names_of_any_kind_can_be_staged(tmp_path: Path, name: str) -> None:
    for _ in range(2):
        with files.staged_folder(tmp_path / name) as staging:
            write(staging, "x")
    assert words(tmp_path / name) == {"x"}
    with files.staged_file(tmp_path / name / "c") as file:
        file.write_text("c")
    assert sorted(p.name for p in (tmp_path / name).iterdir()) == ["a", "b", "c"]


def test_an_error_leaves_the_old_folder_and_nothing_else(tmp_path: Path) -> None:
    with files.staged_folder(tmp_path / "out") as staging:
        write(staging, "old")
    for error, seen in (
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), InputError),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (FileNotFoundError(2, "not ours"), FileNotFoundError),
    ):
        with pytest.raises(seen), files.staged_folder(tmp_path / "out"):
            raise error
        assert words(tmp_path / "out") == {"old"}
        assert [p.name for p in tmp_path.iterdir()] == ["out"]
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"), files.staged_folder(tmp_path / "file" / "out"):
        pytest.fail("below a file")
    with pytest.raises(InputError, match="cannot be written"), files.staged_folder(tmp_path / "file"):
        pass
    assert (tmp_path / "file").read_text() == ""


# --- modes --------------------------------------------------------------------------------------------------------


@pytest.fixture(params=[0o022, 0o002, 0o077, 0o027])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_modes_follow_the_umask(tmp_path: Path, umask: int) -> None:
    tensors = {"w": torch.zeros(3)}
    with files.staged_folder(tmp_path / "out") as folder:
        (folder / "sub").mkdir()
        save_file(tensors, folder / "sub" / "w.safetensors")  # safetensors has modes of its own
        (folder / "plain").write_text("x")
        (folder / "wide").touch()
        (folder / "wide").chmod(0o666)
    with files.staged_file(tmp_path / "w.safetensors") as file:
        save_file(tensors, file)
    for path in tmp_path.rglob("*"):
        wanted = (0o777 if path.is_dir() else 0o666) & ~umask
        assert stat.S_IMODE(path.stat().st_mode) == wanted, path


# --- locks --------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["flock", "ENOLCK", "ENOSYS", "EOPNOTSUPP", "no hard links"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A file system with flock, or one of those without."""
    number = getattr(errno, request.param, errno.ENOLCK)

    def missing(*args: Any) -> None:
        raise OSError(number, os.strerror(number))

    def no_links(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    if request.param != "flock":
        monkeypatch.setattr(fcntl, "flock", missing)
    if request.param == "no hard links":
        monkeypatch.setattr(os, "link", no_links)
    return str(request.param)


def holds(path: Path, seconds: float) -> None:
    with files.locked(path, "it"):
        path.with_name("held").touch()
        time.sleep(seconds)


def test_one_process_holds_a_lock_and_a_killed_one_no_longer(tmp_path: Path, kind: str) -> None:
    path = tmp_path / ".lock"
    holder = started(holds, path, 60)
    until((tmp_path / "held").exists)
    with pytest.raises(InputError, match="it is in use by another process"), files.locked(path, "it"):
        pytest.fail("two holders")
    holder.kill()
    until(lambda: not holder.is_alive())
    for _ in range(2):
        with files.locked(path, "it", wait=5):
            pass
    assert {p.name for p in tmp_path.iterdir()} == {".lock", "held"}


def test_a_killed_holder_that_nobody_waited_for_has_ended_too(tmp_path: Path, kind: str) -> None:
    """A zombie: its parent has not asked for its status."""
    pid = os.fork()
    if not pid:
        holds(tmp_path / ".lock", 60)
    until((tmp_path / "held").exists)
    os.kill(pid, signal.SIGKILL)
    try:
        with files.locked(tmp_path / ".lock", "it", wait=5):
            pass
    finally:
        os.waitpid(pid, 0)


def test_waiting_processes_take_turns(tmp_path: Path, kind: str) -> None:
    """Also where the lock that they wait for was left by a killed process."""
    holder = started(holds, tmp_path / ".lock", 60)
    until((tmp_path / "held").exists)
    holder.kill()
    until(lambda: not holder.is_alive())

    def work(number: int) -> None:
        for _ in range(5):
            with files.locked(tmp_path / ".lock", "it", wait=60):
                (tmp_path / "inside").touch(exist_ok=False)  # raises where two are inside
                time.sleep(0.005)
                (tmp_path / "inside").unlink()

    processes = [started(work, number) for number in range(4)]
    for process in processes:
        process.join(90)
    assert [process.exitcode for process in processes] == [0] * 4


def test_a_lock_of_another_host_is_reported_with_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*args: Any) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", missing)
    elsewhere = {"process": "0123abcd-77-5", "host": "node7", "pid": 77, "lock": "aa"}
    file = tmp_path / ".lock.process"
    for content in (json.dumps(elsewhere), "", "[]", '{"process": 5}'):
        file.write_text(content)
        with (
            pytest.raises(InputError, match=r"if that process does not run any more, remove .*/\.lock\.process\*") as e,
            files.locked(tmp_path / ".lock", "it"),
        ):
            pytest.fail("taken from another host")
        assert "process 77 on node7" in str(e.value) or content != json.dumps(elsewhere)
    file.unlink()
    with files.locked(tmp_path / ".lock", "it"):
        pass


def test_a_pid_that_another_process_has_now_is_not_the_holder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = files.Process.current()
    assert mine.ended() is False
    assert files.Process(mine.host, mine.pid, mine.start - 1).ended() is True
    assert files.Process("0123abcd", mine.pid, mine.start).ended() is None
    assert files.Process.parse(str(mine)) == mine
    assert files.Process.parse("../x") is None


# --- hashes -------------------------------------------------------------------------------------------------------


def test_hashes_are_sha256_and_progress_counts_every_byte(tmp_path: Path) -> None:
    import hashlib

    names = ["a", "sub/b", "c"]
    for number, name in enumerate(names):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(os.urandom(number * files.BLOCK + number))
    read: list[int] = []
    hashed = files.hash_files(tmp_path, names, sync=True, progress=read.append)
    assert list(hashed) == names
    for name in names:
        data = (tmp_path / name).read_bytes()
        assert hashed[name] == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert sum(read) == sum((tmp_path / name).stat().st_size for name in names)
    assert files.hash_files(tmp_path, []) == {}


def test_the_module_needs_nothing_but_the_standard_library() -> None:
    code = "import sys, llava_genhancer.files; print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
