"""The launch shim: the fork's own main block, its own arguments, its classes under their own names."""

import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from llava_genhancer.errors import InputError
from llava_genhancer.launch import launch, main, run_main

MakeFork = Callable[[str], str]
TRAINER = """
import dataclasses, json, pickle, sys
from types import SimpleNamespace
from ..model import llava_arch


@dataclasses.dataclass
class Arguments:
    words: list


def train(attention=None):
    with open("arguments.bin", "wb") as f:
        pickle.dump(Arguments(sys.argv[1:]), f)
    chooser = type(llava_arch.build_vision_tower).__name__
    with open("said.json", "w") as f:
        json.dump({"argv": sys.argv, "attention": attention, "chooser": chooser}, f)
    if "--vision_tower" in sys.argv:
        tower = sys.argv[sys.argv.index("--vision_tower") + 1]
        feature = sys.argv[-1] if "--mm_vision_select_feature" in sys.argv else "patch"
        config = SimpleNamespace(mm_vision_tower=tower, mm_vision_select_layer=-2, mm_vision_select_feature=feature)
        llava_arch.build_vision_tower(config)
"""
MAIN = "\n\nif __name__ == '__main__':\n    train(attention='flash')\n"


@pytest.fixture
def trainer(fork: MakeFork, tmp_path: Path) -> Path:
    package = fork("LLaVA")
    path = tmp_path / package / "train" / "train_mem.py"
    path.parent.mkdir()
    (path.parent / "__init__.py").write_text("")
    path.write_text(TRAINER + MAIN)
    return path


def test_as_a_command_it_pickles_under_the_trainers_name(trainer: Path, tmp_path: Path) -> None:
    root = str(Path(__file__).parents[2])
    command = [sys.executable, "-m", "llava_genhancer.launch", "llava.train.train_mem", "--a", "1"]
    done = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": root}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert pickle.loads((tmp_path / "arguments.bin").read_bytes()).words == ["--a", "1"]
    said = json.loads((tmp_path / "said.json").read_text())
    assert said == {"argv": [str(trainer), "--a", "1"], "attention": "flash", "chooser": "Chooser"}


@pytest.mark.parametrize("given", ["llava.train.train_mem", "llava/train/train_mem.py"])
def test_deepspeeds_local_rank_goes_to_the_trainer(
    trainer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["launch"])
    launch(["--local_rank=1", given, "--deepspeed", "zero2.json"])
    said = json.loads((tmp_path / "said.json").read_text())
    assert said["argv"][1:] == ["--local_rank=1", "--deepspeed", "zero2.json"]


def test_without_a_main_block_train_is_called(trainer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer.write_text(TRAINER)
    monkeypatch.setattr(sys, "argv", ["launch"])
    launch(["llava.train.train_mem"])
    assert json.loads((tmp_path / "said.json").read_text())["attention"] is None


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["--local_rank=0", "--help"]])
def test_help_is_help(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main(words)
    captured = capsys.readouterr()
    assert "python -m llava_genhancer.launch llava.train.train_mem" in captured.out
    assert "evaluated with register() too" in captured.out
    assert captured.err == ""


@pytest.mark.parametrize(
    ("kind", "rank", "told"), [("siglip", "0", True), ("siglip", "1", False), ("clip", "0", False)]
)
def test_the_last_line_of_a_training_on_our_class_names_the_evaluation(
    trainer: Path,
    towers: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    rank: str,
    told: bool,
) -> None:
    (tmp_path / "llava" / "eval").mkdir()
    (tmp_path / "llava" / "eval" / "model_vqa.py").touch()
    monkeypatch.setattr(sys, "argv", ["launch"])
    monkeypatch.setenv("RANK", rank)
    main(["llava.train.train_mem", "--vision_tower", str(towers[kind])])
    lines = [line for line in capsys.readouterr().out.splitlines() if "register()" in line]
    assert len(lines) == told
    if told:
        assert str(towers[kind]) in lines[0]
        assert "python -m llava_genhancer.launch llava.eval.model_vqa --model-path CHECKPOINT" in lines[0]


def test_a_feature_that_our_class_lacks_is_one_line(
    trainer: Path, towers: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["launch"])
    words = ["llava.train.train_mem", "--vision_tower", str(towers["siglip"]), "--mm_vision_select_feature", "cls_only"]
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("llava_genhancer.launch: mm_vision_select_feature 'cls_only' is unknown")
    assert error.count("\n") == 1


def test_what_cannot_be_launched(trainer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["launch"])
    for argv in ([], ["--local_rank=0"], ["--deepspeed", "x"]):
        with pytest.raises(InputError, match="name the fork's trainer first"):
            launch(argv)
    with pytest.raises(InputError, match=r"no module llava\.train\.missing here"):
        launch(["llava.train.missing"])
    with pytest.raises(InputError, match="outside this folder"):
        launch(["/elsewhere/train.py"])
    trainer.write_text("import a_package_that_is_not_installed\n")
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_not_installed"):  # the fork's own trouble
        launch(["llava.train.train_mem"])
    trainer.write_text("from ..model import llava_arch\n")
    with pytest.raises(InputError, match="neither a main block nor a train"):
        launch(["llava.train.train_mem"])
    (tmp_path / "llava" / "alone.py").write_text("def train(): pass\n")
    for name in [n for n in sys.modules if n.startswith("llava.")]:
        del sys.modules[name]
    with pytest.raises(InputError, match=r"loaded no tower builder .* looked for a module \*\.multimodal_encoder"):
        launch(["llava.alone"])


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    root = str(Path(__file__).parents[2])
    command = [sys.executable, "-m", "llava_genhancer.launch", "not_here.train"]
    done = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": root}, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("llava_genhancer.launch: no module not_here.train here")


def test_run_main_needs_something_to_run(tmp_path: Path) -> None:
    (tmp_path / "empty.py").write_text("x = 1\n")
    module = type(sys)("empty")
    module.__file__ = str(tmp_path / "empty.py")
    with pytest.raises(InputError, match="empty has neither"):
        run_main(module)
