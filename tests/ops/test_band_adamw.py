"""AdamW of a band alone."""

import numpy as np
import pytest
from check_op import check_twin, rounded

from kernels import cpu
from kernels.cpu.gpt2.adamw import adamw_rates


@pytest.mark.parametrize("C, bandwidth", [(256, 64), (16, 8)])  # by blocks, and all at once
@pytest.mark.parametrize("layer", ["FC1", "FC2"])
def test_band_adamw_is_adamw(C, bandwidth, layer):
    rng, shape = np.random.default_rng(11), (2, 4 * C, C) if layer == "FC1" else (2, C, 4 * C)
    tensors = rng.standard_normal((4, *shape))
    tensors[3] **= 2
    for tensor in tensors:
        cpu.band_mask(tensor, bandwidth)
    banded, given = tensors.copy(), (np.array(adamw_rates(3, 1e-3, 0.9, 0.95, 1e-8, 0.1, 2.0)), np.array([4.0]))
    cpu.adamw_update(*tensors, *given)
    cpu.band_adamw_update(*banded, bandwidth, *given)
    assert banded.tobytes() == tensors.tobytes()


@pytest.mark.parametrize("L, rows, columns, bandwidth", [(2, 60, 15, 9), (2, 15, 60, 9), (1, 16, 4, 100)])
def test_band_adamw(runtime, L, rows, columns, bandwidth):
    arrays = [rounded(L, rows, columns, seed=seed) for seed in range(4)]
    arrays[3] *= arrays[3]
    for array in arrays:
        cpu.band_mask(array, bandwidth)
    rates = np.array(adamw_rates(3, 1e-2, 0.9, 0.95, 1e-8, 0.1, 2.0))
    check_twin(runtime, "band_adamw_update", *arrays, bandwidth, rates, np.array([4.0]))
