"""What a run writes, -c and -o, checked and locked before it starts: it may not damage another run's work, nor its own.

A file that is there already stays, unless the run resumes it or was told --overwrite 1. Whatever is dropped is told in
a printed line.
"""

import os
import shlex
from argparse import Namespace
from pathlib import Path

from llmc import lock
from llmc.checkpoint import check_is_model
from llmc.errors import UserError
from llmc.files import check_replaceable, check_writable
from llmc.resume import base_name, other_spelling


def check_outputs(args: Namespace, typed: set[str]) -> None:
    """Raise UserError unless -c and -o may be written; lock them, and say what will be replaced.

    typed: the names of the flags that were given. Call it before anything is written.
    """
    for flag, path, others in (
        ("-c", args.checkpoint, {} if args.resume else {"-e": args.model}),
        ("-o", args.log, {"-c": args.checkpoint, "-e": args.model}),
    ):
        for other, name in others.items():
            if path and name and same_file(path, name):
                raise UserError(f"{flag} {path}: is the file of {other}, too", f"name another file by {flag}", 2)
    if args.checkpoint:
        check_checkpoint(args)
    if args.log:
        check_log(args, typed)


def check_checkpoint(args: Namespace) -> None:
    """The part about -c."""
    path = args.checkpoint
    check_writable(path, "-c")
    lock.acquire(path, "-c", base_name(Path(os.path.realpath(path))))  # run and run.bin have their states in common
    twin = other_spelling(path)
    if twin.exists():
        raise UserError(f"-c {path}: {twin} beside it keeps its state under the same name", "choose another name", 2)
    if not os.path.exists(path) or (args.resume and same_file(path, args.resume)):
        return
    check_is_model(path, "-c")
    if not args.overwrite:
        hint = f"--resume {shlex.quote(path)} goes on with it, another -c leaves it, --overwrite 1 replaces it"
        raise UserError(f"-c {path}: exists already", hint, 2)
    print(f"{path} exists: the first save of this run replaces it")


def check_log(args: Namespace, typed: set[str]) -> None:
    """The part about -o. A resumed run goes on with the log it had; any other log that has lines is another's."""
    path = args.log
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        return  # a pipe or a device, as /dev/null, keeps nothing
    check_replaceable(path, "-o")
    if os.path.isdir(os.path.dirname(path) or "."):  # else Logger says what is missing
        lock.acquire(path, "-o")
    own = args.resume and "log" not in typed
    if not own and not args.overwrite and os.path.exists(path) and os.path.getsize(path):
        hint = f"another -o leaves it, --overwrite 1 {'goes on with' if args.resume else 'replaces'} it"
        raise UserError(f"-o {path}: exists already", hint, 2)
    if own and not os.path.exists(path):
        print(f"{path} is gone: a new log begins with this run")


def same_file(a: str, b: str) -> bool:
    """Whether both names lead to one file, there already or not."""
    if os.path.exists(a) and os.path.exists(b):
        return os.path.samefile(a, b)
    return os.path.realpath(a) == os.path.realpath(b)
