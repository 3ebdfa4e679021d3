"""Layer normalisation over channels (Ba et al. 2016; llm.c layernorm_forward/backward, fused_residual_forward5).

y = (x - mean) * rstd * w + b,   rstd = 1 / sqrt(var + 1e-5),   var over C, biased
"""

import numpy as np

from kernels.cpu.blocks import for_blocks, rows_per_block, scratch
from kernels.cpu.gpt2.column_sum import ones

EPS = 1e-5


def layernorm_forward(out, mean, rstd, inp, weight, bias):
    """out (N,C), mean (N), rstd (N) from inp (N,C), weight (C), bias (C)."""
    N, C = inp.shape
    average = np.full(C, 1 / C, inp.dtype)  # a product with it is faster than a reduction

    def rows(start, stop):
        x, y = inp[start:stop], out[start:stop]
        np.matmul(x, average, out=mean[start:stop])
        np.subtract(x, mean[start:stop, None], out=y)  # (n,C) centred
        var = np.einsum("nc,nc->n", y, y) / C  # (n)
        rstd[start:stop] = 1 / np.sqrt(var + EPS)
        y *= rstd[start:stop, None]
        y *= weight
        y += bias

    for_blocks(rows, N, rows_per_block(N, C), C)


def fused_residual_forward(residual, out, mean, rstd, inp1, inp2, weight, bias):
    """residual (N,C) = inp1 + inp2, then out, mean, rstd from it as layernorm_forward; residual may be inp1 or inp2."""
    np.add(inp1, inp2, out=residual)
    layernorm_forward(out, mean, rstd, residual, weight, bias)


def layernorm_backward(dinp, dweight, dbias, dout, inp, weight, mean, rstd):
    """dinp (N,C) += ..., dweight (C) += ..., dbias (C) += ... from dout, inp (N,C); dinp is the residual stream.

    With g = w * dy and xhat = (x - mean) * rstd:
        dx = rstd * (g - mean_C(g) - xhat * mean_C(g * xhat));   dw = sum_n xhat * dy;   db = sum_n dy
    """
    N, C = inp.shape
    block = rows_per_block(N, C)
    weight_mean = weight / C
    partial = scratch("layernorm_partial", (2, -(-N // block), C), inp.dtype)  # each block's sums for dweight, dbias

    def rows(start, stop):
        x, dy, scale, one = inp[start:stop], dout[start:stop], rstd[start:stop, None], ones(stop - start, inp.dtype)
        xhat, g = scratch("layernorm_rows", (2, *x.shape), inp.dtype)
        np.subtract(x, mean[start:stop, None], out=xhat)
        xhat *= scale
        np.multiply(dy, xhat, out=g)
        np.dot(one, g, out=partial[0, start // block])
        np.dot(one, dy, out=partial[1, start // block])
        xhat *= np.dot(g, weight_mean)[:, None]  # mean_C(w dy xhat) = (dy xhat) . w / C
        xhat += np.dot(dy, weight_mean)[:, None]
        np.multiply(dy, weight, out=g)
        g -= xhat
        g *= scale
        dinp[start:stop] += g

    for_blocks(rows, N, block, C)
    dweight += np.add.reduce(partial[0])
    dbias += np.add.reduce(partial[1])
