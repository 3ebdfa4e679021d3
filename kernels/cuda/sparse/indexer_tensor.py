"""Launchers of indexer_tensor.cu, with a kernel of indexer.cu: indexer.py takes them where there are tensor cores that
are worth it."""

from kernels.cuda.runtime.grid import THREADS, TILE_THREADS, ceil_div, warp_a_row

ROWS, COLUMNS = {"tf32": 128, "3xtf32": 64}, 64  # queries and keys of a tile of scores
STAYING = {64: 128, 128: 64}  # padded head size: queries or keys that stay in a block of a gradient's kernel
WIDEST = max(STAYING)  # the widest heads that have such kernels
RANGE_KEYS, RANGE_QUERIES = 1024, 512  # that pass by them at most


def padded_width(dI: int) -> int:
    """The head size, one of STAYING, that heads of dI columns are padded to."""
    return min(size for size in STAYING if dI <= size)


def tensor_scores_forward(cuda, products, scores, q, k, w, scale, first, start=0):
    """indexer_scores_forward; products: "tf32" or "3xtf32"."""
    B, R, S = scores.shape
    Tq, HI = w.shape[1:]
    dI = q.shape[2] // HI
    args = (scores, q, k, w, scale, R, S, Tq, k.shape[1], HI, dI, int(k.shape[2] > dI), first, start)
    grid = ceil_div(S, COLUMNS), ceil_div(R, ROWS[products]), B
    cuda.launch(f"indexer_scores_forward_{products}_kernel", grid, TILE_THREADS, args)


def tensor_scores_backward(cuda, products, dq, dk, dw, dscores, q, k, w, scale, first):
    """indexer_scores_backward for heads of at most WIDEST columns."""
    B, R, S = dscores.shape
    T, HI = w.shape[1:]
    dI, end = q.shape[2] // HI, first + R
    own_keys = int(k.shape[2] > dI)
    size = padded_width(dI)
    tile, ranges = STAYING[size], ceil_div(end, RANGE_KEYS)
    sizes = B, R, S, T, HI, dI, own_keys, first
    parts = cuda.scratch("indexer_parts", (ranges, B, R, HI * dI))
    args = (parts, dscores, q, k, scale, *sizes, RANGE_KEYS)
    cuda.launch(f"indexer_scores_dq_{products}_{size}_kernel", (ceil_div(R, tile), HI, B * ranges), TILE_THREADS, args)
    args = (dq, dw, parts, q, w, B, R, T, HI, dI, first, tile, RANGE_KEYS)
    cuda.launch("indexer_finish_kernel", *warp_a_row(B * R * HI), args)
    ranges, C = ceil_div(R, RANGE_QUERIES), k.shape[2]
    parts = cuda.scratch("indexer_key_parts", (ranges, B, T, C))
    args = (parts, dscores, q, k, w, scale, *sizes, RANGE_QUERIES)
    grid = ceil_div(end, tile), HI if own_keys else 1, B * ranges
    cuda.launch(f"indexer_scores_dk_{products}_{size}_kernel", grid, TILE_THREADS, args)
    args = (dk, parts, B, T, C, R, first, tile, RANGE_QUERIES)
    cuda.launch("indexer_join_kernel", (ceil_div(end * C, THREADS), B), THREADS, args)
