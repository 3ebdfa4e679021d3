"""Launcher of attention_mean.cu."""

from kernels.cuda.runtime.grid import THREADS, ceil_div

TILE = 64  # queries and keys of a tile


def attention_mean(cuda, p, qkv, lse, NH, first, start=0):
    """As kernels.cpu.sparse.attention_mean.attention_mean."""
    B, R, S = p.shape
    T, hs = qkv.shape[1], qkv.shape[2] // 3 // NH
    grid = (ceil_div(S, TILE), ceil_div(R, TILE), B)
    cuda.launch("attention_mean_kernel", grid, THREADS, (p, qkv, lse, T, NH, hs, R, S, first, start))
