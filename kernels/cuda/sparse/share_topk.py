"""Launcher of share_topk.cu."""

from kernels.cpu.sparse.share_topk import tiles_of
from kernels.cuda.runtime.grid import THREADS, ceil_div
from kernels.cuda.sparse.select_topk import threads_for


def share_topk(cuda, index, count, sums, scores, k, share, first, start=0, sink=0):
    """As kernels.cpu.sparse.share_topk.share_topk."""
    (B, R, S), (_, M, W), (_, Tq, K) = scores.shape, sums.shape, index.shape
    tile, tiles = tiles_of(sums, share, first, R)
    keys = (tile + tiles - 1) * share  # those that the last tile sums up
    if keys:
        args = sums, scores, R, S, M, W, share, first
        cuda.launch("share_sums_kernel", (ceil_div(keys, THREADS), tiles, B), THREADS, args)
    args = index, count, sums, R, M, W, Tq, K, k, share, tiles, first, start, sink
    cuda.launch("share_lists_kernel", B * tiles, threads_for(max(keys, 1)), args)
