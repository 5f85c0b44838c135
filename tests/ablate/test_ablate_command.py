"""The verb as a user runs it: cells are the runs they would have been, a second start does nothing, failures show."""

import csv
import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
from PIL import Image

from llava_genhancer import cli, run
from llava_genhancer.ablate.command import ablate
from llava_genhancer.enhance.train import enhance
from llava_genhancer.errors import InputError
from llava_genhancer.evaluate.mmvp.results import load_results
from llava_genhancer.toyworld.writers import write_mmvp

SHORT = {
    "stage1.max_steps": 4, "stage1.warmup_steps": 0, "stage1.sample_steps": 4, "stage2.max_steps": 3,
    "stage2.sample_steps": 3, "stage2.snapshot_steps": "", "sample_images": 3,
}  # fmt: skip


@pytest.fixture(scope="session")
def toy_pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mmvp(tmp_path_factory.mktemp("pairs") / "set", "test", seed=3)


@pytest.fixture(scope="module")
def fields(tiny_fields: dict[str, object]) -> dict[str, object]:
    return {**tiny_fields, **SHORT}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, fields: dict[str, object], toy_pairs: Path) -> Path:
    """Figure 9's two cells, by the command line; seed 5."""
    out = tmp_path_factory.mktemp("ablation") / "fig9"
    words = [word for name, value in fields.items() for word in (f"--{name}", str(value))]
    with pytest.raises(SystemExit) as ended:
        cli.main(["ablate", "fig9", "--output_dir", str(out), "--mmvp", str(toy_pairs), "--seed", "5", *words])
    assert ended.value.code == 0
    return out


def test_a_cell_is_the_run_it_would_have_been(finished: Path, tmp_path: Path) -> None:
    """Its stage 1 was another cell's, and still every weight of stage 2 is that of a run that trained both."""
    cell = finished / "updated" / "seed-5"
    alone = enhance(run.recipe_of(cell), tmp_path / "alone")
    assert run.sha256(alone / "model.safetensors") == run.sha256(cell / "tower" / "model.safetensors")
    for stage in ("stage1", "stage2"):
        weights = f"{stage}/weights.safetensors"
        assert run.sha256(tmp_path / "alone" / weights) == run.sha256(cell / weights), stage
    assert not list((cell / "stage1").glob("checkpoint-*")), "this cell trained no stage 1"
    assert run.read_json(cell / "stage1" / "result.json")["shared_with"] == "../../frozen/seed-5/stage1"
    trained = run.read_json(cell / "manifest.json")
    assert trained["command"][:3] == ["llava-genhancer", "enhance", "tiny"]
    assert (trained["seed"], trained["recipe"]["stage2.trains"]) == (5, ["backbone", "projector", "denoiser"])


def rows_of(out: Path) -> dict[str, dict[str, str]]:
    with open(out / "table.csv", newline="") as file:
        return {row["cell"]: row for row in csv.DictReader(file)}


def test_the_table_says_what_the_runs_measured(finished: Path) -> None:
    rows = rows_of(finished)
    assert list(rows) == ["frozen", "updated"]
    facts = json.loads((finished / "results.json").read_text())
    assert (facts["ablation"], facts["recipe"], facts["seeds"]) == ("fig9", "tiny", [5])
    for cell in facts["cells"]:
        original, enhanced = load_results(Path(*cell["runs"]) / "eval" / "mmvp_vlm.json")
        score, measured = enhanced.average, cell["measured"]
        assert [measured["mmvp"][k] for k in ("mean", "low", "high")] == [score.percent, score.low, score.high]
        assert measured["mmvp"]["over"] == "pairs", "one seed: the interval is that of its pairs"
        assert measured["change"]["mean"] == pytest.approx(score.percent - original.average.percent)
        assert float(rows[cell["label"]]["mmvp"]) == pytest.approx(score.percent, abs=1e-3)
        assert measured["images"]["values"] == [56]
        assert {"clip_score", "psnr"} <= measured.keys()
    page = (finished / "report.html").read_text()
    assert "Denoiser and projector in stage 2" in page
    assert page.count("data:image/png;base64,") == 2
    for figure in ("fig9.png", "reconstructions.png"):
        with Image.open(finished / "figures" / figure) as image:
            assert min(image.size) > 100


def test_intervals_over_seeds_are_students(finished, fields, toy_pairs, tmp_path, capsys) -> None:
    """Finished runs of a second seed, with the towers' answers exchanged: its change is the first one's, reversed."""
    out = tmp_path / "copy"
    shutil.copytree(finished, out)
    for cell in ("frozen", "updated"):
        shutil.copytree(out / cell / "seed-5", out / cell / "seed-6")
        manifest, measured = (out / cell / "seed-6" / name for name in ("manifest.json", "eval/mmvp_vlm.json"))
        manifest.write_text(manifest.read_text().replace('"seed": 5', '"seed": 6'))
        answers = json.loads(measured.read_text())
        answers["towers"].reverse()
        measured.write_text(json.dumps(answers))
    assert ablate("fig9", out, {**fields, "seed": 5}, mmvp=str(toy_pairs), seeds=2) == 0
    assert "Student's 95 % over 2 seeds" in capsys.readouterr().out
    cells = json.loads((out / "results.json").read_text())["cells"]
    assert any(cell["measured"]["change"]["values"][0] for cell in cells), "no change would show nothing"
    for cell in cells:
        change = cell["measured"]["change"]
        first, second = change["values"]
        assert (change["over"], change["mean"], second) == ("seeds", 0, -first)
        assert change["high"] == pytest.approx(12.706 * abs(first)), "t of one degree of freedom, s.d. sqrt(2) |x|"
        assert change["low"] == -change["high"]


def contents(folder: Path) -> dict[Path, int]:
    kept = [p for p in folder.rglob("*") if p.suffix in (".safetensors", ".pt") or p.parent.name == "eval"]
    return {path: path.stat().st_mtime_ns for path in kept}


def test_the_same_command_does_nothing_twice(finished: Path, fields, toy_pairs, capsys) -> None:
    before = contents(finished)
    assert ablate("fig9", finished, {**fields, "seed": 5}, mmvp=str(toy_pairs)) == 0
    assert contents(finished) == before
    assert "minus original" in capsys.readouterr().out


def test_a_cell_that_fails_is_shown_and_the_others_go_on(finished, fields, toy_pairs, tmp_path, capsys) -> None:
    out = tmp_path / "copy"
    shutil.copytree(finished, out)
    manifest = out / "frozen" / "seed-5" / "manifest.json"
    foreign = json.loads(manifest.read_text())
    foreign["recipe"]["weight_decay"] = 0.5
    manifest.write_text(json.dumps(foreign))
    assert ablate("fig9", out, {**fields, "seed": 5}, mmvp=str(toy_pairs)) == 1
    printed = capsys.readouterr().out
    assert "frozen, seed 5 failed: enhance: " in printed
    assert "holds a run of another recipe (weight_decay: 0.5 -> 0.01)" in printed
    frozen, updated = json.loads((out / "results.json").read_text())["cells"]
    assert frozen["measured"] == {}
    assert updated["failed"] == {}
    assert updated["measured"]["mmvp"]["over"] == "pairs"
    assert "weight\\_decay: 0.5" in (out / "report.md").read_text()


def test_a_signal_stops_all_of_it_with_a_checkpoint(fields, toy_pairs, tmp_path, capfd) -> None:
    out = tmp_path / "stopped"
    stage = out / "frozen" / "seed-0" / "stage1"

    def stop() -> None:
        for _ in range(600):
            if list(stage.glob("checkpoint-*/complete.json")):
                os.kill(os.getpid(), signal.SIGTERM)
                return
            time.sleep(0.05)

    watcher = threading.Thread(target=stop)
    watcher.start()
    long = {**fields, "stage1.max_steps": 100_000}
    assert ablate("fig9", out, long, mmvp=str(toy_pairs)) == 128 + signal.SIGTERM
    watcher.join()
    assert run.last_complete_checkpoint(stage) is not None
    assert not (out / "updated").exists()
    rows = json.loads((out / "results.json").read_text())["cells"]
    assert [row["failed"] for row in rows] == [{"0": "stopped before it was finished"}] * 2, "the table so far"
    assert "the same command goes on" in capfd.readouterr().err


def test_a_dry_run_tells_the_plan_and_writes_nothing(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert ablate("fig8", fields={"lora_dropout": "0.2"}, dry_run=True) == 0
    said = capsys.readouterr().out
    assert "fig8: LoRA on the backbone, or every weight of it -> runs/fig8-tiny\n2 runs: " in said
    assert "stage 1 is runs/fig8-tiny/lora/seed-0's" in said
    assert "--lora_rank 0" in said
    assert said.count("--lora_dropout 0.2") == 2
    for verb in ("enhance", "mmvp-vlm", "zero-shot", "generation", "probes"):
        assert said.count(f"$ llava-genhancer {verb} ") == 2
    assert not list(tmp_path.iterdir())


def test_fig_7_is_drawn_without_training(tmp_path) -> None:
    assert ablate("fig7", tmp_path / "out") == 0
    assert [p.name for p in (tmp_path / "out").rglob("*") if p.is_file()] == ["fig7.png"]


def test_an_unknown_ablation_is_one_line(tmp_path) -> None:
    with pytest.raises(InputError, match="no ablation 'table3', did you mean 'table"):
        ablate("table3", tmp_path / "out")
    assert not (tmp_path / "out").exists()
