"""Rows to experts and back."""

import numpy as np
import pytest
from check_op import check_twin, nan, rounded
from routing import planned, routed

from kernels import cpu, cuda


@pytest.mark.parametrize("N, E, top, C, offset", [
    (1, 1, 1, 1, 0), (9, 4, 2, 12, 0), (70, 4, 2, 7, 0), (20, 3, 3, 132, 0), (9, 4, 2, 36, 1)
])  # fmt: skip
def test_rows_to_experts_and_back(runtime, N, E, top, C, offset):
    _, gates, experts = routed(N, E, top)
    slot, source, _, _ = planned(experts, E)
    rows = len(source)
    y, dout = rounded(rows, C), rounded(N, C, seed=1)
    check_twin(runtime, "expert_gather", nan(rows, C), dout, source, top, offset=offset)
    check_twin(runtime, "expert_scatter", nan(N, C), y, slot, offset=offset)
    check_twin(runtime, "expert_combine_forward", nan(N, C), y, gates, slot, offset=offset)
    args = dout, y, gates, slot, source
    check_twin(runtime, "expert_combine_backward", nan(rows, C), nan(N, top), *args, offset=offset)


def test_combine_backward_over_y(runtime):
    """dy may be y."""
    _, gates, experts = routed(9, 4, 2)
    slot, source, _, _ = planned(experts, 4)
    y, dout, device = rounded(len(source), 12), rounded(9, 12, seed=1), cuda.device(runtime)
    dy, dgates = nan(*y.shape), nan(9, 2)
    cpu.expert_combine_backward(dy, dgates, dout, y, gates, slot, source)
    ours = [runtime.to_device(array.astype(np.float32)) for array in (dgates, dout, y, gates)]
    whose = runtime.to_device(slot), runtime.to_device(source)
    device.expert_combine_backward(ours[2], ours[0], *ours[1:], *whose)
    assert np.abs(runtime.to_host(ours[2]) - dy).max() <= 1e-6
    assert np.abs(runtime.to_host(ours[0]) - dgates).max() <= 1e-5
