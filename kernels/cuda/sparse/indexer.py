"""Launchers of indexer.cu, and on GPUs with tensor cores those of indexer_tensor.cu instead."""

import numpy as np

from kernels.cpu.sparse import indexer as numpy_indexer
from kernels.cuda.gpt2.matmul_tensor import tensor_products
from kernels.cuda.runtime.grid import THREADS, WARP, ceil_div, warp_a_row
from kernels.cuda.runtime.tensor_cores import Results
from kernels.cuda.sparse.indexer_tensor import WIDEST, tensor_scores_backward, tensor_scores_forward
from kernels.cuda.sparse.inverse_lists import inverse_lists

TILE = 64  # queries, keys and columns of a tile
RANGE = 256  # keys of a block of indexer_scores_dq
FEW = 8  # the most queries that stay on CUDA cores, as in decoding: a tile costs as much as 128
GATHERED_THREADS = 128  # the most threads of a block that has one query


def indexer_scores_forward(cuda, scores, q, k, w, scale, first, start=0):
    """As kernels.cpu.sparse.indexer.indexer_scores_forward."""
    B, R, S = scores.shape
    if R > FEW and (products := tensor_products(cuda, indexer_trial)):
        tensor_scores_forward(cuda, products, scores, q, k, w, scale, first, start)
        return
    Tq, HI = w.shape[1:]
    args = (scores, q, k, w, scale, R, S, Tq, k.shape[1], HI, q.shape[2] // HI, _own_keys(q, k), first, start)
    cuda.launch("indexer_scores_forward_kernel", (ceil_div(S, TILE), ceil_div(R, TILE), B), THREADS, args)


def indexer_scores_backward(cuda, dq, dk, dw, dscores, q, k, w, scale, first):
    """As kernels.cpu.sparse.indexer.indexer_scores_backward."""
    B, R, S = dscores.shape
    T, HI = w.shape[1:]
    dI, own_keys = q.shape[2] // HI, _own_keys(q, k)
    if dI <= WIDEST and R > FEW and (products := tensor_products(cuda, indexer_trial)):
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
    args = (scores, q, k, w, index, count, scale, T, K, HI, q.shape[2] // HI, _own_keys(q, k))
    cuda.launch("indexer_gathered_forward_kernel", B * T, _threads(K), args)


def indexer_gathered_backward(cuda, dq, dk, dw, dscores, q, k, w, index, count, scale):
    """As kernels.cpu.sparse.indexer.indexer_gathered_backward."""
    B, T, K = dscores.shape
    HI = w.shape[2]
    dI, own_keys = q.shape[2] // HI, _own_keys(q, k)
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


def _own_keys(q, k):
    """1 if each head has its own key, else 0."""
    return int(k.shape[2] == q.shape[2])


def _threads(K):
    """Whole warps, a thread for each of K keys, or several."""
    return min(GATHERED_THREADS, ceil_div(K, WARP) * WARP)


def indexer_trial(cuda) -> Results:
    """Scores of two heads and their gradients: several tiles, on the diagonal and below it, and stages in turn.

    Gradients jump where a product changes its sign, so there queries and keys are whole numbers, whose products are
    exact.
    """
    T, HI, dI, rng = 150, 2, 40, np.random.default_rng(0)
    shapes = dict(scores=(1, T, T), dq=(1, T, HI * dI), dk=(1, T, dI), dw=(1, T, HI))
    dscores, q, k, w = (rng.standard_normal(shape).astype(np.float32) for shape in shapes.values())
    past, products = np.tri(T, dtype=bool), "tf32" if cuda.tf32 else "3xtf32"
    scores, expected = cuda.zeros((1, T, T)), np.empty((1, T, T))
    tensor_scores_forward(cuda, products, scores, *map(cuda.to_device, (q, k, w)), 1.0, 0)
    numpy_indexer.indexer_scores_forward(expected, *(x.astype(np.float64) for x in (q, k, w)), 1.0, 0)
    yield "the indexer's scores", cuda.to_host(scores)[:, past], expected[:, past]
    given = dscores, np.rint(2 * q), np.rint(2 * k), w
    names = "dq", "dk", "dw"
    found, expected = [cuda.zeros(shapes[name]) for name in names], [np.zeros(shapes[name]) for name in names]
    tensor_scores_backward(cuda, products, *found, *map(cuda.to_device, given), 1.0, 0)
    numpy_indexer.indexer_scores_backward(*expected, *(x.astype(np.float64) for x in given), 1.0, 0)
    for name, ours, theirs in zip(names, found, expected):
        yield f"the indexer's {name}", cuda.to_host(ours), theirs
