"""lmms-eval on one or more LLaVAs, and what it does not write down: command, versions, revisions of the data.

lmms-eval itself is called as a user would call it. It reports most errors and then exits with status 0, so that what
counts is whether the results are there.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_genhancer.errors import InputError
from llava_genhancer.evaluate.mllm.plugin import DATA_VARIABLE, INSTALL, MODEL, UPSTREAM_VARIABLE, environment
from llava_genhancer.evaluate.mllm.results import PROVENANCE, RESULTS
from llava_genhancer.evaluate.mllm.start import checkpoint_folder
from llava_genhancer.files import expand
from llava_genhancer.run import read_json, sha256, versions, write_json

GROUP = "genhancer"
MAX_UNANSWERED = 0.1  # share of a task's documents; beyond, the score is of another benchmark


def evaluate(
    checkpoints: Sequence[str],
    output_dir: str | Path,
    *,
    labels: Sequence[str] | None = None,
    tasks: str = GROUP,
    data: str | Path | None = None,
    batch_size: int = 1,
    processes: int | None = None,
    limit: int | None = None,
    model_args: str = "",
) -> None:
    """Ask each checkpoint every task, into ``output_dir/<label>``; one that was asked the same before is left out.

    Args:
        labels: a name for each (default: as they are listed, ``model-1`` and so on).
        tasks: lmms-eval's, comma-separated.
        data: folder with local copies of the data sets, ``<organisation>/<name>``; then nothing is downloaded.
        processes: to spread the questions over (default: one per GPU).
        limit: ask the first so many questions of each task.
        model_args: further arguments of our model, ``answer=generate`` for example.

    Raises:
        InputError: no such checkpoint or data, lmms-eval is not installed, it left no results, or more than a tenth of
            a task's documents have no answer (the results are kept).
    """
    output_dir = expand(output_dir)
    names = list(labels or (f"model-{i}" for i in range(1, len(checkpoints) + 1)))
    if len(names) != len(checkpoints) or len(set(names)) != len(names):
        raise InputError(f"--labels {' '.join(names)}: give one name for each of {len(checkpoints)} checkpoints")
    folders = [checkpoint_folder(checkpoint) for checkpoint in checkpoints]
    try:
        importlib.metadata.version("lmms_eval")
    except importlib.metadata.PackageNotFoundError:
        raise InputError(f"lmms-eval is not installed: {INSTALL} brings it") from None
    if data is not None and not Path(expand(data)).is_dir():
        raise InputError(f"--data {data} is not a folder")
    processes = processes or _gpus()
    lost: list[str] = []
    for label, folder in zip(names, folders, strict=True):
        output = Path(output_dir) / label
        given = ",".join([f"pretrained={folder}", *([model_args] if model_args else [])])
        if any(c in str(folder) for c in ",="):
            raise InputError(f"{folder}: lmms-eval takes no path with a comma or an equals sign")
        words = ["--model", MODEL, "--model_args", given, "--tasks", tasks, "--batch_size", str(batch_size)]
        words += ["--output_path", str(output), "--log_samples"]
        words += ["--limit", str(limit)] if limit else []
        command = ["-m", "lmms_eval", *words]
        if processes > 1:
            command = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", *command]
        if _done_before(output, command, folder, data):
            print(f"{label}: done before ({output})", flush=True)
        else:
            _call([sys.executable, *command], output, tasks, data)
            _write_provenance(output, command, data)
        lost += [f"{label}: {line}" for line in _unanswered(output)]
    if lost:
        raise InputError(
            f"more than {MAX_UNANSWERED:.0%} of the documents have no answer ({'; '.join(lost)}): the results are kept "
            "and count them as wrong, the report names the documents and the reasons"
        )


def _gpus() -> int:
    import torch

    return max(1, torch.cuda.device_count())


def _done_before(output: Path, command: Sequence[str], checkpoint: Path, data: str | Path | None) -> bool:
    """Returns whether the same command was finished on the same data and tasks with this checkpoint."""
    path = output / PROVENANCE
    if not path.is_file() or path.stat().st_mtime < (checkpoint / "config.json").stat().st_mtime:
        return False
    ran, now = read_json(path), _environment(data)
    same = all(ran.get("environment", {}).get(name) == now.get(name) for name in (DATA_VARIABLE, UPSTREAM_VARIABLE))
    return same and list(ran.get("command", ()))[1:] == list(command)


def _call(words: Sequence[str], output: Path, tasks: str, data: str | Path | None) -> None:
    """Run lmms-eval; its results must be new and hold the tasks."""
    import torch

    variables = {**os.environ, **_environment(data)}
    if not torch.cuda.is_available():  # DeepSpeed, which accelerate imports, else reports at length that it found none
        variables.setdefault("DS_ACCELERATOR", "cpu")
    before = set(output.rglob(f"*{RESULTS}"))
    status = subprocess.run(words, env=variables).returncode
    new = set(output.rglob(f"*{RESULTS}")) - before
    if status == -signal.SIGKILL:
        raise InputError("lmms-eval was killed, most often because memory ran out: lower --batch_size")
    if status or not new:
        raise InputError(
            f"lmms-eval ended with status {status} and {len(new)} results of {tasks}: the lines above say why. Without "
            "a network --data DIR names local copies of the data; `lmms-eval --tasks list` lists the tasks"
        )
    results = read_json(max(new))
    known = {*results["results"], *results.get("group_subtasks", ())}
    if missing := [task for task in tasks.split(",") if task not in known]:
        raise InputError(f"lmms-eval has no results of {', '.join(missing)} in {max(new)}: the lines above say why")


def _unanswered(output: Path) -> list[str]:
    """Our tasks in the newest results of which the model left too much unanswered."""
    found = read_json(max(output.rglob(f"*{RESULTS}"), key=lambda path: path.name))
    lines = []
    for task, metrics in found["results"].items():
        lost = next((value for name, value in metrics.items() if name.endswith("_unanswered,none")), 0)
        if lost and lost > MAX_UNANSWERED * (total := found["n-samples"][task]["effective"]):
            lines.append(f"{task} {lost} of {total}")
    return lines


def _environment(data: str | Path | None) -> dict[str, str]:
    """The variables that lmms-eval is called with and that matter."""
    local = {}
    if data is not None:
        local = {
            DATA_VARIABLE: str(Path(expand(data)).resolve()),
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
        }
    return environment() | local


def _write_provenance(output: Path, command: Sequence[str], data: str | Path | None) -> None:
    newest = max(output.rglob(f"*{RESULTS}"), key=lambda path: path.name)
    packages = {name: importlib.metadata.version(name) for name in ("lmms_eval", "datasets")}
    facts: dict[str, Any] = {
        "format": 1,
        "command": ["python", *command],
        "folder": os.getcwd(),
        "environment": _environment(data),
        "results": [newest.name],
        "versions": versions() | packages,
        "data": revisions(read_json(newest)["configs"]),
    }
    write_json(output / PROVENANCE, facts)


def revisions(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Task to its data set's revision: SHA-256 over a local copy's files, or the commit that the hub's cache holds."""
    found: dict[str, str] = {}
    known: dict[str, str | None] = {}
    for task, config in configs.items():
        name = str(config.get("dataset_path"))
        if name not in known:
            known[name] = _digest(Path(name)) if Path(name).is_dir() else _commit(name)
        if revision := known[name]:
            found[task] = revision
    return found


def _digest(folder: Path) -> str:
    files = sorted(p for p in folder.rglob("*.parquet") if p.is_file())
    listed = "".join(f"{sha256(p)}  {p.relative_to(folder).as_posix()}\n" for p in files)
    return f"sha256:{hashlib.sha256(listed.encode()).hexdigest()}"


def _commit(name: str) -> str | None:
    """What "main" was when it was downloaded last."""
    from huggingface_hub.constants import HF_HUB_CACHE

    with contextlib.suppress(OSError):
        return (Path(HF_HUB_CACHE) / f"datasets--{name.replace('/', '--')}" / "refs" / "main").read_text().strip()
    return None
