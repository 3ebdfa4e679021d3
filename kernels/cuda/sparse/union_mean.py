"""Launchers of union_mean.cu: sparse_attention.py takes them where there are tensor cores for TF32."""

from kernels.cuda.runtime.grid import BLOCKS, TILE_THREADS, ceil_div
from kernels.cuda.sparse.union_lists import TILE, selected_bits, union_keys


def union_mean(cuda, p, qkv, lse, index, count, NH):
    """sparse_attention_mean; operands of products are rounded only if cuda.tf32."""
    B, T, C3 = qkv.shape
    K = index.shape[2]
    lists = union_keys(cuda, selected_bits(cuda, index, T), K, by_first=False)
    _, tiles, capacity = lists.ids.shape
    blocks = min(ceil_div(capacity, TILE), ceil_div(4 * BLOCKS, B * tiles))  # of a tile: some have longer lists
    products = "tf32" if cuda.tf32 else "3xtf32"
    args = (p, qkv, lse, index, count, *lists, T, NH, C3 // 3 // NH, K, capacity)
    cuda.launch(f"union_mean_{products}_kernel", (blocks, tiles, B), TILE_THREADS, args)
