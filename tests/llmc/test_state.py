"""State and debug state files: llm.c's layout, exact resume, bad files, and saves cut short by kill -9."""

import contextlib
import os
import random
import signal
import struct
import time
import tracemalloc
import zlib
from dataclasses import replace

import numpy as np
import pytest

from llmc.checkpoint import (
    SPARSE_ATTENTION,
    DeepSeekConfig,
    GPT2Config,
    Model,
    num_parameters,
    read_model,
    write_model,
)
from llmc.dataloader import DataLoader, ShuffleState, write_tokens
from llmc.debug_state import DebugState, read_debug_state, write_debug_state
from llmc.errors import UserError
from llmc.resume import load_checkpoint, save_checkpoint, state_path
from llmc.sampler import Sampler
from llmc.state import TrainState, read_state, write_state

CONFIG = GPT2Config(maxT=8, V=13, L=2, NH=2, C=4, Vp=16)
DEEPSEEK = DeepSeekConfig(maxT=8, V=13, L=2, NH=2, C=8, Vp=16, F=6, E=3, top=2, q_rank=4, kv_rank=3, R=2)
N = 20
OPTIONS = {"input": "data/*_train.bin", "lr": 3e-4, "bandwidth": [256, None], "name": "Zoë \udcff"}


def make_shuffle(mt_pos=300):
    key = np.arange(1, 625, dtype=np.uint32) * np.uint32(2654435761)
    return ShuffleState(np.int32([1, 0, 2]), np.int32([3, 0, 1, 2]), key, mt_pos)


def make_state(**changes):
    rng = np.random.default_rng(0)
    m, v = rng.normal(size=(2, N)).astype(np.float32)
    state = TrainState(step=7, rng_state=(1 << 64) - 2, shard=1, sample=4, m=m, v=v, shuffle=make_shuffle())
    return replace(state, **{"options": OPTIONS, **changes})


def same_shuffle(a, b):
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in vars(a))


def edit(path, at, value, code="<i"):
    data = bytearray(path.read_bytes())
    struct.pack_into(code, data, at, value)
    path.write_bytes(data)


def test_layout_is_llmc(tmp_path):
    """Every byte, packed here by hand."""
    path = tmp_path / "state.bin"
    state = make_state(rank=1, num_processes=3, options={"b": 4})
    write_state(path, state)
    header = bytearray(1024)
    struct.pack_into("<6i", header, 0, 20240527, 1, 3, 1, 0, 1)
    struct.pack_into("<i", header, 40, 7)
    struct.pack_into("<QQ", header, 80, (1 << 64) - 2, 0)
    struct.pack_into("<QQ", header, 120, 1, 4)
    struct.pack_into("<3i", header, 512, 20261121, 1, 8)
    mersenne = struct.pack("<QiI624I2I", 0, 325, 300, *state.shuffle.mt_key.tolist(), 0, 0x9908B0DF)
    assert len(mersenne) == 2520
    expected = [
        bytes(header),
        state.m.tobytes(),
        state.v.tobytes(),
        struct.pack("<Q3i", 3, 1, 0, 2),
        struct.pack("<Q4i", 4, 3, 0, 1, 2),
        mersenne,
        b'{"b": 4}',
    ]
    assert path.read_bytes() == b"".join(expected)


@pytest.mark.parametrize("shuffle", [None, make_shuffle(), make_shuffle(1), make_shuffle(624)])
def test_round_trip(tmp_path, shuffle):
    first, second = tmp_path / "a.bin", tmp_path / "b.bin"
    state = make_state(shuffle=shuffle)
    write_state(first, state)
    again = read_state(first, N)
    write_state(second, again)
    assert second.read_bytes() == first.read_bytes()
    for name in ("step", "rng_state", "shard", "sample", "options", "rank", "num_processes"):
        assert getattr(again, name) == getattr(state, name)
    assert np.array_equal(again.m, state.m) and np.array_equal(again.v, state.v)
    assert again.m.dtype == again.v.dtype == np.float32
    again.m += 1  # AdamW updates in place
    assert same_shuffle(again.shuffle, shuffle) if shuffle else again.shuffle is None


def test_reads_llmc_files(tmp_path):
    """No extension; and a generator that was seeded but not used, which llm.c marks with left 1, next 0."""
    path = tmp_path / "state.bin"
    write_state(path, make_state(options={}))
    data = bytearray(path.read_bytes())[:-2]
    data[512:524] = bytes(12)
    struct.pack_into("<Qi", data, len(data) - 2520, 0xDEADBEEF, 1)
    struct.pack_into("<I", data, len(data) - 2520 + 12, 0)
    path.write_bytes(data)
    state = read_state(path, N)
    assert state.options == {}
    assert state.shuffle.mt_pos == 624


def test_resume_through_a_file(tmp_path):
    """Loader and sampler go on bit for bit, also from a generator that was never used."""
    rng = np.random.default_rng(0)
    for i in range(2):
        write_tokens(tmp_path / f"{i}.bin", rng.integers(0, 13, size=100 + 50 * i).astype(np.uint16))
    for done in (0, 3, 40):
        with DataLoader(str(tmp_path / "?.bin"), 2, 4, shuffle=True) as loader:
            sampler = Sampler()
            for _ in range(done):
                loader.next_batch()
                sampler.random_f32()
            zeros = np.zeros(N, np.float32)
            saved = TrainState(done, sampler.state, loader.shard, loader.sample, zeros, zeros, loader.state())
            write_state(tmp_path / "state", saved)
            state = read_state(tmp_path / "state", N)
            with DataLoader(str(tmp_path / "?.bin"), 2, 4, shuffle=True) as resumed:
                resumed.restore(state.shard, state.sample, state.shuffle)
                for _ in range(60):
                    expected = loader.next_batch()[0].copy()
                    assert np.array_equal(resumed.next_batch()[0], expected)
            assert Sampler(state.rng_state).random_u32() == sampler.random_u32()


END = 1024 + 8 * N  # of m and v
SHARDS, SAMPLES, MERSENNE = END, END + 8 + 12, END + 8 + 12 + 8 + 16


@pytest.mark.parametrize(
    "at, code, value, found",
    [
        (0, "<i", 20240326, "magic 20240326, expected 20240527"),
        (4, "<i", 2, "version 2, expected 1"),
        (8, "<i", 0, "rank 0 of 0 processes"),
        (12, "<i", 1, "rank 1 of 1 processes"),
        (12, "<i", -1, "rank -1 of 1 processes"),
        (16, "<i", 1, "has master weights"),
        (16, "<i", 2, "use_master_weights is 2, expected 0 or 1"),
        (20, "<i", -1, "should_shuffle is -1, expected 0 or 1"),
        (20, "<i", 0, "too long"),
        (40, "<i", -1, "step -1"),
        (80, "<Q", 0, "rng_state 0"),
        (120, "<Q", 1 << 31, "expected below 2^31"),
        (120, "<Q", 3, "shard 3, sample 4; expected within 3 shards and 4 samples"),
        (128, "<Q", 5, "shard 1, sample 5"),
        (516, "<i", 2, "header extension 2"),
        (520, "<i", -1, "-1 bytes of options"),
        (520, "<i", 1 << 30, "truncated: options takes 1073741824 bytes"),
        (520, "<i", 10, "too long"),
        (SHARDS, "<Q", 0, "shard_indices is no permutation"),
        (SHARDS, "<Q", 1 << 63, "truncated: shard_indices takes"),
        (SHARDS + 8, "<i", 0, "shard_indices is no permutation of 0..2"),
        (SHARDS + 8, "<i", -1, "shard_indices is no permutation"),
        (SAMPLES + 8, "<i", 4, "intra_shard_indices is no permutation of 0..3"),
        (MERSENNE + 8, "<i", 324, "left 324, next 300"),
        (MERSENNE + 12, "<I", 625, "left 325, next 625"),
        (MERSENNE + 2516, "<I", 1, "Mersenne Twister with matrix"),
    ],
)
def test_bad_state(tmp_path, at, code, value, found):
    path = tmp_path / "state.bin"
    write_state(path, make_state())
    edit(path, at, value, code)
    with pytest.raises(UserError) as error:
        read_state(path, N)
    assert str(path) in error.value.message
    assert found in error.value.message
    assert error.value.hint


@pytest.mark.parametrize("text", [b"[1]", b"{", b"\xff\xff", b"[" * 100_000, b"1" * 5000])
def test_bad_options(tmp_path, text):
    path = tmp_path / "state.bin"
    write_state(path, make_state(options={}))
    path.write_bytes(path.read_bytes()[:-2] + text)
    edit(path, 520, len(text))
    with pytest.raises(UserError, match="options are"):
        read_state(path, N)


def test_state_of_another_size(tmp_path):
    path = tmp_path / "state.bin"
    write_state(path, make_state(shuffle=None, options={}))
    with pytest.raises(UserError, match="truncated: v takes"):
        read_state(path, N + 1)
    with pytest.raises(UserError, match="too long"):
        read_state(path, N - 1)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError):
            read_state(path, N)
    with pytest.raises(ValueError, match="20 values of m, 3 of v"):
        write_state(path, make_state(v=np.zeros(3, np.float32)))


def test_too_long(tmp_path):
    path = tmp_path / "state.bin"
    write_state(path, make_state())
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(UserError, match="too long"):
        read_state(path, N)


def test_memory(tmp_path):
    """Writing copies neither m nor v; reading takes what they take; a header can make it take no more."""
    path, size = tmp_path / "state.bin", 1 << 20
    m, v = np.zeros((2, size), np.float32)
    tracemalloc.start()
    write_state(path, TrainState(0, 1, 0, 0, m, v))
    writing = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    read_state(path, size)
    reading = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert writing < 1e6
    assert reading < 8 * size + 1e6


def make_debug_state():
    rng = np.random.default_rng(0)
    inputs, targets = rng.integers(0, CONFIG.V, size=(2, 3, 5)).astype(np.int32)
    logits = rng.normal(size=(3, 5, CONFIG.V)).astype(np.float32)
    return DebugState(inputs, targets, logits, 2.5, rng.normal(size=num_parameters(CONFIG)).astype(np.float32))


def test_debug_state_layout(tmp_path):
    path = tmp_path / "debug_state.bin"
    state = make_debug_state()
    write_debug_state(path, state)
    header = np.zeros(256, "<i4")
    header[:4] = 20240327, 2, 3, 5
    parts = (header, state.inputs, state.targets, state.logits, np.float32(2.5), state.grads)
    assert path.read_bytes() == b"".join(part.tobytes() for part in parts)
    again = read_debug_state(path, CONFIG)
    for name in ("inputs", "targets", "logits", "loss", "grads"):
        assert np.array_equal(getattr(again, name), getattr(state, name))


@pytest.mark.parametrize(
    "at, value, found",
    [
        (0, 20240527, "magic 20240527, expected 20240327"),
        (4, 1, "version 1, expected 2"),
        (8, 0, "B, T are 0, 5"),
        (8, 1 << 30, "truncated"),
        (12, 9, "B, T are 3, 9; expected 1 or more, and T up to 8"),
        (12, 4, "too long"),
        (1024, 13, "inputs 0..13, the model knows 0..12"),
        (1024 + 60, -1, "targets -1..12"),
    ],
)
def test_bad_debug_state(tmp_path, at, value, found):
    path = tmp_path / "debug_state.bin"
    state = make_debug_state()
    state.inputs.flat[1:3] = state.targets.flat[1:3] = 0, 12
    write_debug_state(path, state)
    edit(path, at, value)
    with pytest.raises(UserError) as error:
        read_debug_state(path, CONFIG)
    assert str(path) in error.value.message
    assert found in error.value.message
    assert error.value.hint


def test_state_path_names_the_weights(tmp_path):
    model = Model(CONFIG, np.arange(10, dtype=np.float32), step=20)
    path = state_path(tmp_path / "run.bin", model, rank=3)
    assert path.parent == tmp_path
    crc = zlib.crc32(model.params.tobytes())
    assert path.name == f"run_state_00000020_00003_{crc:08x}.bin"
    model.params[0] = 1
    assert state_path(tmp_path / "run.bin", model, rank=3) != path


def test_state_path_names_the_extra_values(tmp_path):
    params, extra = np.arange(10, dtype=np.float32), np.ones(3, np.float32)
    model = Model(CONFIG, params, step=20, extra=extra)
    path = state_path(tmp_path / "run.bin", model)
    assert path.name == f"run_state_00000020_00000_{zlib.crc32(params.tobytes() + extra.tobytes()):08x}.bin"
    extra[2] = np.nextafter(extra[2], np.float32(2))
    assert state_path(tmp_path / "run.bin", model) != path


@pytest.mark.parametrize("config", [CONFIG, DEEPSEEK])
def test_moments_of_extra_values(tmp_path, config):
    """m and v are as long as parameters and extra values together; the state of other extra values is not taken."""
    path, rng = tmp_path / "run.bin", np.random.default_rng(0)
    count = num_parameters(config)
    params, extra = rng.normal(size=count).astype(np.float32), rng.normal(size=5).astype(np.float32)
    m, v = rng.normal(size=(2, count + 5)).astype(np.float32)
    saved = Model(config, params, step=7, kind=SPARSE_ATTENTION, fields=(4, 2, 8), extra=extra)
    save_checkpoint(path, saved, make_state(m=m, v=v))
    model, state = load_checkpoint(path)
    assert model.config == config and model.fields[:4] == (4, 2, 8, 0)
    assert model.params.tobytes() == params.tobytes() and model.extra.tobytes() == extra.tobytes()
    assert state.m.tobytes() == m.tobytes() and state.v.tobytes() == v.tobytes()

    with pytest.raises(ValueError, match=f"{count} values of m, the model has {count} and 5 extra"):
        save_checkpoint(path, saved, make_state(m=m[:count], v=v[:count]))
    model.extra[0] += 1
    write_model(path, model)
    with pytest.raises(UserError, match="no optimizer state beside it"):
        load_checkpoint(path)


def save_forever(path, started):
    """Save one checkpoint after another at `path`, random weights each; a byte into `started` for each."""
    rng = np.random.default_rng()
    step = read_model(path).step if path.exists() else 0
    while True:
        step += 1
        params = rng.normal(size=num_parameters(CONFIG)).astype(np.float32)
        state = TrainState(step, 1, 0, 0, params, params, make_shuffle(), OPTIONS)
        save_checkpoint(path, Model(CONFIG, params, step=step), state)
        os.write(started, b".")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills processes made by fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # fork beside BLAS threads: the child uses none
def test_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path):
    moments, path, steps = random.Random(0), tmp_path / "checkpoint.bin", []
    for _ in range(50):
        hear, started = os.pipe()
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                save_forever(path, started)
            os._exit(1)
        os.close(started)
        assert os.read(hear, 1)
        time.sleep(moments.uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
        os.close(hear)

        model, state = load_checkpoint(path)
        assert np.array_equal(state.m, model.params)
        steps.append(model.step)
    assert steps == sorted(set(steps))
