"""Table 2 of the paper (arXiv 2503.19480 v3): its figures in percent, and how each column is counted from answers."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from llava_genhancer.evaluate.mllm.benchmarks.items import Item, groups
from llava_genhancer.evaluate.paper import METHODS, Method

Ratios = list[tuple[int, int]]


@dataclass(frozen=True)
class Column:
    """One column of Table 2.

    Attributes:
        name: ours, for JSON and CSV.
        title: the table's.
        tasks: lmms-eval tasks that measure it; the first that was run counts.
        metric: lmms-eval's name of it.
        unit: what is resampled; ``size`` of them make up the whole benchmark (None: not stated by its authors).
        key: to which unit an item belongs; ``number`` is its document's.
        count: a unit's numerators and denominators.
    """

    name: str
    title: str
    tasks: tuple[str, ...]
    metric: str
    unit: str
    size: int | None
    key: Callable[[Item, int], Hashable]
    count: Callable[[Sequence[Item]], Ratios]


def _ratio(values: Sequence[bool]) -> tuple[int, int]:
    return sum(values), len(values)


def _number(item: Item, number: int) -> Hashable:
    return number


def _right(items: Sequence[Item]) -> Ratios:
    return [_ratio([item["right"] for item in items])]


def _f1(items: Sequence[Item]) -> Ratios:
    hits = sum(item["right"] for item in items if item["truth"] == "yes")
    claims = sum((item["answer"] == "yes") + (item["truth"] == "yes") for item in items)
    return [(2 * hits, claims)]


def _whole(size: int) -> Callable[[Sequence[Item]], Ratios]:
    """A group of ``size`` items with all of them right; one that is not whole does not count."""
    return lambda items: [_ratio(groups(items, lambda _: 0, size))]


def _halves(part: str) -> Callable[[Sequence[Item]], Ratios]:
    """NaturalBench's two questions, or two images, of a group."""
    return lambda items: [_ratio(groups(items, lambda item: item[part], 2))]


def _hallusion(items: Sequence[Item]) -> Ratios:
    questions = groups(items, lambda item: item["question"], "question_size")
    figures = groups(items, lambda item: item["figure"], "figure_size")
    return [*_right(items), _ratio(questions), _ratio(figures)]


def _natural(name: str, title: str, metric: str, count: Callable[[Sequence[Item]], Ratios]) -> Column:
    return Column(
        f"naturalbench_{name}", f"NaturalBench {title}", ("naturalbench",), metric, "group", 1900,
        lambda item, _: item["group"], count,
    )  # fmt: skip


def _cv(name: str, title: str, size: int | None) -> Column:
    return Column(
        f"cvbench_{name}", f"CV-Bench {title}", ("cvbench",), f"cvbench_{name}", "question", size, _number, _right
    )


def _pope(name: str) -> Column:
    return Column(
        f"pope_{name}", f"POPE {name}, F1", ("pope",), f"pope_{name}_f1_score", "question", 3000, _number, _f1
    )


COLUMNS: tuple[Column, ...] = (
    Column(
        "mmvp", "MMVP-MLLM", ("mmvp_original_labels", "mmvp"), "mmvp_pair_accuracy", "pair", 150,
        lambda item, _: (item["index"] - 1) // 2, _whole(2),
    ),
    _natural("acc", "Acc", "naturalbench_ACC", _right),
    _natural("q_acc", "Q-Acc", "naturalbench_Q_ACC", _halves("question")),
    _natural("i_acc", "I-Acc", "naturalbench_I_ACC", _halves("image")),
    _natural("g_acc", "G-Acc", "naturalbench_G_ACC", _whole(4)),
    _cv("2d_ade20k", "2D ADE20K", None),
    _cv("2d_coco", "2D COCO", None),
    _cv("3d", "3D", 1200),
    _pope("random"),
    _pope("popular"),
    _pope("adversarial"),
    Column(
        "scienceqa_img", "ScienceQA-IMG", ("scienceqa_img",), "scienceqa_accuracy", "question", 2017, _number, _right
    ),
    # Questions are asked across a set's figures, so that neither questions nor figures are independent: sets are.
    Column(
        "hallusionbench", "HallusionBench avg.", ("hallusionbench",), "hallusionbench_average", "set of figures", None,
        lambda item, _: item["set"], _hallusion,
    ),
)  # fmt: skip

LLMS = ("Vicuna-7B", "Vicuna-13B")
# Per language model and in METHODS' order, the columns' order.
_TABLE2: dict[str, tuple[tuple[float, ...], ...]] = {
    "Vicuna-7B": (
        (24.7, 76.4, 53.6, 56.4, 17.6, 49.6, 60.9, 58.7, 87.3, 86.1, 84.2, 66.8, 27.6),
        (31.3, 75.3, 51.7, 56.1, 22.3, 51.3, 63.4, 60.2, 87.9, 87.0, 84.6, 66.3, 28.6),
        (30.7, 77.3, 55.6, 59.1, 24.4, 52.9, 63.6, 63.2, 88.1, 86.7, 84.6, 66.5, 28.4),
    ),
    "Vicuna-13B": (
        (30.7, 76.3, 52.9, 55.1, 13.8, 52.6, 63.3, 65.0, 87.1, 86.2, 84.5, 71.6, 24.5),
        (35.3, 76.0, 52.7, 56.0, 16.8, 53.2, 64.3, 65.8, 88.1, 87.4, 84.8, 71.8, 25.2),
        (36.7, 77.2, 55.3, 58.7, 22.9, 55.3, 64.3, 66.4, 87.8, 87.0, 84.9, 72.3, 26.4),
    ),
}


def published(llm: str, method: Method) -> dict[str, float]:
    """One row of Table 2: column's name to percent."""
    return dict(zip((c.name for c in COLUMNS), _TABLE2[llm][METHODS.index(method)], strict=True))
