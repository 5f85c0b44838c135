"""The tasks as the real lmms-eval command runs them, for models of both kinds."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hub
import pytest
import scripted
import yaml
from scoring import TASKS, config_of, score, values

from llava_genhancer.evaluate.mllm.options import OPTIONS, options_of
from llava_genhancer.resources import resource_dir

Lmms = Callable[..., dict[str, Any]]


def right(task: str) -> list[str]:
    """The right reply to each document."""
    target = config_of(task)["doc_to_target"]
    return [target(doc) for doc in TASKS[task]]


def test_names() -> None:
    """One file per task; the group and the table of options name the same ones."""
    files = {path.stem for path in resource_dir("eval").glob("*.yaml")}
    assert files == {*OPTIONS, "genhancer"}
    assert set(config_of("genhancer")["task"]) == set(OPTIONS) == set(TASKS)
    assert all(config_of(task)["task"] == task for task in OPTIONS)


@pytest.mark.parametrize("task", OPTIONS)
def test_metrics_are_those_listed(task: str) -> None:
    config = config_of(task)
    counted = {metric for doc in TASKS[task] for metric in config["process_results"](doc, ["?"])}
    listed = [entry["metric"] for entry in config["metric_list"]]
    assert set(listed) == counted
    assert len(set(listed)) == len(listed)
    assert any(name.endswith("_unparsed") for name in listed)


@pytest.mark.parametrize("task", OPTIONS)
def test_any_backend_can_run_it(task: str) -> None:
    """Generated, without a login, and with nothing in the generation's settings that a backend might not know."""
    config = config_of(task)
    assert config["output_type"] == "generate_until"
    assert "dataset_kwargs" not in config
    assert set(config["generation_kwargs"]) == {"max_new_tokens", "temperature", "do_sample"}
    loader = type("Loader", (yaml.SafeLoader,), {})
    loader.add_constructor("!function", lambda _, node: node.value)  # type: ignore[attr-defined]
    text = (resource_dir("eval") / f"{task}.yaml").read_text()
    assert "include" not in yaml.load(text, loader)  # lmms-eval's own listing of tasks stumbles over it


@pytest.mark.parametrize("task", OPTIONS)
def test_options_are_read_as_themselves(task: str) -> None:
    """Of a document's options exactly one is right, and each is parsed."""
    for doc in TASKS[task]:
        offered = options_of(task, doc)
        assert offered is not None
        assert len(set(offered)) == len(offered) >= 2
        scores = [score(task, [doc], [option]) for option in offered]
        rights = [next(v for n, v in s.items() if n.endswith(("accuracy", "ACC", "aAcc", "overall"))) for s in scores]
        if task == "cvbench":
            rights = [next(v for n, v in s.items() if f"{n}_n" in s) for s in scores]
        assert sum(rights) == 1
        assert not any(v for s in scores for n, v in s.items() if n.endswith("_unparsed"))


def test_options_of_other_names() -> None:
    doc = hub.CVBENCH_2D[1]
    assert options_of("cvbench", doc) == options_of("genhancer_cvbench", doc) == ["A", "B", "C"]
    assert options_of("upstream_mmvp", hub.MMVP[0]) == ["A", "B"]
    assert options_of("textvqa", doc) is None


@pytest.mark.parametrize("chat", [False, True])
def test_the_group_with_right_replies(lmms: Lmms, chat: bool, capfd: pytest.CaptureFixture[str]) -> None:
    """Every benchmark, by a simple model and by a chat model: all right, each image shown once, the prompts alike."""
    scripted.Scripted.seen.clear()
    found = lmms("genhancer", {task: right(task) for task in OPTIONS}, chat=chat)
    for task in OPTIONS:
        shown = values(found, task)
        assert found["versions"][task] == "genhancer-1"
        assert shown == pytest.approx(score(task, TASKS[task], right(task)))
        shares = [
            v for n, v in shown.items() if not n.endswith(("_n", "_pairs", "_groups", "s", "_unparsed", "_ratio"))
        ]
        assert shares
        assert set(shares) == {1.0}
    asked = {(task, number): prompt for task, number, prompt, images in scripted.Scripted.seen if images == 1}
    assert len(asked) == len(scripted.Scripted.seen) == sum(map(len, TASKS.values()))
    assert asked["mmvp", 0] == (
        "Is the door of truck 1 open?\nA. Open\nB. Closed\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert asked["naturalbench", 4] == (
        "Which? Option: A:x; B:y; Please output the letter corresponding to the correct option."
    )
    assert asked["pope", 1] == "Is there a thing 1 in the image?\nAnswer the question using a single word or phrase."
    assert asked["hallusionbench", 0] == "Is line 0 right?\nPlease answer yes or no."
    assert asked["scienceqa_img", 0].startswith("Context: Look closely.\nWhich is 0?\nA. red\nB. green\nAnswer with")
    assert asked["cvbench", 1].startswith(
        "How many of kind 1? Select from the following choices.\n(A) 2\n(B) 3\n(C) 0\n"
    )
    notices = [line for line in capfd.readouterr().err.splitlines() if "llava_genhancer: task" in line]
    assert sorted(line.split()[2] for line in notices) == ["mmvp", "naturalbench", "pope", "scienceqa_img"]


def test_limit_and_a_second_model_in_the_same_folder(lmms: Lmms, tmp_path: Path) -> None:
    """Three documents each; the second model's numbers are its own, HallusionBench's too."""
    tasks = "mmvp,naturalbench,hallusionbench,pope"
    first = lmms(tasks, "Yes", "--limit", "3")
    second = lmms(tasks, "No", "--limit", "3")
    for found, reply in ((first, "Yes"), (second, "No")):
        for task in tasks.split(","):
            assert values(found, task) == pytest.approx(score(task, TASKS[task][:3], [reply] * 3))
    assert values(first, "mmvp")["mmvp_unparsed"] == 3
    assert values(first, "naturalbench")["naturalbench_groups"] == 0
    assert values(first, "hallusionbench")["hallusionbench_aAcc"] == pytest.approx(2 / 3)
    assert values(second, "hallusionbench")["hallusionbench_aAcc"] == pytest.approx(1 / 3)
    samples = first["path"].with_name(first["path"].name.replace("_results.json", "_samples_pope.jsonl"))
    logged = [json.loads(line) for line in samples.read_text().splitlines()]
    assert [entry["pope_accuracy"]["answer"] for entry in logged] == ["yes"] * 3


def test_local_copies_by_path(lmms: Lmms, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The data sets need not lie in the working directory; a missing one is said, and nothing is run."""
    monkeypatch.setenv("LLAVA_GENHANCER_DATA", str(data))
    away = tmp_path / "away"
    away.mkdir()
    monkeypatch.chdir(away)
    found = lmms("scienceqa_img", "A")
    assert values(found, "scienceqa_img")["scienceqa_n"] == len(hub.SCIENCEQA)
    monkeypatch.setenv("LLAVA_GENHANCER_DATA", str(away))
    with pytest.raises(SystemExit) as stopped:
        lmms("scienceqa_img", "A")
    assert stopped.value.code == 2


def test_the_page_names_every_metric_and_task() -> None:
    """eval/README.md: tasks in full; metrics in full or, after the first of a task, by their ending."""
    page = (resource_dir("eval") / "README.md").read_text()
    for task in OPTIONS:
        config = config_of(task)
        assert f"| `{task}` |" in page
        assert f"`{config['dataset_path']}`" in page or task == "mmvp_original_labels"
        prefix = {"scienceqa_img": "scienceqa", "mmvp_original_labels": "mmvp"}.get(task, task)
        for name in (entry["metric"] for entry in config["metric_list"]):
            plain = re.sub("_(random|popular|adversarial)_", "_", name)
            ending = plain.removeprefix(prefix)
            assert plain in page or f"`{ending}`" in page or ending.endswith(("_n", "_unparsed")), name
