"""Launchers of mla_tensor.cu: mla.py takes them for many queries, where there are tensor cores that are worth it."""

from kernels.cuda.runtime.grid import TILE_THREADS, ceil_div

SIDE = 64  # of a tile


def tensor_absorb(cuda, products, qlat, q, kvbw, NH, R, start):
    """mla_absorb; products: "tf32" or "3xtf32"."""
    (n, C), kv_rank = q.shape, kvbw.shape[1]
    grid, args = (ceil_div(kv_rank, SIDE), ceil_div(n, SIDE), NH), (qlat, q, kvbw, n, NH, C // NH, R, kv_rank, start)
    cuda.launch(f"mla_absorb_{products}_kernel", grid, TILE_THREADS, args)


def tensor_expand(cuda, products, out, olat, kvbw, NH, R):
    """mla_expand; products: "tf32" or "3xtf32"."""
    (n, C), kv_rank = out.shape, kvbw.shape[1]
    hs = C // NH
    grid, args = (ceil_div(hs, SIDE), ceil_div(n, SIDE), NH), (out, olat, kvbw, n, NH, hs, R, kv_rank)
    cuda.launch(f"mla_expand_{products}_kernel", grid, TILE_THREADS, args)
