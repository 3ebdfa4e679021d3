"""Launcher of select_topk.cu."""

from kernels.cuda.runtime.grid import THREADS


def select_topk(cuda, index, count, scores, keep, first, start=0, force_self=1, sink=0, leak=0):
    """As kernels.cpu.sparse.select_topk.select_topk."""
    B, R, S = scores.shape
    args = (index, count, scores, keep, R, S, *index.shape[1:], first, start, force_self, sink, leak)
    cuda.launch("select_topk_kernel", B * R, THREADS, args)  # a thread for each bin of a histogram
