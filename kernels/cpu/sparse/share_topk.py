"""Keys that a tile of neighbouring queries shares, chosen by the queries of the tile before.

Query t is in tile i = t // Q. It attends to

    the tile before and its own tile up to itself, (i-1) Q <= s <= t: at most 2 Q keys, and
    min(k - 2 Q, (i-1) Q) keys s < (i-1) Q, the same for all queries of the tile: those of the highest
    sum over t' in tile i-1 of scores[t',s]

so it has k keys at most, nothing after t decides which, and the first two tiles have all their keys. Q queries that
share a list read its keys once (kernels that go by tiles of queries), where each query's own list would be gathered.
"""

import numpy as np

from kernels.cpu.blocks import for_blocks
from kernels.cpu.sparse.select_topk import highest, order_of


def tile_sums(rows, share):
    """M of sums (B,M,S) for calls of at most `rows` queries: the tiles that they may touch, and the one before."""
    return rows // share + 3


def tiles_of(sums, share, first, rows):
    """(the tile of the first query, number of tiles) of queries first..first+rows-1. Raises ValueError if sums (B,M,S)
    have no room for them: see tile_sums."""
    tile = first // share
    tiles = (first + rows - 1) // share + 1 - tile
    if sums.shape[1] <= tiles:
        raise ValueError(f"sums {sums.shape} for {tiles} tiles of {share} queries: expected {tiles + 1} rows or more")
    return tile, tiles


def share_topk(index, count, sums, scores, k, share, first, start=0, sink=0):
    """index (B,Tq,K), count (B,Tq), int32, rows first-start..: the keys of the queries t = first + r as above, Q =
    share, ascending, -1 behind them, from scores (B,R,S); K is k, or the number of keys if that is less. k >= 2 Q.

    sums (B,M,>=S): row i % M sums up the rows of tile i, in the order of positions. Calls must come in that order, too;
    a tile that an earlier one began goes on from what it left, so calls for parts of a sequence give the bits of one.
    Of equal sums the most recent key wins; NaN counts as -inf. sink: s = 0 is among the chosen, if k > 2 Q.
    """
    B, R, _ = scores.shape
    M, (tile, tiles) = sums.shape[1], tiles_of(sums, share, first, R)

    def part(unit):
        """b, the tile, and its queries that are here: first .. last + 1."""
        b, i = unit // tiles, tile + unit % tiles
        return b, i, max(i * share, first), min((i + 1) * share, first + R)

    def add(unit, _):
        b, i, begin, end = part(unit)
        row = sums[b, i % M, : i * share]
        for t in range(begin, end):
            of_query = scores[b, t - first, : i * share]
            np.copyto(row, of_query) if t == i * share else np.add(row, of_query, out=row)

    def choose(unit, _):
        b, i, begin, end = part(unit)
        before, rows = max(i - 1, 0) * share, slice(begin - start, end - start)
        n, window, positions = min(k - 2 * share, before), np.arange(before, end), np.arange(begin, end)[:, None]
        block = index[b, rows]
        block[:, :n] = _best(sums[b, (i - 1) % M, :before], n, sink)
        block[:, n : n + len(window)] = np.where(window <= positions, window, -1)
        block[:, n + len(window) :] = -1
        count[b, rows] = n + positions[:, 0] + 1 - before

    for_blocks(add, B * tiles, 1, -(-R // tiles) * (first + R))
    for_blocks(choose, B * tiles, 1, 32 * (first + R))


def _best(row, n, sink):
    """The n positions of the highest values of row (keys), ascending."""
    if not 0 < n < len(row):
        return np.arange(n)
    last = np.array([len(row) - 1])
    order = order_of(row[None], last, 0, sink)
    return np.flatnonzero(highest(order, np.array([n]), last))
