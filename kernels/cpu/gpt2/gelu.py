"""GELU, tanh approximation (Hendrycks & Gimpel 2016; llm.c gelu_forward/backward).

y = 0.5 x (1 + tanh u),   u = s (x + 0.044715 x^3),   s = sqrt(2/pi)
dy/dx = 0.5 (1 + tanh u) + 0.5 x (1 - tanh^2 u) s (1 + 3 * 0.044715 x^2)
"""

from math import pi, sqrt

import numpy as np

from kernels.cpu.blocks import BLOCK_BYTES, for_blocks, scratch

S = sqrt(2 / pi)
CUBIC = 0.044715
BLOCK = BLOCK_BYTES // 16  # values: several operands share the cache
PASSES = 4  # over a value at least: a second thread pays the sooner


def gelu_forward(out, inp):
    """out from inp, same shape, contiguous; out may be inp."""
    out_flat, inp_flat = out.reshape(-1), inp.reshape(-1)

    def values(start, stop):
        x = inp_flat[start:stop]
        t = scratch("gelu", x.shape, x.dtype)
        np.multiply(x, x, out=t)
        t *= S * CUBIC
        t += S
        t *= x
        np.tanh(t, out=t)
        t += 1
        t *= 0.5
        np.multiply(x, t, out=out_flat[start:stop])

    for_blocks(values, inp_flat.size, BLOCK, PASSES)


def gelu_backward(dinp, inp, dout):
    """dinp = dout * dy/dx(inp), same shape, contiguous; dinp may be dout."""
    dinp_flat, inp_flat, dout_flat = dinp.reshape(-1), inp.reshape(-1), dout.reshape(-1)

    def values(start, stop):
        x = inp_flat[start:stop]
        x2, t, d = scratch("gelu", (3, stop - start), x.dtype)
        np.multiply(x, x, out=x2)
        np.multiply(x2, S * CUBIC, out=t)
        t += S
        t *= x
        np.tanh(t, out=t)
        np.multiply(t, t, out=d)
        np.subtract(1, d, out=d)  # sech^2 u, in the form that cannot overflow
        x2 *= 3 * S * CUBIC
        x2 += S
        d *= x2
        d *= x
        d += t
        d += 1
        d *= 0.5
        np.multiply(d, dout_flat[start:stop], out=dinp_flat[start:stop])

    for_blocks(values, inp_flat.size, BLOCK, PASSES)
