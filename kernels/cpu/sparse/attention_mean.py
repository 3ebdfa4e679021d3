"""Dense attention's probabilities, averaged over heads: what the indexer imitates (DeepSeek-V3.2 2025, eq. 3).

p[t,s] = mean over heads of exp(q_t . k_s / sqrt(hs) - lse[t])   for s <= t, else 0
"""

from math import sqrt

import numpy as np

from kernels.cpu.blocks import scratch
from kernels.cpu.gpt2.attention import causal_scores, for_queries, head_groups, scaled, split


def attention_mean(p, qkv, lse, NH, first, start=0):
    """p (B,R,S) = mean over heads of exp(q_t . k_s / sqrt(hs) - lse[t]) for s <= t, 0 for s > t, t = first + r.

    qkv (B,T,3C), lse (B,NH,Tq) of attention over all s <= t, row 0 at position start; S >= first + R.
    """
    B, R, _ = p.shape
    scale = 1 / sqrt(qkv.shape[2] // 3 // NH)

    def queries(b, now, end):
        q, k, _ = split(qkv[b], NH)
        mean = p[b, now - first : end - first]
        mean[...] = 0
        for h in head_groups(b.stop - b.start, NH, end - now, end):
            s = causal_scores(scaled(q[:, h, now:end], scale), k[:, h, :end], now)
            s -= lse[b, h, now - start : end - start, None]
            np.exp(s, out=s)
            mean[..., :end] += head_sum(s)
        mean[..., :end] /= NH

    for_queries(queries, B, NH, first + R, first)


def head_sum(s):
    """(B,n,t,keys) -> (B,t,keys), in scratch where n > 1"""
    if s.shape[1] == 1:
        return s[:, 0]
    total = scratch("attention_head_sum", (s.shape[0], *s.shape[2:]), s.dtype)
    return np.add.reduce(s, axis=1, out=total)
