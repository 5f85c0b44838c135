"""What lmms-eval would make of replies, without lmms-eval's loop; and the documents of each task."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import hub
from datasets import Dataset

from llava_genhancer.evaluate.mllm.benchmarks import hallusionbench
from llava_genhancer.resources import resource_dir

HALLUSION = hallusionbench.with_group_sizes(Dataset.from_list(hub.HALLUSION)).to_list()
YES_NO = ("Yes", "No", "I cannot tell")
LETTERS = ("A", "B", "I cannot tell")
TASKS: dict[str, list[dict[str, Any]]] = {
    "mmvp": hub.MMVP,
    "mmvp_original_labels": hub.MMVP,
    "cvbench": hub.CVBENCH_2D + hub.CVBENCH_3D,
    "naturalbench": hub.NATURALBENCH,
    "pope": hub.POPE,
    "scienceqa_img": hub.SCIENCEQA,
    "hallusionbench": HALLUSION,
}


def replies(docs: Sequence[dict[str, Any]], seed: int) -> list[str]:
    """An answer of the right kind to each document, or none."""
    kinds = [YES_NO if doc.get("Question_Type") == "yes_no" or "gt_answer" in doc else LETTERS for doc in docs]
    kinds = [YES_NO if "image_source" in doc else kind for doc, kind in zip(docs, kinds, strict=True)]
    draw = random.Random(seed)
    return [draw.choice(kind) for kind in kinds]


def values(results: dict[str, Any], task: str) -> dict[str, Any]:
    """Metric to value, without lmms-eval's standard errors and filters."""
    found = {name.split(",")[0]: value for name, value in results["results"][task].items() if ",none" in name}
    return {name: value for name, value in found.items() if "_stderr" not in name}


def config_of(task: str) -> dict[str, Any]:
    """A task's YAML as lmms-eval reads it, functions and all."""
    from lmms_eval.utils import load_yaml_config

    return load_yaml_config(str(resource_dir("eval") / f"{task}.yaml"))


def score(task: str, docs: Sequence[dict[str, Any]], replies: Sequence[str]) -> dict[str, Any]:
    """What lmms-eval makes of replies: ``process_results`` for each document, then each metric over its items."""
    config = config_of(task)
    items = defaultdict(list)
    for doc, reply in zip(docs, replies, strict=True):
        for metric, item in config["process_results"](doc, [reply]).items():
            items[metric].append(item)
    metrics = {entry["metric"]: entry["aggregation"] for entry in config["metric_list"]}
    assert items.keys() <= metrics.keys()
    return {name: metrics[name](own) for name, own in items.items()}
