"""Sparse attention's CUDA kernels against their NumPy twins, inverse lists, causality to the bit."""

import numpy as np
import pytest
from test_cuda_kernels import check, nan, place, rounded
from test_sparse_attention import lists

from kernels import cpu, cuda
from kernels.cuda.sparse.inverse_lists import inverse_lists
from llmc.errors import UserError


@pytest.mark.parametrize("B, T, K, future", [
    (1, 1, 1, False), (2, 70, 9, False), (1, 33, 33, True), (3, 40, 5, True), (1, 200, 2, False),
])  # fmt: skip
def test_inverse_lists(runtime, B, T, K, future):
    index, count = lists(B, T, K, future=future)
    offsets, pairs = map(runtime.to_host, inverse_lists(runtime, runtime.to_device(index), runtime.to_device(count)))
    for b in range(B):
        assert offsets[b, 0] == 0 and offsets[b, T] == count[b].sum()
        for s in range(T):
            found = pairs[b, offsets[b, s] : offsets[b, s + 1]]
            assert found.tolist() == np.flatnonzero(index[b] == s).tolist()


def test_inverse_lists_of_a_long_sequence(emulator):
    """More keys than the threads that sum them up, more lists than chunks of the smallest size."""
    T, K = 2200, 2
    index = np.stack([np.zeros(T, np.int32), np.maximum(np.arange(T, dtype=np.int32), 1)], axis=1)[None]
    count = np.full((1, T), 2, np.int32)
    offsets, pairs = map(
        emulator.to_host, inverse_lists(emulator, emulator.to_device(index), emulator.to_device(count))
    )
    assert offsets[0].tolist() == [0, T, T + 2, *range(T + 3, 2 * T + 1)]
    assert pairs[0].tolist() == [*range(0, K * T, K), 1, 3, *range(5, K * T, K)]


@pytest.mark.parametrize("B, T, NH, hs, K, future, offset", [
    (1, 1, 1, 1, 1, False, 0), (2, 7, 3, 4, 3, True, 0), (1, 70, 2, 5, 33, False, 0), (1, 33, 1, 128, 9, False, 0),
    (1, 18, 2, 64, 18, True, 0), (2, 20, 2, 8, 20, False, 1), (1, 9, 1, 80, 4, False, 3),
])  # fmt: skip
def test_sparse_attention(runtime, B, T, NH, hs, K, future, offset):
    C = NH * hs
    qkv, out, lse = rounded(B, T, 3 * C), nan(B * T, C), nan(B, NH, T)
    index, count = lists(B, T, K, future=future)
    check(runtime, "sparse_attention_forward", out, lse, qkv, index, count, NH, offset=offset)
    cpu.sparse_attention_forward(out, lse, qkv, index, count, NH)
    args = nan(B, T, 3 * C), rounded(B * T, C), qkv, out, lse, index, count, NH
    check(runtime, "sparse_attention_backward", *args, offset=offset)
    check(runtime, "sparse_attention_mean", nan(B, T, K), qkv, lse, index, count, NH, offset=offset)
    for start in {T - 1, T // 2}:
        index, count = lists(B, T, K, start, future)
        args = nan(B * (T - start), C), nan(B, NH, T - start), qkv, index, count, NH, start
        check(runtime, "sparse_attention_forward", *args, offset=offset)


@pytest.mark.parametrize("B, T, NH, hs, first, R, S, offset", [
    (1, 1, 1, 1, 0, 1, 1, 0), (2, 9, 3, 4, 2, 5, 9, 0), (1, 100, 2, 5, 30, 66, 100, 0), (1, 70, 2, 40, 0, 70, 70, 1),
    (1, 5, 1, 130, 4, 1, 5, 0),
])  # fmt: skip
def test_attention_mean(runtime, B, T, NH, hs, first, R, S, offset):
    C = NH * hs
    qkv, out, lse = rounded(B, T, 3 * C), np.empty((B * T, C)), np.empty((B, NH, T))
    cpu.attention_forward(out, lse, qkv, NH)
    check(runtime, "attention_mean", nan(B, R, S), qkv, lse, NH, first, offset=offset)
    lse = np.ascontiguousarray(lse[:, :, first:])
    check(runtime, "attention_mean", nan(B, R, S), qkv, lse, NH, first, first, offset=offset)


def test_a_key_that_nobody_selected_gets_no_gradient(runtime):
    B, T, NH, C = 1, 40, 2, 16
    device = cuda.device(runtime)
    index, count = np.full((B, T, 2), -1, np.int32), np.ones((B, T), np.int32)
    index[:, :, 0] = np.arange(T) // 10 * 10
    qkv, dout, out, lse, dqkv, index, count = (
        place(runtime, array, 0)
        for array in (
            rounded(B, T, 3 * C),
            rounded(B * T, C),
            nan(B * T, C),
            nan(B, NH, T),
            nan(B, T, 3 * C),
            index,
            count,
        )
    )
    device.sparse_attention_forward(out, lse, qkv, index, count, NH)
    device.sparse_attention_backward(dqkv, dout, qkv, out, lse, index, count, NH)
    values = runtime.to_host(dqkv)[:, :, C:]
    assert not values[:, np.arange(T) % 10 > 0].any() and values[:, ::10, C:].all()


@pytest.mark.parametrize("cut", [1, 40, 64])
def test_causal_bit_for_bit(runtime, cut):
    """Not a bit before position `cut` depends on what comes there and after, NaN and other lists included."""
    B, T, NH, C, K = 1, 70, 2, 16, 12
    device, rng = cuda.device(runtime), np.random.default_rng(1)
    qkv = rng.standard_normal((B, T, 3 * C), np.float32)
    index, count = lists(B, T, K)
    results = []
    for _ in range(2):
        there = [runtime.to_device(array) for array in (qkv, index, count)]
        out, lse, p, dense = (runtime.zeros(shape) for shape in ((B * T, C), (B, NH, T), (B, T, K), (B, T, T)))
        device.sparse_attention_forward(out, lse, *there, NH)
        device.sparse_attention_mean(p, there[0], lse, *there[1:], NH)
        device.attention_mean(dense, there[0], lse, NH, 0)
        out, lse, p, dense = map(runtime.to_host, (out, lse, p, dense))
        results.append([x.tobytes() for x in (out[:cut], lse[:, :, :cut], p[:, :cut], dense[:, :cut])])
        qkv[:, cut:] = np.nan
        other = lists(B, T, K, full=True, seed=1)
        index[:, cut:], count[:, cut:] = other[0][:, cut:], other[1][:, cut:]
    assert results[0] == results[1]


def test_heads_that_a_warp_cannot_hold_are_refused(emulator):
    device, zeros = cuda.device(emulator), emulator.zeros
    qkv, out, lse, index, count = zeros((1, 2, 390)), zeros((2, 130)), zeros((1, 1, 2)), zeros((1, 2, 1)), zeros((1, 2))
    for refused in (
        lambda: device.sparse_attention_forward(out, lse, qkv, index, count, 1),
        lambda: device.sparse_attention_backward(qkv, out, qkv, out, lse, index, count, 1),
    ):
        with pytest.raises(UserError, match="head size 130, on a GPU at most 128"):
            refused()
