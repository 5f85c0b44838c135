"""Broken and hostile files by the thousand: what was tried, what held.

    make fuzz                                        # 12 000 cases of seven sorts of files, a new seed
    make fuzz ARGS="--seed 7 --kinds 'tar shards'"   # the printed seed repeats a run

A case holds if its readers return, or refuse in one printable line; within a second of processor time; within a bound
of memory; without writing outside the folder, starting a process or unpickling; and without killing the process.
"""

from __future__ import annotations

import argparse
import faulthandler
import logging
import multiprocessing
import os
import resource
import secrets
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fuzz_cases import Kind

SECONDS = 1.0  # of processor time, for one case
MEMORY = 3 << 29  # bytes above what a process has after its imports: 64 megapixels as RGBA take most of it
HANG = 60  # seconds of wall time after which a case counts as hung
WRITES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.truncate", "os.chmod")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
NEVER = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "pickle.find_class", "socket.connect")


class Finding(Exception):
    """A case that does not hold, in one line."""


class Escaped(BaseException):
    """Something was written or started that should not be; no `except Exception` hides it."""


@dataclass
class Tally:
    """What became of one sort of file. ``finding`` is "" if all cases held."""

    kind: str
    cases: int = 0
    refused: int = 0
    slowest: float = 0.0
    memory: int = 0
    finding: str = ""


class Guard:
    """Watches what this process writes and starts; audit hooks stay for good, so it is switched on and off."""

    def __init__(self) -> None:
        self.folder: str | None = None
        sys.addaudithook(self._hook)

    @contextmanager
    def confined(self, folder: Path) -> Iterator[None]:
        """Raise Escaped for what leaves ``folder``."""
        self.folder = str(folder.resolve())
        try:
            yield
        finally:
            self.folder = None

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if self.folder is None:
            return
        if event in NEVER:
            raise Escaped(f"{event} {args[:2]}")
        if (
            event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        ) or event in WRITES:
            self._inside(event, args[0])

    def _inside(self, event: str, path: Any) -> None:
        if isinstance(path, str | bytes | os.PathLike):
            where = os.path.realpath(os.fsdecode(path))
            if where != os.devnull and not f"{where}/".startswith(f"{self.folder}/"):
                raise Escaped(f"{event} {where!r}")


def attempt(kind: Kind, path: Path, data: bytes, guard: Guard, tally: Tally) -> None:
    """Give one case to its readers.

    Raises:
        Finding: it does not hold.
    """
    from llava_genhancer.data.decode import BadImage
    from llava_genhancer.errors import InputError, plain

    path.write_bytes(data)
    faulthandler.dump_traceback_later(HANG, exit=True)
    memory, started = _peak(), time.process_time()
    tally.cases += 1
    try:
        with guard.confined(path.parent):
            kind.read(path)
    except BadImage:
        tally.refused += 1
    except InputError as error:
        tally.refused += 1
        if str(error) != plain(str(error)) or len(str(error)) < 10:
            raise Finding(f"a refusal that is not one clear line: {str(error)!r}") from None
    except (Exception, Escaped) as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise Finding(
            f"{type(error).__name__} at {os.path.basename(place.filename)}:{place.lineno}: {error}"
        ) from error
    finally:
        faulthandler.cancel_dump_traceback_later()
    seconds, grown = time.process_time() - started, _peak() - memory
    tally.slowest, tally.memory = max(tally.slowest, seconds), max(tally.memory, grown)
    if seconds > SECONDS:
        raise Finding(f"{seconds:.1f} s of processor time")
    if grown > MEMORY:
        raise Finding(f"{grown >> 20} MiB of memory")


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def fuzz(kind: Kind, folder: Path, *, cases: int, seed: int, guard: Guard) -> Tally:
    """Try ``cases`` of a kind; the first that does not hold is made small, kept in its file, and ends it."""
    import hypothesis

    tally, path = Tally(kind.name), folder / kind.file
    path.parent.mkdir(parents=True, exist_ok=True)

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=cases,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink),
    )
    @hypothesis.given(kind.cases)
    def tries(data: bytes) -> None:
        attempt(kind, path, data, guard, tally)

    try:
        read_examples(kind, path)
        tries()
    except Finding as finding:
        tally.finding = str(finding)
    return tally


def drawn(kind: Kind, number: int) -> list[bytes]:
    """So many of a kind's cases, always the same ones."""
    import hypothesis

    cases: list[bytes] = []

    @hypothesis.seed(0)
    @hypothesis.settings(max_examples=number, database=None, suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.given(kind.cases)
    def keep(data: bytes) -> None:
        cases.append(data)

    keep()
    return cases


def read_examples(kind: Kind, path: Path) -> None:
    """Valid files must be read; and what readers import and keep on first use is not the cases' doing."""
    from llava_genhancer.errors import InputError

    for example in kind.examples:
        path.write_bytes(example)
        try:
            kind.read(path)
        except InputError as error:
            raise Finding(f"a valid file is refused: {error}") from None


def _work(name: str, folder: str, args: argparse.Namespace, answer: Any) -> None:
    """One kind, in a process of its own whose memory is bounded."""
    from fuzz_cases import kinds

    kind = next(k for k in kinds(Path(folder)) if k.name == name)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2 * MEMORY,) * 2)
    sys.dont_write_bytecode = True
    logging.disable()  # skipped samples are warned of
    with open(Path(folder) / "stderr", "wb") as said:  # libtiff speaks past Python
        os.dup2(said.fileno(), sys.stderr.fileno())
    tally = fuzz(kind, Path(folder), cases=args.cases, seed=args.seed, guard=Guard())
    answer.send(asdict(tally))


def main(argv: Sequence[str] | None = None) -> int:
    """Fuzz, print the table; 1 if anything did not hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cases", type=int, default=1_800, help="of each kind (default: 1 800)")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(10**9))
    parser.add_argument("--kinds", nargs="+", help="only these (default: all)")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        from fuzz_cases import kinds  # a fork of this process has it all imported

        known = [kind.name for kind in kinds(_new(Path(scratch), "names"))]
        chosen = args.kinds or known
        if unknown := sorted(set(chosen) - set(known)):
            parser.error(f"unknown kind {unknown[0]!r}; there are {', '.join(known)}")
        print(f"seed {args.seed}, {args.cases} cases of each kind", flush=True)
        tallies = []
        for name in chosen:
            tallies.append(_in_a_fork(name, _new(Path(scratch), name), args))
            print(_row(tallies[-1]), flush=True)
        held = all(not tally.finding for tally in tallies)
    print(f"{sum(tally.cases for tally in tallies)} cases: {'all held' if held else 'not all held'}")
    return 0 if held else 1


def _new(parent: Path, name: str) -> Path:
    folder = parent / name
    folder.mkdir()
    return folder


def _in_a_fork(name: str, folder: Path, args: argparse.Namespace) -> Tally:
    ours, theirs = multiprocessing.Pipe(duplex=False)
    context = multiprocessing.get_context("fork")
    child = context.Process(target=_work, args=(name, str(folder), args, theirs))
    child.start()
    theirs.close()
    tally = Tally(name, finding="the process died")
    with suppress(EOFError):
        tally = Tally(**ours.recv())
    child.join()
    if tally.finding:
        kept = Path(tempfile.mkdtemp(prefix="fuzz-finding-"))
        folder.rename(kept / "case")
        tally.finding += f" (exit {child.exitcode}; see {kept})"
    return tally


def _row(tally: Tally) -> str:
    figures = f"{tally.cases:6} tried {tally.refused:6} refused  {tally.slowest:5.2f} s  {tally.memory >> 20:5} MiB"
    return f"{tally.kind:14}{figures}  {tally.finding or 'held'}"


if __name__ == "__main__":
    sys.exit(main())
