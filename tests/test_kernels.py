"""Every op of kernels/cpu: gradients against finite differences, float32 against float64, exact properties."""

import numpy as np
import pytest
from check_op import check_op, relative

from kernels import cpu as ops
from kernels.cpu import blocks
from kernels.cpu.band.band_mask import band_columns, band_count
from kernels.cpu.band.band_matmul import best_channels, blocks_of_band
from kernels.cpu.blocks import PARALLEL_BYTES
from kernels.cpu.gpt2 import attention


@pytest.mark.parametrize("B, T, C, V", [(1, 1, 4, 5), (3, 5, 8, 6), (2, 33, 12, 50)])
def test_encoder(B, T, C, V):
    tokens = np.random.default_rng(1).integers(0, V, (B, T)).astype(np.int32)  # repeats: B*T > V in the second case

    def forward(wte, wpe):
        out = np.empty((B * T, C), wte.dtype)
        ops.encoder_forward(out, tokens, wte, wpe)
        return (out,)

    def backward(dout, saved, wte, wpe):
        dwte, dwpe = np.zeros_like(wte), np.zeros_like(wpe)
        ops.encoder_backward(dwte, dwpe, dout, tokens)
        return dict(wte=dwte, wpe=dwpe)

    check_op(forward, backward, wte=(V, C), wpe=(T + 2, C))


def test_encoder_refuses_tokens_outside_the_embedding():
    out, wte, wpe = np.zeros((2, 4)), np.zeros((5, 4)), np.zeros((2, 4))
    for tokens in ([[0, 5]], [[-1, 0]]):
        with pytest.raises(IndexError, match=r"rows 0\.\.4"):
            ops.encoder_forward(out, np.array(tokens, np.int32), wte, wpe)


@pytest.mark.parametrize("N, C", [(1, 4), (7, 36), (64, 768), (1500, 512)])  # the last one is two blocks of rows
def test_layernorm(N, C):
    def forward(inp, weight, bias):
        out, mean, rstd = np.empty_like(inp), np.empty(N, inp.dtype), np.empty(N, inp.dtype)
        ops.layernorm_forward(out, mean, rstd, inp, weight, bias)
        return out, mean, rstd

    def backward(dout, saved, inp, weight, bias):
        dinp, dweight, dbias = np.zeros_like(inp), np.zeros_like(weight), np.zeros_like(bias)
        ops.layernorm_backward(dinp, dweight, dbias, dout, inp, weight, *saved[1:])
        return dict(inp=dinp, weight=dweight, bias=dbias)

    check_op(forward, backward, inp=(N, C), weight=(C,), bias=(C,))


@pytest.mark.parametrize("N, C, OC", [(1, 1, 3), (5, 12, 20), (64, 48, 600)])
def test_matmul(N, C, OC):
    def forward(inp, weight, bias):
        out = np.empty((N, OC), inp.dtype)
        ops.matmul_forward(out, inp, weight, bias)
        return (out,)

    def backward(dout, saved, inp, weight, bias):
        dinp, dweight, dbias = np.full_like(inp, np.nan), np.full_like(weight, np.nan), np.zeros_like(bias)
        ops.matmul_backward(dinp, dweight, dbias, dout, inp, weight)
        return dict(inp=dinp, weight=dweight, bias=dbias)

    check_op(forward, backward, inp=(N, C), weight=(OC, C), bias=(OC,))


def test_matmul_beta_adds_to_the_gradient():
    rng = np.random.default_rng(2)
    inp, weight, dout = (rng.standard_normal(shape) for shape in ((9, 16), (300, 16), (9, 300)))
    dinp, once, twice = np.empty_like(inp), np.empty_like(weight), np.empty_like(weight)
    ops.matmul_backward(dinp, once, None, dout, inp, weight)
    ops.matmul_backward(dinp, twice, None, dout, inp, weight)
    ops.matmul_backward(dinp, twice, None, dout, inp, weight, beta=1)
    assert relative(twice, 2 * once) < 1e-15
    assert relative(once, dout.T @ inp) < 1e-15


@pytest.mark.parametrize("B, T, NH, hs", [(1, 1, 1, 4), (2, 5, 3, 4), (2, 64, 2, 8), (1, 150, 3, 4)])
def test_attention(B, T, NH, hs):
    C = NH * hs

    def forward(qkv):
        out, lse = np.empty((B * T, C), qkv.dtype), np.empty((B, NH, T), qkv.dtype)
        ops.attention_forward(out, lse, qkv, NH)
        return out, lse

    def backward(dout, saved, qkv):
        dqkv = np.full_like(qkv, np.nan)
        ops.attention_backward(dqkv, dout, qkv, *saved, NH)
        return dict(qkv=dqkv)

    check_op(forward, backward, qkv=(B, T, 3 * C))


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
    ops.attention_forward(out, lse, qkv, NH)
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
        ops.attention_forward(out, lse, qkv, NH)
        ops.attention_backward(dqkv, dout, qkv, out, lse, NH)
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
    ops.attention_forward(whole, np.empty((1, NH, T)), qkv, NH)
    ops.attention_forward(rest, np.empty((1, NH, T - start)), qkv, NH, start)
    assert relative(rest, whole[start:]) < 1e-14


def test_attention_survives_large_scores():
    qkv = 300 * np.random.default_rng(6).standard_normal((1, 70, 48), np.float32)
    out, lse, dqkv = np.empty((70, 16), "f"), np.empty((1, 2, 70), "f"), np.empty_like(qkv)
    ops.attention_forward(out, lse, qkv, 2)
    ops.attention_backward(dqkv, np.ones_like(out), qkv, out, lse, 2)
    assert np.isfinite(out).all() and np.isfinite(dqkv).all()


@pytest.mark.parametrize("shape", [(1, 1), (7, 36), (300, 1024)])  # the last one is several blocks
def test_gelu(shape):
    def forward(inp):
        out = np.empty_like(inp)
        ops.gelu_forward(out, inp)
        return (out,)

    def backward(dout, saved, inp):
        dinp = np.empty_like(inp)
        ops.gelu_backward(dinp, inp, dout)
        return dict(inp=dinp)

    check_op(forward, backward, inp=shape)


def test_gelu_values():
    """Known points: gelu(1) = 0.8411920 and gelu(-2) = -0.0454023 in the tanh form; flat ends, no overflow."""
    inp = np.array([[0.0, 1.0, -2.0, 50.0, -50.0]])
    out, dinp = np.empty_like(inp), np.empty_like(inp)
    ops.gelu_forward(out, inp)
    ops.gelu_backward(dinp, inp, np.ones_like(inp))
    assert np.abs(out - [[0, 0.8411920, -0.0454023, 50, 0]]).max() < 1e-7
    assert np.abs(dinp[0, [0, 3, 4]] - [0.5, 1, 0]).max() < 1e-12


@pytest.mark.parametrize("N, V, Vp", [(1, 3, 3), (6, 11, 16), (40, 50257, 50304)])
def test_fused_classifier(N, V, Vp):
    targets, dloss = np.random.default_rng(7).integers(0, V, N), 1 / N
    grads = {}

    def forward(logits):
        losses, work = np.empty(N, logits.dtype), logits.copy()
        ops.fused_classifier(losses, work, targets, V, dloss)
        grads[logits.dtype.char] = work
        return (losses,)

    def backward(dout, saved, logits):
        forward(logits)
        return dict(logits=grads[logits.dtype.char] / dloss * dout[:, None])

    check_op(forward, backward, logits=(N, Vp))
    assert not grads["f"][:, V:].any()
    assert abs(grads["d"].sum()) < 1e-12  # each row of softmax - onehot sums to 0


def test_fused_classifier_of_equal_logits_is_log_V():
    losses, logits = np.empty(2), np.full((2, 64), 1000.0)
    ops.fused_classifier(losses, logits, np.array([0, 49]), 50, 1.0)
    assert np.abs(losses - np.log(50)).max() < 1e-12
    assert np.abs(logits[1, [0, 49, 50]] - [0.02, 0.02 - 1, 0]).max() < 1e-15


def test_adamw_follows_the_formula():
    """Three updates against AdamW as written, with weight decay and a scaled gradient, over several blocks."""
    rng, n = np.random.default_rng(8), 600_001
    p, m, v = rng.standard_normal(n), np.zeros(n), np.zeros(n)
    p2, m2, v2 = p.copy(), np.zeros(n), np.zeros(n)
    lr, b1, b2, eps, decay, scale = 1e-3, 0.9, 0.95, 1e-8, 0.1, 0.5
    for t in (1, 2, 3):
        g = rng.standard_normal(n)
        ops.adamw_update(p, g, m, v, t, lr, b1, b2, eps, decay, scale)
        m2 = b1 * m2 + (1 - b1) * scale * g
        v2 = b2 * v2 + (1 - b2) * (scale * g) ** 2
        p2 -= lr * (m2 / (1 - b1**t) / (np.sqrt(v2 / (1 - b2**t)) + eps) + decay * p2)
    assert relative(p, p2) < 1e-14 and relative(m, m2) < 1e-14 and relative(v, v2) < 1e-14


@pytest.mark.parametrize("C, bandwidth", [(256, 64), (16, 8)])  # by blocks, and all at once
@pytest.mark.parametrize("layer", ["FC1", "FC2"])
def test_band_adamw_is_adamw(C, bandwidth, layer):
    rng, shape = np.random.default_rng(11), (2, 4 * C, C) if layer == "FC1" else (2, C, 4 * C)
    tensors = rng.standard_normal((4, *shape))
    tensors[3] **= 2
    for tensor in tensors:
        ops.band_mask(tensor, bandwidth)
    banded, settings = tensors.copy(), (3, 1e-3, 0.9, 0.95, 1e-8, 0.1, 0.5)
    ops.adamw_update(*tensors, *settings)
    ops.band_adamw_update(*banded, bandwidth, *settings)
    assert banded.tobytes() == tensors.tobytes()


def test_adamw_first_step_moves_by_lr():
    """m/c1 = g and sqrt(v/c2) = |g|: without decay the first update is lr, whatever the gradient's size."""
    p, g = np.zeros(4, "f"), np.array([1e-3, -5.0, 2e4, 0.0], "f")
    ops.adamw_update(p, g, np.zeros(4, "f"), np.zeros(4, "f"), 1, 0.01, 0.9, 0.999, 1e-8, 0.0)
    assert np.abs(p - [-0.01, 0.01, -0.01, 0]).max() < 1e-6


def test_global_norm():
    grads = np.random.default_rng(9).standard_normal(300_000, np.float32)
    assert abs(ops.global_norm(grads) / np.linalg.norm(grads.astype(np.float64)) - 1) < 1e-6
    assert ops.global_norm(np.array([3.0, 4.0], "f")) == 5.0


def kept_by_formula(C, bandwidth):
    """FC1's mask (4C,C) by the reference's float arithmetic: |j - i * 4C/C| <= bandwidth / 2."""
    j, i = np.arange(4 * C)[:, None], np.arange(C)[None]
    return np.abs(j - i * 4.0) <= bandwidth / 2.0


@pytest.mark.parametrize("C", [1, 5, 16, 33])
def test_band_mask_is_the_formula_for_every_bandwidth(C):
    for bandwidth in range(1, 8 * C + 2):
        fc1, fc2 = np.ones((2, 4 * C, C)), np.ones((2, C, 4 * C))
        ops.band_mask(fc1, bandwidth)
        ops.band_mask(fc2, bandwidth)
        expected = kept_by_formula(C, bandwidth)
        assert (fc1 == expected).all() and (fc2 == expected.T).all()
        assert band_count(4 * C, C, bandwidth) == band_count(C, 4 * C, bandwidth) == expected.sum()
        assert expected.all() == (bandwidth >= 8 * C - 2)


def test_band_counts():
    """Kept weights of a layer: experiment 00007's and 00008's sizes, GPT-2 124M's, and the full band."""
    counts = {(128, 256): 28768, (128, 512): 49216, (128, 128): 15472, (128, 64): 8056, (128, 1024): 65536}
    counts |= {(128, 1): 128, (512, 1024): 459136, (512, 256): 127456, (768, 256): 193248, (1024, 512): 508864}
    for (C, bandwidth), count in counts.items():
        assert band_count(4 * C, C, bandwidth) == count


def test_band_mask_leaves_plus_zero_and_the_band_untouched():
    weight = -np.ones((1, 64, 16), "f")
    ops.band_mask(weight, 8)
    start, stop = band_columns(20, 64, 16, 8)
    assert (start, stop) == (4, 7)  # |20 - 4i| <= 4
    assert (weight[0, 20, 4:7] == -1).all()
    assert not np.signbit(weight[0, 20, :4]).any()


@pytest.mark.parametrize("C, bandwidth", [(16, 8), (96, 30), (128, 256), (192, 1), (200, 77), (200, 501)])
@pytest.mark.parametrize("layer", ["FC1", "FC2"])
def test_band_matmul(C, bandwidth, layer):
    """By blocks or dense, the products of a banded weight and their gradients, which are zero outside the band."""
    N, (OC, IC) = (7 if C == 200 else 300), (4 * C, C) if layer == "FC1" else (C, 4 * C)
    by_blocks = (C, bandwidth) in [(96, 30), (192, 1), (200, 77)] or (C, layer) == (128, "FC1")
    assert bool(best_channels(OC, IC, bandwidth, N)) == by_blocks
    band = np.ones((1, OC, IC))
    ops.band_mask(band, bandwidth)

    def forward(inp, weight, bias):
        out = np.full((N, OC), np.nan, inp.dtype)
        ops.band_matmul_forward(out, inp, (weight * band[0]).astype(inp.dtype), bias, bandwidth)
        return (out,)

    def backward(dout, saved, inp, weight, bias):
        weight = (weight * band[0]).astype(inp.dtype)
        dinp, dweight, dbias = np.full_like(inp, np.nan), np.zeros_like(weight), np.zeros_like(bias)
        ops.band_matmul_backward(dinp, dweight, dbias, dout, inp, weight, bandwidth)
        once = dweight.copy()
        ops.band_matmul_backward(dinp, dweight, dbias, dout, inp, weight, bandwidth, beta=1)
        assert relative(dweight, 2 * once) < 1e-6 and not dweight[band[0] == 0].any()
        return dict(inp=dinp, weight=once, bias=dbias / 2)

    check_op(forward, backward, inp=(N, IC), weight=(OC, IC), bias=(OC,))


def test_a_band_in_another_order_of_the_hidden_units():
    """Row j keeps what the diagonal keeps in row place[j]."""
    place = np.array([5, 0, 7, 2, 6, 1, 4, 3], np.int32)
    diagonal, moved = np.ones((2, 8, 2)), np.ones((2, 8, 2))
    ops.band_mask(diagonal, 4)
    ops.band_mask(moved, 4, place)
    assert np.array_equal(moved, diagonal[:, place]) and not np.array_equal(moved, diagonal)


def test_blocks_are_chosen_by_what_they_promise():
    assert [best_channels(3072, 768, 256, N) for N in (1, 16, 256, 1024, 4096)] == [32] * 5
    assert [best_channels(512, 128, 256, N) for N in (1, 16, 256)] == [0, 0, 32]  # calls cost more than they save
    blocks = blocks_of_band(3072, 768, 256, 32)  # 24 of 128 x 96, the outer two 32 less
    assert sum((r.stop - r.start) * (c.stop - c.start) for r, c in blocks) == 24 * 128 * 96 - 2 * 32 * 128
    assert best_channels(3072, 768, 64, 4096) < best_channels(3072, 768, 2048, 4096) == 64
    assert best_channels(512, 128, 512, 256) == best_channels(3072, 768, 8 * 768, 4096) == 0  # not worth it


def test_threads_do_not_change_a_bit(monkeypatch):
    rng = np.random.default_rng(10)
    inp, dout = (rng.standard_normal((5000, 512), np.float32) for _ in range(2))
    assert inp.nbytes > PARALLEL_BYTES  # or a single thread does it all
    results = []
    monkeypatch.setattr(blocks, "usable_cores", lambda: 3)
    for threads in ("1", "2", "3"):
        monkeypatch.setenv("OPENBLAS_NUM_THREADS", threads)
        out, mean, rstd = np.empty_like(inp), np.empty(5000, "f"), np.empty(5000, "f")
        weight, dweight, dbias = np.ones(512, "f"), np.zeros(512, "f"), np.zeros(512, "f")
        ops.layernorm_forward(out, mean, rstd, inp, weight, dbias)
        dinp = np.zeros_like(inp)
        ops.layernorm_backward(dinp, dweight, dbias, dout, inp, weight, mean, rstd)
        ops.gelu_backward(out, dinp, dout)
        results.append(out.tobytes() + dweight.tobytes() + dbias.tobytes())
    assert results[0] == results[1] == results[2]


def test_threads_do_not_change_a_bit_of_attention(monkeypatch):
    rng = np.random.default_rng(11)
    B, T, C, NH, D = 3, 200, 60, 5, 3  # neither rows, nor heads, nor blocks of queries divide evenly
    qkv, dout = rng.standard_normal((B, T, 3 * C), np.float32), rng.standard_normal((B * T, C), np.float32)
    index = np.full((B, T, 128), -1, np.int32)
    for t in range(T):
        index[:, t, : min(t + 1, 128)] = np.sort(rng.permutation(t + 1)[:128])
    count = np.count_nonzero(index >= 0, axis=2).astype(np.int32)
    strength = np.linspace(0.1, 1, NH, dtype=np.float32)
    results = []
    share = blocks.for_blocks
    monkeypatch.setattr(attention, "for_blocks", lambda work, rows, block, _: share(work, rows, block, 1 << 23))
    monkeypatch.setattr(blocks, "usable_cores", lambda: 3)
    for threads in ("1", "2", "3"):
        monkeypatch.setenv("OPENBLAS_NUM_THREADS", threads)
        out, lse, dqkv = np.empty_like(dout), np.empty((B, NH, T), "f"), np.empty_like(qkv)
        ops.attention_forward(out, lse, qkv, NH)
        ops.attention_backward(dqkv, dout, qkv, out, lse, NH)
        bits = [out.tobytes(), lse.tobytes(), dqkv.tobytes()]
        ops.sparse_attention_forward(out, lse, qkv, index, count, NH)
        ops.sparse_attention_backward(dqkv, dout, qkv, out, lse, index, count, NH)
        mean = np.empty(index.shape, "f")
        ops.sparse_attention_mean(mean, qkv, lse, index, count, NH)
        bits += [out.tobytes(), dqkv.tobytes(), mean.tobytes()]
        lse, sums = np.empty((B, NH, T, D), "f"), np.zeros((2, NH), "f")
        ops.torus_attention_forward(out, lse, qkv, strength, strength, NH, D, T)
        ops.torus_attention_backward(dqkv, *sums, dout, qkv, out, lse, strength, strength, NH, D, T)
        results.append(b"".join([*bits, out.tobytes(), dqkv.tobytes(), sums.tobytes()]))
    assert results[0] == results[1] == results[2]
