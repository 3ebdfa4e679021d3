"""Launcher of band_mask.cu."""

from kernels.cuda.runtime.grid import warp_a_row


def band_mask(cuda, weight, bandwidth, place=None):
    """As kernels.cpu.band.band_mask.band_mask."""
    L, rows, columns = weight.shape
    if place is None:
        cuda.launch("band_mask_kernel", *warp_a_row(L * rows), (weight, L, rows, columns, bandwidth))
    else:
        cuda.launch("band_mask_placed_kernel", *warp_a_row(L * rows), (weight, place, L, rows, columns, bandwidth))
