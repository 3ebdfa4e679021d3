"""New rows of a decoder's cache, and positions that come from memory."""

import numpy as np
import pytest
from check_op import check_twin, nan, rounded, run

from kernels import cpu

START = np.array([5], np.int32)


@pytest.mark.parametrize("start", [0, 5, START])
def test_append_rows(start):
    cache, rows = nan(2, 9, 6), rounded(2, 3, 6)
    cpu.append_rows(cache, rows, start)
    first = int(np.ravel(start)[0])
    assert np.array_equal(cache[:, first : first + 3], rows) and np.isnan(cache).sum() == 2 * 6 * 6


# ----------------------------------------------------------------------------------------------------------------------
# on CUDA: the emulator, and a GPU if there is one


@pytest.mark.parametrize("B, T, n, C", [(1, 9, 1, 768), (2, 9, 3, 7), (3, 6, 1, 4)])
@pytest.mark.parametrize("start", [2, START])
def test_append_rows_on_cuda(runtime, B, T, n, C, start):
    check_twin(runtime, "append_rows", rounded(B, T, C), rounded(B, n, C), start)


@pytest.mark.parametrize("T, hs", [(9, 8), (700, 8), (530, 80)])  # several blocks for a query's keys from 513 rows on
def test_attention_of_a_position_in_memory(runtime, T, hs):
    """As with the number, in a cache whose later rows are NaN."""
    NH, qkv = 2, rounded(1, T, 6 * hs)
    qkv[:, 6:] = np.nan
    given = nan(1, 2 * hs), nan(1, NH, 1), qkv, NH, START
    check_twin(runtime, "attention_forward", *given)
    out, lse = run(runtime, "attention_forward", *given)[:2]
    expected = run(runtime, "attention_forward", *given[:2], qkv[:, :6].copy(), NH, 5)
    assert np.allclose(out, expected[0], atol=1e-6) and np.allclose(lse, expected[1], atol=1e-6)


def test_encoder_of_a_position_in_memory(runtime):
    tokens = np.array([[3, 1]], np.int32)
    check_twin(runtime, "encoder_forward", nan(2, 8), tokens, rounded(4, 8), rounded(9, 8), START)
