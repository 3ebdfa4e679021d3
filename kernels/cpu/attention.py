"""Causal multi-head self-attention (Vaswani et al. 2017; llm.c attention_forward/backward).

    s[t,u] = q_t . k_u / sqrt(hs),   a[t,u] = exp(s[t,u] - lse[t]) for u <= t, else 0,   out_t = sum_u a[t,u] v_u
    lse[t] = log sum_{u<=t} exp(s[t,u])

T x T is never stored: a block of queries meets only the keys up to its own end, and the backward pass computes a again
from lse, as FlashAttention does (Dao et al. 2022). In each third of qkv (B,T,3C), head h owns columns h*hs .. (h+1)*hs.
"""

from math import sqrt

import numpy as np

from kernels.cpu.blocks import for_blocks, scratch

QUERIES = 64  # in a block; half of its square of scores lies above the diagonal and is wasted
SCORES = 1 << 17  # values of one block of scores, over as many heads as fit
FUTURE = np.where(np.tri(QUERIES), np.float32(0), np.float32(-np.inf))  # added to the scores: faster than a choice


def head_groups(B, NH, queries, T):
    """Slices of heads whose scores (B x queries x T each) fit a block together."""
    group = max(1, min(NH, SCORES // (B * queries * T)))
    return [slice(first, min(first + group, NH)) for first in range(0, NH, group)]


def rows_at_once(NH, T):
    """How many rows of a batch to take at once: several if all their scores fit a block."""
    return max(1, SCORES // (NH * min(T, QUERIES) * T))


def heads(x, NH):
    """(B,T,C) -> view (B,NH,T,hs)"""
    B, T, _ = x.shape
    return x.reshape(B, T, NH, -1).transpose(0, 2, 1, 3)


def split(qkv, NH):
    """(B,T,3C) -> q, k, v, each a view (B,NH,T,hs)"""
    B, T, _ = qkv.shape
    return qkv.reshape(B, T, 3, NH, -1).transpose(2, 0, 3, 1, 4)


def scaled_scores(q, k, scale):
    """q (B,n,t,hs), k (B,n,keys,hs) -> scale q . k (B,n,t,keys), in scratch"""
    s = scratch("attention_scores", (*q.shape[:3], k.shape[2]), q.dtype)
    np.matmul(q, k.swapaxes(2, 3), out=s)
    s *= scale
    return s


def causal_scores(q, k, first, scale):
    """q (B,n,t,hs) at positions first.., k (B,n,first+t,hs) -> scaled scores (B,n,t,first+t), -inf for the future."""
    s = scaled_scores(q, k, scale)
    t = s.shape[2]
    s[..., first:] += FUTURE[:t, :t]
    return s


def attend(out, lse, s, v):
    """out (B,n,t,hs), lse (B,n,t) from scores s (B,n,t,keys) and v (B,n,keys,hs); overwrites s."""
    top = s.max(axis=3)
    s -= top[..., None]
    np.exp(s, out=s)
    total = s.sum(axis=3)
    np.matmul(s, v, out=out)
    out /= total[..., None]
    lse[...] = top + np.log(total)


def attend_backward(grads, inputs, do, o, lse, s, scale, write):
    """grads dq (B,n,t,hs) = ..., dk, dv (B,n,keys,hs) = ... if `write`, else += ..., for inputs q, k, v likewise.

    do, o (B,n,t,hs), lse (B,n,t), scores s (B,n,t,keys); overwrites s.
    """
    dq, dk, dv = grads
    q, k, v = inputs
    s -= lse[..., None]
    a = np.exp(s, out=s)
    ds = scratch("attention_dscores", a.shape, a.dtype)
    np.matmul(do, v.swapaxes(2, 3), out=ds)
    ds -= np.einsum("bhtc,bhtc->bht", do, o)[..., None]
    ds *= a
    ds *= scale
    np.matmul(ds, k, out=dq)
    add_product(dk, ds.swapaxes(2, 3), q, write)
    add_product(dv, a.swapaxes(2, 3), do, write)


def attention_forward(out, lse, qkv, NH, start=0):
    """out (B*(T-start),C), lse (B,NH,T-start) from qkv (B,T,3C), for the queries at positions start..T-1."""
    B, T, C3 = qkv.shape
    scale = 1 / sqrt(C3 // 3 // NH)

    def batch_rows(begin, stop):
        q, k, v = split(qkv[begin:stop], NH)
        o, log_sums = heads(out.reshape(B, T - start, -1)[begin:stop], NH), lse[begin:stop]
        for first in range(start, T, QUERIES):
            end = min(first + QUERIES, T)
            rows = slice(first - start, end - start)
            for h in head_groups(stop - begin, NH, end - first, end):
                s = causal_scores(q[:, h, first:end], k[:, h, :end], first, scale)
                attend(o[:, h, rows], log_sums[:, h, rows], s, v[:, h, :end])

    for_blocks(batch_rows, B, rows_at_once(NH, T), NH * T * T)


def attention_backward(dqkv, dout, qkv, out, lse, NH):
    """dqkv (B,T,3C) = ... from dout, out (B*T,C), qkv (B,T,3C), lse (B,NH,T).

        da = do . v,  ds = a * (da - do . out) / sqrt(hs),  dq = ds k,  dk = ds^T q,  dv = a^T do

    where do . out stands for sum_u a da. Query blocks run from the last, which writes dk and dv for all keys, to the
    first; the others add.
    """
    B, T, C3 = qkv.shape
    scale = 1 / sqrt(C3 // 3 // NH)

    def batch_rows(begin, stop):
        q, k, v = split(qkv[begin:stop], NH)
        dq, dk, dv = split(dqkv[begin:stop], NH)
        do, o = (heads(x.reshape(B, T, -1)[begin:stop], NH) for x in (dout, out))
        for first in reversed(range(0, T, QUERIES)):
            end = min(first + QUERIES, T)
            rows = slice(first, end)
            for h in head_groups(stop - begin, NH, end - first, end):
                s = causal_scores(q[:, h, rows], k[:, h, :end], first, scale)
                grads = dq[:, h, rows], dk[:, h, :end], dv[:, h, :end]
                inputs = q[:, h, rows], k[:, h, :end], v[:, h, :end]
                log_sums = lse[begin:stop, h, rows]
                attend_backward(grads, inputs, do[:, h, rows], o[:, h, rows], log_sums, s, scale, end == T)

    for_blocks(batch_rows, B, rows_at_once(NH, T), NH * T * T)


def add_product(out, left, right, write):
    """out = left @ right if `write`, else out += left @ right; (B,n,rows,hs)"""
    if write:
        np.matmul(left, right, out=out)
    else:
        product = scratch("attention_product", out.shape, out.dtype)
        out += np.matmul(left, right, out=product)
