"""Each task's metrics: by hand, against the benchmarks' own scorers written anew, in any order, with gaps."""

from __future__ import annotations

import random
from collections import defaultdict

import hub
import pytest
from scoring import HALLUSION, TASKS, replies, score

from llava_genhancer.errors import InputError
from llava_genhancer.evaluate.mllm.benchmarks.items import mean


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("seed", range(3))
def test_order_and_ranks_do_not_matter(task: str, seed: int) -> None:
    """Ranks take every second document and hand in their items one rank after the other."""
    docs = TASKS[task]
    said = replies(docs, seed)
    whole = score(task, docs, said)
    order = [*range(0, len(docs), 2), *range(1, len(docs), 2)]
    assert score(task, [docs[i] for i in order], [said[i] for i in order]) == pytest.approx(whole)
    random.Random(seed).shuffle(order)
    assert score(task, [docs[i] for i in order], [said[i] for i in order]) == pytest.approx(whole)


@pytest.mark.parametrize("seed", range(20))
def test_mmvp_as_published(seed: int) -> None:
    """The original's loop: rows in pairs, both right or not."""
    said = replies(hub.MMVP, seed)
    right = [s.lower() in doc["Correct Answer"] for s, doc in zip(said, hub.MMVP, strict=True)]
    both = [a and b for a, b in zip(right[::2], right[1::2], strict=True)]
    assert score("mmvp", hub.MMVP, said) == {
        "mmvp_accuracy": sum(right) / 10,
        "mmvp_pair_accuracy": sum(both) / 5,
        "mmvp_n": 10,
        "mmvp_pairs": 5,
        "mmvp_unparsed": said.count("I cannot tell"),
    }


def test_mmvp_labels_of_either_data_set() -> None:
    """The published labels of pair 50 are exchanged; both tasks set them, whichever copy of the data is there."""
    corrected = hub.MMVP[-2:]
    published = [{**doc, "Correct Answer": label} for doc, label in zip(corrected, ("(a)", "(b)"), strict=True)]
    for docs in (corrected, published):
        assert score("mmvp", docs, ["B", "A"])["mmvp_pair_accuracy"] == 1
        assert score("mmvp_original_labels", docs, ["B", "A"])["mmvp_accuracy"] == 0
        assert score("mmvp_original_labels", docs, ["A", "B"])["mmvp_pair_accuracy"] == 1
    other = [{**doc, "Question": "Is it red?"} for doc in corrected]  # another data set's numbers 99 and 100
    assert score("mmvp_original_labels", other, ["B", "A"])["mmvp_pair_accuracy"] == 1


@pytest.mark.parametrize("seed", range(20))
def test_naturalbench_as_published(seed: int) -> None:
    """Its get_scores: answers as 1 (yes, A), 0 (no, B) or -1 in the order q0i0, q0i1, q1i0, q1i1; truth 1, 0, 0, 1."""
    said = replies(hub.NATURALBENCH, seed)
    codes = [{"Yes": 1, "A": 1, "No": 0, "B": 0}.get(s, -1) for s in said]
    four = [codes[i : i + 4] for i in range(0, len(codes), 4)]
    right = [[c == t for c, t in zip(own, (1, 0, 0, 1), strict=True)] for own in four]
    questions = [r[0] and r[1] for r in right] + [r[2] and r[3] for r in right]
    images = [r[0] and r[2] for r in right] + [r[1] and r[3] for r in right]
    assert score("naturalbench", hub.NATURALBENCH, said) == pytest.approx(
        {
            "naturalbench_ACC": sum(map(sum, right)) / 12,
            "naturalbench_Q_ACC": sum(questions) / 6,
            "naturalbench_I_ACC": sum(images) / 6,
            "naturalbench_G_ACC": sum(map(all, right)) / 3,
            "naturalbench_n": 12,
            "naturalbench_groups": 3,
            "naturalbench_unparsed": codes.count(-1),
        }
    )


def test_naturalbench_options_by_their_text() -> None:
    doc = {**hub.NATURALBENCH[5], "Question": "Where to? Option:A:Towards the viewer; B:Away from the viewer;"}
    for reply in ("Away from the viewer.", "It is away from the viewer", "B: Away from the viewer", "B"):
        assert score("naturalbench", [doc], [reply])["naturalbench_ACC"] == 1
    bare = {**doc, "Question": "Where to?"}
    assert score("naturalbench", [bare], ["B"])["naturalbench_ACC"] == 1
    assert score("naturalbench", [bare], ["Away"])["naturalbench_unparsed"] == 1


@pytest.mark.parametrize("seed", range(20))
def test_cvbench_as_published(seed: int) -> None:
    docs = TASKS["cvbench"]
    said = replies(docs, seed)
    by_source = defaultdict(list)
    for doc, reply in zip(docs, said, strict=True):
        by_source[doc["source"]].append(doc["answer"] == f"({reply})")
    ade, coco, omni = (sum(by_source[s]) / len(by_source[s]) for s in ("ADE20K", "COCO", "Omni3D"))
    assert score("cvbench", docs, said) == pytest.approx(
        {
            "cvbench_2d_ade20k": ade,
            "cvbench_2d_ade20k_n": 4,
            "cvbench_2d_coco": coco,
            "cvbench_2d_coco_n": 3,
            "cvbench_3d": omni,
            "cvbench_3d_n": 5,
            "cvbench_2d": (ade + coco) / 2,
            "cvbench_overall": ((ade + coco) / 2 + omni) / 2,
            "cvbench_unparsed": said.count("I cannot tell"),
        }
    )


@pytest.mark.parametrize("seed", range(20))
def test_pope_as_published(seed: int) -> None:
    """Its confusion matrix, where every reply is a yes or a no."""
    said = [random.Random(f"{seed} {i}").choice(("Yes", "No")) for i in range(len(hub.POPE))]
    found = score("pope", hub.POPE, said)
    for name in ("", "random_", "popular_", "adversarial_"):
        pairs = [
            (reply == "Yes", doc["answer"] == "yes")
            for reply, doc in zip(said, hub.POPE, strict=True)
            if name in ("", f"{doc['category']}_")
        ]
        tp, fp = pairs.count((True, True)), pairs.count((True, False))
        tn, fn = pairs.count((False, False)), pairs.count((False, True))
        assert found[f"pope_{name}accuracy"] == pytest.approx((tp + tn) / (tp + tn + fp + fn))
        assert found[f"pope_{name}recall"] == pytest.approx(tp / (tp + fn))
        assert found[f"pope_{name}yes_ratio"] == pytest.approx((tp + fp) / len(pairs))
        if tp + fp:
            precision, recall = tp / (tp + fp), tp / (tp + fn)
            assert found[f"pope_{name}precision"] == pytest.approx(precision)
            f1 = 2 * precision * recall / (precision + recall) if tp else 0
            assert found[f"pope_{name}f1_score"] == pytest.approx(f1)
        assert found[f"pope_{name}n"] == len(pairs)


def test_pope_refusals_by_hand() -> None:
    """Yes to a yes, refused to a no, refused to a yes, yes to a no."""
    docs = [{**hub.POPE[0], "answer": truth} for truth in ("yes", "no", "yes", "no")]
    found = score("pope", docs, ["Yes", "I don't know", "I don't know", "Yes."])
    assert found["pope_accuracy"] == 0.25
    assert found["pope_precision"] == found["pope_recall"] == found["pope_f1_score"] == 0.5
    assert found["pope_yes_ratio"] == 1.0
    assert found["pope_unparsed"] == 2
    assert "pope_random_accuracy" not in found
    silent = score("pope", docs, ["I don't know"] * 4)
    assert silent["pope_precision"] is silent["pope_yes_ratio"] is None
    assert silent["pope_accuracy"] == silent["pope_f1_score"] == 0


@pytest.mark.parametrize("seed", range(20))
def test_hallusionbench_as_published(seed: int) -> None:
    """Its get_eval_all, get_eval_fig and get_eval_pair_all, with right and wrong as the judge would have said."""
    said = replies(HALLUSION, seed)
    right = [reply == ("Yes" if doc["gt_answer"] == "1" else "No") for reply, doc in zip(said, HALLUSION, strict=True)]
    figures, questions = defaultdict(list), defaultdict(list)
    for ok, doc in zip(right, HALLUSION, strict=True):
        own = (doc["category"], doc["subcategory"], doc["set_id"])
        figures[(*own, doc["figure_id"])].append(ok)
        questions[(*own, doc["question_id"])].append(ok)
    a = sum(right) / len(right)
    f = sum(map(all, figures.values())) / len(figures)
    q = sum(map(all, questions.values())) / len(questions)
    assert score("hallusionbench", HALLUSION, said) == pytest.approx(
        {
            "hallusionbench_aAcc": a,
            "hallusionbench_fAcc": f,
            "hallusionbench_qAcc": q,
            "hallusionbench_average": (a + f + q) / 3,
            "hallusionbench_n": 20,
            "hallusionbench_figures": 8,
            "hallusionbench_questions": 10,
            "hallusionbench_unparsed": said.count("I cannot tell"),
        }
    )


@pytest.mark.parametrize("seed", range(20))
def test_scienceqa_as_llava_published_it(seed: int) -> None:
    draw = random.Random(seed)
    said = [draw.choice(("A", "B", "C", "A. red", "The answer is B.")) for _ in hub.SCIENCEQA]
    right = 0
    for doc, reply in zip(hub.SCIENCEQA, said, strict=True):
        letter = reply[-2] if reply.startswith("The answer is") else reply[0]
        options = "ABCDE"[: len(doc["choices"])]
        right += letter in options and options.index(letter) == doc["answer"]
    assert score("scienceqa_img", hub.SCIENCEQA, said)["scienceqa_accuracy"] == right / 8


def test_incomplete_groups_do_not_count() -> None:
    """The first documents only, all answered right: no pair, image, figure is counted that was not asked whole."""
    found = score("mmvp", hub.MMVP[:3], ["A", "B", "A"])
    assert (found["mmvp_pairs"], found["mmvp_pair_accuracy"], found["mmvp_n"]) == (1, 1.0, 3)
    alone = score("mmvp", hub.MMVP[1:2], ["B"])
    assert (alone["mmvp_pairs"], alone["mmvp_pair_accuracy"], alone["mmvp_accuracy"]) == (0, None, 1.0)
    across = score("mmvp", hub.MMVP[1:3], ["B", "A"])  # neighbours, but of two pairs
    assert across["mmvp_pairs"] == 0
    found = score("naturalbench", hub.NATURALBENCH[:7], ["Yes", "No", "No", "Yes", "A", "B", "A"])
    assert found["naturalbench_groups"] == 1
    assert found["naturalbench_Q_ACC"] == 1.0  # three questions on both images, the fourth on one only
    assert found["naturalbench_I_ACC"] == pytest.approx(2 / 3)
    assert found["naturalbench_ACC"] == pytest.approx(6 / 7)
    figure = [doc for doc in HALLUSION if (doc["category"], doc["set_id"], doc["figure_id"]) == ("VD", "0", "0")]
    found = score("hallusionbench", figure[:1], ["No"])
    assert (found["hallusionbench_aAcc"], found["hallusionbench_figures"], found["hallusionbench_fAcc"]) == (1, 0, None)
    assert found["hallusionbench_average"] is None
    found = score("hallusionbench", figure, ["No", "Yes"])
    assert (found["hallusionbench_figures"], found["hallusionbench_questions"]) == (1, 0)


def test_parts_that_no_column_is_for() -> None:
    """Said, not left out of every number."""
    with pytest.raises(InputError, match="category 'easy'"):
        score("pope", [{**hub.POPE[0], "category": "easy"}], ["Yes"])
    with pytest.raises(InputError, match="source 'SUN'"):
        score("cvbench", [{**hub.CVBENCH_2D[0], "source": "SUN"}], ["A"])


def test_mean_needs_every_part() -> None:
    assert mean([0.5, None]) is None
    assert mean([]) is None
    assert mean([0.0, 1.0]) == 0.5
