"""The indexer on tensor cores: the emulator as a GPU that has them, in TF32 and in 3xTF32, and a GPU if any."""

import numpy as np
import pytest
from check_op import ROUNDED, TOL_TENSOR, check_twin, nan, place, relative, rounded, run
from selected_keys import INF, finite, lists, selection

from kernels import cpu, cuda
from kernels.cuda.runtime.tensor_cores import MOST
from kernels.cuda.sparse import indexer, indexer_tensor, indexer_union
from kernels.cuda.sparse.indexer import indexer_trial

SCALE, SCHEDULES = 0.7, ("ascending", "descending", "random")
SIZES = [  # B, T, HI, dI, own, offset; tiles are 128 or 64 queries by 64 keys, pieces 16 columns
    (2, 20, 3, 5, 0, 0), (1, 150, 2, 20, 0, 0), (2, 70, 4, 8, 0, 1), (1, 135, 2, 4, 1, 0), (2, 66, 1, 70, 0, 0),
    (1, 12, 2, 130, 1, 0), (1, 200, 5, 3, 1, 0),
]  # fmt: skip


@pytest.fixture(autouse=True)
def worth_it(monkeypatch):
    """However few there are, 64 queries share their keys."""
    monkeypatch.setattr(indexer, "WORTH", 0)


def inputs(B, T, HI, dI, own):
    return rounded(B, T, HI * dI), rounded(B, T, HI * dI if own else dI, seed=1), rounded(B, T, HI, seed=2)


def gated_inputs(runtime, *sizes):
    """For gradients, which jump where a product changes its sign: in TF32 whole numbers, whose products are exact."""
    q, k, w = inputs(*sizes)
    return (np.rint(2 * q), np.rint(2 * k), w) if runtime.tf32 else (q, k, w)


def check_scores(runtime, op, scores, *args, offset=0):
    """-inf where the reference has it, and elsewhere within the products' tolerance."""
    ours, expected = run(runtime, op, scores, *args, offset=offset)[0], scores.copy()
    getattr(cpu, op)(expected, *args)
    assert np.array_equal(ours == -INF, expected == -INF)
    error = np.abs(finite(ours) - finite(expected)).max() / np.abs(finite(expected)).max()
    print(f"scores {error:.1e}")
    assert error <= TOL_TENSOR[runtime.tf32]


@pytest.mark.parametrize("B, T, HI, dI, own, offset", SIZES)
def test_scores(tensor_cores, B, T, HI, dI, own, offset):
    """All queries, and the last ones alone, with keys behind them as well."""
    q, k, w = inputs(B, T, HI, dI, own)
    check_scores(tensor_cores, "indexer_scores_forward", nan(B, T, T), q, k, w, SCALE, 0, offset=offset)
    first = T // 4
    check_scores(tensor_cores, "indexer_scores_forward", nan(B, T - first - 1, T), q, k, w, SCALE, first, offset=offset)
    new = np.ascontiguousarray(q[:, first:]), k, np.ascontiguousarray(w[:, first:])
    check_scores(tensor_cores, "indexer_scores_forward", nan(B, T - first, T), *new, SCALE, first, first, offset=offset)


@pytest.mark.parametrize("B, T, HI, dI, own, offset", SIZES)
def test_gradients_of_scores(tensor_cores, B, T, HI, dI, own, offset):
    """All queries, those of a block behind others, and what has more keys than the last query."""
    q, k, w = gated_inputs(tensor_cores, B, T, HI, dI, own)
    for first, R, S in ((0, T, T), (T // 4, T - T // 4 - 1, T), (T // 2, T - T // 2, T)):
        dscores = rounded(B, R, S, seed=3)
        dscores[:, np.tri(R, S, first) == 0] = np.nan  # counts as 0
        # what the block does not write stays: 0, as check_twin sees inputs
        args = np.zeros_like(q), rounded(*k.shape, seed=4), np.zeros_like(w), dscores
        options = dict(offset=offset, tol=TOL_TENSOR[tensor_cores.tf32])
        check_twin(tensor_cores, "indexer_scores_backward", *args, q, k, w, SCALE, first, **options)


@pytest.mark.parametrize("B, T, HI, dI, own, first", [(1, 330, 2, 8, 0, 195), (2, 200, 2, 4, 1, 0)])
def test_gradients_in_several_ranges(tensor_cores, B, T, HI, dI, own, first, monkeypatch):
    """Ranges of 64 keys and of 32 queries, some of which have nothing to do; rows before and after that stay."""
    monkeypatch.setattr(indexer_tensor, "RANGE_KEYS", 64)
    monkeypatch.setattr(indexer_tensor, "RANGE_QUERIES", 32)
    q, k, w = gated_inputs(tensor_cores, B, T, HI, dI, own)
    R = min(70, T - first)
    args = rounded(*q.shape, seed=5), rounded(*k.shape, seed=4), rounded(*w.shape, seed=6), rounded(B, R, T, seed=3)
    args = *args, q, k, w, SCALE, first
    check_twin(tensor_cores, "indexer_scores_backward", *args, tol=TOL_TENSOR[tensor_cores.tf32])


def results(runtime, q, k, w, dscores, index, count) -> list[np.ndarray]:
    """scores and gradients, of whole rows and of gathered keys"""
    q, k, w, dscores, index, count = (place(runtime, x, 0) for x in (q, k, w, dscores, index, count))
    whole, listed = ([place(runtime, np.zeros(x.shape), 0) for x in (s, q, k, w)] for s in (dscores, index))
    device = cuda.device(runtime)
    device.indexer_scores_forward(whole[0], q, k, w, SCALE, 0)
    device.indexer_scores_backward(*whole[1:], dscores, q, k, w, SCALE, 0)
    device.indexer_gathered_forward(listed[0], q, k, w, index, count, SCALE)
    device.indexer_gathered_backward(*listed[1:], listed[0], q, k, w, index, count, SCALE)
    return [runtime.to_host(x) for x in (*whole, *listed)]


def test_tf32_rounds_and_3xtf32_does_not(open_tensor_cores):
    """Errors of many values; three schedules of threads and blocks give the same bits."""
    B, T, HI, dI = 1, 140, 2, 20
    q, k, w = inputs(B, T, HI, dI, 0)
    dscores, chosen, expected = rounded(B, T, T, seed=3), selection(B, T, 12), np.empty((B, T, T))
    cpu.indexer_scores_forward(expected, q, k, w, SCALE, 0)
    for tf32 in (False, True):
        found = [results(open_tensor_cores(tf32, schedule), q, k, w, dscores, *chosen) for schedule in SCHEDULES]
        assert len({tuple(x.tobytes() for x in each) for each in found}) == 1
        error = relative(finite(found[0][0]), finite(expected))
        print(f"{'TF32' if tf32 else '3xTF32'}: {error:.1e}")
        assert error <= TOL_TENSOR[tf32] and (error >= ROUNDED) == tf32


@pytest.mark.parametrize("cut", [61, 64, 70])
def test_causal_bit_for_bit(tensor_cores, cut):
    """What comes at position `cut` and after changes no bit of the scores of queries before it."""
    found, chosen = [], selection(1, 75, 20)
    for garbage in (None, 1e3, INF, np.nan):
        q, k, w = inputs(1, 75, 2, 8, 0)
        if garbage is not None:
            q[:, cut:], k[:, cut:], w[:, cut:] = garbage, -garbage, garbage
        scores = run(tensor_cores, "indexer_scores_forward", nan(1, 75, 75), q, k, w, SCALE, 0)[0]
        listed = run(tensor_cores, "indexer_gathered_forward", nan(1, 75, 20), q, k, w, *chosen, SCALE)[0]
        found.append((scores[:, :cut].tobytes(), listed[:, :cut].tobytes()))
    assert len(set(found)) == 1


def test_few_queries_stay_on_cuda_cores(tensor_cores, monkeypatch):
    """As those of decoding; and gradients of heads that are wider than tiles."""
    launched, launch = [], type(tensor_cores).launch
    monkeypatch.setattr(
        tensor_cores, "launch", lambda kernel, *a: launched.append(kernel) or launch(tensor_cores, kernel, *a)
    )
    for R, dI in ((8, 4), (9, 4), (9, 132)):
        q, k, w = inputs(1, 9, 1, dI, 0)
        run(tensor_cores, "indexer_scores_forward", nan(1, R, 9), q, k, w, SCALE, 9 - R)
        outs = np.zeros_like(q), np.zeros_like(k), np.zeros_like(w)
        run(tensor_cores, "indexer_scores_backward", *outs, rounded(1, R, 9), q, k, w, SCALE, 9 - R)
    kind = "tf32" if tensor_cores.tf32 else "3xtf32"
    plain = [f"indexer_{name}_kernel" for name in ("scores_forward", "scores_dq", "finish", "scores_dk")]
    ours = ["scores_forward_{}", "scores_dq_{}_64", "finish", "scores_dk_{}_64", "join"]
    ours = [f"indexer_{name.format(kind)}_kernel" for name in ours]
    assert launched == plain + ours + ours[:1] + plain[1:]


@pytest.mark.parametrize("B, T, HI, dI, K, leak, offset", [
    (2, 20, 3, 5, 7, 0, 0), (1, 150, 2, 20, 30, 0, 1), (2, 70, 4, 8, 70, 1, 0), (1, 200, 2, 4, 3, 0, 0),
    (2, 66, 1, 70, 20, 1, 0), (1, 140, 5, 68, 9, 0, 0), (1, 9, 1, 1, 1, 0, 0),
])  # fmt: skip
def test_gathered(tensor_cores, B, T, HI, dI, K, leak, offset):
    """Tiles of 64 queries, blocks of 128 keys of their union, of 64 if heads are wider than 64."""
    options = dict(offset=offset, tol=TOL_TENSOR[tensor_cores.tf32])
    index, count = selection(B, T, K, leak)
    args = *inputs(B, T, HI, dI, 0), index, count, SCALE
    check_scores(tensor_cores, "indexer_gathered_forward", nan(B, T, K), *args, offset=offset)
    args = *gated_inputs(tensor_cores, B, T, HI, dI, 0), index, count, SCALE
    dscores = np.where(index >= 0, rounded(B, T, K, seed=3), np.nan)
    outs = (nan(*x.shape) for x in args[:3])
    check_twin(tensor_cores, "indexer_gathered_backward", *outs, dscores, *args, **options)


def test_gradients_of_keys_in_several_rounds(tensor_cores, monkeypatch):
    """Of one tile of queries each, whose parts are added to those before; keys that nobody selected get 0."""
    monkeypatch.setattr(indexer_union, "PARTS", 1)
    B, T, HI, dI, K = 2, 150, 2, 8, 2
    index, count = lists(B, T, K)
    q, k, w = gated_inputs(tensor_cores, B, T, HI, dI, 0)
    assert set(range(T)) - set(index[0].ravel())
    args = nan(*q.shape), nan(*k.shape), nan(*w.shape), rounded(B, T, K, seed=3), q, k, w, index, count, SCALE
    check_twin(tensor_cores, "indexer_gathered_backward", *args, tol=TOL_TENSOR[tensor_cores.tf32])


def test_the_trial_is_passed(tensor_cores):
    """Each of its results is right, and no other one would do."""
    names = []
    for name, found, expected in indexer_trial(tensor_cores):
        names.append(name)
        assert relative(found, expected) <= MOST[tensor_cores.tf32]
    forward, gathered = ["the indexer's scores"], ["the indexer's gathered scores"]
    assert names == forward + 3 * ["the indexer's gradients"] + gathered + 3 * ["the indexer's gathered gradients"]
