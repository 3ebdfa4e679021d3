"""How many keys hold a given part of a query's mass: the number to keep for top-p, and the controller's target."""

import numpy as np

from kernels.cpu.blocks import scratch
from kernels.cpu.sparse.score_rows import for_score_rows, future


def mass_count(keep, scores, mass, first, start=0, softmax=1):
    """keep (B,Tq) int32, rows first-start.., = the smallest m such that the m largest values of a row hold at least
    `mass` (0..1) of their sum; 1 <= m <= t+1. scores (B,R,S).

    The values, for s <= t = first + r, are exp(score - top) or, without softmax, the scores themselves, which are >= 0.
    Small values are added up first: those that together hold no more than 1 - mass are left out.
    """
    B, R, S = scores.shape

    def rows(b, begin, stop):
        positions = np.arange(first + begin, first + stop)
        keys = first + stop
        x = scratch("mass_count", (stop - begin, keys), scores.dtype)
        np.copyto(x, scores[b, begin:stop, :keys])
        np.copyto(x[:, positions[0] + 1 :], -np.inf if softmax else 0, where=future(positions, keys))
        if softmax:
            x -= x.max(axis=1, keepdims=True)
            np.exp(x, out=x)
        x.sort(axis=1)
        np.cumsum(x, axis=1, out=x)
        left_out = np.count_nonzero(
            x <= (1 - mass) * x[:, -1:], axis=1
        )  # keys of the future, which are zeros, among them
        keep[b, first - start + begin : first - start + stop] = np.clip(keys - left_out, 1, positions + 1)

    for_score_rows(rows, B, R, S, cost=16)
