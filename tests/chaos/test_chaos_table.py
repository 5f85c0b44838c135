"""What `make chaos` says: kinds drawn evenly, nothing called survived that was not tried, whole whatever it meets."""

import importlib.util
import random
from collections import Counter
from pathlib import Path

import kills
import pytest
import world


@pytest.fixture
def chaos(monkeypatch: pytest.MonkeyPatch):
    """The command's own module, with two families that are over at once."""
    path = Path(world.__file__).with_name("__main__.py")
    spec = importlib.util.spec_from_file_location("chaos_command", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def fine(work: Path, *, seed: int, total: int) -> list[world.Outcome]:
        return [world.Outcome("disk", "a fault", "holds", tried=2)]

    def broken(work: Path, *, seed: int, total: int) -> list[world.Outcome]:
        raise FileNotFoundError("no such\nfile")

    monkeypatch.setattr("disk.run_family", fine)
    monkeypatch.setattr("damage.run_family", broken)
    return module


@pytest.mark.parametrize(("launcher", "each"), [("plain", 14), ("torchrun", 4), ("deepspeed", 2), ("deepspeed", 1)])
def test_every_kind_is_drawn_equally_often(launcher: str, each: int) -> None:
    plans = kills.plan_of(launcher, each, random.Random(3))
    assert tuple(plans) == kills.TRAININGS
    assert {len(plan) for plan in plans.values()} == {each}
    drawn = Counter(planned.kind for plan in plans.values() for planned in plan)
    assert set(drawn) == set(kills.KINDS[launcher])
    assert max(drawn.values()) - min(drawn.values()) <= 1


def test_what_was_not_tried_did_not_hold() -> None:
    row = world.Outcome("kills", "a fault", "holds")
    assert (row.verdict, row.held) == ("**not tried**", False)
    row.tried = 1
    assert (row.verdict, row.held) == ("yes", True)
    with row.complaints():
        raise ValueError("in two\nlines")
    assert (row.verdict, row.held) == ("**no** (1)", False)
    assert row.broken[0].startswith("ValueError at test_chaos_table.py:")
    assert row.broken[0].endswith("in two lines")
    assert world.Outcome("disk", "a fault", "holds", skipped="needs root").held


def test_a_command_that_is_still_at_work_is_slow_and_one_that_hangs_is_broken(tmp_path: Path, monkeypatch) -> None:
    import sys

    import processes

    monkeypatch.setattr(processes, "LOOK", 2.0)
    rows = {}
    for name, code in (("slow", "while True: pass"), ("hangs", "import time; time.sleep(60)")):
        row = rows[name] = world.Outcome("disk", "a fault", "ends", tried=1)
        job = processes.Job([sys.executable, "-c", code], tmp_path / f"{name}.log")
        with row.complaints():
            try:
                row.check(job.wait(2.0) is not None, "did not end")
            finally:
                job.end()
    assert (rows["slow"].verdict, rows["slow"].unjudged) == ("too slow to judge (1)", True)
    assert rows["slow"].slow[0].startswith("slow.log: still at work after 2 s, load ")
    assert (rows["hangs"].verdict, rows["hangs"].broken) == ("**no** (1)", ["did not end"])


def test_what_could_not_be_judged_has_a_status_of_its_own(chaos, tmp_path: Path, capsys, monkeypatch) -> None:
    def slow(work: Path, *, seed: int, total: int) -> list[world.Outcome]:
        return [world.Outcome("losses", "a fault", "holds", tried=1, slow=["log: still at work after 240 s"])]

    monkeypatch.setattr("losses.run_family", slow)
    assert chaos.main(["--families", "losses,disk", "--work", str(tmp_path)]) == 3
    said = capsys.readouterr().out.splitlines()
    assert "| losses | a fault | 1 | holds | too slow to judge (1) |" in said
    assert said[-1] == "* losses, a fault: log: still at work after 240 s"
    assert chaos.main(["--families", "losses,damage", "--work", str(tmp_path)]) == 1


def test_a_family_that_raises_is_a_row_and_the_next_one_runs(chaos, tmp_path: Path, capsys) -> None:
    output = tmp_path / "table.md"
    arguments = ["--families", "damage,disk", "--seed", "7", "--work", str(tmp_path), "--output", str(output)]
    assert chaos.main(arguments) == 1
    said = capsys.readouterr().out.strip().splitlines()
    assert said == output.read_text().splitlines()
    assert said[0].startswith("Seed 7, ")
    assert said[4:6] == [
        "| damage | all that were left | 1 | are tried | **no** (1) |",
        "| disk | a fault | 2 | holds | yes |",
    ]
    assert said[-1].startswith("* damage, all that were left: FileNotFoundError at ")
    assert chaos.main(["--families", "disk", "--work", str(tmp_path)]) == 0
