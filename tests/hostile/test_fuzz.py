"""A slice of `make fuzz` with a fixed seed, and proof that it sees what it is there to see."""

import os
import pickle
import subprocess
import time
from pathlib import Path

import fuzz
import pytest
from fuzz_cases import Kind, kinds
from hypothesis import strategies as st

from llava_genhancer.errors import InputError

NAMES = ("images", "tar shards", "LLaVA JSON", "recipe files", "MMVP CSVs", "safetensors", "markers")


@pytest.fixture(scope="module")
def guard() -> fuzz.Guard:
    return fuzz.Guard()


@pytest.mark.parametrize("name", NAMES)
def test_a_slice(name: str, guard: fuzz.Guard, tmp_path: Path) -> None:
    kind = {kind.name: kind for kind in kinds(tmp_path)}[name]
    tally = fuzz.fuzz(kind, tmp_path, cases=80, seed=1, guard=guard)
    assert not tally.finding
    assert tally.cases == 80
    assert name == "markers" or 20 < tally.refused < 80, "cases that break nothing, or are never used, try nothing"


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_ten_thousand(name: str, guard: fuzz.Guard, tmp_path: Path) -> None:
    kind = {kind.name: kind for kind in kinds(tmp_path)}[name]
    tally = fuzz.fuzz(kind, tmp_path, cases=1500, seed=2, guard=guard)
    assert (tally.finding, tally.cases) == ("", 1500)


def _write(path: Path) -> None:
    (path.parent.parent / "outside").write_text("x")


def _two_lines(path: Path) -> None:
    error = InputError("something long enough")
    error.args = ("two\nlines",)
    raise error


def _work(path: Path) -> None:
    until = time.process_time() + 1.1
    while time.process_time() < until:
        pass


BUGS = {
    "another exception": (lambda path: {}["x"], "KeyError"),
    "a file elsewhere": (_write, "Escaped.*outside"),
    "a folder elsewhere": (lambda path: (path.parent.parent / "x").mkdir(), "Escaped.*os.mkdir"),
    "a process": (lambda path: subprocess.run(["true"]), "Escaped.*subprocess.Popen"),
    "a shell": (lambda path: os.system("true"), "Escaped.*os.system"),
    "a pickle": (lambda path: pickle.loads(pickle.dumps(os.system)), "Escaped.*pickle.find_class"),
    "two lines": (_two_lines, "not one clear line"),
    "a second": (_work, r"1\.\d s of processor time"),
}  # fmt: skip


@pytest.mark.parametrize("bug", BUGS)
def test_the_driver_sees(bug: str, guard: fuzz.Guard, tmp_path: Path) -> None:
    read, words = BUGS[bug]
    folder = tmp_path / "run"
    folder.mkdir()
    kind = Kind("bug", "case.bin", st.binary(), read, [])
    with pytest.raises(fuzz.Finding, match=words):
        fuzz.attempt(kind, folder / "case.bin", b"x", guard, fuzz.Tally("bug"))


def test_a_finding_is_made_small_and_kept(guard: fuzz.Guard, tmp_path: Path) -> None:
    def read(path: Path) -> None:
        if len(path.read_bytes()) > 4:
            raise ZeroDivisionError

    kind = Kind("bug", "case.bin", st.binary(), read, [b"good"])
    assert "ZeroDivisionError" in fuzz.fuzz(kind, tmp_path, cases=300, seed=0, guard=guard).finding
    assert (tmp_path / "case.bin").read_bytes() == b"\0" * 5


def test_a_process_that_dies_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "_work", lambda *_: os._exit(7))
    monkeypatch.setattr(fuzz.tempfile, "mkdtemp", lambda prefix: str(tmp_path))
    (tmp_path / "case-of").mkdir()
    tally = fuzz._in_a_fork("bug", tmp_path / "case-of", None)  # type: ignore[arg-type]
    assert "the process died (exit 7" in tally.finding


def test_unknown_kinds_are_refused(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        fuzz.main(["--kinds", "tars"])
    assert "there are images, tar shards" in capsys.readouterr().err
