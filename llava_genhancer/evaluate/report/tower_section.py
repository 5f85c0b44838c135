"""The report's sections on the towers themselves: MMVP-VLM and, in the toy world, linear probes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from llava_genhancer.evaluate import figures
from llava_genhancer.evaluate.markdown import code, table, text
from llava_genhancer.evaluate.mmvp import table1
from llava_genhancer.evaluate.mmvp.results import GUESS, ONE_PAIR, MmvpResult, compare, load_results
from llava_genhancer.evaluate.report.gathered import Report, before_and_after
from llava_genhancer.evaluate.words import mmvp_table, number, paper_rows, percent, verdict
from llava_genhancer.run import read_json, write_text

FIGURES = ("mmvp_vlm.png", "probes.png")


def mmvp(report: Report) -> str:
    """Scores with their intervals, paired tests, the paper's Table 1 beside them."""
    path = report.run_dir / "eval" / "mmvp_vlm.json"
    if not path.is_file():
        report.missing.append("eval/mmvp_vlm.json: not there; run mmvp-vlm with --output to measure before and after")
        return ""
    results = _before_and_after(load_results(path))
    comparisons = [compare(results[0], r) for r in results[1:]]
    towers = [{k: v for k, v in r.to_dict().items() if k != "pairs"} for r in results]
    benchmark = read_json(path)["benchmark"]
    report.facts["mmvp_vlm"] = {
        "benchmark": benchmark,
        "towers": towers,
        "comparisons": [c.to_dict() for c in comparisons],
    }
    figures.mmvp_figure(results, report.path("mmvp_vlm.png"))
    picture = report.figure("mmvp_vlm.png", "MMVP-VLM by pattern, with 95 % intervals")
    scores = ", ".join(f"{text(r.label)} {percent(r.average)}" for r in results)
    report.headlines.append(f"MMVP-VLM: {scores} of {results[0].average.n} pairs.")
    for r, c in zip(results[1:], comparisons, strict=True):
        report.headlines.append(f"{text(r.label)} against {text(results[0].label)}: {verdict(c)}")
    n, each = results[0].average.n, results[0].patterns[0].n
    notes = [
        f"Measured on {code(benchmark['path'])} (SHA-256 {code(benchmark['sha256'][:16])}…).",
        f"n = {n} pairs, {each} per pattern; brackets are 95 % intervals (Wilson per pattern, stratified for the "
        f"average). One pair is {ONE_PAIR:.2f} points of the average, {100 / each:.1f} of its pattern; guessing "
        f"gives {GUESS:.0f} %. Read the average first.",
    ]
    for r in results:
        if r.average.low <= GUESS <= r.average.high:
            notes.append(f"The interval of {text(r.label)} holds {GUESS:.0f} %: not told apart from guessing.")
    if any(r.paper for r in results):
        rows = text(paper_rows(results))
        notes.append(f"Published figures beside them: {rows}.")
    compared = [*results, *(r for run in report.others for r in _measured_elsewhere(run))]
    write_text(report.run_dir / table1.CSV, table1.as_csv(compared))
    return "\n\n".join(["## MMVP-VLM", picture, mmvp_table(results), *notes, table1.markdown(compared)])


def _measured_elsewhere(run: Path) -> list[MmvpResult]:
    """Another run's towers, called by its name too."""
    path = run / "eval" / "mmvp_vlm.json"
    found = _before_and_after(load_results(path)) if path.is_file() else []
    return [dataclasses.replace(r, label=f"{run.resolve().name}: {r.label}") for r in found]


def probes(report: Report) -> str:
    """What each detail says to a linear probe, before and after."""
    path = "eval/probes.json"
    if not (report.run_dir / path).is_file():
        return ""  # only the toy world knows its details
    values = report.read(path, dict)
    if values is None:
        return ""
    details = [str(d) for d in values["details"]]
    towers = {name: values[name] for name in ("original", "enhanced") if name in values}
    figures.probes_figure(details, towers, report.path("probes.png"))
    report.facts["probes"] = values
    rows = []
    for detail in details:
        scores = [tower[detail] for tower in towers.values()]
        change = f"{100 * (scores[1]['accuracy'] - scores[0]['accuracy']):+.1f}" if len(scores) == 2 else ""
        cells = [
            f"{100 * s['accuracy']:.1f} [{100 * s['interval'][0]:.1f}, {100 * s['interval'][1]:.1f}]" for s in scores
        ]
        rows.append([text(detail), number(scores[0].get("n")), *cells, change])
    note = (
        "Linear probes on the frozen condition, accuracy in percent with 95 % intervals. Intervals that overlap do "
        "not show a difference, and of many details a few move by chance alone."
    )
    picture = report.figure("probes.png", "Linear-probe accuracy per detail")
    return "\n\n".join(["## Linear probes", picture, table(["detail", "n", *towers, "change"], rows), note])


def _before_and_after(results: list[MmvpResult]) -> list[MmvpResult]:
    """Labels an original tower and the tower that a recipe made of it as such, whatever their folders are called."""
    if before_and_after(results):
        return [dataclasses.replace(r, label=name) for r, name in zip(results, ("original", "enhanced"), strict=True)]
    return results
