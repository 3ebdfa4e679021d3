"""Rotary position embedding on a torus: P tokens round the ring, D platters deep.

    pair n of platter k of token t, channels (2n, 2n+1), turns by 2 pi (t/P) w[n] + 2 pi (k/D) f[n],   n < hd/2

of each head's q and k, cut into platters as torus_attention cuts them. With integer w and f the rotation has the
periods P and D, and how q_ik and k_jl lie to each other depends on (i-j) mod P and (k-l) mod D alone; after
ZanzyTHEbar/torodial-attention, whose frequencies are fractions.
"""

from functools import lru_cache
from math import pi

import numpy as np

from kernels.cpu.blocks import for_blocks, rows_per_block
from kernels.cpu.rotation import BASE, pairs


def torus_frequencies(kind, hd, D, P):
    """w, f (hd/2) float64: turns in a tour of the ring and of the depth. Raises ValueError for hd that do not suit.

    int       whole numbers: w from P / 2 pi, one radian a token, down to 1; f = 0, 1, .. D-1, 0, ..
    upstream  the repository's standard form: fractions, w as in RoPE but for a whole tour
    orth      its Gram-Schmidt form: f made orthogonal to w, as long as w; hd of 4 or more
    """
    if kind not in ("int", "upstream", "orth"):
        raise ValueError(f"rope {kind!r}, expected int, upstream or orth")
    least = 4 if kind == "orth" else 2
    if hd % 2 or hd < least:
        raise ValueError(f"rope {kind}: {hd} channels a platter, expected an even number from {least} on")
    n = np.arange(hd // 2)
    w = BASE ** (-2 * n / hd)
    if kind == "int":
        return np.maximum(1, np.rint(max(1, P / (2 * pi)) * w)), (n % D).astype(np.float64)
    if kind == "upstream":
        return w, BASE ** (-2 * n / (hd * max(2 * D, 3)))
    f = BASE ** (-2 * n / (2 * hd * D))
    f -= (f @ w) / (w @ w) * w
    return w, f * (np.linalg.norm(w) / np.linalg.norm(f))


@lru_cache(maxsize=8)
def _turns(positions, D, P, w, f, real):
    """e^(i angle) (positions,D*hd/2) for w, f as bytes of dtype `real`, in complex to suit it."""
    w, f = (np.frombuffer(x, real).astype(np.float64) for x in (w, f))
    ring = np.fmod(np.arange(positions)[:, None, None] * w, P) / P  # exact for whole w, at any position
    depth = np.fmod(np.arange(D)[:, None] * f, D) / D
    angle = 2 * pi * (ring + depth)  # (positions,D,hd/2) radians, float64
    return np.exp(1j * angle).astype(np.result_type(real, np.complex64)).reshape(positions, -1)


def torus_rope_forward(qkv, w, f, NH, D, P, start=0):
    """q and k of qkv (B,T,3C) in place, at positions start..start+T-1. w, f (hd/2), hd even."""
    _rotate(qkv, w, f, NH, D, P, start, back=False)


def torus_rope_backward(qkv, w, f, NH, D, P, start=0):
    """The gradient, or qkv itself, in place: a rotation's transpose is the rotation back."""
    _rotate(qkv, w, f, NH, D, P, start, back=True)


def _rotate(qkv, w, f, NH, D, P, start, back):
    B, T, C3 = qkv.shape
    # a power of 2 keeps the tables few, although a decoder comes with another `start` each time
    positions = 1 << (start + T - 1).bit_length()
    table = _turns(positions, D, P, w.tobytes(), f.tobytes(), w.dtype)[start : start + T]
    table = table.conj() if back else table
    turned = pairs(qkv.reshape(B, T, 3 * NH, -1)[:, :, : 2 * NH])  # (B,T,2NH,dk/2)

    def rows(begin, stop):
        turned[:, begin:stop] *= table[begin:stop, None]

    for_blocks(rows, T, rows_per_block(T, B * C3), B * C3)
