"""Launcher of global_norm.cu."""

from kernels.cuda.runtime.grid import BLOCKS

THREADS = 512  # threads of a block


def global_norm(cuda, norm, grads):
    """As kernels.cpu.gpt2.global_norm.global_norm."""
    partial = cuda.scratch("global_norm", (BLOCKS,))
    cuda.launch("sum_of_squares_kernel", BLOCKS, THREADS, (partial, grads, grads.size))
    cuda.launch("norm_kernel", 1, THREADS, (norm, partial, BLOCKS))
