"""GELU in its tanh form. What gelu_forward leaves in inp for gelu_backward is each device's own affair."""

import numpy as np
import pytest
from check_op import TOL, check_gradients, place, rounded

from kernels import cpu, cuda

SHAPES = [((1, 1), 0), ((7, 36), 0), ((300, 1024), 0), ((1,), 0), ((4,), 0), ((1027,), 0), ((64,), 1), ((63,), 3)]


def forward(inp):
    """out, and inp as it is left"""
    out, left = np.empty_like(inp), inp.copy()
    cpu.gelu_forward(out, left)
    return out, left


def backward(dout, saved, inp):
    dinp = np.empty_like(inp)
    cpu.gelu_backward(dinp, saved[1], dout)
    return dict(inp=dinp)


@pytest.mark.parametrize("shape", [shape for shape, _ in SHAPES])
def test_gelu(shape):
    """(300, 1024) is several blocks."""
    check_gradients(forward, backward, tol32=1e-6, inp=shape)


def test_gelu_values():
    """Known points: gelu(1) = 0.8411920 and gelu(-2) = -0.0454023 in the tanh form; flat ends, no overflow."""
    inp = np.array([[0.0, 1.0, -2.0, 50.0, -50.0]])
    out, left = forward(inp)
    dinp = backward(np.ones_like(inp), (out, left), inp)["inp"]
    assert np.abs(out - [[0, 0.8411920, -0.0454023, 50, 0]]).max() < 1e-7
    assert np.abs(dinp[0, [0, 3, 4]] - [0.5, 1, 0]).max() < 1e-12


def test_gelu_in_float32_over_the_whole_range():
    """The value within 1e-6 of float64, relative beyond 1; the derivative within what 1 - g loses at x = 5."""
    inp = np.concatenate([np.linspace(-30, 30, 60001), [-1e4, 1e4]]).astype(np.float32)
    (out, slope), (out32, slope32) = forward(inp.astype(np.float64)), forward(inp)
    assert (np.abs(out32 - out) <= 1e-6 * np.maximum(1, np.abs(out))).all()
    assert np.abs(slope32 - slope).max() <= 2.5e-6


# ----------------------------------------------------------------------------------------------------------------------
# on CUDA: the emulator, and a GPU if there is one


@pytest.mark.parametrize("shape, offset", SHAPES)
@pytest.mark.parametrize("factor", [1, 3])
@pytest.mark.parametrize("in_place", [False, True])
def test_gelu_on_cuda(runtime, shape, offset, factor, in_place):
    """dinp may be dout. Relative to the largest value, or to 1: far below 0 the tanh form loses digits."""
    inp, dout = factor * rounded(*shape), rounded(*shape, seed=1)
    device = cuda.device(runtime)
    y, x, dy = (place(runtime, array, offset) for array in (np.full(shape, np.nan), inp, dout))
    device.gelu_forward(y, x)
    dx = dy if in_place else place(runtime, np.full(shape, np.nan), offset)
    device.gelu_backward(dx, x, dy)
    out, left = forward(inp)
    for ours, right in ((y, out), (dx, backward(dout, (out, left), inp)["inp"])):
        assert np.abs(runtime.to_host(ours) - right).max() <= TOL * max(1, np.abs(right).max())
