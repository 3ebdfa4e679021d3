"""Rows of tokens in the order of their experts."""

import numpy as np
import pytest
from routing import plan, planned, whole

from kernels import cuda
from kernels.cpu.deepseek.expert_plan import expert_rows


@pytest.mark.parametrize(
    "N, top, E", [(1, 1, 1), (1, 2, 4), (3, 2, 4), (63, 1, 4), (64, 2, 4), (1000, 8, 256), (1024, 2, 4)]
)
def test_expert_rows_are_enough_for_any_choice(N, top, E):
    rows, tile = expert_rows(N, top, E)
    assert tile == min(64, 1 << (N.bit_length() - 1)) and rows % tile == 0
    load = np.zeros(E, int)  # the worst: as many experts as possible with one row more than whole tiles
    load[: min(E, N * top)] = 1
    left = N * top - load.sum()
    load[0] += left // tile * tile
    assert (-(-load // tile)).sum() * tile <= rows <= N * top + E * (tile - 1)


SIZES = [  # N, E, top, taken, offset
    (1, 1, 1, 1, 0), (1, 4, 2, 4, 0), (9, 4, 2, 4, 1), (200, 8, 3, 8, 0), (700, 8, 3, 8, 0), (200, 16, 2, 5, 0),
    (64, 3, 1, 1, 0), (1200, 3, 1, 1, 0), (66, 256, 8, 256, 0), (500, 256, 8, 256, 0), (7, 9, 9, 9, 0),
]  # fmt: skip


@pytest.mark.parametrize("N, E, top, taken, offset", SIZES)
def test_plan(N, E, top, taken, offset):
    """Every assignment has a row of its own in a tile of its expert, in the tokens' order; the rest is padding."""
    rng = np.random.default_rng(N)
    allowed = rng.permutation(E)[:taken]  # the other experts have no tokens
    experts = np.stack([rng.permutation(allowed)[:top] for _ in range(N)]).astype(np.int32)
    slot, source, tile_expert, load = plan(experts, E)
    rows, tile = expert_rows(N, top, E)
    assert load.tolist() == [int((experts == e).sum()) for e in range(E)]
    assert source[slot].tolist() == np.arange(N * top).reshape(N, top).tolist()
    assert (source >= 0).sum() == N * top and len(source) == rows
    assert np.array_equal(tile_expert[slot // tile], experts)
    used = tile_expert >= 0
    assert np.array_equal(used, np.arange(len(used)) < used.sum()) and (np.diff(tile_expert[used]) >= 0).all()
    assert np.bincount(tile_expert[used], minlength=E).tolist() == [-(-count // tile) for count in load.tolist()]
    for e in range(E):
        mine = slot[experts == e]  # in the order of the tokens
        assert np.array_equal(mine, np.arange(len(mine)) + (mine[0] if len(mine) else 0))


# ----------------------------------------------------------------------------------------------------------------------
# on CUDA: the emulator, and a GPU if there is one


@pytest.mark.parametrize("N, E, top, taken, offset", SIZES)
def test_plan_on_cuda(runtime, N, E, top, taken, offset):
    """The same integers as the counting sort on the CPU; some experts have no tokens."""
    rng = np.random.default_rng(N)
    allowed = rng.permutation(E)[:taken]
    experts = np.stack([rng.permutation(allowed)[:top] for _ in range(N)]).astype(np.int32)
    expected, device = planned(experts, E), cuda.device(runtime)
    padded = [np.concatenate([np.zeros(offset, np.int32), whole(array.size)]) for array in expected]
    ours = [runtime.to_device(p)[offset:].reshape(array.shape) for p, array in zip(padded, expected)]
    device.expert_plan(*ours, runtime.to_device(experts))
    for array, twin in zip(ours, expected):
        assert np.array_equal(runtime.to_host(array), twin)
