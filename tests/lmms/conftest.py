"""The real lmms-eval command in this process, offline, on local copies of the data sets."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("lmms_eval") is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import hub

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
