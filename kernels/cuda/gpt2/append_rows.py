"""Launcher of append_rows.cu, and how a kernel is given a decoder's position."""

import numpy as np

from kernels.cuda.runtime.grid import packs_of_four


def append_rows(cuda, cache, rows, start):
    """As kernels.cpu.gpt2.append_rows.append_rows."""
    (B, T, C), n = cache.shape, rows.shape[1]
    args = (cache, rows, B, T, n, C, *position(cuda, start))
    cuda.launch("append_rows_kernel", *packs_of_four(rows.size), args)


def position(cuda, start) -> tuple:
    """(number, array (1)): a kernel starts at their sum. `start` is one of them, and the other is 0."""
    return (0, start) if cuda.is_array(start) else (start, cuda.constant(np.zeros(1, np.int32)))
