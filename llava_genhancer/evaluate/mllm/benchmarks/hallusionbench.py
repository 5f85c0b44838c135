"""HallusionBench's 951 questions with an image, scored by rule: the reply's yes or no against the published answer.

aAcc counts questions, fAcc figures with all their questions right, qAcc questions right on all their figures; the
paper's "Avg." is the mean of the three. No judge is asked. Those who want one run lmms-eval's own
``hallusion_bench_image`` (GPT-4, ``OPENAI_API_KEY``) and give each model an ``--output_path`` of its own, since that
task reuses the verdicts it finds there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from llava_genhancer.evaluate.mllm.answers import yes_or_no
from llava_genhancer.evaluate.mllm.benchmarks.items import Item, accuracy, groups, mean, rgb, share

METRICS = (
    "hallusionbench_aAcc", "hallusionbench_qAcc", "hallusionbench_fAcc", "hallusionbench_average",
    "hallusionbench_n", "hallusionbench_questions", "hallusionbench_figures", "hallusionbench_unparsed",
)  # fmt: skip
_SET = ("category", "subcategory", "set_id")


def images(doc: Mapping[str, Any]) -> list[Any]:
    return rgb(doc["image"])


def with_group_sizes(docs: Any) -> Any:
    """The data set with two more columns: how many questions a figure has, and on how many figures one is asked."""
    for name, last in (("figure_size", "figure_id"), ("question_size", "question_id")):
        keys = list(zip(*(docs[column] for column in (*_SET, last)), strict=True))
        sizes = Counter(keys)
        docs = docs.add_column(name, [sizes[key] for key in keys])
    return docs


def prompt(doc: Mapping[str, Any], words: Mapping[str, str]) -> str:
    return f"{doc['question']}{words['post_prompt']}"


def options(doc: Mapping[str, Any]) -> list[str]:
    return ["Yes", "No"]


def target(doc: Mapping[str, Any]) -> str:
    return "yes" if str(doc["gt_answer"]) == "1" else "no"


def process(doc: Mapping[str, Any], replies: Sequence[str]) -> dict[str, Item]:
    answer = yes_or_no(replies[0], doc["question"])
    item = {
        "set": "/".join(str(doc[column]) for column in _SET),
        "figure": str(doc["figure_id"]),
        "question": str(doc["question_id"]),
        "figure_size": doc["figure_size"],
        "question_size": doc["question_size"],
        "answer": answer,
        "right": answer == target(doc),
    }
    return dict.fromkeys(METRICS, item)


def _figures(items: Sequence[Item]) -> list[bool]:
    return groups(items, lambda item: (item["set"], item["figure"]), "figure_size")


def _questions(items: Sequence[Item]) -> list[bool]:
    return groups(items, lambda item: (item["set"], item["question"]), "question_size")


def figure_accuracy(items: Sequence[Item]) -> float | None:
    return share(_figures(items))


def question_accuracy(items: Sequence[Item]) -> float | None:
    return share(_questions(items))


def average(items: Sequence[Item]) -> float | None:
    return mean([accuracy(items), question_accuracy(items), figure_accuracy(items)])


def figures(items: Sequence[Item]) -> int:
    return len(_figures(items))


def questions(items: Sequence[Item]) -> int:
    return len(_questions(items))
