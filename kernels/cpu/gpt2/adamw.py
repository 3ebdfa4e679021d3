"""AdamW (Loshchilov & Hutter 2019; llm.c gpt2_update and adamw_kernel).

m = b1 m + (1-b1) g,  v = b2 v + (1-b2) g^2,  p -= lr (m/(1-b1^t) / (sqrt(v/(1-b2^t)) + eps) + weight_decay p)
"""

from math import sqrt

import numpy as np

from kernels.cpu.blocks import BLOCK_BYTES, for_blocks, scratch

BLOCK = BLOCK_BYTES // 8  # values of each of six operands
PASSES = 12  # over a value at least: a second thread pays the sooner
RATES = 6  # numbers of adamw_rates


def adamw_rates(t, lr, beta1, beta2, eps, weight_decay, grad_clip=0.0) -> tuple[float, ...]:
    """The RATES numbers of update t = 1, 2, ...: what changes from step to step, for an array of the device.

    The bias corrections are folded into lr and eps, in double precision:
    lr m/c1 / (sqrt(v/c2) + eps) = (lr sqrt(c2)/c1) m / (sqrt(v) + eps sqrt(c2)),   c = 1 - beta^t
    """
    c1, c2 = 1 - beta1**t, sqrt(1 - beta2**t)
    return lr * c2 / c1, 1 - beta1, 1 - beta2, eps * c2, lr * weight_decay, grad_clip


def adamw_update(params, grads, m, v, rates, norm):
    """Update params, m and v in place; all four contiguous, of one shape. rates (6) are adamw_rates.

    Where norm (1), the global_norm, is above grad_clip > 0, the gradient is first multiplied by grad_clip / norm.
    """
    flat = [array.reshape(-1) for array in (params, grads, m, v)]

    def values(start, stop):
        update_views([array[start:stop] for array in flat], rates, norm)

    for_blocks(values, flat[0].size, BLOCK, PASSES)


def adamw_update_all(params, grads, m, v, updates, rates, norm):
    """adamw_update for each of `updates`, (views of params, grads, m, v, its row of rates); rates (groups,6), norm (1).

    params, grads, m, v: the flat buffers that hold all these views, which do not overlap; in the last three a tensor
    begins at the same place. Neighbours with the same settings are updated together.
    """
    flat = params, grads, m, v
    runs = []  # [begin in params, begin in grads, m and v, values, row of rates]
    for *views, row in updates:
        begin, behind = ((view.ctypes.data - of.ctypes.data) // of.itemsize for view, of in zip(views[:2], flat))
        last = runs[-1] if runs else None
        if last and [last[0] + last[2], last[1] + last[2], last[3]] == [begin, behind, row]:
            last[2] += views[0].size
        else:
            runs.append([begin, behind, views[0].size, row])
    for begin, behind, size, row in runs:
        others = (array[behind : behind + size] for array in flat[1:])
        adamw_update(params[begin : begin + size], *others, rates[row], norm)


def update_views(views, rates, norm):
    """The formula on views p, g, m, v of one shape."""
    p, g, m, v = views
    rate, one_minus_beta1, one_minus_beta2, eps, decay, grad_clip = rates.tolist()
    a, b = scratch("adamw", (2, *p.shape), p.dtype)
    if 0 < grad_clip < norm[0]:
        g = np.multiply(g, grad_clip / float(norm[0]), out=b)
    np.subtract(g, m, out=a)
    a *= one_minus_beta1
    m += a
    np.multiply(g, g, out=a)
    a -= v
    a *= one_minus_beta2
    v += a
    np.sqrt(v, out=a)
    a += eps
    np.divide(m, a, out=b)
    b *= rate
    if decay:
        np.multiply(p, decay, out=a)
        b += a
    p -= b
