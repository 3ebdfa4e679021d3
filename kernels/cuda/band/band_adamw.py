"""Launcher of band_adamw.cu."""

from kernels.cuda.gpt2.adamw import rates
from kernels.cuda.runtime.grid import warp_a_row


def band_adamw_update(cuda, params, grads, m, v, bandwidth, t, lr, beta1, beta2, eps, weight_decay, grad_scale=1.0):
    """As kernels.cpu.band.band_adamw.band_adamw_update."""
    L, rows, columns = params.shape
    settings = rates(t, lr, beta1, beta2, eps, weight_decay, grad_scale)
    args = (params, grads, m, v, L, rows, columns, bandwidth, *settings)
    cuda.launch("band_adamw_kernel", *warp_a_row(L * rows), args)
