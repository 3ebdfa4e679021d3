"""GELU, tanh approximation (Hendrycks & Gimpel 2016; llm.c gelu_forward/backward).

y = 0.5 x (1 + tanh u) = x g,   g = 1 / (1 + exp(-2u)),   u = s (x + 0.044715 x^3),   s = sqrt(2/pi)
dy/dx = g + y (1 - g) 2u',   u' = s (1 + 3 * 0.044715 x^2)

The exponential takes half the time of NumPy's tanh, and forward has all that the derivative is made of.
"""

from math import pi, sqrt

import numpy as np

from kernels.cpu.blocks import BLOCK_BYTES, for_blocks, scratch

LINEAR = -2 * sqrt(2 / pi)  # -2u = x (CUBIC x^2 + LINEAR)
CUBIC = 0.044715 * LINEAR
BLOCK = BLOCK_BYTES // 16  # values: several operands share the cache
PASSES = 8  # over a value at least: a second thread pays the sooner


def gelu_forward(out, inp):
    """out from inp, same shape, contiguous; inp is overwritten by dy/dx, which is all that gelu_backward needs."""
    out_flat, inp_flat = out.reshape(-1), inp.reshape(-1)

    def values(start, stop):
        x, y = inp_flat[start:stop], out_flat[start:stop]
        p, g = scratch("gelu", (2, stop - start), x.dtype)
        np.multiply(x, x, out=p)
        p *= CUBIC
        np.add(p, LINEAR, out=g)
        g *= x
        with np.errstate(over="ignore"):  # inf far below 0, where g is 0
            np.exp(g, out=g)
        g += 1
        np.divide(1, g, out=g)
        np.multiply(x, g, out=y)
        p *= 3
        p += LINEAR  # -2u'
        p *= y
        np.subtract(g, 1, out=x)
        x *= p
        x += g

    for_blocks(values, inp_flat.size, BLOCK, PASSES)


def gelu_backward(dinp, inp, dout):
    """dinp = dout * dy/dx, same shape, contiguous; inp is what gelu_forward left there, dinp may be dout."""
    np.multiply(dout, inp, out=dinp)
