"""The matrix that mixes depth platters."""

import numpy as np
import pytest
from check_op import check_op, check_twin, nan, place, relative, rounded

from kernels import cpu, cuda
from kernels.cpu.torus.fusion_matrix import FUSIONS, fusion_init

MODES = {name: mode for mode, name in enumerate(FUSIONS)}


def matrix_of(mode, D, first=None, second=None, dtype=np.float64):
    omega = np.full((D, D), np.nan, dtype)
    cpu.fusion_matrix_forward(omega, first, second, mode)
    return omega


def drawn(mode, D, rank, seed=0):
    """fusion_init's factors in float64."""
    factors = fusion_init(mode, D, rank, np.random.default_rng(seed))
    return [None if factor is None else factor.astype(np.float64) for factor in factors]


def test_names():
    assert FUSIONS == ("identity", "mean", "low_rank", "low_rank_residual", "attention")


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
    cpu.fusion_matrix_backward(dfirst, dsecond, np.eye(D), omega, first, second, mode)
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
            cpu.fusion_matrix_backward(None, None, None, None, None, None, MODES[name])


@pytest.mark.parametrize("rank", [0, 5, -1])
def test_a_rank_outside_1_to_D_is_refused(rank):
    for name in ("low_rank", "low_rank_residual"):
        with pytest.raises(ValueError, match=f"rank {rank} of a fusion of 4 platters, expected 1 to 4"):
            fusion_init(MODES[name], 4, rank, np.random.default_rng(0))


# ----------------------------------------------------------------------------------------------------------------------
# on CUDA: the emulator, and a GPU if there is one


@pytest.mark.parametrize("D, rank", [(1, 1), (2, 1), (5, 3), (8, 8), (33, 2), (128, 32)])
@pytest.mark.parametrize("name", FUSIONS)
def test_fusion_matrix(device, name, D, rank):
    mode = FUSIONS.index(name)
    width = {"attention": D, "low_rank": rank, "low_rank_residual": rank}.get(name)
    if width:
        given = dict(first=(D, width), second=(D, width), mode=mode)
        check_op(device, "fusion_matrix", dict(omega=(D, D)), ("dfirst", "dsecond"), **given)
    elif device is cpu:
        assert np.isfinite(matrix_of(mode, D)).all()
    else:
        check_twin(device, "fusion_matrix_forward", nan(D, D), None, None, mode)
        cuda.device(device).fusion_matrix_backward(None, None, None, None, None, None, mode)


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
