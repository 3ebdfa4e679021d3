"""SiLU, also called swish (Elfwing et al. 2017; Ramachandran et al. 2017).

y = x s,   s = 1 / (1 + exp(-x)) = (1 + tanh(x/2)) / 2
dy/dx = s (1 + x (1 - s))
"""

import numpy as np

from kernels.cpu.blocks import BLOCK_BYTES, for_blocks, scratch

BLOCK = BLOCK_BYTES // 16  # values: several operands share the cache


def silu_forward(out, inp):
    """out from inp, same shape, contiguous; out may be inp."""
    out_flat, inp_flat = out.reshape(-1), inp.reshape(-1)

    def values(start, stop):
        x = inp_flat[start:stop]
        s = scratch("silu", x.shape, x.dtype)
        _sigmoid(s, x)
        np.multiply(x, s, out=out_flat[start:stop])

    for_blocks(values, inp_flat.size, BLOCK)


def silu_backward(dinp, inp, dout):
    """dinp = dout * dy/dx(inp), same shape, contiguous; dinp may be dout."""
    dinp_flat, inp_flat, dout_flat = dinp.reshape(-1), inp.reshape(-1), dout.reshape(-1)

    def values(start, stop):
        x = inp_flat[start:stop]
        s, d = scratch("silu", (2, stop - start), x.dtype)
        _sigmoid(s, x)
        np.subtract(1, s, out=d)
        d *= x
        d += 1
        d *= s
        np.multiply(d, dout_flat[start:stop], out=dinp_flat[start:stop])

    for_blocks(values, inp_flat.size, BLOCK)


def _sigmoid(out, x):
    np.multiply(x, 0.5, out=out)
    np.tanh(out, out=out)  # cannot overflow, as exp(-x) does
    out += 1
    out *= 0.5
