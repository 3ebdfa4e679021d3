"""Launchers of indexer_union.cu: indexer.py takes them where there are tensor cores that are worth it, for heads of at
most WIDEST columns that share a key."""

from kernels.cuda.runtime.grid import THREADS, TILE_THREADS, WARP, ceil_div
from kernels.cuda.sparse.indexer_tensor import STAYING, padded_width
from kernels.cuda.sparse.union_lists import selected_bits, union_keys

PARTS = 128 << 20  # bytes of the parts of dk that are in memory at a time: those of all 64 query tiles at T = 4096


def indexer_union_forward(cuda, products, scores, q, k, w, index, count, scale):
    """indexer_gathered_forward; products: "tf32" or "3xtf32"."""
    B, T, K = scores.shape
    (HI, dI), size = (w.shape[2], k.shape[2]), padded_width(k.shape[2])
    lists = union_keys(cuda, selected_bits(cuda, index, T), K, by_first=False)
    tiles, capacity = lists.ids.shape[1:]
    args = (scores, q, k, w, index, count, *lists, scale, T, K, HI, dI, capacity)
    grid = ceil_div(capacity, STAYING[size]), tiles, B
    cuda.launch(f"indexer_union_forward_{products}_{size}_kernel", grid, TILE_THREADS, args)


def indexer_union_backward(cuda, products, dq, dk, dw, dscores, q, k, w, index, count, scale):
    """indexer_gathered_backward; products: "tf32" or "3xtf32"."""
    B, T, K = dscores.shape
    (HI, dI), size = (w.shape[2], k.shape[2]), padded_width(k.shape[2])
    bits = selected_bits(cuda, index, T)
    lists = union_keys(cuda, bits, K, by_first=False)
    tiles, capacity = lists.ids.shape[1:]
    sizes = T, K, HI, dI, capacity
    args = (dq, dw, dscores, q, k, w, *lists, scale, *sizes)
    cuda.launch(f"indexer_union_dq_{products}_{size}_kernel", (tiles, HI, B), TILE_THREADS, args)
    most = max(1, PARTS // (4 * B * capacity * dI))  # tiles at a time
    for first in range(0, tiles, most):
        some = min(most, tiles - first)
        parts = cuda.scratch("indexer_union_parts", (B, some, capacity, dI))
        args = (parts, dscores, q, k, w, index, count, *lists, scale, *sizes, first)
        grid = ceil_div(capacity, STAYING[size]), some, B
        cuda.launch(f"indexer_union_dk_{products}_{size}_kernel", grid, TILE_THREADS, args)
        args = (dk, parts, bits, lists.ids, lists.size, T, dI, tiles, capacity, first, some, int(first > 0))
        cuda.launch("indexer_union_join_kernel", (ceil_div(T, THREADS // WARP), B), THREADS, args)
