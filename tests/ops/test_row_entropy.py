"""The entropy of a row of scores."""

import numpy as np
import pytest
from check_op import check_twin, rounded
from selected_keys import INF

from kernels import cpu

SIZES = [  # B, R, S, first, offset
    (1, 1, 1, 0, 0), (2, 1, 1, 0, 0), (2, 20, 20, 0, 0), (2, 7, 25, 13, 0), (2, 9, 14, 5, 0), (1, 10, 132, 90, 1),
    (1, 40, 40, 0, 0),
]  # fmt: skip


@pytest.mark.parametrize("B, R, S, first, offset", SIZES)
def test_row_entropy(B, R, S, first, offset):
    x = 2 * np.random.default_rng(8).standard_normal((B, R, S))
    x[:, np.tri(R, S, first) == 0] = np.nan  # not looked at
    x[B - 1, R // 2, 0] = -INF if R > 1 else 0
    entropy = np.full((B, R + 1), np.nan)
    cpu.row_entropy(entropy, x, first, first - 1)
    for b, r in np.ndindex(B, R):
        e = np.exp(x[b, r, : first + r + 1])
        q = e[e > 0] / e.sum()
        expected = -(q * np.log(q)).sum() / np.log(first + r + 1) if first + r else 0
        assert abs(entropy[b, r + 1] - expected) < 1e-12
    assert np.isnan(entropy[:, 0]).all()


def test_entropy_is_1_of_equals_and_0_of_a_peak():
    for dtype in "fd":
        x, entropy = np.full((1, 50, 50), 3, dtype), np.empty((1, 50), dtype)
        cpu.row_entropy(entropy, x, 0)
        assert entropy[0, 0] == 0 and np.abs(entropy[0, 1:] - 1).max() < 1e-6 and entropy.max() <= 1
        x[:, :, 0] = 1000
        cpu.row_entropy(entropy, x, 0)
        assert not entropy.any()


# ----------------------------------------------------------------------------------------------------------------------
# on CUDA: the emulator, and a GPU if there is one


@pytest.mark.parametrize("B, R, S, first, offset", SIZES)
def test_row_entropy_on_cuda(runtime, B, R, S, first, offset):
    scores = 2 * rounded(B, R, S)
    scores[:, R // 2, 0] = -INF if first else 0
    scores[:, np.tri(R, S, first) == 0] = np.nan  # not looked at
    check_twin(runtime, "row_entropy", np.zeros((B, R + 2)), scores, first, first - 1, offset=offset)
