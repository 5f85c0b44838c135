"""The counts behind packing, against sums by hand; the table's rows; a short run."""

import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def variants():
    """The benchmark's module; scripts find each other beside them."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import llava_variants

        yield llava_variants
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


def test_padding_by_hand(variants, monkeypatch) -> None:
    """One global batch, two ranks: 9 8 | 7 1, alike 9 8 | 7 1; LLaVA deals 9 1 | 8 7."""
    monkeypatch.setattr(variants, "forward_flops", lambda lengths: lengths)
    tokens = torch.tensor([8, 1, 9, 7])
    found = variants.count_padding(tokens, tokens, size=2, ranks=2, steps=1, grouped=True)
    assert found["LLaVA's order, padded"] == {"padding_share": pytest.approx(1 - 25 / 34), "work": 1}
    assert found["LLaVA's order, packed"] == {"padding_share": 0, "work": pytest.approx(15 / 18)}
    assert found["alike in length, padded"] == {"padding_share": pytest.approx(1 - 25 / 32), "work": 1}
    assert found["alike in length, packed"] == {"padding_share": 0, "work": pytest.approx(17 / 18)}


def test_drawn_samples(variants) -> None:
    tokens, words = variants.draw(variants.MIXTURE, 20_000, 576)
    counts = [row[0] for row in variants.MIXTURE.values()]
    assert sum(counts) == 664, "LLaVA-1.5's mixture, in thousands"
    assert (words < 0).float().mean() == pytest.approx(40 / 664, abs=0.01)
    assert int(tokens.max()) == 2048
    assert int(tokens[words > 0].min()) > 576
    assert 0.01 < variants.tower_share() < 0.02


def test_recorded_results_make_rows(variants) -> None:
    from table import llava_variant_rows

    found = json.loads((ROOT / "benchmarks" / "results" / "cpu-llava-variants.json").read_text())
    rows = {row.what: row.cells() for row in llava_variant_rows(found)}
    assert float(rows["LLaVA finetune step, packed"][3]) > 1
    assert float(rows["LLaVA pretrain step, features cached"][3]) > 1
    assert sum("padding" in what for what in rows) == 3


@pytest.mark.slow
def test_a_short_run(variants, tmp_path, capsys) -> None:
    """Losses are compared on the way: a variant that changes them ends it."""
    options = ["--size", "tiny", "--rounds", "1", "--batch", "4", "--samples", "2000"]
    result = variants.main([*options, "--output", str(tmp_path / "r.json")])
    assert json.loads((tmp_path / "r.json").read_text()) == result
    assert result["features"]["cache_bytes"] > 0
    assert "one mask" in capsys.readouterr().out
