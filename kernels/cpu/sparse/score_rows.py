"""Rows of scores (B,R,S), query against key: blocks of them that stay in the cache, spread over the cores."""

from collections.abc import Callable

import numpy as np

from kernels.cpu.blocks import for_blocks

# values of a block. measured: 15 NumPy calls a block cost 30 us whatever its size, and this many values 200 us or more
BLOCK = 1 << 16


def for_score_rows(work: Callable[[int, int, int], None], B: int, R: int, S: int, cost: int = 1) -> None:
    """Call work(b, begin, stop) for blocks of rows begin..stop-1 of each b, on all cores if that pays.

    cost: what a score takes, in floats of elementwise work. Blocks depend on the sizes alone.
    """
    rows = max(1, min(R, BLOCK // S))
    blocks = -(-R // rows)  # blocks of one b

    def share(unit, _):
        begin = unit % blocks * rows
        work(unit // blocks, begin, min(begin + rows, R))

    for_blocks(share, B * blocks, 1, rows * S * cost)


def future(positions: np.ndarray, keys: int) -> np.ndarray:
    """(rows, keys - positions[0] - 1), true where a key lies behind its query; no earlier key lies behind any.

    positions (rows): of the queries, one after another. For the columns positions[0]+1.. of their scores.
    """
    return np.arange(positions[0] + 1, keys) > positions[:, None]
