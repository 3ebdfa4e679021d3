"""CUDA's RoPE, RMSNorm and multi-head latent attention against NumPy's, on the emulator and on a GPU if any."""

import numpy as np
import pytest
from check_op import relative
from test_cuda_kernels import TOL, check, nan, place, rounded
from test_mla import lists_of

from kernels import cpu, cuda
from kernels.cuda.deepseek import latent_attention
from llmc.errors import UserError


@pytest.mark.parametrize("B, T, heads, width, rotated, start, offset", [
    (1, 1, 1, 2, 2, 0, 0), (2, 5, 3, 7, 4, 3, 0), (2, 33, 4, 16, 8, 0, 1), (1, 70, 1, 12, 12, 0, 2),
    (1, 3, 2, 64, 64, 4093, 0), (1, 2, 1, 4, 4, 10**6, 0),
])  # fmt: skip
def test_rope(runtime, B, T, heads, width, rotated, start, offset):
    for op in ("rope_forward", "rope_backward"):
        check(runtime, op, rounded(B, T, heads * width), heads, rotated, start, offset=offset, tol=5e-7)


@pytest.mark.parametrize("N, C, extra, offset", [
    (1, 2, 0, 0), (7, 36, 4, 0), (9, 50, 3, 0), (33, 768, 0, 0), (5, 64, 16, 1), (600, 16, 2, 0), (2, 1030, 0, 0),
    (3, 2048, 64, 0),
])  # fmt: skip
def test_rmsnorm(runtime, N, C, extra, offset):
    inp, weight, dout = rounded(N, C + extra), rounded(C, seed=1), rounded(N, C, seed=2)
    check(runtime, "rmsnorm_forward", nan(N, C), nan(N), inp, weight, offset=offset)
    rrms = 1 / np.sqrt(np.square(inp[:, :C]).mean(axis=1) + 1e-6)
    for other in (0, 5):  # dinp need not be as wide as inp
        args = rounded(N, C + other, seed=3), rounded(C, seed=4), dout, inp, weight, rrms
        check(runtime, "rmsnorm_backward", *args, offset=offset)


@pytest.mark.parametrize("B, T, NH, hs, R, kv_rank, start, offset", [
    (1, 1, 1, 2, 2, 1, 0, 0), (2, 5, 3, 5, 4, 7, 0, 0), (2, 9, 2, 16, 8, 12, 0, 0), (1, 3, 2, 16, 8, 12, 900, 1),
    (1, 7, 2, 8, 8, 4, 0, 0), (1, 2, 12, 64, 32, 128, 5, 0), (1, 4, 2, 8, 2, 4, 1, 0),
])  # fmt: skip
def test_mla_qkv(runtime, B, T, NH, hs, R, kv_rank, start, offset):
    N, C = B * T, NH * hs
    widths = C, NH * (2 * hs - R), kv_rank + R
    q, kv, kva = (rounded(N, width, seed=i) for i, width in enumerate(widths))
    check(runtime, "mla_qkv_forward", nan(B, T, 3 * C), q, kv, kva, NH, R, start, offset=offset, tol=5e-7)
    args = q, kv, kva, rounded(B, T, 3 * C, seed=3), NH, R  # dq, dkv, dkva hold something else before
    check(runtime, "mla_qkv_backward", *args, offset=offset, tol=1e-6)


@pytest.mark.parametrize("n, NH, hs, R, kv_rank, start, offset", [
    (1, 1, 2, 2, 1, 0, 0), (1, 3, 5, 2, 7, 40, 0), (8, 2, 8, 4, 16, 0, 0), (19, 2, 12, 4, 132, 3, 0),
    (9, 2, 20, 8, 260, 0, 1), (3, 1, 4, 4, 12, 4000, 0),
])  # fmt: skip
def test_mla_with_a_cache(runtime, n, NH, hs, R, kv_rank, start, offset):
    q, kvbw = rounded(n, NH * hs), rounded(NH * (2 * hs - R), kv_rank)
    normed, kva = rounded(n, kv_rank, seed=1), rounded(n, kv_rank + R)
    check(runtime, "mla_latent", rounded(start + n + 2, kv_rank + R), normed, kva, start, offset=offset, tol=5e-7)
    check(runtime, "mla_absorb", nan(n, NH, kv_rank + R), q, kvbw, NH, R, start, offset=offset)
    check(runtime, "mla_expand", nan(n, NH * hs), rounded(n, NH, kv_rank), kvbw, NH, R, offset=offset)


@pytest.mark.parametrize("n, NH, kv_rank, R, start, K, offset", [
    (1, 1, 1, 2, 0, 1, 0), (5, 3, 7, 4, 0, 3, 0), (3, 9, 16, 4, 30, 12, 0), (70, 2, 8, 2, 0, 40, 0),
    (1, 8, 64, 16, 300, 200, 0), (2, 5, 20, 4, 260, 140, 1), (1, 12, 320, 8, 40, 33, 0), (2, 3, 512, 64, 150, 129, 0),
])  # fmt: skip
@pytest.mark.parametrize("listed", [False, True])
def test_latent_attention(runtime, n, NH, kv_rank, R, start, K, offset, listed):
    """Several groups of heads; several tiles; keys of one query split among blocks; wide latents, 8 keys a tile."""
    S = start + n
    qlat, latent = rounded(n, NH, kv_rank + R), rounded(S + 2, kv_rank + R)
    latent[S:] = np.nan  # no query has come so far
    index, count = (x[:, start:] for x in lists_of(S, K)) if listed else (None, None)
    args = nan(n, NH, kv_rank), qlat, latent, index, count, (kv_rank + R) ** -0.5, start
    check(runtime, "latent_attention_forward", *args, offset=offset)


def test_latent_attention_of_a_query_whose_last_parts_are_empty(runtime):
    """Of 300 listed keys 3 count: all but the first part of the split keys have none."""
    index, count = np.full((1, 1, 300), -1, np.int32), np.full((1, 1), 3, np.int32)
    index[0, 0, :3] = 2, 5, 700
    qlat, latent = rounded(1, 2, 12), rounded(900, 12)
    check(runtime, "latent_attention_forward", nan(1, 2, 8), qlat, latent, index, count, 0.3, 899)


def test_latent_attention_is_causal_bit_for_bit(runtime):
    """For a size with one part and one with several; what comes after may even be NaN."""
    device, rng = cuda.device(runtime), np.random.default_rng(8)
    for n, start, cut in ((40, 0, 17), (3, 300, 1)):
        qlat, latent = rng.standard_normal((n, 2, 12)), rng.standard_normal((start + n, 12))
        results = []
        for _ in range(2):
            ours = [place(runtime, each, 0) for each in (nan(n, 2, 8), qlat, latent)]
            device.latent_attention_forward(*ours, None, None, 0.3, start)
            results.append(runtime.to_host(ours[0])[:cut])
            latent[start + cut :] = np.nan
            qlat[cut:] = np.nan
        assert np.isfinite(results[0]).all() and results[0].tobytes() == results[1].tobytes()


def test_absorbed_equals_expanded(runtime):
    """The two forms on the device: attention over q, k and v, and latent_attention over a cache filled row by row."""
    device, T, NH, hs, R, kv_rank = cuda.device(runtime), 12, 3, 8, 4, 10
    q, kva, normed = rounded(T, NH * hs), rounded(T, kv_rank + R), rounded(T, kv_rank, seed=1)
    kvbw = rounded(NH * (2 * hs - R), kv_rank)
    arrays = nan(1, T, 3 * NH * hs), q, normed @ kvbw.T, kva, nan(T, NH * hs), nan(1, NH, T), kvbw
    qkv, ours_q, kv, ours_kva, expanded, lse, weight = (place(runtime, each, 0) for each in arrays)
    device.mla_qkv_forward(qkv, ours_q, kv, ours_kva, NH, R)
    device.attention_forward(expanded, lse, qkv, NH)
    latent, absorbed = place(runtime, nan(T, kv_rank + R), 0), np.empty((T, NH * hs))
    for t in range(T):
        row = slice(t, t + 1)
        arrays = nan(1, NH, kv_rank + R), nan(1, NH, kv_rank), nan(1, NH * hs), q[row], kva[row], normed[row]
        qlat, olat, out, q_row, kva_row, normed_row = (place(runtime, each, 0) for each in arrays)
        device.mla_latent(latent, normed_row, kva_row, t)
        device.mla_absorb(qlat, q_row, weight, NH, R, t)
        device.latent_attention_forward(olat, qlat, latent, None, None, hs**-0.5, t)
        device.mla_expand(out, olat, weight, NH, R)
        absorbed[t] = runtime.to_host(out)
    assert relative(absorbed, runtime.to_host(expanded)) <= TOL


def test_sizes_that_a_kernel_cannot_hold_are_refused(emulator):
    device, x = cuda.device(emulator), emulator.zeros((1, 2052))
    with pytest.raises(UserError, match="2052 channels, on a GPU at most 2048"):
        device.rmsnorm_backward(x, x[0], x, x, x[0], x[0])
    for kv_rank, R in ((516, 4), (512, 224)):
        qlat, out = emulator.zeros((1, 1, kv_rank + R)), emulator.zeros((1, 1, kv_rank))
        with pytest.raises(UserError, match=f"kv_rank {kv_rank} and R {R}, on a GPU at most 512 and 220"):
            device.latent_attention_forward(out, qlat, qlat[0], None, None, 1.0)


def test_parts_of_keys_depend_on_sizes_alone():
    """A kernel for every size that is not refused, and its shared memory within what a block may have."""
    for kv_rank, R, expected in ((1, 2, 0), (64, 16, 0), (256, 32, 0), (320, 8, 1), (512, 64, 1), (512, 220, 1)):
        kernel, keys, shared_mem = latent_attention._kernel(kv_rank, kv_rank + R)
        assert kernel == list(latent_attention.TILES)[expected] and keys == (32, 8)[expected]
        assert shared_mem + 4 * 8 * (keys + 2) <= 48 << 10
        assert shared_mem // (8 + keys) // 16 % 2 == 1  # float4s of a row: odd, against bank conflicts


@pytest.mark.parametrize("rotated", [2, 16, 64])
def test_positions_that_a_float_angle_would_miss(runtime, rotated):
    """Every 512th position up to 4096, to 5e-7: the angle of pair 0 is the position itself."""
    device, x = cuda.device(runtime), rounded(1, 1, rotated)
    for start in range(0, 4097, 512):
        ours, reference = place(runtime, x, 0), x.copy()
        device.rope_forward(ours, 1, rotated, start)
        cpu.rope_forward(reference, 1, rotated, start)
        assert relative(runtime.to_host(ours), reference) < 5e-7
