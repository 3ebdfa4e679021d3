"""The log file of -o: one line an event, as train_gpt2_fp32.cu and llmc/logger.h write it.

s:20 tel:4.5123      validation loss after 20 updates
s:20 trl:4.4987      training loss of step 20 (0-based)
"""

import os
import re

from llmc.errors import UserError, explain_os_error
from llmc.files import atomic_write, open_file

LINE = re.compile(rb"s:(\d{1,10}) [a-z]+:\S.*\n")


class Logger:
    """Write the log to `path`; None writes nothing.

    A run from step 0 empties the file. One resumed at step `start` keeps the lines of earlier steps and drops those
    that the killed run wrote after its last checkpoint, so that the joined log equals one of a run never stopped.
    Raises UserError if the file cannot be written, or holds something else than a log. Make it after all other checks.
    """

    def __init__(self, path: str | os.PathLike | None, start: int = 0):
        self.path, self.file = path, None
        if path is None:
            return
        if os.path.isfile(path) and (dropped := drop_steps_from(path, start)):
            print(f"{path}: dropped {dropped} of its lines, from step {start} on")
        try:
            # unbuffered: a line is in the file when the call returns, and none is half-written by a failing flush
            self.file = open(path, "ab", buffering=0)
        except OSError as error:
            raise refused(error, path) from None

    def val(self, step: int, loss: float) -> None:
        """Validation loss after `step` updates."""
        self._write(f"s:{step} tel:{loss:.4f}\n")

    def train(self, step: int, loss: float) -> None:
        """Training loss of the 0-based `step`."""
        self._write(f"s:{step} trl:{loss:.4f}\n")

    def add(self, name: str, step: int, value: float) -> None:
        """Another figure after `step` updates, a line that llm.c's readers pass over; `name` is a word of a-z."""
        self._write(f"s:{step} {name}:{value:.4f}\n")

    def close(self) -> None:
        if self.file:
            self.file.close()

    def _write(self, line: str) -> None:
        if self.file:
            try:
                self.file.write(line.encode())
            except OSError as error:
                raise refused(error, self.path) from None


def drop_steps_from(path: str | os.PathLike, step: int) -> int:
    """Remove the lines of `step` and later from the log `path`, atomically, and return how many those were.

    Raises UserError on a line that is not a log's. Only a last line without its end is let pass, as a killed run may
    leave one, and only if its step is among those that go.
    """
    with open_file(path) as file:
        lines = file.read().splitlines(keepends=True)
    kept = []
    for number, line in enumerate(lines, 1):
        match = LINE.fullmatch(line) or (number == len(lines) and re.match(rb"s:(\d{1,10}) [^\n]*\Z", line))
        if not match or (int(match[1]) < step and not line.endswith(b"\n")):
            raise UserError(
                f"-o {path}: line {number} is {line[:60]!r}, expected s:STEP tel:LOSS or s:STEP trl:LOSS",
                "name another log by -o, or mend that line",
            )
        if int(match[1]) < step:
            kept.append(line)
    if len(kept) < len(lines):
        with atomic_write(os.path.realpath(path)) as file:
            file.writelines(kept)
    return len(lines) - len(kept)


def refused(error: OSError, path: str | os.PathLike) -> UserError:
    """The UserError for a log that the system will not let us write."""
    told = explain_os_error(error, path, "writing -o")
    if isinstance(error, FileNotFoundError):
        told.hint = f"make its folder first: mkdir -p {os.path.dirname(path)}"
    return told
