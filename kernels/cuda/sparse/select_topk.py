"""Launcher of select_topk.cu."""

from kernels.cuda.runtime.grid import ceil_div

ITEMS = 16  # scores of a row that a thread keeps
FEWEST, MOST = 128, 512  # threads of a block


def select_topk(cuda, index, count, scores, keep, first, start=0, force_self=1, sink=0, leak=0):
    """As kernels.cpu.sparse.select_topk.select_topk."""
    B, R, S = scores.shape
    args = (index, count, scores, keep, R, S, *index.shape[1:], first, start, force_self, sink, leak)
    threads = 1 << (ceil_div(S, ITEMS) - 1).bit_length()  # a power of 2: they share a histogram's bins
    cuda.launch("select_topk_kernel", B * R, min(max(FEWEST, threads), MOST), args)
