"""For each key, the queries that selected it."""

import numpy as np
import pytest
from selected_keys import (
    lists,
)

from kernels.cuda.sparse.inverse_lists import inverse_lists


@pytest.mark.parametrize("B, T, K, future", [
    (1, 1, 1, False), (2, 70, 9, False), (1, 33, 33, True), (3, 40, 5, True), (1, 200, 2, False),
])  # fmt: skip
def test_inverse_lists(runtime, B, T, K, future):
    index, count = lists(B, T, K, future=future)
    offsets, pairs = map(runtime.to_host, inverse_lists(runtime, runtime.to_device(index), runtime.to_device(count)))
    for b in range(B):
        assert offsets[b, 0] == 0 and offsets[b, T] == count[b].sum()
        for s in range(T):
            found = pairs[b, offsets[b, s] : offsets[b, s + 1]]
            assert found.tolist() == np.flatnonzero(index[b] == s).tolist()


def test_inverse_lists_of_a_long_sequence(emulator):
    """More keys than the threads that sum them up, more lists than chunks of the smallest size."""
    T, K = 2200, 2
    index = np.stack([np.zeros(T, np.int32), np.maximum(np.arange(T, dtype=np.int32), 1)], axis=1)[None]
    count = np.full((1, T), 2, np.int32)
    offsets, pairs = map(
        emulator.to_host, inverse_lists(emulator, emulator.to_device(index), emulator.to_device(count))
    )
    assert offsets[0].tolist() == [0, T, T + 2, *range(T + 3, 2 * T + 1)]
    assert pairs[0].tolist() == [*range(0, K * T, K), 1, 3, *range(5, K * T, K)]
