"""The run folder: old file or new file, folders that count only when whole, one owner, and errors of one line."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llava_genhancer import run
from llava_genhancer.errors import InputError
from llava_genhancer.llava.recipes import get_recipe as llava_recipe
from llava_genhancer.recipes import Recipe, get_recipe, override

# --- single files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, step, error) -> None:
    path = tmp_path / "a.json"
    run.write_json(path, {"old": 1})
    before = path.read_bytes()

    def fail(*args):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, step, fail)
        with pytest.raises(type(error)):
            run.write_json(path, {"new": 2})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    run.write_json(path, {"new": 2})
    assert run.read_json(path) == {"new": 2}


def test_a_killed_write_leaves_the_old_file(tmp_path) -> None:
    """kill -9 while the bytes are on their way."""
    path = tmp_path / "a.bin"
    run.write_bytes(path, b"old")
    code = (
        "import os, signal, sys; from llava_genhancer import run\n"
        "os.fsync = lambda fd: os.kill(os.getpid(), signal.SIGKILL)\n"
        "run.write_bytes(sys.argv[1], b'new')"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)]).returncode == -9
    assert path.read_bytes() == b"old"


def test_a_file_in_a_new_folder(tmp_path) -> None:
    run.write_text(tmp_path / "sub" / "a.txt", "ü")
    assert (tmp_path / "sub" / "a.txt").read_text(encoding="utf-8") == "ü"


def test_json_is_json(tmp_path) -> None:
    for value in (float("nan"), float("inf"), {"x": [float("-inf")]}):
        with pytest.raises(ValueError, match="Out of range float"):
            run.write_json(tmp_path / "a.json", value)
    assert not list(tmp_path.iterdir())
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "half.json").write_text('{"a": ')
    for path, words in (("none", "does not exist"), ("binary.json", "cannot be read"), ("half.json", "cannot be read")):
        with pytest.raises(InputError, match=f"{path} {words}"):
            run.read_json(tmp_path / path)
    with pytest.raises(InputError, match="cannot be read"):
        run.read_json(tmp_path)


# --- folders that count only when whole ---------------------------------------------------------------------------


@pytest.fixture
def whole(tmp_path) -> Path:
    folder = tmp_path / "checkpoint-5"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.bin").write_bytes(b"\0" * 1000)
    (folder / "sub" / "b.txt").write_text("b")
    run.mark_complete(folder, step=5, world_size=2)
    return folder


def test_a_marked_folder_counts_and_keeps_its_facts(whole) -> None:
    for verify in (True, False):
        assert run.complete_facts(whole, verify=verify) == {"step": 5, "world_size": 2}
    assert set(run.read_json(whole / run.MARKER)["files"]) == {"a.bin", "sub/b.txt"}


def test_a_flipped_bit_is_seen_when_asked_for(whole) -> None:
    data = bytearray((whole / "a.bin").read_bytes())
    data[500] ^= 1
    (whole / "a.bin").write_bytes(data)
    assert run.complete_facts(whole, verify=True) is None
    assert run.complete_facts(whole, verify=False) is not None, "sizes alone cannot tell"


@pytest.mark.parametrize("verify", [True, False])
def test_what_is_missing_short_or_unmarked_does_not_count(whole, verify) -> None:
    (whole / "extra.txt").write_text("left by somebody")
    assert run.complete_facts(whole, verify=verify) is not None, "an extra file does no harm"
    kept = (whole / "sub" / "b.txt").read_bytes()
    (whole / "sub" / "b.txt").unlink()
    assert run.complete_facts(whole, verify=verify) is None
    (whole / "sub" / "b.txt").write_bytes(kept + b"!")
    assert run.complete_facts(whole, verify=verify) is None
    (whole / "sub" / "b.txt").write_bytes(kept)
    assert run.complete_facts(whole, verify=verify) is not None
    (whole / run.MARKER).unlink()
    assert run.complete_facts(whole, verify=verify) is None


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "5", "null", '"x"', "{}", '{"files": {}}', '{"files": [], "facts": {}}', '{"files": {"a.bin": 1}}',
     '{"files": {}, "facts": 3}', '{"files": {"a.bin": {"bytes": 1000}}, "facts": {}}', "\xff"],
)  # fmt: skip
def test_no_content_of_a_marker_is_an_exception(whole, content) -> None:
    (whole / run.MARKER).write_bytes(content.encode("latin1"))
    assert run.complete_facts(whole, verify=True) is None


def checkpoint(stage: Path, step: int, complete: bool = True) -> Path:
    folder = stage / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "w.bin").write_bytes(b"w")
    if complete:
        run.mark_complete(folder, step=step)
    return folder


def test_checkpoints_are_numbered_folders_in_order(tmp_path) -> None:
    for step in (100, 20, 3):
        checkpoint(tmp_path, step)
    for name in ("checkpoint-", "checkpoint-7x", "checkpoint--1", "tmp-checkpoint-9", "checkpoint-9-old"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-50").write_text("a file")
    assert [p.name for p in run.checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-20", "checkpoint-100"]
    assert run.last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-100"
    (tmp_path / "checkpoint-100" / "w.bin").write_bytes(b"v")  # same size
    assert run.last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-20"
    assert run.last_complete_checkpoint(tmp_path / "nowhere") is None


def test_rotation_keeps_the_newest_whole_ones(tmp_path) -> None:
    for step, complete in ((1, True), (2, False), (3, True), (4, True), (5, False), (6, True), (7, False)):
        checkpoint(tmp_path, step, complete)
    run.rotate_checkpoints(tmp_path, 2)
    # 7 is newer than every whole one: it may be in the middle of being written.
    assert [p.name for p in run.checkpoints(tmp_path)] == ["checkpoint-4", "checkpoint-6", "checkpoint-7"]


def test_rotation_without_a_whole_one_deletes_nothing(tmp_path) -> None:
    for step in (1, 2, 3):
        checkpoint(tmp_path, step, complete=False)
    run.rotate_checkpoints(tmp_path, 2)
    assert len(run.checkpoints(tmp_path)) == 3


def test_a_deletion_that_is_cut_short_leaves_nothing_that_counts(tmp_path, monkeypatch) -> None:
    for step in (1, 2, 3):
        checkpoint(tmp_path, step)
    monkeypatch.setattr(run.shutil, "rmtree", lambda *args, **kwargs: None)
    run.rotate_checkpoints(tmp_path, 2)
    assert (tmp_path / "checkpoint-1" / "w.bin").exists()
    assert run.complete_facts(tmp_path / "checkpoint-1", verify=False) is None


# --- manifest -----------------------------------------------------------------------------------------------------


def test_the_manifest_repeats_the_run(tmp_path) -> None:
    recipe = override(get_recipe("tiny"), {"lora_rank": 3, "data": "x"})
    run.open_run(tmp_path / "run", recipe, world_size=2)
    manifest = run.read_json(tmp_path / "run" / run.MANIFEST)
    assert run.recipe_of(tmp_path / "run") == run.recipe_of(tmp_path / "run" / run.MANIFEST) == recipe
    assert manifest["world_size"] == 2
    assert manifest["seed"] == recipe.seed
    assert manifest["versions"]["torch"]
    assert manifest["command"] == sys.argv


def test_reopening_keeps_what_others_wrote_into_the_manifest(tmp_path) -> None:
    run.open_run(tmp_path, Recipe(), world_size=1)
    run.write_json(tmp_path / run.MANIFEST, {**run.read_json(tmp_path / run.MANIFEST), "evaluated": True})
    run.open_run(tmp_path, override(Recipe(), {"data": "/moved", "stage1.save_steps": 7}), world_size=4)
    manifest = run.read_json(tmp_path / run.MANIFEST)
    assert manifest["evaluated"] is True
    assert manifest["world_size"] == 4
    assert manifest["recipe"]["data"] == "/moved"


def test_a_run_that_never_began_gives_way(tmp_path) -> None:
    """A recipe that was refused while its models were loaded does not block the corrected one."""
    with run.exclusive(tmp_path):
        run.open_run(tmp_path, Recipe())
    run.open_run(tmp_path, override(Recipe(), {"lora_rank": 8}))
    assert run.recipe_of(tmp_path).lora_rank == 8


@pytest.mark.parametrize(("kind", "recipe"), [("enhance", get_recipe("tiny")), ("llava", llava_recipe("tiny"))])
def test_a_run_of_an_earlier_version_goes_on(tmp_path, kind, recipe) -> None:
    """Written before fields moved into shared bases: every name is known, in its old order, and nothing differs."""
    written = (Path(__file__).parent / "manifests" / f"{kind}-tiny.json").read_text()
    (tmp_path / run.MANIFEST).write_text(written)
    (tmp_path / "stage1").mkdir()
    run.open_run(tmp_path, recipe, ignore=())
    old, new = json.loads(written)["recipe"], json.loads((tmp_path / run.MANIFEST).read_text())["recipe"]
    assert [name for name in new if name in old] == list(old)
    assert new.items() >= old.items()


def test_another_recipe_is_refused_with_every_difference(tmp_path) -> None:
    run.open_run(tmp_path, Recipe())
    (tmp_path / "stage1").mkdir()
    before = (tmp_path / run.MANIFEST).read_bytes()
    with pytest.raises(InputError, match=r"recipe \(lora_rank: 16 -> 8; stage2.max_steps: 5000 -> 4000; stage2.snap"):
        run.open_run(tmp_path, override(Recipe(), {"lora_rank": 8, "stage2.max_steps": 4000}))
    assert (tmp_path / run.MANIFEST).read_bytes() == before
    for field in run.HARMLESS_FIELDS + run.EXPORT_FIELDS:
        assert field in run.to_dict(Recipe()), "a harmless field that does not exist protects nothing"


def test_a_folder_of_something_else_is_left_alone(tmp_path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(InputError, match=r"is not empty and has no manifest\.json"):
        run.open_run(tmp_path, Recipe())
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("content", "words"),
    [("", "cannot be read"), ("[]", "has no 'recipe'"), ('{"recipe": 5}', "has no 'recipe'"),
     ('{"recipe": {"lora_rang": 5}}', "did you mean 'lora_rank'"), ('{"recipe": {"lora_rank": []}}', "of type int")],
)  # fmt: skip
def test_a_manifest_that_is_none(tmp_path, content, words) -> None:
    (tmp_path / run.MANIFEST).write_text(content)
    with pytest.raises(InputError, match=words):
        run.open_run(tmp_path, Recipe())
    with pytest.raises(InputError, match=words):
        run.recipe_of(tmp_path)


def test_outside_a_checkout_there_is_no_revision(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(run, "__file__", str(tmp_path / "llava_genhancer" / "run.py"))
    assert run.git_revision() is None
    (tmp_path / ".git").mkdir()  # not a repository either
    assert run.git_revision() is None


# --- disks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EACCES])
def test_a_full_or_read_only_disk_is_one_line(tmp_path, monkeypatch, number) -> None:
    def fail(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    (tmp_path / "run").mkdir()
    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(InputError, match=f"run cannot be written: {os.strerror(number)}"):
        run.open_run(tmp_path / "run", Recipe())


def test_a_path_below_a_file_is_one_line(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run", Path("/dev/full")):
        with pytest.raises(InputError, match="cannot be created or written"), run.exclusive(path):
            pytest.fail("this is no folder")


# --- the lock -----------------------------------------------------------------------------------------------------


def test_the_lock_binds_other_processes_and_goes_with_its_holder(tmp_path) -> None:
    code = (
        "import sys, time; from llava_genhancer import run\n"
        "with run.exclusive(sys.argv[1]): print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(InputError, match="in use by another process"), run.exclusive(tmp_path / "run"):
            pytest.fail("two owners")
    finally:
        holder.kill()
        holder.wait()
    for _ in range(50):
        try:
            with run.exclusive(tmp_path / "run"):
                break
        except InputError:
            time.sleep(0.1)
    else:
        pytest.fail("a killed process still holds the folder")


def test_a_forked_worker_does_not_hold_the_lock(tmp_path) -> None:
    worker = None
    with run.exclusive(tmp_path):
        worker = os.fork()
        if not worker:
            (tmp_path / "worker").touch()  # by now it has closed what it inherited
            time.sleep(60)
            os._exit(0)
        while not (tmp_path / "worker").exists():
            time.sleep(0.01)
    try:
        with run.exclusive(tmp_path):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)


def test_the_lock_is_given_back_after_an_error(tmp_path) -> None:
    with pytest.raises(RuntimeError, match="inside"), run.exclusive(tmp_path):
        raise RuntimeError("inside")
    with run.exclusive(tmp_path):
        assert (tmp_path / ".lock").exists()


def test_a_folder_that_cannot_be_locked_is_not_called_busy(tmp_path, monkeypatch) -> None:
    def fail(*args):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(InputError, match="cannot be locked: Input/output error"), run.exclusive(tmp_path):
        pytest.fail("no lock, no work")


def test_a_run_works_on_a_file_system_without_flock(tmp_path, monkeypatch, caplog) -> None:
    def fail(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", fail)
    with run.exclusive(tmp_path / "run"):
        run.open_run(tmp_path / "run", Recipe())  # the lock's files are no foreign contents
        run.open_run(tmp_path / "run", override(Recipe(), {"lora_rank": 8}))
        with pytest.raises(InputError, match="in use by another process"), run.exclusive(tmp_path / "run"):
            pytest.fail("two owners")
    assert "no flock on this file system (No locks available)" in caplog.text
    with run.exclusive(tmp_path / "run"):
        pass


def test_a_run_that_was_killed_while_it_wrote_its_first_manifest_begins_anew(tmp_path) -> None:
    code = (
        "import os, signal, sys; from llava_genhancer import run; from llava_genhancer.recipes import Recipe\n"
        "os.fsync = lambda fd: os.kill(os.getpid(), signal.SIGKILL)\n"
        "run.open_run(sys.argv[1], Recipe())"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)]).returncode == -9
    assert len(list(tmp_path.iterdir())) == 1
    run.open_run(tmp_path, Recipe())
    assert [p.name for p in tmp_path.iterdir()] == [run.MANIFEST]


def test_the_marker_is_written_last_and_whole(tmp_path, monkeypatch) -> None:
    """A crash at any point before the marker leaves a folder that does not count."""
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    (folder / "w.bin").write_bytes(b"w")

    def fail(*args):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="Input/output"):
            run.mark_complete(folder)
    assert run.complete_facts(folder, verify=False) is None
    run.mark_complete(folder)
    assert json.loads((folder / run.MARKER).read_text())["files"].keys() == {"w.bin"}
