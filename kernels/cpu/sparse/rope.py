"""Rotary position embedding, RoPE (Su et al. 2021), of neighbouring pairs of dimensions.

    (x[2i], x[2i+1]) turns by the angle t * 10000^(-2i / rotated) at position t, i < rotated / 2

A pair is a complex number, its rotation a product with e^(i angle). After it q_t . k_s depends on t - s alone.
"""

from functools import cache

import numpy as np

from kernels.cpu.blocks import for_blocks, rows_per_block

BASE = 10000.0


@cache
def _turns(T, rotated, dtype, back):
    angle = np.arange(T)[:, None] * BASE ** (-np.arange(0, rotated, 2) / rotated)  # (T,rotated/2) radians, float64
    return np.exp(-1j * angle if back else 1j * angle).astype(np.result_type(dtype, np.complex64))


def turns(start, stop, rotated, dtype, back=False):
    """e^(i angle), e^(-i angle) if back, of positions start..stop-1: complex (stop-start,rotated/2), to suit dtype."""
    positions = 1 << (stop - 1).bit_length()  # so few tables, although a decoder comes with another `stop` each time
    return _turns(positions, rotated, dtype, back)[start:stop]


def pairs(x):
    """x (...,n) -> view of its pairs of neighbours as complex numbers (...,n/2)"""
    return x.view(np.result_type(x.dtype, np.complex64))


def rope_forward(x, heads, rotated, start=0):
    """x (B,T,heads*width) in place: the first `rotated` dimensions of each head, at positions start..start+T-1.

    rotated: even, 2 to width.
    """
    _rotate(x, heads, rotated, start, back=False)


def rope_backward(x, heads, rotated, start=0):
    """The gradient x (B,T,heads*width) in place: a rotation's transpose is the rotation back."""
    _rotate(x, heads, rotated, start, back=True)


def _rotate(x, heads, rotated, start, back):
    B, T, W = x.shape
    turned = pairs(x.reshape(B, T, heads, -1)[..., :rotated])
    table = turns(start, start + T, rotated, x.dtype, back)

    def rows(begin, stop):
        turned[:, begin:stop] *= table[begin:stop, None]

    for_blocks(rows, T, rows_per_block(T, B * W), B * W)
