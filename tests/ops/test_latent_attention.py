"""Attention over a cache of latents."""

import numpy as np
import pytest
from check_op import check_twin, nan, place, rounded
from selected_keys import lists_of

from kernels import cpu, cuda
from kernels.cuda.deepseek import latent_attention
from llmc.errors import UserError


@pytest.mark.parametrize("listed", [False, True])
def test_latent_attention_is_causal_bit_for_bit_in_float32(listed):
    T, NH, kv_rank, R, cut = 130, 3, 10, 4, 77
    rng = np.random.default_rng(8)
    qlat, latent = (
        rng.standard_normal((T, NH, kv_rank + R), np.float32),
        rng.standard_normal((T, kv_rank + R), np.float32),
    )
    index, count = lists_of(T, 20) if listed else (None, None)
    results = []
    for _ in range(2):
        out = np.full((T, NH, kv_rank), np.nan, np.float32)
        cpu.latent_attention_forward(out, qlat, latent, index, count, 0.2)
        results.append(out[:cut].tobytes())
        latent[cut:] = 100 * rng.standard_normal((T - cut, kv_rank + R), np.float32)
        qlat[cut:] = 100 * rng.standard_normal((T - cut, NH, kv_rank + R), np.float32)
    assert results[0] == results[1] and np.isfinite(out).all()


def test_latent_attention_survives_large_scores():
    rng = np.random.default_rng(9)
    qlat, latent = 300 * rng.standard_normal((70, 2, 10), np.float32), rng.standard_normal((70, 10), np.float32)
    out = np.empty((70, 2, 8), np.float32)
    cpu.latent_attention_forward(out, qlat, latent, None, None, 1.0)
    assert np.isfinite(out).all() and np.abs(out).max() <= np.abs(latent).max() * 1.00001  # a mean of latents


# ----------------------------------------------------------------------------------------------------------------------
# on CUDA: the emulator, and a GPU if there is one


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
    check_twin(runtime, "latent_attention_forward", *args, offset=offset)


def test_latent_attention_of_a_query_whose_last_parts_are_empty(runtime):
    """Of 300 listed keys 3 count: all but the first part of the split keys have none."""
    index, count = np.full((1, 1, 300), -1, np.int32), np.full((1, 1), 3, np.int32)
    index[0, 0, :3] = 2, 5, 700
    qlat, latent = rounded(1, 2, 12), rounded(900, 12)
    check_twin(runtime, "latent_attention_forward", nan(1, 2, 8), qlat, latent, index, count, 0.3, 899)


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


def test_sizes_that_a_kernel_cannot_hold_are_refused(emulator):
    device = cuda.device(emulator)
    for kv_rank, R in ((516, 4), (512, 224)):
        qlat, out = emulator.zeros((1, 1, kv_rank + R)), emulator.zeros((1, 1, kv_rank))
        with pytest.raises(UserError, match=f"kv_rank {kv_rank} and R {R}, on a GPU at most 512 and 220"):
            device.latent_attention_forward(out, qlat, qlat[0], None, None, 1.0)


def test_parts_of_keys_depend_on_sizes_alone():
    """A kernel for every size that is not refused, and its shared memory within what a block may have."""
    for kv_rank, R, expected in ((1, 2, 0), (64, 16, 0), (256, 32, 0), (320, 8, 1), (512, 64, 1), (512, 220, 1)):
        kernel, _, keys, _, shared_mem = latent_attention._tile(kv_rank, kv_rank + R)
        assert kernel == list(latent_attention.TILES)[expected] and keys == (32, 8)[expected]
        assert shared_mem + 4 * 8 * (keys + 2) <= 48 << 10
        assert shared_mem // (8 + keys) // 16 % 2 == 1  # float4s of a row: odd, against bank conflicts
