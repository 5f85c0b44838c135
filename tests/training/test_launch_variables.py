"""The variables by which ranks find each other: one process needs none, and half a set is one line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llava_genhancer import recipes
from llava_genhancer.enhance.train import enhance
from llava_genhancer.errors import InputError
from llava_genhancer.resources import resource_dir

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
ZERO2 = str(resource_dir("configs") / "deepspeed" / "zero2.json")


@pytest.mark.parametrize("deepspeed", [None, ZERO2])
@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"RANK": "1"}, "RANK=1, but WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT are not set"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2, but RANK"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "but MASTER_ADDR, MASTER_PORT are not set"),
        ({"LOCAL_RANK": "3"}, "LOCAL_RANK=3, but"),
        ({"PMI_SIZE": "2"}, "PMI_SIZE=2: these processes would each train alone"),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0"}, "OMPI_COMM_WORLD_SIZE=4"),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}, "SLURM_STEP_NUM_TASKS=2"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two is no number"),
        (dict(zip(NAMES, ("2", "2", "0", "127.0.0.1", "29500"), strict=True)), "RANK=2 must be below WORLD_SIZE=2"),
    ],
)
def test_half_a_launch_is_refused(variables, words, deepspeed, tiny_fields, tmp_path, monkeypatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="start with torchrun or deepspeed") as caught:
        enhance(recipes.override(recipes.Recipe(), tiny_fields), tmp_path / "run", deepspeed=deepspeed)
    assert words in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.launch
@pytest.mark.parametrize("variables", [{}, {"LOCAL_RANK": "0", "PMI_SIZE": "1", "MASTER_ADDR": "localhost"}])
def test_deepspeed_without_a_launcher_is_one_process(variables, tiny_fields, tmp_path: Path) -> None:
    fields = {**tiny_fields, "stage1.max_steps": 1, "stage2.max_steps": 1, "sample_images": 0}
    fields |= {"stage2.snapshot_steps": ""}
    command = [sys.executable, "-m", "llava_genhancer", "enhance", "tiny", f"--output_dir={tmp_path / 'run'}"]
    command += [f"--{name}={value}" for name, value in fields.items()]
    environment = {**{k: v for k, v in os.environ.items() if k not in NAMES}, **variables}
    environment |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command += ["--deepspeed", ZERO2]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "run" / "tower" / "model.safetensors").is_file()
