"""Products of banded weights: band_matmul_tensor.cu on tensor cores, band_matmul.cu on others, or dense ones.

Six products, of both layers forward, dinp and dweight, on an H100, in us: what band_products goes by.

| N, C, w       | density | dense TF32 | band TF32 | dense float32 | band 3xTF32 | band float32 |
|---------------|---------|------------|-----------|---------------|-------------|--------------|
| 4096, 768, 64   |  2.1 % |        481 |       228 |          2439 |         271 |         1245 |
| 4096, 768, 256  |  8.2 % |        481 |       297 |          2437 |         437 |         1385 |
| 4096, 768, 1024 | 30.5 % |        483 |       681 |          2434 |        1154 |         2291 |
| 16384, 768, 256 |  8.2 % |       1617 |       881 |          9153 |        1442 |         5154 |
| 4096, 1600, 256 |  4.0 % |       1707 |       523 |         10753 |         816 |         2089 |
| 4096, 4096, 512 |  3.1 % |       9348 |      1926 |         64013 |        3297 |         4147 |

dense is cuBLAS's. Four times the tokens change ratios by a tenth, so N does not count. Columns of tensor cores are of
kernels before these, which split and rounded in more operations. cuBLAS on strided blocks of the band took 1482 us in
the last row, in TF32, and in the others more than the best of these, or 2 % less: left out. To measure again: make
bench_gpu, row FC1 and FC2 banded, and benchmarks/gpu_step_time.py --sizes 124M --profile for single kernels.
"""

import numpy as np

from kernels.cpu.band import band_matmul as numpy_products
from kernels.cuda.band.band_mask import band_density, band_mask
from kernels.cuda.band.band_matmul_tensor import tensor_band_backward, tensor_band_forward
from kernels.cuda.gpt2.column_sum import column_sum
from kernels.cuda.gpt2.matmul import matmul_backward, matmul_forward
from kernels.cuda.gpt2.matmul_tensor import tensor_products
from kernels.cuda.runtime.grid import THREADS, ceil_div
from kernels.cuda.runtime.tensor_cores import Results

ROWS, COLUMNS = 128, 64  # sides of a tile: BM and BN of band_matmul.cu
# densities from which on cuBLAS's dense products, and a mask on the gradient, are faster: where straight lines through
# the rows of C = 768 meet
DENSE_FROM = {"tf32": 0.19, "3xtf32": 0.7, "float32": 0.34}


def band_products(cuda, C: int, bandwidth: int) -> str:
    """How to multiply by a band in 4C x C: "tf32", "3xtf32" on tensor cores, "float32" on others, or "dense".

    Weights outside the band are zero, so that dense products are right but for what dweight gets there.
    """
    products = tensor_products(cuda, band_trial) or ("dense" if cuda.tf32 else "float32")
    return "dense" if products == "dense" or band_density(C, bandwidth) >= DENSE_FROM[products] else products


def band_matmul_forward(cuda, out, inp, weight, bias, bandwidth):
    """As kernels.cpu.band.band_matmul.band_matmul_forward."""
    (N, C), OC = inp.shape, len(weight)
    products = band_products(cuda, min(C, OC), bandwidth) if bandwidth else "dense"
    if products == "dense":
        matmul_forward(cuda, out, inp, weight, bias)
    elif products == "float32":
        cuda.launch("band_matmul_forward_kernel", _tiles(N, OC), THREADS, (out, inp, weight, bias, N, C, OC, bandwidth))
    else:
        tensor_band_forward(cuda, products, out, inp, weight, bias, bandwidth)


def band_matmul_backward(cuda, dinp, dweight, dbias, dout, inp, weight, bandwidth, beta=0):
    """As kernels.cpu.band.band_matmul.band_matmul_backward."""
    (N, C), OC = inp.shape, len(weight)
    products = band_products(cuda, min(C, OC), bandwidth) if bandwidth else "dense"
    if products == "dense":
        matmul_backward(cuda, dinp, dweight, dbias, dout, inp, weight, beta)
        if bandwidth:
            band_mask(cuda, dweight.reshape(1, OC, C), bandwidth)
        return
    if products == "float32":
        cuda.launch("band_matmul_dinp_kernel", _tiles(N, C), THREADS, (dinp, dout, weight, N, C, OC, bandwidth))
        args = (dweight, dout, inp, N, C, OC, bandwidth, beta)
        cuda.launch("band_matmul_dweight_kernel", _tiles(OC, C), THREADS, args)
    else:
        tensor_band_backward(cuda, products, dinp, dweight, dout, inp, weight, bandwidth, beta)
    column_sum(cuda, dbias, dout)


def band_trial(cuda) -> Results:
    """Three products of FC1 and of FC2: some tiles are not full, a weight's gradient is summed in parts."""
    N, C, bandwidth, rng = 530, 40, 36, np.random.default_rng(0)
    products = "tf32" if cuda.tf32 else "3xtf32"
    for layer, inputs, outputs in (("FC1", C, 4 * C), ("FC2", 4 * C, C)):
        shapes = (N, inputs), (outputs, inputs), outputs, (N, outputs)
        drawn = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
        inp, weight, bias, dout = given = [cuda.to_device(values) for values in drawn]
        band_mask(cuda, weight.reshape(1, outputs, inputs), bandwidth)
        out, dinp, dweight = ours = [cuda.zeros(shape) for shape in ((N, outputs), (N, inputs), (outputs, inputs))]
        tensor_band_forward(cuda, products, out, inp, weight, bias, bandwidth)
        tensor_band_backward(cuda, products, dinp, dweight, dout, inp, weight, bandwidth, 0)
        out, dinp, dweight = expected = [np.zeros(array.shape) for array in ours]
        inp, weight, bias, dout = (cuda.to_host(array).astype(np.float64) for array in given)
        numpy_products.band_matmul_forward(out, inp, weight, bias, bandwidth)
        numpy_products.band_matmul_backward(dinp, dweight, bias, dout, inp, weight, bandwidth)
        for name, array, right in zip(("out", "dinp", "dweight"), ours, expected):
            yield f"{layer}'s {name}", cuda.to_host(array), right


def _tiles(rows, columns):
    return ceil_div(columns, COLUMNS), ceil_div(rows, ROWS)
