"""The benchmark of lmms-eval models: every way of answering runs, and says the same where it must."""

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("lmms_eval")
ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def benchmark():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import mllm_eval

        yield mllm_eval
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


def test_tiny(benchmark, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    output = tmp_path / "deep" / "out.json"
    options = ["--questions", "4", "--batches", "1", "3", "--repeats", "2", "--device", "cpu", "--output", str(output)]
    result = benchmark.main(options)
    assert json.loads(output.read_text()) == json.loads(json.dumps(result))
    rates = {name: way["questions_per_second"] for name, way in result["ways"].items()}
    assert len(rates) == 5
    assert all(way["repeats"] == 2 for way in result["ways"].values())
    for name, way in result["ways"].items():
        assert rates[name] == pytest.approx(4 / way["median_s"])
        assert result["times_llava_hf"][name] > 0
    assert result["times_llava_hf"]["lmms-eval's llava_hf"] == 1
    assert result["same_words_as_llava_hf"] == 1
    assert result["same_answer_in_batches"]
    assert "likelihood, batch 3" in capsys.readouterr().out


def test_a_batch_takes_the_memory_that_is_counted(benchmark, tmp_path: Path) -> None:
    """Of tensors; were the tower's layers held while the language model reads, it would be a quarter more."""
    import mllm_memory
    import torch

    folder = benchmark.write_model(tmp_path / "llava")
    benchmark.widen(folder, *mllm_memory.SHAPES["small"])
    found = mllm_memory.one_size(folder, 2, torch.device("cpu"))
    assert 1 <= found["tensor_bytes"]["likelihood"] / found["counted_bytes"] < 1.1
    assert 1 <= found["tensor_bytes"]["words"] / found["counted_bytes"] < 1.2
    assert "MiB" in mllm_memory.table({"batches": {"2": found}})
