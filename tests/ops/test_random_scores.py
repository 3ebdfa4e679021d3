"""Scores drawn by a hash: the same on every device."""

import numpy as np
import pytest
from check_op import nan, run
from selected_keys import INF, blocks_of_rows

from kernels import cpu


def random_by_hand(seed, t, s):
    """The documented formula in Python's integers."""

    def mix(bits):
        bits = (bits ^ bits >> 16) * 0x85EBCA6B % 2**32
        bits = (bits ^ bits >> 13) * 0xC2B2AE35 % 2**32
        return bits ^ bits >> 16

    return (mix((mix((mix(seed) + t) % 2**32) + 0x9E3779B1 * s) % 2**32) >> 8) / 2**24


SEEDS = [
    0, 7, 2**31 + 5, 2**32 - 1,
]  # fmt: skip


def as_int32(seed: int) -> np.ndarray:
    return np.array([seed], np.uint32).view(np.int32)


@pytest.mark.parametrize("seed", SEEDS)
def test_random_scores(seed):
    T = 300
    scores = np.full((2, T, T), np.nan, "f")
    for first, end in blocks_of_rows(T, 128):
        block = np.empty((2, end - first, T), "f")
        cpu.random_scores(block, as_int32(seed), first)
        scores[:, first:end] = block
    past = np.tri(T) > 0
    for t, s in ((0, 0), (5, 0), (299, 123), (128, 128)):
        assert scores[0, t, s] == random_by_hand(seed, t, s)
    assert scores[0].tobytes() == scores[1].tobytes() and (scores[0][~past] == -INF).all()
    x = scores[0][past].astype(float)  # 45150 of them
    assert x.min() >= 0 and x.max() < 1 and abs(x.mean() - 0.5) < 0.006 and abs(x.var() - 1 / 12) < 0.002
    rows, columns = scores[0, 200:, :200].astype(float), scores[0, 200:, 1:201].astype(float)
    assert abs(np.corrcoef(rows.ravel(), columns.ravel())[0, 1]) < 0.03  # of neighbouring keys
    assert abs(np.corrcoef(rows[:-1].ravel(), rows[1:].ravel())[0, 1]) < 0.03  # of neighbouring queries


# ----------------------------------------------------------------------------------------------------------------------
# on CUDA: the emulator, and a GPU if there is one


@pytest.mark.parametrize("seed", SEEDS)
def test_random_scores_on_cuda(runtime, seed):
    for B, R, S, first in ((2, 3, 300, 290), (1, 1, 1, 0), (2, 5, 7, 2)):
        expected = np.empty((B, R, S), "f")
        cpu.random_scores(expected, as_int32(seed), first)
        assert run(runtime, "random_scores", nan(B, R, S), as_int32(seed), first)[0].tobytes() == expected.tobytes()
