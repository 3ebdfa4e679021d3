"""Fully connected layers of experts: each multiplies the rows of the tokens that chose it (rows: see expert_plan).

For expert e and its rows x:   y = x W_e^T;   dx = dy W_e,   dW_e = dy^T x

What a token gets must not depend, even in the last bit, on where among the expert's rows it stands, as that depends on
what other sequences of the batch chose. So the forward's products are all of one shape, a tile of rows or a part of it,
in which BLAS treats all rows alike: see alike_rows. The gradients' products take an expert's rows all at once.
"""

from functools import cache

import numpy as np

from kernels.cpu.blocks import scratch
from kernels.cpu.gpt2.matmul import ROWS


def expert_matmul_forward(out, inp, weight, tile_expert):
    """out (rows,OC) from inp (rows,C), weight (E,OC,C), tile_expert (rows/tile) int32; 0 in tiles that are not used."""
    _, OC, C = weight.shape
    tile = len(inp) // len(tile_expert)
    step = alike_rows(tile, C, OC, inp.dtype)
    product = scratch("expert_matmul", (OC, step), inp.dtype)
    used = np.count_nonzero(tile_expert >= 0) * tile
    for start in range(0, used, step):
        rows = slice(start, start + step)
        np.matmul(weight[tile_expert[start // tile]], inp[rows].T, out=product)
        out[rows] = product.T
    out[used:] = 0


@cache
def alike_rows(tile, C, OC, dtype):
    """How many of a tile's rows to multiply at a time: the most that this machine's BLAS treats alike, by trial.

    An inner kernel takes some 16 rows at once, in the lanes of its vectors, which is why the product is the transposed
    one: lanes add up alike. But one at the edge of a block may add in another order (OpenBLAS 0.3.31: 64 rows are alike
    for SkylakeX, 16 for Haswell and Zen, where the outer 8 of 64 differ from the others).
    """
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((OC, C)).astype(dtype)
    inp = np.tile(rng.standard_normal(C).astype(dtype), (tile, 1))  # the same row everywhere
    while tile > 1:
        product = weight @ inp[:tile].T
        if (product == product[:, :1]).all():
            break
        tile //= 2
    return tile


def expert_matmul_backward(dinp, dweight, dout, inp, weight, tile_expert, beta=0):
    """dinp (rows,C) = ..., dweight (E,OC,C) = beta * dweight + ... from dout (rows,OC), inp (rows,C).

    beta is BLAS's, 0 or 1. dout must be 0 in padding rows. dinp may be None, and may not alias dout.
    """
    tile = len(inp) // len(tile_expert)
    ends = np.searchsorted(tile_expert[tile_expert >= 0], np.arange(len(weight)), side="right") * tile
    start = 0
    for e, end in enumerate(ends.tolist()):
        rows, start = slice(start, end), end
        if dinp is not None:
            np.matmul(dout[rows], weight[e], out=dinp[rows])
        _add_dweight(dweight[e], dout[rows], inp[rows], beta)
    if dinp is not None:
        dinp[start:] = 0


def _add_dweight(dweight, dout, inp, beta):
    """dweight (OC,C) = beta * dweight + dout (n,OC)^T inp (n,C), n may be 0"""
    if not beta:
        np.matmul(dout.T, inp, out=dweight)
    elif len(dout):
        for start in range(0, len(dweight), ROWS):
            rows = dweight[start : start + ROWS]
            product = scratch("expert_dweight", rows.shape, rows.dtype)
            rows += np.matmul(dout[:, start : start + ROWS].T, inp, out=product)
