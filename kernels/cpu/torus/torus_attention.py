"""Toroidal attention: the platters of a token attend to the platters of all tokens it sees, by distance on a torus.

A head's columns are cut into D platters of hd: column h*dk + k*hd + m belongs to platter k of head h, in q, k, v, out.
A token thus becomes D sub-tokens (i,k), and one softmax runs over all sub-tokens (j,l) that (i,k) sees:

    s = q_ik . k_jl / sqrt(hd) - a_s ds(i,j) - a_d dd(k,l),   a = exp(s - lse_ik),   out_ik = sum_jl a v_jl
    ds = min(r, P-r) / P with r = (i-j) mod P: the shorter way round a ring of P tokens
    dd = |k-l| / D, or min(|k-l|, D-|k-l|) / D where depth wraps too

after ZanzyTHEbar/torodial-attention, which has ds + dd under one fixed weight, the length at hand for P, and no mask.
Here (i,k) sees (j,l) iff j <= i (causal): as tokens are counted, not as they lie on the ring, so T may exceed P. A
window further demands min(r, P-r) <= window. P is a constant, so a prefix gives the same output as the whole.

The bias depends on i-j and k-l alone: a vector for each head and each k-l, of which every row of scores sees a stretch.
T D x T D is never stored. With D = 1, no weights and no window, every bit is that of kernels.cpu.gpt2.attention.
"""

from functools import partial
from math import sqrt

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from kernels.cpu.blocks import scratch
from kernels.cpu.gpt2.attention import (
    QUERIES,
    add_product,
    exp_again,
    exp_scores,
    for_heads,
    for_queries,
    head_groups,
)


def platters(x, NH, D):
    """(B,T,C) -> view (B,NH,D,T,hd)"""
    B, T, _ = x.shape
    return x.reshape(B, T, NH, D, -1).transpose(0, 2, 3, 1, 4)


def _split(qkv, NH, D):
    """(B,T,3C) -> q, k, v, each a view (B,NH,D,T,hd)"""
    B, T, _ = qkv.shape
    return qkv.reshape(B, T, 3, NH, D, -1).transpose(2, 0, 3, 4, 1, 5)


def ring_distance(lag, P):
    """Tokens between i and j on a ring of P, the shorter way, for integers lag = i-j."""
    r = lag % P
    return np.minimum(r, P - r)


def depth_distance(offset, D, wrap_depth):
    """Platters between k and l for integers offset = k-l."""
    r = np.abs(offset)
    return np.minimum(r, D - r) if wrap_depth else r


class Geometry:
    """Distances and their bias: all that positions decide, for lags i-j of T-1, T-2, .. and offsets k-l of D-1 .. 1-D.

    bias (NH,2D-1,lags), -inf for lags that are not seen; ds (lags), dd (D,D). Rows of scores see stretches of these.
    """

    def __init__(self, a_s, a_d, T, D, P, window, wrap_depth, causal):
        self.T = T
        lag = T - 1 - np.arange(T + QUERIES if causal else 2 * T)
        offset = D - 1 - np.arange(2 * D - 1)
        ring = ring_distance(lag, P)
        hidden = (lag < 0) & bool(causal) | (ring > window) & (window >= 0)
        self.ds = (ring / P).astype(a_s.dtype)
        by_offset = (depth_distance(offset, D, wrap_depth) / D).astype(a_s.dtype)
        self.dd = sliding_window_view(by_offset, D)[::-1]
        self.bias = scratch("torus_bias", (len(a_s), len(offset), len(lag)), a_s.dtype)
        np.multiply(-a_s[:, None, None], self.ds, out=self.bias)
        self.bias -= a_d[:, None, None] * by_offset[:, None]
        self.bias += np.where(hidden, -np.inf, 0).astype(a_s.dtype)

    def block_bias(self, first, end, keys):
        """View (NH,D,end-first,D,keys) for queries first..end-1: [h,k,i,l,j]."""
        D = (self.bias.shape[1] + 1) // 2
        stretches = sliding_window_view(self.bias, (D, keys), axis=(1, 2))
        return stretches[:, ::-1, self.T - end : self.T - first][:, :, ::-1]

    def block_ds(self, first, end, keys):
        """View (end-first,keys)."""
        return sliding_window_view(self.ds, keys)[self.T - end : self.T - first][::-1]


def _one_below_another(key, x, factor):
    """x (B,n,D,t,hd) -> factor * x as (B,n,D*t,hd), in scratch: products of D*t rows instead of D of t

    factor: a number, or an array that goes with x.
    """
    B, n, D, t, hd = x.shape
    rows = np.multiply(x, factor, out=scratch(key, x.shape, x.dtype))
    return rows.reshape(B, n, D * t, hd)


def _scores(q, k, bias):
    """q (B,n,D*t,hd), scaled, k (B,n,D,keys,hd), bias (n,D,t,D,keys) -> scores (B,n,D*t,D*keys)"""
    B, n, rows, _ = q.shape
    D, keys = k.shape[2:4]
    s = scratch("torus_scores", (B, n, rows, D, keys), q.dtype)
    np.matmul(q[:, :, None], k.swapaxes(3, 4), out=_by_platter(s))
    by_token = s.reshape(B, n, D, rows // D, D, keys)
    by_token += bias
    return s.reshape(B, n, rows, D * keys)


def _by_platter(s):
    """(B,n,rows,D,keys) -> view (B,n,D,rows,keys): the part of each platter of the keys"""
    return s.transpose(0, 1, 3, 2, 4)


def _add_platters(out, weights, values):
    """out (B,n,D,t,hd) = sum_l weights[:,:,l] @ values[:,:,l]; (B,n,D,D*t,keys) and (B,n,D,keys,hd)"""
    B, n, D, t, hd = out.shape
    if D == 1:
        np.matmul(weights, values, out=out)
        return
    product = scratch("torus_product", (B, n, D, D * t, hd), out.dtype)
    np.matmul(weights, values, out=product)
    np.sum(product.reshape(B, n, D, D, t, hd), axis=2, out=out)


def _tokens_per_block(D):
    return max(1, QUERIES // D)


def torus_attention_forward(out, lse, qkv, a_s, a_d, NH, D, P, window=-1, wrap_depth=0, causal=1, start=0):
    """out (B*(T-start),C), lse (B,NH,T-start,D) from qkv (B,T,3C), a_s, a_d (NH), for the tokens start..T-1.

    D: platters, a divisor of the head size. P: tokens of the ring. window: tokens on the ring, -1 for all of it.
    """
    B, T, C3 = qkv.shape
    scale = 1 / sqrt(C3 // 3 // NH // D)
    geometry = Geometry(a_s, a_d, T, D, P, window, wrap_depth, causal)

    def tokens(b, first, end):
        q, k, v = _split(qkv[b], NH, D)
        keys, rows = end if causal else T, slice(first - start, end - start)
        o = platters(out.reshape(B, T - start, -1)[b, rows], NH, D)
        log_sums = lse[b, :, rows].swapaxes(2, 3)  # (B,NH,D,t)
        bias = geometry.block_bias(first, end, keys)
        for h in head_groups(b.stop - b.start, NH, D * (end - first), D * keys):
            queries = _one_below_another("torus_queries", q[:, h, :, first:end], scale)
            e, total, shift = exp_scores(partial(_scores, queries, k[:, h, :, :keys], bias[h]))
            _add_platters(o[:, h], _by_platter(e.reshape(*e.shape[:3], D, keys)), v[:, h, :, :keys])
            per_query = (*total.shape[:2], D, end - first)
            o[:, h] /= total.reshape(*per_query, 1)
            log_sums[:, h] = (np.log(total) + shift).reshape(per_query)

    for_queries(tokens, B, NH * D, T, start, _tokens_per_block(D))


def torus_attention_backward(
    dqkv, da_s, da_d, dout, qkv, out, lse, a_s, a_d, NH, D, P, window=-1, wrap_depth=0, causal=1
):
    """dqkv (B,T,3C) = ..., da_s, da_d (NH) += ... from dout, out (B*T,C), qkv (B,T,3C), lse (B,NH,T,D).

        da = do . v,  ds = a * (da - do . out),  dq = ds k / sqrt(hd),  dk = ds^T q / sqrt(hd),  dv = a^T do
        da_s = -sum ds ds(i,j),  da_d = -sum ds dd(k,l)    over batch, queries and keys

    da_s and da_d may be None, both: not wanted. Blocks run from the last, as in attention_backward.
    """
    B, T, C3 = qkv.shape
    scale = 1 / sqrt(C3 // 3 // NH // D)
    geometry = Geometry(a_s, a_d, T, D, P, window, wrap_depth, causal)
    sums = np.zeros((2, B, NH))  # the sums for a_s and a_d by rows of the batch, added up in a fixed order

    def some_heads(b, mine):
        q, k, v = (x[:, mine] for x in _split(qkv[b], NH, D))
        dq, dk, dv = (x[:, mine] for x in _split(dqkv[b], NH, D))
        do, o = (platters(x.reshape(B, T, -1)[b], NH, D)[:, mine] for x in (dout, out))
        log_sums = lse[b, mine].swapaxes(2, 3)  # (B,NH,D,T)
        ring_sums, depth_sums = sums[:, b, mine]
        for first in reversed(range(0, T, _tokens_per_block(D))):
            end = min(first + _tokens_per_block(D), T)
            keys, rows = end if causal else T, slice(first, end)
            bias = geometry.block_bias(first, end, keys)[mine]
            for h in head_groups(b.stop - b.start, mine.stop - mine.start, D * (end - first), D * keys):
                queries = _one_below_another("torus_queries", q[:, h, :, rows], scale)
                s = _scores(queries, k[:, h, :, :keys], bias[h])
                e, inverse = exp_again(s, log_sums[:, h, :, rows].reshape(s.shape[:3]))
                own = do[:, h, :, rows]  # (B,n,D,t,hd)
                douts = _one_below_another("torus_douts", own, inverse.reshape(*own.shape[:4], 1))
                ds = scratch("torus_dscores", (*e.shape[:3], D, keys), e.dtype)
                np.matmul(douts[:, :, None], v[:, h, :, :keys].swapaxes(3, 4), out=_by_platter(ds))
                delta = np.einsum("bhktc,bhktc->bhkt", douts.reshape(own.shape), o[:, h, :, rows])
                ds -= delta.reshape(*e.shape[:3], 1, 1)
                e = e.reshape(ds.shape)
                ds *= e
                if da_s is not None:
                    ring, depth = _bias_sums(ds, geometry, first, end, keys)
                    ring_sums[:, h] += ring
                    depth_sums[:, h] += depth
                e, ds = _by_platter(e), _by_platter(ds)
                _add_platters(dq[:, h, :, rows], ds, k[:, h, :, :keys])
                dq[:, h, :, rows] *= scale
                add_product(dk[:, h, :, :keys], ds.swapaxes(3, 4), queries[:, :, None], end == T)
                add_product(dv[:, h, :, :keys], e.swapaxes(3, 4), douts[:, :, None], end == T)

    for_heads(some_heads, B, NH, T, D)
    if da_s is not None:
        da_s -= sums[0].sum(axis=0)
        da_d -= sums[1].sum(axis=0)


def _bias_sums(ds, geometry, first, end, keys):
    """ds (B,n,D*t,D,keys) -> its sums times ds(i,j) and times dd(k,l), each (B,n) float64"""
    B, n, _, D, _ = ds.shape
    ds = ds.reshape(B, n, D, end - first, D, keys)
    by_row = np.einsum("bnktlj,tj->bnktl", ds, geometry.block_ds(first, end, keys))
    ring = by_row.sum(axis=(2, 3, 4), dtype=np.float64)
    if D == 1:
        return ring, 0.0
    by_pair = ds.sum(axis=5).sum(axis=3, dtype=np.float64)  # (B,n,D,D)
    return ring, np.einsum("bnkl,kl->bn", by_pair, geometry.dd)
