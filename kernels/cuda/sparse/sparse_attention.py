"""Launchers of sparse_attention.cu, with attention_delta_kernel of attention.cu and inverse_lists.cu; on GPUs with
tensor cores, where there is enough to do, those of union_attention.cu instead."""

import numpy as np

from kernels.cpu.sparse import sparse_attention as numpy_sparse_attention
from kernels.cuda.runtime.grid import THREADS, TILE_THREADS, padded_head, warp_a_row
from kernels.cuda.runtime.tensor_cores import Results, takes_tensor_cores
from kernels.cuda.sparse.inverse_lists import inverse_lists
from kernels.cuda.sparse.union_attention import union_backward, union_forward, union_mean

SIZES = (64, 128)  # padded head sizes
# places in lists times channels from which on 64 queries share their keys on tensor cores: kernels for single queries
# take a picosecond for each, forward, on an H100, lists and a tile some 30 microseconds, however few there are. Sizes
# alone decide, as a CUDA graph wants it. Up to T = 58 K it does not matter what the lists hold: union tiles are faster
# there even if all pairs are in them; beyond that if neighbours share keys, as trained selections do
WORTH = 1 << 25


def sparse_attention_forward(cuda, out, lse, qkv, index, count, NH, start=0):
    """As kernels.cpu.sparse.sparse_attention.sparse_attention_forward. Raises UserError for hs > 128."""
    B, T, C3 = qkv.shape
    hs, rows = C3 // 3 // NH, B * (T - start) * NH
    size = padded_head("sparse_attention_forward", hs, SIZES)
    if _in_tiles(cuda, index, NH, hs):
        union_forward(cuda, out, lse, qkv, index, NH, start, size)
        return
    args = (out, lse, qkv, index, count, T, NH, hs, index.shape[2], start, rows)
    cuda.launch(f"sparse_attention_forward_{size}_kernel", *warp_a_row(rows), args)


def sparse_attention_backward(cuda, dqkv, dout, qkv, out, lse, index, count, NH):
    """As kernels.cpu.sparse.sparse_attention.sparse_attention_backward. Raises UserError for hs > 128."""
    B, T, C3 = qkv.shape
    hs, rows, K = C3 // 3 // NH, B * T * NH, index.shape[2]
    size = padded_head("sparse_attention_backward", hs, SIZES)
    if _in_tiles(cuda, index, NH, hs):
        union_backward(cuda, dqkv, dout, qkv, out, lse, index, NH, size)
        return
    delta = cuda.scratch("sparse_attention_delta", (B, NH, T))
    cuda.launch("attention_delta_kernel", *warp_a_row(rows), (delta, dout, out, T, NH, hs, rows))
    args = (dqkv, dout, qkv, lse, delta, index, count, T, NH, hs, K, rows)
    cuda.launch(f"sparse_attention_dq_{size}_kernel", *warp_a_row(rows), args)
    args = (dqkv, dout, qkv, lse, delta, *inverse_lists(cuda, index, count), T, NH, hs, K)
    cuda.launch(f"sparse_attention_dkdv_{size}_kernel", rows, TILE_THREADS, args)


def sparse_attention_mean(cuda, p, qkv, lse, index, count, NH):
    """As kernels.cpu.sparse.sparse_attention.sparse_attention_mean."""
    B, T, K = index.shape
    hs = qkv.shape[2] // 3 // NH
    if hs <= max(SIZES) and _in_tiles(cuda, index, NH, hs):
        union_mean(cuda, p, qkv, lse, index, count, NH)
        return
    args = (p, qkv, lse, index, count, T, NH, hs, K)
    cuda.launch("sparse_attention_mean_kernel", B * T, THREADS, args)


def _in_tiles(cuda, index, NH: int, hs: int) -> bool:
    """Whether 64 queries share the keys of their lists; heads of four channels each move in packs, others do not."""
    size = padded_head("sparse_attention", hs, SIZES)
    worth = index.size * NH * hs >= WORTH
    return worth and takes_tensor_cores(cuda, union_trial, size if hs % 4 == 0 else size - 1)


def union_trial(cuda, hs: int) -> Results:
    """Forward, backward and the mean of two heads: several tiles, and lists enough that a stage is used again."""
    T, NH, K, rng = 150, 2, 40, np.random.default_rng(0)
    C, size = NH * hs, padded_head("sparse_attention", hs, SIZES)
    index = np.full((1, T, K), -1, np.int32)
    for t in range(T):
        n = min(t + 1, K)
        index[0, t, :n] = np.sort(rng.choice(t + 1, n, replace=False))
    given = [rng.standard_normal(shape).astype(np.float32) for shape in ((1, T, 3 * C), (T, C))]
    shapes = dict(out=(T, C), lse=(1, NH, T), dqkv=(1, T, 3 * C), mean=(1, T, K))
    lists = index, np.minimum(np.arange(1, T + 1, dtype=np.int32), K)[None]
    qkv, dout, on_gpu, count = (cuda.to_device(values) for values in (*given, *lists))
    out, lse, dqkv, mean = found = [cuda.zeros(shape) for shape in shapes.values()]
    union_forward(cuda, out, lse, qkv, on_gpu, NH, 0, size)
    union_backward(cuda, dqkv, dout, qkv, out, lse, on_gpu, NH, size)
    union_mean(cuda, mean, qkv, lse, on_gpu, count, NH)
    qkv, dout = (values.astype(np.float64) for values in given)
    out, lse, dqkv, mean = expected = [np.empty(shape) for shape in shapes.values()]
    numpy_sparse_attention.sparse_attention_forward(out, lse, qkv, *lists, NH)
    numpy_sparse_attention.sparse_attention_backward(dqkv, dout, qkv, out, lse, *lists, NH)
    numpy_sparse_attention.sparse_attention_mean(mean, qkv, lse, *lists, NH)
    for name, ours, theirs in zip(shapes, found, expected):
        yield f"sparse attention's {name}", cuda.to_host(ours), theirs
