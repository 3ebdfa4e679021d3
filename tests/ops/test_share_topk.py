"""Lists of keys that a tile of queries shares."""

import numpy as np
import pytest
from check_op import run
from selected_keys import INF, awkward_scores, blocks_of_rows

from kernels import cpu, cuda
from kernels.cpu.sparse.share_topk import tile_sums


def expected_lists(scores, k, Q, sink=0):
    """(index (B,T,k), count (B,T)) by definition: query by query, with a stable sort of sums added up one by one."""
    B, T, _ = scores.shape
    index, count = np.full((B, T, k), -1), np.zeros((B, T), int)
    for b, t in np.ndindex(B, T):
        i = t // Q
        before = max(i - 1, 0) * Q
        sums = np.zeros(before, scores.dtype)
        for query in scores[b, before : before + Q, :before]:
            sums += query
        sums = np.where(np.isnan(sums), -INF, sums)
        forced = (np.arange(before) == 0) & bool(sink)
        chosen = np.lexsort((-np.arange(before), -sums, ~forced))[: min(k - 2 * Q, before)]
        keys = np.concatenate([np.sort(chosen), np.arange(before, t + 1)])
        index[b, t, : len(keys)], count[b, t] = keys, len(keys)
    return index, count


def lists_of(scores, k, Q, sizes, sink=0):
    """share_topk of whole rows (B,T,T), in calls for so many queries at a time, with NaN where nobody may look."""
    B, T, _ = scores.shape
    index, count = np.full((B, T, k), 99, np.int32), np.full((B, T), 99, np.int32)
    sums, first = np.full((B, tile_sums(max(sizes), Q), T), np.nan, scores.dtype), 0
    for R in sizes:
        block = scores[:, first : first + R].copy()
        block[:, np.tri(R, T, first) == 0] = np.nan
        cpu.share_topk(index, count, sums, block, k, Q, first, 0, sink)
        first += R
    assert first == T
    return index, count


def sizes_of(T, R):
    return [end - first for first, end in blocks_of_rows(T, R)]


@pytest.mark.filterwarnings("ignore:invalid value")  # inf - inf
@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("sink", [0, 1])
@pytest.mark.parametrize("kind", ["normal", "equal", "relu", "none", "extreme"])
def test_share_topk(kind, sink):
    rng = np.random.default_rng(3)
    cases = (
        (2, 70, 9, 3, 32),
        (1, 41, 25, 8, 7),
        (1, 33, 33, 16, 33),
        (2, 64, 8, 4, 5),
        (1, 1, 5, 2, 1),
        (1, 20, 64, 2, 6),
    )
    for dtype in "fd":
        for B, T, k, Q, R in cases:
            scores = awkward_scores(kind, B, T, dtype, rng)
            expected = expected_lists(scores, k, Q, sink)
            index, count = lists_of(scores, k, Q, sizes_of(T, R), sink)
            assert np.array_equal(index, expected[0]) and np.array_equal(count, expected[1])


@pytest.mark.parametrize("T, k, Q", [(64, 24, 8), (50, 6, 3), (30, 12, 6), (9, 16, 8)])
def test_pairs_and_who_decides(T, k, Q):
    """k keys at most, nothing of the future; the first two tiles have all; a tile's queries agree before its window."""
    scores = np.random.default_rng(1).standard_normal((1, T, T))
    index, count = lists_of(scores, k, Q, [T])
    assert count.max() == min(k, T) and np.array_equal(count[0, : 2 * Q], np.arange(1, T + 1)[: 2 * Q])
    assert (index <= np.arange(T)[:, None]).all()
    for first in range(2 * Q, T, Q):
        assert (index[0, first : first + Q, : k - 2 * Q] == index[0, first, : k - 2 * Q]).all()
    for s in range(0, T - Q, Q):  # what a tile's queries say decides the next tile's keys alone, if there is a choice
        changed = scores.copy()
        changed[:, s : s + Q] = np.random.default_rng(s).standard_normal((Q, T))
        different = (lists_of(changed, k, Q, [T])[0] != index).any(axis=(0, 2))
        assert different[s + Q : s + 2 * Q].all() == (0 < k - 2 * Q < s)
        assert not different[: s + Q].any() and not different[s + 2 * Q :].any()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_calls_for_parts_have_the_bits_of_one(dtype):
    """Token by token, in chunks that end anywhere in a tile, many tiles at once: sums are added up in one order."""
    T, rng = 40, np.random.default_rng(2)
    scores = (rng.standard_normal((2, T, T)) * 10.0 ** rng.integers(-3, 4, (2, T, T))).astype(dtype)
    whole = lists_of(scores, 17, 6, [T])
    for sizes in ([1] * T, [5, 1, 6, 3, 25], [7] * 5 + [5], [39, 1], [12, 28]):
        for once, again in zip(whole, lists_of(scores, 17, 6, sizes)):
            assert once.tobytes() == again.tobytes(), sizes


def test_the_new_rows_alone():
    """A decoder's call: an index of the new queries, as wide as there are keys, sums as long as the longest text."""
    T, k, Q = 30, 14, 4
    scores = np.random.default_rng(5).standard_normal((1, T, T))
    expected, sums = expected_lists(scores, k, Q)[0], np.full((1, tile_sums(8, Q), 50), np.nan)
    for first, end in ((0, 8), (8, 9), (9, 16), (16, 22), (22, 23), (23, 30)):
        index, count = np.full((1, end - first, min(k, end)), 99, np.int32), np.zeros((1, end - first), np.int32)
        cpu.share_topk(index, count, sums, scores[:, first:end, :end].copy(), k, Q, first, first)
        assert np.array_equal(index, expected[:, first:end, : min(k, end)])


def test_sums_without_room_are_an_error():
    index, count, scores = np.zeros((1, 9, 4), np.int32), np.zeros((1, 9), np.int32), np.zeros((1, 9, 9))
    with pytest.raises(ValueError, match="5 tiles of 2 queries: expected 6 rows or more"):
        cpu.share_topk(index, count, np.zeros((1, 5, 9)), scores, 4, 2, 0)
    for Q in range(2, 12):
        for rows in range(1, 40):
            most = max((first + rows - 1) // Q - first // Q + 1 for first in range(Q))
            assert most < tile_sums(rows, Q) <= most + 2


# ----------------------------------------------------------------------------------------------------------------------
# on CUDA: the emulator, and a GPU if there is one


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("sink", [0, 1])
@pytest.mark.parametrize("kind", ["normal", "equal", "relu", "none", "extreme"])
def test_share_topk_on_cuda(runtime, kind, sink):
    rng = np.random.default_rng(3)
    for B, T, k, Q, R, offset in (
        (2, 13, 5, 2, 6, 1),
        (1, 300, 60, 20, 150, 0),
        (1, 7, 7, 3, 7, 3),
        (1, 1, 4, 2, 1, 0),
    ):
        scores = awkward_scores(kind, B, T, "f", rng)
        expected = expected_lists(scores, k, Q, sink)
        sums, first = np.full((B, tile_sums(R, Q), T), np.nan, np.float32), 0
        for end in [end for _, end in blocks_of_rows(T, R)]:
            block = scores[:, first:end].copy()
            block[:, np.tri(end - first, T, first) == 0] = np.nan
            index, count = np.full((B, end - first, k), 99, np.int32), np.full((B, end - first), 99, np.int32)
            args = index, count, sums, block, k, Q, first, first, sink
            index, count, sums, *_ = run(runtime, "share_topk", *args, offset=offset)
            assert np.array_equal(index, expected[0][:, first:end])
            assert np.array_equal(count, expected[1][:, first:end])
            first = end


@pytest.mark.parametrize("S, k, R", [(2047, 360, 50), (8200, 400, 35), (16400, 4000, 3)])
def test_long_rows_on_cuda(runtime, S, k, R):
    """Blocks of 128 to 512 threads, of which each has several keys; two tiles that an earlier call began."""
    Q, rng = 30, np.random.default_rng(S)
    scores = np.maximum(rng.standard_normal((1, R, S)), 0).astype("f")
    sums = rng.standard_normal((1, tile_sums(R, Q), S)).astype("f")
    index, count = np.full((1, R, k), 99, np.int32), np.full((1, R), 99, np.int32)
    expected, args = (index.copy(), count.copy(), sums.copy()), (scores, k, Q, S - R, S - R)
    cpu.share_topk(*expected, *args)
    for found, wanted in zip(run(runtime, "share_topk", index, count, sums, *args), expected):
        assert np.array_equal(found, wanted)
    assert (expected[1] > k - Q).all()


def test_calls_for_parts_have_the_bits_of_one_on_cuda(runtime):
    T, k, Q, rng = 40, 17, 6, np.random.default_rng(2)
    scores = (rng.standard_normal((2, T, T)) * 10.0 ** rng.integers(-3, 4, (2, T, T))).astype(np.float32)
    expected, device = lists_of(scores, k, Q, [T]), cuda.device(runtime)
    for sizes in ([T], [1] * T, [5, 1, 6, 3, 25]):
        index, count = (runtime.to_device(np.full(shape, 99, np.int32)) for shape in ((2, T, k), (2, T)))
        sums, first = runtime.to_device(np.full((2, tile_sums(max(sizes), Q), T), np.nan, np.float32)), 0
        for R in sizes:
            block = runtime.to_device(scores[:, first : first + R].copy())
            device.share_topk(index, count, sums, block, k, Q, first)
            first += R
        assert np.array_equal(runtime.to_host(index), expected[0]) and np.array_equal(
            runtime.to_host(count), expected[1]
        )
