"""AdamW."""

import numpy as np
import pytest
from check_op import check_twin, relative, rounded

from kernels import cpu


def test_adamw_follows_the_formula():
    """Three updates against AdamW as written, with weight decay and a scaled gradient, over several blocks."""
    rng, n = np.random.default_rng(8), 600_001
    p, m, v = rng.standard_normal(n), np.zeros(n), np.zeros(n)
    p2, m2, v2 = p.copy(), np.zeros(n), np.zeros(n)
    lr, b1, b2, eps, decay, scale = 1e-3, 0.9, 0.95, 1e-8, 0.1, 0.5
    for t in (1, 2, 3):
        g = rng.standard_normal(n)
        cpu.adamw_update(p, g, m, v, t, lr, b1, b2, eps, decay, scale)
        m2 = b1 * m2 + (1 - b1) * scale * g
        v2 = b2 * v2 + (1 - b2) * (scale * g) ** 2
        p2 -= lr * (m2 / (1 - b1**t) / (np.sqrt(v2 / (1 - b2**t)) + eps) + decay * p2)
    assert relative(p, p2) < 1e-14 and relative(m, m2) < 1e-14 and relative(v, v2) < 1e-14


def test_adamw_first_step_moves_by_lr():
    """m/c1 = g and sqrt(v/c2) = |g|: without decay the first update is lr, whatever the gradient's size."""
    p, g = np.zeros(4, "f"), np.array([1e-3, -5.0, 2e4, 0.0], "f")
    cpu.adamw_update(p, g, np.zeros(4, "f"), np.zeros(4, "f"), 1, 0.01, 0.9, 0.999, 1e-8, 0.0)
    assert np.abs(p - [-0.01, 0.01, -0.01, 0]).max() < 1e-6


# ----------------------------------------------------------------------------------------------------------------------
# on CUDA: the emulator, and a GPU if there is one


@pytest.mark.parametrize("n, offset, decay, scale", [(1, 0, 0.0, 1.0), (1030, 0, 0.1, 0.5), (64, 1, 0.1, 1.0)])
def test_adamw(runtime, n, offset, decay, scale):
    params, grads, m, v = (rounded(n, seed=seed) for seed in range(4))
    for t in (1, 1000):
        args = t, 1e-2, 0.9, 0.999, 1e-8, decay, scale
        check_twin(runtime, "adamw_update", params, grads, m, v * v, *args, offset=offset)
