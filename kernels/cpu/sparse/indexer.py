"""Lightning indexer: how much query t wants key s, by a few small heads (DeepSeek-V3.2 2025, eq. 1).

    z[t,j,s] = q[t,j] . k[s],   I[t,s] = scale sum_j w[t,j] max(0, z[t,j,s])   for s <= t, else -inf

k is one key for all heads, or there is one for each. HI heads of dI columns. Gradients, with g = scale dscores and
m[t,j,s] = g[t,s] where z[t,j,s] > 0, else 0:

    u[t,j] = sum_s m[t,j,s] k[s],   dq[t,j] = w[t,j] u[t,j],   dw[t,j] = q[t,j] . u[t,j]
    dk[s] = sum_tj m[t,j,s] w[t,j] q[t,j]

so that of what is as large as z only m is ever needed.
"""

import numpy as np

from kernels.cpu.blocks import for_blocks, scratch
from kernels.cpu.sparse.score_rows import future

PRODUCTS = 1 << 18  # values of a block of z, or of gathered keys
# whole rows take a few large products, gathered keys small ones a query. measured with heads of 64: a gathered key is
# worth this many others, forward and backward, and twice that if there is one for each head. backward also adds to
# dk query by query, 10 us each: whole rows take longer from T = 2^19 / (columns of q) on
GATHER_FORWARD, GATHER_BACKWARD = 8, 16
GATHER_SIZE = 1 << 19


def indexer_scores_forward(scores, q, k, w, scale, first, start=0):
    """scores (B,R,S) for the queries at first..first+R-1 from q (B,Tq,HI*dI), k (B,Tk,dI or HI*dI), w (B,Tq,HI).

    Row 0 of q and w is position `start`, row 0 of k is position 0; Tk >= S >= first + R.
    """
    B, R, S = scores.shape
    HI = w.shape[2]
    step = _rows_of_block(HI, S)
    blocks = -(-R // step)  # blocks of one b

    def rows(unit, _):
        b, begin = unit // blocks, unit % blocks * step
        end = min(begin + step, R)
        of_block = slice(first - start + begin, first - start + end)
        keys = first + end
        _scores(scores[b, begin:end, :keys], q[b, of_block], k[b, :keys], w[b, of_block], scale)
        positions = np.arange(first + begin, first + end)
        np.copyto(scores[b, begin:end, positions[0] + 1 :], -np.inf, where=future(positions, S))

    for_blocks(rows, B * blocks, 1, min(step, R) * HI * S * 4)


def indexer_scores_backward(dq, dk, dw, dscores, q, k, w, scale, first):
    """dq (B,T,HI*dI), dw (B,T,HI): rows first..first+R-1 = ...; dk, like k (B,T,.), += ... from dscores (B,R,S), whose
    entries s > t = first + r count as 0."""
    B, R, S = dscores.shape
    HI = w.shape[2]
    step = _rows_of_block(HI, S)

    def batch_row(b, _):
        for begin in range(0, R, step):
            end = min(begin + step, R)
            of_block, keys = slice(first + begin, first + end), first + end
            g = scratch("indexer_dscores", (end - begin, keys), dscores.dtype)
            np.multiply(dscores[b, begin:end, :keys], scale, out=g)
            positions = np.arange(first + begin, first + end)
            np.copyto(g[:, positions[0] + 1 :], 0, where=future(positions, keys))
            args = g, q[b, of_block], k[b, :keys], w[b, of_block]
            _gradients(dq[b, of_block], dk[b, :keys], dw[b, of_block], *args, scale)

    for_blocks(batch_row, B, 1, R * HI * S * 4)


def indexer_gathered_forward(scores, q, k, w, index, count, scale):
    """scores (B,T,K) of the keys index[b,t,j] alone, -inf for j >= count[b,t]; index (B,T,K), count (B,T) int32."""
    B, T, K = scores.shape
    HI = w.shape[2]
    gathers = _keys_in_a_gather(q, k, GATHER_FORWARD) * K <= T
    step = _rows_of_block(k.shape[2], K) if gathers else _rows_of_block(HI, T)
    blocks = -(-T // step)

    def rows(unit, _):
        b, begin = unit // blocks, unit % blocks * step
        part = slice(begin, min(begin + step, T))
        out, args = scores[b, part], (q[b, part], k[b], w[b, part])
        (_gathered_scores if gathers else _taken_scores)(out, *args, index[b, part], scale, begin)
        out[np.arange(K) >= count[b, part, None]] = -np.inf

    for_blocks(rows, B * blocks, 1, min(step, T) * HI * K * 16)


def indexer_gathered_backward(dq, dk, dw, dscores, q, k, w, index, count, scale):
    """dq, dk, dw, like q, k, w, = ... from dscores (B,T,K), the gradient of indexer_gathered_forward's scores."""
    B, T, K = dscores.shape
    HI = w.shape[2]
    gathers = _keys_in_a_gather(q, k, GATHER_BACKWARD) * K <= T and T * q.shape[2] >= GATHER_SIZE
    step = _rows_of_block(k.shape[2], K) if gathers else _rows_of_block(HI, T)

    def batch_row(b, _):
        dk[b] = 0
        for begin in range(0, T, step):
            part = slice(begin, min(begin + step, T))
            g = scratch("indexer_gathered_dscores", dscores[b, part].shape, dscores.dtype)
            np.multiply(dscores[b, part], scale, out=g)
            np.copyto(g, 0, where=np.arange(K) >= count[b, part, None])
            args = g, q[b, part], k[b], w[b, part], index[b, part], scale
            (_gathered_gradients if gathers else _taken_gradients)(dq[b, part], dk[b], dw[b, part], *args, begin)

    for_blocks(batch_row, B, 1, T * HI * K * 16)


# ----------------------------------------------------------------------------------------------------------------------
# n queries and the keys 0..S-1: q (n,HI*dI), k (S,dI) or (S,HI*dI), w (n,HI)


def _rows_of_block(columns, S):
    """Queries such that `columns` values for each of S keys of each make a block."""
    return max(1, PRODUCTS // (columns * S))


def _heads(x, HI):
    """(rows,columns) -> view (HI,rows,columns/HI)"""
    return x.reshape(len(x), HI, -1).swapaxes(0, 1)


def _products(q, k, HI):
    """z (n,HI,S), in a buffer."""
    n, S = len(q), len(k)
    z = scratch("indexer_products", (n, HI, S), q.dtype)
    if q.shape[1] == k.shape[1]:  # a key for each head
        np.matmul(_heads(q, HI), _heads(k, HI).swapaxes(1, 2), out=z.swapaxes(0, 1))
    else:
        np.matmul(q.reshape(n * HI, -1), k.T, out=z.reshape(n * HI, S))
    return z


def _scores(out, q, k, w, scale):
    """out (n,S) = scale sum_j w max(0, z)"""
    z = _products(q, k, w.shape[1])
    np.maximum(z, 0, out=z)
    np.matmul((w * scale)[:, None], z, out=out[:, None])


def _gradients(dq, dk, dw, g, q, k, w, scale):
    """dq (n,HI*dI) = ..., dk (S,.) += ..., dw (n,HI) = ... from g (n,S), the scores' gradient times scale."""
    n, HI = w.shape
    m = _products(q, k, HI)
    positive = scratch("indexer_positive", m.shape, np.dtype(bool))
    np.multiply(g[:, None], np.greater(m, 0, out=positive), out=m)
    weighted = scratch("indexer_weighted", (n, HI, q.shape[1] // HI), q.dtype)  # w q
    np.multiply(q.reshape(weighted.shape), w[:, :, None], out=weighted)
    product = scratch("indexer_product", dk.shape, dk.dtype)
    if q.shape[1] == k.shape[1]:
        np.matmul(m.swapaxes(0, 1), _heads(k, HI), out=_heads(dq, HI))
        np.matmul(m.transpose(1, 2, 0), weighted.swapaxes(0, 1), out=_heads(product, HI))
    else:
        m = m.reshape(n * HI, -1)
        np.matmul(m, k, out=dq.reshape(n * HI, -1))
        np.matmul(m.T, weighted.reshape(n * HI, -1), out=product)
    dk += product
    _finish(dq, dw, q, w)


def _finish(dq, dw, q, w):
    """From u in dq (n,HI*dI): dw (n,HI) = q . u, dq = w u."""
    u = dq.reshape(*w.shape, -1)
    np.einsum("njd,njd->nj", q.reshape(u.shape), u, out=dw)
    u *= w[:, :, None]


# the same for the keys index (n,K) of each query: from whole rows, or from gathered keys. what is -1 gives anything in
# scores and must have a gradient of 0


def _keys_in_a_gather(q, k, shared):
    """Keys of whole rows that cost as much as a gathered one; shared: if the heads share it."""
    return shared if k.shape[2] < q.shape[2] else 2 * shared


def _taken_scores(out, q, k, w, index, scale, first):
    n, K = index.shape
    S = _keys_in_reach(k, first + n, K)
    whole = scratch("indexer_whole", (n, S), q.dtype)
    _scores(whole, q, k[:S], w, scale)
    np.take(whole, index + np.arange(n)[:, None] * S, out=out, mode="clip")


def _taken_gradients(dq, dk, dw, g, q, k, w, index, scale, first):
    n, K = index.shape
    S = _keys_in_reach(k, first + n, K)
    whole = scratch("indexer_whole", (n, S + 1), q.dtype)
    whole[...] = 0
    whole[np.arange(n)[:, None], index] = g  # column -1 is of no key
    _gradients(dq, dk[:S], dw, whole[:, :S], q, k[:S], w, scale)


def _keys_in_reach(k, end, K):
    """Keys that queries before `end` can have: their past, or the first K, which select_topk's leak gives."""
    return min(len(k), max(end, K))


def _gathered_products(q, k, w, index):
    """z (n,HI,K) and the keys (n,HI or 1,K,dI), in buffers."""
    (n, HI), K = w.shape, index.shape[1]
    gathered = scratch("indexer_keys", (n, K, k.shape[1]), k.dtype)
    np.take(k, index, axis=0, out=gathered, mode="clip")
    z = scratch("indexer_products", (n, HI, K), q.dtype)
    keys = gathered.reshape(n, K, -1, q.shape[1] // HI).swapaxes(1, 2)
    if keys.shape[1] == 1:
        np.matmul(q.reshape(n, HI, -1), keys[:, 0].swapaxes(1, 2), out=z)
    else:
        np.matmul(q.reshape(n, HI, 1, -1), keys.swapaxes(2, 3), out=z[:, :, None])
    return z, keys


def _gathered_scores(out, q, k, w, index, scale, _):
    z, _ = _gathered_products(q, k, w, index)
    np.maximum(z, 0, out=z)
    np.matmul((w * scale)[:, None], z, out=out[:, None])


def _gathered_gradients(dq, dk, dw, g, q, k, w, index, scale, _):
    m, keys = _gathered_products(q, k, w, index)
    positive = scratch("indexer_positive", m.shape, np.dtype(bool))
    np.multiply(g[:, None], np.greater(m, 0, out=positive), out=m)
    n, HI = w.shape
    heads = q.reshape(n, HI, -1)
    if keys.shape[1] == 1:
        np.matmul(m, keys[:, 0], out=dq.reshape(heads.shape))
    else:
        np.matmul(m[:, :, None], keys, out=dq.reshape(heads.shape)[:, :, None])
    for row in range(n):
        weighted, valid = heads[row] * w[row, :, None], np.count_nonzero(index[row] >= 0)
        if keys.shape[1] == 1:
            dk[index[row, :valid]] += m[row, :, :valid].T @ weighted
        else:
            dk[index[row, :valid]] += (m[row, :, :valid].T[:, :, None] * weighted).reshape(valid, -1)
    _finish(dq, dw, q, w)
