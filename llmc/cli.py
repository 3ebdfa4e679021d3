"""Command lines in the C trainers' manner: flags and values strictly in pairs, on top of argparse.

`-n -1` parses though -1 is a flag too, no long flag may be abbreviated, the last of a repeated flag counts. What is
wrong raises UserError with exit code 2. Source: the option loops of train_gpt2_fp32.cu and train_gpt2.cu.
"""

import argparse
import dataclasses
import difflib
import math
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence

from llmc.errors import UserError

MAX_INT32 = 2**31 - 1  # what a file header and a kernel's int hold
MAX_FLOAT32 = 3.4028235e38


class ArgumentParser(argparse.ArgumentParser):
    """argparse.ArgumentParser with the rules above; define flags, groups and types as usual, then call `parse`.

    Flags take one value or none; give every short flag a long twin. --help adds the defaults and prints the
    description and the epilog as they are written.
    """

    def __init__(self, **options):
        options.setdefault("prog", f"python {os.path.basename(sys.argv[0])}")
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def parse(self, argv: Sequence[str] | None = None, saved: dict | None = None) -> argparse.Namespace:
        """The settings that `argv` (sys.argv[1:] by default) asks for.

        saved: {name: value} of an earlier run, which stand in for the defaults: what is typed wins.
        Raises UserError, exit code 2, naming the flag, what was found and what was expected.
        """
        words = []
        for action, word, value in self._pairs(argv):
            if value == "--":  # argparse would drop it
                self._refuse(f"{word}: -- is no value")
            words.append(word if action is None or action.nargs == 0 else f"{action.option_strings[-1]}={value}")
        return self.parse_args(words, argparse.Namespace(**self._checked(saved or {})))

    def explicit(self, argv: Sequence[str] | None = None) -> set[str]:
        """The names (dest) of the flags that `argv` holds."""
        return {action.dest for action, _, _ in self._pairs(argv) if action}

    def error(self, message: str):
        """Raise what argparse finds wrong as a UserError."""
        self._refuse(message.removeprefix("argument "))

    def format_help(self) -> str:
        for action in self._actions:
            if action.help and action.nargs != 0 and action.option_strings and "(default" not in action.help:
                action.help += f" (default: {shown(action.default) or 'none'})".replace("%", "%%")
        return super().format_help()

    def _pairs(self, argv: Sequence[str] | None) -> Iterator[tuple[argparse.Action | None, str, str | None]]:
        """(action, flag, value) for each flag of `argv`, (None, word, None) for each positional word."""
        flags = {flag: action for action in self._actions for flag in action.option_strings}
        takes_words = any(not action.option_strings for action in self._actions)
        words = iter(sys.argv[1:] if argv is None else argv)
        for word in words:
            flag, equals, value = word.partition("=")
            if word in flags and flags[word].nargs == 0:
                yield flags[word], word, None
            elif word in flags:
                value = next(words, None)
                if value is None:
                    self._refuse(f"{word}: its value is missing")
                yield flags[word], word, value
            elif equals and flag.startswith("--") and flag in flags and flags[flag].nargs != 0:
                yield flags[flag], flag, value
            elif takes_words and not word.startswith("-"):
                yield None, word, None
            elif word.startswith("-"):
                self._refuse(f"{word}: unknown flag", self._nearest(word, flags))
            else:
                self._refuse(f"{word}: expected a flag; flags and values come in pairs, -x VALUE")

    def _nearest(self, word: str, flags: dict) -> str | None:
        """A hint for the unknown flag `word`: the flag that was probably meant."""
        if word[:2] in flags and word[2:3] not in ("", "-"):
            return f"put a space between flag and value: {word[:2]} {word[2:].lstrip('=')}"
        name = word.partition("=")[0]
        close = [name.swapcase()] if name.swapcase() in flags else difflib.get_close_matches(name, flags, n=1)
        return f"did you mean {close[0]}? {self.prog} --help lists all flags" if close else None

    def _checked(self, saved: dict) -> dict:
        """`saved`, each value read again by the type of its flag: it comes from a file."""
        actions = {action.dest: action for action in self._actions}
        settings = {}
        for name, value in saved.items():
            action = actions.get(name)
            if action is None:
                raise UserError(f"saved setting {name}: this program has no such flag", self._help_hint())
            try:
                settings[name] = read(action, value)
            except (ValueError, argparse.ArgumentTypeError) as error:
                raise UserError(f"saved setting {name}: {error}", f"give {action.option_strings[-1]} anew") from None
        return settings

    def _refuse(self, message: str, hint: str | None = None):
        raise UserError(message, hint or self._help_hint(), exit_code=2)

    def _help_hint(self) -> str:
        return f"{self.prog} --help"


def read(action: argparse.Action, value):
    """A saved value, as `action` would read it from the command line. Raises ValueError or as the action's type."""
    if value is None and action.default is None:
        return None
    if not isinstance(value, str | int | float):
        raise ValueError(f"{value!r}, expected a word or a number")
    text = shown(value)
    checked = action.type(text) if action.type else text
    if action.choices is not None and checked not in action.choices:
        raise ValueError(f"{text!r}, expected one of {', '.join(map(str, action.choices))}")
    return checked


def shown(value) -> str:
    """A setting as one types it: 0 and 1 for booleans, none for None."""
    if value is None:
        return "none"
    return str(int(value)) if isinstance(value, bool) else str(value)


def integer(text: str, least: int, most: int) -> int:
    """`text` as a whole number in least..most; raises ArgumentTypeError saying what was expected."""
    if not re.fullmatch(r"[+-]?[0-9]{1,20}", text) or not least <= int(text) <= most:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a whole number in {least}..{most}")
    return int(text)


def number(text: str, expected: str, least: float = 0.0, most: float = MAX_FLOAT32, above: bool = False) -> float:
    """`text` as a finite number in least..most, or above `least`; raises ArgumentTypeError saying `expected`."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not least <= value <= most or (above and value == least):  # NaN fails every comparison
        raise argparse.ArgumentTypeError(f"{text!r}, expected {expected}")
    return value


def positive_int(text: str) -> int:
    """A whole number, 1 or more."""
    return integer(text, 1, MAX_INT32)


def natural(text: str) -> int:
    """A whole number, 0 or more."""
    return integer(text, 0, MAX_INT32)


def any_int(text: str) -> int:
    """A whole number of 32 bits, of either sign."""
    return integer(text, -MAX_INT32, MAX_INT32)


def seed(text: str) -> int:
    """A whole number of 64 bits, 0 or more."""
    return integer(text, 0, 2**64 - 1)


def positive_float(text: str) -> float:
    """A number above 0 that float32 can hold."""
    return number(text, "a number above 0", above=True)


def natural_float(text: str) -> float:
    """A number that float32 can hold, 0 or more."""
    return number(text, "a number, 0 or more")


def fraction(text: str) -> float:
    """A number in 0..1."""
    return number(text, "a number in 0..1", most=1.0)


def below_one(text: str) -> float:
    """A number in 0..1, 1 excluded: the beta of a moving average."""
    value = fraction(text)
    if value == 1:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a number from 0 to below 1")
    return value


def flag01(text: str) -> bool:
    """0 or 1."""
    if text not in ("0", "1"):
        raise argparse.ArgumentTypeError(f"{text!r}, expected 0 or 1")
    return text == "1"


def resolve(args: argparse.Namespace, typed: set[str], flags: dict[str, str], old, default):
    """A system's settings, a dataclass: what was typed, else what its file has (`old`), else the flags' defaults.

    flags: {flag's name: field}. old: the file's settings, None if it is of no such system; default: what fields have
    that no flag sets.
    """
    chosen = {field: getattr(args, flag) for flag, field in flags.items() if old is None or flag in typed}
    return dataclasses.replace(default if old is None else old, **chosen)


def refuse(problems: Iterable[tuple[object, str, str]]) -> None:
    """Raise UserError, exit code 2, with the first (condition, message, hint) whose condition holds."""
    for condition, message, hint in problems:
        if condition:
            raise UserError(message, hint, 2)
