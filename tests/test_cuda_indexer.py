"""The indexer's CUDA kernels against their NumPy twins; selection and random scores to the bit."""

import numpy as np
import pytest
from test_cuda_kernels import check, nan, place, rounded
from test_indexer import INF, SCALE, awkward_scores, causal, expected_selection, plain_scores, selection

from kernels import cpu, cuda

# B, T, HI, dI, own keys, offset; tiles are 64 wide, ranges of keys 256
SIZES = [
    (1, 1, 1, 1, 0, 0), (2, 9, 3, 5, 0, 0), (1, 70, 4, 8, 0, 0), (1, 70, 2, 4, 1, 1), (2, 13, 5, 4, 1, 0),
    (1, 66, 1, 70, 0, 0), (1, 5, 2, 68, 1, 0),
]  # fmt: skip


def inputs(B, T, HI, dI, own):
    return rounded(B, T, HI * dI), rounded(B, T, HI * dI if own else dI, seed=1), rounded(B, T, HI, seed=2)


def finite(scores):
    """Without what would make an error of 0 / 0 or inf / inf: -inf becomes 0."""
    return np.where(scores == -INF, 0, scores)


def run(runtime, op, *args, offset=0):
    """Arrays after an op on the device."""
    ours = [place(runtime, arg, offset) if isinstance(arg, np.ndarray) else arg for arg in args]
    getattr(cuda.device(runtime), op)(*ours)
    return [runtime.to_host(arg) if isinstance(before, np.ndarray) else arg for arg, before in zip(ours, args)]


def check_scores(runtime, op, scores, *args, offset=0):
    """As check, for scores that are -inf where the reference's are."""
    ours = run(runtime, op, scores, *args, offset=offset)[0]
    expected = scores.copy()
    getattr(cpu, op)(expected, *args)
    assert np.array_equal(ours == -INF, expected == -INF)
    assert np.abs(finite(ours) - finite(expected)).max() <= 1e-5 * np.abs(finite(expected)).max()


@pytest.mark.parametrize("B, T, HI, dI, own, offset", SIZES)
def test_scores(runtime, B, T, HI, dI, own, offset):
    q, k, w = inputs(B, T, HI, dI, own)
    for first in {0, T // 3, T - 1}:
        R = T - first
        for S in {T, first + R}:
            check_scores(runtime, "indexer_scores_forward", nan(B, R, S), q, k, w, SCALE, first, offset=offset)
        new = np.ascontiguousarray(q[:, first:]), k, np.ascontiguousarray(w[:, first:])
        check_scores(runtime, "indexer_scores_forward", nan(B, R, T), *new, SCALE, first, first, offset=offset)
        dscores = rounded(B, R, T, seed=3)
        dscores[:, np.tri(R, T, first) == 0] = np.nan  # counts as 0
        # what the block does not write stays: 0, as check sees inputs
        args = np.zeros_like(q), rounded(*k.shape, seed=4), np.zeros_like(w), dscores
        check(runtime, "indexer_scores_backward", *args, q, k, w, SCALE, first, offset=offset)


def test_scores_of_a_block_in_the_middle(runtime):
    """Many keys, few queries: several ranges of keys, tiles of the future, rows before and after that stay."""
    B, T, HI, dI, first, R = 1, 330, 2, 8, 195, 70
    q, k, w = inputs(B, T, HI, dI, False)
    check_scores(runtime, "indexer_scores_forward", nan(B, R, T), q, k, w, SCALE, first)
    dscores, dk = rounded(B, R, 300, seed=3), rounded(*k.shape, seed=4)
    args = rounded(*q.shape, seed=5), dk, rounded(*w.shape, seed=6), dscores
    check(runtime, "indexer_scores_backward", *args, q, k, w, SCALE, first)


@pytest.mark.parametrize("B, T, HI, dI, own, offset", SIZES)
def test_gathered(runtime, B, T, HI, dI, own, offset):
    check_gathered(runtime, B, T, HI, dI, own, offset, [(1, 0), (min(T, 11), 0), (min(T, 40), 1)])


@pytest.mark.parametrize("T, HI, dI, own, K", [(135, 6, 4, 0, 133), (3, 5, 300, 1, 2), (5, 9, 120, 0, 5)])
def test_gathered_where_threads_take_several_turns(runtime, T, HI, dI, own, K):
    """More keys, heads and columns than a block has threads for."""
    check_gathered(runtime, 1, T, HI, dI, own, 0, [(K, 0)])


def check_gathered(runtime, B, T, HI, dI, own, offset, lists):
    """lists: (K, leak) of select_topk"""
    q, k, w = inputs(B, T, HI, dI, own)
    for K, leak in lists:
        index, count = selection(B, T, K, leak)
        args = q, k, w, index, count, SCALE
        check_scores(runtime, "indexer_gathered_forward", nan(B, T, K), *args, offset=offset)
        dscores = np.where(index >= 0, rounded(B, T, K, seed=3), np.nan)
        outs = (nan(*x.shape) for x in (q, k, w))
        check(runtime, "indexer_gathered_backward", *outs, dscores, *args, offset=offset)


@pytest.mark.parametrize("force_self, sink, leak", [(1, 0, 0), (0, 0, 0), (1, 1, 0), (0, 1, 0), (1, 0, 1)])
@pytest.mark.parametrize("kind", ["normal", "equal", "relu", "none", "extreme"])
def test_select_topk(runtime, kind, force_self, sink, leak):
    rng = np.random.default_rng(3)
    for B, T, K, first, offset in ((2, 13, 5, 0, 1), (1, 300, 40, 285, 0), (1, 7, 7, 2, 0), (1, 1, 1, 0, 0)):
        scores = awkward_scores(kind, B, T, "f", rng)
        keep = rng.integers(-1, K + 3, (B, T)).astype(np.int32)
        expected = expected_selection(scores, keep, K, force_self, sink, leak)
        scores[:, np.tri(T) == 0] = rng.choice([np.nan, INF, 5])  # not looked at
        index, count = np.full((B, T, K), 99, np.int32), np.full((B, T), 99, np.int32)
        args = index, count, scores[:, first:], keep, first, 0, force_self, sink, leak
        found, counted, *_ = run(runtime, "select_topk", *args, offset=offset)
        assert np.array_equal(found[:, first:], expected[0][:, first:]) and (found[:, :first] == 99).all()
        assert np.array_equal(counted[:, first:], expected[1][:, first:]) and (counted[:, :first] == 99).all()
        if first:  # the new rows alone
            new = index[:, first:], count[:, first:], scores[:, first:], np.ascontiguousarray(keep[:, first:])
            again, *_ = run(runtime, "select_topk", *new, first, first, force_self, sink, leak)
            assert np.array_equal(again, expected[0][:, first:])


@pytest.mark.parametrize(
    "B, R, S, first, offset", [(1, 1, 2, 1, 0), (2, 9, 14, 5, 0), (1, 10, 132, 3, 1), (3, 7, 128, 0, 0)]
)
def test_fused_kl(runtime, B, R, S, first, offset):
    rng = np.random.default_rng(6)
    scores, p = 3 * rounded(B, R, S), rng.random((B, R, S)).astype("f").astype("d")
    hidden = (rng.random((B, R, S)) < 0.3) & (np.arange(S) > 0)
    scores[hidden], p[hidden | (rng.random(p.shape) < 0.1)] = -INF, 0
    losses = np.zeros((B, first + R))
    check(runtime, "fused_kl", losses, scores, p, 0.3, first, offset=offset)


def test_a_query_with_one_key_has_no_divergence(runtime):
    scores = np.full((1, 6, 5), -INF)
    scores[0, :, 0] = [1.1, -3.3, 1e6, 0, 77.7, 1e-30]
    p = np.zeros((1, 6, 5))
    p[0, :, 0] = [1, 0.9999999, 0.9999998, 1.0000001, 0.3, 1]
    losses, gradient, *_ = run(runtime, "fused_kl", nan(1, 6), scores, p, 0.37, 0)
    assert not gradient.any() and np.abs(losses[0, [0, 1, 2, 3, 5]]).max() <= 3e-7


@pytest.mark.parametrize(
    "B, R, S, first, offset", [(1, 1, 1, 0, 0), (2, 9, 14, 5, 0), (1, 10, 132, 90, 1), (1, 40, 40, 0, 0)]
)
def test_row_entropy(runtime, B, R, S, first, offset):
    scores = 2 * rounded(B, R, S)
    scores[:, R // 2, 0] = -INF if first else 0
    scores[:, np.tri(R, S, first) == 0] = np.nan  # not looked at
    check(runtime, "row_entropy", np.zeros((B, R + 2)), scores, first, first - 1, offset=offset)


@pytest.mark.parametrize("softmax", [0, 1])
@pytest.mark.parametrize("mass", [0.0, 0.3, 0.95, 1.0])
def test_mass_count(runtime, softmax, mass):
    """The same number as the CPU's, or one that holds the mass within rounding."""
    rng, B, R, S, first = np.random.default_rng(9), 2, 12, 300, 280
    values = rng.random((B, R, S)).astype("f") ** 3
    values[rng.random(values.shape) < 0.2] = 0
    values[:, 1] = 0.25  # all equal
    values[..., 0] = 0.1  # some mass in every row
    with np.errstate(divide="ignore"):
        scores = np.log(values) + 10 if softmax else values.copy()
    scores[:, np.tri(R, S, first) == 0] = INF  # not looked at
    keep = np.full((B, R + 1), -7, np.int32)
    found = run(runtime, "mass_count", keep, scores, mass, first, first - 1, softmax)[0]
    cpu.mass_count(keep, scores, mass, first, first - 1, softmax)
    assert (found[:, 0] == -7).all()
    for b, r in np.ndindex(B, R):
        held = np.cumsum(np.sort(values[b, r, : first + r + 1].astype("d"))[::-1])
        m, slack = found[b, r + 1], 1e-5 * held[-1]
        assert 1 <= m <= first + r + 1 and held[m - 1] >= mass * held[-1] - slack
        assert m == 1 or held[m - 2] <= mass * held[-1] + slack
    if mass < 1:  # else rounding decides about the smallest values
        assert np.abs(found - keep).max() <= 1 and (found != keep).mean() < 0.1


@pytest.mark.parametrize("seed", [0, 2**31 + 5, 2**32 - 1])
def test_random_scores(runtime, seed):
    for B, R, S, first in ((2, 3, 300, 290), (1, 1, 1, 0), (2, 5, 7, 2)):
        expected = np.empty((B, R, S), "f")
        cpu.random_scores(expected, seed, first)
        assert run(runtime, "random_scores", nan(B, R, S), seed, first)[0].tobytes() == expected.tobytes()


@pytest.mark.parametrize("cut", [61, 64, 70])
def test_causal_bit_for_bit(runtime, cut):
    """What comes at position `cut` and after changes no bit of what belongs to queries before it."""
    B, T, K, HI, dI, first = 1, 75, 20, 2, 8, 60
    results = []
    for garbage in (None, 1e3, INF, np.nan):
        q, k, w = inputs(B, T, HI, dI, False)
        if garbage is not None:
            q[:, cut:], k[:, cut:], w[:, cut:] = garbage, -garbage, garbage
        q, k, w = (place(runtime, x, 0) for x in (q, k, w))
        scores, gathered, entropy = (place(runtime, nan(*shape), 0) for shape in ((B, T - first, T), (B, T, K), (B, T)))
        index, count = (runtime.to_device(x) for x in selection(B, T, K))
        keep, mass = runtime.to_device(np.full((B, T), K, np.int32)), runtime.zeros((B, T), np.int32)
        device = cuda.device(runtime)
        device.indexer_scores_forward(scores, q, k, w, SCALE, first)
        device.select_topk(index, count, scores, keep, first)
        device.row_entropy(entropy, scores, first)
        device.mass_count(mass, scores, 0.9, first)
        device.indexer_gathered_forward(gathered, q, k, w, index, count, SCALE)
        results.append([runtime.to_host(scores)[:, : cut - first].tobytes()])
        results[-1] += [runtime.to_host(array)[:, :cut].tobytes() for array in (index, count, entropy, mass, gathered)]
    assert all(result == results[0] for result in results[1:])


def test_selected_keys_are_those_of_the_reference(emulator):
    """From q, k and w on: the same selection on both devices, as float32 scores of small integers are exact."""
    rng = np.random.default_rng(10)
    q, k, w = (rng.integers(-2, 3, shape).astype("f") for shape in ((1, 40, 8), (1, 40, 4), (1, 40, 2)))
    keep, index, count = np.full((1, 40), 6, np.int32), np.empty((1, 40, 6), np.int32), np.empty((1, 40), np.int32)
    scores = run(emulator, "indexer_scores_forward", np.empty((1, 40, 40), "f"), q, k, w, 0.5, 0)[0]
    assert np.array_equal(scores, causal(np.rint(plain_scores(q, k, w) / SCALE) * 0.5))
    found = run(emulator, "select_topk", index, count, scores, keep, 0)[0]
    assert np.array_equal(found, expected_selection(scores, keep, 6, 1, 0, 0)[0])
