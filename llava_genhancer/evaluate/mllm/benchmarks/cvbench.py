"""CV-Bench: counting and relations in 2D (ADE20K, COCO), depth and distance in 3D (Omni3D).

The paper's Table 2 has ADE20K, COCO and 3D. ``cvbench_2d`` is the mean of the first two and ``cvbench_overall`` the
mean of 2D and 3D, as CV-Bench's authors compute them; lmms-eval's ``cv_bench`` averages over questions instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llava_genhancer.errors import InputError
from llava_genhancer.evaluate.mllm.answers import LETTERS, choice
from llava_genhancer.evaluate.mllm.benchmarks.items import Item, accuracy, mean, rgb

PARTS = {"ADE20K": "cvbench_2d_ade20k", "COCO": "cvbench_2d_coco", "3D": "cvbench_3d"}
COMMON = ("cvbench_2d", "cvbench_overall", "cvbench_unparsed")


def images(doc: Mapping[str, Any]) -> list[Any]:
    return rgb(doc["image"])


def prompt(doc: Mapping[str, Any], words: Mapping[str, str]) -> str:
    return f"{doc['prompt']}{words['post_prompt']}"


def options(doc: Mapping[str, Any]) -> list[str]:
    return list(LETTERS[: len(doc["choices"] or ())])


def target(doc: Mapping[str, Any]) -> str:
    return str(doc["answer"]).strip(" ().").upper()


def process(doc: Mapping[str, Any], replies: Sequence[str]) -> dict[str, Item]:
    answer = choice(replies[0], doc["choices"] or ())
    part = "3D" if doc["type"] == "3D" else doc["source"]
    if part not in PARTS:
        raise InputError(f"CV-Bench question {doc['idx']}: source {part!r} is none of {', '.join(PARTS)}")
    item = {"part": part, "answer": answer, "right": answer == target(doc)}
    return dict.fromkeys((PARTS[part], f"{PARTS[part]}_n", *COMMON), item)


def _part(items: Sequence[Item], part: str) -> float | None:
    return accuracy([item for item in items if item["part"] == part])


def two_d(items: Sequence[Item]) -> float | None:
    return mean([_part(items, "ADE20K"), _part(items, "COCO")])


def overall(items: Sequence[Item]) -> float | None:
    return mean([two_d(items), _part(items, "3D")])
