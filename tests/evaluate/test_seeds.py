"""Several seeds: the arithmetic by hand, the judgement, the bad inputs."""

import json
import random
from pathlib import Path

import pytest
from PIL import Image

from llava_genhancer.errors import InputError
from llava_genhancer.evaluate.mmvp.data import Benchmark
from llava_genhancer.evaluate.mmvp.results import MmvpResult, PairResult, save_results
from llava_genhancer.evaluate.question_results import Answer, QuestionResult
from llava_genhancer.evaluate.question_results import save_results as save_answers
from llava_genhancer.evaluate.report.llava_section import QUESTIONS
from llava_genhancer.evaluate.report.seeds import spread, write_seeds_report
from llava_genhancer.evaluate.report.write import write_report


def result(rng: random.Random, chance: float, **facts) -> MmvpResult:
    pairs = tuple(PairResult((2 * i + 1, 2 * i + 2), (0.7, 0.4), (True, rng.random() < chance)) for i in range(135))
    return MmvpResult(tower="x", label="x", model_type="clip", pairs=pairs, **facts)


def build(folder: Path, chance: float, *, probes: bool = True, seeds=(0, 1, 2)) -> list[Path]:
    runs = []
    for seed in seeds:
        rng, run = random.Random(seed), folder / f"seed-{seed}"
        towers = [result(random.Random(99), 0.25), result(rng, chance, recipe="tiny")]
        save_results(run / "eval" / "mmvp_vlm.json", towers, Benchmark(Path("set"), (), "00"))
        (run / "manifest.json").write_text(json.dumps({"seed": seed}))
        if probes:
            accuracy = {"count": 0.5 + seed / 10, "eyes": 0.75}
            values = {name: {d: {"accuracy": a} for d, a in accuracy.items()} for name in ("original", "enhanced")}
            values["original"] = {d: {"accuracy": 0.5} for d in accuracy}
            (run / "eval" / "probes.json").write_text(json.dumps({"details": list(accuracy), **values}))
        runs.append(run)
    return runs


def test_the_mean_and_students_interval_by_hand():
    s = spread([1.0, 2.0, 6.0])
    assert (s["mean"], s["sd"]) == pytest.approx((3.0, 7**0.5))
    assert s["interval"] == pytest.approx([3 - 4.303 * (7 / 3) ** 0.5, 3 + 4.303 * (7 / 3) ** 0.5])
    assert spread([4.0])["interval"] is None


def test_a_gain_that_comes_back(tmp_path):
    words = write_seeds_report(build(tmp_path, 0.8), tmp_path).read_text()
    with pytest.raises(InputError, match="is not a run folder"):  # which would replace this report by an empty one
        write_report(tmp_path)
    facts = json.loads((tmp_path / "report.json").read_text())
    assert "the gain comes back. 3 of 3 seeds differ" in words
    assert facts["seeds"] == [0, 1, 2]
    assert facts["change"]["mean"] == pytest.approx(sum(c["difference"] for c in facts["comparisons"]) / 3, abs=0.01)
    assert facts["probes"]["count"]["values"] == pytest.approx([0, 10, 20])
    assert "+10.0 [-14.8, +34.8] (s.d. 10.0)" in words
    assert Image.open(tmp_path / "figures" / "seeds.png").width > 800


def test_llavas_answers_over_seeds_by_hand(tmp_path):
    runs = build(tmp_path, 0.26, probes=False, seeds=(0, 1))
    for seed, run in enumerate(runs):
        right = {"original": 4, "enhanced": 5 + seed}
        models = [
            QuestionResult(label, label, {}, tuple(Answer(str(i), "eyes", 2, 0, int(i >= n)) for i in range(10)))
            for label, n in right.items()
        ]
        save_answers(run / QUESTIONS, models, {"path": "asked", "sha256": "00"})
    words = write_seeds_report(runs, tmp_path).read_text()
    assert "| eyes | 40.0 | +15.0 [-48.5, +78.5] (s.d. 7.1) |" in words
    facts = json.loads((tmp_path / "report.json").read_text())["answers"]
    assert facts["eyes"] == facts["average"]
    assert facts["eyes"]["original"] == pytest.approx(40)
    assert facts["eyes"]["values"] == pytest.approx([10, 20])
    save_answers(runs[0] / QUESTIONS, models[:1], {"path": "asked", "sha256": "00"})
    with pytest.raises(InputError, match="needed are original and enhanced"):
        write_seeds_report(runs, tmp_path)


def test_noise_and_a_single_seed(tmp_path):
    words = write_seeds_report(build(tmp_path / "a", 0.26, probes=False), tmp_path / "a").read_text()
    assert "holds zero: within noise" in words
    assert "Linear probes" not in words
    words = write_seeds_report(build(tmp_path / "b", 0.5, seeds=(7,)), tmp_path / "b").read_text()
    assert "One seed says nothing about the next" in words


def test_what_cannot_be_compared(tmp_path):
    with pytest.raises(InputError, match="no runs"):
        write_seeds_report([], tmp_path)
    runs = build(tmp_path, 0.5)
    (runs[1] / "eval" / "probes.json").write_text("{}")
    with pytest.raises(InputError, match=r"probes\.json is not as expected"):
        write_seeds_report(runs, tmp_path)
    save_results(runs[2] / "eval" / "mmvp_vlm.json", [result(random.Random(0), 0.5)], Benchmark(Path("set"), (), "00"))
    with pytest.raises(InputError, match="has 1 towers"):
        write_seeds_report(runs, tmp_path)
    (runs[0] / "eval" / "mmvp_vlm.json").unlink()
    with pytest.raises(InputError, match="does not exist"):
        write_seeds_report(runs, tmp_path)
