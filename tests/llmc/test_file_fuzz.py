"""Damaged files of every kind: each reads as something that its own writer could have written, or gives a UserError.

Never another exception, and never memory beyond what the file holds.
"""

import os
import tracemalloc
from dataclasses import fields, is_dataclass

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmc.checkpoint import BFLOAT16, DeepSeekConfig, GPT2Config, Model, num_parameters, read_model, write_model
from llmc.dataloader import DataLoader, ShuffleState, count_tokens, write_tokens
from llmc.debug_state import DebugState, read_debug_state, write_debug_state
from llmc.errors import UserError
from llmc.evalloader import Example, read_examples, write_examples
from llmc.state import TrainState, read_state, write_state
from llmc.tokenizer import Tokenizer

CONFIG = GPT2Config(maxT=4, V=5, L=1, NH=2, C=4, Vp=8)
PARAMS = np.linspace(-1, 1, num_parameters(CONFIG), dtype=np.float32)
DEEPSEEK = DeepSeekConfig(maxT=4, V=5, L=1, NH=1, C=4, Vp=8, F=3, E=2, top=1, q_rank=2, kv_rank=2, R=2)
DEEPSEEK_PARAMS = np.linspace(-1, 1, num_parameters(DEEPSEEK), dtype=np.float32)
SHUFFLE = ShuffleState(np.int32([1, 0]), np.int32([2, 0, 1]), np.arange(624, dtype=np.uint32), 5)


def write_debug(path):
    tokens = np.int32([[0, 4, 2]])
    write_debug_state(path, DebugState(tokens, tokens, np.zeros((1, 3, CONFIG.V), np.float32), 1.0, PARAMS))


def read_data(path):
    with DataLoader(str(path), 1, 4, vocab_size=50) as loader:
        return count_tokens(path), [part.copy() for part in loader.next_batch()]


def write_questions(path):
    tokens = np.arange(1, 4, dtype=np.uint16)
    write_examples(path, [Example(tokens[:n], [tokens[:1], tokens, tokens[1:], tokens[2:]], n) for n in (1, 2, 3)])


# kind of file: write a good one, read it, and the header ints that reading looks at
KINDS = {
    "model": (
        lambda path: write_model(
            path, Model(CONFIG, PARAMS, step=3, kind=1, fields=(2,), extra=np.ones(2, np.float32))
        ),
        read_model,
        {*range(11), *range(128, 256)},
    ),
    "bfloat16 model": (
        lambda path: write_model(path, Model(CONFIG, PARAMS, version=BFLOAT16)),
        read_model,
        {*range(11), *range(128, 256)},
    ),
    "model with MLA and MoE": (
        lambda path: write_model(path, Model(DEEPSEEK, DEEPSEEK_PARAMS, 3, kind=2, extra=np.ones(2, np.float32))),
        read_model,
        {*range(17), *range(128, 256)},
    ),
    "state": (
        lambda path: write_state(path, TrainState(3, 9, 1, 2, PARAMS, PARAMS, SHUFFLE, {"b": 4})),
        lambda path: read_state(path, PARAMS.size),
        {*range(6), 10, 20, 21, *range(30, 34), 128, 129, 130, 131},
    ),
    "debug state": (write_debug, lambda path: read_debug_state(path, CONFIG), {*range(4)}),
    "data": (lambda path: write_tokens(path, np.arange(50, dtype=np.uint16)), read_data, {*range(3)}),
    "tokenizer": (
        lambda path: Tokenizer([b"a", b"bc", b"def"], 1).write(path),
        lambda path: Tokenizer.read(path),
        {*range(4)},
    ),
    "questions": (write_questions, read_examples, {*range(4)}),
}
REWRITE = {
    "model": write_model,
    "bfloat16 model": write_model,
    "model with MLA and MoE": write_model,
    "state": write_state,
    "debug state": write_debug_state,
    "tokenizer": lambda path, read: read.write(path),
    "questions": write_examples,
}
TELLING = [0, 1, 2, 3, 4, 5, 7, 8, -1, 255, 256, 257, 65535, 65536, 1 << 24, 1 << 30, (1 << 31) - 1, -(1 << 31)]
ints = st.one_of(st.sampled_from(TELLING), st.integers(-(1 << 31), (1 << 31) - 1))
places = st.one_of(
    st.integers(0, 17), st.sampled_from([20, 21, 30, 31, 32, 33]), st.integers(126, 133), st.integers(0, 255)
)


@pytest.fixture(params=[12, pytest.param(500, marks=pytest.mark.slow)], ids=["few", "many"])
def examples(request):
    """How many damaged files; the same ones every time."""
    return settings(
        derandomize=True,
        deadline=None,
        max_examples=request.param,
        suppress_health_check=[HealthCheck.function_scoped_fixture],  # the one file is written anew in every example
    )


def equal(a, b):
    """Equality that goes into dataclasses and arrays (NaN equals NaN)."""
    if is_dataclass(a):
        return type(a) is type(b) and all(equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(a) if f.compare)
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b, equal_nan=True)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b or (a != a and b != b)


def read_or_refuse(kind, path):
    """What the reader makes of the file, None after a UserError; it may use 1 MB beside the file's own size."""
    tracemalloc.start()
    try:
        return KINDS[kind][1](path)
    except UserError as error:
        assert str(path) in error.message
        assert error.hint
        return None
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 4 * path.stat().st_size + 1e6


def check(kind, path, original, harmless):
    read = read_or_refuse(kind, path)
    if harmless:
        assert equal(read, original)
    elif read is not None and kind in REWRITE:
        REWRITE[kind](path, read)
        written = path.read_bytes()
        REWRITE[kind](path, KINDS[kind][1](path))
        assert path.read_bytes() == written


@pytest.fixture(params=KINDS)
def good(request, tmp_path, monkeypatch):
    """(kind, path, bytes of a good file, what is read from it)"""
    monkeypatch.setattr(os, "fsync", lambda _: None)  # for speed: thousands of small files
    path = tmp_path / "file.bin"
    write, read, _ = KINDS[request.param]
    write(path)
    return request.param, path, path.read_bytes(), read(path)


def test_header_ints(good, examples):
    kind, path, data, original = good

    @examples
    @given(places, ints)
    def flip(index, value):
        changed = bytearray(data)
        changed[4 * index : 4 * index + 4] = value.to_bytes(4, "little", signed=True)
        path.write_bytes(changed)
        check(kind, path, original, harmless=index not in KINDS[kind][2] or bytes(changed) == data)

    flip()


def test_any_byte(good, examples):
    kind, path, data, original = good

    @examples
    @given(st.integers(0, len(data) - 1), st.integers(0, 255))
    def change(at, value):
        changed = bytearray(data)
        changed[at] = value
        path.write_bytes(changed)
        check(kind, path, original, harmless=bytes(changed) == data)

    change()


def test_length(good, examples):
    kind, path, data, _ = good

    @examples
    @given(st.integers(-len(data), 3000).filter(bool))
    def resize(change):
        path.write_bytes(data)
        os.truncate(path, len(data) + change)
        assert read_or_refuse(kind, path) is None

    resize()


def test_any_bytes(good, examples):
    kind, path, data, _ = good

    @examples
    @given(st.binary(max_size=2000), st.sampled_from([0, 8, 12, 1024]))
    def replace(tail, kept):
        path.write_bytes(data[:kept] + tail)
        read_or_refuse(kind, path)

    replace()
