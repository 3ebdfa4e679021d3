"""Sums over the rows of a matrix: a bias's gradient, db = sum_n dy (llm.c matmul_backward)."""

from functools import lru_cache

import numpy as np


@lru_cache(maxsize=64)
def ones(N, dtype):
    """(N), made once."""
    return np.ones(N, dtype)


def column_sum(out, inp):
    """out (C) += the sums over the rows of inp (N,C): a product with ones, BLAS being three times as fast as reduce."""
    out += np.dot(ones(len(inp), inp.dtype), inp)
