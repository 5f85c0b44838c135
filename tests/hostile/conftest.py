"""The makers of odd files are those of ``make fuzz``, which lie beside the other benchmarks."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "benchmarks"))
