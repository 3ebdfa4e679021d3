"""Attention over selected keys: gradients, both forms, dense attention, causality, what is not selected."""

import numpy as np
import pytest
from check_op import check_op, check_twin, nan, place, relative, rounded
from selected_keys import lists

from kernels import cpu, cuda
from kernels.cpu import blocks
from kernels.cpu.sparse import sparse_attention
from llmc.errors import UserError

FORMS = ("masked", "gathered")


def use_form(monkeypatch, form: str) -> None:
    """Has the CPU's ops use one form, whatever the sizes."""
    monkeypatch.setattr(sparse_attention, "_gathers", lambda *sizes, **which: form == "gathered")


@pytest.fixture(params=FORMS)
def form(request, monkeypatch) -> str:
    use_form(monkeypatch, request.param)
    return request.param


def forward(qkv, index, count, NH, start=0):
    B, T, C3 = qkv.shape
    out, lse = np.full((B * (T - start), C3 // 3), np.nan, qkv.dtype), np.full((B, NH, T - start), np.nan, qkv.dtype)
    cpu.sparse_attention_forward(out, lse, qkv, index, count, NH, start)
    return out, lse


def backward(dout, out, lse, qkv, index, count, NH):
    dqkv = np.full_like(qkv, np.nan)
    cpu.sparse_attention_backward(dqkv, dout, qkv, out, lse, index, count, NH)
    return dqkv


def plain_probabilities(qkv, index, NH, start=0):
    """(B,NH,T-start,T), the textbook way: softmax over all keys, of which those not selected are struck out"""
    B, T, C3 = qkv.shape
    q, k, _ = qkv.reshape(B, T, 3, NH, -1).transpose(2, 0, 3, 1, 4)
    selected = np.zeros((B, T - start, T), bool)
    for b, t, n in np.argwhere(index >= 0):
        selected[b, t, index[b, t, n]] = True
    weights = np.exp(q[:, :, start:] @ k.swapaxes(2, 3) / np.sqrt(C3 // 3 // NH)) * selected[:, None]
    return weights / weights.sum(axis=3, keepdims=True)


# B, T, NH, hs, K, offset
SIZES = [
    (1, 1, 1, 4, 1, 0), (2, 5, 3, 4, 3, 0), (2, 64, 2, 8, 64, 0), (1, 150, 3, 5, 9, 0), (1, 1, 1, 1, 1, 0),
    (2, 7, 3, 4, 3, 0), (1, 70, 2, 5, 33, 0), (1, 33, 1, 128, 9, 0), (1, 18, 2, 64, 18, 0), (2, 20, 2, 8, 20, 1),
    (1, 9, 1, 80, 4, 3),
]  # fmt: skip


@pytest.mark.parametrize("future", [False, True])
@pytest.mark.parametrize("B, T, NH, hs, K, offset", SIZES)
def test_sparse_attention(device, monkeypatch, B, T, NH, hs, K, offset, future):
    index, count = lists(B, T, K, future=future)
    outs, given = dict(out=(B * T, NH * hs), lse=(B, NH, T)), dict(index=index, count=count, NH=NH)
    for form in FORMS if device is cpu else FORMS[:1]:
        use_form(monkeypatch, form)
        check_op(device, "sparse_attention", outs, (), offset, qkv=(B, T, 3 * NH * hs), **given)


@pytest.mark.parametrize("future", [False, True])
@pytest.mark.parametrize("start", [0, 60])
def test_output_and_mean_equal_the_textbook(form, start, future):
    B, T, NH, C, K = 2, 150, 4, 32, 20
    qkv = np.random.default_rng(1).standard_normal((B, T, 3 * C))
    index, count = lists(B, T, K, start, future)
    a = plain_probabilities(qkv, index, NH, start)
    out, lse = forward(qkv, index, count, NH, start)
    v = qkv.reshape(B, T, 3, NH, -1)[:, :, 2].transpose(0, 2, 1, 3)
    assert relative(out.reshape(B, T - start, C), (a @ v).transpose(0, 2, 1, 3).reshape(B, T - start, C)) < 1e-13
    if start == 0:
        p = np.full((B, T, K), np.nan)
        cpu.sparse_attention_mean(p, qkv, lse, index, count, NH)
        expected = np.take_along_axis(a.mean(axis=1), np.maximum(index, 0), axis=2)
        assert relative(p, np.where(index < 0, 0, expected)) < 1e-13
        assert not p[index < 0].any()
        assert np.abs(p.sum(axis=2) - 1).max() < 1e-13


def test_all_keys_selected_is_dense_attention(form):
    B, T, NH, C = 2, 130, 2, 16
    rng = np.random.default_rng(2)
    qkv, dout = rng.standard_normal((B, T, 3 * C)), rng.standard_normal((B * T, C))
    index, count = lists(B, T, T, full=True)
    out, lse, dqkv = np.empty((B * T, C)), np.empty((B, NH, T)), np.empty_like(qkv)
    cpu.attention_forward(out, lse, qkv, NH)
    cpu.attention_backward(dqkv, dout, qkv, out, lse, NH)
    ours = forward(qkv, index, count, NH)
    assert relative(ours[0], out) < 1e-13 and relative(ours[1], lse) < 1e-13
    assert relative(backward(dout, *ours, qkv, index, count, NH), dqkv) < 1e-13


@pytest.mark.parametrize("cut", [1, 63, 64, 100])
def test_causal_bit_for_bit(form, cut):
    """What comes at position `cut` and after, lists and their lengths included, changes no bit before it."""
    B, T, NH, C, K = 2, 130, 2, 16, 24
    rng = np.random.default_rng(4)
    qkv, dout = rng.standard_normal((B, T, 3 * C), np.float32), rng.standard_normal((B * T, C), np.float32)
    dout.reshape(B, T, C)[:, cut:] = 0  # a loss on the past alone
    index, count = lists(B, T, K)
    results, gradients = [], []
    for _ in range(2):
        out, lse = forward(qkv, index, count, NH)
        dqkv, p, dense = (
            backward(dout, out, lse, qkv, index, count, NH),
            np.empty((B, T, K), "f"),
            np.empty((B, T, T), "f"),
        )
        cpu.sparse_attention_mean(p, qkv, lse, index, count, NH)
        cpu.attention_mean(dense, qkv, lse, NH, 0)
        before = out.reshape(B, T, C)[:, :cut], lse[:, :, :cut], p[:, :cut], dense[:, :cut], dqkv[:, :cut, :C]
        results.append([values.tobytes() for values in before])
        gradients.append(dqkv[:, :cut])
        assert not dqkv[:, cut:].any()
        qkv[:, cut:] = 5 * rng.standard_normal((B, T - cut, 3 * C), np.float32)
        other = lists(B, T, K, full=True, seed=1)
        index[:, cut:], count[:, cut:] = other[0][:, cut:], other[1][:, cut:]
    assert results[0] == results[1]
    # dk and dv are sums over another number of queries, of which the later ones add 0
    assert relative(*gradients) < 1e-6


def test_a_key_that_nobody_selected_gets_no_gradient(form):
    B, T, NH, C = 2, 100, 2, 8
    rng = np.random.default_rng(5)
    qkv, dout = rng.standard_normal((B, T, 3 * C)), rng.standard_normal((B * T, C))
    index = np.full((B, T, 2), -1, np.int32)
    index[:, :, 0] = np.arange(T) // 10 * 10  # one key, a tenth of the positions
    out, lse = forward(qkv, index, np.ones((B, T), np.int32), NH)
    dqkv = backward(dout, out, lse, qkv, index, np.ones((B, T), np.int32), NH)
    assert not dqkv[:, np.arange(T) % 10 > 0, C:].any()
    assert dqkv[:, ::10, 2 * C :].all()
    # with one key each the weight is 1: the value comes out, its gradient is the sum of dout, and scores do not matter
    assert relative(out.reshape(B, T, C), qkv[:, index[0, :, 0], 2 * C :]) < 1e-15
    assert relative(dqkv[:, ::10, 2 * C :], dout.reshape(B, T // 10, 10, C).sum(axis=2)) < 1e-14
    assert np.abs(dqkv[:, :, : 2 * C]).max() < 1e-14


def test_scores_far_apart_neither_overflow_nor_warn(form):
    """The largest score of all may be one that is not selected, 1e4 above the others."""
    B, T, NH, C, K = 1, 70, 1, 4, 3
    qkv = np.ones((B, T, 3 * C), np.float32)
    qkv[:, 0, C : 2 * C] = 1e4
    index = np.full((B, T, K), -1, np.int32)
    index[:, :, 0] = np.arange(T)
    count = np.ones((B, T), np.int32)
    with np.errstate(over="raise", invalid="raise"):
        out, lse = forward(qkv, index, count, NH)
        p = np.empty((B, T, K), np.float32)
        cpu.sparse_attention_mean(p, qkv, lse, index, count, NH)
        dqkv = backward(out, out, lse, qkv, index, count, NH)
    assert np.array_equal(out, np.ones_like(out)) and np.isfinite(dqkv).all()
    assert np.array_equal(p[:, :, 0], np.ones((B, T)))


def test_threads_change_no_bit(form, monkeypatch):
    B, T, NH, C, K = 2, 200, 2, 16, 40
    rng = np.random.default_rng(6)
    qkv, dout = rng.standard_normal((B, T, 3 * C), np.float32), rng.standard_normal((B * T, C), np.float32)
    index, count = lists(B, T, K)
    monkeypatch.setattr(blocks, "PARALLEL_BYTES", 0)
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1 << 16)
    results = []
    for threads in (1, 3):
        monkeypatch.setattr(blocks, "num_threads", lambda threads=threads: threads)
        out, lse = forward(qkv, index, count, NH)
        dqkv, p = backward(dout, out, lse, qkv, index, count, NH), np.empty((B, T, K), np.float32)
        cpu.sparse_attention_mean(p, qkv, lse, index, count, NH)
        results.append([values.tobytes() for values in (out, lse, dqkv, p)])
    assert results[0] == results[1]


@pytest.mark.parametrize("T, C, NH, K, gathers", [
    (1024, 128, 4, 16, (True, True)), (4096, 768, 12, 128, (True, True)), (1024, 128, 4, 128, (False, False)),
    (1024, 768, 12, 1024, (False, False)), (64, 128, 4, 2, (True, False)),
])  # fmt: skip
def test_few_keys_are_gathered(T, C, NH, K, gathers):
    qkv, index = np.empty((1, T, 3 * C), np.float32), np.empty((1, T, K), np.int32)
    chosen = tuple(sparse_attention._gathers(qkv, index, NH, backward) for backward in (False, True))
    assert chosen == gathers


def test_gathered_values_can_be_asked_for_twice():
    qkv = np.random.default_rng(0).standard_normal((2, 5, 12)).astype(np.float32)
    index = np.array([[[0, 2], [1, 4]], [[3, -1], [0, 1]]], np.int32)
    gathered = sparse_attention._Gathered(qkv, index, 1, 0, 0, 4)
    first, again = gathered.values().copy(), gathered.values()
    assert np.array_equal(first, again) and np.array_equal(first[1, 0], qkv[0, [1, 4], 8:])


# ----------------------------------------------------------------------------------------------------------------------
# on CUDA: the emulator, and a GPU if there is one


@pytest.mark.parametrize("future", [False, True])
@pytest.mark.parametrize("B, T, NH, hs, K, offset", SIZES)
def test_mean_and_the_last_queries(runtime, B, T, NH, hs, K, offset, future):
    C, (index, count) = NH * hs, lists(B, T, K, future=future)
    qkv, out, lse = rounded(B, T, 3 * C), nan(B * T, C), nan(B, NH, T)
    cpu.sparse_attention_forward(out, lse, qkv, index, count, NH)
    check_twin(runtime, "sparse_attention_mean", nan(B, T, K), qkv, lse, index, count, NH, offset=offset)
    for start in {T - 1, T // 2}:
        index, count = lists(B, T, K, start, future)
        args = nan(B * (T - start), C), nan(B, NH, T - start), qkv, index, count, NH, start
        check_twin(runtime, "sparse_attention_forward", *args, offset=offset)


def test_a_key_that_nobody_selected_gets_no_gradient_on_cuda(runtime):
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
def test_causal_bit_for_bit_on_cuda(runtime, cut):
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
