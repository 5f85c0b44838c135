"""Real faults in one process: a disk that takes no more, a dead data worker, a rank that hangs, a flipped bit."""

import json
import os
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import TrainerCallback

from llava_genhancer import cli, engine, recipes, run
from llava_genhancer.enhance.train import EnhanceTrainer, enhance
from llava_genhancer.errors import InputError, disk_failure, lost_rank
from llava_genhancer.watchdog import Watchdog, launcher


@pytest.fixture(scope="module")
def recipe(tiny_fields) -> recipes.Recipe:
    changes = {"sample_images": 0, "stage1.max_steps": 12, "stage2.max_steps": 0, "stage2.snapshot_steps": ""}
    return recipes.override(recipes.Recipe(name="test"), {**tiny_fields, **changes})


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory) -> Path:
    """A run that met no fault."""
    run_dir = tmp_path_factory.mktemp("faults") / "whole"
    enhance(recipe, run_dir, stages=(1,))
    return run_dir


def weights(run_dir: Path) -> str:
    return run.sha256(run_dir / "stage1" / "weights.safetensors")


@pytest.fixture
def after_step(monkeypatch):
    """Calls something once, after a step of the next training that comes to it."""

    def install(step: int, act) -> None:
        acts = [act]

        class Hook(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                if state.global_step == step and acts:
                    acts.pop()()

        original = EnhanceTrainer.__init__

        def init(self, *args, **kwargs):
            original(self, *args, **kwargs)
            self.add_callback(Hook())

        monkeypatch.setattr(EnhanceTrainer, "__init__", init)

    return install


@pytest.fixture
def small_files():
    """Sets the largest size of a file: the system then cuts writes short, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size=soft: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_takes_no_checkpoint_is_one_line_and_loses_none(
    recipe, whole, tmp_path, after_step, small_files
) -> None:
    after_step(7, lambda: small_files(2**16))
    with pytest.raises(InputError, match=r"checkpoint-10 could not be written: .*; \d+ MiB are free there"):
        enhance(recipe, tmp_path / "run", stages=(1,))
    stage = tmp_path / "run" / "stage1"
    assert [p.name for p in run.checkpoints(stage)] == ["checkpoint-5"], "the half-written one is gone"
    assert run.complete_facts(stage / "checkpoint-5", verify=True) is not None
    small_files()
    enhance(recipe, tmp_path / "run", stages=(1,))
    assert weights(tmp_path / "run") == weights(whole)


def test_each_library_s_word_for_a_disk_that_takes_no_more(tmp_path, small_files) -> None:
    tensors = {"a": torch.zeros(2**16)}
    small_files(2**14)
    with pytest.raises(OSError) as ours:  # noqa: PT011 - whatever it is called, it must be recognised
        run.write_bytes(tmp_path / "a", bytes(2**16))
    with pytest.raises(SafetensorError) as theirs:
        save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(RuntimeError) as torchs:
        torch.save(tensors, tmp_path / "a.pt")
    assert [disk_failure(e.value) is not None for e in (ours, theirs, torchs)] == [True, True, True]
    assert disk_failure(torchs.value) == "torch could not write a file to its end"
    small_files()
    (tmp_path / "half.pt").write_bytes(b"PK no zip")
    with pytest.raises(Exception) as reading:  # noqa: PT011
        torch.load(tmp_path / "half.pt")
    assert disk_failure(reading.value) is None, "a damaged file is no full disk"
    assert disk_failure(FileNotFoundError(2, "No such file or directory")) is None


def test_a_data_worker_that_is_killed_is_one_line(recipe, tmp_path, after_step, capsys) -> None:
    import multiprocessing

    after_step(3, lambda: [os.kill(p.pid, signal.SIGKILL) for p in multiprocessing.active_children()])
    fields = {**recipes.to_dict(recipe), "num_workers": 1}
    run.write_json(tmp_path / "recipe.json", fields)
    with pytest.raises(SystemExit) as caught:
        cli.main(["enhance", "--config", str(tmp_path / "recipe.json"), "--output_dir", str(tmp_path / "run")])
    said = capsys.readouterr().err
    assert caught.value.code == 1
    assert "Traceback" not in said
    (line,) = (line for line in said.splitlines() if line.startswith("llava-genhancer: "))
    assert "a data worker died" in line
    assert not multiprocessing.active_children()


def test_a_bit_that_fell_over_in_a_stage_s_weights_is_refused(recipe, whole, tmp_path) -> None:
    file = shutil.copytree(whole, tmp_path / "run") / "stage1" / "weights.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(InputError, match=r"is not what the training wrote .*: remove it and repeat"):
        engine.read_trained(file)
    file.unlink()
    enhance(recipe, tmp_path / "run", stages=(1,))
    assert weights(tmp_path / "run") == weights(whole)
    assert engine.read_trained(file)


# --- ranks that hang ----------------------------------------------------------------------------------------------


def forked(work) -> int:
    """Do ``work`` in a process of its own, which it must end itself."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(77)
    return pid


def test_a_rank_that_hangs_ends_itself_and_says_which_was_silent_longest(tmp_path) -> None:
    def rank(number: int, busy: float) -> None:
        with open(tmp_path / f"{number}.err", "w") as said:
            sys.stderr = said
            with Watchdog(tmp_path, number, 2, seconds=1.0) as dog:
                dog.note(f"computing step {4 + number}")
                time.sleep(busy)
                dog.note(f"computing step {5 + number}")
                time.sleep(60)

    children = [forked(lambda n=n, busy=busy: rank(n, busy)) for n, busy in ((0, 0.6), (1, 0.0))]
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [1, 1]
    line = (tmp_path / "0.err").read_text()
    assert line.startswith("llava-genhancer: rank 0 has been computing step 5 for 1 s, more than --timeout_minutes")
    assert "silent longest is rank 1, computing step 6" in line
    assert line.count("\n") == 1


def test_a_rank_that_froze_at_once_has_left_its_note(tmp_path) -> None:
    """Long before the clock is looked at for the first time."""

    def rank() -> None:
        with Watchdog(tmp_path, 1, 3, seconds=3600.0) as dog:
            dog.note("computing step 1")
            time.sleep(60)

    pid = forked(rank)
    deadline = time.monotonic() + 5
    while not list((tmp_path / "ranks").glob("1.json")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    said = Watchdog(tmp_path, 0, 2, seconds=1.0).report()
    assert "silent longest is rank 1, " in said
    assert "; rank 2 never left a note in" in Watchdog(tmp_path, 0, 3, seconds=1.0).report()


def test_a_watchdog_is_quiet_about_progress_and_leaves_nothing(tmp_path) -> None:
    with Watchdog(tmp_path, 0, 1, seconds=0.4) as dog:
        for step in range(8):
            dog.note(f"computing step {step}")
            time.sleep(0.1)
        note = json.loads((tmp_path / "ranks" / "0.json").read_text())
        assert note[1].startswith("computing step")
    assert not (tmp_path / "ranks").exists()


def test_a_rank_knows_that_its_launcher_is_gone(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert launcher() is None, "nobody launched this process: whoever started it may go"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert launcher() == (os.getppid(),)

    def rank() -> None:
        before = launcher()
        while launcher() == before:
            time.sleep(0.01)
        (tmp_path / "noticed").touch()

    def agent() -> None:
        forked(rank)
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGKILL)

    os.waitpid(forked(agent), 0)
    deadline = time.monotonic() + 5
    while not Path(tmp_path / "noticed").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_what_a_lost_rank_is() -> None:
    closed = (
        "[/src/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.2]:4242. This is typically ..."
    )
    assert lost_rank(RuntimeError(closed)) == "Connection closed by peer [10.0.0.2]:4242"
    assert lost_rank(torch.distributed.DistNetworkError("the store is gone")) == "the store is gone"
    assert lost_rank(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
