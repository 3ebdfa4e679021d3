"""The indexer on tensor cores: the emulator as a GPU that has them, in TF32 and in 3xTF32, and a GPU if any."""

import numpy as np
import pytest
from check_op import TOL_TENSOR, nan, rounded, run
from selected_keys import INF, finite

from kernels import cpu

SCALE = 0.7
SIZES = [  # B, T, HI, dI, own, offset; tiles are 128 queries by 64 keys, pieces 16 columns
    (2, 20, 3, 5, 0, 0), (1, 150, 2, 20, 0, 0), (2, 70, 4, 8, 0, 1), (1, 135, 2, 4, 1, 0), (2, 66, 1, 70, 0, 0),
    (1, 12, 2, 130, 1, 0), (1, 200, 5, 3, 1, 0),
]  # fmt: skip


def inputs(B, T, HI, dI, own):
    return rounded(B, T, HI * dI), rounded(B, T, HI * dI if own else dI, seed=1), rounded(B, T, HI, seed=2)


def check_scores(runtime, scores, *args, offset=0):
    """-inf where the reference has it, and elsewhere within the products' tolerance."""
    ours, expected = run(runtime, "indexer_scores_forward", scores, *args, offset=offset)[0], scores.copy()
    cpu.indexer_scores_forward(expected, *args)
    assert np.array_equal(ours == -INF, expected == -INF)
    error = np.abs(finite(ours) - finite(expected)).max() / np.abs(finite(expected)).max()
    print(f"scores {error:.1e}")
    assert error <= TOL_TENSOR[runtime.tf32]


@pytest.mark.parametrize("B, T, HI, dI, own, offset", SIZES)
def test_scores(tensor_cores, B, T, HI, dI, own, offset):
    """All queries, and the last ones alone, with keys behind them as well."""
    q, k, w = inputs(B, T, HI, dI, own)
    check_scores(tensor_cores, nan(B, T, T), q, k, w, SCALE, 0, offset=offset)
    first = T // 4
    check_scores(tensor_cores, nan(B, T - first - 1, T), q, k, w, SCALE, first, offset=offset)
    new = np.ascontiguousarray(q[:, first:]), k, np.ascontiguousarray(w[:, first:])
    check_scores(tensor_cores, nan(B, T - first, T), *new, SCALE, first, first, offset=offset)
