"""Norm of the whole gradient (llm.c global_norm_squared): sqrt(sum g^2), float32 blocks added up in double."""

from math import sqrt

import numpy as np

BLOCK = 1 << 16


def global_norm(norm, grads):
    """norm (1): the Euclidean norm of a flat array."""
    blocks = (grads[start : start + BLOCK] for start in range(0, grads.size, BLOCK))
    norm[0] = sqrt(sum(float(np.dot(block, block)) for block in blocks))
