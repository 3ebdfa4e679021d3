"""Errors that a user can mend, and the one place that prints them."""

import os
import sys
import traceback
from collections.abc import Callable

from llmc import startup


class UserError(Exception):
    """What was found and what was expected, naming the file or flag; `hint` is the command or change that helps."""

    def __init__(self, message: str, hint: str | None = None, exit_code: int = 1):
        super().__init__(message)
        self.message, self.hint, self.exit_code = message, hint, exit_code


def explain_os_error(error: OSError, path: str | os.PathLike, doing: str) -> UserError:
    """An OSError while `doing` ("reading", "writing") `path`, as a UserError with the system's reason."""
    hints = {
        "FileNotFoundError": "check the path, or make the file first (make data, make model)",
        "PermissionError": "check the owner and mode of the file and of its folder (ls -l)",
        "IsADirectoryError": "name a file, not a folder",
        "NotADirectoryError": "one part of the path is a file, not a folder",
    }
    hint = hints.get(type(error).__name__)
    if hint is None:
        hint = "free some disk space (df -h) and run again" if error.errno in (28, 122) else "see the reason above"
    return UserError(f"{doing} {os.fspath(path)}: {error.strerror or error}", hint)


def tell(error: UserError) -> None:
    """Print `error: ...` and `---> HINT: ...` on stderr."""
    print(*told(error), sep="\n", file=sys.stderr)


def told(error: UserError) -> list[str]:
    """The lines that tell of it."""
    return [f"error: {error.message}"] + ([f"---> HINT: {error.hint}"] if error.hint else [])


def end_others(code: int, lines: list[str]) -> None:
    """What an error, told in `lines`, does to other processes; llmc/ranks.py puts its own in this one's place."""


def run(main: Callable[[], int | None]) -> None:
    """Call `main` and exit: 0 or its return value, 1 (or the error's code) after a UserError, 130 after Ctrl-C.

    A UserError prints `error: ...` and `---> HINT: ...` on stderr, never a traceback. A closed pipe ends quietly.
    """
    # whole lines at once also into a pipe, and a file name that is no valid UTF-8 may be printed
    # a stream that the caller closed is None, and a file opened later would get its number
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))
    sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    sys.stderr.reconfigure(errors="backslashreplace")
    lines = []
    try:
        startup.end()  # in here Ctrl-C is told below
        code = main() or 0
        sys.stdout.flush()
    except UserError as error:
        sys.stdout.flush()
        tell(error)
        code, lines = error.exit_code, told(error)
    except BrokenPipeError:  # `... | head`: nobody reads on; keep Python's shutdown from flushing into the pipe again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        code = 130
    except OSError as error:  # of stdout: a file's is a UserError by now
        print(f"error: writing the output: {error.strerror}\n---> HINT: is the disk full (df -h)?", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except MemoryError as error:
        lines = [f"error: out of memory: {error}", "---> HINT: lower -b or -t, or take a smaller model"]
        print(*lines, sep="\n", file=sys.stderr)
        code = 1
    except Exception:  # a mistake of ours; of several ranks the others must not wait for this one
        lines = traceback.format_exc().splitlines()
        print(*lines, sep="\n", file=sys.stderr)
        code = 1
    if lines:
        end_others(code, lines)
    sys.exit(code)
