"""Launchers of indexer_tensor.cu: indexer.py takes them where there are tensor cores that are worth it."""

import numpy as np

from kernels.cpu.sparse import indexer as numpy_indexer
from kernels.cuda.runtime.grid import TILE_THREADS, ceil_div
from kernels.cuda.runtime.tensor_cores import Results

ROWS, COLUMNS = 128, 64  # queries and keys of a tile of scores


def tensor_scores_forward(cuda, products, scores, q, k, w, scale, first, start=0):
    """indexer_scores_forward; products: "tf32" or "3xtf32"."""
    B, R, S = scores.shape
    (Tq, HI), own_keys = w.shape[1:], int(k.shape[2] == q.shape[2])
    args = (scores, q, k, w, scale, R, S, Tq, k.shape[1], HI, q.shape[2] // HI, own_keys, first, start)
    grid = ceil_div(S, COLUMNS), ceil_div(R, ROWS), B
    cuda.launch(f"indexer_scores_forward_{products}_kernel", grid, TILE_THREADS, args)


def indexer_trial(cuda) -> Results:
    """Scores of two heads: several tiles, on the diagonal and below it, and more pieces than there are stages."""
    T, HI, dI, rng = 150, 2, 40, np.random.default_rng(0)
    given = [rng.standard_normal(shape).astype(np.float32) for shape in ((1, T, HI * dI), (1, T, dI), (1, T, HI))]
    past, products = np.tri(T, dtype=bool), "tf32" if cuda.tf32 else "3xtf32"
    scores, expected = cuda.zeros((1, T, T)), np.empty((1, T, T))
    tensor_scores_forward(cuda, products, scores, *(cuda.to_device(values) for values in given), 1.0, 0)
    numpy_indexer.indexer_scores_forward(expected, *(values.astype(np.float64) for values in given), 1.0, 0)
    yield "the indexer's scores", cuda.to_host(scores)[:, past], expected[:, past]
