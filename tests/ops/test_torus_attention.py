"""Toroidal attention: gradients, the textbook form, special cases, causality, the ring."""

import numpy as np
import pytest
from check_op import check_gradients, check_twin, gradient_error, nan, place, relative, rounded

from kernels import cpu, cuda
from kernels.cpu.torus import torus_attention
from kernels.cpu.torus.torus_attention import depth_distance, ring_distance
from kernels.cpu.torus.torus_rope import torus_frequencies
from llmc.errors import UserError


def forward(qkv, a_s, a_d, D, P, window=-1, wrap_depth=0, causal=1, start=0):
    (B, T, C3), NH = qkv.shape, len(a_s)
    out = np.full((B * (T - start), C3 // 3), np.nan, qkv.dtype)
    lse = np.full((B, NH, T - start, D), np.nan, qkv.dtype)
    cpu.torus_attention_forward(out, lse, qkv, a_s, a_d, NH, D, P, window, wrap_depth, causal, start)
    return out, lse


def backward(dout, out, lse, qkv, a_s, a_d, D, P, window=-1, wrap_depth=0, causal=1):
    dqkv, da_s, da_d = np.full_like(qkv, np.nan), np.ones_like(a_s), np.ones_like(a_d)
    NH = len(a_s)
    cpu.torus_attention_backward(dqkv, da_s, da_d, dout, qkv, out, lse, a_s, a_d, NH, D, P, window, wrap_depth, causal)
    return {"qkv": dqkv, "a_s": da_s - 1, "a_d": da_d - 1}  # these two accumulate


def inputs(B, T, NH, D, hd, seed=0, dtype=np.float64):
    rng = np.random.default_rng([seed, B, T])
    qkv = rng.standard_normal((B, T, 3 * NH * D * hd))
    return qkv.astype(dtype), rng.normal(2, 1, NH).astype(dtype), rng.normal(2, 1, NH).astype(dtype)


def weights(NH):
    """a_s, a_d of one model, far enough from 0 to matter."""
    return 3 + rounded(NH), 2 + rounded(NH, seed=1)


def plain(qkv, a_s, a_d, D, P, window=-1, wrap_depth=0, causal=1):
    """out (B,T,NH,D,hd), lse (B,NH,T,D), entry by entry of T*D x T*D scores"""
    (B, T, C3), NH = qkv.shape, len(a_s)
    hd = C3 // 3 // NH // D
    out, lse = np.zeros((B, T, NH, D, hd)), np.zeros((B, NH, T, D))
    q, k, v = qkv.reshape(B, T, 3, NH, D, hd).transpose(2, 0, 1, 3, 4, 5)
    for b, h, i, p in np.ndindex(B, NH, T, D):
        weights = np.zeros((T, D))
        for j, l in np.ndindex(T, D):
            round_the_ring, through = min((i - j) % P, (j - i) % P), abs(p - l)
            if wrap_depth:
                through = min(through, D - through)
            if (j <= i or not causal) and (window < 0 or round_the_ring <= window):
                score = q[b, i, h, p] @ k[b, j, h, l] / np.sqrt(hd)
                weights[j, l] = np.exp(score - a_s[h] * round_the_ring / P - a_d[h] * through / D)
        out[b, i, h, p] = np.einsum("jl,jlm->m", weights, v[b, :, h]) / weights.sum()
        lse[b, h, i, p] = np.log(weights.sum())
    return out, lse


# B, T, NH, D, hd, offset; P, window, wrap_depth, causal
CASES = [
    ((1, 1, 1, 1, 1, 0), (4, -1, 0, 1)),
    ((2, 7, 2, 2, 3, 0), (16, -1, 0, 1)),
    ((1, 9, 3, 4, 2, 0), (4, -1, 1, 1)),
    ((2, 6, 2, 2, 2, 0), (6, -1, 0, 0)),
    ((1, 9, 2, 4, 3, 0), (5, 1, 1, 1)),
    ((1, 8, 1, 3, 2, 0), (7, 2, 0, 0)),
    ((1, 10, 2, 1, 5, 0), (3, 0, 0, 1)),
    ((1, 5, 1, 5, 1, 0), (1, -1, 1, 1)),
    ((1, 1, 1, 1, 1, 0), (1, -1, 0, 1)),
    ((2, 5, 3, 2, 4, 0), (8, -1, 0, 1)),
    ((1, 33, 2, 4, 16, 0), (16, -1, 1, 1)),
    ((1, 50, 1, 3, 5, 1), (70, -1, 0, 1)),
    ((2, 20, 2, 4, 8, 1), (20, -1, 0, 0)),
    ((1, 70, 1, 2, 32, 0), (32, 3, 0, 1)),
    ((1, 66, 1, 1, 64, 0), (66, -1, 0, 1)),
    ((1, 40, 2, 2, 20, 3), (7, 1, 1, 0)),
    ((1, 21, 1, 2, 66, 0), (16, -1, 0, 1)),
    ((1, 9, 2, 1, 128, 0), (4, 0, 0, 1)),
    ((1, 7, 1, 10, 3, 0), (5, -1, 1, 1)),
]


@pytest.mark.parametrize("sizes, geometry", CASES)
def test_torus_attention(device, sizes, geometry):
    if device is cpu:
        check_gradients_of(sizes, geometry)
    else:
        check_on_cuda(device, sizes, geometry)


def check_gradients_of(sizes, geometry):
    B, T, NH, D, hd, _ = sizes
    shapes = {"qkv": (B, T, 3 * NH * D * hd), "a_s": (NH,), "a_d": (NH,)}
    rng = np.random.default_rng(3)
    given = {name: rng.standard_normal(shape) for name, shape in shapes.items()}

    def run(qkv, a_s, a_d):
        return forward(qkv, a_s, a_d, D, *geometry)

    out, lse = run(**given)
    dout = rng.standard_normal(out.shape)
    grads = backward(dout, out, lse, **given, D=D, **dict(zip(("P", "window", "wrap_depth", "causal"), geometry)))
    for name in shapes:
        if np.abs(grads[name]).max() > 1e-12:
            assert gradient_error(run, given, name, dout, grads[name], rng) < 1e-6, name
        else:  # one token, one platter or no way round the ring: a weight without effect
            assert name != "qkv" and relative(run(**given | {name: given[name] + 1})[0], out) < 1e-12


def check_on_cuda(runtime, sizes, geometry):
    B, T, NH, D, hd, offset = sizes
    C = NH * D * hd
    qkv, (a_s, a_d), dout = rounded(B, T, 3 * C), weights(NH), rounded(B * T, C)
    out, lse = nan(B * T, C), nan(B, NH, T, D)
    check_twin(runtime, "torus_attention_forward", out, lse, qkv, a_s, a_d, NH, D, *geometry, offset=offset)
    cpu.torus_attention_forward(out, lse, qkv, a_s, a_d, NH, D, *geometry)
    args = dout, qkv, out, lse, a_s, a_d, NH, D, *geometry
    check_twin(runtime, "torus_attention_backward", nan(B, T, 3 * C), *weights(NH), *args, offset=offset)
    check_twin(runtime, "torus_attention_backward", nan(B, T, 3 * C), None, None, *args, offset=offset)
    for start in {T - 1, T // 2}:
        n = T - start
        args = nan(B * n, C), nan(B, NH, n, D), qkv, a_s, a_d, NH, D, *geometry, start
        check_twin(runtime, "torus_attention_forward", *args, offset=offset)


def test_float32_stays_float32_and_is_close():
    check_gradients(
        lambda qkv, a_s, a_d: forward(qkv, a_s, a_d, 4, 50),
        lambda dout, saved, qkv, a_s, a_d: backward(dout, *saved, qkv, a_s, a_d, 4, 50),
        qkv=(2, 40, 96), a_s=(2,), a_d=(2,), tol32=2e-5,
    )  # fmt: skip


@pytest.mark.parametrize(
    "sizes, geometry", [*CASES[:8], ((1, 40, 1, 2, 2, 0), (30, -1, 0, 1)), ((1, 34, 1, 3, 1, 0), (9, 2, 1, 0))]
)
def test_against_the_textbook(sizes, geometry):
    qkv, a_s, a_d = inputs(*sizes[:5])
    (out, lse), (expected, expected_lse) = (
        forward(qkv, a_s, a_d, sizes[3], *geometry),
        plain(qkv, a_s, a_d, sizes[3], *geometry),
    )
    assert relative(out, expected.reshape(out.shape)) < 1e-13 and relative(lse, expected_lse) < 1e-13


@pytest.mark.parametrize("tokens", [1, 5, 64, 1000])
@pytest.mark.parametrize("causal", [0, 1])
def test_any_blocks_give_the_same(monkeypatch, tokens, causal):
    qkv, a_s, a_d = inputs(2, 70, 2, 2, 4)
    args, dout = (a_s, a_d, 2, 50, 20, 1, causal), np.random.default_rng(1).standard_normal((140, 16))
    whole = forward(qkv, *args)
    grads = backward(dout, *whole, qkv, *args)
    monkeypatch.setattr(torus_attention, "QUERIES", 2 * tokens)
    parts = forward(qkv, *args)
    assert all(relative(*pair) < 1e-13 for pair in zip(parts, whole))
    again = backward(dout, *parts, qkv, *args)
    assert all(relative(again[name], grads[name]) < 1e-12 for name in grads)


@pytest.mark.parametrize("B, T, NH, hs", [(2, 7, 3, 5), (1, 150, 2, 16), (4, 64, 2, 6), (1, 300, 12, 64)])
def test_one_platter_without_bias_is_attention_to_the_bit(B, T, NH, hs):
    qkv, dout = (np.random.default_rng(n).standard_normal(shape).astype(np.float32) for n, shape in
                 enumerate([(B, T, 3 * NH * hs), (B * T, NH * hs)]))  # fmt: skip
    zero = np.zeros(NH, np.float32)
    out, lse, dqkv = np.empty_like(dout), np.empty((B, NH, T), np.float32), np.empty_like(qkv)
    cpu.attention_forward(out, lse, qkv, NH)
    cpu.attention_backward(dqkv, dout, qkv, out, lse, NH)
    ours, our_lse = forward(qkv, zero, zero, 1, T)
    assert np.array_equal(ours, out) and np.array_equal(our_lse[..., 0], lse)
    assert np.array_equal(backward(dout, ours, our_lse, qkv, zero, zero, 1, T)["qkv"], dqkv)
    tail, tail_lse = np.empty((B, NH * hs), np.float32), np.empty((B, NH, 1), np.float32)
    cpu.attention_forward(tail, tail_lse, qkv, NH, T - 1)
    assert np.array_equal(forward(qkv, zero, zero, 1, T, start=T - 1)[0], tail)


def test_platters_far_apart_are_heads():
    """What separates platters by force leaves NH*D heads of hd each."""
    B, T, NH, D, hd = 2, 70, 2, 4, 3
    qkv, _, _ = inputs(B, T, NH, D, hd)
    out, lse = forward(qkv, np.zeros(NH), np.full(NH, 1e6), D, T)
    expected, expected_lse = np.empty_like(out), np.empty((B, NH * D, T))
    cpu.attention_forward(expected, expected_lse, qkv, NH * D)
    assert relative(out, expected) < 1e-13
    assert relative(lse.swapaxes(2, 3).reshape(B, NH * D, T), expected_lse) < 1e-13


def test_weights_that_are_fixed_need_no_gradient():
    qkv, a_s, a_d = inputs(2, 20, 2, 2, 4)
    out, lse = forward(qkv, a_s, a_d, 2, 9)
    grads = backward(out, out, lse, qkv, a_s, a_d, 2, 9)
    dqkv = np.full_like(qkv, np.nan)
    cpu.torus_attention_backward(dqkv, None, None, out, qkv, out, lse, a_s, a_d, 2, 2, 9)
    assert np.array_equal(dqkv, grads["qkv"])


def test_a_constant_in_all_biases_changes_nothing():
    """P = 1 has no distance round the ring, one platter none in depth: weights have no effect and no gradient."""
    qkv, a_s, a_d = inputs(1, 20, 2, 1, 4)
    out, lse = forward(qkv, a_s, a_d, 1, 1)
    assert np.array_equal(out, forward(qkv, 0 * a_s, 0 * a_d, 1, 1)[0])
    grads = backward(out, out, lse, qkv, a_s, a_d, 1, 1)
    assert not grads["a_s"].any() and not grads["a_d"].any()


@pytest.mark.parametrize("D, P, window", [(1, 8, -1), (2, 100, -1), (4, 16, 2), (2, 5, -1)])
def test_the_future_does_not_change_a_bit_of_the_past(D, P, window):
    B, T, NH, hd = 2, 75, 2, 4
    qkv, a_s, a_d = inputs(B, T, NH, D, hd, dtype=np.float32)
    before = forward(qkv, a_s, a_d, D, P, window)
    for s in (1, 33, 63, 64, 74):
        changed = qkv.copy()
        changed[:, s:] = 1e3 * np.random.default_rng(s).standard_normal(changed[:, s:].shape)
        after = forward(changed, a_s, a_d, D, P, window)
        same, different = slice(None, s), slice(s, None)
        outs = [x.reshape(B, T, -1) for x in (before[0], after[0])]
        assert np.array_equal(outs[0][:, same], outs[1][:, same])
        assert np.array_equal(before[1][:, :, same], after[1][:, :, same])
        assert (outs[0][:, different] != outs[1][:, different]).any(axis=2).all()


def test_without_the_mask_the_future_is_seen():
    qkv, a_s, a_d = inputs(1, 12, 2, 2, 4)
    changed = qkv.copy()
    changed[:, 11] += 1
    assert (
        np.abs(forward(changed, a_s, a_d, 2, 12, causal=0)[0] - forward(qkv, a_s, a_d, 2, 12, causal=0)[0])[0].max()
        > 1e-3
    )


@pytest.mark.parametrize("T, P", [(40, 64), (40, 16), (70, 70)])
def test_a_prefix_gives_the_same_and_so_does_decoding(T, P):
    qkv, a_s, a_d = inputs(2, T, 2, 2, 4)
    out, lse = forward(qkv, a_s, a_d, 2, P, P // 4)
    out = out.reshape(2, T, -1)
    for t in (1, T // 2, T - 1):
        short, short_lse = forward(np.ascontiguousarray(qkv[:, :t]), a_s, a_d, 2, P, P // 4)
        assert relative(short.reshape(2, t, -1), out[:, :t]) < 1e-13 and relative(short_lse, lse[:, :, :t]) < 1e-13
        rest, rest_lse = forward(qkv, a_s, a_d, 2, P, P // 4, start=t)
        assert relative(rest.reshape(2, T - t, -1), out[:, t:]) < 1e-13 and relative(rest_lse, lse[:, :, t:]) < 1e-13


@pytest.mark.parametrize("P, D", [(1, 1), (2, 2), (7, 3), (8, 4), (9, 1), (12, 5)])
@pytest.mark.parametrize("wrap_depth", [0, 1])
def test_the_distance_is_a_metric(P, D, wrap_depth):
    ring = ring_distance(np.arange(P)[:, None] - np.arange(P), P)
    depth = depth_distance(np.arange(D)[:, None] - np.arange(D), D, wrap_depth)
    distance = (ring[:, None, :, None] * D + depth[None, :, None, :] * P).reshape(P * D, P * D)  # times P D: exact
    assert np.array_equal(distance, distance.T)
    assert np.array_equal(distance == 0, np.eye(P * D, dtype=bool))
    assert (distance[:, None] <= distance[:, :, None] + distance[None]).all()
    assert distance.max() == P // 2 * D + (D // 2 if wrap_depth else D - 1) * P
    assert P == 1 or ring[0, P - 1] == ring[0, 1] == 1


def shifted(kind, causal=0):
    """Largest difference between the output of rolled inputs and the rolled output, and the largest output."""
    B, T, NH, D, hd, turn = 1, 16, 2, 2, 8, 5
    qkv, a_s, a_d = inputs(B, T, NH, D, hd)
    w, f = torus_frequencies(kind, hd, D, T)

    def layer(x):
        x = x.copy()
        cpu.torus_rope_forward(x, w, f, NH, D, T)
        return forward(x, a_s, a_d, D, T, causal=causal)[0].reshape(T, -1)

    return np.abs(layer(np.roll(qkv, turn, 1)) - np.roll(layer(qkv), turn, 0)).max()


def test_without_a_mask_the_layer_turns_with_the_ring_if_frequencies_are_whole():
    assert shifted("int") < 1e-12
    assert shifted("upstream") > 1e-3 and shifted("orth") > 1e-3
    assert shifted("int", causal=1) > 1e-3  # a causal mask has a beginning


# ----------------------------------------------------------------------------------------------------------------------
# on CUDA: the emulator, and a GPU if there is one


@pytest.mark.parametrize("T, P, window", [(100, 100, 2), (150, 40, 1), (90, 64, 31), (90, 3, 1)])
def test_tiles_outside_the_window_are_passed_over_and_no_others(emulator, T, P, window):
    """Several tiles of keys, of which some hold nothing near; the band comes back every P tokens."""
    qkv, (a_s, a_d), out, lse = rounded(1, T, 24), weights(1), nan(T, 8), nan(1, 1, T, 2)
    geometry = P, window, 0, 1
    check_twin(emulator, "torus_attention_forward", out, lse, qkv, a_s, a_d, 1, 2, *geometry)
    cpu.torus_attention_forward(out, lse, qkv, a_s, a_d, 1, 2, *geometry)
    args = rounded(T, 8), qkv, out, lse, a_s, a_d, 1, 2, *geometry
    check_twin(emulator, "torus_attention_backward", nan(1, T, 24), *weights(1), *args)


@pytest.mark.parametrize(
    "T, D, hd, P, window", [(70, 2, 8, 100, -1), (50, 4, 16, 16, -1), (40, 1, 64, 12, 2), (30, 3, 7, 8, 1)]
)
def test_the_future_never_counts(runtime, T, D, hd, P, window):
    """NaN in later tokens: not a bit of what earlier queries get changes, forward and backward."""
    NH, C, device = 1, D * hd, cuda.device(runtime)
    qkv, (a_s, a_d), dout = rounded(1, T, 3 * C), weights(NH), rounded(T, C)

    def run(qkv, dout):
        arrays = nan(T, C), nan(1, NH, T, D), nan(1, T, 3 * C), np.zeros(NH), np.zeros(NH), qkv, dout, a_s, a_d
        out, lse, dqkv, da_s, da_d, *rest = (place(runtime, array, 0) for array in arrays)
        qkv, dout, *ours = rest
        device.torus_attention_forward(out, lse, qkv, *ours, NH, D, P, window)
        device.torus_attention_backward(dqkv, da_s, da_d, dout, qkv, out, lse, *ours, NH, D, P, window)
        return [runtime.to_host(array) for array in (out, lse, dqkv)]

    before = run(qkv, dout)
    for s in (1, T // 2, T - 1):
        after = run(np.where(np.arange(T)[:, None] < s, qkv, np.nan), dout)
        assert np.array_equal(before[0][:s], after[0][:s]) and np.isnan(after[0][s:]).all()
        assert np.array_equal(before[1][:, :, :s], after[1][:, :, :s])
        assert np.array_equal(before[2][0, :s, :C], after[2][0, :s, :C])  # dq
        after = run(qkv, np.where(np.arange(T)[:, None] >= s, dout, np.nan))  # whom earlier queries do not see
        assert np.array_equal(before[2][0, s:], after[2][0, s:])


def test_rows_beyond_the_last_query_stay_out_of_it(runtime):
    """The tile's last queries do not exist; with such weights they would make infinity of nothing."""
    T, geometry = 37, (30, -1, 0, 0)
    qkv, out, lse, a_s, a_d = rounded(1, T, 24), nan(T, 8), nan(1, 1, T, 2), np.full(1, -400.0), np.full(1, -300.0)
    cpu.torus_attention_forward(out, lse, qkv, a_s, a_d, 1, 2, *geometry)
    args = rounded(T, 8), qkv, out, lse, a_s, a_d, 1, 2, *geometry
    outs = nan(1, T, 24), np.ones(1), np.ones(1)  # the weights' gradients are next to nothing
    check_twin(runtime, "torus_attention_backward", *outs, *args, tol=1e-4, changed=("da_s", "da_d"))


def test_the_same_bits_every_time_and_alone_or_in_a_batch(runtime):
    B, T, NH, D, hd = 3, 40, 2, 4, 4
    C, device, (a_s, a_d) = NH * D * hd, cuda.device(runtime), weights(NH)
    qkv, dout = rounded(B, T, 3 * C), rounded(B, T, C)

    def run(rows):
        n = len(qkv[rows])
        arrays = nan(n * T, C), nan(n, NH, T, D), nan(n, T, 3 * C), np.zeros(NH), np.zeros(NH)
        out, lse, dqkv, da_s, da_d = (place(runtime, array, 0) for array in arrays)
        x, d, *ours = (place(runtime, array, 0) for array in (qkv[rows], dout[rows].reshape(-1, C), a_s, a_d))
        device.torus_attention_forward(out, lse, x, *ours, NH, D, 16)
        device.torus_attention_backward(dqkv, da_s, da_d, d, x, out, lse, *ours, NH, D, 16)
        return [runtime.to_host(array) for array in (dqkv, da_s, da_d)]

    whole = run(slice(None))
    assert all(map(np.array_equal, whole, run(slice(None))))
    parts = [run(slice(b, b + 1)) for b in range(B)]
    assert all(np.array_equal(whole[0][b], parts[b][0][0]) for b in range(B))
    assert all(relative(sum(part[n] for part in parts), whole[n]) < 1e-5 for n in (1, 2))


def test_one_platter_without_bias_is_attention(runtime):
    B, T, NH, hs = 1, 70, 2, 16
    zero, qkv, out = np.zeros(NH), rounded(B, T, 3 * NH * hs), nan(B * T, NH * hs)
    device, expected = cuda.device(runtime), nan(B * T, NH * hs)
    cpu.attention_forward(expected, nan(B, NH, T), qkv, NH)
    ours, lse, x, none = (place(runtime, array, 0) for array in (out, nan(B, NH, T, 1), qkv, zero))
    device.torus_attention_forward(ours, lse, x, none, none, NH, 1, T)
    assert relative(runtime.to_host(ours), expected) < 1e-5


def test_a_platter_that_is_too_wide_is_refused(emulator):
    device, x = cuda.device(emulator), emulator.zeros(1)
    qkv, out, lse = (emulator.zeros(shape) for shape in ((1, 2, 3 * 260), (2, 260), (1, 1, 2, 2)))
    for refused in (
        lambda: device.torus_attention_forward(out, lse, qkv, x, x, 1, 2, 4),
        lambda: device.torus_attention_backward(qkv, x, x, out, qkv, out, lse, x, x, 1, 2, 4),
    ):
        with pytest.raises(UserError, match="130 channels a platter, on a GPU at most 128"):
            refused()
