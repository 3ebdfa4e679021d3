"""Launchers of silu.cu."""

from kernels.cuda.runtime.grid import packs_of_four


def silu_forward(cuda, out, inp):
    """As kernels.cpu.deepseek.silu.silu_forward."""
    cuda.launch("silu_forward_kernel", *packs_of_four(inp.size), (out, inp, inp.size))


def silu_backward(cuda, dinp, inp, dout):
    """As kernels.cpu.deepseek.silu.silu_backward."""
    cuda.launch("silu_backward_kernel", *packs_of_four(inp.size), (dinp, inp, dout, inp.size))
