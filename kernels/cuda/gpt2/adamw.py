"""Launcher of adamw.cu."""

from math import sqrt

from kernels.cuda.runtime.grid import packs_of_four


def adamw_update(cuda, params, grads, m, v, t, lr, beta1, beta2, eps, weight_decay, grad_scale=1.0):
    """As kernels.cpu.gpt2.adamw.adamw_update."""
    settings = rates(t, lr, beta1, beta2, eps, weight_decay, grad_scale)
    cuda.launch("adamw_kernel", *packs_of_four(params.size), (params, grads, m, v, params.size, *settings))


def rates(t, lr, beta1, beta2, eps, weight_decay, grad_scale):
    """AdamwRates of common.cuh at update t: the settings, with the bias corrections folded in as on the CPU."""
    c1, c2 = 1 - beta1**t, sqrt(1 - beta2**t)
    return lr * c2 / c1, 1.0 - beta1, 1.0 - beta2, eps * c2, lr * weight_decay, grad_scale
