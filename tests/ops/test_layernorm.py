"""Layer normalisation, alone and fused with the residual sum."""

import pytest
from check_op import check_op

from kernels import cuda
from llmc.errors import UserError


@pytest.mark.parametrize("N, C, offset", [
    (1, 4, 0), (1, 1, 0), (7, 36, 0), (9, 50, 0), (33, 768, 0), (64, 768, 0), (5, 64, 1), (600, 16, 0), (3, 1600, 0),
    (2, 4096, 0), (2, 1030, 0), (1500, 512, 0),
])  # fmt: skip
def test_layernorm(device, N, C, offset):
    """On the CPU the last size is two blocks of rows."""
    adds, outs = ("dinp", "dweight", "dbias"), dict(out=(N, C), mean=(N,), rstd=(N,))
    check_op(device, "layernorm", outs, adds, offset, inp=(N, C), weight=(C,), bias=(C,))
    outs = dict(residual=(N, C)) | outs
    check_op(device, "fused_residual", outs, (), offset, inp1=(N, C), inp2=(N, C), weight=(C,), bias=(C,))


# ----------------------------------------------------------------------------------------------------------------------
# on CUDA: the emulator, and a GPU if there is one


def test_sizes_that_a_kernel_cannot_hold_are_refused(emulator):
    device, x = cuda.device(emulator), emulator.zeros((1, 4100))
    with pytest.raises(UserError, match="4100 channels, on a GPU at most 4096"):
        device.layernorm_backward(x, x[0], x[0], x, x, x[0], x, x)
