"""The keys with the largest scores: exact, ties and NaN included."""

import numpy as np
import pytest
from check_op import run
from selected_keys import INF, awkward_scores, blocks_of_rows, expected_selection

from kernels import cpu


def select(scores, keep, K, R, **options):
    """select_topk of whole rows (B,T,T) in blocks of R, with garbage behind the diagonal and in what it writes."""
    B, T, _ = scores.shape
    index, count = np.full((B, T, K), 99, np.int32), np.full((B, T), 99, np.int32)
    for first, end in blocks_of_rows(T, R):
        block = scores[:, first:end].copy()
        block[:, np.tri(end - first, T, first) == 0] = np.random.default_rng(first).choice([np.nan, INF, 5])
        cpu.select_topk(index, count, block, keep, first, **options)
    return index, count


@pytest.mark.parametrize("force_self, sink, leak", [(1, 0, 0), (0, 0, 0), (1, 1, 0), (0, 1, 0), (1, 0, 1), (0, 0, 1)])
@pytest.mark.parametrize("kind", ["normal", "equal", "relu", "none", "extreme"])
def test_select_topk(kind, force_self, sink, leak):
    rng = np.random.default_rng(3)
    for dtype, B, T, K, R in (("f", 2, 70, 9, 32), ("d", 1, 40, 40, 7), ("f", 1, 33, 1, 33), ("f", 1, 1, 1, 1)):
        scores = awkward_scores(kind, B, T, dtype, rng)
        for keep in (np.full((B, T), K), rng.integers(-1, K + 3, (B, T))):
            keep = keep.astype(np.int32)
            index, count = select(scores, keep, K, R, force_self=force_self, sink=sink, leak=leak)
            expected = expected_selection(scores, keep, K, force_self, sink, leak)
            assert np.array_equal(index, expected[0]) and np.array_equal(count, expected[1])


def test_of_equals_the_most_recent_are_kept():
    index, count = select(np.zeros((1, 20, 20)), np.full((1, 20), 4, np.int32), 4, 20, force_self=0)
    assert index[0, 19].tolist() == [16, 17, 18, 19] and index[0, 1].tolist() == [0, 1, -1, -1]
    assert count[0].tolist() == [1, 2, 3] + [4] * 17


def test_a_query_that_keeps_one_key_keeps_its_own():
    scores = np.tile(np.arange(20.0, 0, -1), (1, 20, 1))  # the first key is the best one
    one = np.ones((1, 20), np.int32)
    for options, chosen in (((1, 0), range(20)), ((1, 1), range(20)), ((0, 1), [0] * 20), ((0, 0), [0] * 20)):
        index, _ = select(scores, one, 1, 20, force_self=options[0], sink=options[1])
        assert index[0, :, 0].tolist() == list(chosen)


@pytest.mark.parametrize("T, K", [(1, 1), (8, 8), (64, 32), (64, 48), (96, 5)])
def test_the_leak_has_as_many_future_pairs_as_published(T, K):
    scores, keep = np.random.default_rng(4).standard_normal((1, T, T)), np.full((1, T), K, np.int32)
    index, count = select(scores, keep, K, 16, leak=1)
    future = (index > np.arange(T)[:, None]).sum()
    assert future == K * (K - 1) // 2 and (count == K).all()
    assert ((index > np.arange(T)[:, None]).any(axis=2)).sum() == K - 1
    index, count = select(scores, keep, K, 16)
    assert (index <= np.arange(T)[:, None]).all() and count.sum() == K * (K + 1) // 2 + (T - K) * K


def test_selection_of_the_new_rows_alone():
    scores = np.random.default_rng(5).standard_normal((2, 30, 30))
    keep = np.full((2, 30), 6, np.int32)
    expected, _ = select(scores, keep, 6, 30)
    index, count = np.full((2, 4, 6), 99, np.int32), np.full((2, 4), 99, np.int32)
    cpu.select_topk(index, count, scores[:, 27:].copy(), keep[:, 26:].copy(), 27, 26)
    assert np.array_equal(index[:, 1:], expected[:, 27:]) and (index[:, 0] == 99).all()
    assert count.tolist() == [[99, 6, 6, 6]] * 2


# ----------------------------------------------------------------------------------------------------------------------
# on CUDA: the emulator, and a GPU if there is one


@pytest.mark.parametrize("force_self, sink, leak", [(1, 0, 0), (0, 0, 0), (1, 1, 0), (0, 1, 0), (1, 0, 1)])
@pytest.mark.parametrize("kind", ["normal", "equal", "relu", "none", "extreme"])
def test_select_topk_on_cuda(runtime, kind, force_self, sink, leak):
    rng = np.random.default_rng(3)
    for B, T, K, first, offset in ((2, 13, 5, 0, 1), (1, 300, 40, 285, 0), (1, 7, 7, 2, 0), (1, 1, 1, 0, 0)):
        scores = awkward_scores(kind, B, T, "f", rng)
        keep = rng.integers(-1, K + 3, (B, T)).astype(np.int32)
        expected = expected_selection(scores, keep, K, force_self, sink, leak)
        scores[:, np.tri(T) == 0] = rng.choice([np.nan, INF, 5])  # not looked at
        index, count = np.full((B, T, K), 99, np.int32), np.full((B, T), 99, np.int32)
        args = index, count, scores[:, first:], keep, first, 0, force_self, sink, leak
        found, counted, *_ = run(runtime, "select_topk", *args, offset=offset)
        assert np.array_equal(found[:, first:], expected[0][:, first:]) and (found[:, :first] == 99).all()
        assert np.array_equal(counted[:, first:], expected[1][:, first:]) and (counted[:, :first] == 99).all()
        if first:  # the new rows alone
            new = index[:, first:], count[:, first:], scores[:, first:], np.ascontiguousarray(keep[:, first:])
            again, *_ = run(runtime, "select_topk", *new, first, first, force_self, sink, leak)
            assert np.array_equal(again, expected[0][:, first:])


@pytest.mark.parametrize("kind", ["normal", "relu", "few", "extreme"])
@pytest.mark.parametrize("S, K, R", [
    (129, 30, 3), (2047, 300, 3), (2049, 1, 2), (4099, 2000, 2), (8193, 256, 2), (16385, 90, 2),
])  # fmt: skip
def test_long_rows_on_cuda(runtime, S, K, R, kind):
    """Blocks of 128 to 512 threads, of which each has several keys, and rows of more keys than they keep."""
    rng = np.random.default_rng([5, S])
    scores = rng.standard_normal((1, R, S)).astype("f")
    if kind == "relu":
        scores = np.maximum(scores, 0)
    elif kind == "few":  # equals that differ from others in their last bits alone
        scores = (np.float32(1) + rng.integers(0, 40, scores.shape) * np.float32(2**-23)).astype("f")
    elif kind == "extreme":
        scores = rng.choice(np.array([0, -0.0, 1e-45, -1e-45, INF, -INF, np.nan, 3e38], "f"), scores.shape)
    keep = np.full((1, R), K, np.int32)
    index, count = np.full((1, R, K), 99, np.int32), np.full((1, R), 99, np.int32)
    for options in ((1, 0, 0), (0, 1, 0)):
        args = scores, keep, S - R, S - R, *options
        expected = index.copy(), count.copy()
        cpu.select_topk(*expected, *args)
        found, counted, *_ = run(runtime, "select_topk", index, count, *args)
        assert np.array_equal(found, expected[0]) and np.array_equal(counted, expected[1])
