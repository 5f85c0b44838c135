"""ScienceQA-IMG: the 2 017 test questions of ScienceQA that come with an image, two to five options each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llava_genhancer.evaluate.mllm.answers import LETTERS, choice
from llava_genhancer.evaluate.mllm.benchmarks.items import Item, lettered, rgb

METRICS = ("scienceqa_accuracy", "scienceqa_n", "scienceqa_unparsed")


def images(doc: Mapping[str, Any]) -> list[Any]:
    return rgb(doc["image"])


def prompt(doc: Mapping[str, Any], words: Mapping[str, str]) -> str:
    hint = f"Context: {doc['hint']}\n" if doc["hint"] else ""
    return f"{hint}{doc['question']}\n{lettered(doc['choices'] or ())}{words['post_prompt']}"


def options(doc: Mapping[str, Any]) -> list[str]:
    return list(LETTERS[: len(doc["choices"] or ())])


def target(doc: Mapping[str, Any]) -> str:
    return LETTERS[doc["answer"]]


def process(doc: Mapping[str, Any], replies: Sequence[str]) -> dict[str, Item]:
    answer = choice(replies[0], doc["choices"] or ())
    item = {"answer": answer, "right": answer == target(doc)}
    return dict.fromkeys(METRICS, item)
