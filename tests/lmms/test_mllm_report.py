"""The paper's Table 2 from real files of lmms-eval: two models that answer at random, beside the published rows."""

from __future__ import annotations

import csv
import json
import os
import random
import re
import shlex
import shutil
import statistics
import sys
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hub
import pytest
from scoring import TASKS, replies, score

from llava_genhancer.errors import InputError
from llava_genhancer.evaluate.mllm.evaluation import Evaluation, evaluation
from llava_genhancer.evaluate.mllm.results import compare, read_models
from llava_genhancer.evaluate.mllm.table2 import COLUMNS, published
from llava_genhancer.evaluate.report.gallery import differing
from llava_genhancer.evaluate.report.write import write_report
from llava_genhancer.evaluate.statistics import mcnemar_exact
from llava_genhancer.recipes import get_recipe, override, to_dict

Lmms = Callable[..., dict[str, Any]]
SEEDS = {"original": 1, "enhanced": 2}
SAID = {label: {task: replies(docs, seed) for task, docs in TASKS.items()} for label, seed in SEEDS.items()}


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kept") / "run"


@pytest.fixture
def run(lmms: Lmms, data: Path, kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run's folder with what the real command wrote about both models; asked once, copied for each test."""
    if not kept.exists():
        monkeypatch.setenv("LLAVA_GENHANCER_DATA", str(data))
        for label, said in SAID.items():
            lmms("genhancer", said, output=kept / "eval" / "lmms" / label)
    return Path(shutil.copytree(kept, tmp_path / "run"))


def measured(run: Path) -> Evaluation:
    found = evaluation([run])
    assert found is not None
    return found


def test_every_column_is_lmms_evals_own_number(run: Path) -> None:
    models = read_models(run / "eval" / "lmms")
    assert [m.label for m in models] == ["original", "enhanced"]
    for model in models:
        assert list(model.columns) == [c.name for c in COLUMNS if c.name in model.columns]
        for name, m in model.columns.items():
            told = score(m.task.name, TASKS[m.task.name], SAID[model.label][m.task.name])[m.column.metric]
            assert m.percent == pytest.approx(100 * told), name
            low, high = m.interval
            assert 0 <= low <= m.percent <= high <= 100
    first = models[0].columns
    assert first["mmvp"].task.name == "mmvp_original_labels", "the paper's labels"
    assert (first["mmvp"].n, first["mmvp"].answers) == (5, 10)
    assert (first["naturalbench_q_acc"].n, first["pope_popular"].n, first["hallusionbench"].n) == (3, 6, 4)
    assert first["pope_random"].unparsed == SAID["original"]["pope"][12:].count("I cannot tell")


def test_published_rows() -> None:
    assert published("Vicuna-7B", "original")["hallusionbench"] == 27.6
    assert published("Vicuna-13B", "genhancer")["naturalbench_g_acc"] == 22.9
    assert published("Vicuna-7B", "diva")["cvbench_3d"] == 60.2
    assert len({c.name for c in COLUMNS}) == 13


def test_changes_are_paired(run: Path) -> None:
    found = measured(run)
    assert found.baseline is not None
    first, other = found.models
    wins, losses = differing(first.tasks["scienceqa_img"], other.tasks["scienceqa_img"])
    right = [[a == hub_answer(i) for i, a in enumerate(SAID[label]["scienceqa_img"])] for label in SEEDS]
    assert wins == [i for i, pair in enumerate(zip(*right, strict=True)) if pair == (False, True)]
    change = found.changes["enhanced"]["scienceqa_img"]
    assert change.p == mcnemar_exact(len(wins), len(losses))
    assert change.difference == pytest.approx(100 * (len(wins) - len(losses)) / len(hub.SCIENCEQA))
    assert found.changes["enhanced"]["pope_random"].test == "permutation"
    assert compare(first.columns["cvbench_3d"], other.columns["cvbench_2d_coco"]) is None


def hub_answer(number: int) -> str:
    return "AB"[hub.SCIENCEQA[number]["answer"]]


def test_the_report_in_all_its_forms(run: Path, data: Path) -> None:
    words = write_report(run).read_text()
    for said in ("24.7", "22.9", "**original**", "**enhanced**", "### Against original", "5 pairs", "3 groups"):
        assert said in words, said
    for said in ("answers were generated and parsed", "10 questions where the benchmark has 300", "F1"):
        assert said in words, said
    links = {urllib.parse.unquote(link) for link in re.findall(r"\]\((eval/[^)]*)\)", words)}
    assert len(links) == 2 * len(TASKS)
    assert all((run / link).is_file() for link in links)
    assert "Is the door of truck 1 open?" in words, "the prompt"
    assert f"{data}/lmms-lab-eval/MMVP, train" in words
    assert "| 0.7." in words, "lmms-eval's version, recorded by our tasks"

    facts = json.loads((run / "report.json").read_text())["table2"]
    (enhanced,) = [m for m in facts["models"] if m["label"] == "enhanced"]
    assert facts["baseline"] == "original"
    assert set(enhanced["changes"]) == set(enhanced["columns"])
    assert enhanced["metrics"]["mmvp"]["mmvp_n"] == 10
    assert (run / enhanced["columns"]["pope_random"]["samples"]).is_file()

    with open(run / "tables" / "table2.csv") as file:
        rows = list(csv.DictReader(file))
    assert sum(row["source"] != "run" for row in rows) == 6 * 13
    own = {(row["model"], row["column"]): row for row in rows if row["source"] == "run"}
    assert float(own["enhanced", "mmvp"]["percent"]) == pytest.approx(enhanced["columns"]["mmvp"]["percent"], abs=1e-5)
    assert own["original", "mmvp"]["p"] == ""
    assert own["enhanced", "mmvp"]["p"] != ""

    html = (run / "report.html").read_text()
    assert "Wins and losses: enhanced against original" in html
    pictures = html.count('src="data:image/png')
    assert pictures > 2, "figures, and the questions' images"
    assert "its image was not found" not in html
    for figure in ("table2.png", "table2_changes.png"):
        assert (run / "figures" / figure).stat().st_size > 10_000


@pytest.mark.parametrize(
    ("recipe", "changes", "method"),
    [
        ("openai-l14-336", {}, "GenHancer"),
        ("openai-l14-336-diva", {}, "DIVA"),
        ("openai-l14-336-masked", {}, None),  # Table 2 has no row of the discrete denoiser
        ("openai-l14-336-dcr", {}, None),
        ("openai-l14-224", {}, None),  # another backbone than Table 2's
        ("openai-l14-336", {"lora_scale": 0.5}, None),
        ("openai-l14-336", {"t_sampling": "uniform"}, None),
        ("openai-l14-336", {"stage2.trains": "backbone,projector,denoiser"}, None),
        ("openai-l14-336-diva", {"lora_rank": 16}, None),
    ],
)
def test_published_gains_are_those_of_the_runs_own_method(run: Path, recipe: str, changes: dict, method: str) -> None:
    fields = to_dict(override(get_recipe(recipe), changes))
    (run / "manifest.json").write_text(json.dumps({"recipe": fields, "versions": {}}))
    words = write_report(run).read_text()
    assert set(re.findall(r"published, (\w+), Vicuna", words)) == ({method} if method else set())


def test_images_that_are_gone_are_said_to_be(run: Path) -> None:
    for path in run.rglob("*_results.json"):
        path.write_text(path.read_text().replace('"dataset_path": "', '"dataset_path": "/nowhere'))
    html = write_report(run).with_name("report.html").read_text()
    assert "its image was not found" in html
    assert "Wins and losses" in html


def test_several_runs_and_a_baseline(run: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(run, tmp_path / "second"))
    shutil.rmtree(other / "eval" / "lmms" / "original")
    words = write_report(run, [other], baseline=other).read_text()
    assert "**run: original**" in words
    assert "**second: enhanced**" in words
    assert "### Against second: enhanced" in words
    assert f"llava-genhancer report {run} {other} --baseline {other}" in words
    found = evaluation([run], other)
    assert found is not None
    assert found.baseline is not None
    assert set(found.changes) == {"run: original", "run: enhanced"}
    assert all(c.difference == 0 and c.p == 1 for c in found.changes["run: enhanced"].values())
    namesake = Path(shutil.copytree(run, tmp_path / "elsewhere" / "run"))
    both = evaluation([run, namesake])
    assert both is not None
    assert len({m.label for m in both.models}) == 4
    assert set(both.changes) == {f"{r}: {m}" for r in (run, namesake) for m in SEEDS} - {f"{run}: original"}
    (tmp_path / "empty" / "tower").mkdir(parents=True)
    with pytest.raises(InputError, match="empty holds no results of lmms-eval"):
        evaluation([run], tmp_path / "empty")
    with pytest.raises(InputError, match="empty holds no results of lmms-eval"):
        write_report(run, baseline=tmp_path / "empty")


def test_a_folder_of_lmms_eval_alone(run: Path) -> None:
    """What somebody evaluated by hand, with any model; the other's documents are fewer."""
    alone = run / "eval" / "lmms" / "enhanced"
    for path in alone.rglob("*_samples_scienceqa_img.jsonl"):
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    for path in alone.rglob("*_results.json"):
        facts = json.loads(path.read_text())
        del facts["results"]["scienceqa_img"]["scienceqa_accuracy,none"]
        path.write_text(json.dumps(facts))
    assert "scienceqa_img than original: not compared" in " ".join(write_report(run).read_text().split()).replace(
        "\\", ""
    )
    assert "ScienceQA-IMG" in write_report(alone).read_text()


def test_two_files_that_do_not_belong_together(run: Path) -> None:
    for path in (run / "eval" / "lmms" / "original").rglob("*_samples_pope.jsonl"):
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:9]))
    words = write_report(run).read_text()
    assert re.search(r"lmms-eval: its data are not as expected .* are of different runs", words)


def test_odd_files_cost_only_their_part(run: Path) -> None:
    (path,) = (run / "eval" / "lmms" / "original").rglob("*_results.json")
    path.write_text("{}")
    words = write_report(run).read_text()
    assert "no results file of lmms-eval" in words.replace("\\", "")
    assert "## Not shown" in words


def test_a_second_run_of_a_task_replaces_the_first(run: Path) -> None:
    (path,) = (run / "eval" / "lmms" / "original").rglob("*_results.json")
    later = path.with_name("99990101_000000_results.json")
    facts = json.loads(path.read_text())
    facts["configs"] = {"pope": facts["configs"]["pope"]}
    later.write_text(json.dumps(facts))
    shutil.copy(path.with_name(path.name.replace("results.json", "samples_pope.jsonl")),
                later.with_name("99990101_000000_samples_pope.jsonl"))  # fmt: skip
    first = measured(run).models[0]
    assert first.tasks["pope"].samples.name.startswith("9999")
    assert not first.tasks["mmvp"].samples.name.startswith("9999")


def test_the_reports_command_repeats_a_run_by_hand(
    lmms, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Folder, variables and every word, of a run whose paths are relative to where it was started."""
    away = tmp_path / "away from the data"
    away.mkdir()
    monkeypatch.setenv("LLAVA_GENHANCER_DATA", str(data))
    monkeypatch.setenv("LLAVA_GENHANCER_UPSTREAM_TASKS", "1")
    monkeypatch.chdir(away)
    lmms("genhancer_scienceqa_img", "A", "--limit", "5", output=Path("run/eval/lmms/mine"))
    words = write_report(away / "run").read_text()
    (line,) = [line for line in words.splitlines() if line.startswith("cd ") and "scienceqa" in line]
    parts = shlex.split(line)
    assert parts[:3] == ["cd", str(away), "&&"]
    assert {f"LLAVA_GENHANCER_DATA={data}", "LLAVA_GENHANCER_UPSTREAM_TASKS=1"} <= set(parts[3:6])
    start = parts.index("lmms-eval")
    assert parts[start:] == ["lmms-eval", *sys.argv[1:]]
    assert {"--limit", "5", "run/eval/lmms/mine", "response=A"} <= set(parts[start:])


def test_both_facts_of_hallusionbench_are_listed(run: Path) -> None:
    words = write_report(run).read_text().replace("\\", "")
    assert '14 of its 951 questions ask "which ..."' in words
    assert "VLMEvalKit merges them by name (332, 429), which makes its average about 0.7 points lower" in words


TEST_DATA = Path(os.environ.get("LLAVA_GENHANCER_TEST_DATA", Path(__file__).parents[2] / "../shared/data"))


@pytest.mark.skipif(not (TEST_DATA / "HallusionBench.json").is_file(), reason="needs LLAVA_GENHANCER_TEST_DATA")
def test_the_facts_of_hallusionbench_are_so() -> None:
    """Counted in the published questions; VLMEvalKit's grouping on random answers, half of them right."""
    with open(TEST_DATA / "HallusionBench.json") as file:
        docs = [doc for doc in json.load(file) if doc["visual_input"] != "0"]
    which = [d for d in docs if re.search(r"(?:^|, )which (?!spanned)", d["question"], re.IGNORECASE)]
    assert (len(docs), len(which), sum(d["gt_answer"] == "1" for d in which)) == (951, 14, 11)

    def average(right: list[bool], *merged_by: str) -> tuple[float, int, int]:
        shares = [statistics.fmean(right)]
        sizes = []
        for last in ("figure_id", "question_id"):
            of_group: dict[tuple[str, ...], list[bool]] = {}
            for doc, x in zip(docs, right, strict=True):
                of_group.setdefault(tuple(doc[k] for k in (*merged_by, last)), []).append(x)
            shares.append(statistics.fmean(map(all, of_group.values())))
            sizes.append(len(of_group))
        return 100 * statistics.fmean(shares), *sizes

    differences = []
    for seed in range(50):
        draw = random.Random(seed)
        right = [draw.random() < 0.5 for _ in docs]
        apart, merged = average(right, "category", "subcategory", "set_id"), average(right, "subcategory", "set_id")
        assert (apart[1:], merged[1:]) == ((346, 455), (332, 429))
        differences.append(merged[0] - apart[0])
    assert statistics.fmean(differences) == pytest.approx(-0.7, abs=0.1)
