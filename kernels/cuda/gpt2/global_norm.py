"""Launcher of global_norm.cu."""

from math import fsum, sqrt

from kernels.cuda.runtime.grid import BLOCKS

THREADS = 512  # threads of a block


def global_norm(cuda, grads):
    """As kernels.cpu.gpt2.global_norm.global_norm; waits for the gradients."""
    partial = cuda.scratch("global_norm", (BLOCKS,))
    cuda.launch("sum_of_squares_kernel", BLOCKS, THREADS, (partial, grads, grads.size))
    return sqrt(fsum(cuda.to_host(partial)))
