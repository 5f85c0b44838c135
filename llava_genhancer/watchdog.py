"""A rank that hangs becomes an error: every rank watches itself and says where the others were last seen.

No library's timeout does: a collective knows only that it waited, and what waits for a data worker or a disk waits for
ever. Each rank notes what it does in a small file beside the checkpoints; a thread looks at the clock.
:func:`launcher` tells a rank that nobody watches it any more.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from pathlib import Path
from types import TracebackType

STATUS = 1  # exit status, as for a rank that was lost


class Watchdog:
    """Ends the process when nothing was noted for ``seconds``; a context manager around the training.

    Args:
        folder: where ranks leave their notes; shared by all of them.
    """

    def __init__(self, folder: Path, rank: int, world_size: int, seconds: float):
        self.folder, self.rank, self.world_size, self.seconds = folder / "ranks", rank, world_size, seconds
        self._done = threading.Event()
        self._note = (time.time(), "starting")
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def note(self, doing: str) -> None:
        """Say what comes now."""
        self._note = (time.time(), doing)

    def __enter__(self) -> Watchdog:
        self.note("starting")
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            self._file(self.rank).unlink(missing_ok=True)
            self.folder.rmdir()  # the last one out

    def _file(self, rank: int) -> Path:
        return self.folder / f"{rank}.json"

    def _watch(self) -> None:
        while True:  # the first note at once: a rank may freeze in its first second
            since, doing = self._note
            with contextlib.suppress(OSError):  # a full disk is not what ends a training here
                self.folder.mkdir(parents=True, exist_ok=True)
                file = self._file(self.rank)
                file.with_suffix(".part").write_text(json.dumps([since, doing]), encoding="utf-8")
                os.replace(file.with_suffix(".part"), file)  # another rank never reads half a note
            if self._done.wait(min(5.0, self.seconds / 8)):
                return
            since, _ = self._note
            if time.time() - since > self.seconds:
                print(f"llava-genhancer: {self.report()}", file=sys.stderr, flush=True)
                os._exit(STATUS)  # the main thread is beyond reach

    def report(self) -> str:
        """One line: what this rank waits in, and which rank has been silent longest."""
        since, doing = self._note
        text = f"rank {self.rank} has been {doing} for {time.time() - since:.0f} s, more than --timeout_minutes allows"
        notes = {rank: self._read(rank) for rank in range(self.world_size) if rank != self.rank}
        mute = [str(rank) for rank, note in notes.items() if note is None]
        others = [(note, rank) for rank, note in notes.items() if note is not None]
        if mute:
            text += f"; rank {', '.join(mute)} never left a note in {self.folder}"
        elif others:
            (seen, what), rank = min(others)
            text += f"; silent longest is rank {rank}, {what}, last seen {time.time() - seen:.0f} s ago"
        return f"{text}. The same command goes on from the last checkpoint"

    def _read(self, rank: int) -> tuple[float, str] | None:
        try:
            since, doing = json.loads(self._file(rank).read_text(encoding="utf-8"))
            return float(since), str(doing)
        except (OSError, ValueError):
            return None


def launcher() -> tuple[int, ...] | None:
    """The processes above a rank that torchrun or `deepspeed` started; None without either.

    Killed, they cannot end their ranks, which would train on unattended. `deepspeed` on one node has two of them, and
    the upper one dies of a signal without passing it on.
    """
    parent = os.getppid()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return (parent,)
    try:
        if b"deepspeed.launcher.launch" in Path(f"/proc/{parent}/cmdline").read_bytes():
            stat = Path(f"/proc/{parent}/stat").read_text()
            return (parent, int(stat.rpartition(")")[2].split()[1]))
    except OSError:  # no /proc on this system
        pass
    return None
