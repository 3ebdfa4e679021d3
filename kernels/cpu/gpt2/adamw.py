"""AdamW (Loshchilov & Hutter 2019; llm.c gpt2_update and adamw_kernel).

m = b1 m + (1-b1) g,  v = b2 v + (1-b2) g^2,  p -= lr (m/(1-b1^t) / (sqrt(v/(1-b2^t)) + eps) + weight_decay p)
"""

from math import sqrt

import numpy as np

from kernels.cpu.blocks import BLOCK_BYTES, for_blocks, scratch

BLOCK = BLOCK_BYTES // 8  # values of each of six operands
PASSES = 12  # over a value at least: a second thread pays the sooner


def adamw_update(params, grads, m, v, t, lr, beta1, beta2, eps, weight_decay, grad_scale=1.0):
    """Update number t = 1, 2, ... of params, m and v in place; all four contiguous, of one shape.

    grad_scale multiplies the gradient first (clipping).
    """
    flat = [array.reshape(-1) for array in (params, grads, m, v)]

    def values(start, stop):
        update_views([array[start:stop] for array in flat], t, lr, beta1, beta2, eps, weight_decay, grad_scale)

    for_blocks(values, flat[0].size, BLOCK, PASSES)


def adamw_update_all(params, grads, m, v, updates):
    """adamw_update(*update) for each of `updates`, (views of params, grads, m, v, t, lr, ..., grad_scale).

    params, grads, m, v: the flat buffers that hold all these views, which do not overlap; in the last three a tensor
    begins at the same place. Neighbours with the same settings are updated together.
    """
    flat = params, grads, m, v
    done = []  # [begin in params, begin in grads, m and v, values, settings]
    for views, *settings in ((update[:4], *update[4:]) for update in updates):
        begin, behind = ((view.ctypes.data - of.ctypes.data) // of.itemsize for view, of in zip(views, flat[:2]))
        last = done[-1] if done else None
        if last and last[3] == settings and (last[0] + last[2], last[1] + last[2]) == (begin, behind):
            last[2] += views[0].size
        else:
            done.append([begin, behind, views[0].size, settings])
    for begin, behind, size, settings in done:
        others = (array[behind : behind + size] for array in flat[1:])
        adamw_update(params[begin : begin + size], *others, *settings)


def update_views(views, t, lr, beta1, beta2, eps, weight_decay, grad_scale):
    """The formula on views p, g, m, v of one shape. The bias corrections are folded into lr and eps:

    lr m/c1 / (sqrt(v/c2) + eps) = (lr sqrt(c2)/c1) m / (sqrt(v) + eps sqrt(c2)),   c = 1 - beta^t
    """
    c1, c2 = 1 - beta1**t, sqrt(1 - beta2**t)
    p, g, m, v = views
    a, b = scratch("adamw", (2, *p.shape), p.dtype)
    if grad_scale != 1:
        g = np.multiply(g, grad_scale, out=b)
    np.subtract(g, m, out=a)
    a *= 1 - beta1
    m += a
    np.multiply(g, g, out=a)
    a -= v
    a *= 1 - beta2
    v += a
    np.sqrt(v, out=a)
    a += eps * c2
    np.divide(m, a, out=b)
    b *= lr * c2 / c1
    if weight_decay:
        np.multiply(p, lr * weight_decay, out=a)
        b += a
    p -= b
