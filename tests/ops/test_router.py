"""Which experts a token goes to, and the loss that balances them."""

import numpy as np
import pytest
from check_op import check_twin, nan, rounded
from routing import routed, router, whole

from kernels import cpu, cuda
from llmc.errors import UserError


def test_router_takes_the_lower_number_of_equal_logits():
    logits = np.array([[1, 3, 3, 0], [2, 2, 2, 2], [-np.inf, 5, -np.inf, 4]], np.float32)
    probs, gates, experts = router(logits, 3)
    assert experts.tolist() == [[1, 2, 0], [0, 1, 2], [1, 3, 0]]
    assert gates[1].tolist() == pytest.approx([1 / 3] * 3) and gates[2, 2] == 0
    assert gates[0, 0] == gates[0, 1] == pytest.approx(1 / (2 + np.exp(-2)))
    assert probs.sum(axis=1).tolist() == pytest.approx([1] * 3) and probs[1].tolist() == [0.25] * 4


def test_router_of_large_logits_is_finite():
    probs, gates, _ = router(np.array([[1e4, -1e4, 9e3]], np.float32), 2)
    assert probs.tolist() == [[1, 0, 0]] and gates.tolist() == [[1, 0]]


# ----------------------------------------------------------------------------------------------------------------------
# on CUDA: the emulator, and a GPU if there is one


@pytest.mark.parametrize("N, E, top, offset", [
    (1, 1, 1, 0), (9, 4, 2, 1), (33, 5, 5, 0), (10, 40, 3, 0), (3, 256, 8, 0), (2, 1024, 2, 0), (300, 4, 2, 0)
])  # fmt: skip
def test_router(runtime, N, E, top, offset):
    logits = rounded(N, E)
    check_twin(runtime, "router_forward", nan(N, E), nan(N, top), whole(N, top), logits, offset=offset)
    probs, gates, experts = routed(N, E, top)
    load = np.bincount(experts.ravel(), minlength=E).astype(np.int32)
    for balance in (0.0, 3.0 * N):  # so large that its part counts
        args = rounded(N, top, seed=1), probs, gates, experts, load, balance
        check_twin(runtime, "router_backward", nan(N, E), *args, offset=offset)


def test_router_of_ties_and_of_what_is_no_number(runtime):
    """Equal logits: the lower number first. Experts stay in range and differ whatever the logits are."""
    device = cuda.device(runtime)
    low, no = -np.inf, np.nan
    logits = np.array([[1, 3, 3, 0], [2, 2, 2, 2], [low, 5, low, 4], [no, 1, no, 2], [no] * 4, [low] * 4], np.float32)
    probs, gates = runtime.zeros((6, 4)), runtime.zeros((6, 3))
    experts = runtime.to_device(whole(6, 3))
    device.router_forward(probs, gates, experts, runtime.to_device(logits))
    expected = [[1, 2, 0], [0, 1, 2], [1, 3, 0], [3, 1, 0], [0, 1, 2], [0, 1, 2]]
    assert runtime.to_host(experts).tolist() == expected
    reference = np.zeros((6, 3), np.int32)
    with np.errstate(invalid="ignore"):
        cpu.router_forward(np.zeros((6, 4), np.float32), np.zeros((6, 3), np.float32), reference, logits)
    assert reference.tolist() == expected
    assert np.isnan(runtime.to_host(probs)[3:]).all()


@pytest.mark.parametrize("E, top", [(4, 2), (40, 5), (256, 8)])
def test_router_of_many_ties(runtime, E, top):
    """Few values, 0 and -0, NaN: both devices take experts by value, of equal ones the lower number, NaN last."""
    tiny, large = np.finfo(np.float32).tiny, np.finfo(np.float32).max
    values = np.array([0, -0.0, 1, 1 + 2**-23, -1, tiny, -tiny, large, -np.inf, np.nan], np.float32)
    logits = np.random.default_rng(E).choice(values, (50, E))
    logits[::2] = np.where(logits[::2] > 0, -1, logits[::2])  # so that all that is taken is 0 or -0, or not even that
    ranks = [[(z != z, 0 if z != z else -z, e) for e, z in enumerate(row)] for row in logits.tolist()]
    expected = [[e for *_, e in sorted(row)[:top]] for row in ranks]
    device, reference, experts = cuda.device(runtime), whole(50, top), runtime.to_device(whole(50, top))
    device.router_forward(runtime.zeros((50, E)), runtime.zeros((50, top)), experts, runtime.to_device(logits))
    assert runtime.to_host(experts).tolist() == expected
    with np.errstate(invalid="ignore"):
        cpu.router_forward(np.zeros((50, E), np.float32), np.zeros((50, top), np.float32), reference, logits)
    assert reference.tolist() == expected


def test_more_experts_than_a_warp_holds_are_refused(emulator):
    logits, few = emulator.zeros((1, 1025)), emulator.zeros((1, 2))
    with pytest.raises(UserError, match="1025 experts, on a GPU at most 1024"):
        cuda.device(emulator).router_forward(logits, few, emulator.zeros((1, 2), np.int32), logits)
