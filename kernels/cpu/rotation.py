"""Rotations of neighbouring pairs of dimensions, for rotary position embeddings (RoPE; Su et al. 2021).

    (x[2i], x[2i+1]) turns by the angle t * 10000^(-2i / rotated) at position t, i < rotated / 2

A pair is a complex number, its rotation a product with e^(i angle).
"""

from functools import cache

import numpy as np

BASE = 10000.0


@cache
def _turns(T, rotated, dtype, back):
    angle = np.arange(T)[:, None] * BASE ** (-np.arange(0, rotated, 2) / rotated)  # (T,rotated/2) radians, float64
    return np.exp(-1j * angle if back else 1j * angle).astype(np.result_type(dtype, np.complex64))


def turns(start, stop, rotated, dtype, back=False):
    """e^(i angle), e^(-i angle) if back, of positions start..stop-1: complex (stop-start,rotated/2), to suit dtype."""
    # a power of 2 keeps the tables few, although a decoder comes with another `stop` each time
    positions = 1 << (stop - 1).bit_length()
    return _turns(positions, rotated, dtype, back)[start:stop]


def pairs(x):
    """x (...,n) -> view of its pairs of neighbours as complex numbers (...,n/2)"""
    return x.view(np.result_type(x.dtype, np.complex64))
