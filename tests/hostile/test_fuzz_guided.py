"""The guided driver knows every sort of file, and a planted fault comes out as a finding with its file."""

import subprocess
import sys
from pathlib import Path

import fuzz_guided
import pytest
from fuzz_cases import kinds

PLANTED = """
import sys
from pathlib import Path
sys.path[:0] = {path!r}
import fuzz_cases, fuzz_guided
decode = fuzz_cases.decode
def faulty(data):
    if isinstance(data, bytes) and data[:1] == b"\\0":
        raise ZeroDivisionError("planted")
    return decode(data)
fuzz_cases.decode = faulty
fuzz_guided.guided("images", ["-max_total_time=60", "-seed=1"], Path(sys.argv[1]) / "corpus")
"""


def test_it_knows_every_sort(tmp_path: Path) -> None:
    assert tuple(kind.name for kind in kinds(tmp_path)) == fuzz_guided.TARGETS
    with pytest.raises(SystemExit, match="no 'tars'; there are images, tar shards"):
        fuzz_guided.main(["tars"])


@pytest.mark.slow
def test_a_planted_fault_is_found_and_its_file_kept(tmp_path: Path) -> None:
    pytest.importorskip("atheris")
    code = PLANTED.format(path=[str(Path(fuzz_guided.__file__).parent), str(fuzz_guided.ROOT)])
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode not in (0, 1), done.stderr[-2000:]
    assert "Finding: ZeroDivisionError" in done.stdout
    (found,) = tmp_path.glob("crash-*")
    assert found.read_bytes()[:1] == b"\0"
