"""What every family of faults needs: tiny trainings, what they leave, small disks, and the words of a result."""

from __future__ import annotations

import os
import subprocess
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from llava_genhancer import run

COMMON = {"num_workers": 1, "seed": 0}
SAVE_STEPS = 5
# Each training: its verb, its folder in the run, and the files that must come out bit-identical.
RESULTS = {
    "stage1": ("stage1/weights.safetensors",),
    "stage2": ("stage2/weights.safetensors", "tower/model.safetensors"),
    "pretrain": ("llava-pretrain/weights.safetensors",),
    "finetune": ("llava-finetune/weights.safetensors", "llava-finetune/hf/model.safetensors"),
}
FOLDERS = {"stage1": "stage1", "stage2": "stage2", "pretrain": "llava-pretrain", "finetune": "llava-finetune"}


class TooSlow(Exception):
    """A command was still at work when its time was up, so that nothing can be concluded about the fault."""


@dataclass
class Outcome:
    """A row of the table: how often a fault was tried, what did not hold, and what the machine was too slow for."""

    family: str
    fault: str
    must: str  # what has to hold
    tried: int = 0
    broken: list[str] = field(default_factory=list)
    slow: list[str] = field(default_factory=list)
    skipped: str = ""

    def check(self, holds: bool, what: str) -> bool:
        """Note ``what`` where it does not hold."""
        if not holds:
            self.broken.append(what)
        return holds

    @contextmanager
    def complaints(self) -> Iterator[None]:
        """What the tool itself raises did not hold either; the next fault's turn comes all the same."""
        try:
            yield
        except TooSlow as error:
            self.slow.append(str(error))
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            said = f"{type(error).__name__} at {Path(place.filename).name}:{place.lineno}: {error}"
            self.broken.append(" ".join(said.split())[:300])

    @property
    def verdict(self) -> str:
        """The last cell."""
        if self.skipped:
            return f"not run: {self.skipped}"
        if self.broken:
            return f"**no** ({len(self.broken)})"
        if self.slow:
            return f"too slow to judge ({len(self.slow)})"
        return "yes" if self.tried else "**not tried**"

    @property
    def held(self) -> bool:
        """Whether nothing is wrong; what was never tried says nothing."""
        return bool(self.skipped) or (self.tried > 0 and not self.broken and not self.slow)

    @property
    def unjudged(self) -> bool:
        """Whether nothing failed, and only the machine's speed left something open."""
        return bool(self.slow) and not self.broken


def enhance_fields(steps: int, **changes: object) -> dict[str, object]:
    """An enhancement of the toy world's CLIP, both stages of so many steps of some milliseconds."""
    fields: dict[str, object] = {
        **COMMON,
        "global_batch_size": 8,
        "per_device_batch_size": 4,
        "sample_images": 0,
        "stage2.snapshot_steps": "",
    }
    for stage in ("stage1", "stage2"):
        fields |= {f"{stage}.max_steps": steps, f"{stage}.save_steps": SAVE_STEPS, f"{stage}.log_steps": 1}
        fields |= {f"{stage}.warmup_steps": 0}
    return {**fields, **changes}


def llava_fields(steps: int, **changes: object) -> dict[str, object]:
    """Both steps of the toy world's LLaVA."""
    fields: dict[str, object] = dict(COMMON)
    for step in ("pretrain", "finetune"):
        fields |= {f"{step}.global_batch_size": 8, f"{step}.per_device_batch_size": 4, f"{step}.max_steps": steps}
        fields |= {f"{step}.save_steps": SAVE_STEPS, f"{step}.log_steps": 1}
    return {**fields, **changes}


def arguments(training: str, run_dir: Path, steps: int, **changes: object) -> list[str]:
    """What follows ``llava-genhancer`` for one of the four trainings."""
    if training in ("stage1", "stage2"):
        verb, fields = ["enhance", "tiny"], enhance_fields(steps, **changes)
    else:
        verb, fields = ["llava", training, "tiny"], llava_fields(steps, **changes)
    return [*verb, "--output_dir", str(run_dir), *(f"--{name}={value}" for name, value in fields.items())]


def step_of(checkpoint: Path | None) -> int:
    """Its number, 0 for none."""
    return int(checkpoint.name.split("-")[1]) if checkpoint else 0


def newest(stage_dir: Path) -> int:
    """Step of the newest checkpoint that has its marker; quick, for watching."""
    return max((step_of(p) for p in run.checkpoints(stage_dir) if (p / run.MARKER).exists()), default=0)


def hashes(run_dir: Path, trainings: tuple[str, ...]) -> dict[str, str]:
    """SHA-256 of every result of the trainings; an absent file has the hash ``absent``."""
    names = [name for training in trainings for name in RESULTS[training]]
    return {n: run.sha256(run_dir / n) if (run_dir / n).is_file() else "absent" for n in names}


def mounts() -> bool:
    """Whether this user can mount a small disk."""
    return os.geteuid() == 0 and subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode == 0


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[Path]:
    """A tmpfs of its own at ``folder``, which takes no byte more."""
    folder.mkdir(parents=True, exist_ok=True)
    mount("-t", "tmpfs", "-o", f"size={megabytes}m", "none", str(folder))
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def mount(*arguments: str) -> None:
    """The system's command."""
    subprocess.run(["mount", *arguments], check=True)
