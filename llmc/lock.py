"""Locks that die with their process, so that two runs never write the same file at once.

A lock on run.bin is an flock on the hidden file .run.lock beside it, which holds the process's number and is removed
when the run ends. The system drops an flock when its process ends, however it ends: after kill -9 the file may stay,
but it locks nothing. Where there is no flock (Windows) nothing is locked.
"""

import atexit
import contextlib
import os
import socket
import sys
from pathlib import Path

from llmc.errors import UserError, explain_os_error

try:
    import fcntl
except ImportError:
    fcntl = None

_held: dict[Path, int] = {}  # lock file -> its descriptor


def acquire(path: str | os.PathLike, flag: str, name: str | None = None) -> None:
    """Hold the lock on `path` until the process ends; a process that has it already goes on.

    flag: what asked for the file, for the message. name: what the lock is called after, the file's name by default.
    Raises UserError if another process holds it, or the lock file cannot be made.
    """
    path = Path(os.path.realpath(path))
    lock = path.with_name(f".{name or path.name}.lock")
    if fcntl is None or lock in _held:
        return
    try:
        while lock not in _held:
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                owner = os.read(descriptor, 200).decode(errors="replace").strip()
                os.close(descriptor)
                raise UserError(
                    f"{flag} {path}: another run is writing it ({owner or 'process unknown'})",
                    "wait for its end, stop it, or name another file",
                ) from None
            except OSError as error:
                os.close(descriptor)
                print(f"{lock}: cannot be locked ({error.strerror}); keep other runs away from it", file=sys.stderr)
                return
            if _is_at(lock, descriptor):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
                _held[lock] = descriptor
            else:  # its owner removed the file between our two calls
                os.close(descriptor)
    except OSError as error:
        raise explain_os_error(error, lock, "making the lock") from None


def release_all() -> None:
    """Give every lock of this process back and remove its file."""
    while _held:
        lock, descriptor = _held.popitem()
        with contextlib.suppress(OSError):
            lock.unlink()
        os.close(descriptor)


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether the open file is still the one under this name."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


atexit.register(release_all)
