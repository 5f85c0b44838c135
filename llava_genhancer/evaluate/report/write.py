"""A run's report: ``report.md`` and ``report.html`` for people, ``report.json`` and ``tables/*.csv`` for programs.

Every part of a run folder is optional here. What is missing or unreadable is said in one line under "Not shown"; the
rest is reported all the same.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from llava_genhancer.errors import InputError
from llava_genhancer.evaluate import figures
from llava_genhancer.evaluate.markdown import block, code, table, text
from llava_genhancer.evaluate.mmvp import table1
from llava_genhancer.evaluate.mmvp.results import GUESS, ONE_PAIR, MmvpResult, compare, load_results
from llava_genhancer.evaluate.report import generation_section, llava_section, mllm_section, retention_section
from llava_genhancer.evaluate.report.gallery import gallery
from llava_genhancer.evaluate.report.html import page
from llava_genhancer.evaluate.words import duration, fields, flat, mmvp_table, number, paper_rows, percent, verdict
from llava_genhancer.run import MANIFEST, read_json, write_json, write_text

STAGES = (1, 2)
PARTS = (MANIFEST, "stage1", "stage2", "tower", "eval", "llava-pretrain", "llava-finetune")
FIGURES = ("loss.png", "t_density.png", "reconstructions.png", "mmvp_vlm.png", "probes.png", llava_section.FIGURE)
ALL_FIGURES = (*FIGURES, *mllm_section.FIGURES, retention_section.FIGURE, generation_section.FIGURE)
GRID_ROWS, GRID_COLUMNS, KEYS_SHOWN = 6, 8, 20
# Recipe fields worth a reader's first look; the others follow folded away.
FIRST_FIELDS = (
    "backbone", "vae", "data", "condition", "t_sampling", "t_scale", "global_batch_size", "precision", "lora_rank",
    "lora_scale", "seed",
)  # fmt: skip


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
    folders = [Path(run).expanduser() for run in (run_dir, *others, *([baseline] if baseline else []))]
    for folder in folders:
        _check(folder)
    if baseline and not mllm_section.has_results(folders[-1]) and not (folders[-1] / mllm_section.FOLDER).is_dir():
        raise InputError(
            f"--baseline {baseline} holds no results of lmms-eval: evaluate its model into {baseline}/"
            f"{mllm_section.FOLDER}, or leave --baseline out where {run_dir} holds an 'original'"
        )
    first, *rest = folders
    return _write(first, rest[: len(others)], folders[-1] if baseline else None)


def _check(run_dir: Path) -> None:
    if not run_dir.is_dir():
        raise InputError(f"{run_dir} is not a folder: give a run's output folder")
    there = {p.name for p in run_dir.iterdir() if not p.name.startswith(".")}
    if there.isdisjoint(PARTS) and not mllm_section.has_results(run_dir):
        raise InputError(
            f"{run_dir} is not a run folder: it has none of {', '.join(PARTS)}, and no results of lmms-eval"
        )


def _write(run_dir: Path, others: Sequence[Path], baseline: Path | None) -> Path:
    report = _Report(run_dir, others, baseline)
    mmvp, probes = report.part("MMVP-VLM", report.mmvp), report.part("probes", report.probes)
    retention = report.part("zero-shot", report.retention)
    llava, mllm = report.part("LLaVA", report.llava), report.part("lmms-eval", report.mllm)
    training, pictures = report.part("training", report.training), report.part("pictures", report.reconstructions)
    generation = report.part("generation quality", report.generation)
    data, recipe = report.part("skipped images", report.data), report.part("recipe", report.recipe)
    commands = report.part("commands", report.commands)  # before not_shown(), which tells what failed
    parts = [
        report.summary(),
        mmvp,
        retention,
        probes,
        mllm,
        llava,
        training,
        pictures,
        generation,
        data,
        recipe,
        report.not_shown(),
        commands,
    ]
    name = report.values.get("name") or run_dir.resolve().name
    body = "\n\n".join([f"# {text(name)}: report", *(part for part in parts if part)]) + "\n"
    try:
        for figure in ALL_FIGURES:  # of an earlier report, whose source is gone
            if figure not in report.drawn:
                (run_dir / "figures" / figure).unlink(missing_ok=True)
        write_text(run_dir / "report.md", body)
        shown = gallery(report.evaluation) if report.evaluation else ""
        write_text(run_dir / "report.html", page(f"{name}: report", body, run_dir, shown))
        facts = {**report.facts, "figures": [f"figures/{f}" for f in report.drawn], "not_shown": report.missing}
        write_json(run_dir / "report.json", {"format": 1, "name": name, **facts})
    except OSError as error:
        raise InputError(f"{run_dir} cannot be written: {error.strerror or error}") from None
    return run_dir / "report.md"


class _Report:
    """What is gathered on the way: facts for the JSON, figures drawn, and lines about what is missing."""

    def __init__(self, run_dir: Path, others: Sequence[Path] = (), baseline: Path | None = None):
        self.run_dir, self.others, self.baseline = run_dir, others, baseline
        self.evaluation: mllm_section.Evaluation | None = None
        self.facts: dict[str, Any] = {}
        self.missing: list[str] = []
        self.drawn: list[str] = []
        self.headlines: list[str] = []
        self.manifest = self.read(MANIFEST, dict) or {}
        recipe = self.manifest.get("recipe")
        self.values = flat(recipe) if isinstance(recipe, dict) else {}

    def read(self, name: str, kind: type) -> Any:
        """A JSON file of the run, or None and a line that says why not."""
        path = self.run_dir / name
        if not path.is_file():
            self.missing.append(f"{name}: not there")
            return None
        try:
            value = read_json(path)
            if not isinstance(value, kind):
                raise InputError(f"it holds no JSON {'object' if kind is dict else 'list'}")
        except InputError as error:
            self.missing.append(f"{name}: cannot be read ({str(error).removeprefix(f'{path} ')})")
            return None
        return value

    def part(self, title: str, make: Callable[[], str]) -> str:
        """A section, or a line about why it could not be made: one odd file must not cost the whole report."""
        try:
            return make()
        except (InputError, KeyError, TypeError, ValueError, AttributeError, OSError) as error:
            self.missing.append(f"{title}: its data are not as expected ({type(error).__name__}: {error})")
            return ""

    def figure(self, name: str, caption: str) -> str:
        self.drawn.append(name)
        return f"![{text(caption)}](figures/{name})"

    def path(self, figure: str) -> Path:
        return self.run_dir / "figures" / figure

    # --- sections -------------------------------------------------------------------------------------------

    def summary(self) -> str:
        seed = self.values.get("seed", self.manifest.get("seed"))
        lines = list(self.headlines) or ["Nothing has been measured yet."]
        if seed is not None:
            lines.append(f"One run, seed {text(seed)}: another seed gives another result.")
        return "\n".join(f"* {line}" for line in lines)

    def recipe(self) -> str:
        versions = self.manifest.get("versions")
        self.facts |= {"recipe": self.values or None, "versions": versions, "git": self.manifest.get("git")}
        if not self.values:
            return ""
        first = [f for f in FIRST_FIELDS if f in self.values]
        rest = [f for f in self.values if f not in first and f != "name"]
        parts = ["## Recipe", fields(self.values, first)]
        if rest:
            parts += [
                f"<details><summary>all other fields ({len(rest)})</summary>",
                fields(self.values, rest),
                "</details>",
            ]
        if isinstance(versions, dict):
            listed = ", ".join(f"{text(k)} {text(v)}" for k, v in versions.items())
            git = self.manifest.get("git")
            parts.append(f"Made with {listed}" + (f"; revision {code(git)}." if git else "."))
        return "\n\n".join(parts)

    def training(self) -> str:
        rows, histories = [], {}
        self.facts["stages"] = {}
        for stage in STAGES:
            result = self.read(f"stage{stage}/result.json", dict)
            history = figures.finite_history(self.read(f"stage{stage}/log_history.json", list) or [])
            learns = self.values.get(f"stage{stage}.trains")
            learns = ", ".join(map(str, learns)) if isinstance(learns, list) else learns or "?"
            if history:
                histories[f"Stage {stage}: {learns}"] = history
            if result is None:
                continue
            self.facts["stages"][str(stage)] = {k: v for k, v in result.items() if k != "skipped"}
            cells = [number(result.get(k)) for k in ("steps", "images_seen", "final_loss", "trainable_parameters")]
            rate = self.values.get(f"stage{stage}.learning_rate")
            rows.append([str(stage), text(learns), number(rate), *cells, duration(result.get("seconds"))])
        parts = []
        if rows:
            header = ["stage", "learns", "learning rate", "steps", "images", "last loss", "trained parameters", "time"]
            parts.append(table(header, rows))
        if histories:
            figures.loss_figure(histories, self.path("loss.png"))
            parts.append(self.figure("loss.png", "Loss of each stage over its steps, as logged and smoothed"))
        sampling = self.values.get("t_sampling")
        if sampling in ("logit_normal", "uniform"):
            scale, shift = float(self.values.get("t_scale", 1)), float(self.values.get("t_shift", 0))
            figures.t_density_figure(
                sampling, scale, shift, int(self.values.get("seed", 0)), self.path("t_density.png")
            )
            parts.append(self.figure("t_density.png", "Density of the training times t, and draws from it"))
        return "\n\n".join(["## Training", *parts]) if parts else ""

    def reconstructions(self) -> str:
        rows: list[tuple[str, list[Image.Image]]] = []
        for stage in STAGES:
            folder = self.run_dir / f"stage{stage}" / "samples"
            steps = sorted((int(p.stem.split("-")[1]), p) for p in folder.glob("step-*.png") if p.stem[5:].isdigit())
            if not steps:
                self.missing.append(f"stage{stage}/samples: no pictures")
                continue
            if not rows and (folder / "originals.png").is_file():
                rows.append(("original", _strip(folder / "originals.png")))
            if stage == 2 and len(steps) > 1 and len(rows) > 1:
                steps = [s for s in steps if s[0] > 0]  # its step 0 is stage 1's end
            chosen = _spread(steps, 3 if stage == 1 else GRID_ROWS - len(rows))
            rows += [(f"stage {stage}\nstep {step:,}", _strip(path)) for step, path in chosen]
        if not rows:
            return ""
        figures.reconstructions_figure(rows[:GRID_ROWS], self.path("reconstructions.png"))
        picture = self.figure("reconstructions.png", "Original images, and what is rebuilt from the condition")
        return (
            "## Reconstructions\n\nEach row is rebuilt from the backbone's condition alone by the rectified-flow ODE, "
            f"from the same noise every time: what the token says of an image, not how well one can draw.\n\n{picture}"
        )

    def generation(self) -> str:
        """Only where the verb `generation` was run."""
        path = self.run_dir / generation_section.RESULT
        if not path.is_file():
            return ""
        measured = read_json(path)
        self.facts["generation"] = measured
        generation_section.generation_figure(measured, self.path(generation_section.FIGURE))
        picture = self.figure(generation_section.FIGURE, "Generation quality and MMVP-VLM over the training")
        return f"{generation_section.section(measured)}\n\n{picture}"

    def mmvp(self) -> str:
        path = self.run_dir / "eval" / "mmvp_vlm.json"
        if not path.is_file():
            self.missing.append("eval/mmvp_vlm.json: not there; run mmvp-vlm with --output to measure before and after")
            return ""
        results = _before_and_after(load_results(path))
        comparisons = [compare(results[0], r) for r in results[1:]]
        towers = [{k: v for k, v in r.to_dict().items() if k != "pairs"} for r in results]
        benchmark = read_json(path)["benchmark"]
        self.facts["mmvp_vlm"] = {
            "benchmark": benchmark,
            "towers": towers,
            "comparisons": [c.to_dict() for c in comparisons],
        }
        figures.mmvp_figure(results, self.path("mmvp_vlm.png"))
        picture = self.figure("mmvp_vlm.png", "MMVP-VLM by pattern, with 95 % intervals")
        scores = ", ".join(f"{text(r.label)} {percent(r.average)}" for r in results)
        self.headlines.append(f"MMVP-VLM: {scores} of {results[0].average.n} pairs.")
        for r, c in zip(results[1:], comparisons, strict=True):
            self.headlines.append(f"{text(r.label)} against {text(results[0].label)}: {verdict(c)}")
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
            notes.append(f"The paper's figures are Table 1 of arXiv 2503.19480 ({rows}).")
        compared = [*results, *(r for run in self.others for r in self.measured_elsewhere(run))]
        write_text(self.run_dir / table1.CSV, table1.as_csv(compared))
        return "\n\n".join(["## MMVP-VLM", picture, mmvp_table(results), *notes, table1.markdown(compared)])

    def measured_elsewhere(self, run: Path) -> list[MmvpResult]:
        """Another run's towers, called by its name too."""
        path = run / "eval" / "mmvp_vlm.json"
        found = _before_and_after(load_results(path)) if path.is_file() else []
        return [dataclasses.replace(r, label=f"{run.resolve().name}: {r.label}") for r in found]

    def retention(self) -> str:
        parts, lines, facts = retention_section.section(self.run_dir)
        if "curve" in facts:
            self.drawn.append(retention_section.FIGURE)
        if facts:
            self.headlines += lines
            self.facts["zero_shot"] = facts
        return "\n\n".join(["## Retention", *parts]) if parts else ""

    def mllm(self) -> str:
        self.evaluation = mllm_section.evaluation([self.run_dir, *self.others], self.baseline)
        if self.evaluation is None:
            return ""
        written = mllm_section.section(self.evaluation, self.run_dir)
        self.drawn += [f for f in mllm_section.FIGURES if f"(figures/{f})" in written]
        self.headlines += mllm_section.headlines(self.evaluation)
        self.facts["table2"] = mllm_section.facts(self.evaluation, self.run_dir)
        return written

    def probes(self) -> str:
        path = "eval/probes.json"
        if not (self.run_dir / path).is_file():
            return ""  # only the toy world knows its details
        values = self.read(path, dict)
        if values is None:
            return ""
        details = [str(d) for d in values["details"]]
        towers = {name: values[name] for name in ("original", "enhanced") if name in values}
        figures.probes_figure(details, towers, self.path("probes.png"))
        self.facts["probes"] = values
        rows = []
        for detail in details:
            scores = [tower[detail] for tower in towers.values()]
            change = f"{100 * (scores[1]['accuracy'] - scores[0]['accuracy']):+.1f}" if len(scores) == 2 else ""
            cells = [
                f"{100 * s['accuracy']:.1f} [{100 * s['interval'][0]:.1f}, {100 * s['interval'][1]:.1f}]"
                for s in scores
            ]
            rows.append([text(detail), number(scores[0].get("n")), *cells, change])
        note = (
            "Linear probes on the frozen condition, accuracy in percent with 95 % intervals. Intervals that overlap do "
            "not show a difference, and of many details a few move by chance alone."
        )
        picture = self.figure("probes.png", "Linear-probe accuracy per detail")
        return "\n\n".join(["## Linear probes", picture, table(["detail", "n", *towers, "change"], rows), note])

    def llava(self) -> str:
        trained, facts = llava_section.trainings(self.run_dir)
        parts = [trained] if trained else []
        if (self.run_dir / llava_section.QUESTIONS).is_file():
            asked, lines, measured = llava_section.answers(self.run_dir)
            parts = [self.figure(llava_section.FIGURE, "Questions answered right, per detail"), *asked, *parts]
            self.headlines += lines
            self.facts["questions"] = measured
        if facts:
            self.facts["llava"] = facts
        return "\n\n".join(["## LLaVA", *parts]) if parts else ""

    def data(self) -> str:
        parts = []
        for stage in STAGES:
            path = self.run_dir / f"stage{stage}" / "result.json"
            report = read_json(path).get("skipped") if path.is_file() else None
            if not isinstance(report, dict):
                continue
            self.facts["stages"][str(stage)]["skipped"] = report
            read, skipped = int(report["read"]), int(report["skipped"])
            share = f" ({100 * skipped / read:.2f} %)" if read else ""
            line = f"Stage {stage}: {read:,} images read, {skipped:,} skipped{share}."
            if skipped:
                line += " Reasons: " + ", ".join(f"{text(r)} {n:,}" for r, n in report["by_reason"].items()) + "."
            parts.append(line)
            keys = [f"* {code(key)}: {text(reason)}" for key, reason in report["keys"][:KEYS_SHOWN]]
            if len(report["keys"]) > KEYS_SHOWN:
                keys.append(f"* … the others are in {code(f'stage{stage}/result.json')}")
            if keys:
                parts.append("\n".join(keys))
        return "\n\n".join(["## Skipped images", *parts]) if parts else ""

    def not_shown(self) -> str:
        lines = list(self.missing)
        if not retention_section.measured(self.run_dir):
            lines.append("zero-shot retention: not measured here; vision-only tuning can lower it (zero-shot, curve)")
        if not lines:
            return ""
        return "## Not shown\n\n" + "\n".join(f"* {text(line)}" for line in lines)

    def commands(self) -> str:
        lines = []
        command = self.manifest.get("command")
        if isinstance(command, list) and len(command) > 1:
            world = self.manifest.get("world_size", 1)
            start = ["llava-genhancer"]
            if isinstance(world, int) and world > 1:
                start = ["torchrun", f"--nproc_per_node={world}", "-m", "llava_genhancer"]
            lines.append(shlex.join([*start, *map(str, command[1:])]))
        measured = self.run_dir / "eval" / "mmvp_vlm.json"
        if measured.is_file():
            values = read_json(measured)
            towers = [str(t["tower"]) for t in values["towers"]]
            where = ["--data", str(values["benchmark"]["path"]), "--output", str(measured)]
            lines.append(shlex.join(["llava-genhancer", "mmvp-vlm", *towers, *where]))
        lines += llava_section.commands(self.run_dir)
        compared = ["--baseline", str(self.baseline)] if self.baseline else []
        lines.append(shlex.join(["llava-genhancer", "report", *map(str, (self.run_dir, *self.others)), *compared]))
        said = f"Recipes, versions and seeds: {links}." if (links := llava_section.manifests(self.run_dir)) else ""
        again = block([" ".join(line.split("\n")) for line in lines])
        return "\n\n".join(["## To repeat this", *([said] if said else []), again])


def _before_and_after(results: list[MmvpResult]) -> list[MmvpResult]:
    """An original tower and the one our recipe made of it are called so, whatever their folders are called."""
    if len(results) == 2 and results[1].recipe and not results[0].recipe:
        return [dataclasses.replace(r, label=name) for r, name in zip(results, ("original", "enhanced"), strict=True)]
    return results


def _strip(path: Path) -> list[Image.Image]:
    """The first square images of a horizontal strip."""
    with Image.open(path) as picture:
        strip = picture.convert("RGB")
    side = strip.height
    if strip.width % side:
        raise InputError(f"{path} is {strip.width} x {side} pixels, no row of squares")
    return [strip.crop((i * side, 0, (i + 1) * side, side)) for i in range(min(strip.width // side, GRID_COLUMNS))]


def _spread(items: list[Any], count: int) -> list[Any]:
    """At most ``count`` items, evenly spread, the last one always among them."""
    if len(items) <= count:
        return items
    if count <= 1:
        return items[-1:]
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]
