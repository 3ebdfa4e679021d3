"""Products of banded weights, by blocks or dense."""

import numpy as np
import pytest
from check_op import check_gradients, check_twin, nan, relative, rounded

from kernels import cpu
from kernels.cpu.band.band_matmul import best_channels, blocks_of_band


@pytest.mark.parametrize("C, bandwidth", [(16, 8), (96, 30), (128, 256), (192, 1), (200, 77), (200, 501)])
@pytest.mark.parametrize("layer", ["FC1", "FC2"])
def test_band_matmul(C, bandwidth, layer):
    """By blocks or dense, the products of a banded weight and their gradients, which are zero outside the band."""
    N, (OC, IC) = (7 if C == 200 else 300), (4 * C, C) if layer == "FC1" else (C, 4 * C)
    by_blocks = (C, bandwidth) in [(96, 30), (192, 1), (200, 77)] or (C, layer) == (128, "FC1")
    assert bool(best_channels(OC, IC, bandwidth, N)) == by_blocks
    band = np.ones((1, OC, IC))
    cpu.band_mask(band, bandwidth)

    def forward(inp, weight, bias):
        out = np.full((N, OC), np.nan, inp.dtype)
        cpu.band_matmul_forward(out, inp, (weight * band[0]).astype(inp.dtype), bias, bandwidth)
        return (out,)

    def backward(dout, saved, inp, weight, bias):
        weight = (weight * band[0]).astype(inp.dtype)
        dinp, dweight, dbias = np.full_like(inp, np.nan), np.zeros_like(weight), np.zeros_like(bias)
        cpu.band_matmul_backward(dinp, dweight, dbias, dout, inp, weight, bandwidth)
        once = dweight.copy()
        cpu.band_matmul_backward(dinp, dweight, dbias, dout, inp, weight, bandwidth, beta=1)
        assert relative(dweight, 2 * once) < 1e-6 and not dweight[band[0] == 0].any()
        return dict(inp=dinp, weight=once, bias=dbias / 2)

    check_gradients(forward, backward, inp=(N, IC), weight=(OC, IC), bias=(OC,))


def test_blocks_are_chosen_by_what_they_promise():
    assert [best_channels(3072, 768, 256, N) for N in (1, 16, 256, 1024, 4096)] == [32] * 5
    assert [best_channels(512, 128, 256, N) for N in (1, 16, 256)] == [0, 0, 32]  # calls cost more than they save
    blocks = blocks_of_band(3072, 768, 256, 32)  # 24 of 128 x 96, the outer two 32 less
    assert sum((r.stop - r.start) * (c.stop - c.start) for r, c in blocks) == 24 * 128 * 96 - 2 * 32 * 128
    assert best_channels(3072, 768, 64, 4096) < best_channels(3072, 768, 2048, 4096) == 64
    assert best_channels(512, 128, 512, 256) == best_channels(3072, 768, 8 * 768, 4096) == 0  # not worth it


# ----------------------------------------------------------------------------------------------------------------------
# on CUDA: the emulator, and a GPU if there is one


def banded(weight, bandwidth) -> np.ndarray:
    cpu.band_mask(weight[None], bandwidth)
    return weight


@pytest.mark.parametrize("N, OC, C, bandwidth", [
    (1, 16, 4, 1), (5, 64, 16, 7), (130, 256, 64, 40), (3, 300, 75, 30), (5, 16, 64, 7), (130, 64, 256, 40),
    (3, 75, 300, 31), (9, 64, 16, 1000), (4, 64, 16, 0),
])  # fmt: skip
def test_band_matmul_on_cuda(runtime, N, OC, C, bandwidth):
    inp, bias, dout = rounded(N, C), rounded(OC), rounded(N, OC)
    weight = banded(rounded(OC, C), bandwidth) if bandwidth else rounded(OC, C)
    check_twin(runtime, "band_matmul_forward", nan(N, OC), inp, weight, bias, bandwidth)
    for beta in (0, 1):
        dweight = weight if beta else np.zeros((OC, C))
        check_twin(runtime, "band_matmul_backward", nan(N, C), dweight, bias, dout, inp, weight, bandwidth, beta)
