"""The report: whole on a whole run, honest about half of one, and never markup from names."""

import dataclasses
import json
import random
import re
import shlex
import shutil
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image

from llava_genhancer.errors import InputError
from llava_genhancer.evaluate import figures
from llava_genhancer.evaluate.markdown import block, code, table, text
from llava_genhancer.evaluate.mmvp.data import Benchmark
from llava_genhancer.evaluate.mmvp.results import MmvpResult, PairResult, save_results
from llava_genhancer.evaluate.paper import PATTERNS
from llava_genhancer.evaluate.question_results import Answer, QuestionResult
from llava_genhancer.evaluate.question_results import save_results as save_answers
from llava_genhancer.evaluate.report.write import FIGURES, write_report
from llava_genhancer.recipes import get_recipe, to_dict
from llava_genhancer.run import open_run

DETAILS = ["facing", "count", "eyes"]
SIDE = 12


def result(seed: int, chance: float, **facts) -> MmvpResult:
    rng = random.Random(seed)
    pairs = tuple(PairResult((2 * i + 1, 2 * i + 2), (0.7, 0.4), (True, rng.random() < chance)) for i in range(135))
    return MmvpResult(tower=f"towers/{seed}", label=f"t{seed}", model_type="clip", pairs=pairs, **facts)


def strip(path: Path, seed: int, n: int = 3) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (SIDE, n * SIDE, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def write_json(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def build_run(run: Path, original: MmvpResult, enhanced: MmvpResult) -> Path:
    write_json(
        run / "manifest.json",
        {
            "format": 1, "recipe": to_dict(get_recipe("tiny")), "versions": {"torch": "2.15.0"}, "git": "0123abc+dirty",
            "command": ["/somewhere/bin/llava-genhancer", "enhance", "tiny", "--output_dir", "a run"], "seed": 0,
            "world_size": 2,
        },
    )  # fmt: skip
    for stage, steps in ((1, (0, 100, 200, 300, 400, 500, 600)), (2, (0, 50, 100, 150, 200))):
        folder = run / f"stage{stage}"
        log = [{"step": s, "loss": 1.0 + 1 / s, "grad_norm": 1.0, "learning_rate": 1e-3} for s in range(1, 61)]
        write_json(folder / "log_history.json", [*log, {"step": 61, "loss": float("nan")}, {"step": 62}])
        skipped = {"read": 1000, "skipped": 2, "by_reason": {"truncated": 1, "<b>odd</b>": 1},
                   "keys": [["00001|<script>alert(1)</script>`", "truncated"], ["a_b*c", "<b>odd</b>"]]}  # fmt: skip
        write_json(
            folder / "result.json",
            {
                "stage": stage, "steps": 62, "final_loss": 1.0162, "images_seen": 19200, "seconds": 4321.0,
                "trainable_parameters": 1_310_154_816, "skipped": skipped,
            },
        )  # fmt: skip
        strip(folder / "samples" / "originals.png", 0)
        for step in steps:
            strip(folder / "samples" / f"step-{step:06d}.png", step + stage)
    save_results(run / "eval" / "mmvp_vlm.json", [original, enhanced], Benchmark(Path("set"), (), "00"))
    answers = tuple(Answer(f"{d}-{i}", d, 2, 0, i % 2) for d in DETAILS for i in range(10))
    models = [QuestionResult(label, label, {}, answers) for label in ("original", "enhanced", "blind")]
    save_answers(run / "eval" / "questions.json", models, {"path": "asked", "sha256": "00"})
    scores = {d: {"accuracy": 0.5, "n": 200, "interval": [0.43, 0.57]} for d in DETAILS}
    better = {d: {"accuracy": 0.6, "n": 200, "interval": [0.53, 0.67]} for d in DETAILS}
    write_json(run / "eval" / "probes.json", {"details": DETAILS, "original": scores, "enhanced": better})
    return run


@pytest.fixture
def full_run(tmp_path) -> Path:
    enhanced = result(1, 0.45, recipe="openai-l14-224", backbone="openai-l14-224")
    return build_run(tmp_path / "a run", result(0, 0.25, backbone="openai-l14-224"), enhanced)


def test_a_whole_run_is_reported_whole(full_run):
    path = write_report(full_run)
    assert path == full_run / "report.md"
    words = path.read_text()
    facts = json.loads((full_run / "report.json").read_text())
    for name in FIGURES:
        assert f"(figures/{name})" in words
        picture = Image.open(full_run / "figures" / name).convert("RGB")
        assert min(picture.size) > 200
        assert len(picture.getcolors(1 << 24)) > 20
    assert facts["figures"] == [f"figures/{n}" for n in ("mmvp_vlm.png", "probes.png", "questions.png", "loss.png",
                                                         "t_density.png",
                                                         "reconstructions.png")]  # fmt: skip
    for said in (
        *PATTERNS, "# tiny: report", "One run, seed 0", "19.3", "31.9", "0.74 points", "25 %", "n = 135", "McNemar p",
        "1,310,154,816", "1 h 12 min", "1,000 images read, 2 skipped (0.20 %)", "zero-shot retention", "facing",
        "Measured on `set`", "torchrun --nproc_per_node=2 -m llava_genhancer enhance tiny --output_dir 'a run'",
        "llava-genhancer mmvp-vlm towers/0 towers/1 --data set", "llava-genhancer report", "toyworld:clip",
    ):  # fmt: skip
        assert said in words, said
    assert "original" in words
    assert "enhanced" in words  # not t0 and t1: the second was made by a recipe
    assert set(facts["stages"]) == {"1", "2"}
    assert facts["stages"]["2"]["skipped"]["skipped"] == 2
    assert facts["mmvp_vlm"]["comparisons"][0]["gained"] >= 0
    assert "pairs" not in facts["mmvp_vlm"]["towers"][0]


def test_every_command_of_a_report_can_be_given_from_any_folder(tmp_path, monkeypatch):
    """Commands with relative paths begin with the folder that they were given in; the report is named in full."""
    start = tmp_path / "it's the start"
    (start / "runs").mkdir(parents=True)
    monkeypatch.chdir(start)
    build_run(Path("runs/one"), result(0, 0.2), result(1, 0.4))
    monkeypatch.setattr("sys.argv", ["/bin/llava-genhancer", "enhance", "tiny", "--output_dir", "runs/two"])
    open_run(Path("runs/two"), get_recipe("tiny"), world_size=1)
    shutil.copy("runs/two/manifest.json", "runs/one/manifest.json")
    monkeypatch.chdir(start / "runs")
    words = write_report("one", ["two"]).read_text()
    monkeypatch.chdir(start)
    block = words.split("```bash")[-1].split("```")[0].strip()
    verbs = {}
    for line in block.splitlines():
        parts = shlex.split(line)
        folder = parts[1] if parts[0] == "cd" else None
        verbs[parts[parts.index("llava-genhancer") + 1]] = folder, parts
    assert {verb: folder for verb, (folder, _) in verbs.items()} == {
        "enhance": str(start), "mmvp-vlm": str(start), "questions": str(start), "report": None,
    }  # fmt: skip
    assert verbs["report"][1][2:] == [str(start / "runs" / "one"), str(start / "runs" / "two")]
    assert verbs["mmvp-vlm"][1][-1] == str(start / "runs/one/eval/mmvp_vlm.json")


def test_names_from_the_data_do_not_become_markup(full_run):
    words = write_report(full_run).read_text()
    prose = re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", words, flags=re.DOTALL)  # outside of code
    assert "<script" not in prose
    assert "<b>" not in prose
    assert "`` 00001|<script>alert(1)</script>` ``: truncated" in words
    assert "&lt;b&gt;odd&lt;/b&gt;" in words


def test_the_same_run_gives_the_same_bytes(full_run):
    def everything():
        write_report(full_run)
        files = [full_run / "report.md", full_run / "report.json", *sorted((full_run / "figures").iterdir())]
        return [p.read_bytes() for p in files]

    settings = dict(matplotlib.rcParams)
    first = everything()
    assert dict(matplotlib.rcParams) == settings
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red"}):
        assert everything() == first


def test_noise_is_called_noise_and_more_is_called_more(tmp_path):
    enhanced = result(1, 0.25, recipe="tiny")
    same = write_report(build_run(tmp_path / "a", result(0, 0.25), enhanced)).read_text()
    assert "within noise, not evidence of a difference" in same
    assert "not told apart from guessing" in same
    clear = write_report(build_run(tmp_path / "b", result(0, 0.25), result(1, 0.8, recipe="tiny"))).read_text()
    assert "p < 0.001" in clear
    assert "more than chance explains" in clear
    twin = result(0, 0.25)
    alike = write_report(build_run(tmp_path / "c", twin, dataclasses.replace(twin, recipe="tiny"))).read_text()
    assert "both answer every pair alike" in alike


def test_an_empty_run_says_what_is_missing(tmp_path):
    with pytest.raises(InputError, match="is not a run folder"):  # nothing is written into a stranger's folder
        write_report(tmp_path)
    (tmp_path / "eval").mkdir()
    words = write_report(tmp_path).read_text()
    for name in ("manifest.json", "stage1/result", "stage2/log", "stage1/samples", r"eval/mmvp\_vlm.json"):
        assert name.replace("_", "\\_").replace("\\\\", "\\") in words, name
    assert "Nothing has been measured yet" in words
    assert not (tmp_path / "figures").exists()
    assert json.loads((tmp_path / "report.json").read_text())["figures"] == []
    assert write_report(tmp_path).read_text() == words  # its own report does not confuse it


@pytest.mark.parametrize(
    ("name", "content", "lost"),
    [
        ("manifest.json", "{", "t_density.png"),
        ("manifest.json", "[]", "t_density.png"),
        ("stage1/log_history.json", '{"step": 1}', None),
        ("stage1/result.json", "not json", None),
        ("stage2/result.json", '{"skipped": {"read": "many"}}', None),
        ("eval/mmvp_vlm.json", '{"towers": []}', "mmvp_vlm.png"),
        ("eval/mmvp_vlm.json", '{"towers": [{"pairs": []}]}', "mmvp_vlm.png"),
        ("eval/mmvp_vlm.json", "{}", "mmvp_vlm.png"),
        ("eval/probes.json", '{"details": ["facing"], "original": {}}', "probes.png"),
        ("eval/probes.json", "[1]", "probes.png"),
        ("eval/questions.json", '{"models": []}', "questions.png"),
        ("stage1/samples/step-000600.png", "no picture", "reconstructions.png"),
    ],
)
def test_one_broken_file_costs_its_own_part_only(full_run, name, content, lost):
    (full_run / name).write_text(content)
    words = write_report(full_run).read_text()
    assert "## Not shown" in words
    expected = set(FIGURES) - {lost}
    assert {p.name for p in (full_run / "figures").iterdir()} == expected
    assert all((f"figures/{f}" in words) == (f in expected) for f in FIGURES)


def test_only_the_second_stage_or_only_the_measurement(full_run):
    shutil.rmtree(full_run / "stage1")
    assert "reconstructions.png" in write_report(full_run).read_text()
    shutil.rmtree(full_run / "stage2")
    (full_run / "manifest.json").unlink()
    words = write_report(full_run).read_text()
    assert "# a run: report" in words
    assert "figures/mmvp_vlm.png" in words
    assert "figures/loss.png" not in words
    assert not (full_run / "figures" / "loss.png").exists()


def test_a_folder_that_is_no_run_is_left_alone(tmp_path):
    with pytest.raises(InputError, match="is not a folder"):
        write_report(tmp_path / "nothing")
    (tmp_path / "holiday.jpg").write_text("x")
    with pytest.raises(InputError, match="is not a run folder"):
        write_report(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["holiday.jpg"]


def test_markdown_helpers():
    assert text("a_b <i>*c*</i>\n| `d` $e$") == r"a\_b &lt;i&gt;\*c\*&lt;/i&gt; \| \`d\` \$e\$"
    assert "![x" not in text("![x](http://y)")
    assert "http://" not in text("see http://y")
    assert code("a`b|c") == "``a`b|c``"
    assert code("`") == "`` ` ``"
    assert len(code("x" * 1000)) < 310
    assert block(["echo ```"]).splitlines()[0] == "````bash"
    assert table(["a", "b"], [["1|2", r"3\|4"]]).splitlines() == ["| a | b |", "| :-- | --: |", r"| 1\|2 | 3\|4 |"]


def test_smoothing_keeps_length_level_and_ends():
    values = [5.0, 1.0, 1.0, 99.0, 1.0, 1.0, 3.0]
    assert figures.smoothed(values, 3) == [5.0, 1.0, 1.0, 1.0, 1.0, 1.0, 3.0]
    assert figures.smoothed([2.0] * 9, 5) == [2.0] * 9


@pytest.mark.parametrize(("sampling", "scale"), [("logit_normal", 0.1), ("logit_normal", 10.0), ("uniform", 1.0)])
def test_every_density_can_be_drawn(tmp_path, sampling, scale):
    figures.t_density_figure(sampling, scale, 0.0, 0, tmp_path / "t.png")
    assert Image.open(tmp_path / "t.png").width > 400


def test_awkward_labels_and_few_points_can_be_drawn(tmp_path):
    odd = [result(i, 0.3, backbone="openai-l14-336" if i else None) for i in range(5)]
    odd = [dataclasses.replace(r, label=f"$x_{{{i}$ " + "y" * 80) for i, r in enumerate(odd)]
    figures.mmvp_figure(odd, tmp_path / "m.png")
    figures.loss_figure({"one $point": [(1, 0.5)], "flat": [(i, 1.0) for i in range(9)]}, tmp_path / "l.png")
    figures.reconstructions_figure([("original", [Image.new("RGB", (4, 4))]), ("step", [])], tmp_path / "r.png")
    assert len(list(tmp_path.iterdir())) == 3


def test_a_failed_drawing_leaves_no_file_and_no_settings(tmp_path):
    settings = dict(matplotlib.rcParams)
    with pytest.raises(ZeroDivisionError), figures.Drawing(tmp_path / "x.png", 3, 2):
        _ = 1 / 0
    assert not list(tmp_path.iterdir())
    assert dict(matplotlib.rcParams) == settings
