"""RMSNorm of the first columns."""

import numpy as np
import pytest
from check_op import check_gradients, check_twin, nan, rounded

from kernels import cpu, cuda
from llmc.errors import UserError

SIZES = [  # N, C, extra, offset
    (1, 2, 0, 0), (7, 36, 4, 0), (9, 50, 3, 0), (64, 64, 16, 0), (33, 768, 0, 0), (5, 64, 16, 1), (600, 16, 2, 0),
    (2, 1030, 0, 0), (3, 2048, 64, 0), (1500, 512, 3, 0),  # the last one is two blocks on the CPU
]  # fmt: skip


@pytest.mark.parametrize("N, C, extra, offset", SIZES)
def test_rmsnorm(N, C, extra, offset):
    """The first C of C + extra columns; dinp's other columns keep what they hold."""

    def forward(inp, weight):
        out, rrms = np.empty((N, C), inp.dtype), np.empty(N, inp.dtype)
        cpu.rmsnorm_forward(out, rrms, inp, weight)
        return out, rrms

    def backward(dout, saved, inp, weight):
        dinp, dweight = np.full_like(inp, 7), np.full_like(weight, 3)
        cpu.rmsnorm_backward(dinp, dweight, dout, inp, weight, saved[1])
        assert (dinp[:, C:] == 7).all()
        dinp[:, C:] = 0
        return dict(inp=dinp, weight=dweight - 3)

    check_gradients(forward, backward, inp=(N, C + extra), weight=(C,))


def test_rmsnorm_values():
    """mean([1, 49]) = 25: 1 / 5 and 7 / 5; a row of zeros stays one; length 1 whatever the row's scale."""
    out, rrms = np.empty((3, 2)), np.empty(3)
    cpu.rmsnorm_forward(out, rrms, np.array([[1.0, 7], [0, 0], [300, -300]]), np.array([1.0, 2]))
    assert np.abs(out - [[0.2, 2.8], [0, 0], [1, -2]]).max() < 1e-6
    assert np.abs(rrms - [0.2, 1000, 1 / 300]).max() < 1e-4


# ----------------------------------------------------------------------------------------------------------------------
# on CUDA: the emulator, and a GPU if there is one


@pytest.mark.parametrize("N, C, extra, offset", SIZES)
def test_rmsnorm_on_cuda(runtime, N, C, extra, offset):
    inp, weight, dout = rounded(N, C + extra), rounded(C, seed=1), rounded(N, C, seed=2)
    check_twin(runtime, "rmsnorm_forward", nan(N, C), nan(N), inp, weight, offset=offset)
    rrms = 1 / np.sqrt(np.square(inp[:, :C]).mean(axis=1) + 1e-6)
    for other in (0, 5):  # dinp need not be as wide as inp
        args = rounded(N, C + other, seed=3), rounded(C, seed=4), dout, inp, weight, rrms
        check_twin(runtime, "rmsnorm_backward", *args, offset=offset)


def test_sizes_that_a_kernel_cannot_hold_are_refused(emulator):
    device, x = cuda.device(emulator), emulator.zeros((1, 2052))
    with pytest.raises(UserError, match="2052 channels, on a GPU at most 2048"):
        device.rmsnorm_backward(x, x[0], x, x, x[0], x[0])
