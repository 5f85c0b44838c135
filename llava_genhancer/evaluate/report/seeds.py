"""Several seeds of one recipe beside each other: does the change come back, and how much does it move?"""

from __future__ import annotations

import math
import os
import shlex
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llava_genhancer.errors import InputError
from llava_genhancer.evaluate import figures
from llava_genhancer.evaluate.markdown import block, code, table, text
from llava_genhancer.evaluate.mmvp.results import GUESS, ONE_PAIR, Comparison, MmvpResult, compare, load_results
from llava_genhancer.evaluate.question_results import QuestionResult
from llava_genhancer.evaluate.question_results import load_results as load_answers
from llava_genhancer.evaluate.report.llava_section import QUESTIONS
from llava_genhancer.evaluate.words import p_value, percent
from llava_genhancer.files import expand
from llava_genhancer.run import MANIFEST, read_json, write_json, write_text

# Student's t, two-sided 95 %, for 1 to 9 degrees of freedom; beyond, a hair wider than exact.
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def write_seeds_report(run_dirs: Sequence[str | Path], output_dir: str | Path) -> Path:
    """Write ``report.md``, ``report.json`` and ``figures/seeds.png`` over finished runs that differ in the seed alone.

    Args:
        run_dirs: run folders, each with ``eval/mmvp_vlm.json`` of two towers and, where there are any, probes.

    Returns:
        The path of ``report.md``.

    Raises:
        InputError: a run is not measured, or was measured on other pairs, or the folder cannot be written.
    """
    runs = [Path(expand(run)) for run in run_dirs]
    output_dir = Path(expand(output_dir))
    if not runs:
        raise InputError("no runs to report on")
    seeds = [_seed(run) for run in runs]
    measured = [_before_and_after(run) for run in runs]
    comparisons = [compare(before, after) for before, after in measured]
    change = spread([c.difference for c in comparisons])
    probes = _probe_changes(runs)
    figures.seeds_figure(seeds, comparisons, probes, output_dir / "figures" / "seeds.png")

    rows = [_row(seed, *pair, c) for seed, pair, c in zip(seeds, measured, comparisons, strict=True)]
    parts = [
        f"# {len(runs)} seeds: report",
        f"* MMVP-VLM, enhanced minus original: {_said(change)} points, mean over {len(runs)} seeds.\n"
        f"* {_judgement(change, comparisons)}",
        "![Change per seed](figures/seeds.png)",
        "## MMVP-VLM",
        table(["seed", "original", "enhanced", "change", "gained / lost", "McNemar p"], rows),
        f"n = {measured[0][0].average.n} pairs; one pair is {ONE_PAIR:.2f} points, guessing gives {GUESS:.0f} %. "
        "Brackets are 95 % intervals over the pairs of one seed. All seeds see the same pairs, so they are no "
        "independent samples of pairs: the mean's interval, Student's t over the seeds, tells how much training moves "
        "and nothing more.",
    ]
    if probes:
        parts += [
            "## Linear probes",
            table(["detail", "mean change, points"], [[text(d), _said(spread(v))] for d, v in probes.items()]),
            f"Accuracy of linear probes, enhanced minus original. {len(probes)} details are {len(probes)} chances for "
            "an interval to miss zero by luck.",
        ]
    answers = _answer_changes(runs)
    if answers:
        rows = [[text(d), f"{before:.1f}", _said(spread(v))] for d, (before, v) in answers.items()]
        parts += [
            "## LLaVA's answers",
            table(["detail", "original, mean %", "mean change, points"], rows),
            "Questions answered right by a LLaVA trained with the enhanced tower minus one with the original, trained "
            "alike with the same seed. All seeds are asked the same questions.",
        ]
    links = [
        f"* seed {text(seed)}: {code(os.path.relpath(run / 'report.md', output_dir))}"
        for seed, run in zip(seeds, runs, strict=True)
    ]
    again = [shlex.join(["llava-genhancer", "report", str(run)]) for run in runs]
    parts += ["## The runs", "\n".join(links), block(again)]
    facts = {
        "format": 1,
        "seeds": seeds,
        "change": change,
        "comparisons": [c.to_dict() for c in comparisons],
        "probes": {detail: spread(values) for detail, values in probes.items()},
        "answers": {detail: {"original": before, **spread(values)} for detail, (before, values) in answers.items()},
    }
    try:
        write_text(output_dir / "report.md", "\n\n".join(parts) + "\n")
        write_json(output_dir / "report.json", facts)
    except OSError as error:
        raise InputError(f"{output_dir} cannot be written: {error.strerror or error}") from None
    return output_dir / "report.md"


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean, standard deviation and Student's 95 % interval of the mean; the latter two are None for one value."""
    mean, n = statistics.fmean(values), len(values)
    if n < 2:
        return {"mean": mean, "sd": None, "interval": None, "values": list(values)}
    sd = statistics.stdev(values)
    half = T95[min(n - 2, len(T95) - 1)] * sd / math.sqrt(n)
    return {"mean": mean, "sd": sd, "interval": [mean - half, mean + half], "values": list(values)}


def _said(s: dict[str, Any]) -> str:
    if s["interval"] is None:
        return f"{s['mean']:+.1f}"
    return f"{s['mean']:+.1f} [{s['interval'][0]:+.1f}, {s['interval'][1]:+.1f}] (s.d. {s['sd']:.1f})"


def _judgement(change: dict[str, Any], comparisons: Sequence[Comparison]) -> str:
    clear = sum(c.p < 0.05 for c in comparisons)
    told = f"{clear} of {len(comparisons)} seeds differ from the original by McNemar's test at 5 %."
    if change["interval"] is None:
        return f"One seed says nothing about the next. {told}"
    low, high = change["interval"]
    if low > 0 or high < 0:
        return f"The interval over seeds excludes zero: the {'gain' if low > 0 else 'loss'} comes back. {told}"
    return f"The interval over seeds holds zero: within noise, not evidence of a difference. {told}"


def _row(seed: Any, before: MmvpResult, after: MmvpResult, c: Comparison) -> list[str]:
    change = f"{c.difference:+.1f} [{c.low:+.1f}, {c.high:+.1f}]"
    return [
        text(seed),
        percent(before.average),
        percent(after.average),
        change,
        f"{c.gained} / {c.lost}",
        p_value(c.p).removeprefix("= "),
    ]


def _seed(run: Path) -> Any:
    manifest = read_json(run / MANIFEST) if (run / MANIFEST).is_file() else {}
    return manifest.get("seed", run.name)


def _before_and_after(run: Path) -> tuple[MmvpResult, MmvpResult]:
    results = load_results(run / "eval" / "mmvp_vlm.json")
    if len(results) != 2:
        raise InputError(
            f"{run / 'eval' / 'mmvp_vlm.json'} has {len(results)} towers: needed are original and enhanced"
        )
    return results[0], results[1]


def _probe_changes(runs: Sequence[Path]) -> dict[str, list[float]]:
    """Detail to its change in points, one per run; empty unless every run was probed for the same details."""
    files = [run / "eval" / "probes.json" for run in runs]
    if not all(f.is_file() for f in files):
        return {}
    values = [read_json(f) for f in files]
    try:
        details = [str(d) for d in values[0]["details"]]
        return {
            d: [100 * (v["enhanced"][d]["accuracy"] - v["original"][d]["accuracy"]) for v in values] for d in details
        }
    except (KeyError, TypeError) as error:
        raise InputError(f"{files[0].parent}: probes.json is not as expected ({error}): probe again") from None


def _answer_changes(runs: Sequence[Path]) -> dict[str, tuple[float, list[float]]]:
    """Detail (and "average") to the original's mean score and each run's change; empty unless every run was asked."""
    files = [run / QUESTIONS for run in runs]
    if not all(f.is_file() for f in files):
        return {}
    before, after = zip(*(_original_and_enhanced(f) for f in files), strict=True)

    def changes(score: Callable[[QuestionResult], float]) -> tuple[float, list[float]]:
        differences = [score(b) - score(a) for a, b in zip(before, after, strict=True)]
        return statistics.fmean(map(score, before)), differences

    per_detail = {d: changes(lambda r, d=d: r.details[d].percent) for d in before[0].details}  # type: ignore[misc]
    return {**per_detail, "average": changes(lambda r: r.average.percent)}


def _original_and_enhanced(path: Path) -> tuple[QuestionResult, QuestionResult]:
    results = {r.label: r for r in load_answers(path)}
    if not {"original", "enhanced"} <= results.keys():
        raise InputError(f"{path} has answers of {', '.join(results)}: needed are original and enhanced")
    return results["original"], results["enhanced"]
