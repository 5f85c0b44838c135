"""NaturalBench: 1 900 groups of two images and two questions whose answers differ between the images.

Acc counts answers, Q-Acc questions right on both images, I-Acc images with both questions right, G-Acc groups with
all four right.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from llava_genhancer.evaluate.mllm.answers import choice, yes_or_no
from llava_genhancer.evaluate.mllm.benchmarks.items import Item, groups, rgb, share

METRICS = (
    "naturalbench_ACC", "naturalbench_Q_ACC", "naturalbench_I_ACC", "naturalbench_G_ACC",
    "naturalbench_n", "naturalbench_groups", "naturalbench_unparsed",
)  # fmt: skip


def images(doc: Mapping[str, Any]) -> list[Any]:
    return rgb(doc["Image"])


def prompt(doc: Mapping[str, Any], words: Mapping[str, str]) -> str:
    return f"{doc['Question']} {words[doc['Question_Type']]}"


def options(doc: Mapping[str, Any]) -> list[str]:
    return ["Yes", "No"] if doc["Question_Type"] == "yes_no" else ["A", "B"]


def choices(doc: Mapping[str, Any]) -> list[str]:
    """The texts of A and B, which stand at the question's end; empty ones, read by letter only, where they do not."""
    found = re.search(r"\bA\s*[:.)]\s*(.+?)[;,]?\s*\bB\s*[:.)]\s*(.+?)[;.]?\s*$", doc["Question"], re.DOTALL)
    return [found[1], found[2]] if found else ["", ""]


def target(doc: Mapping[str, Any]) -> str:
    return str(doc["Answer"]).strip(" .").capitalize()


def process(doc: Mapping[str, Any], replies: Sequence[str]) -> dict[str, Item]:
    if doc["Question_Type"] == "yes_no":
        word = yes_or_no(replies[0], doc["Question"])
        answer = word and word.capitalize()
    else:
        answer = choice(replies[0], choices(doc))
    group, place = divmod(int(doc["Index"]), 4)  # question 0 on image 0, on image 1, then question 1
    item = {
        "group": group,
        "question": place // 2,
        "image": place % 2,
        "answer": answer,
        "right": answer == target(doc),
    }
    return dict.fromkeys(METRICS, item)


def question_accuracy(items: Sequence[Item]) -> float | None:
    return share(groups(items, lambda item: (item["group"], item["question"]), 2))


def image_accuracy(items: Sequence[Item]) -> float | None:
    return share(groups(items, lambda item: (item["group"], item["image"]), 2))


def _groups(items: Sequence[Item]) -> list[bool]:
    return groups(items, lambda item: item["group"], 4)


def group_accuracy(items: Sequence[Item]) -> float | None:
    return share(_groups(items))


def whole_groups(items: Sequence[Item]) -> int:
    return len(_groups(items))
