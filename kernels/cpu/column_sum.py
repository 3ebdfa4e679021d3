"""Sums over the rows of a matrix: a bias's gradient, db = sum_n dy (llm.c matmul_backward)."""

import numpy as np


def column_sum(out, inp):
    """out (C) += the sums over the rows of inp (N,C)."""
    out += np.add.reduce(inp, axis=0)
