"""Sizes of grids, blocks and tiles that several launchers use."""

from collections.abc import Iterable

from llmc.errors import UserError

WARP = 32  # threads of a warp
THREADS = 256  # threads of a block, where a kernel asks for no other number
BLOCKS = 512  # blocks that fill any GPU, two to five for each multiprocessor: more would only make partial sums
TILE_THREADS = 128  # threads of a block that holds a tile of attention (attention_tile.cuh)


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def packs_of_four(n: int) -> tuple[int, int]:
    """(grid, block): a thread for four neighbouring ones of n values."""
    return ceil_div(n, 4 * THREADS), THREADS


def warp_a_row(rows: int) -> tuple[int, int]:
    """(grid, block): a warp for each row."""
    return ceil_div(rows * WARP, THREADS), THREADS


def threads_for(C: int) -> int:
    """Threads of a block, whole warps: each thread takes four of C columns, several times if C is above 1024."""
    return min(THREADS, ceil_div(C, 4 * WARP) * WARP)


def padded_head(op: str, hs: int, sizes: Iterable[int], what: str = "head size {}") -> int:
    """The smallest of `sizes`, the head sizes that an op has kernels for, that holds hs. UserError if none does."""
    fitting = [size for size in sizes if hs <= size]
    if not fitting:
        problem = f"{what.format(hs)}, on a GPU at most {max(sizes)}"
        raise UserError(f"{op}: {problem}", "--device cpu, or a model with more heads")
    return min(fitting)
