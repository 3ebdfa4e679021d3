"""Columns in another order."""

import numpy as np
import pytest
from check_op import check_twin, nan, rounded

from kernels import cpu


def test_take_columns():
    inp, index = np.arange(12.0).reshape(3, 4), np.array([2, 0, 3, 1], np.int32)
    out, back = np.empty_like(inp), np.empty_like(inp)
    cpu.take_columns(out, inp, index)
    assert out.tolist() == [[2, 0, 3, 1], [6, 4, 7, 5], [10, 8, 11, 9]]
    cpu.take_columns(back, out, np.argsort(index).astype(np.int32))
    assert np.array_equal(back, inp)


# ----------------------------------------------------------------------------------------------------------------------
# on CUDA: the emulator, and a GPU if there is one


@pytest.mark.parametrize("N, C", [(1, 1), (3, 300), (5, 512)])
def test_take_columns_on_cuda(runtime, N, C):
    index = np.random.default_rng(1).permutation(C).astype(np.int32)
    check_twin(runtime, "take_columns", nan(N, C), rounded(N, C), index)
