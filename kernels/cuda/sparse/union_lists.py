"""Launchers of union_lists.cu."""

from typing import Any, NamedTuple

import numpy as np

from kernels.cuda.runtime.grid import THREADS, WARP, ceil_div

TILE = 64  # queries or keys of a tile
CHUNK = 4096  # keys whose bits a block has in shared memory
BITS_THREADS, LIST_THREADS = 512, 1024


class Lists(NamedTuple):
    """Who passes by a tile, and which of its rows want it; scratch, int32.

    ids (B,tiles,capacity), in the first size (B,tiles) of a list; masks (B,tiles,2,capacity): bit r % 32 of [r // 32]
    says whether row r of the tile selected it, or was selected by it.
    """

    ids: Any
    masks: Any
    size: Any


def selected_bits(cuda, index, T):
    """bits (B,tiles,T,2) from index (B,Tq,K), -1 behind a list: which queries of a tile selected a key."""
    B, Tq, K = index.shape
    bits = cuda.scratch("selected_bits", (B, ceil_div(Tq, TILE), T, 2), np.int32)
    grid = (bits.shape[1], ceil_div(T, CHUNK), B)
    cuda.launch("selected_bits_kernel", grid, BITS_THREADS, (bits, index, T, Tq, K))
    return bits


def union_keys(cuda, bits, K, by_first) -> Lists:
    """For 64 queries that follow each other, the keys that one of them selected, K at most each; rows are queries.

    Keys ascend, or come by the first row that has them if by_first, and ascend among equals: then nothing that a row
    finds before its last key depends on the rows behind it.
    """
    B, tiles, T, _ = bits.shape
    lists = _lists(cuda, "union_keys", B, tiles, min(T, TILE * K))
    args = (*lists, bits, T, lists.ids.shape[2], int(by_first))
    cuda.launch("union_keys_kernel", (tiles, B), LIST_THREADS, args)
    return lists


def union_queries(cuda, bits):
    """-> order (B,T), Lists: for 64 keys of the order, those that most queries selected first, the queries that
    selected one of them, ascending; rows are keys."""
    B, tiles, T, _ = bits.shape
    classes, order = (cuda.scratch(f"key_{name}", (B, T), np.int32) for name in ("classes", "order"))
    cuda.launch("key_classes_kernel", (ceil_div(T, WARP), B), THREADS, (classes, bits, T, tiles))
    cuda.launch("key_order_kernel", B, LIST_THREADS, (order, classes, T))
    lists = _lists(cuda, "union_queries", B, ceil_div(T, TILE), TILE * tiles)
    args = (*lists, bits, order, T, tiles, lists.ids.shape[2])
    cuda.launch("union_queries_kernel", (ceil_div(T, TILE), B), LIST_THREADS, args)
    return order, lists


def _lists(cuda, name: str, B: int, tiles: int, capacity: int) -> Lists:
    ids, masks = ((B, tiles, capacity), (B, tiles, 2, capacity))
    shapes = dict(ids=ids, masks=masks, size=(B, tiles))
    return Lists(*(cuda.scratch(f"{name}_{part}", shape, np.int32) for part, shape in shapes.items()))
