"""Model files, llm.c's version 3 (float32) and 5 (bfloat16), with our header extension.

    int32 header[256]: 20240326, version, maxT, V, L, NH, C, Vp, step, shard, sample, 0 ...
                  128: 20261121, 1, kind, number of extra float32 values, the kind's fields ...
    then the 16 tensors, each stacked over layers, then the extra values (float32 in both versions)

llm.c reads ints 0-7 and the 16 tensors and ignores the rest. Source: llm.c gpt2_build_from_checkpoint (reading) and
write_model in train_gpt2.py (writing, bfloat16 rounding to nearest even).
"""

import os
from dataclasses import dataclass, field
from math import prod

import numpy as np

from llmc.errors import UserError
from llmc.files import (
    EXTENSION,
    EXTENSION_MAGIC,
    EXTENSION_VERSION,
    HEADER_BYTES,
    HEADER_INTS,
    atomic_write,
    check_size,
    open_file,
    read_array,
    read_header,
)

MAGIC = 20240326
FLOAT32, BFLOAT16 = 3, 5  # versions
DENSE, BANDED, SPARSE_ATTENTION, TOROIDAL = range(4)  # kinds
BLOCK = 1 << 22  # values written at a time
MAX_FIELDS = HEADER_INTS - EXTENSION - 4
HINT = "make model writes a random one, python data/starter_pack.py fetches OpenAI's"

# llm.c's order; those with two dimensions in a layer are the matrices, which weight decay applies to
MATRICES = ("wte", "wpe", "qkvw", "attprojw", "fcw", "fcprojw")


@dataclass(frozen=True)
class GPT2Config:
    """Sizes of a GPT-2: maxT positions, V tokens (Vp with padding), L layers, NH heads, C channels."""

    maxT: int = 1024
    V: int = 50257
    L: int = 12
    NH: int = 12
    C: int = 768
    Vp: int = 50304


@dataclass
class Model:
    """A model file in memory: sizes, all parameters as one flat float32 array, and what the header says."""

    config: GPT2Config
    params: np.ndarray
    step: int = 0
    shard: int = 0
    sample: int = 0
    kind: int = DENSE
    fields: tuple[int, ...] = ()
    extra: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    version: int = FLOAT32


def tensor_shapes(config: GPT2Config) -> dict[str, tuple[int, ...]]:
    """The 16 parameter tensors in file order, each with its shape over all layers."""
    C, L = config.C, config.L
    return {
        "wte": (config.Vp, C),
        "wpe": (config.maxT, C),
        "ln1w": (L, C),
        "ln1b": (L, C),
        "qkvw": (L, 3 * C, C),
        "qkvb": (L, 3 * C),
        "attprojw": (L, C, C),
        "attprojb": (L, C),
        "ln2w": (L, C),
        "ln2b": (L, C),
        "fcw": (L, 4 * C, C),
        "fcb": (L, 4 * C),
        "fcprojw": (L, C, 4 * C),
        "fcprojb": (L, C),
        "lnfw": (C,),
        "lnfb": (C,),
    }


def num_parameters(config: GPT2Config) -> int:
    """Vp*C + maxT*C + L*(12*C*C + 13*C) + 2*C"""
    return sum(map(prod, tensor_shapes(config).values()))


def named_views(flat, shapes: dict[str, tuple[int, ...]]) -> dict:
    """Views of the flat array (NumPy or CuPy), one for each name, in order; nothing is copied."""
    views, at = {}, 0
    for name, shape in shapes.items():
        views[name] = flat[at : at + prod(shape)].reshape(shape)
        at += prod(shape)
    return views


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 -> the upper 16 bits as uint16, rounded to nearest, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    quiet_nan = (bits >> np.uint32(16)) | np.uint32(0x40)
    return np.where(np.isnan(values), quiet_nan, rounded).astype("<u2")


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    """uint16 -> float32, exact."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def check_config(config: GPT2Config, name: str | os.PathLike, hint: str | None = HINT) -> None:
    """Raise UserError naming `name` (a file, or the flags) unless the sizes make a GPT-2."""
    limits = dict(maxT=1 << 24, V=1 << 24, L=1 << 12, NH=1 << 12, C=1 << 20, Vp=1 << 24)
    for key, most in limits.items():
        value = getattr(config, key)
        if not 1 <= value <= most:
            raise UserError(f"{name}: {key} is {value}, expected 1..{most}", hint)
    if config.C % config.NH:
        raise UserError(f"{name}: C = {config.C} channels do not divide by NH = {config.NH} heads", hint)
    if config.Vp < config.V:
        raise UserError(f"{name}: padded vocabulary Vp = {config.Vp} is smaller than V = {config.V}", hint)


def read_model(path: str | os.PathLike) -> Model:
    """Read a model file of version 3 or 5; parameters come as float32.

    Raises UserError for a wrong magic, version, size or range, or a file that is truncated or too long.
    """
    with open_file(path) as file:
        header = read_header(file, path, MAGIC, (FLOAT32, BFLOAT16), "model file", HINT)
        version = int(header[1])
        config = GPT2Config(*map(int, header[2:8]))
        check_config(config, path)
        step, shard, sample = map(int, header[8:11])
        if min(step, shard, sample) < 0:
            raise UserError(f"{path}: step, shard, sample are {step}, {shard}, {sample}; expected none below 0", HINT)
        kind, num_extra, fields = DENSE, 0, ()
        if header[EXTENSION] == EXTENSION_MAGIC:
            extension, kind, num_extra = map(int, header[EXTENSION + 1 : EXTENSION + 4])
            if extension != EXTENSION_VERSION:
                raise UserError(f"{path}: header extension {extension}, this program knows {EXTENSION_VERSION}", HINT)
            if not DENSE <= kind <= TOROIDAL:
                raise UserError(f"{path}: kind {kind}, expected {DENSE}..{TOROIDAL}", HINT)
            if num_extra < 0:
                raise UserError(f"{path}: {num_extra} extra values, expected 0 or more", HINT)
            fields = tuple(map(int, header[EXTENSION + 4 :]))
        count = num_parameters(config)
        itemsize = 4 if version == FLOAT32 else 2
        check_size(file, path, HEADER_BYTES + itemsize * count + 4 * num_extra, "model file", HINT)
        if version == FLOAT32:
            params = read_array(file, np.empty(count, "<f4"))
        else:
            params = from_bfloat16(read_array(file, np.empty(count, "<u2")))
        extra = read_array(file, np.empty(num_extra, "<f4"))
    return Model(config, params, step, shard, sample, kind, fields, extra, version)


def check_is_model(path: str | os.PathLike, flag: str) -> None:
    """Raise UserError naming `flag` unless the existing `path` is a model file, which a checkpoint may replace."""
    with open_file(path) as file:
        magic = int.from_bytes(file.read(4), "little")
    if magic != MAGIC:
        raise UserError(f"{flag} {path}: exists and is not a model file (magic {magic})", "name another file")


def write_model(path: str | os.PathLike, model: Model) -> None:
    """Write `model` as its version says (FLOAT32 or BFLOAT16), atomically. Raises UserError if the system refuses."""
    if len(model.fields) > MAX_FIELDS:
        raise ValueError(f"{len(model.fields)} header fields, at most {MAX_FIELDS}")
    if model.params.size != num_parameters(model.config):
        raise ValueError(f"{model.params.size} parameters, the sizes ask for {num_parameters(model.config)}")
    config = model.config
    header = np.zeros(HEADER_INTS, "<i4")
    header[:8] = MAGIC, model.version, config.maxT, config.V, config.L, config.NH, config.C, config.Vp
    header[8:11] = model.step, model.shard, model.sample
    header[EXTENSION : EXTENSION + 4] = EXTENSION_MAGIC, EXTENSION_VERSION, model.kind, model.extra.size
    header[EXTENSION + 4 : EXTENSION + 4 + len(model.fields)] = model.fields
    params = np.ascontiguousarray(model.params, "<f4")
    with atomic_write(path) as file:
        file.write(header.data)
        for start in range(0, params.size, BLOCK):  # converting takes several times the block's memory
            block = params[start : start + BLOCK]
            file.write((to_bfloat16(block) if model.version == BFLOAT16 else block).data)
        file.write(np.ascontiguousarray(model.extra, "<f4").data)
