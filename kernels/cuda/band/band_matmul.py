"""Launchers of band_matmul.cu."""

from kernels.cuda.gpt2.column_sum import column_sum
from kernels.cuda.gpt2.matmul import matmul_backward, matmul_forward
from kernels.cuda.runtime.grid import THREADS, ceil_div

ROWS, COLUMNS = 128, 64  # sides of a tile: BM and BN of band_matmul.cu


def band_matmul_forward(cuda, out, inp, weight, bias, bandwidth):
    """As kernels.cpu.band.band_matmul.band_matmul_forward."""
    if not bandwidth:
        matmul_forward(cuda, out, inp, weight, bias)
        return
    (N, C), OC = inp.shape, len(weight)
    cuda.launch("band_matmul_forward_kernel", _tiles(N, OC), THREADS, (out, inp, weight, bias, N, C, OC, bandwidth))


def band_matmul_backward(cuda, dinp, dweight, dbias, dout, inp, weight, bandwidth, beta=0):
    """As kernels.cpu.band.band_matmul.band_matmul_backward."""
    if not bandwidth:
        matmul_backward(cuda, dinp, dweight, dbias, dout, inp, weight, beta)
        return
    (N, C), OC = inp.shape, len(weight)
    cuda.launch("band_matmul_dinp_kernel", _tiles(N, C), THREADS, (dinp, dout, weight, N, C, OC, bandwidth))
    args = (dweight, dout, inp, N, C, OC, bandwidth, beta)
    cuda.launch("band_matmul_dweight_kernel", _tiles(OC, C), THREADS, args)
    column_sum(cuda, dbias, dout)


def _tiles(rows, columns):
    return ceil_div(columns, COLUMNS), ceil_div(rows, ROWS)
