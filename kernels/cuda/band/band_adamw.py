"""Launcher of band_adamw.cu."""

from kernels.cuda.runtime.grid import warp_a_row


def band_adamw_update(cuda, params, grads, m, v, bandwidth, rates, norm):
    """As kernels.cpu.band.band_adamw.band_adamw_update."""
    L, rows, columns = params.shape
    args = (params, grads, m, v, L, rows, columns, bandwidth, rates, norm)
    cuda.launch("band_adamw_kernel", *warp_a_row(L * rows), args)
