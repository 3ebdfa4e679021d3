"""Files of Hugging Face's safetensors format, read and written tensor by tensor: memory is that of the largest.

    uint64 n, little-endian
    n bytes of JSON: {name: {"dtype": "F32", "shape": [2, 3], "data_offsets": [begin, end]}, "__metadata__": {...}}
    then the values, from offset 0 on, without gaps

Source: the format's description in huggingface/safetensors. The package of that name gives NumPy no bfloat16, and wants
all tensors at once to write them.
"""

import json
import os
from collections.abc import Iterable
from math import prod
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from llmc.checkpoint import from_bfloat16
from llmc.errors import UserError
from llmc.files import open_file, read_array

MAX_HEADER = 100_000_000  # the format's own limit
BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2}
BYTES |= {"I32": 4, "U32": 4, "F32": 4, "F64": 8, "I64": 8, "U64": 8}
FLOATS = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}  # that are read here
HINT = "download it again, or write it again by save_pretrained"


class Tensor(NamedTuple):
    """Where a tensor is: the file, the place of its first byte, and what it is."""

    path: Path
    start: int
    dtype: str
    shape: tuple[int, ...]

    def read(self) -> np.ndarray:
        """Its values as float32, exactly."""
        with open_file(self.path) as file:
            file.seek(self.start)
            raw = read_array(file, np.empty(self.shape, FLOATS[self.dtype]))
        return from_bfloat16(raw) if self.dtype == "BF16" else raw.astype(np.float32, copy=False)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name. Raises UserError unless its header is right and its size what that asks for."""
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(MAX_HEADER, size - 8):
            found = f"a header of {length} bytes in a file of {size}"
            raise UserError(f"{path}: not a safetensors file: {found}, expected 2..{min(MAX_HEADER, size - 8)}", HINT)
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
        except (ValueError, AttributeError, TypeError, RecursionError) as error:
            raise UserError(f"{path}: not a safetensors file: its header is no JSON object ({error})", HINT) from None
    tensors, end = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: _begin(path, *item)):
        dtype, shape, (begin, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        if dtype not in BYTES:
            raise UserError(f"{path}: {name} is of dtype {dtype!r}, expected one of {', '.join(BYTES)}", HINT)
        expected = [end, end + BYTES[dtype] * prod(shape)]
        if [begin, stop] != expected:
            raise UserError(f"{path}: {name} is at bytes {begin}..{stop}, expected {expected[0]}..{expected[1]}", HINT)
        tensors[name], end = Tensor(path, 8 + length + begin, dtype, shape), stop
    if 8 + length + end != size:
        state = "truncated" if size < 8 + length + end else "too long"
        raise UserError(f"{path}: is {state}: {size} bytes, its header asks for {8 + length + end}", HINT)
    return tensors


def _begin(path: Path, name: str, entry) -> tuple[int, int]:
    """Where the values of one entry of the header are. Raises UserError for one that is none."""
    try:
        (begin, end), shape, dtype = entry["data_offsets"], entry["shape"], entry["dtype"]
        if isinstance(dtype, str) and all(type(n) is int and 0 <= n < 1 << 40 for n in (begin, end, *shape)):
            return begin, end
    except (KeyError, TypeError, ValueError):
        pass
    expected = "dtype, shape and data_offsets of whole numbers"
    raise UserError(f"{path}: the header's entry of {name} is {json.dumps(entry)[:80]}, expected {expected}", HINT)


def write_header(file: BinaryIO, tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> None:
    """The header for (name, dtype, shape) of each tensor, whose values are to follow in this order."""
    header, at = {"__metadata__": {"format": "pt"}}, 0  # transformers asks for this format
    for name, dtype, shape in tensors:
        end = at + BYTES[dtype] * prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # values begin at a multiple of 8
    file.write(len(text).to_bytes(8, "little") + text)
