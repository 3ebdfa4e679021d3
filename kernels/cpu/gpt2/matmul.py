"""Fully connected layer (llm.c matmul_forward/backward). The products are BLAS's, through numpy.matmul.

y = x W^T + b;   dx = dy W,   dW = dy^T x,   db = sum_n dy
"""

import numpy as np

from kernels.cpu.blocks import for_blocks, rows_per_block, scratch
from kernels.cpu.gpt2.column_sum import column_sum

ROWS = 256  # rows of dweight that are added to at a time


def matmul_forward(out, inp, weight, bias=None):
    """out (N,OC) from inp (N,C), weight (OC,C), bias (OC) or None."""
    np.matmul(inp, weight.T, out=out)
    if bias is not None:
        add_bias(out, bias)


def add_bias(out, bias):
    """out (N,OC) += bias (OC)."""
    N, OC = out.shape

    def rows(start, stop):
        out[start:stop] += bias

    for_blocks(rows, N, rows_per_block(N, OC), OC)


def matmul_backward(dinp, dweight, dbias, dout, inp, weight, beta=0):
    """dinp (N,C) = ..., dweight (OC,C) = beta * dweight + ..., dbias (OC) += ... from dout (N,OC), inp (N,C).

    beta is BLAS's, 0 or 1: with 0 the gradient is written, which saves clearing it and reading it back.
    What is not wanted may be None; dinp may not alias dout.
    """
    if dinp is not None:
        np.matmul(dout, weight, out=dinp)
    if dweight is None:
        pass
    elif beta:
        for start in range(0, len(dweight), ROWS):
            rows = dweight[start : start + ROWS]
            product = scratch("matmul_dweight", rows.shape, rows.dtype)
            rows += np.matmul(dout[:, start : start + ROWS].T, inp, out=product)
    else:
        np.matmul(dout.T, inp, out=dweight)
    if dbias is not None:
        column_sum(dbias, dout)
