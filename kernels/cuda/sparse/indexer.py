"""Launchers of indexer.cu, and on GPUs with tensor cores those of indexer_tensor.cu and indexer_union.cu instead."""

import numpy as np

from kernels.cpu.sparse import indexer as numpy_indexer
from kernels.cuda.gpt2.matmul_tensor import tensor_products
from kernels.cuda.runtime.grid import THREADS, WARP, ceil_div, warp_a_row
from kernels.cuda.runtime.tensor_cores import Results
from kernels.cuda.sparse.indexer_tensor import WIDEST, tensor_scores_backward, tensor_scores_forward
from kernels.cuda.sparse.indexer_union import indexer_union_backward, indexer_union_forward
from kernels.cuda.sparse.inverse_lists import inverse_lists

TILE = 64  # queries, keys and columns of a tile
RANGE = 256  # keys of a block of indexer_scores_dq
FEW = 8  # the most queries that stay on CUDA cores, as in decoding: a tile costs as much as 128
# places in lists times columns of queries from which on 64 queries share their keys: lists of their unions take some 20
# microseconds on an H100, however few there are, and kernels for single queries about a picosecond for each
WORTH = 1 << 25
GATHERED_THREADS = 128  # the most threads of a block that has one query


def indexer_scores_forward(cuda, scores, q, k, w, scale, first, start=0):
    """As kernels.cpu.sparse.indexer.indexer_scores_forward."""
    B, R, S = scores.shape
    if products := _products(cuda, R):
        tensor_scores_forward(cuda, products, scores, q, k, w, scale, first, start)
        return
    Tq, HI = w.shape[1:]
    args = (scores, q, k, w, scale, R, S, Tq, k.shape[1], HI, q.shape[2] // HI, _own_keys(q, k, HI), first, start)
    cuda.launch("indexer_scores_forward_kernel", (ceil_div(S, TILE), ceil_div(R, TILE), B), THREADS, args)


def indexer_scores_backward(cuda, dq, dk, dw, dscores, q, k, w, scale, first):
    """As kernels.cpu.sparse.indexer.indexer_scores_backward."""
    B, R, S = dscores.shape
    T, HI = w.shape[1:]
    dI, own_keys = q.shape[2] // HI, _own_keys(q, k, HI)
    if dI <= WIDEST and (products := _products(cuda, R)):
        tensor_scores_backward(cuda, products, dq, dk, dw, dscores, q, k, w, scale, first)
        return
    end = min(S, first + R)
    tiles, ranges = ceil_div(dI, TILE), ceil_div(end, RANGE)
    parts = cuda.scratch("indexer_parts", (ranges, B, R, HI * dI))
    args = (parts, dscores, q, k, scale, B, R, S, T, HI, dI, own_keys, first)
    cuda.launch("indexer_scores_dq_kernel", (ceil_div(R, TILE), HI * tiles, B * ranges), THREADS, args)
    args = (dq, dw, parts, q, w, B, R, T, HI, dI, first, TILE, RANGE)
    cuda.launch("indexer_finish_kernel", *warp_a_row(B * R * HI), args)
    args = (dk, dscores, q, k, w, scale, R, S, T, HI, dI, own_keys, first)
    cuda.launch("indexer_scores_dk_kernel", (ceil_div(end, TILE), tiles * (HI if own_keys else 1), B), THREADS, args)


def indexer_gathered_forward(cuda, scores, q, k, w, index, count, scale):
    """As kernels.cpu.sparse.indexer.indexer_gathered_forward."""
    B, T, K = scores.shape
    HI = w.shape[2]
    if products := _union_products(cuda, q, k, index, HI):
        indexer_union_forward(cuda, products, scores, q, k, w, index, count, scale)
        return
    args = (scores, q, k, w, index, count, scale, T, K, HI, q.shape[2] // HI, _own_keys(q, k, HI))
    cuda.launch("indexer_gathered_forward_kernel", B * T, _threads(K), args)


def indexer_gathered_backward(cuda, dq, dk, dw, dscores, q, k, w, index, count, scale):
    """As kernels.cpu.sparse.indexer.indexer_gathered_backward."""
    B, T, K = dscores.shape
    HI = w.shape[2]
    dI, own_keys = q.shape[2] // HI, _own_keys(q, k, HI)
    if products := _union_products(cuda, q, k, index, HI):
        indexer_union_backward(cuda, products, dq, dk, dw, dscores, q, k, w, index, count, scale)
        return
    sizes = T, K, HI, dI, own_keys
    packs = ceil_div(dI, 4)
    m = cuda.scratch("indexer_signs", (B, T, K, HI))
    args = (m, dscores, q, k, index, count, scale, *sizes)
    cuda.launch("indexer_gathered_signs_kernel", B * T, _threads(K), args)
    u = cuda.scratch("indexer_parts", (1, B, T, HI * dI))
    threads = min(THREADS, ceil_div(HI * packs, WARP) * WARP)
    grid = B * T, ceil_div(HI * packs, threads)
    cuda.launch("indexer_gathered_u_kernel", grid, threads, (u, m, k, index, count, *sizes))
    cuda.launch("indexer_finish_kernel", *warp_a_row(B * T * HI), (dq, dw, u, q, w, B, T, T, HI, dI, 0, TILE, 0))
    offsets, pairs = inverse_lists(cuda, index, count)
    columns = packs * (HI if own_keys else 1)
    lanes = min(THREADS, 1 << (columns - 1).bit_length())  # a power of 2: groups of them fill a block
    args = (dk, m, q, w, offsets, pairs, *sizes, lanes)
    cuda.launch("indexer_gathered_dk_kernel", (T, ceil_div(columns, lanes), B), THREADS, args)


def _products(cuda, queries: int) -> str | None:
    """How tensor cores multiply for so many queries; None: they do not."""
    return tensor_products(cuda, indexer_trial) if queries > FEW else None


def _union_products(cuda, q, k, index, HI) -> str | None:
    """The same for lists of keys, by sizes alone, as a CUDA graph wants it."""
    fits = k.shape[2] <= WIDEST and not _own_keys(q, k, HI)
    return _products(cuda, index.shape[1]) if fits and index.size * q.shape[2] >= WORTH else None


def _own_keys(q, k, HI):
    """1 if each of several heads has its own key, else 0."""
    return int(HI > 1 and k.shape[2] == q.shape[2])


def _threads(K):
    """Whole warps, a thread for each of K keys, or several."""
    return min(GATHERED_THREADS, ceil_div(K, WARP) * WARP)


def indexer_trial(cuda) -> Results:
    """Scores of two heads and their gradients, of whole rows and of every fifth key: several tiles, stages in turn.

    Gradients jump where a product changes its sign, so there queries and keys are whole numbers, whose products are
    exact.
    """
    T, K, HI, dI, rng, cpu = 150, 30, 2, 40, np.random.default_rng(0), numpy_indexer
    columns = HI * dI, dI, HI, T, K
    q, k, w, rows, listed = (rng.standard_normal((1, T, n)).astype(np.float32) for n in columns)
    t, j = np.arange(T, dtype=np.int32)[None, :, None], np.arange(K, dtype=np.int32)
    lists = np.where(j <= t // 5, t % 5 + 5 * j, -1), t[..., 0] // 5 + 1
    exact, shapes = (np.rint(2 * q), np.rint(2 * k), w), [x.shape for x in (q, k, w)]
    for name, launcher, op, outs, given, rest in (
        ("scores", tensor_scores_forward, cpu.indexer_scores_forward, [rows.shape], (q, k, w), (1.0, 0)),
        ("gradients", tensor_scores_backward, cpu.indexer_scores_backward, shapes, (rows, *exact), (1.0, 0)),
        (
            "gathered scores",
            indexer_union_forward,
            cpu.indexer_gathered_forward,
            [listed.shape],
            (q, k, w, *lists),
            (1.0,),
        ),
        (
            "gathered gradients",
            indexer_union_backward,
            cpu.indexer_gathered_backward,
            shapes,
            (listed, *exact, *lists),
            (1.0,),
        ),
    ):
        found, expected = ([zeros(shape) for shape in outs] for zeros in (cuda.zeros, np.zeros))
        launcher(cuda, "tf32" if cuda.tf32 else "3xtf32", *found, *map(cuda.to_device, given), *rest)
        op(*expected, *(x.astype(np.float64) if x.dtype == np.float32 else x for x in given), *rest)
        for ours, theirs in zip(map(cuda.to_host, found), expected):
            there = np.isfinite(theirs)  # scores of the future, and what is behind a list, are -inf
            yield f"the indexer's {name}", ours[there], theirs[there]
