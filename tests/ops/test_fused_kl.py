"""The divergence of the indexer from attention, and its gradient."""

import numpy as np
import pytest
from check_op import check_gradients, check_twin, nan, relative, rounded, run
from selected_keys import INF

from kernels import cpu

SIZES = [  # B, R, S, first, offset
    (1, 1, 2, 1, 0), (2, 9, 14, 5, 0), (1, 10, 132, 3, 1), (3, 7, 128, 0, 0), (1, 70, 1000, 30, 0),
]  # fmt: skip


@pytest.mark.parametrize("B, R, S, first, offset", SIZES)
def test_fused_kl(B, R, S, first, offset):
    rng = np.random.default_rng(6)
    p = rng.random((B, R, S)) * (rng.random((B, R, S)) < 0.7)  # zeros; the gradient holds for any sum
    hidden = (rng.random((B, R, S)) < 0.3) & (np.arange(S) > 0)
    p[hidden] = 0
    p /= p.max()

    def run(scores, dscale):
        scores, losses = (
            np.where(hidden, -INF, scores).astype(scores.dtype),
            np.full((B, first + R), np.nan, scores.dtype),
        )
        cpu.fused_kl(losses, scores, p.astype(scores.dtype), dscale, first)
        assert np.isnan(losses[:, :first]).all() and not scores[hidden].any()
        return losses[:, first:], scores

    def forward(scores):
        return (run(scores, 1.0)[0].sum(keepdims=True),)

    check_gradients(forward, lambda dout, saved, scores: dict(scores=run(scores, dout.item())[1]), scores=(B, R, S))
    scores = rng.standard_normal((B, R, S))
    losses, _ = run(scores, 1.0)
    e = np.where(hidden, 0, np.exp(scores))
    log_q = scores - np.log(e.sum(axis=2, keepdims=True))
    assert relative(losses, np.sum(p * (np.log(np.where(p > 0, p, 1)) - log_q), axis=2)) < 1e-12


def test_kl_of_equal_distributions_and_of_one_key():
    x = 3 * np.random.default_rng(7).standard_normal((1, 5, 9))
    x[0, 0, 1:] = -INF
    p = np.exp(x) / np.exp(x).sum(axis=2, keepdims=True)
    p[0, 0, 0] = 0.9999999
    losses = np.full((1, 5), np.nan)
    cpu.fused_kl(losses, x, p, 2.0)
    assert np.abs(losses[0, 1:]).max() < 1e-14 and np.abs(x).max() < 1e-15 and not x[0, 0].any()


# ----------------------------------------------------------------------------------------------------------------------
# on CUDA: the emulator, and a GPU if there is one


@pytest.mark.parametrize("B, R, S, first, offset", SIZES)
def test_fused_kl_on_cuda(runtime, B, R, S, first, offset):
    rng = np.random.default_rng(6)
    scores, p = 3 * rounded(B, R, S), rng.random((B, R, S)).astype("f").astype("d")
    hidden = (rng.random((B, R, S)) < 0.3) & (np.arange(S) > 0)
    scores[hidden], p[hidden | (rng.random(p.shape) < 0.1)] = -INF, 0
    losses = np.zeros((B, first + R))
    check_twin(runtime, "fused_kl", losses, scores, p, 0.3, first, offset=offset)


def test_a_query_with_one_key_has_no_divergence(runtime):
    scores = np.full((1, 6, 5), -INF)
    scores[0, :, 0] = [1.1, -3.3, 1e6, 0, 77.7, 1e-30]
    p = np.zeros((1, 6, 5))
    p[0, :, 0] = [1, 0.9999999, 0.9999998, 1.0000001, 0.3, 1]
    losses, gradient, *_ = run(runtime, "fused_kl", nan(1, 6), scores, p, 0.37, 0)
    assert not gradient.any() and np.abs(losses[0, [0, 1, 2, 3, 5]]).max() <= 3e-7
