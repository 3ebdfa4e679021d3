"""What all of llm.c's binary files share: a header of 256 int32, little-endian, and a payload; and atomic writes."""

import contextlib
import os
import shlex
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from llmc.errors import UserError, explain_os_error

HEADER_INTS = 256
HEADER_BYTES = 4 * HEADER_INTS

# our header extension (from int 128 on, which llm.c ignores): [128] magic, [129] version
EXTENSION = 128
EXTENSION_MAGIC = 20261121
EXTENSION_VERSION = 1


@contextlib.contextmanager
def open_file(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """`path` opened for reading; what the system refuses becomes a UserError that names the file."""
    try:
        with open(path, "rb") as file:
            yield file
    except OSError as error:
        raise explain_os_error(error, path, "reading") from None


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A binary file that becomes `path` in one step when the block ends, or leaves `path` as it was.

    Written to a temporary file in the same folder, flushed, fsynced, renamed over `path` (or what it links to), whose
    mode it keeps; then the folder is synced. Raises UserError if the system refuses, or `path` is a folder, a device or
    read-only.
    """
    path = Path(os.path.realpath(path))
    check_replaceable(path, "writing")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, temporary)
        os.replace(temporary, path)
        if os.name == "posix":  # elsewhere a folder cannot be opened
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except OSError as error:
        raise explain_os_error(error, path, "writing") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def check_replaceable(path: str | os.PathLike, doing: str) -> None:
    """Raise UserError if `path` exists and is no file that may be written over; `doing` is the flag, or "writing".

    A file without write permission for its owner was locked by somebody. Renaming over it would not ask.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise UserError(f"{doing} {path}: not an ordinary file", "name another file")
    if path.exists() and is_read_only(path):
        raise UserError(f"{doing} {path}: is read-only", f"name another file, or: chmod u+w {shlex.quote(str(path))}")


def is_read_only(path: str | os.PathLike) -> bool:
    """Whether the file's owner, or this user, may not write it. The mode counts even for root, who may do all."""
    return not os.stat(path).st_mode & stat.S_IWUSR or not os.access(path, os.W_OK)


def check_writable(path: str | os.PathLike, flag: str) -> None:
    """Raise UserError naming `flag` unless atomic_write could make `path`: better told before an hour of training."""
    path = Path(os.path.realpath(path))
    if not path.parent.is_dir():
        raise UserError(f"{flag} {path}: there is no folder {path.parent}", f"mkdir -p {shlex.quote(str(path.parent))}")
    check_replaceable(path, flag)
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"{flag} {path}: its folder may not be written to", "check its owner and mode (ls -ld)")


def read_header(file: BinaryIO, path: str | os.PathLike, magic: int, versions: tuple[int, ...], what: str, hint: str):
    """The 256 int32 of `file`, after checking length, magic and version.

    what: the kind of file in words ("model file"); hint: the command that makes a good one.
    Raises UserError naming the file, what was found and what was expected.
    """
    raw = file.read(HEADER_BYTES)
    if len(raw) < HEADER_BYTES:
        raise UserError(f"{path}: a {what} starts with {HEADER_BYTES} bytes of header, found {len(raw)} bytes", hint)
    header = np.frombuffer(raw, "<i4").copy()
    if header[0] != magic:
        raise UserError(f"{path}: not a {what}: magic {header[0]}, expected {magic}", hint)
    if header[1] not in versions:
        expected = " or ".join(map(str, versions))
        raise UserError(f"{path}: {what} of version {header[1]}, expected {expected}", hint)
    return header


def check_size(file: BinaryIO, path: str | os.PathLike, expected: int, what: str, hint: str) -> None:
    """Raise UserError unless `file` is exactly `expected` bytes long."""
    found = os.fstat(file.fileno()).st_size
    if found != expected:
        state = "truncated" if found < expected else "too long"
        raise UserError(f"{path}: {what} is {state}: {found} bytes, its header asks for {expected}", hint)


def read_array(file: BinaryIO, out: np.ndarray) -> np.ndarray:
    """Fill the contiguous array `out` from `file`; the caller has checked the size."""
    view = memoryview(out).cast("B")
    if file.readinto(view) != len(view):
        raise UserError(f"{file.name}: shorter than its header says", "the file changed while it was read; run again")
    return out
