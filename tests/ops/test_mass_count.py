"""How many keys hold a share of the mass."""

import numpy as np
import pytest
from check_op import run
from selected_keys import INF, blocks_of_rows

from kernels import cpu


@pytest.mark.parametrize("softmax", [0, 1])
@pytest.mark.parametrize("mass", [0.0, 0.3, 0.95, 1.0])
def test_mass_count(softmax, mass):
    rng, B, T = np.random.default_rng(9), 2, 60
    values = rng.random((B, T, T)) ** 3
    values[rng.random(values.shape) < 0.2] = 0
    values[..., 0] = 0.1  # some mass in every row
    with np.errstate(divide="ignore"):
        scores = np.log(values) + 100 if softmax else values.copy()
    keep = np.full((B, T + 1), -7, np.int32)
    for first, end in blocks_of_rows(T, 25):
        block = scores[:, first:end].copy()
        block[:, np.tri(end - first, T, first) == 0] = INF  # not looked at
        cpu.mass_count(keep, block, mass, first, -1, softmax)
    assert (keep[:, 0] == -7).all()
    for b, t in np.ndindex(B, T):
        largest = np.sort(values[b, t, : t + 1])[::-1]
        held = np.cumsum(largest)
        m, slack = keep[b, t + 1], 1e-12 * held[-1]
        assert 1 <= m <= t + 1 and held[m - 1] >= mass * held[-1] - slack
        assert m == 1 or held[m - 2] < mass * held[-1] + slack


def test_mass_of_equals_and_of_a_peak():
    keep = np.empty((1, 40), np.int32)
    cpu.mass_count(keep, np.zeros((1, 40, 40), "f"), 0.5, 0)
    assert keep[0].tolist() == [t // 2 + 1 for t in range(40)]  # half of t + 1, rounded up
    peak = np.zeros((1, 40, 40), "f")
    peak[..., 0] = 30
    cpu.mass_count(keep, peak, 0.99, 0)
    assert (keep == 1).all()


# ----------------------------------------------------------------------------------------------------------------------
# on CUDA: the emulator, and a GPU if there is one


@pytest.mark.parametrize("softmax", [0, 1])
@pytest.mark.parametrize("mass", [0.0, 0.3, 0.95, 1.0])
def test_mass_count_on_cuda(runtime, softmax, mass):
    """The same number as the CPU's, or one that holds the mass within rounding."""
    rng, B, R, S, first = np.random.default_rng(9), 2, 12, 300, 280
    values = rng.random((B, R, S)).astype("f") ** 3
    values[rng.random(values.shape) < 0.2] = 0
    values[:, 1] = 0.25  # all equal
    values[..., 0] = 0.1  # some mass in every row
    with np.errstate(divide="ignore"):
        scores = np.log(values) + 10 if softmax else values.copy()
    scores[:, np.tri(R, S, first) == 0] = INF  # not looked at
    keep = np.full((B, R + 1), -7, np.int32)
    found = run(runtime, "mass_count", keep, scores, mass, first, first - 1, softmax)[0]
    cpu.mass_count(keep, scores, mass, first, first - 1, softmax)
    assert (found[:, 0] == -7).all()
    for b, r in np.ndindex(B, R):
        held = np.cumsum(np.sort(values[b, r, : first + r + 1].astype("d"))[::-1])
        m, slack = found[b, r + 1], 1e-5 * held[-1]
        assert 1 <= m <= first + r + 1 and held[m - 1] >= mass * held[-1] - slack
        assert m == 1 or held[m - 2] <= mass * held[-1] + slack
    if mass < 1:  # else rounding decides about the smallest values
        assert np.abs(found - keep).max() <= 1 and (found != keep).mean() < 0.1
