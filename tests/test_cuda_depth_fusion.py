"""CUDA's depth fusion against NumPy's, on the emulator and on a GPU if any."""

import numpy as np
import pytest
from check_op import relative
from test_cuda_kernels import check, nan, place, rounded

from kernels import cpu, cuda
from kernels.cpu.torus.fusion_matrix import FUSIONS, fusion_init
from kernels.cuda.torus import depth_fusion
from llmc.errors import UserError

SIZES = [  # N, NH, D, hd, offset
    (1, 1, 1, 1, 0),
    (3, 2, 1, 4, 0),
    (9, 3, 2, 8, 0),
    (5, 2, 3, 5, 0),
    (70, 12, 4, 4, 0),  # several tiles
    (7, 2, 4, 4, 1),
    (5, 3, 8, 8, 0),
    (11, 1, 16, 2, 0),
    (2, 2, 33, 4, 0),
    (3, 2, 64, 1, 0),
    (9, 1, 8, 256, 0),  # the widest head: a tile
    (2, 2, 2, 6, 0),
    (3, 1, 2, 66, 2),
]


@pytest.mark.parametrize("depth_major", [0, 1])
@pytest.mark.parametrize("N, NH, D, hd, offset", SIZES)
def test_depth_fusion(runtime, N, NH, D, hd, offset, depth_major):
    C = NH * D * hd
    inp, dout, omega, domega = rounded(N, C), rounded(N, C, seed=1), rounded(D, D, seed=2), rounded(D, D, seed=3)
    check(runtime, "depth_fusion_forward", nan(N, C), inp, omega, NH, depth_major, offset=offset)
    check(runtime, "depth_fusion_backward", nan(N, C), domega, dout, inp, omega, NH, depth_major, offset=offset)
    check(runtime, "depth_fusion_backward", nan(N, C), None, dout, inp, omega, NH, depth_major, offset=offset)


def test_blocks_that_take_several_tiles(emulator, monkeypatch):
    monkeypatch.setattr(depth_fusion, "BLOCKS", 3)
    for D, hd in ((2, 32), (40, 4)):
        inp, dout, omega = rounded(150, 2 * D * hd), rounded(150, 2 * D * hd, seed=1), rounded(D, D)
        check(emulator, "depth_fusion_forward", nan(*inp.shape), inp, omega, 2)
        check(emulator, "depth_fusion_backward", nan(*inp.shape), rounded(D, D, seed=3), dout, inp, omega, 2)


@pytest.mark.parametrize("D", [1, 2, 8])
def test_identity_is_exact(runtime, D):
    """One platter keeps -0, too."""
    device, inp = cuda.device(runtime), rounded(9, 48).astype(np.float32)
    inp[0, :3] = 0, -0.0, np.float32(1e-30)
    out, ours, omega = (place(runtime, x, 0) for x in (nan(9, 48), inp, nan(D, D)))
    device.fusion_matrix_forward(omega, None, None, FUSIONS.index("identity"))
    device.depth_fusion_forward(out, ours, omega, 3)
    assert (runtime.to_host(out) == inp).all()
    assert D > 1 or runtime.to_host(out).tobytes() == inp.tobytes()


@pytest.mark.parametrize("D", [1, 4])
def test_rows_are_independent_bit_for_bit(runtime, D):
    """What comes after may even be NaN."""
    device, inp, results = cuda.device(runtime), rounded(40, 2 * D * 8), []
    omega = place(runtime, rounded(D, D), 0)
    for _ in range(2):
        out, ours = place(runtime, nan(*inp.shape), 0), place(runtime, inp, 0)
        device.depth_fusion_forward(out, ours, omega, 2)
        results.append(runtime.to_host(out)[:17])
        inp[17:] = np.nan
    assert np.isfinite(results[0]).all() and results[0].tobytes() == results[1].tobytes()


@pytest.mark.parametrize("D, rank", [(1, 1), (2, 1), (5, 3), (8, 8), (33, 2), (128, 32)])
@pytest.mark.parametrize("name", FUSIONS)
def test_fusion_matrix(runtime, name, D, rank):
    mode = FUSIONS.index(name)
    width = {"attention": D, "low_rank": rank, "low_rank_residual": rank}.get(name)
    first, second = (rounded(D, width, seed=i) if width else None for i in range(2))
    check(runtime, "fusion_matrix_forward", nan(D, D), first, second, mode)
    if not width:
        cuda.device(runtime).fusion_matrix_backward(None, None, None, None, None, None, mode)
        return
    omega = np.empty((D, D))
    cpu.fusion_matrix_forward(omega, first, second, mode)
    dfirst, dsecond = rounded(D, width, seed=3), rounded(D, width, seed=4)
    check(runtime, "fusion_matrix_backward", dfirst, dsecond, rounded(D, D, seed=5), omega, first, second, mode)


def test_fusions_at_the_start(runtime):
    """low_rank of one platter is exactly 1, the residual exactly the identity, on this device as well."""
    device = cuda.device(runtime)
    for name, D, expected in (
        ("low_rank", 1, [[1.0]]),
        ("low_rank_residual", 4, np.eye(4)),
        ("mean", 3, np.full((3, 3), np.float32(1 / 3))),
    ):
        mode = FUSIONS.index(name)
        factors = fusion_init(mode, D, 1, np.random.default_rng(1))
        omega = place(runtime, nan(D, D), 0)
        factors = [None if factor is None else runtime.to_device(factor) for factor in factors]
        device.fusion_matrix_forward(omega, *factors, mode)
        assert (runtime.to_host(omega) == expected).all(), name


def test_attention_of_large_scores(runtime):
    device, mode = cuda.device(runtime), FUSIONS.index("attention")
    omega, first, second = (place(runtime, x, 0) for x in (nan(8, 8), 300 * rounded(8, 8), rounded(8, 8, seed=1)))
    device.fusion_matrix_forward(omega, first, second, mode)
    assert relative(runtime.to_host(omega).sum(axis=1), np.ones(8)) < 1e-6


@pytest.mark.parametrize("D, hd", [(65, 1), (1, 260), (9, 256)])
def test_sizes_that_a_kernel_cannot_hold_are_refused(emulator, D, hd):
    device, x, omega = cuda.device(emulator), emulator.zeros((1, D * hd)), emulator.zeros((D, D))
    for refused in (
        lambda: device.depth_fusion_forward(x, x, omega, 1),
        lambda: device.depth_fusion_backward(x, omega, x, x, omega, 1),
    ):
        with pytest.raises(UserError, match=f"{D} platters of {hd} channels, on a GPU at most 64 of 256, and 2048 a"):
            refused()
