"""A system's fields in the header of a model file: one table, from which writing, reading and range checks follow.

    FIELDS = (
        Field("attention", ("dense", "sparse")),       one of these words, kept as its place among them
        Field("heads", range(1, 257), "indexer heads"),  a whole number; in messages by this label
        Field("sink", bool),                           0 or 1
        Field("coverage", Real(0, 1, above=True)),     kept as the bits of a float32
    )

A field is an attribute of the system's dataclass. Every field is one int32, in the order of the table.
"""

import struct
from typing import NamedTuple

from llmc.errors import UserError


class Real(NamedTuple):
    """The numbers from `least` (only those above it, if `above`) to `most`."""

    least: float
    most: float
    above: bool = False


class Field(NamedTuple):
    """An attribute, what it may be, and its name in messages if that is another."""

    name: str
    allowed: tuple | range | type | Real
    label: str = ""


def write_fields(table: tuple[Field, ...], values) -> tuple[int, ...]:
    """The header's integers for the attributes of `values`."""
    return tuple(_to_int(field.allowed, getattr(values, field.name)) for field in table)


def read_fields(table: tuple[Field, ...], numbers: tuple[int, ...], path: str, hint: str) -> dict:
    """{attribute: value} of a header's integers. Raises UserError, naming the file, for one out of its range."""
    values = {}
    for field, number in zip(table, numbers):
        allowed, label = field.allowed, field.label or field.name.replace("_", " ")
        if isinstance(allowed, Real):
            (value,) = struct.unpack("<f", struct.pack("<i", number))
            if not allowed.least <= value <= allowed.most or (allowed.above and value == allowed.least):
                expected = f"above {allowed.least:g}, at most " if allowed.above else f"{allowed.least:g}.."
                raise UserError(f"{path}: {label} is {value}, expected {expected}{allowed.most:g}", hint)
        else:
            numbers_allowed = allowed if isinstance(allowed, range) else range(2 if allowed is bool else len(allowed))
            check_range(number, numbers_allowed, label, path, hint)
            value = number if isinstance(allowed, range) else bool(number) if allowed is bool else allowed[number]
        values[field.name] = value
    return values


def check_range(number: int, allowed: range, label: str, path: str, hint: str) -> None:
    """Raise UserError, naming the file, unless the number is in the range."""
    if number not in allowed:
        raise UserError(f"{path}: {label} is {number}, expected {allowed[0]}..{allowed[-1]}", hint)


def _to_int(allowed: tuple | range | type | Real, value) -> int:
    if isinstance(allowed, Real):
        return struct.unpack("<i", struct.pack("<f", value))[0]
    return allowed.index(value) if isinstance(allowed, tuple) else int(value)
