"""A decoder's cache: what new tokens have is kept behind what earlier ones had.

cache[b, start + t] = rows[b, t]

A decoder's `start` may be an array (1) int32 of the device: a CUDA graph that reads it serves every position.
"""

import numpy as np


def append_rows(cache, rows, start):
    """Rows start.. of cache (B,T,C) = rows (B,n,C); start is a number, or an array (1)."""
    start = position(start)
    cache[:, start : start + rows.shape[1]] = rows


def position(start) -> int:
    """The number that `start` is or, an array, holds."""
    return int(start[0]) if isinstance(start, np.ndarray) else start
