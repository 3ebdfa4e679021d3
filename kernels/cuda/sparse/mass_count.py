"""Launcher of mass_count.cu."""

from kernels.cuda.runtime.grid import THREADS


def mass_count(cuda, keep, scores, mass, first, start=0, softmax=1):
    """As kernels.cpu.sparse.mass_count.mass_count."""
    B, R, S = scores.shape
    args = (keep, scores, 1 - mass, R, S, keep.shape[1], first, start, softmax)
    cuda.launch("mass_count_kernel", B * R, THREADS, args)
