"""Found without a flag: the entry point, the merging of the tasks, whose name is whose, what is said when it fails."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomllib
from packaging.requirements import Requirement
from scoring import TASKS, score, values
from scoring import replies as random_replies

from llava_genhancer.errors import InputError
from llava_genhancer.evaluate.mllm import plugin as lmms_plugin
from llava_genhancer.evaluate.mllm.options import OPTIONS
from llava_genhancer.evaluate.mllm.start import RUN_VARIABLE, checkpoint_folder
from llava_genhancer.resources import resource_dir

Lmms = Callable[..., dict[str, Any]]
TAKEN = set(lmms_plugin.TAKEN_OVER)


def python(*words: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("LLAVA_GENHANCER", "RANK", "WORLD_SIZE"))}
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=cwd, env={**kept, **environment}, capture_output=True, text=True)


@pytest.fixture
def manager(lmms_environment: None) -> type:
    from lmms_eval.tasks import TaskManager

    return TaskManager


def names(manager: type, **words: Any) -> dict[str, str]:
    """Name to the YAML it is from."""
    return {name: str(entry["yaml_path"]) for name, entry in manager("ERROR", **words).task_index.items()}


def test_the_entry_point_names_the_plugin() -> None:
    (found,) = (e for e in importlib.metadata.entry_points(group="lmms_eval.models") if e.name == "llava_genhancer")
    assert found.load() is lmms_plugin.manifests


def test_the_supported_lmms_eval_is_the_installed_one() -> None:
    wanted = [Requirement(line) for line in importlib.metadata.requires("llava-genhancer") or ()]
    (pin,) = (w for w in wanted if w.name == "lmms-eval")
    assert pin.specifier.contains(importlib.metadata.version("lmms_eval"))
    assert not pin.specifier.contains("0.8.0")
    assert not pin.specifier.contains("0.7.2")


def test_another_version_is_said_and_not_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lmms_plugin.importlib.metadata, "version", lambda name: "0.9.1")
    lmms_plugin._check_version()
    (line,) = capsys.readouterr().err.splitlines()
    assert "found 0.9.1" in line
    assert "<0.8" in line


def test_tasks_are_merged_once(manager: type) -> None:
    import lmms_eval.tasks

    ours = str(resource_dir("eval"))
    first = manager.initialize_tasks
    assert first.__module__ == lmms_plugin.__name__
    lmms_plugin.merge_tasks(lmms_eval.tasks)
    lmms_plugin.manifests()
    assert manager.initialize_tasks is first
    found = names(manager)
    assert {name for name, path in found.items() if path.startswith(ours)} == {*OPTIONS, "genhancer"}
    assert {name for name in found if name.startswith("upstream_")} == {f"upstream_{name}" for name in TAKEN}
    assert not any(name.startswith("genhancer_") for name in found)


def test_names_given_back(lmms: Lmms, manager: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the variable, lmms-eval's names are its own, and our group still runs our tasks."""
    monkeypatch.setenv("LLAVA_GENHANCER_UPSTREAM_TASKS", "1")
    ours, found = str(resource_dir("eval")), names(manager)
    assert not any(found[name].startswith(ours) for name in TAKEN)
    assert all(found[f"genhancer_{name}"].startswith(ours) for name in TAKEN)
    assert not any(name.startswith("upstream_") for name in found)
    results = lmms("mmvp,genhancer", "Camera is B")
    assert results["results"]["mmvp"]["mmvp_accuracy,none"] == 0.5  # all A, says lmms-eval
    assert results["results"]["genhancer_mmvp"]["mmvp_accuracy,none"] == 0.5
    assert results["versions"]["genhancer_mmvp"] == "genhancer-1"
    assert results["versions"]["mmvp"] != "genhancer-1"
    assert set(results["group_subtasks"]["genhancer"]) == (set(OPTIONS) - TAKEN) | {f"genhancer_{n}" for n in TAKEN}


def test_a_users_own_task_keeps_its_name(manager: type, tmp_path: Path) -> None:
    """``--include_path`` with a task of the name of one of ours."""
    (tmp_path / "mine.yaml").write_text("task: cvbench\ndataset_path: me/cvbench\noutput_type: generate_until\n")
    found = names(manager, include_path=str(tmp_path))
    assert found["cvbench"] == str(tmp_path / "mine.yaml")
    assert found["genhancer_cvbench"].startswith(str(resource_dir("eval")))
    again = names(manager, include_path=str(resource_dir("eval")))  # our own folder, for those who knew it before
    assert again.keys() == names(manager).keys()
    assert set(manager("ERROR", include_defaults=False).task_index) == set()


def test_hf_is_ours_only_where_lmms_eval_has_none() -> None:
    def aliases(**tables: Any) -> tuple[str, ...]:
        models = {
            "AVAILABLE_SIMPLE_MODELS": {"dummy": "Dummy"},
            "AVAILABLE_CHAT_TEMPLATE_MODELS": {},
            "MODEL_ALIASES": {},
        }
        return lmms_plugin._aliases(types.SimpleNamespace(**{**models, **tables}))  # type: ignore[arg-type]

    assert aliases() == ("hf",)
    assert aliases(AVAILABLE_CHAT_TEMPLATE_MODELS={"hf": "Hf"}) == ()
    assert aliases(MODEL_ALIASES={"huggingface": ("hf",)}) == ()
    assert lmms_plugin._aliases(types.ModuleType("models")) == ()  # changed: better none than a wrong one


def test_the_registry_knows_our_model(lmms_environment: None) -> None:
    from lmms_eval.models import MODEL_REGISTRY_V2

    for name in ("llava_genhancer", "hf"):
        resolved = MODEL_REGISTRY_V2.resolve(name)
        assert (resolved.model_type, resolved.class_path) == ("simple", lmms_plugin.CLASS_PATH)


class Manager:
    """As lmms-eval's, with what a test takes away."""

    def __init__(self) -> None:
        self.task_index = self.initialize_tasks(include_path=None, include_defaults=True)

    def initialize_tasks(self, include_path: Any = None, include_defaults: bool = True) -> dict[str, Any]:
        return {"mmvp": {"type": "task", "yaml_path": "/lmms_eval/tasks/mmvp/mmvp.yaml"}}

    def _get_config(self, name: str) -> dict[str, Any]:
        return {"task": "mmvp"}

    def _get_task_and_group(self, folder: str) -> dict[str, Any]:
        return {"mmvp": {"type": "task", "yaml_path": f"{folder}/mmvp.yaml"}}


def changed(**members: Any) -> types.ModuleType:
    module = types.ModuleType("lmms_eval.tasks")
    module.__file__ = "/lmms_eval/tasks/__init__.py"
    module.TaskManager = type("TaskManager", (Manager,), members)  # type: ignore[attr-defined]
    return module


def test_as_it_is_nothing_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    module = changed()
    lmms_plugin.merge_tasks(module)
    assert set(module.TaskManager().task_index) == {"mmvp", "upstream_mmvp"}
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "members",
    [
        {"initialize_tasks": None},
        {"initialize_tasks": lambda self, folders: {}},
        {"_get_config": lambda self: {}},
        {"_get_task_and_group": None},
        {"_get_task_and_group": lambda self, folder, depth: {}},
        {"_get_task_and_group": lambda self, folder: {"mmvp": "mmvp.yaml"}},
    ],
    ids=["no index", "other arguments", "other config", "no reader", "other reader", "other entries"],
)
def test_a_changed_inside_is_loud_and_harms_nobody(members: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """lmms-eval's own tasks stay usable; one line names the version, the change and the tasks that are not ours."""
    module = changed(**members)
    lmms_plugin.merge_tasks(module)
    if members.get("initialize_tasks", True) is True:
        assert set(module.TaskManager().task_index) == {"mmvp"}
    (line,) = capsys.readouterr().err.splitlines()
    assert "OUR TASKS ARE MISSING" in line
    assert importlib.metadata.version("lmms_eval") in line
    assert "mmvp, naturalbench, pope, scienceqa_img" in line


def test_a_missing_folder_is_loud(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def gone(name: str) -> Path:
        raise InputError(f"{name}/ is not there")

    monkeypatch.setattr(lmms_plugin, "resource_dir", gone)
    lmms_plugin.merge_tasks(changed())
    assert "OUR TASKS ARE MISSING" in capsys.readouterr().err


def test_checkpoint_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint, a finetuning or a run is named; ``pretrained=`` goes before the variable."""
    monkeypatch.delenv(RUN_VARIABLE, raising=False)
    with pytest.raises(InputError, match="no model was named"):
        checkpoint_folder(None)
    hf = tmp_path / "run" / "llava-finetune" / "hf"
    hf.mkdir(parents=True)
    (hf / "config.json").write_text("{}")
    for named in (hf, hf.parent, hf.parent.parent):
        assert checkpoint_folder(str(named)).resolve() == hf
    monkeypatch.setenv(RUN_VARIABLE, str(tmp_path / "run"))
    assert checkpoint_folder(None).resolve() == hf
    with pytest.raises(InputError, match=r"pretrained=.*holds no LLaVA"):
        checkpoint_folder(str(tmp_path))
    monkeypatch.setenv(RUN_VARIABLE, str(tmp_path))
    with pytest.raises(InputError, match=f"{RUN_VARIABLE}=.*holds no LLaVA"):
        checkpoint_folder("")


def test_the_bare_command_ends_with_one_line(
    lmms_environment: None, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No --model: lmms-eval asks for ``hf``, which is our class; without a run it says so and the status is 2."""
    from lmms_eval.cli import dispatch

    monkeypatch.delenv(RUN_VARIABLE, raising=False)
    monkeypatch.chdir(data)
    monkeypatch.setattr(sys, "argv", ["lmms-eval", "--tasks", "mmvp,cvbench"])
    with pytest.raises(SystemExit) as stopped:
        dispatch.main()
    assert stopped.value.code == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert [line for line in said if "no model was named" in line] == said[-1:]
    assert "Traceback" not in "".join(said)


def test_nothing_heavy_for_those_who_do_not_evaluate(tmp_path: Path) -> None:
    """``lmms-eval models`` reads the registry only; the tasks are merged once they are imported."""
    code = (
        "import sys, lmms_eval.models as m; assert 'llava_genhancer' in m.list_available_models()\n"
        "heavy = {'torch', 'transformers', 'datasets', 'lmms_eval.tasks'} & set(sys.modules); assert not heavy, heavy\n"
        "from lmms_eval.tasks import TaskManager; print(TaskManager.initialize_tasks.__module__)"
    )
    done = python("-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "llava_genhancer.evaluate.mllm.plugin"


@pytest.mark.launch
def test_two_ranks_of_the_real_command(data: Path, tmp_path: Path, lmms_environment: None) -> None:
    """torchrun, with another package's plug-in: pairs lie across ranks, and the numbers are those of one."""
    plugin = tmp_path / "site" / "scripted-1.dist-info"
    plugin.mkdir(parents=True)
    (plugin / "METADATA").write_text("Metadata-Version: 2.1\nName: scripted\nVersion: 1\n")
    (plugin / "entry_points.txt").write_text("[lmms_eval.models]\nscripted = scripted:manifests\n")
    replies = {task: random_replies(TASKS[task], 1) for task in OPTIONS}
    (tmp_path / "replies.json").write_text(json.dumps(replies))
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "lmms_eval"]
    words += ["--model", "scripted", "--model_args", f"replies={tmp_path / 'replies.json'}", "--tasks", "genhancer"]
    words += ["--output_path", str(tmp_path / "out"), "--log_samples", "--verbosity", "DEBUG"]
    path = os.pathsep.join([str(plugin.parent), str(Path(__file__).parent)])
    done = python(*words, cwd=data, OMP_NUM_THREADS="1", PYTHONPATH=path)
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = (tmp_path / "out").rglob("*_results.json")
    found = json.loads(results.read_text())
    for task in OPTIONS:
        assert values(found, task) == pytest.approx(score(task, TASKS[task], replies[task]))
    assert done.stderr.count("task mmvp is ours") == 1


def test_the_eval_extra_has_what_lmms_evals_models_import() -> None:
    """lmms-eval asks for no decord, which README's models import at their top; any other import must be there."""
    import lmms_eval

    root = Path(__file__).parents[2]
    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    pins = (root / "constraints.txt").read_text().splitlines()
    provided = {"decord": "decord2"}  # module to package
    imported = set()
    for name in ("llava_hf", "qwen2_5_vl", "qwen2_vl", "qwen3_vl", "llava_onevision"):
        source = Path(str(lmms_eval.__file__)).parent / "models" / "simple" / f"{name}.py"
        for node in ast.parse(source.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) and not node.level else []
            imported |= {n.split(".")[0] for n in names}
    for module in imported:
        if package := provided.get(module):
            assert any(Requirement(line).name == package for line in extras["eval"])
            assert any(line.startswith(f"{package}==") for line in pins)
        else:
            assert importlib.util.find_spec(module) is not None, module
    assert "filelock._api" in Path(str(lmms_eval.__file__)).with_name("evaluator.py").read_text()
    assert importlib.util.find_spec("filelock._api") is not None, "an evaluation would end with status 0 and no results"
    assert "filelock<4.3" in extras["eval"]
    assert set(provided) <= imported, "if this fails, lmms-eval has dropped it: so may the extra"
