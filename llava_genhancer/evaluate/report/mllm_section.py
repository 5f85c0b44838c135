"""The report's part about lmms-eval: Table 2 with a user's rows, what changed against a baseline, where it is from."""

from __future__ import annotations

import csv
import io
import os
import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava_genhancer.evaluate import figures
from llava_genhancer.evaluate.markdown import block, code, table, text
from llava_genhancer.evaluate.mllm.evaluation import Evaluation, evaluation
from llava_genhancer.evaluate.mllm.protocol import warnings
from llava_genhancer.evaluate.mllm.results import Change, Measured
from llava_genhancer.evaluate.mllm.table2 import COLUMNS, LLMS, published
from llava_genhancer.evaluate.paper import METHODS, Method, find_backbone
from llava_genhancer.evaluate.report.gallery import gallery
from llava_genhancer.evaluate.report.gathered import Report
from llava_genhancer.evaluate.tower import is_hub_id, made_by
from llava_genhancer.evaluate.words import p_value
from llava_genhancer.run import write_text

FIGURES = ("table2.png", "table2_changes.png")
CSV = "tables/table2.csv"
BACKBONE = "openai-l14-336"  # the vision tower of Table 2, LLaVA-1.5's own
METHOD_NAMES = {"original": "original", "diva": "DIVA", "genhancer": "GenHancer"}
CSV_HEADER = (
    "source", "model", "column", "percent", "low", "high", "n", "unit", "answers", "unparsed", "unanswered", "against",
    "change", "change_low", "change_high", "p", "test", "task", "task_version", "data", "data_revision",
    "lmms_eval", "samples",
)  # fmt: skip


def section(report: Report, baseline: Path | None) -> str:
    """Tables, pictures, the gallery and, as a file, the CSV of what lmms-eval measured."""
    run_dir = report.run_dir
    found = evaluation([run_dir, *report.others], baseline)
    if found is None:
        return ""
    report.gallery = gallery(found)
    method = _published_method(report)
    _draw(found, method, run_dir / "figures")
    write_text(run_dir / CSV, _csv(found, run_dir))
    report.headlines += _headlines(found)
    report.facts["table2"] = _facts(found, run_dir)
    parts = [
        "## LLaVA on the paper's benchmarks",
        report.figure(FIGURES[0], "Table 2's columns with 95 % intervals"),
        _table2(found, run_dir),
        f"Percent; brackets are 95 % bootstrap intervals over the benchmark's own units. A number links to the samples "
        f"that it was counted from; all of them are in [{CSV}]({CSV}). The published rows are Table 2 of arXiv "
        "2503.19480; what was not measured stays blank.",
    ]
    if found.baseline is not None and any(found.changes.values()):
        parts += [
            f"### Against {text(found.baseline.label)}",
            report.figure(FIGURES[1], "Changes with 95 % intervals"),
            _changes(found, method),
            "In points, on the same questions, with the paired bootstrap's 95 % interval. p is McNemar's exact test "
            "where a unit is right or wrong, else the permutation test that exchanges both models' answers unit by "
            "unit. No p is corrected for there being several: of 20 true zeros one is below 0.05.",
        ]
    said = [f"* {text(line)}" for line in warnings(found.models, found.baseline)]
    if said:
        parts += ["### Where this differs from the paper's protocol", "\n".join(said)]
    return "\n\n".join([*parts, _sources(found, run_dir)])


def _published_method(report: Report) -> Method | None:
    """The method of Table 2 that made the run's tower from Table 2's backbone; None where no such row exists."""
    backbone = str(report.values.get("backbone"))
    known = find_backbone([backbone]) if is_hub_id(backbone) else None
    if known is None or known.recipe != BACKBONE:
        return None
    key = made_by({"recipe": report.values, "lora_scale": report.values.get("lora_scale", 1)}, known)
    return next((method for method in METHODS if method == key), None)


def _headlines(found: Evaluation) -> list[str]:
    """The summary's lines, one per compared model."""
    lines = []
    for label, changes in found.changes.items():
        if found.baseline is None or not changes:
            continue
        clear = [c for c in changes.values() if c.p < 0.05]
        better, worse = sum(c.difference > 0 for c in clear), sum(c.difference < 0 for c in clear)
        lines.append(
            f"Table 2, {text(label)} against {text(found.baseline.label)}: of {len(changes)} columns {better} higher "
            f"and {worse} lower than chance explains (p < 0.05), for this seed."
        )
    return lines


def _facts(found: Evaluation, run_dir: Path) -> dict[str, Any]:
    """For the JSON."""
    return {
        "published": {llm: {method: published(llm, method) for method in METHODS} for llm in LLMS},
        "baseline": found.baseline.label if found.baseline else None,
        "models": [
            {
                "label": model.label,
                "columns": {name: _column(m, run_dir) for name, m in model.columns.items()},
                "changes": {
                    name: {"points": c.difference, "interval": list(c.interval), "p": c.p, "test": c.test}
                    for name, c in found.changes.get(model.label, {}).items()
                },
                "metrics": {
                    name: {k.removesuffix(",none"): v for k, v in task.metrics.items() if _is_metric(k, v)}
                    for name, task in model.tasks.items()
                },
                "unanswered": [
                    {"task": name, "document": number, "reason": why}
                    for name, task in model.tasks.items()
                    for number, why in task.unanswered.items()
                ],
            }
            for model in found.models
        ],
        "warnings": warnings(found.models, found.baseline),
    }


def _is_metric(name: str, value: Any) -> bool:
    return name.endswith(",none") and "_stderr" not in name and isinstance(value, int | float)


def _column(m: Measured, run_dir: Path) -> dict[str, Any]:
    return {
        "percent": m.percent,
        "interval": list(m.interval) if m.interval else None,
        "n": m.n,
        "unit": m.column.unit,
        "answers": m.answers,
        "unparsed": m.unparsed,
        "unanswered": m.unanswered,
        "task": m.task.name,
        "task_version": m.task.version,
        "samples": _relative(m.task.samples, run_dir),
        "data": m.task.data,
        "data_revision": m.task.revision,
        "lmms_eval": m.task.lmms_eval,
        "prompt": m.task.prompt,
        "command": m.task.command,
    }


def _relative(path: Path, run_dir: Path) -> str:
    return Path(os.path.relpath(path.resolve(), run_dir.resolve())).as_posix()


def _link(words: str, path: Path, run_dir: Path) -> str:
    return f"[{words}]({urllib.parse.quote(_relative(path, run_dir))})"


def _table2(found: Evaluation, run_dir: Path) -> str:
    rows = []
    for column in COLUMNS:
        own = [_cell(model.columns.get(column.name), run_dir) for model in found.models]
        printed = [f"{published(llm, method)[column.name]:.1f}" for llm in LLMS for method in METHODS]
        rows.append([column.title, *own, *printed])
    labels = [f"**{text(model.label)}**" for model in found.models]
    return table(["column", *labels, *(f"{llm} {METHOD_NAMES[m]}" for llm in LLMS for m in METHODS)], rows)


def _cell(m: Measured | None, run_dir: Path) -> str:
    if m is None or m.percent is None:
        return ""
    low_high = f" [{m.interval[0]:.1f}, {m.interval[1]:.1f}]" if m.interval else ""
    lost = f" ({m.unanswered:,} of {m.answers:,} not answered)" if m.unanswered else ""
    return _link(f"{m.percent:.1f}", m.task.samples, run_dir) + low_high + lost


def _changes(found: Evaluation, method: Method | None) -> str:
    """The changes, with those published for the run's own method beside them."""
    assert found.baseline is not None
    header = ["column", "n", *map(text, found.changes)]
    header += [f"published, {METHOD_NAMES[method]}, {llm}" for llm in LLMS if method]
    rows = []
    for column in COLUMNS:
        first = found.baseline.columns.get(column.name)
        cells = []
        for changes in found.changes.values():
            c = changes.get(column.name)
            cells.append("" if c is None else f"{said(c)} (p {p_value(c.p).removeprefix('= ')})")
        gains = [
            published(llm, method)[column.name] - published(llm, "original")[column.name] for llm in LLMS if method
        ]
        many = f"{first.n} {column.unit}s".replace("set of figuress", "sets of figures") if first else ""
        rows.append([column.title, many, *cells, *(f"{gain:+.1f}" for gain in gains)])
    return table(header, rows)


def said(c: Change) -> str:
    """``+6.0 [+1.3, +10.7]``."""
    return f"{c.difference:+.1f} [{c.interval[0]:+.1f}, {c.interval[1]:+.1f}]"


def _sources(found: Evaluation, run_dir: Path) -> str:
    rows: list[list[str]] = []
    commands: dict[str, None] = {}
    prompts: dict[str, str] = {}
    for model in found.models:
        for task in model.tasks.values():
            rows.append(
                [
                    text(model.label),
                    _link(task.name, task.samples, run_dir),
                    text(task.version),
                    code(task.data),
                    code(task.revision[:16]) if task.revision else "not recorded",
                    text(task.lmms_eval or "not recorded"),
                ]
            )
            commands[task.command] = None
            prompts[task.name] = task.prompt
    header = ["model", "task and its samples", "version", "data set", "revision", "lmms-eval"]
    shown = "\n\n".join(f"{code(name)}\n\n{block(prompt.splitlines(), 'text')}" for name, prompt in prompts.items())
    return "\n\n".join(
        [
            "### Where the numbers are from",
            table(header, rows),
            block(list(commands)),
            f"<details><summary>the first prompt of each task ({len(prompts)})</summary>",
            shown,
            "</details>",
        ]
    )


def _csv(found: Evaluation, run_dir: Path) -> str:
    """One line per model and column, the published rows first; what is not known is empty."""
    rows: list[Mapping[str, Any]] = [
        {"source": "arXiv 2503.19480", "model": f"{llm} {METHOD_NAMES[method]}", "column": name, "percent": value}
        for llm in LLMS
        for method in METHODS
        for name, value in published(llm, method).items()
    ]
    for model in found.models:
        for name, m in model.columns.items():
            row = {"source": "run", "model": model.label, "column": name, **_column(m, run_dir)}
            row["low"], row["high"] = m.interval or (None, None)
            if found.baseline and (c := found.changes.get(model.label, {}).get(name)):
                low, high = c.interval
                row |= {"against": found.baseline.label, "change": c.difference, "change_low": low}
                row |= {"change_high": high, "p": c.p, "test": c.test}
            rows.append(row)
    out = io.StringIO()
    writer = csv.DictWriter(out, CSV_HEADER, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    return out.getvalue()


def _draw(found: Evaluation, method: Method | None, folder: Path) -> None:
    titles = {c.name: c.title for c in COLUMNS}
    points: dict[str, dict[str, dict[str, Any]]] = {}
    for llm in LLMS[:1]:
        for name in (m for m in METHODS if m in ("original", method)):
            values = published(llm, name)
            points[f"{llm}, {METHOD_NAMES[name]} (published)"] = {
                titles[column]: {"accuracy": v / 100, "interval": (v / 100, v / 100)} for column, v in values.items()
            }
    for model in found.models:
        points[model.label] = {
            titles[name]: {"accuracy": m.percent / 100, "interval": [x / 100 for x in m.interval]}
            for name, m in model.columns.items()
            if m.percent is not None and m.interval is not None
        }
    figures.probes_figure(list(titles.values()), points, folder / FIGURES[0], "percent, with 95 % intervals")
    if any(found.changes.values()):
        changes = {
            label: {titles[name]: (c.difference, *c.interval) for name, c in own.items()}
            for label, own in found.changes.items()
        }
        assert found.baseline is not None
        measure = f"points against {found.baseline.label}"
        figures.changes_figure(list(titles.values()), changes, folder / FIGURES[1], measure)
