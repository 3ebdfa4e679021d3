"""Causal multi-head self-attention (Vaswani et al. 2017; llm.c attention_forward/backward).

    s[t,u] = q_t . k_u / sqrt(hs),   a[t,u] = exp(s[t,u] - lse[t]) for u <= t, else 0,   out_t = sum_u a[t,u] v_u
    lse[t] = log sum_{u<=t} exp(s[t,u])

T x T is never stored: a block of queries meets only the keys up to its own end, and the backward pass computes a again
from lse, as FlashAttention does (Dao et al. 2022). In each third of qkv (B,T,3C), head h owns columns h*hs .. (h+1)*hs.
"""

from functools import partial
from math import exp, sqrt

import numpy as np

from kernels.cpu.blocks import for_blocks, num_threads, scratch
from kernels.cpu.gpt2.append_rows import position
from kernels.cpu.gpt2.column_sum import ones

QUERIES = 64  # queries in a block; half of its square of scores lies above the diagonal and is wasted
SCORES = 1 << 17  # values of one block of scores, over as many heads as fit
# the cost of a score, with its part of the products, in floats of elementwise work. measured: a second thread is 1.2 to
# 1.8 times as fast from 200,000 scores on, which take 2 ms, and slower below 160,000
SCORE_FLOATS = 12
# the largest |log| of a row's sum of exp(score) that is left as it is; what counts in it is far from float32's ends
EXTREME = 40
FUTURE = np.where(np.tri(QUERIES), np.float32(0), np.float32(-np.inf))  # added to scores, which is faster than np.where


def head_groups(B, NH, queries, T):
    """Slices of heads whose scores (B x queries x T each) fit a block together."""
    group = max(1, min(NH, SCORES // (B * queries * T)))
    return [slice(first, min(first + group, NH)) for first in range(0, NH, group)]


def rows_at_once(NH, T):
    """How many rows of a batch to take at once: several if all their scores fit a block."""
    return max(1, SCORES // (NH * min(T, QUERIES) * T))


def for_queries(work, B, NH, T, start=0, queries=QUERIES):
    """Call work(b, first, end) for slices b of the batch and `queries` queries first..end-1 from `start` to T.

    On all cores, as for_heads.
    """
    rows = min(B, rows_at_once(NH, T))
    blocks = -(-(T - start) // queries)

    def unit(i, _):
        b, first = i // blocks * rows, start + i % blocks * queries
        work(slice(b, min(b + rows, B)), first, min(first + queries, T))

    for_blocks(unit, -(-B // rows) * blocks, 1, SCORE_FLOATS * rows * NH * queries * (start + T + QUERIES) // 2)


def for_heads(work, B, NH, T, D=1):
    """Call work(b, h) for slices b of the batch and h of the heads, so many that every core has one.

    No head has to do with another, so how many there are in a slice changes no bit. D: platters of a head, as in
    torus_attention.
    """
    rows = min(B, rows_at_once(NH * D, T))
    shares = -(-num_threads() // -(-B // rows))
    some = -(-NH // shares)
    slices = -(-NH // some)

    def unit(i, _):
        b, h = i // slices * rows, i % slices * some
        work(slice(b, min(b + rows, B)), slice(h, min(h + some, NH)))

    for_blocks(unit, -(-B // rows) * slices, 1, SCORE_FLOATS * rows * some * T * (T + QUERIES) // 2)


def heads(x, NH):
    """(B,T,C) -> view (B,NH,T,hs)"""
    B, T, _ = x.shape
    return x.reshape(B, T, NH, -1).transpose(0, 2, 1, 3)


def split(qkv, NH):
    """(B,T,3C) -> q, k, v, each a view (B,NH,T,hs)"""
    B, T, _ = qkv.shape
    return qkv.reshape(B, T, 3, NH, -1).transpose(2, 0, 3, 1, 4)


def scaled(x, scale):
    """scale * x (B,n,t,hs), contiguous, in scratch: a pass over hs columns instead of one over all scores"""
    return np.multiply(x, scale, out=scratch("attention_queries", x.shape, x.dtype))


def scores_of(q, k):
    """q (B,n,t,hs), scaled, k (B,n,keys,hs) -> q . k (B,n,t,keys), in scratch"""
    return np.matmul(q, k.swapaxes(2, 3), out=scratch("attention_scores", (*q.shape[:3], k.shape[2]), q.dtype))


def causal_scores(q, k, first):
    """q (B,n,t,hs), scaled, at positions first.., k (B,n,first+t,hs) -> scores (B,n,t,first+t), -inf for the future."""
    s = scores_of(q, k)
    t = s.shape[2]
    s[..., first:] += FUTURE[:t, :t]
    return s


def exp_scores(scores):
    """(e (..,t,keys) = exp(scores() - shift), its sums (..,t), shift (..,t) or 0) for the function `scores`.

    shift is 0 for a row whose sum stays within exp(-EXTREME) .. exp(EXTREME), as nearly all do, else the row's maximum.
    No row asks another, so that a future token changes no bit.
    """
    s = scores()
    with np.errstate(over="ignore"):
        e = np.exp(s, out=s)
        total = np.matmul(e, ones(e.shape[-1], e.dtype))
    if exp(-EXTREME) < total.min() and total.max() < exp(EXTREME):  # else, or with NaN
        return e, total, 0
    s = scores()
    shift = np.where((exp(-EXTREME) < total) & (total < exp(EXTREME)), 0, s.max(axis=-1))
    s -= shift[..., None]
    e = np.exp(s, out=s)
    return e, np.matmul(e, ones(e.shape[-1], e.dtype)), shift


def exp_again(s, lse):
    """(e, inverse (..,t)) with e * inverse = exp(s - lse), the probabilities, for scores s (..,t,keys) and lse (..,t).

    Overwrites s by e. So it is dout that is normalised, whose rows are shorter.
    """
    shift = 0
    if not -EXTREME < lse.min() <= lse.max() < EXTREME:
        shift = np.where(np.abs(lse) < EXTREME, 0, lse)
        s -= shift[..., None]
    return np.exp(s, out=s), np.exp(shift - lse)


def attend(out, lse, scores, v):
    """out (B,n,t,hs), lse (B,n,t) from the function `scores`, which gives (B,n,t,keys), and v (B,n,keys,hs)."""
    e, total, shift = exp_scores(scores)
    np.matmul(e, v, out=out)
    out /= total[..., None]
    np.log(total, out=lse)
    lse += shift


def attend_backward(grads, inputs, do, o, lse, s, scale, write):
    """grads dq (B,n,t,hs) = ..., dk, dv (B,n,keys,hs) = ... if `write`, else += ..., for inputs: scaled q, k and v.

    do, o (B,n,t,hs), lse (B,n,t), scores s (B,n,t,keys); overwrites s.
    """
    dq, dk, dv = grads
    q, k, v = inputs
    e, inverse = exp_again(s, lse)
    do = np.multiply(do, inverse[..., None], out=scratch("attention_dout", do.shape, do.dtype))
    ds = scratch("attention_dscores", e.shape, e.dtype)
    np.matmul(do, v.swapaxes(2, 3), out=ds)
    ds -= np.einsum("bhtc,bhtc->bht", do, o)[..., None]
    ds *= e
    np.matmul(ds, k, out=dq)
    dq *= scale
    add_product(dk, ds.swapaxes(2, 3), q, write)
    add_product(dv, e.swapaxes(2, 3), do, write)


def attention_forward(out, lse, qkv, NH, start=0):
    """out (B*(T-start),C), lse (B,NH,T-start) from qkv (B,T,3C), for the queries at positions start..T-1.

    start may be an array (1). Then out says how many queries there are, and qkv may have rows behind the last.
    """
    B, T, C3 = qkv.shape
    if isinstance(start, np.ndarray):
        start = position(start)
        T = start + len(out) // B
    scale = 1 / sqrt(C3 // 3 // NH)

    def queries(b, first, end):
        q, k, v = split(qkv[b], NH)
        rows = slice(first - start, end - start)
        o, log_sums = heads(out.reshape(B, T - start, -1)[b, rows], NH), lse[b, :, rows]
        for h in head_groups(b.stop - b.start, NH, end - first, end):
            scaled_q, keys = scaled(q[:, h, first:end], scale), k[:, h, :end]
            attend(o[:, h], log_sums[:, h], partial(causal_scores, scaled_q, keys, first), v[:, h, :end])

    for_queries(queries, B, NH, T, start)


def attention_backward(dqkv, dout, qkv, out, lse, NH):
    """dqkv (B,T,3C) = ... from dout, out (B*T,C), qkv (B,T,3C), lse (B,NH,T).

        da = do . v,  ds = a * (da - do . out) / sqrt(hs),  dq = ds k,  dk = ds^T q,  dv = a^T do

    where do . out stands for sum_u a da. Query blocks run from the last, which writes dk and dv for all keys, to the
    first; the others add.
    """
    B, T, C3 = qkv.shape
    scale = 1 / sqrt(C3 // 3 // NH)

    def some_heads(b, h):
        q, k, v = (x[:, h] for x in split(qkv[b], NH))
        dq, dk, dv = (x[:, h] for x in split(dqkv[b], NH))
        do, o = (heads(x.reshape(B, T, -1)[b], NH)[:, h] for x in (dout, out))
        log_sums = lse[b, h]
        for first in reversed(range(0, T, QUERIES)):
            end = min(first + QUERIES, T)
            rows = slice(first, end)
            for n in head_groups(b.stop - b.start, h.stop - h.start, end - first, end):
                inputs = scaled(q[:, n, rows], scale), k[:, n, :end], v[:, n, :end]
                s = causal_scores(*inputs[:2], first)
                grads = dq[:, n, rows], dk[:, n, :end], dv[:, n, :end]
                attend_backward(grads, inputs, do[:, n, rows], o[:, n, rows], log_sums[:, n, rows], s, scale, end == T)

    for_heads(some_heads, B, NH, T)


def add_product(out, left, right, write):
    """out = left @ right if `write`, else out += left @ right; (B,n,rows,hs)"""
    if write:
        np.matmul(left, right, out=out)
    else:
        product = scratch("attention_product", out.shape, out.dtype)
        out += np.matmul(left, right, out=product)
