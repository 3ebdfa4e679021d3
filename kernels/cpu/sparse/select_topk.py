"""The keys that a query attends to: those with its highest scores (DeepSeek-V3.2 2025, eq. 2)."""

import numpy as np

from kernels.cpu.blocks import scratch
from kernels.cpu.sparse.score_rows import for_score_rows, future

KEYS = {4: np.dtype(np.int32), 8: np.dtype(np.int64)}  # bytes of a score: integers of its size


def select_topk(index, count, scores, keep, first, start=0, force_self=1, sink=0, leak=0):
    """index (B,Tq,K), count (B,Tq), int32, rows first-start..: the positions s <= t = first + r of the
    n = max(1, min(keep[b,t], t+1, K)) highest scores, ascending, -1 behind them; count = n. scores (B,R,S),
    keep (B,Tq) int32.

    The order is total: of equal scores, and of 0 and -0, the most recent wins; NaN counts as -inf. Scores of s > t are
    ignored. force_self: s = t is always among them, sink: s = 0 is, too; both count, and if n = 1 s = t does alone.
    leak: the bug of a published experiment. n = max(1, min(keep, K)) for every row, and rows with fewer than n keys
    take 0..n-1, future ones among them. K <= T then.
    """
    B, R, _ = scores.shape
    K = index.shape[2]
    slots = np.arange(K)

    def rows(b, begin, stop):
        positions = np.arange(first + begin, first + stop)
        of_block = slice(first - start + begin, first - start + stop)
        wanted = np.clip(keep[b, of_block], 1, K)  # (rows)
        n = np.minimum(wanted, positions + 1)
        order = order_of(scores[b, begin:stop, : first + stop], positions, force_self, sink)
        mask = highest(order, n, positions)
        block = index[b, of_block]
        block[...] = -1
        block[slots < n[:, None]] = np.flatnonzero(mask) % mask.shape[1]  # row by row on both sides
        count[b, of_block] = n
        if leak:
            leaks = (positions < wanted)[:, None] & (slots < wanted[:, None])
            np.copyto(block, slots, where=leaks, casting="same_kind")
            count[b, of_block] = wanted

    for_score_rows(rows, B, R, first + R, cost=32)


def order_of(scores, positions, force_self, sink):
    """scores (rows,keys) -> integers in the same order, in a buffer; the lowest of all for keys of the future, the
    highest for forced ones."""
    keys = scores.shape[1]
    x = scratch("select_topk_scores", scores.shape, scores.dtype)
    np.fmax(scores, -np.inf, out=x)  # NaN becomes -inf
    x += 0  # -0 becomes 0
    order = x.view(KEYS[x.itemsize])  # the bits of floats: in the right order for those >= 0, backwards for the others
    limits, sign = np.iinfo(order.dtype), scratch("select_topk_sign", order.shape, order.dtype)
    np.right_shift(order, limits.bits - 1, out=sign)
    sign &= limits.max
    order ^= sign
    np.copyto(order[:, positions[0] + 1 :], limits.min, where=future(positions, keys))
    if force_self:
        order[np.arange(len(order)), positions] = limits.max
    if sink:
        order[:, 0] = limits.max
    return order


def highest(order, n, positions):
    """Where order (rows,keys) is among the n (rows) highest of its row, the last ones of equals -> bool (rows,keys)."""
    keys = order.shape[1]
    lowest = np.iinfo(order.dtype).min + 1  # the lowest key that a query may have; keys of the future are lower
    spare = scratch("select_topk_sorted", order.shape, order.dtype)
    chooses = n <= positions  # the others take all keys that they have
    if not chooses.any():
        return order >= lowest
    np.copyto(spare, order)
    most = n[chooses].max()
    if (n[chooses] == most).all():
        spare.partition(keys - most, axis=1)  # half the time of sorting
        threshold = spare[:, keys - most]
    else:
        spare.sort(axis=1)
        threshold = spare[np.arange(len(n)), keys - n]
    threshold = np.where(chooses, threshold, lowest)[:, None]
    mask = order >= threshold
    (rows,) = np.nonzero(np.count_nonzero(mask, axis=1) > n)  # too many equals: the first ones go
    if len(rows):
        some, equal = mask[rows], order[rows] == threshold[rows]
        surplus = np.count_nonzero(some, axis=1) - n[rows]
        some &= ~equal | (np.cumsum(equal, axis=1, dtype=np.int32) > surplus[:, None])
        mask[rows] = some
    return mask
