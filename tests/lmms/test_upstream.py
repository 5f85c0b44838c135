"""lmms-eval's own tasks beside ours, on the same replies: alike where they are sound, and where they are not, the case.

Each defect here is a reason in ``lmms_plugin.TAKEN_OVER``; one that a later lmms-eval mends makes its test fail, and
then the name goes back.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hub
import pytest
from scoring import HALLUSION, TASKS, config_of, score, values

from llava_genhancer.evaluate.mllm.plugin import TAKEN_OVER

Lmms = Callable[..., dict[str, Any]]


def plain(task: str, seed: int = 0) -> list[str]:
    """Right and wrong replies in the form that lmms-eval's parsers are made for."""
    draw, target = random.Random(seed), config_of(task)["doc_to_target"]
    other = {"A": "B", "B": "A", "Yes": "No", "No": "Yes", "yes": "no", "no": "yes"}
    truths = [target(doc) for doc in TASKS[task]]
    return [t if draw.random() < 0.6 else other[t] for t in truths]


def upstream(task: str) -> dict[str, Any]:
    """The configuration of a task of lmms-eval's, functions and all."""
    import lmms_eval.tasks
    from lmms_eval.utils import load_yaml_config

    (path,) = Path(lmms_eval.tasks.__file__).parent.glob(f"*/{task}.yaml")
    return load_yaml_config(str(path))


def test_alike_on_plain_replies(lmms: Lmms) -> None:
    """The real command runs both, upstream's by their other names."""
    names = ("mmvp", "naturalbench", "pope", "scienceqa_img")
    replies = {prefix + task: plain(task) for task in names for prefix in ("", "upstream_")}
    # lmms-eval's NaturalBench demands all 7 600 documents; its scorer is compared in test_metrics.
    tasks = [name for name in replies if name != "upstream_naturalbench"]
    replies |= dict.fromkeys(("cvbench", "cv_bench"), plain("cvbench"))
    found = lmms(",".join([*tasks, "cvbench", "cv_bench"]), replies)
    ours, theirs = values(found, "mmvp"), values(found, "upstream_mmvp")
    assert theirs == {name: ours[name] for name in ("mmvp_accuracy", "mmvp_pair_accuracy")}
    ours, theirs = values(found, "pope"), values(found, "upstream_pope")
    assert {**theirs, "pope_yes_ratio": ours["pope_yes_ratio"]} == pytest.approx({name: ours[name] for name in theirs})
    assert (
        values(found, "upstream_scienceqa_img")["exact_match"] == values(found, "scienceqa_img")["scienceqa_accuracy"]
    )
    ours = values(found, "cvbench")
    rights = sum(ours[f"cvbench_{part}"] * ours[f"cvbench_{part}_n"] for part in ("2d_ade20k", "2d_coco", "3d"))
    assert values(found, "cv_bench")["cv_bench_acc"] == pytest.approx(rights / 12)
    assert found["versions"]["mmvp"] == "genhancer-1"
    assert found["versions"]["upstream_mmvp"] != "genhancer-1"


@pytest.mark.parametrize("seed", range(5))
def test_cvbench_overall_as_upstream_has_it_unused(seed: int) -> None:
    from lmms_eval.tasks.cv_bench.utils import cv_bench_default_aggregate_results, cv_bench_process_results

    said = plain("cvbench", seed)
    items = [cv_bench_process_results(d, [s])["cv_bench_acc"] for d, s in zip(TASKS["cvbench"], said, strict=True)]
    found = score("cvbench", TASKS["cvbench"], said)
    assert found["cvbench_overall"] == pytest.approx(cv_bench_default_aggregate_results(items))


@pytest.mark.parametrize("seed", range(5))
def test_hallusionbench_as_upstream_has_it_with_a_perfect_judge(seed: int) -> None:
    """Its scorers after the judge: verdict 1 for a right reply, 0 for a wrong one."""
    from lmms_eval.tasks.hallusion_bench.utils import assign_correctness, get_eval_all, get_eval_fig, get_eval_pair_all

    said = plain("hallusionbench", seed)
    truths = [config_of("hallusionbench")["doc_to_target"](doc) for doc in HALLUSION]
    judged = [{**doc, "verdict": str(int(s == t))} for doc, s, t in zip(HALLUSION, said, truths, strict=True)]
    assign_correctness(judged, "verdict")
    expected = {
        "hallusionbench_aAcc": get_eval_all(judged, "verdict"),
        "hallusionbench_fAcc": get_eval_fig(judged),
        "hallusionbench_qAcc": get_eval_pair_all(judged, "verdict"),
    }
    found = score("hallusionbench", HALLUSION, said)
    for name, counts in expected.items():
        assert found[name] == pytest.approx(counts["correct"] / counts["total"])


def test_every_name_taken_over_has_its_case_here() -> None:
    assert set(TAKEN_OVER) == {"mmvp", "naturalbench", "pope", "scienceqa_img"}


def test_mmvp_reads_the_camera_as_an_answer() -> None:
    doc = hub.MMVP[1]  # the right one is B
    theirs = upstream("mmvp")
    for reply in ("Camera is B", "The camera shows: so B."):
        assert not theirs["process_results"](doc, [reply])["mmvp_accuracy"]["is_correct"]
        assert score("mmvp", [doc], [reply])["mmvp_accuracy"] == 1
    assert theirs["dataset_kwargs"] == {"token": True}


def test_naturalbench_stops_unless_it_has_all_documents_in_order() -> None:
    theirs, target = upstream("naturalbench"), config_of("naturalbench")["doc_to_target"]
    docs = [{**doc, "Index": i} for i, doc in enumerate((hub.NATURALBENCH * 700)[:7600])]
    metrics = {entry["metric"]: entry["aggregation"] for entry in theirs["metric_list"]}
    items = [theirs["process_results"](doc, [target(doc)]) for doc in docs]
    groups = [item["naturalbench_G_ACC"] for item in items]
    assert metrics["naturalbench_G_ACC"](groups) == 1.0
    with pytest.raises(AssertionError):  # --limit
        metrics["naturalbench_G_ACC"](groups[:8])
    with pytest.raises(AssertionError):  # two ranks
        metrics["naturalbench_G_ACC"](groups[::2] + groups[1::2])
    assert "naturalbench_ACC" in metrics
    assert "naturalbench_ACC" not in items[0]  # so lmms-eval never reports it


def test_pope_takes_a_full_stop_for_a_mistake_and_the_truth_for_the_answers() -> None:
    theirs = upstream("pope")
    docs = [{**hub.POPE[0], "answer": truth} for truth in ("yes", "yes", "no", "no")]
    metrics = {entry["metric"]: entry["aggregation"] for entry in theirs["metric_list"]}
    items = [theirs["process_results"](doc, ["Yes."])["pope_accuracy"] for doc in docs]
    assert metrics["pope_accuracy"](items) == 0.0
    assert score("pope", docs, ["Yes."] * 4)["pope_accuracy"] == 0.5
    items = [theirs["process_results"](doc, ["yes"])["pope_yes_ratio"] for doc in docs]
    assert metrics["pope_yes_ratio"](items) == 0.5  # of four times yes
    assert score("pope", docs, ["yes"] * 4)["pope_yes_ratio"] == 1.0


def test_scienceqa_knows_two_forms_only() -> None:
    theirs, doc = upstream("scienceqa_img"), hub.SCIENCEQA[1]  # the right one is B
    for reply in ("(B)", "The answer is B.", "B) green", "green"):
        assert theirs["process_results"](doc, [reply]) == {"exact_match": 0.0}
        assert score("scienceqa_img", [doc], [reply])["scienceqa_accuracy"] == 1
    assert theirs["process_results"](doc, ["B"]) == theirs["process_results"](doc, ["B. green"]) == {"exact_match": 1.0}


def test_cv_bench_takes_the_first_letter_of_anything() -> None:
    theirs, doc = upstream("cv_bench"), hub.CVBENCH_2D[1]  # the right one is B
    assert theirs["process_results"](doc, ["The answer is (B)"])["cv_bench_acc"]["pred_parsed"] == "T"
    assert score("cvbench", [doc], ["The answer is (B)"])["cvbench_2d_ade20k"] == 1
