"""What lmms-eval measured in several runs, and how their models differ from one of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llava_genhancer.errors import InputError
from llava_genhancer.evaluate.mllm.results import FOLDER, RESULTS, Change, Model, compare, read_models


@dataclass
class Evaluation:
    """The models of all runs, one of them the baseline, and the changes of the others by label and column."""

    models: list[Model]
    baseline: Model | None
    changes: dict[str, dict[str, Change]] = field(default_factory=dict)

    @property
    def others(self) -> list[Model]:
        return [m for m in self.models if m is not self.baseline]


def has_results(folder: Path) -> bool:
    """Whether lmms-eval wrote into this folder, or into the folder of a model below it."""
    return any(folder.glob(f"*{RESULTS}")) or any(folder.glob(f"*/*{RESULTS}"))


def evaluation(run_dirs: Sequence[Path], baseline: Path | None = None) -> Evaluation | None:
    """What lmms-eval measured in runs, or in folders of its own output; None if that is nothing.

    Args:
        baseline: the run whose model the others are compared with; without it the first run's "original".

    Raises:
        InputError: the baseline has no results, or a results file is malformed.
    """
    listed = list(run_dirs)
    if baseline is not None and baseline.resolve() not in [r.resolve() for r in listed]:
        listed.append(baseline)
    of_run = {run: _models(run) for run in listed}
    if baseline is not None:
        chosen = next(of_run[r] for r in listed if r.resolve() == baseline.resolve())
        if not chosen:
            raise InputError(f"--baseline {baseline} holds no results of lmms-eval, neither there nor in {FOLDER}")
        # A run's own model is the one with the tower that it enhanced.
        base = next((m for m in chosen if m.label == "enhanced"), chosen[-1])
    else:
        base = next((m for m in of_run[listed[0]] if m.label == "original"), None)  # type: ignore[assignment]
    models = [m for own in of_run.values() for m in own]
    if not models:
        return None
    if len(listed) > 1:
        names = [run.resolve().name for run in listed]
        for run, own in of_run.items():
            name = run.resolve().name
            for model in own:
                model.label = f"{name if names.count(name) == 1 else run}: {model.label}"
    found = Evaluation(models, base)
    for model in found.others if base is not None else ():
        pairs = ((name, base.columns.get(name), measured) for name, measured in model.columns.items())
        compared = {name: compare(first, measured) for name, first, measured in pairs if first is not None}
        found.changes[model.label] = {name: change for name, change in compared.items() if change is not None}
    return found


def _models(run: Path) -> list[Model]:
    folder = run / FOLDER
    return read_models(folder if folder.is_dir() else run) if folder.is_dir() or has_results(run) else []
