"""Which weights a band keeps, and how many."""

import numpy as np
import pytest
from check_op import check_twin, rounded

from kernels import cpu, cuda
from kernels.cpu.band.band_mask import band_columns, band_count


def kept_by_formula(C, bandwidth):
    """FC1's mask (4C,C) by the reference's float arithmetic: |j - i * 4C/C| <= bandwidth / 2."""
    j, i = np.arange(4 * C)[:, None], np.arange(C)[None]
    return np.abs(j - i * 4.0) <= bandwidth / 2.0


@pytest.mark.parametrize("C", [1, 5, 16, 33])
def test_band_mask_is_the_formula_for_every_bandwidth(C):
    for bandwidth in range(1, 8 * C + 2):
        fc1, fc2 = np.ones((2, 4 * C, C)), np.ones((2, C, 4 * C))
        cpu.band_mask(fc1, bandwidth)
        cpu.band_mask(fc2, bandwidth)
        expected = kept_by_formula(C, bandwidth)
        assert (fc1 == expected).all() and (fc2 == expected.T).all()
        assert band_count(4 * C, C, bandwidth) == band_count(C, 4 * C, bandwidth) == expected.sum()
        assert expected.all() == (bandwidth >= 8 * C - 2)


def test_band_counts():
    """Kept weights of a layer: experiment 00007's and 00008's sizes, GPT-2 124M's, and the full band."""
    counts = {(128, 256): 28768, (128, 512): 49216, (128, 128): 15472, (128, 64): 8056, (128, 1024): 65536}
    counts |= {(128, 1): 128, (512, 1024): 459136, (512, 256): 127456, (768, 256): 193248, (1024, 512): 508864}
    for (C, bandwidth), count in counts.items():
        assert band_count(4 * C, C, bandwidth) == count


def test_band_mask_leaves_plus_zero_and_the_band_untouched():
    weight = -np.ones((1, 64, 16), "f")
    cpu.band_mask(weight, 8)
    start, stop = band_columns(20, 64, 16, 8)
    assert (start, stop) == (4, 7)  # |20 - 4i| <= 4
    assert (weight[0, 20, 4:7] == -1).all()
    assert not np.signbit(weight[0, 20, :4]).any()


def test_a_band_in_another_order_of_the_hidden_units():
    """Row j keeps what the diagonal keeps in row place[j]."""
    place = np.array([5, 0, 7, 2, 6, 1, 4, 3], np.int32)
    diagonal, moved = np.ones((2, 8, 2)), np.ones((2, 8, 2))
    cpu.band_mask(diagonal, 4)
    cpu.band_mask(moved, 4, place)
    assert np.array_equal(moved, diagonal[:, place]) and not np.array_equal(moved, diagonal)


# ----------------------------------------------------------------------------------------------------------------------
# on CUDA: the emulator, and a GPU if there is one


@pytest.mark.parametrize("L, rows, columns", [(1, 16, 4), (2, 60, 15), (2, 15, 60), (3, 33, 132)])
@pytest.mark.parametrize("bandwidth", [1, 2, 9, 64, 10**9])
def test_band_mask(runtime, L, rows, columns, bandwidth):
    check_twin(runtime, "band_mask", rounded(L, rows, columns), bandwidth)
    order = np.random.default_rng(1).permutation(rows).astype(np.int32)
    check_twin(runtime, "band_mask", rounded(L, rows, columns), bandwidth, order)
    device = cuda.device(runtime)
    weight = runtime.to_device(np.ones((L, rows, columns), np.float32))
    device.band_mask(weight, bandwidth)
    kept = runtime.to_host(weight)
    assert kept.sum() == L * band_count(rows, columns, bandwidth)
    start, stop = band_columns(rows // 2, rows, columns, bandwidth)
    assert np.flatnonzero(kept[0, rows // 2]).tolist() == list(range(start, stop))
