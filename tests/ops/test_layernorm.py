"""Layer normalisation, alone and fused with the residual sum."""

import numpy as np
import pytest
from check_op import check_gradients, check_twin, nan, rounded

from kernels import cpu, cuda
from llmc.errors import UserError


@pytest.mark.parametrize("N, C", [(1, 4), (7, 36), (64, 768), (1500, 512)])  # the last one is two blocks of rows
def test_layernorm(N, C):
    def forward(inp, weight, bias):
        out, mean, rstd = np.empty_like(inp), np.empty(N, inp.dtype), np.empty(N, inp.dtype)
        cpu.layernorm_forward(out, mean, rstd, inp, weight, bias)
        return out, mean, rstd

    def backward(dout, saved, inp, weight, bias):
        dinp, dweight, dbias = np.zeros_like(inp), np.zeros_like(weight), np.zeros_like(bias)
        cpu.layernorm_backward(dinp, dweight, dbias, dout, inp, weight, *saved[1:])
        return dict(inp=dinp, weight=dweight, bias=dbias)

    check_gradients(forward, backward, inp=(N, C), weight=(C,), bias=(C,))


# ----------------------------------------------------------------------------------------------------------------------
# on CUDA: the emulator, and a GPU if there is one


@pytest.mark.parametrize("N, C, offset", [
    (1, 4, 0), (1, 1, 0), (7, 36, 0), (9, 50, 0), (33, 768, 0), (5, 64, 1), (600, 16, 0), (3, 1600, 0), (2, 4096, 0),
    (2, 1030, 0),
])  # fmt: skip
def test_layernorm_on_cuda(runtime, N, C, offset):
    inp, inp2, weight, bias = rounded(N, C), rounded(N, C, seed=1), rounded(C, seed=2), rounded(C, seed=3)
    check_twin(runtime, "layernorm_forward", nan(N, C), nan(N), nan(N), inp, weight, bias, offset=offset)
    outs = nan(N, C), nan(N, C), nan(N), nan(N)
    check_twin(runtime, "fused_residual_forward", *outs, inp, inp2, weight, bias, offset=offset)
    mean, var = inp.mean(axis=1), inp.var(axis=1)
    args = inp2, weight, bias, rounded(N, C, seed=4), inp, weight, mean, 1 / np.sqrt(var + 1e-5)
    check_twin(runtime, "layernorm_backward", *args, offset=offset)


def test_sizes_that_a_kernel_cannot_hold_are_refused(emulator):
    device, x = cuda.device(emulator), emulator.zeros((1, 4100))
    with pytest.raises(UserError, match="4100 channels, on a GPU at most 4096"):
        device.layernorm_backward(x, x[0], x[0], x, x, x[0], x, x)
