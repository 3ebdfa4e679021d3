"""Launchers of adamw.cu."""

import numpy as np

from kernels.cuda.runtime.grid import THREADS, packs_of_four
from llmc.errors import UserError

MOST = 2**31 - 1  # values of a buffer: places in it are counted in ints


def adamw_update(cuda, params, grads, m, v, rates, norm):
    """As kernels.cpu.gpt2.adamw.adamw_update."""
    adamw_update_all(cuda, params, grads, m, v, [(params, grads, m, v, 0)], rates, norm)


def adamw_update_all(cuda, params, grads, m, v, updates, rates, norm):
    """As kernels.cpu.gpt2.adamw.adamw_update_all, in one launch.

    Raises ValueError for what is no part of the buffers, UserError for buffers of 2^31 values and more.
    """
    if max(params.size, grads.size) > MOST:
        raise UserError(f"adamw_update_all: {params.size} parameters, on a GPU at most {MOST}", "--device cpu")
    places, blocks = [], 0
    for of_params, *others, row in updates:
        begins = {_begin(view, flat) for view, flat in zip(others, (grads, m, v))}
        if len(begins) > 1:
            raise ValueError(f"adamw_update_all: gradient, m and v begin at {sorted(begins)}, expected one place")
        places.append((blocks, _begin(of_params, params), *begins, of_params.size, row))
        blocks += packs_of_four(of_params.size)[0]
    if places:
        tensors = cuda.constant(np.array(places, np.int32))
        cuda.launch("adamw_kernel", blocks, THREADS, (params, grads, m, v, tensors, len(places), rates, norm))


def _begin(view, flat) -> int:
    """Where in `flat` its part `view` begins, in values."""
    begin, odd = divmod(view.data.ptr - flat.data.ptr, flat.dtype.itemsize)
    if odd or not 0 <= begin <= flat.size - view.size:
        raise ValueError(f"adamw_update_all: {view.shape} is no part of the flat buffer of {flat.size} values")
    return begin
