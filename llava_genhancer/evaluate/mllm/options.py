"""Which answers a question offers: how a model that scores by likelihood finds them.

lmms-eval hands a model the document, not its options, and any other backend should see nothing odd. So the options
are looked up by the task's name, in this table; a reply that is one of them is always read as that option.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from llava_genhancer.evaluate.mllm.benchmarks import cvbench, hallusionbench, mmvp, naturalbench, pope, scienceqa

# Prefixes of a task's other name: ours where lmms-eval keeps the plain one, and lmms-eval's where ours has it.
OURS, UPSTREAM = "genhancer_", "upstream_"

OPTIONS: dict[str, Callable[[Mapping[str, Any]], list[str]]] = {
    "mmvp": mmvp.options,
    "mmvp_original_labels": mmvp.options,
    "cvbench": cvbench.options,
    "naturalbench": naturalbench.options,
    "pope": pope.options,
    "scienceqa_img": scienceqa.options,
    "hallusionbench": hallusionbench.options,
}


def has_options(task: str) -> bool:
    """Whether a task is in the table; any other can only be generated."""
    return _plain(task) in OPTIONS


def options_of(task: str, doc: Mapping[str, Any]) -> list[str] | None:
    """The options of a document, or None for a task that is not in the table."""
    return OPTIONS[_plain(task)](doc) if has_options(task) else None


def _plain(task: str) -> str:
    return task.removeprefix(OURS).removeprefix(UPSTREAM)
