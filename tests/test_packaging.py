"""A built wheel, installed away from the checkout: what is in it, and that it finds its folders there."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from llava_genhancer.resources import NAMES

ROOT = Path(__file__).parent.parent
COPIED = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "llava_genhancer", *NAMES)


def call(*command: object, cwd: Path) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PIP_"))}
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built by way of the sdist, so that both are complete; in a copy, so that no build folder stays behind."""
    source = tmp_path_factory.mktemp("source")
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, source / name)
    call(sys.executable, "-m", "build", "--no-isolation", "--outdir", source / "dist", source, cwd=source)
    (found,) = (source / "dist").glob("*.whl")
    return found


@pytest.fixture(scope="module")
def names(wheel: Path) -> list[str]:
    return zipfile.ZipFile(wheel).namelist()


def test_nothing_lands_beside_the_package(names: list[str]) -> None:
    assert {n.split("/")[0].split("-")[0] for n in names} == {"llava_genhancer"}
    assert not [n for n in names if "__pycache__" in n or n.endswith(".pyc")]


def test_every_file_of_the_checkout_is_there(names: list[str]) -> None:
    """Tracked files, as a clone has them; an untracked one may be somebody's notes."""
    listed = subprocess.run(
        ["git", "ls-files", "llava_genhancer", "configs", "eval", "scripts"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    for name in listed.stdout.splitlines():
        inside = name if name.startswith("llava_genhancer/") else f"llava_genhancer/_resources/{name}"
        assert inside in names or not (ROOT / name).exists(), f"{name} is not in the wheel"


def test_installed_in_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    """The command, the folders and the shipped weights; torch comes from this environment through a .pth file."""
    call(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    call(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    (site,) = (tmp_path / "venv" / "lib").glob("python3*/site-packages")
    # Packages only: the editable install's own .pth file there is not read, so the checkout stays out of sight.
    (site / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "enhance" in call(python.parent / "llava-genhancer", "--help", cwd=empty)
    code = """
import llava_genhancer, sys
from pathlib import Path
from llava_genhancer.resources import NAMES, resource_dir
from llava_genhancer.errors import InputError
from llava_genhancer.toyworld.paths import resolve
package = Path(llava_genhancer.__file__).parent
assert package.is_relative_to(sys.prefix), package
assert (resource_dir("configs") / "deepspeed" / "zero2.json").is_file()
assert (resource_dir("scripts") / "enhance_then_llava.sh").is_file()
for name in NAMES:
    try:
        assert resource_dir(name).is_relative_to(package), name
    except InputError:
        print("absent:", name)
for name in ("toyworld:clip", "toyworld:vae", "toyworld:vq", "toyworld:llama"):
    assert list(Path(resolve(name)).glob("*.safetensors")), name
    assert Path(resolve(name)).is_relative_to(package)
from importlib.metadata import entry_points
from importlib.util import find_spec
if find_spec("lmms_eval"):
    assert "llava_genhancer" in entry_points(group="lmms_eval.models").names
    import lmms_eval.models
    from lmms_eval.tasks import TaskManager
    tasks = TaskManager("ERROR").task_index
    for name in ("mmvp", "cvbench", "genhancer"):
        assert Path(tasks[name]["yaml_path"]).is_relative_to(package), tasks[name]
"""
    absent = call(python, "-c", code, cwd=empty).split("absent: ")[1:]
    assert {a.strip() for a in absent} == {n for n in NAMES if not any((ROOT / n).glob("*"))}
    script = next(site.glob("llava_genhancer/_resources/scripts/enhance_then_llava.sh"))
    assert "PRESET" in call("env", f"PYTHON={python}", "bash", script, "--help", cwd=empty)
