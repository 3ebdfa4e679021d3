"""Dense attention's probabilities, the mean over heads."""

import numpy as np
import pytest
from check_op import check_twin, nan, relative, rounded
from selected_keys import lists
from test_sparse_attention import plain_probabilities

from kernels import cpu


def test_mean_of_dense_attention():
    B, T, NH, C = 2, 150, 4, 32
    qkv = np.random.default_rng(3).standard_normal((B, T, 3 * C))
    out, lse = np.empty((B * T, C)), np.empty((B, NH, T))
    cpu.attention_forward(out, lse, qkv, NH)
    every, _ = lists(B, T, T, full=True)
    expected = plain_probabilities(qkv, every, NH).mean(axis=1)
    for first, R, S in ((0, 150, 150), (0, 1, 1), (37, 100, 140), (149, 1, 150), (64, 64, 128)):
        p = np.full((B, R, S), np.nan)
        cpu.attention_mean(p, qkv, lse, NH, first)
        assert relative(p, expected[:, first : first + R, :S]) < 1e-13
    start = 97  # of lse, as in cached decoding
    p = np.full((B, 50, T), np.nan)
    cpu.attention_mean(p, qkv, np.ascontiguousarray(lse[:, :, start:]), NH, 100, start)
    assert relative(p, expected[:, 100:]) < 1e-13


@pytest.mark.parametrize("B, T, NH, hs, first, R, S, offset", [
    (1, 1, 1, 1, 0, 1, 1, 0), (2, 9, 3, 4, 2, 5, 9, 0), (1, 100, 2, 5, 30, 66, 100, 0), (1, 70, 2, 40, 0, 70, 70, 1),
    (1, 5, 1, 130, 4, 1, 5, 0),
])  # fmt: skip
def test_attention_mean(runtime, B, T, NH, hs, first, R, S, offset):
    C = NH * hs
    qkv, out, lse = rounded(B, T, 3 * C), np.empty((B * T, C)), np.empty((B, NH, T))
    cpu.attention_forward(out, lse, qkv, NH)
    check_twin(runtime, "attention_mean", nan(B, R, S), qkv, lse, NH, first, offset=offset)
    lse = np.ascontiguousarray(lse[:, :, first:])
    check_twin(runtime, "attention_mean", nan(B, R, S), qkv, lse, NH, first, first, offset=offset)
