"""Launchers of keep_controller.cu."""

from kernels.cpu.sparse.keep_controller import HIDDEN
from kernels.cuda.runtime.grid import THREADS, ceil_div

ROWS = 128  # rows, and threads, of a block of the backward pass
PARAMETERS = 113  # values of w1, b1, w2 and b2


def keep_controller_forward(cuda, keep, kappa, hidden, features, w1, b1, w2, b2, first, rows, most, start=0):
    """As kernels.cpu.sparse.keep_controller.keep_controller_forward."""
    B, Tq = keep.shape
    args = (keep, kappa, hidden, features, w1, b1, w2, b2, B, Tq, first, rows, most, start)
    cuda.launch("keep_controller_forward_kernel", ceil_div(B * rows * HIDDEN, THREADS), THREADS, args)


def keep_controller_backward(cuda, losses, dw1, db1, dw2, db2, target, kappa, hidden, features, w2, dscale):
    """As kernels.cpu.sparse.keep_controller.keep_controller_backward."""
    N, T = kappa.size, kappa.shape[1]
    blocks = ceil_div(N, ROWS)
    partial = cuda.scratch("keep_controller", (blocks, PARAMETERS))
    args = (losses, partial, target, kappa, hidden, features, w2, N, T, dscale)
    cuda.launch("keep_controller_backward_kernel", blocks, ROWS, args)
    cuda.launch("keep_controller_add_kernel", 1, ROWS, (dw1, db1, dw2, db2, partial, blocks))
