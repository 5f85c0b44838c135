"""MMVP: 150 pairs of images that CLIP takes for alike, one question with two options each.

Two pairs were published with their labels exchanged. ``mmvp`` carries the corrected labels, as lmms-eval's data set
does; ``mmvp_original_labels`` the published ones, which the paper's figures were computed with. Both set the labels of
those four questions themselves, so a local copy of either data set gives the same numbers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from llava_genhancer.evaluate.mllm.answers import LETTERS, choice
from llava_genhancer.evaluate.mllm.benchmarks.items import Item, groups, lettered, rgb, share

METRICS = ("mmvp_accuracy", "mmvp_pair_accuracy", "mmvp_n", "mmvp_pairs", "mmvp_unparsed")
# Index: a word of the question, the corrected label, the published one. The elephant's tusks, the seated man.
RELABELLED = {
    99: ("elephant", "B", "A"),
    100: ("elephant", "A", "B"),
    279: ("elderly", "B", "A"),
    280: ("elderly", "A", "B"),
}


def images(doc: Mapping[str, Any]) -> list[Any]:
    return rgb(doc["image"])


def choices(doc: Mapping[str, Any]) -> list[str]:
    """``"(a) Open (b) Closed"`` as a list."""
    return [text.strip() for text in re.split(r"\([a-z]\)", doc["Options"] or "")[1:]]


def prompt(doc: Mapping[str, Any], words: Mapping[str, str]) -> str:
    return f"{doc['Question']}\n{lettered(choices(doc))}{words['post_prompt']}"


def options(doc: Mapping[str, Any]) -> list[str]:
    return list(LETTERS[: len(choices(doc))])


def target(doc: Mapping[str, Any]) -> str:
    return _label(doc, original=False)


def original_target(doc: Mapping[str, Any]) -> str:
    return _label(doc, original=True)


def _label(doc: Mapping[str, Any], *, original: bool) -> str:
    word, corrected, published = RELABELLED.get(int(doc["Index"]), ("", "", ""))
    if word and word in doc["Question"].lower():
        return published if original else corrected
    return str(doc["Correct Answer"]).strip(" ().").upper()


def process(doc: Mapping[str, Any], replies: Sequence[str]) -> dict[str, Item]:
    return _items(doc, replies[0], target(doc))


def process_original(doc: Mapping[str, Any], replies: Sequence[str]) -> dict[str, Item]:
    return _items(doc, replies[0], original_target(doc))


def _items(doc: Mapping[str, Any], reply: str, truth: str) -> dict[str, Item]:
    answer = choice(reply, choices(doc))
    item = {"index": int(doc["Index"]), "answer": answer, "right": answer == truth}
    return dict.fromkeys(METRICS, item)


def _pairs(items: Sequence[Item]) -> list[bool]:
    return groups(items, lambda item: (item["index"] - 1) // 2, 2)


def pair_accuracy(items: Sequence[Item]) -> float | None:
    """Pairs with both questions right."""
    return share(_pairs(items))


def pairs(items: Sequence[Item]) -> int:
    return len(_pairs(items))
