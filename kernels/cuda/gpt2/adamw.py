"""Launchers of adamw.cu."""

from math import sqrt

import numpy as np

from kernels.cuda.runtime.grid import THREADS, packs_of_four
from llmc.errors import UserError

MOST = 2**31 - 1  # values of a buffer: places in it are counted in ints


def adamw_update(cuda, params, grads, m, v, t, lr, beta1, beta2, eps, weight_decay, grad_scale=1.0):
    """As kernels.cpu.gpt2.adamw.adamw_update."""
    settings = t, lr, beta1, beta2, eps, weight_decay, grad_scale
    adamw_update_all(cuda, params, grads, m, v, [(params, grads, m, v, *settings)])


def adamw_update_all(cuda, params, grads, m, v, updates):
    """As kernels.cpu.gpt2.adamw.adamw_update_all, in one launch.

    Raises ValueError for what is no part of the buffers, UserError for buffers of 2^31 values and more.
    """
    if max(params.size, grads.size) > MOST:
        raise UserError(f"adamw_update_all: {params.size} parameters, on a GPU at most {MOST}", "--device cpu")
    places, settings, blocks = [], [], 0
    for of_params, *others, t, lr, beta1, beta2, eps, weight_decay, grad_scale in updates:
        begins = {_begin(view, flat) for view, flat in zip(others, (grads, m, v))}
        if len(begins) > 1:
            raise ValueError(f"adamw_update_all: gradient, m and v begin at {sorted(begins)}, expected one place")
        places.append((blocks, _begin(of_params, params), *begins, of_params.size))
        settings.append(rates(t, lr, beta1, beta2, eps, weight_decay, grad_scale))
        blocks += packs_of_four(of_params.size)[0]
    if not places:
        return
    table = np.hstack([np.array(places, np.int32), np.array(settings, np.float32).view(np.int32)])
    tensors = cuda.scratch("adamw", table.shape, np.int32)
    cuda.copy_in(tensors, table)
    cuda.launch("adamw_kernel", blocks, THREADS, (params, grads, m, v, tensors, len(table)))


def rates(t, lr, beta1, beta2, eps, weight_decay, grad_scale):
    """AdamwRates of common.cuh at update t: the settings, with the bias corrections folded in as on the CPU."""
    c1, c2 = 1 - beta1**t, sqrt(1 - beta2**t)
    return lr * c2 / c1, 1.0 - beta1, 1.0 - beta2, eps * c2, lr * weight_decay, grad_scale


def _begin(view, flat) -> int:
    """Where in `flat` its part `view` begins, in values."""
    begin, odd = divmod(view.data.ptr - flat.data.ptr, flat.dtype.itemsize)
    if odd or not 0 <= begin <= flat.size - view.size:
        raise ValueError(f"adamw_update_all: {view.shape} is no part of the flat buffer of {flat.size} values")
    return begin
