"""A run's report: ``report.md`` and ``report.html`` for people, ``report.json`` and ``tables/*.csv`` for programs.

Every part of a run folder is optional here. What is missing or unreadable is said in one line under "Not shown"; the
rest is reported all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from llava_genhancer.errors import InputError
from llava_genhancer.evaluate.markdown import text
from llava_genhancer.evaluate.mllm.evaluation import has_results
from llava_genhancer.evaluate.mllm.results import FOLDER
from llava_genhancer.evaluate.report import (
    generation_section,
    llava_section,
    mllm_section,
    recipe_section,
    retention_section,
    tower_section,
    training_section,
)
from llava_genhancer.evaluate.report.gathered import Report
from llava_genhancer.evaluate.report.html import page
from llava_genhancer.files import expand
from llava_genhancer.run import MANIFEST, write_json, write_text

PARTS = (MANIFEST, "stage1", "stage2", "tower", "eval", "llava-pretrain", "llava-finetune")
FIGURES = (*training_section.FIGURES, *tower_section.FIGURES, llava_section.FIGURE)
ALL_FIGURES = (*FIGURES, *mllm_section.FIGURES, retention_section.FIGURE, generation_section.FIGURE)


def write_report(run_dir: str | Path, others: Sequence[str | Path] = (), *, baseline: str | Path | None = None) -> Path:
    """Write the report of a run folder, from whatever is in it.

    Args:
        run_dir: a run's folder, or one that lmms-eval wrote into.
        others: more of them, whose rows stand beside the run's in the paper's tables.
        baseline: the one whose model the others are compared with; without it the run's own "original".

    Returns:
        The path of ``report.md``.

    Raises:
        InputError: no such folder, it holds something else than a run, or it cannot be written.
    """
    folders = [Path(expand(run)) for run in (run_dir, *others, *([baseline] if baseline else []))]
    for folder in folders:
        _check(folder)
    if baseline and not has_results(folders[-1]) and not (folders[-1] / FOLDER).is_dir():
        raise InputError(
            f"--baseline {baseline} holds no results of lmms-eval: evaluate its model into {baseline}/"
            f"{FOLDER}, or leave --baseline out where {run_dir} holds an 'original'"
        )
    first, *rest = folders
    return _write(first, rest[: len(others)], folders[-1] if baseline else None)


def _check(run_dir: Path) -> None:
    if not run_dir.is_dir():
        raise InputError(f"{run_dir} is not a folder: give a run's output folder")
    there = {p.name for p in run_dir.iterdir() if not p.name.startswith(".")}
    if there.isdisjoint(PARTS) and not has_results(run_dir):
        raise InputError(
            f"{run_dir} is not a run folder: it has none of {', '.join(PARTS)}, and no results of lmms-eval"
        )


def _write(run_dir: Path, others: Sequence[Path], baseline: Path | None) -> Path:
    report = Report(run_dir, others)
    sections: dict[str, Callable[[Report], str]] = {  # in the reader's order
        "MMVP-VLM": tower_section.mmvp,
        "zero-shot": retention_section.section,
        "probes": tower_section.probes,
        "lmms-eval": partial(mllm_section.section, baseline=baseline),
        "LLaVA": llava_section.section,
        "training": training_section.training,
        "pictures": training_section.reconstructions,
        "generation quality": generation_section.section,
        "skipped images": training_section.skipped,
        "recipe": recipe_section.recipe,
        "commands": partial(recipe_section.commands, baseline=baseline),
    }
    *written, commands = [report.section(title, make) for title, make in sections.items()]
    name = report.values.get("name") or run_dir.resolve().name
    parts = [f"# {text(name)}: report", _summary(report), *written, _not_shown(report), commands]
    body = "\n\n".join(part for part in parts if part) + "\n"
    try:
        for figure in ALL_FIGURES:  # of an earlier report, whose source is gone
            if figure not in report.drawn:
                report.path(figure).unlink(missing_ok=True)
        write_text(run_dir / "report.md", body)
        write_text(run_dir / "report.html", page(f"{name}: report", body, run_dir, report.gallery))
        facts = {**report.facts, "figures": [f"figures/{f}" for f in report.drawn], "not_shown": report.missing}
        write_json(run_dir / "report.json", {"format": 1, "name": name, **facts})
    except OSError as error:
        raise InputError(f"{run_dir} cannot be written: {error.strerror or error}") from None
    return run_dir / "report.md"


def _summary(report: Report) -> str:
    seed = report.values.get("seed", report.manifest.get("seed"))
    lines = list(report.headlines) or ["Nothing has been measured yet."]
    if seed is not None:
        lines.append(f"One run, seed {text(seed)}: another seed gives another result.")
    return "\n".join(f"* {line}" for line in lines)


def _not_shown(report: Report) -> str:
    lines = list(report.missing)
    if not retention_section.measured(report.run_dir):
        lines.append("zero-shot retention: not measured here; vision-only tuning can lower it (zero-shot, curve)")
    return "## Not shown\n\n" + "\n".join(f"* {text(line)}" for line in lines) if lines else ""
