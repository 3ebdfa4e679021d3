"""Normalisation by the root mean square over channels (Zhang and Sennrich 2019), for the latents of mla.

y = x * rrms * w,   rrms = 1 / sqrt(mean_C(x^2) + 1e-6)
"""

import numpy as np

from kernels.cpu.blocks import for_blocks, rows_per_block, scratch
from kernels.cpu.gpt2.column_sum import column_sum

EPS = 1e-6


def rmsnorm_forward(out, rrms, inp, weight):
    """out (N,C), rrms (N) from the first C columns of inp (N,>=C), weight (C)."""
    N, C = out.shape

    def rows(start, stop):
        x = inp[start:stop, :C]
        mean_square = np.einsum("nc,nc->n", x, x) / C  # (n)
        rrms[start:stop] = 1 / np.sqrt(mean_square + EPS)
        np.multiply(x, rrms[start:stop, None], out=out[start:stop])
        out[start:stop] *= weight

    for_blocks(rows, N, rows_per_block(N, C), C)


def rmsnorm_backward(dinp, dweight, dout, inp, weight, rrms):
    """The first C columns of dinp (N,>=C) = ..., dweight (C) += ... from dout (N,C), inp (N,>=C), weight (C), rrms (N).

    With g = w * dy and xhat = x * rrms:
        dx = rrms * (g - xhat * mean_C(g * xhat));   dw = sum_n xhat * dy
    """
    N, C = dout.shape
    block = rows_per_block(N, C)
    partial = scratch("rmsnorm_partial", (-(-N // block), C), inp.dtype)  # each block's sums for dweight

    def rows(start, stop):
        dy, dx = dout[start:stop], dinp[start:stop, :C]
        xhat, g = scratch("rmsnorm_rows", (2, stop - start, C), inp.dtype)
        np.multiply(inp[start:stop, :C], rrms[start:stop, None], out=xhat)
        np.multiply(dy, xhat, out=g)
        np.add.reduce(g, axis=0, out=partial[start // block])
        np.multiply(dy, weight, out=g)
        gx_mean = np.einsum("nc,nc->n", g, xhat) / C  # (n)
        xhat *= gx_mean[:, None]
        g -= xhat
        np.multiply(g, rrms[start:stop, None], out=dx)

    for_blocks(rows, N, block, C)
    column_sum(dweight, partial)
