"""Buffers of a model on a device: one flat array with a view per tensor, or an array per name."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from math import prod
from types import SimpleNamespace

import numpy as np

from llmc.checkpoint import MATRICES, OUTSIDE, GPT2Config, named_views, tensor_shapes


def num_values(shapes: dict[str, tuple[int, ...]]) -> int:
    """How many values arrays of these shapes hold in all."""
    return sum(map(prod, shapes.values()))


def flat_buffer(device, shapes: dict[str, tuple[int, ...]], values: np.ndarray | None = None) -> tuple:
    """(flat, views): one float array for all `shapes`, of `values` or zeros, and a namespace with a view per name."""
    flat = device.zeros(num_values(shapes)) if values is None else device.to_device(values)
    return flat, SimpleNamespace(**named_views(flat, shapes))


def all_but(names: tuple[str, ...], flat, shapes: dict[str, tuple[int, ...]]) -> list:
    """Views of a flat_buffer of `shapes` that cover it all but the tensors `names`; neighbours are in one view."""
    views, end = [], 0
    for left_out, group in groupby(shapes, key=lambda name: name in names):
        begin, end = end, end + num_values({name: shapes[name] for name in group})
        if not left_out:
            views.append(flat[begin:end])
    return views


def matrices_of(l: int, views: SimpleNamespace, config: GPT2Config) -> list:
    """Layer l's matrices, nearly all that it has, of the views of a flat_buffer: one stretch of memory each."""
    return [vars(views)[name][l] for name in tensor_shapes(config) if name in MATRICES and name not in OUTSIDE]


def allocate(device, shapes: dict[str, tuple[int, ...]], ints: tuple[str, ...] = ()) -> SimpleNamespace:
    """Zeros of each shape, by name: int32 for the names in `ints`, else the device's float."""
    return SimpleNamespace(
        **{
            name: device.zeros(shape, np.int32) if name in ints else device.zeros(shape)
            for name, shape in shapes.items()
        }
    )


def first_of(buffers: SimpleNamespace, shapes: dict[str, tuple[int, ...]]) -> SimpleNamespace:
    """The first values of the buffers named in `shapes`, in these shapes; nothing is copied."""
    return SimpleNamespace(
        **{name: vars(buffers)[name].reshape(-1)[: prod(shape)].reshape(shape) for name, shape in shapes.items()}
    )


def split(shapes: dict[str, tuple[int, ...]], names: tuple[str, ...] | None) -> tuple[dict, dict]:
    """Those shapes whose names are in `names`, all if it is None, and the others."""
    chosen = {name: shape for name, shape in shapes.items() if names is None or name in names}
    return chosen, {name: shape for name, shape in shapes.items() if name not in chosen}


def in_part(updates: list[tuple], part: slice, m, v) -> list[tuple]:
    """What an update of a part of the flat buffers updates: flat views of param, grad, m and v, and `what`.

    updates: (param, grad, what) of every tensor in the order of the flat gradients, what: None for one that stays as it
    is. m, v: of the part alone.
    """
    found, at = [], 0
    for param, grad, what in updates:
        begin, end = max(part.start, at), min(part.stop, at + grad.size)
        if what is not None and begin < end:
            values, own = slice(begin - at, end - at), slice(begin - part.start, end - part.start)
            found.append((param.reshape(-1)[values], grad.reshape(-1)[values], m[own], v[own], what))
        at += grad.size
    return found


def query_blocks(buffer, B: int, start: int, T: int, most: int) -> Iterator[tuple]:
    """(first, B x rows x keys view of a flat buffer) for blocks of queries at first.. with the keys up to their last.

    Queries stand at positions start .. T - 1; a block has `most` of them at most.
    """
    for first in range(start, T, most):
        rows, keys = min(most, T - first), min(first + most, T)
        yield first, buffer[: B * rows * keys].reshape(B, rows, keys)


_together: dict[str, int] | None = None  # bytes by purpose, while they are added up


def tell_allocated(nbytes: int, what: str) -> None:
    """allocated 27 MiB for parameter gradients"""
    if _together is not None:
        _together[what] = _together.get(what, 0) + nbytes
    else:
        print(f"allocated {nbytes >> 20} MiB for {what}")


@contextmanager
def told_together() -> Iterator[None]:
    """What is allocated inside for the same purpose, by one model after another, is told as one sum at the end."""
    global _together
    _together = {}
    try:
        yield
    finally:
        sums, _together = _together, None
    for what, nbytes in sums.items():
        tell_allocated(nbytes, what)
