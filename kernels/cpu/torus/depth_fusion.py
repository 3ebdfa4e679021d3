"""Depth fusion: the platters of a head mix after toroidal attention, each channel by the same matrix.

    out[n,h,k',m] = sum_k inp[n,h,k,m] omega[k,k'],   D platters k of hd channels m each in every head h

A row of inp (N,C) is head-major, [h][k][m] with C = NH*D*hd. A row of out is, too, or depth-major, [k'][h][m], as
published (ZanzyTHEbar/torodial-attention), which permutes the channels that a projection copied from GPT-2 expects.
omega (D,D) comes from kernels/cpu/torus/fusion_matrix.py.
"""

import numpy as np

from kernels.cpu.blocks import for_blocks, rows_per_block, scratch


def platters(x, NH, D, depth_major=0):
    """(N,C) -> view (N,NH,D,hd)"""
    if depth_major:
        return x.reshape(len(x), D, NH, -1).swapaxes(1, 2)
    return x.reshape(len(x), NH, D, -1)


def depth_fusion_forward(out, inp, omega, NH, depth_major=0):
    """out (N,C) from inp (N,C), omega (D,D); depth_major = 1 writes out as [k'][h][m]. out may not be inp."""
    D = len(omega)
    _mix(platters(out, NH, D, depth_major), platters(inp, NH, D), omega.T)


def depth_fusion_backward(dinp, domega, dout, inp, omega, NH, depth_major=0):
    """dinp (N,C) = ..., domega (D,D) += ... from dout, inp (N,C), omega (D,D).

        dinp[n,h,k,m] = sum_k' dout[n,h,k',m] omega[k,k'];   domega[k,k'] = sum_{n,h,m} inp[n,h,k,m] dout[n,h,k',m]

    domega may be None (omega is fixed), dinp may not alias dout. domega is read off the products of all channels of a
    head with all: of these (D*hd)^2 sums hd times too many are made, but by BLAS, in one pass.
    """
    D, (N, C) = len(omega), inp.shape
    dy = platters(dout, NH, D, depth_major)
    _mix(platters(dinp, NH, D), dy, omega)
    if domega is None:
        return
    dk = C // NH
    product = scratch("depth_fusion_product", (dk, dk), inp.dtype)
    block = rows_per_block(N, C)
    for start in range(0, N, block):
        rows = slice(start, min(start + block, N))
        right = dy[rows]
        if depth_major:
            right = scratch("depth_fusion_rows", right.shape, inp.dtype)
            np.copyto(right, dy[rows])
        np.matmul(inp[rows].reshape(-1, dk).T, right.reshape(-1, dk), out=product)
        domega += np.einsum("kmlm->kl", product.reshape(D, dk // D, D, dk // D))


def _mix(out, inp, weight):
    """out[n,h] = weight (D,D) @ inp[n,h]; out, inp (N,NH,D,hd). A row depends on no other, in every bit."""
    N, NH, D, hd = inp.shape

    def rows(start, stop):
        if D == 1:  # a product would add 0, which turns -0 into 0
            np.multiply(inp[start:stop], weight[0, 0], out=out[start:stop])
        else:
            np.matmul(weight, inp[start:stop], out=out[start:stop])

    for_blocks(rows, N, rows_per_block(N, NH * D * hd), NH * D * hd)
