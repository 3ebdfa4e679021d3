"""Toroidal attention's CUDA kernels against their NumPy twins, causality to the bit, windows, sizes of all kinds."""

import numpy as np
import pytest
from check_op import relative
from test_cuda_kernels import check, nan, place, rounded

from kernels import cpu, cuda
from kernels.cpu.torus.torus_rope import torus_frequencies
from llmc.errors import UserError


def weights(NH):
    """a_s, a_d of one model, far enough from 0 to matter."""
    return 3 + rounded(NH), 2 + rounded(NH, seed=1)


# B, T, NH, D, hd, offset; P, window, wrap_depth, causal
CASES = [
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
def test_torus_attention(runtime, sizes, geometry):
    B, T, NH, D, hd, offset = sizes
    C = NH * D * hd
    qkv, (a_s, a_d), dout = rounded(B, T, 3 * C), weights(NH), rounded(B * T, C)
    out, lse = nan(B * T, C), nan(B, NH, T, D)
    check(runtime, "torus_attention_forward", out, lse, qkv, a_s, a_d, NH, D, *geometry, offset=offset)
    cpu.torus_attention_forward(out, lse, qkv, a_s, a_d, NH, D, *geometry)
    args = dout, qkv, out, lse, a_s, a_d, NH, D, *geometry
    check(runtime, "torus_attention_backward", nan(B, T, 3 * C), *weights(NH), *args, offset=offset)
    check(runtime, "torus_attention_backward", nan(B, T, 3 * C), None, None, *args, offset=offset)
    for start in {T - 1, T // 2}:
        n = T - start
        args = nan(B * n, C), nan(B, NH, n, D), qkv, a_s, a_d, NH, D, *geometry, start
        check(runtime, "torus_attention_forward", *args, offset=offset)


@pytest.mark.parametrize("T, P, window", [(100, 100, 2), (150, 40, 1), (90, 64, 31), (90, 3, 1)])
def test_tiles_outside_the_window_are_passed_over_and_no_others(emulator, T, P, window):
    """Several tiles of keys, of which some hold nothing near; the band comes back every P tokens."""
    qkv, (a_s, a_d), out, lse = rounded(1, T, 24), weights(1), nan(T, 8), nan(1, 1, T, 2)
    geometry = P, window, 0, 1
    check(emulator, "torus_attention_forward", out, lse, qkv, a_s, a_d, 1, 2, *geometry)
    cpu.torus_attention_forward(out, lse, qkv, a_s, a_d, 1, 2, *geometry)
    args = rounded(T, 8), qkv, out, lse, a_s, a_d, 1, 2, *geometry
    check(emulator, "torus_attention_backward", nan(1, T, 24), *weights(1), *args)


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
    check(runtime, "torus_attention_backward", nan(1, T, 24), np.ones(1), np.ones(1), *args, tol=1e-4)


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


@pytest.mark.parametrize("kind", ["int", "upstream", "orth"])
@pytest.mark.parametrize("B, T, NH, D, hd, P, start, offset", [
    (1, 1, 1, 1, 4, 1, 0, 0), (2, 9, 3, 2, 8, 4, 0, 0), (1, 5, 2, 4, 6, 100, 50, 0), (2, 7, 1, 3, 4, 12, 3, 1),
    (1, 3, 2, 2, 32, 1024, 100_000, 0),
])  # fmt: skip
def test_torus_rope(runtime, kind, B, T, NH, D, hd, P, start, offset):
    w, f = (x.astype(np.float32).astype(np.float64) for x in torus_frequencies(kind, hd, D, P))
    for op in ("torus_rope_forward", "torus_rope_backward"):
        check(runtime, op, rounded(B, T, 3 * NH * D * hd), w, f, NH, D, P, start, offset=offset, tol=1e-6)


def test_whole_frequencies_are_periodic_to_the_bit_at_large_positions(runtime):
    device, P, NH, D, hd = cuda.device(runtime), 1000, 1, 2, 8
    w, f = (place(runtime, x, 0) for x in torus_frequencies("int", hd, D, P))
    results = []
    for start in (7, 7 + 10**6):
        qkv = place(runtime, rounded(1, 3, 3 * NH * D * hd), 0)
        device.torus_rope_forward(qkv, w, f, NH, D, P, start)
        results.append(runtime.to_host(qkv))
    assert np.array_equal(*results)
