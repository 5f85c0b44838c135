"""The report's part about LLaVA: the trainings of a run, and what its models answered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llava_genhancer.evaluate import figures
from llava_genhancer.evaluate.markdown import code, table, text
from llava_genhancer.evaluate.question_results import BLIND, SCORING, QuestionResult, compare, load_results
from llava_genhancer.evaluate.report.gathered import Report
from llava_genhancer.evaluate.words import duration, number, p_value, percent, shell_line
from llava_genhancer.run import MANIFEST, read_json

# Folders below a run that hold LLaVA's trainings, by the tower that sees.
TRAININGS = {"enhanced": ".", "original": "baseline"}
QUESTIONS = "eval/questions.json"
FIGURE = "questions.png"


def section(report: Report) -> str:
    """What the questions showed, where any were asked, and LLaVA's trainings."""
    trained, facts = _trainings(report.run_dir)
    parts = [trained] if trained else []
    if (report.run_dir / QUESTIONS).is_file():
        parts = [*_answers(report), *parts]
    if facts:
        report.facts["llava"] = facts
    return "\n\n".join(["## LLaVA", *parts]) if parts else ""


def _trainings(run_dir: Path) -> tuple[str, list[dict[str, Any]]]:
    """A table of LLaVA's finished trainings, empty if there is none, and their facts."""
    facts = []
    for tower, folder in TRAININGS.items():
        for step in ("pretrain", "finetune"):
            path = run_dir / folder / f"llava-{step}" / "result.json"
            if path.is_file():
                result = {k: v for k, v in read_json(path).items() if k != "skipped"}
                facts.append({**result, "tower": tower, "step": step})
    if not facts:
        return "", []
    names = ("steps", "images_seen", "final_loss", "trainable_parameters", "padding_share")
    rows = [
        [text(f["tower"]), text(f["step"]), *(number(f.get(name)) for name in names), duration(f.get("seconds"))]
        for f in facts
    ]
    header = ["tower", "training", "steps", "samples", "last loss", "trained parameters", "padded share", "time"]
    return table(header, rows), facts


def _answers(report: Report) -> list[str]:
    """What the questions showed, in paragraphs; the picture is drawn.

    Raises:
        InputError: the file is malformed.
    """
    measured = read_json(report.run_dir / QUESTIONS)
    results = load_results(report.run_dir / QUESTIONS)
    first, others = results[0], [r for r in results[1:] if r.label != BLIND]
    figures.probes_figure(
        list(first.details), {r.label: _scores(r) for r in results}, report.path(FIGURE), "questions right, %"
    )
    header = ["detail", "n", "guessing", *(text(r.label) for r in results)]
    header += [f"{text(r.label)} - {text(first.label)} (McNemar p)" for r in others]
    rows = []
    for detail, score in first.details.items():
        cells = [_cell(r.details[detail]) for r in results]
        changes = [_change(first, r, detail) for r in others]
        rows.append([text(detail), str(score.n), f"{first.chance[detail]:.1f}", *cells, *changes])
    guessing = sum(first.chance.values()) / len(first.chance)
    rows.append(
        [
            "**average**",
            str(first.average.n),
            f"{guessing:.1f}",
            *(_cell(r.average) for r in results),
            *(_change(first, r, None) for r in others),
        ]
    )
    lines = [f"LLaVA's answers: {', '.join(f'{text(r.label)} {percent(r.average)}' for r in results)}."]
    for r in others:
        c = compare(first, r)
        told = "more than chance explains" if c.p < 0.05 else "within noise, not evidence of a difference"
        lines.append(
            f"LLaVA with the {text(r.label)} tower against the {text(first.label)}: {c.difference:+.1f} points "
            f"[{c.low:+.1f}, {c.high:+.1f}] (exact McNemar p {p_value(c.p)}): {told}, for this seed."
        )
    data = measured["data"]
    notes = [
        f"Asked on {code(data['path'])} (SHA-256 {code(str(data['sha256'])[:16])}…). {text(measured['scoring'])} "
        f"Brackets are 95 % intervals; {text(BLIND)} is {text(first.label)} with a blank image, the same questions.",
        "McNemar's test tells whether these two models answer differently. How far two trainings with one and the same "
        "tower differ, only several seeds tell; in a short training that is a lot, as a detail is learned or not yet. "
        f"And {len(first.details)} details are {len(first.details)} chances for a small p: read the average first.",
    ]
    for r in results:
        if r.unanswered:
            named = "; ".join(f"{i} ({why})" for i, why in list(r.unanswered.items())[:5])
            lost = f"{len(r.unanswered)} of {len(r.answers)} questions"
            notes.append(text(f"{r.label}: {lost} could not be answered and count as wrong: {named}", limit=1500))
    report.facts["questions"] = {
        "scoring": SCORING,
        "models": [{k: v for k, v in r.to_dict().items() if k != "answers"} for r in results],
        "comparisons": measured["comparisons"],
    }
    report.headlines += lines
    return [report.figure(FIGURE, "Questions answered right, per detail"), table(header, rows), *notes]


def commands(run_dir: Path) -> list[str]:
    """What trains and asks again, as each step was called."""
    calls = []
    for path in _manifests(run_dir)[1:]:
        manifest = read_json(run_dir / path)
        if isinstance(called := manifest.get("command"), list):
            calls.append(shell_line(["llava-genhancer", *called[1:]], manifest.get("folder")))
    if (run_dir / QUESTIONS).is_file():
        measured = read_json(run_dir / QUESTIONS)
        models = [m for m in measured["models"] if m["label"] != BLIND]
        names = [str(m["checkpoint"]) for m in models]
        labels = [str(m["label"]) for m in models]
        where = ["--data", str(measured["data"]["path"]), "--output", str(run_dir / QUESTIONS)]
        calls.append(
            shell_line(["llava-genhancer", "questions", *names, "--labels", *labels, *where], measured.get("folder"))
        )
    return calls


def manifests(run_dir: Path) -> str:
    """Links to the manifests of the run and of each training in it."""
    return ", ".join(f"[{text(path)}]({path})" for path in _manifests(run_dir) if (run_dir / path).is_file())


def _manifests(run_dir: Path) -> list[str]:
    """The run's own manifest, there or not, and those of its trainings."""
    paths = [f"{folder}/llava-{step}/{MANIFEST}" for folder in TRAININGS.values() for step in ("pretrain", "finetune")]
    return [MANIFEST, *(Path(path).as_posix() for path in paths if (run_dir / path).is_file())]


def _scores(result: QuestionResult) -> dict[str, dict[str, Any]]:
    """As the figure takes them: fractions."""
    return {
        detail: {
            "accuracy": s.percent / 100,
            "interval": [s.low / 100, s.high / 100],
            "chance": result.chance[detail] / 100,
        }
        for detail, s in result.details.items()
    }


def _cell(score: Any) -> str:
    return f"{score.percent:.1f} [{score.low:.1f}, {score.high:.1f}]"


def _change(first: QuestionResult, other: QuestionResult, detail: str | None) -> str:
    c = compare(first, other, detail)
    return f"{c.difference:+.1f} ({p_value(c.p).removeprefix('= ')})"
