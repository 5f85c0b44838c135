"""Eight of the kills of `make chaos`: bit-identical weights, no orphans, no lost checkpoint."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.launch
@pytest.mark.parametrize("launcher", ["plain", "torchrun"])
def test_a_kill_in_each_of_four_trainings(launcher, tmp_path) -> None:
    """Drawn anew each time; a failure's table has the seed."""
    chosen = ["--families", "kills", "--launchers", launcher, "--kills", "4", "--work", str(tmp_path)]
    command = [sys.executable, str(ROOT / "benchmarks" / "chaos"), *chosen]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    tried = [int(n) for n in re.findall(r"^\| kills \|[^|]*\| (\d+) \|.*\| yes \|$", done.stdout, re.MULTILINE)]
    assert sum(tried) == 4, done.stdout
