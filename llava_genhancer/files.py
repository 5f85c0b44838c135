"""Files and folders that are either absent or whole: staging under unique names, locks, hashes.

A staged file or folder is written beside its target under a name that no other process uses, and renamed at the end.
The name contains the process that writes: after a kill, whoever stages the same target next removes what was left.

This module needs the standard library alone, and runs on Python 3.10.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import socket
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from llava_genhancer.errors import InputError, disk_failure

log = logging.getLogger(__name__)
SUFFIX = ".partial"
FORGOTTEN = 24 * 3600.0  # seconds without a change after which another host's staged file is taken for a leftover
# What flock raises on file systems that have none (Lustre without its mount option, NFS without its lock service).
NO_FLOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)
NO_HARD_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EMLINK)
LONGEST_NAME = 180  # bytes of a target's name that its staged name repeats; a file name has 255 at most
BLOCK = 1 << 19  # bytes read at a time: what a processor's cache holds


# --- processes ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Process:
    """A process of any host.

    Attributes:
        host: 8 hex digits that differ between hosts, between boots of a host, and between containers.
        start: the kernel's start time of the process, which tells it from a later process with the same pid.
    """

    host: str
    pid: int
    start: int

    def __str__(self) -> str:
        return f"{self.host}-{self.pid}-{self.start}"

    @staticmethod
    def current() -> Process:
        """The calling process."""
        return Process(_host(), os.getpid(), _start(os.getpid()) or 0)

    @staticmethod
    def parse(text: str) -> Process | None:
        """The inverse of ``str``; None for any other text."""
        found = re.fullmatch(r"([0-9a-f]{8})-(\d{1,10})-(\d{1,20})", text)
        return Process(found[1], int(found[2]), int(found[3])) if found else None

    def ended(self) -> bool | None:
        """Whether the process has ended; None where that cannot be found out, for a process of another host."""
        if self.host != _host():
            return None
        start = _start(self.pid)
        if start is not None:
            return start != self.start
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except (OSError, OverflowError):
            return False
        return os.path.isdir("/proc/self")  # a zombie has no start time


@functools.cache
def _host() -> str:
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text())
    with contextlib.suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:8]


def _start(pid: int) -> int | None:
    """Clock ticks between boot and the process's start; None for a zombie, or where /proc does not list it."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state in "ZX" else int(fields[18])
    except (OSError, ValueError, IndexError):
        return None


# --- staging ------------------------------------------------------------------------------------------------------


def beside(path: Path) -> Path:
    """A hidden name beside ``path`` that no other process or thread uses."""
    name = os.fsencode(path.name)
    stem = path.name if len(name) <= LONGEST_NAME else hashlib.sha256(name).hexdigest()[:16]
    return path.with_name(f".{stem}.{Process.current()}-{secrets.token_hex(3)}{SUFFIX}")


def remove_leftovers(folder: Path) -> None:
    """Remove what ended processes have staged in ``folder``.

    What another host's process has staged is removed once nothing in it has changed for a day.
    """
    staged = re.compile(rf"\..+\.([0-9a-f]{{8}}-\d+-\d+)-[0-9a-f]{{6}}{re.escape(SUFFIX)}", re.DOTALL)
    with contextlib.suppress(OSError):
        for entry in list(os.scandir(folder)):
            found = staged.fullmatch(entry.name)
            writer = Process.parse(found[1]) if found else None
            ended = writer is not None and writer.ended()
            if ended or (ended is None and time.time() - _last_change(Path(entry.path)) > FORGOTTEN):
                _remove(Path(entry.path))


def _last_change(path: Path) -> float:
    """Seconds since 1970 of the last change of a file, or of a folder and all in it."""
    changes = [0.0]
    for each in (path, *path.rglob("*")):
        with contextlib.suppress(OSError):
            changes.append(each.lstat().st_mtime)
    return max(changes)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


@contextlib.contextmanager
def staged_file(path: str | os.PathLike) -> Iterator[Path]:
    """A new file beside ``path`` to write into, which replaces ``path`` at the end of the block.

    The file reaches the disk before it is renamed, and its mode follows the umask whatever a library has set. After
    an exception ``path`` is as before, and nothing else is left.
    """
    path = Path(path)
    staging = beside(path)
    mode = _create(staging)
    try:
        yield staging
        _settle(staging, mode)
        os.replace(staging, path)
    except BaseException:
        _remove(staging)
        raise


@contextlib.contextmanager
def staged_folder(path: str | os.PathLike, *, keep: Callable[[Path], bool] | None = None) -> Iterator[Path]:
    """A new folder beside ``path`` to write into, which replaces ``path`` at the end of the block.

    Any number of processes may stage the same folder at once: each writes into its own, and ``path`` is whole at
    every moment. Files reach the disk before the renaming, and their modes follow the umask.

    Args:
        keep: whether a folder that another process has put there meanwhile stays; the own one is then dropped.
            Without it the last process replaces the others' folders.

    Raises:
        InputError: the folder cannot be written.
    """
    path = Path(path)
    staging = beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent)
        staging.mkdir()  # not mkdtemp, whose folders have mode 0700 whatever the umask
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}") from None
    try:
        yield staging
        settle_folder(staging)
        _put(staging, path, keep)
    except Exception as error:
        why = None if isinstance(error, InputError) else disk_failure(error)
        if why is not None:
            advice = "make room or choose another folder, then repeat the command"
            raise InputError(f"{path} cannot be written: {why}: {advice}") from None
        raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def settle_folder(folder: Path) -> None:
    """Have all files of a folder reach the disk, with the mode that the umask gives to new files.

    Libraries set other modes: safetensors 0.8 writes files that their owner alone may read.
    """
    probe = beside(folder / "mode")
    mode = _create(probe)
    probe.unlink()
    for parent, _, names in os.walk(folder):
        for name in names:
            _settle(Path(parent, name), mode)
        _sync(Path(parent))


def _create(path: Path) -> int:
    """Create an empty file and return its mode."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        return stat.S_IMODE(os.fstat(fd).st_mode)
    finally:
        os.close(fd)


def _settle(path: Path, mode: int) -> None:
    if path.is_symlink():
        return
    if stat.S_IMODE(path.stat().st_mode) != mode:
        os.chmod(path, mode)
    _sync(path)


def _sync(path: Path) -> None:
    try:
        fd = os.open(path, os.O_RDONLY)
    except PermissionError:  # a umask that takes the owner's right to read
        return
    try:
        os.fsync(fd)
    except OSError as error:
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):
            raise  # some file systems sync files alone
    finally:
        os.close(fd)


def _put(staging: Path, path: Path, keep: Callable[[Path], bool] | None) -> None:
    """Rename a folder over another one, whoever else is doing the same at this moment."""
    while True:
        try:
            os.rename(staging, path)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise InputError(f"{path} cannot be written: {error.strerror or error}") from None
        if keep is not None and keep(path):
            return
        aside = beside(path)
        try:
            os.rename(path, aside)  # one step: nobody sees half a folder, as while it is being removed
        except FileNotFoundError:
            continue  # another process was faster
        try:
            os.rename(staging, path)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                os.rename(aside, path)
                raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)


# --- locks --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def locked(path: str | os.PathLike, subject: str, *, wait: float = 0.0) -> Iterator[None]:
    """Hold a lock that one process at a time can hold; it ends with the process, however that ends.

    The lock is flock's. On a file system without flock a file beside ``path`` names the process that holds the lock:
    it is replaced once that process has ended, if it ran on this host.

    Args:
        path: the lock's file, which stays.
        subject: what is locked, for messages.
        wait: seconds to wait for another process.

    Raises:
        InputError: another process holds the lock, or the file cannot be written.
    """
    path = Path(path)
    deadline = time.monotonic() + wait
    try:
        handle = open(path, "a+")  # noqa: SIM115 - held open for the lock's lifetime
    except OSError as error:
        raise InputError(f"{subject} cannot be created or written: {error.strerror or error}") from None
    os.register_at_fork(after_in_child=handle.close)  # else a data worker that outlives a kill keeps the lock
    with handle:
        while True:
            missing = _flock(handle.fileno(), subject)
            if missing is None:
                yield
                return
            if missing in NO_FLOCK:
                break
            if time.monotonic() >= deadline:
                raise InputError(f"{subject} is in use by another process: wait for it, or choose another folder")
            time.sleep(0.2)
        log.warning(
            "%s: no flock on this file system (%s); the lock is a file that names its process", subject,
            os.strerror(missing),
        )  # fmt: skip
        with _lock_file(path.with_name(f"{path.name}.process"), subject, deadline):
            yield


def _flock(fd: int, subject: str) -> int | None:
    """Try to lock; None where that succeeded, else the error's number."""
    try:
        import fcntl
    except ImportError:  # not on this system
        return errno.ENOSYS
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return None
    except BlockingIOError:
        return errno.EWOULDBLOCK
    except OSError as error:
        if error.errno in NO_FLOCK:
            return error.errno
        raise InputError(f"{subject} cannot be locked: {error.strerror or error}") from None


@contextlib.contextmanager
def _lock_file(path: Path, subject: str, deadline: float) -> Iterator[None]:
    """Hold a lock as a file that exists while it is held."""
    process = Process.current()
    mine = json.dumps(
        {"process": str(process), "host": socket.gethostname(), "pid": process.pid, "lock": secrets.token_hex(8)}
    )
    try:
        while not _create_with(path, mine):
            holder = _read(path)
            if holder is None:
                continue  # it has just ended
            if _holder_ended(holder) and _take_over(path, holder, mine):
                break
            if time.monotonic() >= deadline:
                who = f"process {holder.get('pid', '?')} on {holder.get('host', 'an unknown host')}"
                raise InputError(
                    f"{subject} is in use by another process ({who}): wait for it, or choose another folder; if that "
                    f"process does not run any more, remove {path}*"
                )
            time.sleep(0.2)
    except OSError as error:
        raise InputError(f"{subject} cannot be locked: {error.strerror or error}") from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if os.getpid() == process.pid and path.read_text(encoding="utf-8") == mine:
                path.unlink()


def _create_with(path: Path, content: str) -> bool:
    """Create a file with its content in one step; False if there is one already."""
    staging = beside(path)
    _create(staging)
    try:
        staging.write_text(content, encoding="utf-8")
        try:
            os.link(staging, path)
        except FileExistsError:
            return False
        except OSError as error:
            if staging.stat().st_nlink == 2:  # NFS: done, though its answer was lost
                return True
            if error.errno not in NO_HARD_LINKS:
                raise
            try:
                _create(path)
            except FileExistsError:
                return False
            path.write_text(content, encoding="utf-8")
        return True
    finally:
        _remove(staging)


def _read(path: Path) -> dict[str, object] | None:
    """What a lock file says; {} where it cannot be understood, None where it is gone."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return content if isinstance(content, dict) else {}
    except FileNotFoundError:
        return None
    except ValueError:
        return {}


def _holder_ended(holder: Mapping[str, object]) -> bool:
    process = Process.parse(str(holder.get("process")))
    return bool(process is not None and process.ended())


def _take_over(path: Path, holder: Mapping[str, object], mine: str) -> bool:
    """Replace an ended process's lock file by ``mine``; False where another process is doing so.

    Whoever creates the claim named after the ended holder's lock is alone in replacing that lock: each lock has a
    name of its own, and a claim that comes late finds another lock in the file.
    """
    claim = path.with_name(f"{path.name}.{holder.get('lock')}")
    if not _create_with(claim, mine):
        return False
    try:
        if _read(path) != holder:
            return False
        staging = beside(path)
        _create(staging)
        staging.write_text(mine, encoding="utf-8")
        os.replace(staging, path)
        return True
    finally:
        _remove(claim)


# --- hashes -------------------------------------------------------------------------------------------------------


def sha256(path: str | os.PathLike, progress: Callable[[int], None] | None = None) -> str:
    """Hex SHA-256 of a file's content; ``progress`` is called with the number of bytes after each block."""
    digest, block = hashlib.sha256(), memoryview(bytearray(BLOCK))
    with open(path, "rb", buffering=0) as f:
        while size := f.readinto(block):
            digest.update(block[:size])
            if progress is not None:
                progress(size)
    return digest.hexdigest()


def hash_files(
    folder: Path,
    names: list[str],
    *,
    threads: int = 0,
    sync: bool = False,
    progress: Callable[[int], None] | None = None,
) -> dict[str, dict[str, object]]:
    """Size and SHA-256 of some files of a folder, several files at a time.

    Args:
        names: paths below ``folder``.
        threads: 0 chooses as many as there are processors, 8 at most; OpenSSL hashes without Python's lock.
        sync: have each file reach the disk first.
        progress: called, from any thread, with the number of bytes after each block.

    Returns:
        By name ``{"bytes": ..., "sha256": ...}``, in the order of ``names``.
    """

    def one(name: str) -> dict[str, object]:
        path = folder / name
        if sync:
            _sync(path)
        return {"bytes": path.stat().st_size, "sha256": sha256(path, progress)}

    threads = threads or min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(max(1, min(threads, len(names))), thread_name_prefix="sha256") as pool:
        # The largest first: a thread that starts with it last would work alone in the end.
        order = sorted(names, key=lambda name: -(folder / name).stat().st_size)
        tasks = {name: pool.submit(one, name) for name in order}
        return {name: tasks[name].result() for name in names}


# --- paths as users write them ---------------------------------------------------------------------------------------


def expand(path: str | os.PathLike) -> str:
    """Return ``path`` with a leading ``~`` or ``~user`` replaced by the home folder; names and hub ids stay.

    The shell leaves ``~`` alone in ``--output_dir=~/run``, in quotes and in JSON.

    Raises:
        InputError: ``~user`` names no user of this machine.
    """
    expanded = os.path.expanduser(os.fspath(path))
    if expanded.startswith("~"):
        user = expanded.partition("/")[0]
        raise InputError(f"{path}: {user} is no user's home folder here; write ./{path} for a path of that name")
    return expanded
