"""Banded products on tensor cores: the emulator as a GPU that has them, in TF32 and in 3xTF32, and a GPU if any."""

import numpy as np
import pytest
from check_op import ROUNDED, TOL_TENSOR, nan, place, relative, rounded

from kernels import cpu, cuda
from kernels.cuda.band.band_matmul import band_products
from kernels.cuda.band.band_matmul_tensor import gradient_tiles, tensor_band_backward, tensor_band_forward

OUTSIDE = 7.0  # what is outside the band of a gradient, and must stay there


def operands(N, C, bandwidth, layer) -> tuple:
    """inp, weight, bias, dout, and 1 where the band of the weight is."""
    OC, IC = (4 * C, C) if layer == "FC1" else (C, 4 * C)
    band = np.ones((1, OC, IC))
    cpu.band_mask(band, bandwidth)
    return rounded(N, IC), rounded(OC, IC) * band[0], rounded(OC), rounded(N, OC), band[0]


def results(runtime, inp, weight, bias, dout, band, bandwidth, beta=0, offset=0) -> list[np.ndarray]:
    """out, dinp, dweight; dweight starts from 3 * weight."""
    products = "tf32" if runtime.tf32 else "3xtf32"
    given, weights, biases, grads = (place(runtime, array, offset) for array in (inp, weight, bias, dout))
    out, dinp = (place(runtime, nan(*array.shape), offset) for array in (dout, inp))
    dweight = place(runtime, np.where(band, 3 * weight, OUTSIDE), offset)
    tensor_band_forward(runtime, products, out, given, weights, biases, bandwidth)
    tensor_band_backward(runtime, products, dinp, dweight, grads, given, weights, bandwidth, beta)
    return [runtime.to_host(array) for array in (out, dinp, dweight)]


@pytest.mark.parametrize("N, C, bandwidth, offset", [
    (130, 36, 9, 0), (70, 36, 1, 1), (33, 7, 12, 0), (530, 20, 13, 0), (5, 40, 1000, 0), (1, 64, 2, 0), (9, 33, 0, 3),
])  # fmt: skip
@pytest.mark.parametrize("layer", ["FC1", "FC2"])
def test_products(tensor_cores, N, C, bandwidth, offset, layer):
    """Any size, aligned or not, from the centres alone to all; a gradient is written or added to in the band alone."""
    inp, weight, bias, dout, band = operands(N, C, bandwidth, layer)
    for beta in (0, 1):
        out, dinp, dweight = results(tensor_cores, inp, weight, bias, dout, band, bandwidth, beta, offset)
        assert (dweight[band == 0] == OUTSIDE).all()
        expected = inp @ weight.T + bias, dout @ weight, (dout.T @ inp + 3 * beta * weight) * band
        errors = [relative(*pair) for pair in zip((out, dinp, dweight * band), expected)]
        print(f"out, dinp, dweight: {', '.join(f'{error:.1e}' for error in errors)}")
        assert all(error <= TOL_TENSOR[tensor_cores.tf32] for error in errors)
        assert not tensor_cores.tf32 or N * C < 1000 or min(errors) >= ROUNDED


def test_the_order_of_threads_changes_no_bit(open_tensor_cores):
    """Three orders of threads and blocks; 530 tokens are summed in two parts."""
    given = operands(530, 12, 9, "FC2")
    assert gradient_tiles("3xtf32", 12, 9) == (1, 1, 1)
    runs = [results(open_tensor_cores(False, order), *given, 9) for order in ("ascending", "descending", "random")]
    assert all(a.tobytes() == b.tobytes() for run in runs[1:] for a, b in zip(run, runs[0]))


@pytest.mark.parametrize("products, C, bandwidth, expected", [
    ("tf32", 768, 256, (24, 1, 24)), ("3xtf32", 768, 256, (24, 2, 46)), ("tf32", 768, 10**4, (24, 8, 192)),
    ("3xtf32", 20, 0, (1, 1, 1)),
])  # fmt: skip
def test_tiles_of_a_gradient(products, C, bandwidth, expected):
    assert gradient_tiles(products, C, bandwidth) == expected


class Recorder:
    """Launches are kept, and nothing else is done."""

    def __init__(self, capability, tf32):
        self.capability, self.tf32, self.launched = capability, tf32, []

    def launch(self, kernel, grid, block, args):
        self.launched.append((kernel, grid))

    def gemm(self, out, *operands, **options):
        self.launched.append(("gemm", out.shape))

    def scratch(self, key, shape, dtype=np.float32):
        return np.empty(shape, dtype)


HOPPER, TURING, ADA = (9, 0), (7, 5), (8, 9)


@pytest.mark.parametrize("capability, tf32, C, bandwidth, expected", [
    (HOPPER, True, 768, 256, "tf32"), (HOPPER, True, 768, 1024, "dense"), (HOPPER, False, 768, 256, "3xtf32"),
    (HOPPER, False, 768, 1024, "3xtf32"), (HOPPER, False, 768, 2048, "3xtf32"), (HOPPER, False, 768, 3500, "dense"),
    (HOPPER, True, 128, 256, "dense"),
    (ADA, True, 768, 256, "tf32"), (ADA, False, 768, 256, "float32"), (ADA, False, 768, 2048, "dense"),
    (TURING, False, 768, 1024, "float32"), (HOPPER, True, 768, 10**4, "dense"),
])  # fmt: skip
def test_which_products_a_band_takes(tried, capability, tf32, C, bandwidth, expected):
    """By the card, the precision and the density; dense ones with a mask on the gradient."""
    runtime = Recorder(capability, tf32)
    assert band_products(runtime, C, bandwidth) == expected
    inp, weight, dout = (np.empty(shape, np.float32) for shape in ((8, C), (4 * C, C), (8, 4 * C)))
    cuda.OPS["band_matmul_backward"](runtime, inp, weight, dout[0], dout, inp, weight, bandwidth)
    kernels = [kernel for kernel, _ in runtime.launched]
    word = "" if expected == "float32" else f"{expected}_"
    banded = {f"band_matmul_dinp_{word}kernel", f"band_matmul_dweight_{word}kernel"}
    assert ("band_mask_kernel" in kernels) == (expected == "dense")
    assert {kernel for kernel in kernels if "band_matmul_d" in kernel} == (set() if expected == "dense" else banded)


def test_tf32_without_kernels_for_it_is_dense(failed):
    """cuBLAS has tensor cores, and a band on CUDA cores took three times as long."""
    assert band_products(Recorder(HOPPER, True), 768, 64) == "dense"
    assert band_products(Recorder(HOPPER, False), 768, 64) == "float32"
