"""The folders that travel with the package, and what DeepSpeed's JSONs say and leave out."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from llava_genhancer import resources
from llava_genhancer.errors import InputError
from llava_genhancer.resources import resource_dir

ROOT = Path(__file__).parent.parent
STAGES = {"zero1": 1, "zero2": 2, "zero3": 3, "zero3_offload": 3}


def test_folders_of_this_checkout() -> None:
    for name in ("configs", "scripts"):
        assert resource_dir(name) == ROOT / name


def test_unknown_name_lists_the_known() -> None:
    with pytest.raises(InputError, match="configs, eval, scripts"):
        resource_dir("config")


def test_installed_folders_come_first_and_strangers_do_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in site-packages, where a neighbour called `scripts` belongs to another distribution."""
    package = tmp_path / "llava_genhancer"
    (package / "_resources" / "configs").mkdir(parents=True)
    (tmp_path / "scripts").mkdir()
    (tmp_path / "configs").mkdir()
    monkeypatch.setattr(resources, "_PACKAGE", package)
    assert resource_dir("configs") == package / "_resources" / "configs"
    with pytest.raises(InputError, match="reinstall"):
        resource_dir("scripts")


@pytest.mark.parametrize("name", STAGES)
def test_deepspeed_json(name: str) -> None:
    """The Trainer fills the blanks; nothing that would override its optimizer, or clip behind its back."""
    config = json.loads((resource_dir("configs") / "deepspeed" / f"{name}.json").read_text())
    assert config["gradient_clipping"] == "auto"  # left out, DeepSpeed clips at 1.0
    assert not {"optimizer", "scheduler"} & config.keys()  # an optimizer section puts all weights in one decay group
    assert config["bf16"] == {"enabled": "auto"}
    assert config["fp16"] == {"enabled": False}
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        assert config[key] == "auto"
    zero = config["zero_optimization"]
    assert zero["stage"] == STAGES[name]
    assert zero["overlap_comm"] is True
    assert zero["contiguous_gradients"] is True
    assert zero["reduce_bucket_size"] == "auto"
    assert zero.get("stage3_gather_16bit_weights_on_model_save", False) == (STAGES[name] == 3)
    assert ("offload_optimizer" in zero) == ("offload_param" in zero) == name.endswith("offload")


def test_no_other_deepspeed_json() -> None:
    assert {p.stem for p in (resource_dir("configs") / "deepspeed").iterdir()} == STAGES.keys()


def stub(folder: Path, version: str, *, venv: bool = True) -> None:
    """A python3 that knows its version, whether it can make environments, and nothing else."""
    major, minor = version.split(".")
    script = f"""#!/bin/sh
case "$*" in
  *"%d.%d"*) echo {version} ;;
  *ensurepip*) exit {0 if venv else 1} ;;
  *"(3, 11)"*) [ {major} -eq 3 ] && [ {minor} -ge 11 ] ;;
  *) exit 1 ;;
esac
"""
    path = folder / "python3"
    path.write_text(script)
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("version", "venv", "words"),
    [
        ("3.10", True, "Python 3.11 or newer is needed, found python3 is 3.10"),
        ("3.12", False, "apt install python3.12-venv"),
        (None, True, "found none"),
    ],
)
def test_install_needs_a_python(tmp_path: Path, version: str | None, venv: bool, words: str) -> None:
    """Too old, without venv, none at all: one line, and nothing is made."""
    if version is not None:
        stub(tmp_path, version, venv=venv)
    bash = subprocess.run(["bash", "-c", "command -v bash"], capture_output=True, text=True, check=True).stdout.strip()
    command = [bash, str(ROOT / "scripts" / "make_venv.sh"), str(tmp_path / "venv")]
    done = subprocess.run(command, env={"PATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 1
    assert words in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "venv").exists()


def test_install_without_a_compiler(tmp_path: Path) -> None:
    """One line, and on it goes."""
    (tmp_path / "python3").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (tmp_path / "python3").chmod(0o755)
    venv = tmp_path / "venv" / "bin"
    venv.mkdir(parents=True)  # as after an earlier, interrupted installation: it is gone on with
    (venv / "python").symlink_to(tmp_path / "python3")
    bash = subprocess.run(["bash", "-c", "command -v bash"], capture_output=True, text=True, check=True).stdout.strip()
    command = [bash, str(ROOT / "scripts" / "make_venv.sh"), str(tmp_path / "venv")]
    done = subprocess.run(command, env={"PATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "no C++ compiler" in done.stderr
    assert done.stderr.count("\n") == 1
