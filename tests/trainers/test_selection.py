"""What selections are measured by, on arrays small enough to count by hand."""

import numpy as np
import pytest

from kernels import cpu
from kernels.cpu.sparse.share_topk import tile_sums
from systems.selection import Agreement, answers, hits, kept_pairs, rows_at_once, sources
from systems.sparsity import layer_ratios


def test_sources_answers_and_hits():
    inputs = np.array([[7, 5, 200, 7, 9, 201], [3, 3, 200, 1, 202, 2]])
    targets = np.array([[5, 200, 7, 9, 201, 9], [3, 200, 3, 202, 2, 1]])
    assert sources(inputs, targets).tolist() == [[-1, -1, 0, -1, -1, 4], [0, -1, 1, -1, -1, 3]]
    asked = answers(inputs, targets, 200, 203)
    assert np.argwhere(asked).tolist() == [[0, 2], [0, 5], [1, 2]]
    index = np.full((2, 6, 2), -1)
    index[0, 2], index[0, 5], index[1, 2] = (1, 2), (4, -1), (1, 2)
    assert hits(index, sources(inputs, targets), asked) == pytest.approx(2 / 3)
    assert np.isnan(hits(index, sources(inputs, targets), asked & False))


def test_agreement():
    """Three queries at 1..3 with two keys each, the first of which has no choice."""
    index = np.array([[[0, 1], [0, 2], [1, 2]]])
    top = np.array([[[0, 1], [1, 2], [0, 3]]])
    p = np.array([[[0.5, 0.5, 0, 0], [0.2, 0.5, 0.3, 0], [0.4, 0.1, 0.2, 0.3]]])
    agreement = Agreement()
    agreement.add(index, top, p, 1)
    assert agreement.recall == (1 / 2 + 0) / 2 and agreement.kept == 6
    assert agreement.mean_mass == pytest.approx((1 + 0.5 + 0.3) / 3)
    padded = Agreement()
    padded.add(np.array([[[0, -1]]]), np.array([[[0, -1]]]), np.ones((1, 1, 1)), 0)
    assert (padded.recall, padded.mean_mass, padded.kept) == (1, 1, 1)


def test_kept_pairs():
    assert kept_pairs(16, 128) == 1928
    for k, length in ((1, 5), (3, 5), (5, 5), (9, 5)):
        assert kept_pairs(k, length) == sum(min(k, t + 1) for t in range(length))
    assert kept_pairs(20, 128, 8) == 1984 and kept_pairs(16, 10, 8) == kept_pairs(16, 10) == 55
    for k, length, share in ((4, 30, 2), (11, 30, 4), (16, 7, 8), (30, 29, 2), (64, 64, 16)):
        index, count = np.zeros((1, length, k), np.int32), np.zeros((1, length), np.int32)
        sums, scores = np.zeros((1, tile_sums(length, share), length)), np.zeros((1, length, length))
        cpu.share_topk(index, count, sums, scores, k, share, 0)
        assert kept_pairs(k, length, share) == count.sum()


def test_layer_ratios():
    assert layer_ratios("1,0.25,0.5", 6) == (1, 1, 0.25, 0.25, 0.5, 0.5)
    assert layer_ratios("1,0.25,0.5", 7) == (1, 1, 0.25, 0.25, 0.25, 0.5, 0.5)
    assert layer_ratios("1,0.25,0.5", 3) == (1, 0.25, 0.5)
    assert layer_ratios("1,0.25,0.5,0.1", 4) == (1, 0.25, 0.5, 0.1)
    for wrong in ("1,0.5", "0,1,1", "2,1,1", "nan,1,1", "a,b,c", "1,,1"):
        with pytest.raises(ValueError):
            layer_ratios(wrong, 6)


def test_rows_at_once():
    """On a CPU 128; on a GPU what 64 MiB hold, and 128 at least, as scores of one query may be as many."""
    gpu = object()
    assert [rows_at_once(cpu, B, T) for B, T in ((1, 64), (1, 4096), (16, 65536))] == [64, 128, 128]
    sizes = (1, 64), (1, 4096), (16, 1024), (4, 4096), (1, 8192), (1, 16384), (16, 65536)
    rows = [rows_at_once(gpu, B, T) for B, T in sizes]
    assert rows == [64, 4096, 1024, 1024, 2048, 1024, 128]
