"""The real lmms-eval command in this process, offline, on local copies of the data sets."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import hub
import pytest

from llava_genhancer.resources import resource_dir

pytest.importorskip("lmms_eval")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hub.write_hub(tmp_path_factory.mktemp("hub"))


@pytest.fixture(scope="session")
def lmms_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hf_home")))
        patch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        import scripted
        from lmms_eval.models import MODEL_REGISTRY_V2
        from lmms_eval.tasks import TaskManager

        read, known = TaskManager._get_task_and_group, {}

        def read_once(self: Any, folder: str) -> dict[str, Any]:
            """Some thousand YAML files, which do not change in between."""
            if folder not in known:
                known[folder] = read(self, folder)
            return dict(known[folder])

        patch.setattr(TaskManager, "_get_task_and_group", read_once)

        for manifest in scripted.manifests():
            MODEL_REGISTRY_V2.register_manifest(manifest)
        yield


@pytest.fixture
def lmms(
    lmms_environment: None, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., dict[str, Any]]:
    """``lmms(tasks, replies or a dummy's answer, *more words)``: what the results file holds."""
    from lmms_eval.cli import dispatch

    monkeypatch.chdir(data)  # a data set's name is a path there, for upstream's tasks too

    def run(
        tasks: str,
        replies: dict[str, Sequence[str]] | str,
        *words: str,
        chat: bool = False,
        output: Path = tmp_path / "output",
    ) -> dict[str, Any]:
        before = set(output.rglob("*_results.json"))
        if isinstance(replies, str):
            model = ["dummy", "--model_args", f"response={replies}"]
        else:
            (tmp_path / "replies.json").write_text(json.dumps(replies))
            name = "scripted_chat" if chat else "scripted"
            model = [name, "--model_args", f"replies={tmp_path / 'replies.json'}"]
        argv = ["lmms-eval", "--model", *model, "--tasks", tasks, "--output_path", str(output), "--verbosity", "DEBUG"]
        monkeypatch.setattr(sys, "argv", [*argv, "--log_samples", *words])
        dispatch.main()
        (path,) = set(output.rglob("*_results.json")) - before
        return {**json.loads(path.read_text()), "path": path}

    return run


def values(results: dict[str, Any], task: str) -> dict[str, Any]:
    """Metric to value, without lmms-eval's standard errors and filters."""
    found = {name.split(",")[0]: value for name, value in results["results"][task].items() if ",none" in name}
    return {name: value for name, value in found.items() if "_stderr" not in name}


def config_of(task: str) -> dict[str, Any]:
    """A task's YAML as lmms-eval reads it, functions and all."""
    from lmms_eval.utils import load_yaml_config

    return load_yaml_config(str(resource_dir("eval") / f"{task}.yaml"))


def score(task: str, docs: Sequence[dict[str, Any]], replies: Sequence[str]) -> dict[str, Any]:
    """What lmms-eval makes of replies: ``process_results`` for each document, then each metric over its items."""
    config = config_of(task)
    items = defaultdict(list)
    for doc, reply in zip(docs, replies, strict=True):
        for metric, item in config["process_results"](doc, [reply]).items():
            items[metric].append(item)
    metrics = {entry["metric"]: entry["aggregation"] for entry in config["metric_list"]}
    assert items.keys() <= metrics.keys()
    return {name: metrics[name](own) for name, own in items.items()}
