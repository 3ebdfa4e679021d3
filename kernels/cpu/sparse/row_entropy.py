"""How evenly a query's indexer scores spread over its keys."""

import numpy as np

from kernels.cpu.blocks import scratch
from kernels.cpu.sparse.fused_kl import LOWEST
from kernels.cpu.sparse.score_rows import for_score_rows, future


def row_entropy(entropy, scores, first, start=0):
    """entropy (B,Tq), rows first-start.., = H(softmax_{s<=t} scores) / ln(t+1), in 0..1; 0 for t = 0. scores (B,R,S).

    entropy may be (B,Tq,W), of which the last column is written: a feature among others.

    With x = score - top and e = exp(x): H = ln sum_s e - sum_s e x / sum_s e.
    """
    B, R, S = scores.shape
    entropy = entropy if entropy.ndim == 2 else entropy[:, :, -1]

    def rows(b, begin, stop):
        positions = np.arange(first + begin, first + stop)
        keys = first + stop
        x, e = scratch("row_entropy", (2, stop - begin, keys), scores.dtype)
        np.maximum(scores[b, begin:stop, :keys], LOWEST, out=x)
        np.copyto(x[:, positions[0] + 1 :], LOWEST, where=future(positions, keys))
        x -= x.max(axis=1, keepdims=True)
        np.exp(x, out=e)
        total = e.sum(axis=1)  # (rows)
        of_block = entropy[b, first - start + begin : first - start + stop]
        of_block[...] = np.log(total) - np.einsum("rs,rs->r", e, x) / total
        of_block /= np.log(np.maximum(positions, 1) + 1)  # ln 2 for t = 0, where H is 0
        np.clip(of_block, 0, 1, out=of_block)  # rounding

    for_score_rows(rows, B, R, S, cost=6)
