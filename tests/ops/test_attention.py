"""Causal attention: gradients, the textbook form, causality to the bit, decoding."""

import numpy as np
import pytest
from check_op import check_op, check_twin, nan, place, relative, rounded

from kernels import cpu, cuda
from kernels.cuda.gpt2.attention import PASSING
from kernels.cuda.gpt2.attention_join import split_keys
from kernels.cuda.runtime.grid import padded_head
from llmc.errors import UserError

SIZES = [  # B, T, NH, hs
    (1, 1, 1, 4), (2, 5, 3, 4), (2, 64, 2, 8), (1, 150, 3, 4), (1, 33, 2, 8), (2, 64, 2, 16), (1, 130, 2, 64),
    (1, 70, 1, 80), (1, 65, 2, 128), (1, 40, 2, 5), (1, 7, 1, 1),
]  # fmt: skip


@pytest.mark.parametrize("B, T, NH, hs", SIZES)
def test_attention(device, B, T, NH, hs):
    outs = dict(out=(B * T, NH * hs), lse=(B, NH, T))
    check_op(device, "attention", outs, qkv=(B, T, 3 * NH * hs), NH=NH)


@pytest.mark.parametrize("B, T, NH, hs", SIZES)
def test_attention_of_the_last_queries(runtime, B, T, NH, hs):
    for start in {T - 1, T // 2, max(T - 8, 0), max(T - 9, 0)}:  # up to 8 queries have a kernel of their own
        n = T - start
        given = nan(B * n, NH * hs), nan(B, NH, n), rounded(B, T, 3 * NH * hs), NH, start
        check_twin(runtime, "attention_forward", *given)


def plain_attention(qkv, NH):
    """(B,T,3C) -> (B,T,C), the textbook way"""
    B, T, C3 = qkv.shape
    q, k, v = qkv.reshape(B, T, 3, NH, -1).transpose(2, 0, 3, 1, 4)
    scores = q @ k.transpose(0, 1, 3, 2) / np.sqrt(C3 // 3 // NH)
    weights = np.exp(scores) * np.tri(T)
    out = weights / weights.sum(axis=3, keepdims=True) @ v
    return out.transpose(0, 2, 1, 3).reshape(B, T, -1)


def test_attention_equals_the_textbook():
    B, T, NH, C = 2, 200, 4, 32
    qkv = np.random.default_rng(3).standard_normal((B, T, 3 * C))
    out, lse = np.empty((B * T, C)), np.empty((B, NH, T))
    cpu.attention_forward(out, lse, qkv, NH)
    assert relative(out.reshape(B, T, C), plain_attention(qkv, NH)) < 1e-13


@pytest.mark.parametrize("cut", [1, 63, 64, 100])
def test_attention_is_causal_bit_for_bit(cut):
    """What comes at position `cut` and after changes no bit of outputs before it, nor of gradients behind it."""
    B, T, NH, C = 2, 130, 2, 16
    rng = np.random.default_rng(4)
    qkv, dout = rng.standard_normal((B, T, 3 * C), np.float32), rng.standard_normal((B * T, C), np.float32)
    dout.reshape(B, T, C)[:, cut:] = 0  # a loss on the past alone
    results = []
    for _ in range(2):
        out, lse, dqkv = np.empty((B * T, C), "f"), np.empty((B, NH, T), "f"), np.empty_like(qkv)
        cpu.attention_forward(out, lse, qkv, NH)
        cpu.attention_backward(dqkv, dout, qkv, out, lse, NH)
        results.append((out.reshape(B, T, C)[:, :cut].copy(), lse[:, :, :cut].copy(), dqkv.copy()))
        qkv[:, cut:] = 100 * rng.standard_normal((B, T - cut, 3 * C), np.float32)
    (out1, lse1, dqkv1), (out2, lse2, dqkv2) = results
    assert out1.tobytes() == out2.tobytes() and lse1.tobytes() == lse2.tobytes()
    assert dqkv1[:, :cut].tobytes() == dqkv2[:, :cut].tobytes()
    assert not dqkv2[:, cut:].any()


def test_attention_of_the_last_queries_alone():
    """start=s gives the rows s.. of the whole, which is what a key-value cache relies on."""
    T, NH, C, start = 150, 2, 16, 97
    qkv = np.random.default_rng(5).standard_normal((1, T, 3 * C))
    whole, rest = np.empty((T, C)), np.empty((T - start, C))
    cpu.attention_forward(whole, np.empty((1, NH, T)), qkv, NH)
    cpu.attention_forward(rest, np.empty((1, NH, T - start)), qkv, NH, start)
    assert relative(rest, whole[start:]) < 1e-14


def test_attention_survives_large_scores():
    qkv = 300 * np.random.default_rng(6).standard_normal((1, 70, 48), np.float32)
    out, lse, dqkv = np.empty((70, 16), "f"), np.empty((1, 2, 70), "f"), np.empty_like(qkv)
    cpu.attention_forward(out, lse, qkv, 2)
    cpu.attention_backward(dqkv, np.ones_like(out), qkv, out, lse, 2)
    assert np.isfinite(out).all() and np.isfinite(dqkv).all()


# ----------------------------------------------------------------------------------------------------------------------
# on CUDA: the emulator, and a GPU if there is one


def test_sizes_that_a_kernel_cannot_hold_are_refused(emulator):
    device = cuda.device(emulator)
    qkv, out, lse = (emulator.zeros(shape) for shape in ((1, 2, 3 * 130), (2, 130), (1, 1, 2)))
    for refused in (
        lambda: device.attention_forward(out, lse, qkv, 1),
        lambda: device.attention_backward(qkv, out, qkv, out, lse, 1),
    ):
        with pytest.raises(UserError, match="head size 130, on a GPU at most 128"):
            refused()


@pytest.mark.parametrize("t", [3, 31, 64])
def test_attention_is_causal_bit_for_bit_on_cuda(runtime, t):
    """What belongs to positions before t keeps its bits whatever comes from t on, and dk, dv from t on whatever queries
    there are before."""
    B, T, NH, C = 1, 75, 2, 32
    device = cuda.device(runtime)

    def run(garbage=None, rows=None, columns=None):
        """Forward, its last rows by decoding, backward; with garbage in some rows and columns of qkv, and in dout."""
        qkv, dout = rounded(B, T, 3 * C), rounded(B * T, C)
        if garbage is not None:
            qkv[:, rows, columns] = dout[rows] = garbage
        qkv, dout = place(runtime, qkv, 0), place(runtime, dout, 0)
        out, lse, dqkv = (place(runtime, nan(*shape), 0) for shape in ((B * T, C), (B, NH, T), (B, T, 3 * C)))
        device.attention_forward(out, lse, qkv, NH)
        device.attention_backward(dqkv, dout, qkv, out, lse, NH)
        return runtime.to_host(out), runtime.to_host(lse), runtime.to_host(dqkv)[0]

    out, lse, dqkv = run()
    assert all(np.isfinite(array).all() for array in (out, lse, dqkv))
    for garbage in (1e30, np.inf, np.nan):
        later = run(garbage, slice(t, T), slice(0, 3 * C))
        assert later[0][:t].tobytes() == out[:t].tobytes() and later[1][..., :t].tobytes() == lse[..., :t].tobytes()
        assert later[2][:t, :C].tobytes() == dqkv[:t, :C].tobytes()
        earlier = run(garbage, slice(0, t), slice(0, C))
        assert earlier[2][t:, C:].tobytes() == dqkv[t:, C:].tobytes()


@pytest.mark.parametrize("n", [1, 8, 9, 40])
def test_the_last_queries_alone_give_what_they_give_among_all(runtime, n):
    """With the cache of keys: to the bit if the kernel is the same, else within float32's rounding; and causal."""
    T, NH, C = 75, 2, 32
    device, qkv = cuda.device(runtime), rounded(1, T, 3 * C)
    whole, lse = (place(runtime, nan(*shape), 0) for shape in ((T, C), (1, NH, T)))
    device.attention_forward(whole, lse, place(runtime, qkv, 0), NH)
    part, lse = (place(runtime, nan(*shape), 0) for shape in ((n, C), (1, NH, n)))
    device.attention_forward(part, lse, place(runtime, qkv, 0), NH, T - n)
    whole, part = runtime.to_host(whole)[T - n :], runtime.to_host(part)
    assert relative(part, whole) <= (0 if n > 8 else 1e-6)
    qkv[0, T - 1, C:] = np.nan  # the last key and value are for the last query alone
    device.attention_forward(again := place(runtime, nan(n, C), 0), lse, place(runtime, qkv, 0), NH, T - n)
    assert runtime.to_host(again)[: n - 1].tobytes() == part[: n - 1].tobytes()


@pytest.mark.parametrize(
    "B, T, NH, hs, n", [(2, 515, 2, 8, 8), (1, 700, 3, 5, 1), (1, 577, 1, 64, 3), (1, 640, 1, 80, 2)]
)
def test_many_keys_are_split_over_blocks(runtime, B, T, NH, hs, n):
    """A few queries against all that came before: NumPy's numbers; among more queries the same to rounding, and causal
    to the bit, also where the last part has no key for a query."""
    C, start, device = NH * hs, T - n, cuda.device(runtime)
    qkv = rounded(B, T, 3 * C)
    parts, share = split_keys(T, B * NH * n, PASSING[padded_head("", hs, PASSING)])
    assert parts > 1 and (parts - 1) * share < T <= parts * share and (n < 8 or start < (parts - 1) * share)
    check_twin(runtime, "attention_forward", nan(B * n, C), nan(B, NH, n), qkv, NH, start)

    def run(qkv, start):
        """out (B,queries,C), lse"""
        out, lse = (place(runtime, nan(*shape), 0) for shape in ((B * (T - start), C), (B, NH, T - start)))
        device.attention_forward(out, lse, place(runtime, qkv, 0), NH, start)
        return runtime.to_host(out).reshape(B, -1, C), runtime.to_host(lse)

    out, lse = run(qkv, start)
    assert relative(out, run(qkv, start - 9)[0][:, -n:]) <= 1e-6
    qkv[:, T - 1, C:] = np.nan  # the last key and value are for the last query alone
    later = run(qkv, start)
    assert later[0][:, : n - 1].tobytes() == out[:, : n - 1].tobytes() and np.isnan(later[0][:, n - 1]).all()
    assert later[1][..., : n - 1].tobytes() == lse[..., : n - 1].tobytes()


def test_how_keys_are_split():
    """Parts of at least 128 keys, whole tiles, so many that an H100's 132 multiprocessors have work; few keys stay."""
    assert split_keys(1024, 12, 64) == (8, 128) and split_keys(16384, 12, 64) == (43, 384)
    assert split_keys(1000, 600, 64) == (1, 1024)
    launched = []

    class Recorder:
        def launch(self, kernel, grid, block, args):
            launched.append((kernel, grid))

        def scratch(self, key, shape):
            return np.empty(shape)

        def is_array(self, value):
            return False

        def constant(self, values):
            return values

    for T in (512, 513):
        qkv, out, lse = np.empty((1, T, 3 * 768)), np.empty((1, 768)), np.empty((1, 12, 1))
        cuda.OPS["attention_forward"](Recorder(), out, lse, qkv, 12, T - 1)
    decode, join = "attention_decode_64_kernel", "attention_join_kernel"
    assert launched == [(decode, (12, 1, 1)), (decode, (12, 1, 5)), (join, 12)]
