"""Grids that several launchers use. Each function returns (grid, block)."""

WARP = 32
THREADS = 256  # of a block, unless a kernel asks for something else


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def packs_of_four(n: int) -> tuple[int, int]:
    """A thread for four neighbouring ones of n values."""
    return ceil_div(n, 4 * THREADS), THREADS


def warp_a_row(rows: int) -> tuple[int, int]:
    """A warp for each row."""
    return ceil_div(rows * WARP, THREADS), THREADS


def threads_for(C: int) -> int:
    """Threads of a block, whole warps, of which each takes four of C columns, several times if C is above 1024."""
    return min(THREADS, ceil_div(C, 4 * WARP) * WARP)
