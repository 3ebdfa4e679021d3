"""GELU in its tanh form."""

import numpy as np
import pytest
from check_op import TOL, check_op, check_twin, nan, place, relative, rounded

from kernels import cpu, cuda


@pytest.mark.parametrize("shape, offset", [
    ((1, 1), 0), ((7, 36), 0), ((300, 1024), 0), ((1,), 0), ((4,), 0), ((1027,), 0), ((64,), 1), ((63,), 3),
])  # fmt: skip
def test_gelu(device, shape, offset):
    """On the CPU (300, 1024) is several blocks."""
    check_op(device, "gelu", dict(out=shape), (), offset, inp=shape)


def test_gelu_values():
    """Known points: gelu(1) = 0.8411920 and gelu(-2) = -0.0454023 in the tanh form; flat ends, no overflow."""
    inp = np.array([[0.0, 1.0, -2.0, 50.0, -50.0]])
    out, dinp = np.empty_like(inp), np.empty_like(inp)
    cpu.gelu_forward(out, inp)
    cpu.gelu_backward(dinp, inp, np.ones_like(inp))
    assert np.abs(out - [[0, 0.8411920, -0.0454023, 50, 0]]).max() < 1e-7
    assert np.abs(dinp[0, [0, 3, 4]] - [0.5, 1, 0]).max() < 1e-12


# ----------------------------------------------------------------------------------------------------------------------
# on CUDA: the emulator, and a GPU if there is one


@pytest.mark.parametrize("n, offset", [(1, 0), (4, 0), (1027, 0), (64, 1), (63, 3)])
def test_gelu_of_larger_values(runtime, n, offset):
    check_twin(runtime, "gelu_forward", nan(n), 3 * rounded(n), offset=offset)
    check_twin(runtime, "gelu_backward", nan(n), 3 * rounded(n), rounded(n, seed=1), offset=offset)


def test_gelu_in_place(runtime):
    inp, dout = rounded(77), rounded(77, seed=1)
    device = cuda.device(runtime)
    x, dx = (place(runtime, array, 0) for array in (inp, dout))
    device.gelu_backward(dx, x, dx)
    device.gelu_forward(x, x)
    out, dinp = nan(77), nan(77)
    cpu.gelu_forward(out, inp)
    cpu.gelu_backward(dinp, inp, dout)
    assert relative(runtime.to_host(x), out) <= TOL and relative(runtime.to_host(dx), dinp) <= TOL
