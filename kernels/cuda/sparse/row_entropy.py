"""Launcher of row_entropy.cu."""

from kernels.cuda.runtime.grid import warp_a_row


def row_entropy(cuda, entropy, scores, first, start=0):
    """As kernels.cpu.sparse.row_entropy.row_entropy."""
    B, R, S = scores.shape
    _, Tq, *width = entropy.shape
    args = (entropy, scores, B * R, R, S, Tq, *(width or [1]), first, start)
    cuda.launch("row_entropy_kernel", *warp_a_row(B * R), args)
