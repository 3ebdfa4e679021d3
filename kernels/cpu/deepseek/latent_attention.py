"""Attention over latents that all heads share: multi-head latent attention in its absorbed form, with a cache (mla).

    a[i,h,:] = softmax_s(scale * qlat[i,h] . latent[s]),   out[i,h] = sum_s a[i,h,s] latent[s,:kv_rank]

over all s up to the query's position or over a list of them. A key is its value and R rotary dimensions, and serves all
heads: NH rows of queries meet it in one product.
"""

import numpy as np

from kernels.cpu.blocks import for_blocks, scratch

QUERIES = 64  # the most queries in a block
FLOATS = (
    1 << 18
)  # the most scores of a block, and values of the latents that it takes by index; one query may have more


def latent_attention_forward(out, qlat, latent, index, count, scale, start=0):
    """out (n,NH,kv_rank) from qlat (n,NH,kv_rank+R), latent (>=start+n,kv_rank+R), for positions start..start+n-1.

    A row of latent is [rmsnorm(c) ; RoPE(kr)]. Query i meets 0..start+i if index is None, else the first count[0,i] of
    index[0,i]; index (1,n,K), count (1,n) int32.
    """
    if index is None:
        _attend_to_past(out, qlat, latent, scale, start)
    else:
        _attend_to_listed(out, qlat, latent, index[0], count[0], scale)


def _attend_to_past(out, qlat, latent, scale, start):
    n, NH, kv_rank = out.shape

    def rows(begin, stop):
        m, keys = stop - begin, latent[: start + stop]
        s = scratch("latent_scores", (m * NH, len(keys)), qlat.dtype)
        np.matmul(qlat[begin:stop].reshape(m * NH, -1), keys.T, out=s)
        for i in range(m - 1):  # the last query of the block meets every key
            s[i * NH : (i + 1) * NH, start + begin + i + 1 :] = -np.inf
        total = _exponentials(s, scale)
        o = out[begin:stop].reshape(m * NH, kv_rank)
        np.matmul(s, keys[:, :kv_rank], out=o)
        o /= total

    row_floats = NH * (start + n)
    for_blocks(rows, n, max(1, min(QUERIES, FLOATS // row_floats)), row_floats)


def _attend_to_listed(out, qlat, latent, index, count, scale):
    n, NH, kv_rank = out.shape
    (_, K), D = index.shape, latent.shape[1]

    def rows(begin, stop):
        m, o = stop - begin, out[begin:stop]
        keys = scratch("latent_keys", (m, K, D), qlat.dtype)
        np.take(latent, index[begin:stop], axis=0, out=keys, mode="clip")  # -1 becomes 0 and gets no weight
        s = scratch("latent_scores", (m, NH, K), qlat.dtype)
        np.matmul(qlat[begin:stop], keys.swapaxes(1, 2), out=s)
        for i in range(m):
            s[i, :, count[begin + i] :] = -np.inf
        total = _exponentials(s, scale)
        np.matmul(s, keys[:, :, :kv_rank], out=o)
        o /= total

    row_floats = K * max(NH, D)
    for_blocks(rows, n, max(1, min(QUERIES, FLOATS // row_floats)), row_floats)


def _exponentials(s, scale):
    """s = exp(scale * s - the largest of its row) -> the rows' sums (...,1)"""
    s *= scale
    s -= s.max(axis=-1, keepdims=True)
    np.exp(s, out=s)
    return s.sum(axis=-1, keepdims=True)
