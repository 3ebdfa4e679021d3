"""CUDA's mixture of experts against its NumPy twin, and bit for bit."""

import numpy as np
import pytest
from test_cuda_kernels import check, nan, rounded

from kernels import cpu, cuda
from kernels.cpu.deepseek.expert_plan import expert_rows
from llmc.errors import UserError


def whole(*shape) -> np.ndarray:
    """Integers that an op has to overwrite."""
    return np.full(shape, 99, np.int32)


def routed(N, E, top, seed=0):
    """probs, gates, experts of random logits, float64"""
    probs, gates, experts = nan(N, E), nan(N, top), whole(N, top)
    cpu.router_forward(probs, gates, experts, rounded(N, E, seed=seed))
    return probs.astype(np.float32).astype(np.float64), gates.astype(np.float32).astype(np.float64), experts


def planned(experts, E):
    """slot, source, tile_expert, load"""
    rows, tile = expert_rows(*experts.shape, E)
    outs = whole(*experts.shape), whole(rows), whole(rows // tile), whole(E)
    cpu.expert_plan(*outs, experts)
    return outs


@pytest.mark.parametrize("shape, offset", [((1,), 0), ((7, 9), 0), ((4, 256), 0), ((5, 50), 1)])
def test_silu(runtime, shape, offset):
    inp = rounded(*shape) * 5
    check(runtime, "silu_forward", nan(*shape), inp, offset=offset)
    check(runtime, "silu_backward", nan(*shape), inp, rounded(*shape, seed=1), offset=offset)


def test_silu_far_from_zero_and_in_place(runtime):
    device, x = cuda.device(runtime), np.array([-1e4, -200, 200, 1e4], np.float32)
    out, dout = runtime.to_device(x), runtime.to_device(np.ones(4, np.float32))
    device.silu_forward(out, out)
    assert runtime.to_host(out).tolist() == [0, 0, 200, 1e4]
    device.silu_backward(dout, runtime.to_device(x), dout)
    assert runtime.to_host(dout).tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("N, E, top, offset", [
    (1, 1, 1, 0), (9, 4, 2, 1), (33, 5, 5, 0), (10, 40, 3, 0), (3, 256, 8, 0), (2, 1024, 2, 0), (300, 4, 2, 0)
])  # fmt: skip
def test_router(runtime, N, E, top, offset):
    logits = rounded(N, E)
    check(runtime, "router_forward", nan(N, E), nan(N, top), whole(N, top), logits, offset=offset)
    probs, gates, experts = routed(N, E, top)
    load = np.bincount(experts.ravel(), minlength=E).astype(np.int32)
    for balance in (0.0, 3.0 * N):  # so large that its part counts
        args = rounded(N, top, seed=1), probs, gates, experts, load, balance
        check(runtime, "router_backward", nan(N, E), *args, offset=offset)


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


@pytest.mark.parametrize("N, E, top, taken, offset", [
    (1, 1, 1, 1, 0), (1, 4, 2, 4, 0), (9, 4, 2, 4, 1), (700, 8, 3, 8, 0), (200, 16, 2, 5, 0), (1200, 3, 1, 1, 0),
    (66, 256, 8, 256, 0), (7, 9, 9, 9, 0),
])  # fmt: skip
def test_plan(runtime, N, E, top, taken, offset):
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


@pytest.mark.parametrize("N, E, top, C, offset", [
    (1, 1, 1, 1, 0), (9, 4, 2, 12, 0), (70, 4, 2, 7, 0), (20, 3, 3, 132, 0), (9, 4, 2, 36, 1)
])  # fmt: skip
def test_rows_to_experts_and_back(runtime, N, E, top, C, offset):
    _, gates, experts = routed(N, E, top)
    slot, source, _, _ = planned(experts, E)
    rows = len(source)
    y, dout = rounded(rows, C), rounded(N, C, seed=1)
    check(runtime, "expert_gather", nan(rows, C), dout, source, top, offset=offset)
    check(runtime, "expert_scatter", nan(N, C), y, slot, offset=offset)
    check(runtime, "expert_combine_forward", nan(N, C), y, gates, slot, offset=offset)
    args = dout, y, gates, slot, source
    check(runtime, "expert_combine_backward", nan(rows, C), nan(N, top), *args, offset=offset)


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


@pytest.mark.parametrize("N, E, top, C, OC, offset", [
    (1, 1, 1, 1, 1, 0), (1, 4, 2, 5, 3, 0), (9, 4, 2, 12, 20, 0), (70, 3, 2, 33, 130, 0), (66, 5, 1, 132, 36, 1),
    (64, 4, 2, 64, 128, 0), (5, 9, 2, 8, 8, 0),
])  # fmt: skip
def test_expert_matmul(runtime, N, E, top, C, OC, offset):
    """All experts in one launch, some without tokens (5 tokens, 9 experts), and tiles without an expert."""
    _, _, experts = routed(N, E, top)
    _, source, tile_expert, _ = planned(experts, E)
    inp, weight = rounded(len(source), C), rounded(E, OC, C, seed=1)
    dout = rounded(len(source), OC, seed=2)
    inp[source < 0] = dout[source < 0] = 0
    check(runtime, "expert_matmul_forward", nan(len(source), OC), inp, weight, tile_expert, offset=offset)
    for beta in (0, 1):
        dweight = rounded(E, OC, C, seed=3) if beta else nan(E, OC, C)
        args = dweight, dout, inp, weight, tile_expert, beta
        check(runtime, "expert_matmul_backward", nan(len(source), C), *args, offset=offset)
    check(runtime, "expert_matmul_backward", None, nan(E, OC, C), dout, inp, weight, tile_expert, offset=offset)


@pytest.mark.parametrize("N, C, F", [(48, 12, 20), (140, 8, 36)])
def test_no_bit_of_a_token_depends_on_the_others(runtime, N, C, F):
    """As on the CPU: neither what other tokens hold nor which experts they chose."""
    device, E, top = cuda.device(runtime), 4, 2
    shapes = dict(x=(N, C), wg=(E, C), w1=(E, F, C), w2=(E, C, F))
    given, other = ({name: rounded(*shape, seed=seed) for name, shape in shapes.items()} for seed in (6, 7))

    def layer(x):
        """out, slot"""
        x, wg, w1, w2 = (runtime.to_device(a.astype(np.float32)) for a in (x, given["wg"], given["w1"], given["w2"]))
        rows, tile = expert_rows(N, top, E)
        logits, probs, gates = runtime.zeros((N, E)), runtime.zeros((N, E)), runtime.zeros((N, top))
        experts, slot = runtime.zeros((N, top), np.int32), runtime.zeros((N, top), np.int32)
        source, tile_expert = runtime.zeros(rows, np.int32), runtime.zeros(rows // tile, np.int32)
        load, out = runtime.zeros(E, np.int32), runtime.zeros((N, C))
        inp, hidden, y = runtime.zeros((rows, C)), runtime.zeros((rows, F)), runtime.zeros((rows, C))
        device.matmul_forward(logits, x, wg)
        device.router_forward(probs, gates, experts, logits)
        device.expert_plan(slot, source, tile_expert, load, experts)
        device.expert_gather(inp, x, source, top)
        device.expert_matmul_forward(hidden, inp, w1, tile_expert)
        device.silu_forward(hidden, hidden)
        device.expert_matmul_forward(y, hidden, w2, tile_expert)
        device.expert_combine_forward(out, y, gates, slot)
        return runtime.to_host(out), runtime.to_host(slot)

    before, slots = layer(given["x"])
    slots_moved = 0
    for kept in (slice(0, N // 2), slice(N // 2, N)):  # earlier tokens, another row of the batch
        x = other["x"].copy()
        x[kept] = given["x"][kept]
        after, moved = layer(x)
        assert np.array_equal(after[kept], before[kept]) and not np.array_equal(after, before)
        slots_moved += (moved[kept] != slots[kept]).sum()
    assert slots_moved > 0  # or this shows nothing
