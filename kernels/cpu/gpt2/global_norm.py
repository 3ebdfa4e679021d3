"""Norm of the whole gradient (llm.c global_norm_squared): sqrt(sum g^2), float32 blocks added up in double."""

from math import sqrt

import numpy as np

BLOCK = 1 << 16


def global_norm(grads):
    """The Euclidean norm of a flat array, a float."""
    blocks = (grads[start : start + BLOCK] for start in range(0, grads.size, BLOCK))
    return sqrt(sum(float(np.dot(block, block)) for block in blocks))
