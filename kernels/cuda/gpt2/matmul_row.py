"""Launcher of matmul_row.cu."""

from kernels.cuda.runtime.grid import warp_a_row


def matmul_row(cuda, out, inp, weight, bias):
    """matmul_forward of one row, (1,OC) from (1,K); bias may be None."""
    OC, K = weight.shape
    biased = bias is not None
    args = (out, inp, weight, bias if biased else inp, K, OC, int(biased))
    cuda.launch("matmul_row_kernel", *warp_a_row(OC), args)
