"""Launchers of gelu.cu."""

from kernels.cuda.runtime.grid import packs_of_four


def gelu_forward(cuda, out, inp):
    """As kernels.cpu.gpt2.gelu.gelu_forward."""
    cuda.launch("gelu_forward_kernel", *packs_of_four(inp.size), (out, inp, inp.size))


def gelu_backward(cuda, dinp, inp, dout):
    """As kernels.cpu.gpt2.gelu.gelu_backward."""
    cuda.launch("gelu_backward_kernel", *packs_of_four(inp.size), (dinp, inp, dout, inp.size))
