"""Items, what a reply became, and the measures that several benchmarks share."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

from llava_genhancer.evaluate.mllm.answers import LETTERS

# "answer" (what was read in the reply, or None), "right" (a bool) and the keys that the benchmark groups by.
Item = Mapping[str, Any]


def rgb(picture: Any) -> list[Any]:
    """A document's image as lmms-eval wants it: in a list, which is empty for a question without one."""
    return [] if picture is None else [picture.convert("RGB")]


def lettered(options: Sequence[str]) -> str:
    """The options a line each, as LLaVA-1.5 saw them in training: ``A. open``."""
    return "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))


def share(values: Iterable[bool]) -> float | None:
    """How many are true, in [0, 1]."""
    values = list(values)
    return sum(values) / len(values) if values else None


def accuracy(items: Sequence[Item]) -> float | None:
    return share(item["right"] for item in items)


def count(items: Sequence[Item]) -> int:
    return len(items)


def unparsed(items: Sequence[Item]) -> int:
    """Replies in which no answer was found; they count as wrong."""
    return sum(item["answer"] is None for item in items)


UNANSWERED = "[not answered] "  # what our model replies, before the reason, to a document that it could not answer


def with_unanswered(process: Callable[..., dict[str, Item]]) -> Callable[..., dict[str, Item]]:
    """Wraps a task's ``process_results``: a document that was not answered is wrong, and its items hold the reason.

    Such a document has one metric more, ``<benchmark>_unanswered``; the parser never reads the reason.
    """

    @functools.wraps(process)
    def judged(doc: Mapping[str, Any], replies: Sequence[str]) -> dict[str, Item]:
        reply = str(replies[0])
        if not reply.startswith(UNANSWERED.strip()):
            return process(doc, replies)
        items = process(doc, [""])
        item = {**next(iter(items.values())), "answer": None, "right": False}
        item["unanswered"] = reply.removeprefix(UNANSWERED.strip()).strip()
        return dict.fromkeys([*items, *(unanswered_metric(n) for n in items if n.endswith("_unparsed"))], item)

    return judged


def unanswered_metric(unparsed: str) -> str:
    """The name of the metric that counts the unanswered, beside the one that counts the unparsed."""
    return unparsed.removesuffix("_unparsed") + "_unanswered"


def groups(items: Sequence[Item], key: Callable[[Item], Hashable], size: int | str) -> list[bool]:
    """Of each complete group, whether all its items are right.

    Args:
        key: what the items of a group share.
        size: items of a complete group, or the items' key that says it.
    """
    found: defaultdict[Hashable, list[Item]] = defaultdict(list)
    for item in items:
        found[key(item)].append(item)
    complete = (own for own in found.values() if len(own) == (own[0][size] if isinstance(size, str) else size))
    return [all(item["right"] for item in own) for own in complete]


def mean(values: Sequence[float | None]) -> float | None:
    """The plain mean; None if any part is missing."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None
