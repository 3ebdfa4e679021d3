"""Kullback-Leibler divergence of indexer scores from the attention they imitate, and its gradient, in one pass.

With q = softmax(scores) over the keys of a query (DeepSeek-V3.2 2025, eq. 3 and 4; p is a constant):

    loss = sum_s p (ln p - ln q),   ln q = score - lse,   dscores = (q sum_s p - p) dscale
"""

import numpy as np

from kernels.cpu.blocks import scratch
from kernels.cpu.sparse.score_rows import for_score_rows

LOWEST = -1e30  # stands for -inf: its exponential is 0, and so is its product with a p of 0
TINIEST = 1e-37  # stands for a p of 0 in ln p: p ln p is 0 all the same


def fused_kl(losses, scores, p, dscale, first=0):
    """losses (B,T)[:, first:first+R] from scores, p (B,R,S); scores becomes its own gradient, dscale (q sum_s p - p).

    A score of -inf says that the key is none, its p is 0; its gradient is 0. p sums to 1 up to rounding.
    """
    B, R, S = scores.shape

    def rows(b, begin, stop):
        x, target = scores[b, begin:stop], p[b, begin:stop]
        np.maximum(x, LOWEST, out=x)
        x -= x.max(axis=1, keepdims=True)
        difference = scratch("fused_kl_difference", x.shape, x.dtype)
        np.maximum(target, TINIEST, out=difference)
        np.log(difference, out=difference)
        difference -= x  # ln p - (score - top)
        np.exp(x, out=x)
        total, mass = x.sum(axis=1), target.sum(axis=1)  # (rows)
        losses[b, first + begin : first + stop] = np.einsum("rs,rs->r", target, difference) + mass * np.log(total)
        x *= (mass * dscale / total)[:, None]
        np.multiply(target, dscale, out=difference)
        x -= difference

    for_score_rows(rows, B, R, S, cost=8)
