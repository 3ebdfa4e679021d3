"""The mixture of depth platters."""

import numpy as np
import pytest
from check_op import check_gradients, check_op, check_twin, nan, place, relative, rounded
from test_fusion_matrix import MODES, matrix_of

from kernels import cpu, cuda
from kernels.cpu.torus.fusion_matrix import FUSIONS, fusion_init
from kernels.cuda.torus import depth_fusion
from llmc.errors import UserError

RANK = {1: 1, 2: 1, 3: 2, 4: 3, 8: 2}


def fused(inp, omega, NH, depth_major=0):
    out = np.full_like(inp, np.nan)
    cpu.depth_fusion_forward(out, inp, omega, NH, depth_major)
    return out


@pytest.mark.parametrize("depth_major", [0, 1])
@pytest.mark.parametrize("D", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("name", FUSIONS)
def test_gradients(name, D, depth_major):
    """inp and, where there are any, both factors; what was in dfirst and dsecond stays, dinp is overwritten."""
    mode, N, NH, hd = MODES[name], 5, 3, 2
    width = {2: RANK[D], 3: RANK[D], 4: D}.get(mode)
    shapes = dict(inp=(N, NH * D * hd)) | (dict(first=(D, width), second=(D, width)) if width else {})

    def forward(inp, first=None, second=None):
        omega = matrix_of(mode, D, first, second, inp.dtype)
        return fused(inp, omega, NH, depth_major), omega

    def backward(dout, saved, inp, first=None, second=None):
        dinp, domega = np.full_like(inp, np.nan), np.zeros((D, D), inp.dtype)
        dfirst, dsecond = (None if x is None else np.full_like(x, 3) for x in (first, second))
        cpu.depth_fusion_backward(dinp, domega if width else None, dout, inp, saved[1], NH, depth_major)
        cpu.fusion_matrix_backward(dfirst, dsecond, domega if width else None, saved[1], first, second, mode)
        return dict(inp=dinp) | (dict(first=dfirst - 3, second=dsecond - 3) if width else {})

    if name == "attention" and D == 1:  # omega is 1 whatever the factors: their gradients are 0, relative to nothing
        ones = np.ones((1, 1))
        grads = backward(np.ones((N, NH * hd)), (None, ones), np.ones((N, NH * hd)), ones, ones)
        assert not grads["first"].any() and not grads["second"].any()
    else:
        check_gradients(forward, backward, **shapes)


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
    (1400, 4, 4, 24, 0),  # several blocks on the CPU
]


@pytest.mark.parametrize("depth_major", [0, 1])
@pytest.mark.parametrize("N, NH, D, hd, offset", SIZES)
def test_depth_fusion(device, N, NH, D, hd, offset, depth_major):
    C = NH * D * hd
    given = dict(inp=(N, C), omega=(D, D), NH=NH, depth_major=depth_major)
    check_op(device, "depth_fusion", dict(out=(N, C)), ("domega",), offset, **given)
    if device is not cpu:  # a matrix that is fixed
        args = nan(N, C), None, rounded(N, C, seed=1), rounded(N, C), rounded(D, D, seed=2), NH, depth_major
        check_twin(device, "depth_fusion_backward", *args, offset=offset)


def test_layouts_by_hand():
    """Two heads of two platters of two channels: [h][k][m] in, [h][k'][m] or [k'][h][m] out."""
    inp = np.array([[1.0, 2, 10, 20, 3, 4, 30, 40]])
    omega = np.array([[1.0, 5], [2, 7]])  # platter 0 of out: 1 x platter 0 + 2 x platter 1
    head = [21, 42, 75, 150], [63, 84, 225, 300]
    assert fused(inp, omega, 2).tolist() == [[*head[0], *head[1]]]
    assert fused(inp, omega, 2, depth_major=1).tolist() == [[21, 42, 63, 84, 75, 150, 225, 300]]


@pytest.mark.parametrize("D", [1, 2, 4, 8])
def test_depth_major_is_a_permutation_of_the_columns(D):
    rng = np.random.default_rng(D)
    inp, omega = rng.standard_normal((7, 3 * D * 4)), rng.standard_normal((D, D))
    order = np.arange(3 * D * 4).reshape(3, D, 4).transpose(1, 0, 2).ravel()
    head = fused(inp, omega, 3)
    assert (fused(inp, omega, 3, depth_major=1) == head[:, order]).all()
    dout = rng.standard_normal(inp.shape)
    grads = []
    for depth_major, gradient in ((0, dout), (1, dout[:, order])):
        dinp, domega = np.empty_like(inp), np.zeros((D, D))
        cpu.depth_fusion_backward(dinp, domega, np.ascontiguousarray(gradient), inp, omega, 3, depth_major)
        grads.append((dinp, domega))
    assert (grads[0][0] == grads[1][0]).all() and relative(grads[1][1], grads[0][1]) < 1e-14


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_one_platter_returns_the_bits(dtype):
    """With every kind of zero and what is no number."""
    inp = np.array([[0.0, -0.0, 1e-42, np.inf], [-np.inf, np.nan, -3.5, 1 / 3]], dtype)
    for name in ("identity", "mean", "low_rank", "low_rank_residual", "attention"):
        first, second = fusion_init(MODES[name], 1, 1, np.random.default_rng(3))
        out = fused(inp, matrix_of(MODES[name], 1, first, second, dtype), 2)
        assert out.tobytes() == inp.tobytes(), name


@pytest.mark.parametrize("D", [1, 2, 4, 8, 16, 64])
def test_identity_is_exact(D):
    inp = np.random.default_rng(D).standard_normal((33, 128), np.float32)
    omega = matrix_of(MODES["identity"], D, dtype=np.float32)
    assert (omega == np.eye(D)).all()
    assert (fused(inp, omega, 2) == inp).all()
    dinp = np.empty_like(inp)
    cpu.depth_fusion_backward(dinp, None, inp, inp, omega, 2)
    assert (dinp == inp).all()


@pytest.mark.parametrize("D", [1, 2, 4, 8])
def test_mean_is_idempotent(D):
    omega = matrix_of(MODES["mean"], D)
    assert (omega == 1 / D).all() and (omega @ omega == omega).all()
    inp = np.random.default_rng(D).standard_normal((5, 2 * D * 3))
    once = fused(inp, omega, 2)
    assert relative(once.reshape(5, 2, D, 3), inp.reshape(5, 2, D, 3).mean(axis=2, keepdims=True)) < 1e-15
    assert relative(fused(once, omega, 2), once) < 1e-15


@pytest.mark.parametrize("D", [1, 2, 8])
def test_rows_are_independent_bit_for_bit(D):
    """What other rows hold, even NaN, changes nothing; nor does their number."""
    rng = np.random.default_rng(D)
    inp, omega = rng.standard_normal((40, 2 * D * 8), np.float32), rng.standard_normal((D, D), np.float32)
    whole = fused(inp, omega, 2)[:17].tobytes()
    assert fused(inp[:17], omega, 2).tobytes() == whole
    inp[17:] = np.nan
    assert fused(inp, omega, 2)[:17].tobytes() == whole


# ----------------------------------------------------------------------------------------------------------------------
# on CUDA: the emulator, and a GPU if there is one


def test_blocks_that_take_several_tiles(emulator, monkeypatch):
    monkeypatch.setattr(depth_fusion, "BLOCKS", 3)
    for D, hd in ((2, 32), (40, 4)):
        inp, dout, omega = rounded(150, 2 * D * hd), rounded(150, 2 * D * hd, seed=1), rounded(D, D)
        check_twin(emulator, "depth_fusion_forward", nan(*inp.shape), inp, omega, 2)
        check_twin(emulator, "depth_fusion_backward", nan(*inp.shape), rounded(D, D, seed=3), dout, inp, omega, 2)


@pytest.mark.parametrize("D", [1, 2, 8])
def test_identity_is_exact_on_cuda(runtime, D):
    """One platter keeps -0, too."""
    device, inp = cuda.device(runtime), rounded(9, 48).astype(np.float32)
    inp[0, :3] = 0, -0.0, np.float32(1e-30)
    out, ours, omega = (place(runtime, x, 0) for x in (nan(9, 48), inp, nan(D, D)))
    device.fusion_matrix_forward(omega, None, None, FUSIONS.index("identity"))
    device.depth_fusion_forward(out, ours, omega, 3)
    assert (runtime.to_host(out) == inp).all()
    assert D > 1 or runtime.to_host(out).tobytes() == inp.tobytes()


@pytest.mark.parametrize("D", [1, 4])
def test_rows_are_independent_bit_for_bit_on_cuda(runtime, D):
    """What comes after may even be NaN."""
    device, inp, results = cuda.device(runtime), rounded(40, 2 * D * 8), []
    omega = place(runtime, rounded(D, D), 0)
    for _ in range(2):
        out, ours = place(runtime, nan(*inp.shape), 0), place(runtime, inp, 0)
        device.depth_fusion_forward(out, ours, omega, 2)
        results.append(runtime.to_host(out)[:17])
        inp[17:] = np.nan
    assert np.isfinite(results[0]).all() and results[0].tobytes() == results[1].tobytes()


@pytest.mark.parametrize("D, hd", [(65, 1), (1, 260), (9, 256)])
def test_sizes_that_a_kernel_cannot_hold_are_refused(emulator, D, hd):
    device, x, omega = cuda.device(emulator), emulator.zeros((1, D * hd)), emulator.zeros((D, D))
    for refused in (
        lambda: device.depth_fusion_forward(x, x, omega, 1),
        lambda: device.depth_fusion_backward(x, omega, x, x, omega, 1),
    ):
        with pytest.raises(UserError, match=f"{D} platters of {hd} channels, on a GPU at most 64 of 256, and 2048 a"):
            refused()
