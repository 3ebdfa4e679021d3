"""Launcher of select_topk.cu."""

from kernels.cuda.runtime.grid import THREADS, ceil_div

ITEMS = 16  # scores of a row that a thread keeps
FEWEST, MOST = 128, 1024  # threads of a block


def select_topk(cuda, index, count, scores, keep, first, start=0, force_self=1, sink=0, leak=0):
    """As kernels.cpu.sparse.select_topk.select_topk."""
    B, R, S = scores.shape
    args = (index, count, scores, keep, R, S, *index.shape[1:], first, start, force_self, sink, leak)
    threads = max(FEWEST, 1 << (ceil_div(S, ITEMS) - 1).bit_length())  # a power of 2: they share a histogram's bins
    if threads <= MOST:
        cuda.launch("select_topk_kernel", B * R, threads, args)
    else:
        cuda.launch("select_topk_long_kernel", B * R, THREADS, args)  # a thread for each bin of a histogram
