"""Optimizer state files, llm.c's version 1 (save_state and load_state of train_gpt2.cu): all that a resumed run needs.

    int32 header[256]: 20240527, 1, num_processes, rank, use_master_weights, should_shuffle
                   10: step
        20 22 30 32: uint64 rng_state, rng_state_last_update, shard, sample
                  128: 20261121, 1, length of the options, ZeRO stage (our extension)
    m float32 (n), v float32 (n)          n = num_parameters, as in llm.c's ZeRO stage 0, + the model's extra values;
                                          of ZeRO stage 1 this rank's part of them (llmc/ranks.py; llm.c cuts otherwise)
    if should_shuffle: uint64 count, int32 shard_indices; uint64 count, int32 intra_shard_indices; Mersenne Twister
    the options, JSON in UTF-8; what else a trainer keeps is among them under the name "extra"

llm.c's rng_state drives its stochastic rounding to bfloat16. Ours is float32 throughout and rounds nothing: the field
holds the state of the text sampler (xorshift64* too), and rng_state_last_update is 0. llm.c reads no further than the
Mersenne Twister.
"""

import json
import os
from dataclasses import dataclass, field
from typing import BinaryIO

import numpy as np

from llmc.dataloader import ShuffleState
from llmc.errors import UserError
from llmc.files import (
    EXTENSION,
    EXTENSION_MAGIC,
    EXTENSION_VERSION,
    HEADER_INTS,
    atomic_write,
    open_file,
    read_array,
    read_header,
)
from llmc.ranks import part_of

MAGIC, VERSION = 20240527, 1
WHAT = "state file"
HINT = "resume from another checkpoint, or start anew from its model file with -e"

# uint64 fields, as indices into the header seen as uint64 [128]
RNG_STATE, SHARD, SAMPLE = 10, 15, 16

EXTRA = "extra"  # where TrainState.extra stands among the options
ONCE_OPTIONS = ("best_loss", "worse")  # extra values that older files keep as options

# mt19937_state of llm.c's rand.h. `left` words remain before the next regeneration, so left + next = 625; only a
# generator that was seeded and not used yet has left 1, next 0
MERSENNE = np.dtype([("seed", "<u8"), ("left", "<i4"), ("next", "<u4"), ("key", "<u4", 624), ("matrix", "<u4", 2)])
MERSENNE_N = 624
MERSENNE_MATRIX = (0, 0x9908B0DF)


@dataclass
class TrainState:
    """What a checkpoint keeps beside the model.

    step: updates done; rng_state: Sampler.state; shard, sample, shuffle: of the training DataLoader; m, v: AdamW's
    moments, flat float32; options: the command line's settings by name, anything JSON holds; extra: what else a trainer
    goes on from, by name, anything JSON holds.
    """

    step: int
    rng_state: int
    shard: int
    sample: int
    m: np.ndarray
    v: np.ndarray
    shuffle: ShuffleState | None = None
    options: dict = field(default_factory=dict)
    rank: int = 0
    num_processes: int = 1
    extra: dict = field(default_factory=dict)
    zero: int = 0


def write_state(path: str | os.PathLike, state: TrainState) -> None:
    """Write `state`, atomically; m and v go out as they lie in memory. Raises UserError if the system refuses."""
    if state.m.size != state.v.size:
        raise ValueError(f"{state.m.size} values of m, {state.v.size} of v")
    options = state.options | ({EXTRA: state.extra} if state.extra else {})
    options = json.dumps(options).encode()  # escapes all but ASCII, and so a file name that is no valid UTF-8
    header = np.zeros(HEADER_INTS, "<i4")
    header[:6] = MAGIC, VERSION, state.num_processes, state.rank, 0, state.shuffle is not None
    header[10] = state.step
    for index, value in ((RNG_STATE, state.rng_state), (SHARD, state.shard), (SAMPLE, state.sample)):
        header.view("<u8")[index] = value
    header[EXTENSION : EXTENSION + 4] = EXTENSION_MAGIC, EXTENSION_VERSION, len(options), state.zero
    with atomic_write(path) as file:
        file.write(header.data)
        for moments in (state.m, state.v):
            file.write(np.ascontiguousarray(moments, "<f4").data)
        if state.shuffle is not None:
            _write_shuffle(file, state.shuffle)
        file.write(options)


def read_state(path: str | os.PathLike, num_parameters: int) -> TrainState:
    """Read the state of a model of `num_parameters`, extra values included.

    Raises UserError for a wrong magic, version, size or range, a file that is truncated or too long, or master weights.
    """
    with open_file(path) as file:
        header = read_header(file, path, MAGIC, (VERSION,), WHAT, HINT)
        _check_header(header, path)
        step, options_bytes = int(header[10]), _options_bytes(header, path)
        rng_state, shard, sample = map(int, header.view("<u8")[[RNG_STATE, SHARD, SAMPLE]])
        zero = _zero_stage(header, path)
        part = part_of(num_parameters, int(header[3]), int(header[2])) if zero else slice(0, num_parameters)
        m, v = (_read(file, path, "<f4", part.stop - part.start, name) for name in ("m", "v"))
        shuffle = _read_shuffle(file, path) if header[5] else None
        options = _read(file, path, np.uint8, options_bytes, "options").tobytes()
        _check_end(file, path)
    if shuffle and (shard >= shuffle.shard_indices.size or sample > shuffle.intra_shard_indices.size):
        sizes = f"{shuffle.shard_indices.size} shards and {shuffle.intra_shard_indices.size} samples"
        raise UserError(f"{path}: shard {shard}, sample {sample}; expected within {sizes}", HINT)
    options, extra = _parse_options(options, path) if options else ({}, {})
    rank, num_processes = int(header[3]), int(header[2])
    return TrainState(step, rng_state, shard, sample, m, v, shuffle, options, rank, num_processes, extra, zero)


def _check_header(header: np.ndarray, path: str | os.PathLike) -> None:
    num_processes, rank, use_master_weights, should_shuffle = map(int, header[2:6])
    if not 0 <= rank < num_processes:
        raise UserError(f"{path}: rank {rank} of {num_processes} processes", HINT)
    for name, value in (("use_master_weights", use_master_weights), ("should_shuffle", should_shuffle)):
        if value not in (0, 1):
            raise UserError(f"{path}: {name} is {value}, expected 0 or 1", HINT)
    if use_master_weights:
        raise UserError(
            f"{path}: has master weights, which llm.c keeps for bfloat16 parameters; expected a state without",
            "save it with llm.c's -w 0, or start anew from the model file with -e",
        )
    if header[10] < 0:
        raise UserError(f"{path}: step {header[10]}, expected 0 or more", HINT)
    rng_state, shard, sample = map(int, header.view("<u8")[[RNG_STATE, SHARD, SAMPLE]])
    if rng_state == 0:
        raise UserError(f"{path}: rng_state 0, from which xorshift64* never gets away", HINT)
    if max(shard, sample) >= 1 << 31:
        raise UserError(f"{path}: shard {shard}, sample {sample}; expected below 2^31", HINT)


def _options_bytes(header: np.ndarray, path: str | os.PathLike) -> int:
    if header[EXTENSION] != EXTENSION_MAGIC:  # written by llm.c
        return 0
    version, length = map(int, header[EXTENSION + 1 : EXTENSION + 3])
    if version != EXTENSION_VERSION:
        raise UserError(f"{path}: header extension {version}, this program knows {EXTENSION_VERSION}", HINT)
    if length < 0:
        raise UserError(f"{path}: {length} bytes of options, expected 0 or more", HINT)
    return length


def _zero_stage(header: np.ndarray, path: str | os.PathLike) -> int:
    zero = int(header[EXTENSION + 3]) if header[EXTENSION] == EXTENSION_MAGIC else 0
    if zero not in (0, 1):
        raise UserError(f"{path}: ZeRO stage {zero}, expected 0 or 1", HINT)
    return zero


def _read(file: BinaryIO, path: str | os.PathLike, dtype, count: int, what: str) -> np.ndarray:
    """A fresh array of what comes next in the file; memory is asked for only if the file has as much left."""
    dtype = np.dtype(dtype)
    left = os.fstat(file.fileno()).st_size - file.tell()
    if left < count * dtype.itemsize:
        needed = count * dtype.itemsize
        raise UserError(f"{path}: {WHAT} is truncated: {what} takes {needed} bytes, {left} are left", HINT)
    return read_array(file, np.empty(count, dtype))


def _check_end(file: BinaryIO, path: str | os.PathLike) -> None:
    end, size = file.tell(), os.fstat(file.fileno()).st_size
    if end != size:
        raise UserError(f"{path}: {WHAT} is too long: {size} bytes, its header asks for {end}", HINT)


def _write_shuffle(file: BinaryIO, shuffle: ShuffleState) -> None:
    for indices in (shuffle.shard_indices, shuffle.intra_shard_indices):
        file.write(np.uint64([indices.size]).astype("<u8").data)
        file.write(np.ascontiguousarray(indices, "<i4").data)
    mersenne = np.zeros(1, MERSENNE)
    mersenne["left"], mersenne["next"] = MERSENNE_N + 1 - shuffle.mt_pos, shuffle.mt_pos
    mersenne["key"], mersenne["matrix"] = shuffle.mt_key, MERSENNE_MATRIX
    file.write(mersenne.tobytes())


def _read_shuffle(file: BinaryIO, path: str | os.PathLike) -> ShuffleState:
    shards, samples = (_read_permutation(file, path, name) for name in ("shard_indices", "intra_shard_indices"))
    mersenne = _read(file, path, MERSENNE, 1, "the Mersenne Twister")[0]
    left, position = int(mersenne["left"]), int(mersenne["next"])
    if (left, position) == (1, 0):
        position = MERSENNE_N
    if not 1 <= position <= MERSENNE_N or left != MERSENNE_N + 1 - position:
        raise UserError(f"{path}: Mersenne Twister with left {left}, next {position}; expected a sum of 625", HINT)
    if tuple(mersenne["matrix"]) != MERSENNE_MATRIX:
        raise UserError(f"{path}: Mersenne Twister with matrix {mersenne['matrix']}, expected {MERSENNE_MATRIX}", HINT)
    return ShuffleState(shards, samples, mersenne["key"].astype(np.uint32), position)


def _read_permutation(file: BinaryIO, path: str | os.PathLike, name: str) -> np.ndarray:
    count = int(_read(file, path, "<u8", 1, f"the count of {name}")[0])
    indices = _read(file, path, "<i4", count, name)
    if count == 0 or indices.min() < 0 or indices.max() >= count or np.bincount(indices).max() > 1:
        raise UserError(f"{path}: {name} is no permutation of 0..{count - 1}", HINT)
    return indices


def _parse_options(text: bytes, path: str | os.PathLike) -> tuple[dict, dict]:
    """Options and extra values."""
    try:
        options = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: options are no JSON: {error}", HINT) from None
    if not isinstance(options, dict):
        raise UserError(f"{path}: options are a {type(options).__name__}, expected an object", HINT)
    extra = options.pop(EXTRA, {})
    if not isinstance(extra, dict):
        raise UserError(f"{path}: {EXTRA} is a {type(extra).__name__}, expected an object", HINT)
    return options, {name: options.pop(name) for name in ONCE_OPTIONS if name in options} | extra
