"""Sums of columns: the gradients of biases."""

import pytest
from check_op import check_twin, rounded


@pytest.mark.parametrize("N, C, offset", [
    (1, 1, 0), (64, 33, 0), (65, 128, 0), (700, 132, 0), (300, 132, 1), (2500, 20, 0), (40, 2052, 0), (140, 2049, 1),
])  # fmt: skip
def test_column_sum(runtime, N, C, offset):
    check_twin(runtime, "column_sum", rounded(C), rounded(N, C), offset=offset)
