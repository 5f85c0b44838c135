"""The training benchmark: its arithmetic, its command line, and a tiny run where llava-torch's environment is."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent.parent
COMPAT = Path(os.environ.get("LLAVA_GENHANCER_COMPAT_PYTHON", ROOT / ".venv-compat" / "bin" / "python"))
SEEN = {
    "seconds": [9.0, 1.0, 2.0, 1.0],
    "cpu_seconds": [5.0, 0.5, 1.0, 0.5],
    "tokens": [100, 200, 300, 300],
    "losses": [4.0, 3.0, 2.0, 1.0],
    "start_bytes": 1000,
    "peak_bytes": 1500,
    "torch": "2",
    "transformers": "4",
}


@pytest.fixture(scope="module")
def benchmark():
    """The benchmark's module; scripts find `measure` beside them."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import llava_train

        yield llava_train
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


def test_first_steps_are_left_out(benchmark) -> None:
    found = benchmark.figures(SEEN, warmup=1)
    assert found["tokens_per_second"] == 800 / 4
    assert found["tokens_per_cpu_second"] == 800 / 2
    assert found["step_s"] == 1.0
    assert (found["peak_bytes"], found["growth_bytes"]) == (1500, 500)
    assert (found["first_loss"], found["last_loss"]) == (4.0, 1.0)
    assert benchmark.figures(SEEN, warmup=0)["tokens_per_second"] == 900 / 13


def test_ratios_are_taken_pair_by_pair(benchmark) -> None:
    def run(rate: float) -> dict[str, Any]:
        return {**benchmark.figures(SEEN, 1), "tokens_per_second": rate}

    # The machine halves its speed from pair to pair: each pair says 1.5 or 2, medians alone would say otherwise.
    rates = [(800.0, 400.0), (300.0, 200.0), (200.0, 100.0)]
    result = benchmark.compare([{"ours": run(ours), "theirs": run(theirs)} for ours, theirs in rates])
    assert result["ours"]["tokens_per_second"] == 300
    assert result["theirs"]["tokens_per_second"] == 200
    assert result["tokens_per_second_ratio"] == {"median": 2.0, "min": 1.5, "max": 2.0}
    assert result["peak_bytes_ratio"]["median"] == 1.0
    assert len(result["runs"]) == 3
    lines = benchmark.table("pretrain", result).splitlines()
    assert lines[1].split() == ["tokens/s", "300", "200", "2.00", "(1.50", "to", "2.00)"]


def test_both_forms_of_a_batch_have_the_same_tokens(benchmark) -> None:
    from llava_worker import IMAGE_TOKEN_INDEX, Watch

    watch = Watch(tokens_per_image=4)
    theirs = torch.tensor([[1, IMAGE_TOKEN_INDEX, 5, 6], [1, 5, 0, 0]])
    watch.count({"input_ids": theirs, "attention_mask": theirs.ne(0), "images": torch.zeros(2, 3, 8, 8)})
    ours = torch.tensor([[1, *[IMAGE_TOKEN_INDEX] * 4, 5, 6], [1, 5, 0, 0, 0, 0, 0]])
    watch.count({"input_ids": ours, "attention_mask": ours.ne(0).long(), "pixel_values": torch.zeros(1, 3, 8, 8)})
    assert watch.tokens == [9, 9]


def test_trainers_take_turns_on_the_same_tokens(benchmark, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def train(stage: str, pythons: Any, folder: Path, first: str) -> dict[str, Any]:
        order.append(first)
        return {"ours": SEEN, "theirs": SEEN}

    monkeypatch.setattr(benchmark, "train", train)
    result = benchmark.measure_stage("pretrain", {}, Path(), repeats=3, warmup=1)
    assert order == ["ours", "theirs", "ours"]
    assert result["tokens_per_epoch"] == 900
    assert result["versions"]["theirs"] == {"torch": "2", "transformers": "4"}

    monkeypatch.setattr(benchmark, "train", lambda *_: {"ours": SEEN, "theirs": {**SEEN, "tokens": [24]}})
    with pytest.raises(RuntimeError, match="an epoch has 900 tokens in ours, 24 in theirs"):
        benchmark.measure_stage("pretrain", {}, Path(), repeats=1, warmup=1)


def test_steps_take_turns(benchmark) -> None:
    """Each step waits for the other one's, and after the last ones both go on."""
    from threading import Thread

    from llava_worker import Watch

    pipes = {name: os.pipe() for name in "ab"}
    watches = {name: Watch(1, (pipes[name][0], pipes[other][1])) for name, other in ("ab", "ba")}
    order: list[str] = []

    def train(name: str) -> None:
        watch = watches[name]
        watch.on_train_begin(None, None, None)
        for _ in range(3):
            order.append(name)
            watch.on_step_end(None, None, None)
        watch.on_train_end(None, None, None)

    threads = [Thread(target=train, args=name, daemon=True) for name in "ab"]
    for thread in threads:
        thread.start()
    os.write(pipes["b"][1], b"x")
    for thread in threads:
        thread.join(timeout=20)
        assert not thread.is_alive()
    assert order == list("bababa")
    assert all(len(watch.result()["seconds"]) == 3 for watch in watches.values())
    for descriptor in sum(pipes.values(), ()):
        os.close(descriptor)


def test_a_failed_training_says_why(benchmark, tmp_path: Path) -> None:
    pythons = {}
    for name, body in {"ours": "exec sleep 60", "theirs": "echo no such tower >&2; exit 3"}.items():
        python = tmp_path / name
        python.write_text(f"#!/bin/sh\n{body}\n")
        python.chmod(0o755)
        pythons[name] = str(python)
    started = time.monotonic()
    with pytest.raises(RuntimeError, match=r"theirs, finetune: exit status 3\nno such tower"):
        benchmark.train("finetune", pythons, tmp_path, "ours")
    assert time.monotonic() - started < 30  # the other one is not waited for


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--compat", "/nowhere/python"], "make test-compat"),
        (["--compat", sys.executable, "--steps", "3", "--warmup", "3"], "more steps than are left out"),
    ],
)
def test_command_line(benchmark, options: list[str], said: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        benchmark.main(options)
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.skipif(not COMPAT.is_file(), reason="needs old LLaVA's environment: make test-compat")
def test_tiny_run(benchmark, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    output = tmp_path / "deep" / "out.json"
    options = ["--size", "tiny", "--stages", "finetune", "--steps", "3", "--warmup", "1", "--batch", "4"]
    result = benchmark.main([*options, "--repeats", "1", "--compat", str(COMPAT), "--output", str(output)])
    assert json.loads(output.read_text()) == json.loads(json.dumps(result))
    assert list(result["stages"]) == ["finetune"]
    found = result["stages"]["finetune"]
    assert found["versions"]["theirs"]["transformers"] == "4.37.2"
    assert found["tokens_per_epoch"] > 3 * 4 * 16  # an image is 16 tokens; both saw as many, or it had failed
    for name in ("ours", "theirs"):
        assert found[name]["tokens_per_second"] > 0
        assert 0 < found[name]["last_loss"] < 20
        assert found[name]["peak_bytes"] > found[name]["growth_bytes"] > 0
    assert "finetune, medians" in capsys.readouterr().out


def test_recorded_results_are_whole(benchmark) -> None:
    for path in (ROOT / "benchmarks" / "results").glob("*-llava-train.json"):
        recorded = json.loads(path.read_text())
        assert recorded["format"] == 1
        assert list(recorded["stages"]) == list(benchmark.STAGES)
        for found in recorded["stages"].values():
            again = benchmark.compare(found["runs"])
            assert again == {key: found[key] for key in again}
