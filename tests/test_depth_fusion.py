"""Depth fusion on the CPU: gradients of every mode through matrix and mixture, exact properties, layouts by hand."""

import numpy as np
import pytest
from check_op import check_op, relative

from kernels import cpu as ops
from kernels.cpu.torus.fusion_matrix import FUSIONS, fusion_init

MODES = {name: mode for mode, name in enumerate(FUSIONS)}
RANK = {1: 1, 2: 1, 3: 2, 4: 3, 8: 2}


def matrix_of(mode, D, first=None, second=None, dtype=np.float64):
    omega = np.full((D, D), np.nan, dtype)
    ops.fusion_matrix_forward(omega, first, second, mode)
    return omega


def drawn(mode, D, rank, seed=0):
    """fusion_init's factors in float64."""
    factors = fusion_init(mode, D, rank, np.random.default_rng(seed))
    return [None if factor is None else factor.astype(np.float64) for factor in factors]


def fused(inp, omega, NH, depth_major=0):
    out = np.full_like(inp, np.nan)
    ops.depth_fusion_forward(out, inp, omega, NH, depth_major)
    return out


def test_names():
    assert FUSIONS == ("identity", "mean", "low_rank", "low_rank_residual", "attention")


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
        ops.depth_fusion_backward(dinp, domega if width else None, dout, inp, saved[1], NH, depth_major)
        ops.fusion_matrix_backward(dfirst, dsecond, domega if width else None, saved[1], first, second, mode)
        return dict(inp=dinp) | (dict(first=dfirst - 3, second=dsecond - 3) if width else {})

    if name == "attention" and D == 1:  # omega is 1 whatever the factors: their gradients are 0, relative to nothing
        ones = np.ones((1, 1))
        grads = backward(np.ones((N, NH * hd)), (None, ones), np.ones((N, NH * hd)), ones, ones)
        assert not grads["first"].any() and not grads["second"].any()
    else:
        check_op(forward, backward, **shapes)


@pytest.mark.parametrize("depth_major", [0, 1])
def test_gradient_of_omega(depth_major):
    """By itself, over several blocks of rows; it accumulates; float32 follows."""
    N, NH, D, hd = 1400, 4, 4, 24

    def forward(inp, omega):
        return (fused(inp, omega, NH, depth_major),)

    def backward(dout, saved, inp, omega):
        dinp, domega = np.full_like(inp, np.nan), np.full_like(omega, 5)
        ops.depth_fusion_backward(dinp, domega, dout, inp, omega, NH, depth_major)
        return dict(inp=dinp, omega=domega - 5)

    check_op(forward, backward, inp=(N, NH * D * hd), omega=(D, D))


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
        ops.depth_fusion_backward(dinp, domega, np.ascontiguousarray(gradient), inp, omega, 3, depth_major)
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
    ops.depth_fusion_backward(dinp, None, inp, inp, omega, 2)
    assert (dinp == inp).all()


@pytest.mark.parametrize("D", [1, 2, 4, 8])
def test_mean_is_idempotent(D):
    omega = matrix_of(MODES["mean"], D)
    assert (omega == 1 / D).all() and (omega @ omega == omega).all()
    inp = np.random.default_rng(D).standard_normal((5, 2 * D * 3))
    once = fused(inp, omega, 2)
    assert relative(once.reshape(5, 2, D, 3), inp.reshape(5, 2, D, 3).mean(axis=2, keepdims=True)) < 1e-15
    assert relative(fused(once, omega, 2), once) < 1e-15


@pytest.mark.parametrize("D, rank", [(1, 1), (2, 1), (2, 2), (4, 1), (4, 3), (8, 2), (8, 8)])
def test_low_rank_at_the_start(D, rank):
    """rank singular values, all 1 / sqrt(rank); the residual is the identity, its zeros have a gradient."""
    first, second = drawn(MODES["low_rank"], D, rank)
    singular = np.linalg.svd(matrix_of(MODES["low_rank"], D, first, second), compute_uv=False)
    assert np.abs(singular[:rank] - rank**-0.5).max() < 1e-6 and (singular[rank:] < 1e-7).all()
    for factor in (first, second):
        assert np.abs(factor.T @ factor - np.eye(rank)).max() < 1e-6 and (np.diagonal(factor) > 0).all()

    mode = MODES["low_rank_residual"]
    first, second = drawn(mode, D, rank)
    omega = matrix_of(mode, D, first, second)
    assert (omega == np.eye(D)).all() and not second.any() and np.abs(first.T @ first - np.eye(rank)).max() < 1e-6
    dfirst, dsecond = np.zeros_like(first), np.zeros_like(second)
    ops.fusion_matrix_backward(dfirst, dsecond, np.eye(D), omega, first, second, mode)
    assert not dfirst.any() and relative(dsecond, first / np.sqrt(rank)) < 1e-15


def test_low_rank_of_one_platter_starts_as_exactly_one():
    for seed in range(20):  # half of the Gaussians are negative
        first, second = fusion_init(MODES["low_rank"], 1, 1, np.random.default_rng(seed))
        assert matrix_of(MODES["low_rank"], 1, first, second, np.float32).tolist() == [[1.0]]


@pytest.mark.parametrize("D", [1, 2, 5, 8])
def test_rows_of_attention_sum_to_one(D):
    first, second = drawn(MODES["attention"], D, None)
    for scale in (1, 300):  # scores that would overflow
        omega = matrix_of(MODES["attention"], D, scale * first, second)
        assert np.abs(omega.sum(axis=1) - 1).max() < 1e-14 and (omega >= 0).all()
    if D > 1:
        assert np.abs(matrix_of(MODES["attention"], D, first, second).sum(axis=0) - 1).max() > 1e-2  # columns do not


@pytest.mark.parametrize("D, rank", [(1, 1), (4, 1), (4, 4), (8, 2)])
def test_parameter_counts(D, rank):
    counts = {"identity": 0, "mean": 0, "low_rank": 2 * D * rank, "low_rank_residual": 2 * D * rank}
    for name, count in (counts | {"attention": 2 * D * D}).items():
        factors = fusion_init(MODES[name], D, rank, np.random.default_rng(0))
        if count:
            assert sum(factor.size for factor in factors) == count
            assert all(factor.dtype == np.float32 and len(factor) == D for factor in factors)
        else:
            assert factors == (None, None)
            ops.fusion_matrix_backward(None, None, None, None, None, None, MODES[name])


@pytest.mark.parametrize("rank", [0, 5, -1])
def test_a_rank_outside_1_to_D_is_refused(rank):
    for name in ("low_rank", "low_rank_residual"):
        with pytest.raises(ValueError, match=f"rank {rank} of a fusion of 4 platters, expected 1 to 4"):
            fusion_init(MODES[name], 4, rank, np.random.default_rng(0))


@pytest.mark.parametrize("D", [1, 2, 8])
def test_rows_are_independent_bit_for_bit(D):
    """What other rows hold, even NaN, changes nothing; nor does their number."""
    rng = np.random.default_rng(D)
    inp, omega = rng.standard_normal((40, 2 * D * 8), np.float32), rng.standard_normal((D, D), np.float32)
    whole = fused(inp, omega, 2)[:17].tobytes()
    assert fused(inp[:17], omega, 2).tobytes() == whole
    inp[17:] = np.nan
    assert fused(inp, omega, 2)[:17].tobytes() == whole
