"""Attention over selected keys, and its probabilities averaged over heads (DeepSeek-V3.2, sparse attention).

    s[t,j] = q_t . k_u / sqrt(hs),  u = index[t,j];   a[t,j] = exp(s[t,j] - lse[t]);   out_t = sum_j a[t,j] v_u

Query t of a sequence meets the keys index[t,0..count[t]-1], the same for all heads, whatever their positions; behind
them index is -1. Two forms give the same numbers, of which _gathers picks the faster one: the masked form meets all
keys as dense attention does, with -inf for what is not selected; the gathered form copies the selected rows of k and v
together, a block of queries at a time. Neither asks what the lists hold, except how far they reach. Where a list
ends, its -1 say; the GPU reads those or count.
"""

from functools import partial
from math import sqrt

import numpy as np

from kernels.cpu.blocks import for_blocks, rows_per_block, scratch
from kernels.cpu.gpt2.attention import (
    QUERIES,
    attend,
    attend_backward,
    for_heads,
    for_queries,
    head_groups,
    heads,
    scaled,
    scores_of,
    split,
)
from kernels.cpu.sparse.attention_mean import head_sum

# times of both forms, measured on 2 cores (AVX-512) for T from 256 to 4096, C from 64 to 768, heads of 64. for a key,
# meeting it costs the masked backward pass HEAD_NS a head and CHANNEL_NS a channel, and the gathered one, forward and
# backward, 19 to 34 times as much; this has KEY_NS of Python for each token on top when it goes backward
HEAD_NS, CHANNEL_NS = 1.8, 0.05
GATHERED, KEY_NS = 30, 4500
TAKEN = 1 << 15  # floats of q that the gathered backward pass copies together for several keys


def sparse_attention_forward(out, lse, qkv, index, count, NH, start=0):
    """out (B*Tq,C), lse (B,NH,Tq) from qkv (B,T,3C) for the Tq = T - start queries at positions start..T-1.

    index (B,Tq,K) int32 ascending, -1 behind the first count (B,Tq) int32 of each list; 1 <= count <= K.
    """
    form = _gathered_forward if _gathers(qkv, index, NH) else _masked_forward
    form(out, lse, qkv, index, NH, start)


def sparse_attention_backward(dqkv, dout, qkv, out, lse, index, count, NH):
    """dqkv (B,T,3C) = ... from dout, out (B*T,C), qkv (B,T,3C), lse (B,NH,T), index (B,T,K), count (B,T).

        da = do . v,  ds = a * (da - do . out) / sqrt(hs),  dq = ds k,  dk = ds^T q,  dv = a^T do

    as in attention_backward, over selected keys; a key that no query selected gets 0.
    """
    form = _gathered_backward if _gathers(qkv, index, NH, backward=True) else _masked_backward
    form(dqkv, dout, qkv, out, lse, index, NH)


def sparse_attention_mean(p, qkv, lse, index, count, NH):
    """p (B,T,K) = mean over heads of exp(q_t . k_s / sqrt(hs) - lse[t]) for key s = index[b,t,j], 0 where that is -1.

    lse (B,NH,T) of sparse_attention_forward makes it attention's probabilities. index (B,T,K), count (B,T) as there.
    """
    form = _gathered_mean if _gathers(qkv, index, NH) else _masked_mean
    form(p, qkv, lse, index, NH)


def _gathers(qkv, index, NH, backward=False):
    """Whether the gathered form is the faster one; a function of the sizes alone."""
    T, K, C = qkv.shape[1], index.shape[2], qkv.shape[2] // 3
    masked_key = HEAD_NS * NH + CHANNEL_NS * C
    return (T - GATHERED * K) * masked_key > KEY_NS * backward


# ----------------------------------------------------------------------------------------------------------------------
# masked


def _mask(index, end, dtype):
    """index (B,t,K) -> mask (B,t,keys) to add to scores: 0 for selected keys, else -inf; keys = end, or more if lists
    reach beyond."""
    B, t, _ = index.shape
    keys = max(end, int(index.max()) + 1)
    mask = scratch("sparse_attention_mask", (B * t, keys + 1), dtype)
    mask.fill(-np.inf)
    # the spare column: -1 is the last one of the row before, or of all
    places = index.reshape(B * t, -1) + (keys + 1) * np.arange(B * t)[:, None]
    mask.reshape(-1)[places] = 0
    return mask.reshape(B, t, keys + 1)[..., :keys]


def _masked_scores(q, k, mask):
    """q (B,n,t,hs), scaled, k (B,n,keys,hs), mask (B,t,keys) -> scores (B,n,t,keys), -inf for what is not selected."""
    s = scores_of(q, k)
    s += mask[:, None]
    return s


def _masked_forward(out, lse, qkv, index, NH, start=0):
    B, T, C3 = qkv.shape
    scale = 1 / sqrt(C3 // 3 // NH)

    def queries(b, first, end):
        q, k, v = split(qkv[b], NH)
        rows = slice(first - start, end - start)
        o, log_sums = heads(out.reshape(B, T - start, -1)[b, rows], NH), lse[b, :, rows]
        mask = _mask(index[b, rows], end, qkv.dtype)
        keys = mask.shape[2]
        for h in head_groups(b.stop - b.start, NH, end - first, keys):
            scores = partial(_masked_scores, scaled(q[:, h, first:end], scale), k[:, h, :keys], mask)
            attend(o[:, h], log_sums[:, h], scores, v[:, h, :keys])

    for_queries(queries, B, NH, T, start)


def _masked_backward(dqkv, dout, qkv, out, lse, index, NH):
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
            mask = _mask(index[b, rows], end, qkv.dtype)
            keys = mask.shape[2]
            for n in head_groups(b.stop - b.start, h.stop - h.start, end - first, keys):
                inputs = scaled(q[:, n, rows], scale), k[:, n, :keys], v[:, n, :keys]
                s = _masked_scores(*inputs[:2], mask)
                grads = dq[:, n, rows], dk[:, n, :keys], dv[:, n, :keys]
                attend_backward(grads, inputs, do[:, n, rows], o[:, n, rows], log_sums[:, n, rows], s, scale, end == T)

    for_heads(some_heads, B, NH, T)


def _masked_mean(p, qkv, lse, index, NH):
    B, T, C3 = qkv.shape
    scale = 1 / sqrt(C3 // 3 // NH)

    def queries(b, first, end):
        q, k, _ = split(qkv[b], NH)
        chosen = index[b, first:end]
        mask = _mask(chosen, end, qkv.dtype)
        keys = mask.shape[2]
        total = scratch("sparse_attention_mean", (b.stop - b.start, end - first, keys), qkv.dtype)
        total.fill(0)
        for h in head_groups(b.stop - b.start, NH, end - first, keys):
            s = _masked_scores(scaled(q[:, h, first:end], scale), k[:, h, :keys], mask)
            s -= lse[b, h, first:end, None]
            np.exp(s, out=s)
            total += head_sum(s)
        mean = p[b, first:end]
        rows = keys * np.arange(total.shape[0] * (end - first)).reshape(total.shape[0], -1, 1)
        np.take(total.reshape(-1), np.maximum(chosen, 0) + rows, out=mean, mode="clip")
        mean /= NH
        mean[chosen < 0] = 0

    for_queries(queries, B, NH, T)


# ----------------------------------------------------------------------------------------------------------------------
# gathered


class _Gathered:
    """Queries begin..stop-1 of the B*Tq, and the rows of qkv that they and their lists stand for.

    qkv (B,T,3C) is read as (B*T*3,C): q, k and v of a token follow one another. So what is gathered needs no copy.
    """

    def __init__(self, qkv, index, NH, start, begin, stop):
        B, T, C3 = qkv.shape
        Tq = index.shape[1]
        self.NH, self.thirds = NH, qkv.reshape(B * T * 3, C3 // 3)
        self.b, self.t = np.divmod(np.arange(begin, stop), Tq)
        chosen = index.reshape(B * Tq, -1)[begin:stop]
        self.padding = (chosen < 0)[:, None]  # (R,1,K)
        tokens = np.maximum(chosen, 0) + T * self.b[:, None]  # (R,K); padding is key 0, with weight 0
        self.value_rows = 3 * tokens + 2
        self.q = self._take("sparse_attention_q", 3 * (T * self.b + self.t + start)[:, None])  # (R,NH,1,hs)
        self.k = self._take("sparse_attention_k", 3 * tokens + 1)  # (R,NH,K,hs)

    def _take(self, key, rows):
        taken = scratch(key, (*rows.shape, self.thirds.shape[1]), self.thirds.dtype)
        np.take(self.thirds, rows, axis=0, out=taken, mode="clip")  # "raise" would go through a temporary
        return taken.reshape(*rows.shape, self.NH, -1).swapaxes(1, 2)

    def values(self):
        """(R,NH,K,hs)"""
        return self._take("sparse_attention_v", self.value_rows)

    def scores(self):
        """(R,NH,K), -inf in the padding"""
        hs = self.q.shape[3]
        s = scratch("sparse_attention_scores", (len(self.b), self.NH, self.k.shape[2]), self.q.dtype)
        np.matmul(self.q, self.k.swapaxes(2, 3), out=s[:, :, None])
        s *= 1 / sqrt(hs)
        np.copyto(s, -np.inf, where=self.padding)
        return s

    def probabilities(self, lse):
        """(R,NH,K) from lse (B,NH,Tq)"""
        a = self.scores()
        a -= lse[self.b, :, self.t][..., None]
        return np.exp(a, out=a)


def _for_queries(work, qkv, index):
    """Call work(begin, stop) for blocks of the B*Tq queries, such that what one gathers fits BLOCK_BYTES."""
    B, Tq, K = index.shape
    row_floats = 2 * K * qkv.shape[2] // 3
    for_blocks(work, B * Tq, rows_per_block(B * Tq, row_floats), row_floats)


def _gathered_forward(out, lse, qkv, index, NH, start=0):
    def queries(begin, stop):
        gathered = _Gathered(qkv, index, NH, start, begin, stop)
        s = gathered.scores()
        top = s.max(axis=2)  # (R,NH)
        s -= top[..., None]
        np.exp(s, out=s)
        total = s.sum(axis=2)
        o = out[begin:stop].reshape(stop - begin, NH, 1, -1)
        np.matmul(s[:, :, None], gathered.values(), out=o)
        o /= total[..., None, None]
        lse[gathered.b, :, gathered.t] = top + np.log(total)

    _for_queries(queries, qkv, index)


def _gathered_mean(p, qkv, lse, index, NH):
    def queries(begin, stop):
        a = _Gathered(qkv, index, NH, 0, begin, stop).probabilities(lse)
        mean = p.reshape(-1, p.shape[2])[begin:stop]
        np.add.reduce(a, axis=1, out=mean)
        mean /= NH

    _for_queries(queries, qkv, index)


def _gathered_backward(dqkv, dout, qkv, out, lse, index, NH):
    B, T, _ = qkv.shape
    for b in range(B):
        rows = slice(b * T, (b + 1) * T)
        _sequence_backward(dqkv[b], dout[rows], qkv[b : b + 1], out[rows], lse[b : b + 1], index[b : b + 1], NH)


def _sequence_backward(dqkv, dout, qkv, out, lse, index, NH):
    """dqkv (T,3C) of one sequence; dout, out (T,C), qkv (1,T,3C), lse (1,NH,T), index (1,T,K).

    First dq, query by query, and ds and a are kept; then dk and dv, key by key, from the queries that selected it.
    """
    _, T, K = index.shape
    C = dout.shape[1]
    scale = 1 / sqrt(C // NH)
    weights = scratch("sparse_attention_weights", (T, K, 2, NH), qkv.dtype)  # ds and a
    grads = dqkv.reshape(T, 3, NH, 1, -1)

    def queries(begin, stop):
        gathered = _Gathered(qkv, index, NH, 0, begin, stop)
        do, o = (x[begin:stop].reshape(stop - begin, NH, 1, -1) for x in (dout, out))
        a = gathered.probabilities(lse)
        ds = scratch("sparse_attention_dscores", a.shape, a.dtype)
        np.matmul(do, gathered.values().swapaxes(2, 3), out=ds[:, :, None])
        ds -= np.einsum("rhkc,rhkc->rh", do, o)[..., None]
        ds *= a
        ds *= scale
        np.matmul(ds[:, :, None], gathered.k, out=grads[begin:stop, 0])
        weights[begin:stop, :, 0] = ds.swapaxes(1, 2)
        weights[begin:stop, :, 1] = a.swapaxes(1, 2)

    _for_queries(queries, qkv, index)
    offsets, pairs = _inverse_lists(index[0], T)
    q, weights = qkv.reshape(3 * T, C), weights.reshape(T * K, 2, NH)
    most = max(1, TAKEN // C)

    # one thread does this: the products are small, and two would wait for each other's interpreter lock
    begin = 0
    while begin < T:
        end = begin + 1  # keys whose queries are taken together: one, or as many as fit
        while end < T and offsets[end + 1] - offsets[begin] <= most:
            end += 1
        mine = pairs[offsets[begin] : offsets[end]]
        m = len(mine)
        w = scratch("sparse_attention_key_weights", (m, 2, NH), qkv.dtype)
        rows = scratch("sparse_attention_key_rows", (2, m, C), qkv.dtype)  # rows of q and of dout
        np.take(weights, mine, axis=0, out=w, mode="clip")
        mine = mine // K
        np.take(dout, mine, axis=0, out=rows[1], mode="clip")
        mine *= 3
        np.take(q, mine, axis=0, out=rows[0], mode="clip")
        w = w.transpose(1, 2, 0)[:, :, None]  # (2,NH,1,m)
        rows = rows.reshape(2, m, NH, C // NH).swapaxes(1, 2)  # (2,NH,m,hs)
        for s in range(begin, end):
            i, j = offsets[s] - offsets[begin], offsets[s + 1] - offsets[begin]
            if i < j:
                np.matmul(w[..., i:j], rows[:, :, i:j], out=grads[s, 1:])
            else:
                grads[s, 1:] = 0
        begin = end


def _inverse_lists(index, T):
    """index (rows,K) of one sequence -> a list offsets and an array pairs: key s < T is at row n and column j for the
    pairs n*K + j from offsets[s] to offsets[s+1], ascending."""
    keys = index.reshape(-1)
    # NumPy sorts 16 bits by radix, many times as fast as 32. -1 becomes the largest number
    order = np.argsort(keys.astype(np.uint16) if T < 1 << 16 else keys.astype(np.uint32), kind="stable")
    offsets = np.bincount(keys + 1, minlength=T + 1)
    offsets[0] = 0
    return np.cumsum(offsets).tolist(), order
