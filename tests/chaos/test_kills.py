"""Eight of the kills of `make chaos`: bit-identical weights, no orphans, no lost checkpoint."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.launch
def test_eight_kills_over_four_trainings(tmp_path) -> None:
    """Drawn anew each time; the seed is in the output of a failure."""
    command = [sys.executable, str(ROOT / "benchmarks" / "chaos"), "--families", "kills", "--kills", "8"]
    done = subprocess.run([*command, "--work", str(tmp_path)], capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    tried = [int(n) for n in re.findall(r"^\| kills \|[^|]*\| (\d+) \|.*\| yes \|$", done.stdout, re.MULTILINE)]
    assert sum(tried) == 8, done.stdout
