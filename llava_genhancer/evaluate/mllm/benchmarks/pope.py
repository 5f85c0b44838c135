"""POPE: is there an object in the image? 3 000 questions each about random, popular and adversarial objects.

"Yes" is the positive class. A reply that answers neither way is wrong: it misses an object that is there, and it is no
"yes" to one that is not. The yes ratio is that of the answers given, where the balanced truth has one half. The
paper's Table 2 shows what LLaVA-1.5 reports as F1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llava_genhancer.errors import InputError
from llava_genhancer.evaluate.mllm.answers import yes_or_no
from llava_genhancer.evaluate.mllm.benchmarks.items import Item, rgb, share

CATEGORIES = ("random", "popular", "adversarial")
MEASURES = ("accuracy", "precision", "recall", "f1_score", "yes_ratio")


def images(doc: Mapping[str, Any]) -> list[Any]:
    return rgb(doc["image"])


def prompt(doc: Mapping[str, Any], words: Mapping[str, str]) -> str:
    return f"{doc['question'].strip()}{words['post_prompt']}"


def options(doc: Mapping[str, Any]) -> list[str]:
    return ["Yes", "No"]


def target(doc: Mapping[str, Any]) -> str:
    return str(doc["answer"]).strip().lower()


def process(doc: Mapping[str, Any], replies: Sequence[str]) -> dict[str, Item]:
    answer, truth = yes_or_no(replies[0], doc["question"]), target(doc)
    item = {"answer": answer, "truth": truth, "right": answer == truth}
    category = str(doc["category"]).lower()
    if category not in CATEGORIES:
        raise InputError(
            f"POPE question {doc['question_id']}: category {category!r} is none of {', '.join(CATEGORIES)}"
        )
    everywhere = (f"pope_{name}" for name in (*MEASURES, "n", "unparsed"))
    within = (f"pope_{category}_{name}" for name in (*MEASURES, "n"))
    return dict.fromkeys((*everywhere, *within), item)


def precision(items: Sequence[Item]) -> float | None:
    return share(item["right"] for item in items if item["answer"] == "yes")


def recall(items: Sequence[Item]) -> float | None:
    return share(item["right"] for item in items if item["truth"] == "yes")


def f1_score(items: Sequence[Item]) -> float | None:
    """Of answers and truths that say yes, the share on which both do (Dice)."""
    hits = sum(item["right"] for item in items if item["truth"] == "yes")
    claims = sum((item["answer"] == "yes") + (item["truth"] == "yes") for item in items)
    return 2 * hits / claims if claims else None


def yes_ratio(items: Sequence[Item]) -> float | None:
    return share(item["answer"] == "yes" for item in items if item["answer"] is not None)
