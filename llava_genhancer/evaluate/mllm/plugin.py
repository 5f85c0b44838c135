"""lmms-eval finds our model and our tasks by itself: what its entry point group ``lmms_eval.models`` calls.

lmms-eval has plug-ins for models only, so the tasks of ``eval/`` are merged into its TaskManager's index, as soon as
``lmms_eval.tasks`` has been imported (nothing heavy is imported for those who do not evaluate). Names that lmms-eval
has too are ours only where its task is defective, as ``tests/lmms/test_upstream.py`` shows; its own stays reachable as
``upstream_<name>``. Nothing here may end somebody else's evaluation: what does not fit is said on stderr, and
lmms-eval goes on as if we were not installed.

Environment:
    LLAVA_GENHANCER_UPSTREAM_TASKS: ``1`` leaves lmms-eval its names; ours are then ``genhancer_<name>``.
    LLAVA_GENHANCER_DATA: a folder with local copies of the data sets, ``<organisation>/<name>`` as on the hub.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Mapping
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from llava_genhancer.errors import InputError, reason
from llava_genhancer.evaluate.mllm.benchmarks.items import count, unanswered_metric, with_unanswered
from llava_genhancer.evaluate.mllm.local_data import CACHE_VARIABLE, cache_folder
from llava_genhancer.evaluate.mllm.options import OURS, UPSTREAM
from llava_genhancer.evaluate.mllm.start import RUN_VARIABLE
from llava_genhancer.files import expand
from llava_genhancer.resources import resource_dir

MODEL = "llava_genhancer"
INSTALL = "pip install -e '.[eval]' in a clone of llava_genhancer"
CLASS_PATH = "llava_genhancer.evaluate.mllm.model.LlavaGenhancer"
DEFAULT_MODEL = "hf"  # what `lmms-eval` without --model asks for
TASKS = "lmms_eval.tasks"
UPSTREAM_VARIABLE = "LLAVA_GENHANCER_UPSTREAM_TASKS"
DATA_VARIABLE = "LLAVA_GENHANCER_DATA"
VARIABLES = (
    DATA_VARIABLE, UPSTREAM_VARIABLE, RUN_VARIABLE, "HF_ENDPOINT", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE",
)  # fmt: skip
# Names of lmms-eval's that are ours, and why.
TAKEN_OVER = {
    "mmvp": 'reads "Camera is B" as A, and needs a hub login',
    "naturalbench": "stops with --limit or several processes, and never reports plain accuracy",
    "pope": "counts \"Yes.\" as wrong, and gives the truth's yes ratio for the answers'",
    "scienceqa_img": 'counts "(B)" and "The answer is B." as wrong',
}

Index = dict[str, dict[str, Any]]


def manifests() -> list[Any]:
    """The entry point: our model for lmms-eval's registry, and the tasks on their way."""
    from lmms_eval.models.registry_v2 import ModelManifest

    _check_version()
    if TASKS in sys.modules:
        merge_tasks(sys.modules[TASKS])
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())
    return [ModelManifest(MODEL, simple_class_path=CLASS_PATH, aliases=_aliases(sys.modules["lmms_eval.models"]))]


def _aliases(models: ModuleType) -> tuple[str, ...]:
    """lmms-eval's default model name, where lmms-eval itself has no such model (or no longer says which it has)."""
    try:
        tables = (models.AVAILABLE_SIMPLE_MODELS, models.AVAILABLE_CHAT_TEMPLATE_MODELS)
        names = {name for table in tables for name in table} | {a for own in models.MODEL_ALIASES.values() for a in own}
    except AttributeError as error:
        _say(f"lmms-eval's list of models is not where it was ({error}): --model {MODEL} must be given")
        return ()
    return () if DEFAULT_MODEL in names else (DEFAULT_MODEL,)


class _AfterImport:
    """Stands in front of Python's finders until lmms_eval.tasks is imported, then merges our tasks into it."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name != TASKS:
            return None
        sys.meta_path.remove(self)  # type: ignore[arg-type]
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                merge_tasks(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def merge_tasks(tasks: ModuleType) -> None:
    """Let ``tasks.TaskManager`` list and load our tasks too; a second call changes nothing."""
    try:
        manager = tasks.TaskManager
        upstream_index, upstream_config = manager.initialize_tasks, manager._get_config
        if upstream_index.__module__ == __name__:
            return
        inspect.signature(upstream_index).bind(None, include_path=None, include_defaults=True)
        inspect.signature(upstream_config).bind(None, "mmvp")
        folder = resource_dir("eval")
    except (AttributeError, TypeError, InputError) as error:
        return _say_lost(error)
    builtin = Path(str(tasks.__file__)).parent
    if data := os.environ.get(DATA_VARIABLE):
        os.environ.setdefault(CACHE_VARIABLE, str(cache_folder(Path(expand(data)))))

    def initialize_tasks(self: Any, *args: Any, **kwargs: Any) -> Index:
        index: Index = upstream_index(self, *args, **kwargs)
        asked = inspect.signature(upstream_index).bind(self, *args, **kwargs).arguments
        if not asked.get("include_defaults", True):
            return index
        try:
            return merged(index, self._get_task_and_group(str(folder)), builtin, keep=_keeps_names())
        except Exception as error:  # whatever changed there, the others' tasks must stay usable
            _say_lost(error)
            return index

    def get_config(self: Any, name: str) -> dict[str, Any]:
        config = upstream_config(self, name)
        if isinstance(config.get("task"), str):
            config["task"] = name  # a task listed under its other name also answers to it
        path = self.task_index[name]["yaml_path"]
        return _ours(name, config, self.task_index) if _inside(path, folder) else config

    manager.initialize_tasks, manager._get_config = initialize_tasks, get_config


def merged(index: Index, ours: Index, builtin: Path, *, keep: bool) -> Index:
    """lmms-eval's index with our tasks.

    Args:
        index: name to entry, whose ``yaml_path`` says where a task is from.
        ours: the same of our folder.
        builtin: lmms-eval's own folder of tasks; a user's own task (``--include_path``) keeps its name in any case.
        keep: whether lmms-eval keeps all its names.
    """
    result = dict(index)
    for name, entry in ours.items():
        known = index.get(name)
        if known is None or known["yaml_path"] == entry["yaml_path"]:
            result[name] = entry
        elif name in TAKEN_OVER and not keep and _inside(known["yaml_path"], builtin):
            result[name], result[UPSTREAM + name] = entry, known
        else:
            result[OURS + name] = entry
    return result


def _ours(name: str, config: dict[str, Any], index: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of one of our tasks, or of our group, in this index and this environment."""
    if isinstance(config.get("task"), list):
        return {**config, "task": [OURS + task if OURS + task in index else task for task in config["task"]]}
    config["process_results"] = with_unanswered(config["process_results"])
    (unparsed,) = (entry["metric"] for entry in config["metric_list"] if entry["metric"].endswith("_unparsed"))
    counted = {"metric": unanswered_metric(unparsed), "aggregation": count, "higher_is_better": False}
    config["metric_list"] = [*config["metric_list"], counted]
    if UPSTREAM + name in index:
        _say(
            f"task {name} is ours ({config['metadata']['version']}), since lmms-eval's {TAKEN_OVER[name]}; "
            f"its own is {UPSTREAM}{name}, and {UPSTREAM_VARIABLE}=1 gives it back its name"
        )
    if data := os.environ.get(DATA_VARIABLE):
        local = Path(expand(data)) / config["dataset_path"]
        if not local.is_dir():
            _say(f"{DATA_VARIABLE}={data} holds no {config['dataset_path']}: put a copy there, or unset the variable")
            raise SystemExit(2)
        config["dataset_path"] = str(local.resolve())
    # lmms-eval's results file names the commit of the folder that lmms-eval was started in, and no environment.
    known = {"lmms_eval": importlib.metadata.version("lmms_eval"), "run": this_run()}
    config["metadata"] = {**config["metadata"], **known}
    return config


def this_run() -> dict[str, Any]:
    """Returns what repeats this process: its command, the folder it was started in, and variables that matter."""
    world = int(os.environ.get("WORLD_SIZE") or 1)
    start = ["torchrun", f"--nproc_per_node={world}", "-m", "lmms_eval"] if world > 1 else ["lmms-eval"]
    words = [re.sub(r"((?:token|key|password)=)[^,]+", r"\1...", word) for word in sys.argv[1:]]
    return {"command": [*start, *words], "folder": os.getcwd(), "environment": environment()}


def environment() -> dict[str, str]:
    """Returns the variables that are set and that change which data, tasks or model an evaluation takes."""
    return {name: os.environ[name] for name in VARIABLES if os.environ.get(name)}


def _keeps_names() -> bool:
    return os.environ.get(UPSTREAM_VARIABLE, "") not in ("", "0")


def _inside(path: object, folder: Path) -> bool:
    return isinstance(path, str) and Path(path).is_relative_to(folder)


def _check_version() -> None:
    """Say so where lmms-eval's version is outside what pyproject.toml pins."""
    from packaging.requirements import Requirement

    found = importlib.metadata.version("lmms_eval")
    for line in importlib.metadata.requires("llava-genhancer") or ():
        wanted = Requirement(line)
        if wanted.name == "lmms-eval" and not wanted.specifier.contains(found, prereleases=True):
            _say(f"made for lmms-eval{wanted.specifier}, found {found}: {INSTALL} brings a version that fits")
            return


def _say_lost(error: Exception) -> None:
    _say(
        f"OUR TASKS ARE MISSING: lmms-eval {importlib.metadata.version('lmms_eval')} is not as expected "
        f"({type(error).__name__}: {reason(error)}). {', '.join(TAKEN_OVER)} now mean lmms-eval's own tasks; "
        f"{INSTALL} brings a version that fits"
    )


def _say(text: str) -> None:
    """One line on stderr, from the first process only; lmms-eval's own log may be filtered or coloured."""
    if os.environ.get("RANK", "0") == "0":
        print(f"llava_genhancer: {text}", file=sys.stderr, flush=True)
