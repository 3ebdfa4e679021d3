"""Fully connected layer: cuBLAS for the products, matmul.cu and column_sum.cu for the bias."""

from kernels.cuda.gpt2.column_sum import column_sum
from kernels.cuda.runtime.grid import THREADS, ceil_div, packs_of_four

# the ladder of matmul.cu: kernel, side of a block's tile of outputs, threads
LADDER = {
    1: ("matmul_forward_kernel1", 16, THREADS),
    2: ("matmul_forward_kernel2", 32, 1024),
    3: ("matmul_forward_kernel3", 128, THREADS),
}


def matmul_forward(cuda, out, inp, weight, bias=None):
    """As kernels.cpu.gpt2.matmul.matmul_forward."""
    cuda.gemm(out, inp, weight, transb=True)
    if bias is not None:
        N, OC = out.shape
        cuda.launch("add_bias_kernel", *packs_of_four(out.size), (out, bias, N, OC))


def matmul_backward(cuda, dinp, dweight, dbias, dout, inp, weight, beta=0):
    """As kernels.cpu.gpt2.matmul.matmul_backward."""
    if dinp is not None:
        cuda.gemm(dinp, dout, weight)
    if dweight is not None:
        cuda.gemm(dweight, dout, inp, transa=True, beta=beta)
    if dbias is not None:
        column_sum(cuda, dbias, dout)


def matmul_forward_by_hand(cuda, version, out, inp, weight, bias):
    """matmul_forward by version 1, 2 or 3 of the handwritten kernels."""
    kernel, side, threads = LADDER[version]
    (N, C), OC = inp.shape, len(weight)
    grid = (ceil_div(OC, side), ceil_div(N, side))
    cuda.launch(kernel, grid, threads, (out, inp, weight, bias, N, C, OC))
