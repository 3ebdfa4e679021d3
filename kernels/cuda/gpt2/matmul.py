"""Fully connected layer: cuBLAS or matmul_tensor.cu, a bias by matmul.cu and column_sum.cu; a row by matmul_row.cu."""

from math import prod

from kernels.cuda.gpt2.column_sum import column_sum
from kernels.cuda.gpt2.matmul_row import matmul_row
from kernels.cuda.gpt2.matmul_tensor import (
    parts_of,
    takes_matmul,
    tensor_dinp,
    tensor_dweight,
    tensor_forward,
    tiles_of,
)
from kernels.cuda.runtime.grid import packs_of_four


def matmul_forward(cuda, out, inp, weight, bias=None):
    """As kernels.cpu.gpt2.matmul.matmul_forward."""
    if len(out) == 1:
        matmul_row(cuda, out, inp, weight, bias)
        return
    if takes_matmul(cuda, prod(tiles_of(*out.shape))):
        tensor_forward(cuda, out, inp, weight, bias)
        return
    cuda.gemm(out, inp, weight, transb=True)
    if bias is not None:
        N, OC = out.shape
        cuda.launch("add_bias_kernel", *packs_of_four(out.size), (out, bias, N, OC))


def matmul_backward(cuda, dinp, dweight, dbias, dout, inp, weight, beta=0):
    """As kernels.cpu.gpt2.matmul.matmul_backward."""
    if dinp is not None:
        if takes_matmul(cuda, prod(tiles_of(*dinp.shape))):
            tensor_dinp(cuda, dinp, dout, weight)
        else:
            cuda.gemm(dinp, dout, weight)
    if dweight is not None:
        tiles = prod(tiles_of(*dweight.shape))
        if takes_matmul(cuda, tiles * parts_of(len(inp), tiles)[0]):
            tensor_dweight(cuda, dweight, dout, inp, beta)
        else:
            cuda.gemm(dweight, dout, inp, transa=True, beta=beta)
    if dbias is not None:
        column_sum(cuda, dbias, dout)
