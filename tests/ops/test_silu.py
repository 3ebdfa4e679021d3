"""SiLU."""

import numpy as np
import pytest
from check_op import check_op, check_twin, nan, rounded

from kernels import cpu, cuda


@pytest.mark.parametrize("shape, offset", [((3, 50), 0), ((1,), 0), ((7, 9), 0), ((4, 256), 0), ((5, 50), 1)])
def test_silu(device, shape, offset):
    check_op(device, "silu", dict(out=shape), (), offset, inp=shape)


def test_silu_far_from_zero():
    far = np.array([-1e4, -200, -0.0, 200, 1e4], np.float32)
    out = far.copy()
    with np.errstate(all="raise"):
        cpu.silu_forward(out, out)
        assert out.tolist() == [0, 0, 0, 200, 1e4]
        cpu.silu_backward(out, far, np.ones(5, np.float32))
    assert out.tolist() == [0, 0, 0.5, 1, 1]


# ----------------------------------------------------------------------------------------------------------------------
# on CUDA: the emulator, and a GPU if there is one


@pytest.mark.parametrize("shape, offset", [((1,), 0), ((7, 9), 0), ((4, 256), 0), ((5, 50), 1)])
def test_silu_of_larger_values(runtime, shape, offset):
    inp = rounded(*shape) * 5
    check_twin(runtime, "silu_forward", nan(*shape), inp, offset=offset)
    check_twin(runtime, "silu_backward", nan(*shape), inp, rounded(*shape, seed=1), offset=offset)


def test_silu_far_from_zero_and_in_place(runtime):
    device, x = cuda.device(runtime), np.array([-1e4, -200, 200, 1e4], np.float32)
    out, dout = runtime.to_device(x), runtime.to_device(np.ones(4, np.float32))
    device.silu_forward(out, out)
    assert runtime.to_host(out).tolist() == [0, 0, 200, 1e4]
    device.silu_backward(dout, runtime.to_device(x), dout)
    assert runtime.to_host(dout).tolist() == [0, 0, 1, 1]
