"""What a run writes, checked and locked before it starts: it may not damage another run's work, nor its own.

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
    """Raise UserError unless -c, -o and --log-json may be written; lock them, and say what will be replaced.

    typed: the names of the flags that were given. Call it before anything is written.
    """
    for flag, path, others in (
        ("-c", args.checkpoint, {} if args.resume else {"-e": args.model}),
        ("-o", args.log, {"-c": args.checkpoint, "-e": args.model}),
        ("--log-json", args.log_json, {"-o": args.log, "-c": args.checkpoint, "-e": args.model}),
    ):
        for other, name in others.items():
            if path and name and same_file(path, name):
                raise UserError(f"{flag} {path}: is the file of {other}, too", f"name another file by {flag}", 2)
    if args.checkpoint:
        check_checkpoint(args)
    for flag, name in (("-o", "log"), ("--log-json", "log_json")):
        if getattr(args, name):
            check_log(args, flag, getattr(args, name), bool(args.resume) and name not in typed)


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


def check_log(args: Namespace, flag: str, path: str, own: bool) -> None:
    """The part about a log. own: it is the one that a resumed run had; any other that has lines is another's."""
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        return  # a pipe or a device, as /dev/null, keeps nothing
    check_replaceable(path, flag)
    if os.path.isdir(os.path.dirname(path) or "."):  # else Logger says what is missing
        lock.acquire(path, flag)
    if not own and not args.overwrite and os.path.exists(path) and os.path.getsize(path):
        hint = f"another {flag} leaves it, --overwrite 1 {'goes on with' if args.resume else 'replaces'} it"
        raise UserError(f"{flag} {path}: exists already", hint, 2)
    if own and not os.path.exists(path):
        print(f"{path} is gone: a new log begins with this run")


def same_file(a: str, b: str) -> bool:
    """Whether both names lead to one file, there already or not."""
    if os.path.exists(a) and os.path.exists(b):
        return os.path.samefile(a, b)
    return os.path.realpath(a) == os.path.realpath(b)
