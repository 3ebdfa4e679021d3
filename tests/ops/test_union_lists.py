"""Who passes by a tile of 64 queries or keys."""

import numpy as np
import pytest
from cuda_emulator.runtime import EmulatedRuntime
from selected_keys import lists

from kernels.cuda.sparse.union_lists import TILE, selected_bits, union_keys, union_queries


def selection(index, T) -> np.ndarray:
    """(B,Tq,T) bool"""
    selected = np.zeros((*index.shape[:2], T), bool)
    for b, t, j in np.argwhere(index >= 0):
        selected[b, t, index[b, t, j]] = True
    return selected


def rows_of(masks, n) -> np.ndarray:
    """masks (2,capacity) of a tile -> (64,n) bool"""
    words = masks[:, :n].astype(np.uint32)
    return np.array([words[row // 32] >> row % 32 & 1 for row in range(TILE)], bool)


def check_lists(selected, order, ids, masks, size):
    """Tiles of the rows order (rows) of selected (rows,others): exactly who was selected by one of them, and whose."""
    for tile in range(len(size)):
        rows = selected[order[tile * TILE : (tile + 1) * TILE]]
        n = size[tile]
        assert np.array_equal(np.sort(ids[tile, :n]), np.flatnonzero(rows.any(axis=0)))
        found = rows_of(masks[tile], n)
        assert np.array_equal(found[: len(rows)], rows[:, ids[tile, :n]]) and not found[len(rows) :].any()


def same_for_all(B, T, K):
    """All queries select the K oldest keys, whether these are of the past or not."""
    index = np.broadcast_to(np.arange(K, dtype=np.int32), (B, T, K)).copy()
    return index, np.full((B, T), K, np.int32)


CASES = {
    "one key": lambda: (1, lists(1, 1, 1)),
    "many sizes": lambda: (150, lists(2, 150, 9)),
    "whole tiles, all keys": lambda: (128, lists(1, 128, 128, full=True)),
    "the last queries": lambda: (200, lists(2, 200, 40, start=131)),
    "of the future": lambda: (70, lists(3, 70, 5, future=True)),
    "all the same": lambda: (130, same_for_all(1, 130, 3)),
    "itself alone": lambda: (65, (np.arange(65, dtype=np.int32).reshape(1, 65, 1), np.ones((1, 65), np.int32))),
    "more keys than a chunk": lambda: (4200, lists(1, 4200, 70, start=4190)),
}


@pytest.mark.parametrize("case", CASES)
def test_lists_hold_what_was_selected_and_by_whom(runtime, case):
    T, (index, _) = CASES[case]()
    B, Tq, K = index.shape
    selected = selection(index, T)
    bits = selected_bits(runtime, runtime.to_device(index), T)
    for by_first in (False, True):
        ids, masks, size = map(runtime.to_host, union_keys(runtime, bits, K, by_first))
        for b in range(B):
            check_lists(selected[b], np.arange(Tq), ids[b], masks[b], size[b])
            for tile, n in enumerate(size[b]):
                keys, by = ids[b, tile, :n], rows_of(masks[b, tile], n)
                first = by.argmax(axis=0) if by_first else 0 * keys
                assert np.array_equal(np.lexsort((keys, first)), np.arange(n))
    if Tq < T:
        return
    order, (ids, masks, size) = union_queries(runtime, bits)
    order, ids, masks, size = map(runtime.to_host, (order, ids, masks, size))
    for b in range(B):
        classes = -np.floor(np.log2(np.maximum(selected[b].sum(axis=0), 0.5)))
        assert np.array_equal(order[b], np.lexsort((np.arange(T), classes)))
        check_lists(selected[b].T, order[b], ids[b], masks[b], size[b])
        assert all(np.array_equal(ids[b, tile, :n], np.sort(ids[b, tile, :n])) for tile, n in enumerate(size[b]))


@pytest.mark.parametrize("cut", [1, 40, 70])
def test_where_a_query_finds_its_keys_does_not_depend_on_the_lists_behind_its_own(emulator, cut):
    T, K = 100, 12
    index, _ = lists(1, T, K)
    found = []
    for _ in range(2):
        bits = selected_bits(emulator, emulator.to_device(index), T)
        ids, masks, size = map(emulator.to_host, union_keys(emulator, bits, K, by_first=True))
        places = [
            ids[0, t // TILE, : size[0, t // TILE]] * rows_of(masks[0, t // TILE], size[0, t // TILE])[t % TILE]
            for t in range(cut)
        ]
        found.append([np.trim_zeros(place, "b").tolist() for place in places])
        index[:, cut:] = lists(1, T, K, full=True, seed=1)[0][:, cut:]
    assert found[0] == found[1]


@pytest.mark.parametrize("schedule", ["ascending", "descending", "random"])
def test_lists_do_not_depend_on_the_order_of_threads(schedule):
    T, K = 130, 20
    index, _ = lists(2, T, K)
    results = []
    for runtime in (EmulatedRuntime("fast"), EmulatedRuntime("fast", schedule=schedule, seed=5)):
        bits = selected_bits(runtime, runtime.to_device(index), T)
        order, queries = union_queries(runtime, bits)
        keys = union_keys(runtime, bits, K, True)
        values = [runtime.to_host(bits).tobytes(), runtime.to_host(order).tobytes()]
        for ids, masks, size in (keys, queries):
            ids, masks, size = map(runtime.to_host, (ids, masks, size))
            values += [(ids[at][:n].tolist(), masks[at][:, :n].tolist()) for at, n in np.ndenumerate(size)]
        results.append(values)
    assert results[0] == results[1]
