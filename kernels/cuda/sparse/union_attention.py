"""Launchers of union_attention.cu: sparse_attention.py takes them where there are tensor cores for TF32."""

from kernels.cuda.runtime.grid import BLOCKS, TILE_THREADS, ceil_div
from kernels.cuda.sparse.union_lists import TILE, selected_bits, union_keys, union_queries

FORWARD_THREADS = {64: 64, 128: 128}  # padded head size: a warp has 32 queries, or 16


def union_forward(cuda, out, lse, qkv, index, NH, start, size):
    """sparse_attention_forward for heads padded to `size`; operands of products are rounded only if cuda.tf32."""
    B, T, C3 = qkv.shape
    lists = union_keys(cuda, selected_bits(cuda, index, T), index.shape[2], by_first=True)
    args = (out, lse, qkv, *lists, T, NH, C3 // 3 // NH, start, lists.ids.shape[2])
    kernel = f"union_forward_{_products(cuda)}_{size}_kernel"
    cuda.launch(kernel, (B * NH, lists.ids.shape[1]), FORWARD_THREADS[size], args)


def union_backward(cuda, dqkv, dout, qkv, out, lse, index, NH, size):
    """sparse_attention_backward for heads padded to `size`; operands of products are rounded only if cuda.tf32."""
    B, T, C3 = qkv.shape
    delta = cuda.scratch("sparse_attention_delta", (B, NH, T))
    bits = selected_bits(cuda, index, T)
    grid, sizes = (B * NH, ceil_div(T, TILE)), (T, NH, C3 // 3 // NH)
    dq, dkdv = (f"union_{part}_{_products(cuda)}_{size}_kernel" for part in ("dq", "dkdv"))
    lists = union_keys(cuda, bits, index.shape[2], by_first=True)
    args = (dqkv, delta, dout, qkv, out, lse, *lists, *sizes, lists.ids.shape[2])
    cuda.launch(dq, grid, TILE_THREADS, args)  # writes delta
    order, lists = union_queries(cuda, bits)
    args = (dqkv, dout, qkv, lse, delta, order, *lists, *sizes, lists.ids.shape[2])
    cuda.launch(dkdv, grid, TILE_THREADS, args)


def union_mean(cuda, p, qkv, lse, index, count, NH):
    """sparse_attention_mean; operands of products are rounded only if cuda.tf32."""
    B, T, C3 = qkv.shape
    K = index.shape[2]
    lists = union_keys(cuda, selected_bits(cuda, index, T), K, by_first=False)
    _, tiles, capacity = lists.ids.shape
    blocks = min(ceil_div(capacity, TILE), ceil_div(4 * BLOCKS, B * tiles))  # of a tile: some have longer lists
    args = (p, qkv, lse, index, count, *lists, T, NH, C3 // 3 // NH, K, capacity)
    cuda.launch(f"union_mean_{_products(cuda)}_kernel", (blocks, tiles, B), TILE_THREADS, args)


def _products(cuda) -> str:
    return "tf32" if cuda.tf32 else "3xtf32"
