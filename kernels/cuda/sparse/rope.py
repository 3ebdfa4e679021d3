"""Launchers of rope.cu."""

from kernels.cuda.runtime.grid import THREADS, ceil_div


def rope_forward(cuda, x, heads, rotated, start=0):
    """As kernels.cpu.sparse.rope.rope_forward."""
    _rotate(cuda, x, heads, rotated, start, 0)


def rope_backward(cuda, x, heads, rotated, start=0):
    """As kernels.cpu.sparse.rope.rope_backward."""
    _rotate(cuda, x, heads, rotated, start, 1)


def _rotate(cuda, x, heads, rotated, start, back):
    B, T, W = x.shape
    blocks = ceil_div(B * T * rotated // 2, THREADS)
    cuda.launch("rope_kernel", blocks, THREADS, (x, B * T, T, heads, W // heads, rotated, start, back))
