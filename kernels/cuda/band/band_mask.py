"""Launcher of band_mask.cu, and what launchers know of a band."""

from functools import lru_cache

from kernels.cpu.band.band_mask import band_columns, band_count
from kernels.cuda.runtime.grid import ceil_div, warp_a_row


def band_mask(cuda, weight, bandwidth, place=None):
    """As kernels.cpu.band.band_mask.band_mask."""
    L, rows, columns = weight.shape
    if place is None:
        cuda.launch("band_mask_kernel", *warp_a_row(L * rows), (weight, L, rows, columns, bandwidth))
    else:
        cuda.launch("band_mask_placed_kernel", *warp_a_row(L * rows), (weight, place, L, rows, columns, bandwidth))


def band_of_rows(row0: int, count: int, rows: int, columns: int, bandwidth: int) -> tuple[int, int]:
    """(start, stop): columns that rows row0 .. row0 + count - 1 keep together, as band_of_rows in common.cuh."""
    start, _ = band_columns(row0, rows, columns, bandwidth)
    _, stop = band_columns(min(row0 + count, rows) - 1, rows, columns, bandwidth)
    return start // 4 * 4, min(ceil_div(stop, 4) * 4, columns)


@lru_cache(maxsize=64)
def band_density(C: int, bandwidth: int) -> float:
    """The share of a (4C,C) weight inside its band."""
    return band_count(4 * C, C, bandwidth) / (4 * C * C)
