"""Launcher of select_topk.cu."""

from kernels.cuda.runtime.grid import ceil_div

ITEMS = 16  # scores of a row that a thread keeps
FEWEST, MOST = 128, 512  # threads of a block


def threads_for(keys):
    """Threads of a block that looks for the highest of so many scores: a power of 2, they share a histogram's bins."""
    return min(max(FEWEST, 1 << (ceil_div(keys, ITEMS) - 1).bit_length()), MOST)


def select_topk(cuda, index, count, scores, keep, first, start=0, force_self=1, sink=0, leak=0):
    """As kernels.cpu.sparse.select_topk.select_topk."""
    B, R, S = scores.shape
    args = (index, count, scores, keep, R, S, *index.shape[1:], first, start, force_self, sink, leak)
    cuda.launch("select_topk_kernel", B * R, threads_for(S), args)
