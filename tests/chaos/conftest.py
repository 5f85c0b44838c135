"""The families of ``make chaos`` lie beside the other benchmarks."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "chaos"))
