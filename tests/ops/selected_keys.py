"""Lists of keys, and scores to choose them by, for the tests of the sparse ops."""

import numpy as np
from check_op import run

from kernels import cpu

INF = np.inf


def blocks_of_rows(T, R):
    """(first, end) of blocks of R queries."""
    return [(first, min(first + R, T)) for first in range(0, T, R)]


def lists(B, T, K, start=0, future=False, full=False, seed=0) -> tuple[np.ndarray, np.ndarray]:
    """index (B,T-start,K), count (B,T-start): random lists of random lengths, of K keys if `full`."""
    rng = np.random.default_rng([seed, B, T, K])
    index, count = np.full((B, T - start, K), -1, np.int32), np.zeros((B, T - start), np.int32)
    for b in range(B):
        for t in range(start, T):
            keys = T if future else t + 1
            n = min(K, keys) if full else rng.integers(1, min(K, keys) + 1)
            index[b, t - start, :n] = np.sort(rng.choice(keys, n, replace=False))
            count[b, t - start] = n
    return index, count


def lists_of(T, K, seed=7):
    """index (1,T,K), count (1,T): up to K positions of the past of each query, itself among them."""
    rng, index, count = np.random.default_rng(seed), np.full((1, T, K), -1, np.int32), np.empty((1, T), np.int32)
    for t in range(T):
        n = count[0, t] = rng.integers(1, min(K, t + 1) + 1)
        index[0, t, :n] = np.sort([t, *rng.permutation(t)[: n - 1]])
    return index, count


def selection(B, T, K, leak=0, seed=1):
    """index (B,T,K), count (B,T) of random scores, with lists of different lengths."""
    rng = np.random.default_rng(seed)
    index, count = np.empty((B, T, K), np.int32), np.empty((B, T), np.int32)
    keep = rng.integers(1, K + 1, (B, T)).astype(np.int32)
    cpu.select_topk(index, count, rng.standard_normal((B, T, T)), keep, 0, leak=leak)
    return index, count


def expected_selection(scores, keep, K, force_self, sink, leak):
    """As select_topk says, row by row with a stable sort of all keys."""
    B, T, _ = scores.shape
    index, count = np.full((B, T, K), -1), np.zeros((B, T), int)
    for b, t in np.ndindex(B, T):
        n = max(1, min(keep[b, t], K))
        if leak and t < n - 1:
            chosen = np.arange(n)
        else:
            n = min(n, t + 1)
            row = np.where(np.isnan(scores[b, t, : t + 1]), -INF, scores[b, t, : t + 1])
            forced = (np.arange(t + 1) == t) & bool(force_self) | (np.arange(t + 1) == 0) & bool(sink)
            row[forced] = 0  # among themselves the most recent one wins as well
            chosen = np.sort(np.lexsort((-np.arange(t + 1), -row, ~forced))[:n])
        index[b, t, :n], count[b, t] = chosen, n
    return index, count


def awkward_scores(kind, B, T, dtype, rng):
    """Scores with many equals, zeros of both signs, denormals, infinities, NaN."""
    scores = rng.standard_normal((B, T, T)).astype(dtype)
    if kind == "equal":
        scores[...] = scores[0, 0, 0]
    elif kind == "relu":
        scores = np.maximum(scores, 0)
        scores[rng.random(scores.shape) < 0.3] *= -1
    elif kind == "none":
        scores[...] = -INF
    elif kind == "extreme":
        tiny = np.finfo(dtype).smallest_subnormal
        scores = rng.choice(
            np.array([0, -0.0, tiny, -tiny, 1, -1, INF, -INF, np.nan, 3e38, -3e38], dtype), scores.shape
        )
    return scores


def finite(scores):
    """Without what would make an error of 0 / 0 or inf / inf: -inf becomes 0."""
    return np.where(scores == -INF, 0, scores)


def check_scores(runtime, op, scores, *args, offset=0):
    """As check, for scores that are -inf where the reference's are."""
    ours = run(runtime, op, scores, *args, offset=offset)[0]
    expected = scores.copy()
    getattr(cpu, op)(expected, *args)
    assert np.array_equal(ours == -INF, expected == -INF)
    assert np.abs(finite(ours) - finite(expected)).max() <= 1e-5 * np.abs(finite(expected)).max()
