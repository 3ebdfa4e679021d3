"""What a run writes down, one line an event: the log of -o, as train_gpt2_fp32.cu and llmc/logger.h write it,

s:20 tel:4.5123      validation loss after 20 updates
s:20 trl:4.4987      training loss of step 20 (0-based)

and that of --log-json, with all digits and more figures:

{"step": 20, "val_loss": 4.512345790863037}
{"step": 20, "train_loss": 4.49868106842041, "lr": 0.0003, "ms": 101.2, "tokens_per_second": 2529.6}
"""

import json
import os
import re

from llmc.errors import UserError, explain_os_error
from llmc.files import atomic_write, open_file

# a whole line and its step; what a killed run may leave without an end, and its step
LINE = re.compile(rb"s:(\d{1,10}) [a-z]+:\S.*\n")
TORN_LINE = re.compile(rb"s:(\d{1,10}) [^\n]*\Z")
JSON_LINE = re.compile(rb'\{"step": (\d{1,10}), .*\}\n')
TORN_JSON_LINE = re.compile(rb'\{"step": (\d{1,10}), [^\n]*\Z')


class Logger:
    """Write the log to `path` and the JSON lines to `json_path`; None writes nothing.

    A run from step 0 empties the files. One resumed at step `start` keeps the lines of earlier steps and drops those
    that the killed run wrote after its last checkpoint, so that the joined log equals one of a run never stopped.
    Raises UserError if a file cannot be written, or holds something else than a log. Make it after all other checks.
    """

    def __init__(self, path: str | os.PathLike | None, start: int = 0, json_path: str | os.PathLike | None = None):
        self.path, self.json_path = path, json_path
        self.file = opened(path, start, "-o", (LINE, TORN_LINE), "s:STEP tel:LOSS or s:STEP trl:LOSS")
        self.json_file = opened(
            json_path, start, "--log-json", (JSON_LINE, TORN_JSON_LINE), '{"step": STEP, "train_loss": LOSS ...}'
        )

    def val(self, step: int, loss: float) -> None:
        """Validation loss after `step` updates."""
        self._write(f"s:{step} tel:{loss:.4f}\n")
        self._write_json(step, val_loss=loss)

    def train(self, step: int, loss: float, **figures) -> None:
        """Training loss of the 0-based `step`; figures: what else the JSON line says of it."""
        self._write(f"s:{step} trl:{loss:.4f}\n")
        self._write_json(step, train_loss=loss, **figures)

    def add(self, name: str, step: int, value: float) -> None:
        """Another figure after `step` updates, a line that llm.c's readers pass over; `name` is a word of a-z."""
        self._write(f"s:{step} {name}:{value:.4f}\n")
        self._write_json(step, **{name: value})

    def close(self) -> None:
        for file in (self.file, self.json_file):
            if file:
                file.close()

    def _write(self, line: str) -> None:
        if self.file:
            try:
                self.file.write(line.encode())
            except OSError as error:
                raise refused(error, self.path, "-o") from None

    def _write_json(self, step: int, **figures) -> None:
        if self.json_file:
            line = json.dumps({"step": step} | {name: float(value) for name, value in figures.items()}) + "\n"
            try:
                self.json_file.write(line.encode())
            except OSError as error:
                raise refused(error, self.json_path, "--log-json") from None


def opened(path: str | os.PathLike | None, start: int, flag: str, lines: tuple[re.Pattern, re.Pattern], expected: str):
    """The file `path`, without its lines of step `start` and later, to write more behind; None without a path."""
    if path is None:
        return None
    if os.path.isfile(path) and (dropped := drop_steps_from(path, start, flag, lines, expected)):
        print(f"{path}: dropped {dropped} of its lines, from step {start} on")
    try:
        # unbuffered: a line is in the file when the call returns, and none is half-written by a failing flush
        return open(path, "ab", buffering=0)
    except OSError as error:
        raise refused(error, path, flag) from None


def drop_steps_from(
    path: str | os.PathLike, step: int, flag: str, lines: tuple[re.Pattern, re.Pattern], expected: str
) -> int:
    """Remove the lines of `step` and later from the log `path`, atomically, and return how many those were.

    Raises UserError on a line that is not a log's. Only a last line without its end is let pass, as a killed run may
    leave one, and only if its step is among those that go.
    """
    whole, torn = lines
    with open_file(path) as file:
        found = file.read().splitlines(keepends=True)
    kept = []
    for number, text in enumerate(found, 1):
        match = whole.fullmatch(text) or (number == len(found) and torn.match(text))
        if not match or (int(match[1]) < step and not text.endswith(b"\n")):
            told = f"line {number} is {text[:60]!r}, expected {expected}"
            raise UserError(f"{flag} {path}: {told}", f"name another log by {flag}, or mend that line")
        if int(match[1]) < step:
            kept.append(text)
    if len(kept) < len(found):
        with atomic_write(os.path.realpath(path)) as file:
            file.writelines(kept)
    return len(found) - len(kept)


def refused(error: OSError, path: str | os.PathLike, flag: str) -> UserError:
    """The UserError for a log that the system will not let us write."""
    told = explain_os_error(error, path, f"writing {flag}")
    if isinstance(error, FileNotFoundError):
        told.hint = f"make its folder first: mkdir -p {os.path.dirname(path)}"
    return told
