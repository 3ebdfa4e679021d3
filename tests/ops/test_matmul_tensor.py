"""Dense products on tensor cores: the emulator as a GPU that has them, in 3xTF32, and a GPU if any."""

import numpy as np
import pytest
from check_op import TOL_TENSOR, check_twin, nan, place, relative, rounded
from test_band_matmul_tensor import HOPPER, Recorder

from kernels import cuda
from kernels.cuda.gpt2 import matmul_tensor
from kernels.cuda.gpt2.matmul_tensor import parts_of


@pytest.fixture(scope="module")
def runtime(open_tensor_cores):
    """Takes our products at any size."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matmul_tensor, "MULTIPROCESSORS", 1)
        yield open_tensor_cores(tf32=False)


@pytest.mark.parametrize("N, C, OC, offset", [
    (130, 20, 68, 0), (130, 20, 68, 1), (33, 7, 5, 0), (530, 36, 70, 0), (5, 130, 3, 0), (1, 1, 1, 0), (64, 16, 129, 0),
    (17, 64, 128, 2),
])  # fmt: skip
def test_products(runtime, N, C, OC, offset, monkeypatch):
    """Any size, aligned or not; a gradient is written or added to; 530 rows are summed in two parts. No cuBLAS."""
    monkeypatch.setattr(runtime, "gemm", None)
    inp, weight, bias, dout = rounded(N, C), rounded(OC, C), rounded(OC), rounded(N, OC)
    options = dict(offset=offset, tol=TOL_TENSOR[False])
    for given in (bias, None):
        check_twin(runtime, "matmul_forward", nan(N, OC), inp, weight, given, **options)
    for beta, dweight in ((0, nan(OC, C)), (1, 3 * weight)):
        check_twin(runtime, "matmul_backward", nan(N, C), dweight, bias, dout, inp, weight, beta, **options)
    check_twin(runtime, "matmul_backward", None, None, bias, dout, inp, weight, **options)


def test_long_sums_keep_their_accuracy(runtime):
    """3000 steps of values that do not cancel: sums are added up outside of tensor cores, in float32."""
    inp, weight = np.abs(rounded(3, 3000)) + 1, np.abs(rounded(4, 3000)) + 1
    inp, weight = (array.astype(np.float32).astype(np.float64) for array in (inp, weight))
    out = place(runtime, nan(3, 4), 0)
    cuda.device(runtime).matmul_forward(out, place(runtime, inp, 0), place(runtime, weight, 0))
    error = relative(runtime.to_host(out), inp @ weight.T)
    print(f"{error:.1e}")
    assert error <= 2e-6


def test_the_order_of_threads_changes_no_bit(open_tensor_cores, monkeypatch):
    monkeypatch.setattr(matmul_tensor, "MULTIPROCESSORS", 1)
    inp, weight, dout = rounded(530, 12), rounded(20, 12), rounded(530, 20)
    runs = []
    for order in ("ascending", "descending", "random"):
        runtime = open_tensor_cores(False, order)
        dinp, dweight = place(runtime, nan(530, 12), 0), place(runtime, weight, 0)
        given = (place(runtime, array, 0) for array in (dout, inp, weight))
        cuda.device(runtime).matmul_backward(dinp, dweight, None, *given, 1)
        runs.append(runtime.to_host(dinp).tobytes() + runtime.to_host(dweight).tobytes())
    assert runs[0] == runs[1] == runs[2]


@pytest.mark.parametrize("N, C, OC, tf32, ours", [
    (4096, 768, 2304, False, (True, True, True)), (4096, 768, 50304, False, (True, True, True)),
    (1024, 768, 768, False, (False, False, True)), (256, 128, 512, False, (False, False, False)),
    (4096, 768, 2304, True, (False, False, False)),
])  # fmt: skip
def test_which_products_are_ours(tried, N, C, OC, tf32, ours):
    """Of forward, dinp, dweight: with a tile for each multiprocessor, in float32; cuBLAS has the others."""
    runtime = Recorder(HOPPER, tf32)
    inp, weight, dout, bias = (np.empty(shape, np.float32) for shape in ((N, C), (OC, C), (N, OC), OC))
    cuda.OPS["matmul_forward"](runtime, dout, inp, weight, bias)
    cuda.OPS["matmul_backward"](runtime, inp, weight, None, dout, inp, weight)
    kernels = [kernel for kernel, _ in runtime.launched if kernel not in ("add_bias_kernel", "matmul_join_kernel")]
    names = (f"matmul_{product}_3xtf32_kernel" for product in ("forward", "dinp", "dweight"))
    assert kernels == [name if own else "gemm" for name, own in zip(names, ours)]
    assert ("add_bias_kernel" in dict(runtime.launched)) != ours[0]  # the product adds it


@pytest.mark.parametrize("N, tiles, expected", [
    (4096, 216, (1, 4096)), (4096, 72, (4, 1024)), (4096, 1, (16, 256)), (100, 1, (1, 112)), (1000, 10, (3, 336)),
])  # fmt: skip
def test_parts_of_a_sum(N, tiles, expected):
    """Whole pieces of 16 rows, 256 at least, and no part without rows."""
    count, rows = parts_of(N, tiles)
    assert (count, rows) == expected and rows % 16 == 0 and (count - 1) * rows < N <= count * rows
