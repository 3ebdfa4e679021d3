"""The lightning indexer's scores, of whole rows and of gathered keys; and what follows from them, causal to the bit."""

import numpy as np
import pytest
from check_op import check_gradients, check_twin, nan, place, relative, rounded, run
from selected_keys import INF, blocks_of_rows, check_scores, expected_selection, selection

from kernels import cpu, cuda
from kernels.cpu.sparse import indexer

SCALE = 0.7


def plain_products(q, k, HI):
    """z (B,T,HI,S)"""
    B, T, _ = q.shape
    q, k = q.reshape(B, T, HI, -1), k.reshape(*k.shape[:2], -1, q.shape[2] // HI)
    return np.einsum("bthd,bshd->bths", q, np.broadcast_to(k, (*k.shape[:2], *q.shape[2:])))


def plain_scores(q, k, w):
    """(B,T,S), future and all"""
    return SCALE * np.einsum("bth,bths->bts", w, np.maximum(plain_products(q, k, w.shape[2]), 0))


def causal(scores):
    return np.where(np.tri(*scores.shape[1:]) > 0, scores, -INF)


def inputs(B, T, HI, dI, own, dtype=np.float64, seed=0):
    """q, k, w; own: a key for each head."""
    rng = np.random.default_rng(seed)
    shapes = (B, T, HI * dI), (B, T, HI * dI if own else dI), (B, T, HI)
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def scores_of(q, k, w, R):
    """(B,T,T) from blocks of R queries, as much of them as is causal."""
    B, T, _ = q.shape
    scores = np.full((B, T, T), -INF, q.dtype)
    for first, end in blocks_of_rows(T, R):
        block = np.full((B, end - first, end), np.nan, q.dtype)
        cpu.indexer_scores_forward(block, q, k, w, SCALE, first)
        scores[:, first:end, :end] = block
    return scores


SIZES = [  # B, T, HI, dI, own, R, offset; tiles are 64 wide, ranges of keys 256
    (1, 1, 5, 1, 0, 1, 0), (2, 20, 3, 5, 0, 7, 0), (2, 13, 4, 4, 1, 13, 0), (1, 200, 2, 3, 0, 128, 0),
    (1, 1, 1, 1, 0, 1, 0), (2, 9, 3, 5, 0, 4, 0), (1, 70, 4, 8, 0, 64, 0), (1, 70, 2, 4, 1, 64, 1),
    (2, 13, 5, 4, 1, 5, 0), (1, 66, 1, 70, 0, 33, 0), (1, 5, 2, 68, 1, 5, 0),
]  # fmt: skip


@pytest.mark.parametrize("B, T, HI, dI, own, R, offset", SIZES)
def test_scores(B, T, HI, dI, own, R, offset):
    def forward(q, k, w):
        scores = scores_of(q, k, w, R)
        assert np.array_equal(scores == -INF, np.broadcast_to(np.tri(T) == 0, scores.shape))
        return (np.where(scores == -INF, q.dtype.type(0), scores),)

    def backward(dout, saved, q, k, w):
        dq, dw, dk = np.full_like(q, np.nan), np.full_like(w, np.nan), np.zeros_like(k)
        for first, end in reversed(blocks_of_rows(T, R)):
            dscores = dout[:, first:end, :end].copy()
            dscores[:, np.tri(end - first, end, first) == 0] = np.nan  # counts as 0
            cpu.indexer_scores_backward(dq, dk, dw, dscores, q, k, w, SCALE, first)
        return dict(q=dq, k=dk, w=dw)

    q, k, w = inputs(B, T, HI, dI, own)
    assert relative(np.exp(scores_of(q, k, w, R)), np.exp(causal(plain_scores(q, k, w)))) < 1e-12
    check_gradients(forward, backward, q=q.shape, k=k.shape, w=w.shape)


def test_scores_of_a_block_alone_and_wider_than_its_past():
    """start: only the new rows are there, as in cached decoding; what S has beyond the past is -inf."""
    q, k, w = inputs(2, 30, 3, 4, False)
    expected = causal(plain_scores(q, k, w))
    for first, end in ((29, 30), (11, 20)):
        block = np.full((2, end - first, 30), np.nan)
        rows = [np.ascontiguousarray(x[:, first - 1 : end]) for x in (q, w)]
        cpu.indexer_scores_forward(block, rows[0], k, rows[1], SCALE, first, first - 1)
        assert np.array_equal(block == -INF, expected[:, first:end] == -INF)
        assert relative(np.exp(block), np.exp(expected[:, first:end])) < 1e-12


def test_where_a_product_is_0_there_is_no_gradient():
    q, k, w = np.zeros((1, 2, 3)), np.ones((1, 2, 3)), np.ones((1, 2, 1))
    dq, dk, dw = np.full_like(q, np.nan), np.zeros_like(k), np.full_like(w, np.nan)
    cpu.indexer_scores_backward(dq, dk, dw, np.ones((1, 2, 2)), q, k, w, SCALE, 0)
    assert not dq.any() and not dk.any() and not dw.any()


@pytest.fixture(params=["whole rows", "gathered keys"])
def form(request, monkeypatch):
    """Both ways to the same numbers, whatever the sizes."""
    gathers = request.param == "gathered keys"
    for name in ("GATHER_FORWARD", "GATHER_BACKWARD"):
        monkeypatch.setattr(indexer, name, 0 if gathers else 10**9)
    monkeypatch.setattr(indexer, "GATHER_SIZE", 0)


@pytest.mark.parametrize("B, T, HI, dI, own, K, leak", [
    (1, 1, 5, 1, 0, 1, 0), (2, 20, 3, 5, 0, 7, 0), (2, 13, 4, 4, 1, 13, 0), (1, 40, 2, 3, 0, 11, 1),
    (1, 40, 2, 3, 1, 40, 1),
])  # fmt: skip
def test_gathered(B, T, HI, dI, own, K, leak, form):
    index, count = selection(B, T, K, leak)
    valid = index >= 0

    def forward(q, k, w):
        scores = np.full((B, T, K), np.nan, q.dtype)
        cpu.indexer_gathered_forward(scores, q, k, w, index, count, SCALE)
        assert np.array_equal(scores == -INF, ~valid)
        return (np.where(valid, scores, q.dtype.type(0)),)

    def backward(dout, saved, q, k, w):
        dq, dk, dw = (np.full_like(x, np.nan) for x in (q, k, w))
        dscores = np.where(valid, dout, np.nan).astype(q.dtype)  # padding counts as 0
        cpu.indexer_gathered_backward(dq, dk, dw, dscores, q, k, w, index, count, SCALE)
        return dict(q=dq, k=dk, w=dw)

    q, k, w = inputs(B, T, HI, dI, own)
    taken = np.take_along_axis(plain_scores(q, k, w), np.maximum(index, 0), axis=2)
    assert relative(forward(q, k, w)[0], np.where(valid, taken, 0)) < 1e-12
    check_gradients(forward, backward, q=q.shape, k=k.shape, w=w.shape)


def test_all_keys_gathered_give_what_whole_rows_give(form):
    q, k, w = inputs(1, 50, 2, 4, False)
    index = np.where(np.tri(50), np.arange(50), -1).astype(np.int32)[None]
    count = np.arange(1, 51, dtype=np.int32)[None]
    gathered, dscores = np.empty((1, 50, 50)), np.random.default_rng(2).standard_normal((1, 50, 50))
    cpu.indexer_gathered_forward(gathered, q, k, w, index, count, SCALE)
    assert relative(np.exp(gathered), np.exp(scores_of(q, k, w, 16))) < 1e-12
    ours, theirs = ([np.zeros_like(x) for x in (q, k, w)] for _ in range(2))
    cpu.indexer_gathered_backward(*ours, dscores, q, k, w, index, count, SCALE)
    cpu.indexer_scores_backward(*theirs, dscores, q, k, w, SCALE, 0)
    assert all(relative(a, b) < 1e-12 for a, b in zip(ours, theirs))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("cut", [1, 64, 100])
@pytest.mark.parametrize("own", [0, 1])
def test_causal_bit_for_bit(cut, own, form):
    """What comes at position `cut` and after changes no bit of what belongs to queries before it."""
    B, T, K, R = 2, 130, 20, 64
    results = []
    for garbage in (None, 1e3, INF, np.nan):
        q, k, w = inputs(B, T, 3, 8, own, np.float32)
        if garbage is not None:
            q[:, cut:], k[:, cut:], w[:, cut:] = garbage, -garbage, garbage
        index, count = np.zeros((B, T, K), np.int32), np.zeros((B, T), np.int32)
        entropy, keep = np.zeros((B, T), "f"), np.full((B, T), K, np.int32)
        mass = np.zeros((B, T), np.int32)
        saved = []
        for first, end in blocks_of_rows(T, R):
            scores = np.empty((B, end - first, end), "f")
            cpu.indexer_scores_forward(scores, q, k, w, SCALE, first)
            cpu.select_topk(index, count, scores, keep, first)
            cpu.row_entropy(entropy, scores, first)
            cpu.mass_count(mass, scores, 0.9, first)
            saved.append(scores[:, : max(0, cut - first)].tobytes())
        gathered = np.empty((B, T, K), "f")
        cpu.indexer_gathered_forward(gathered, q, k, w, index, count, SCALE)
        saved += [array[:, :cut].tobytes() for array in (index, count, entropy, mass, gathered)]
        results.append(saved)
    assert all(result == results[0] for result in results[1:])


def test_learning_from_the_divergence():
    """Some steps down its gradient take the loss from one batch down to a small part of it."""
    B, T = 1, 32
    q, k, w = inputs(B, T, 2, 8, False)
    target = np.exp(causal(1.5 * plain_scores(*inputs(B, T, 2, 8, False, seed=1))))
    target /= target.sum(axis=2, keepdims=True)
    losses, means = np.empty((B, T)), []
    for _ in range(300):
        scores = scores_of(q, k, w, T)
        cpu.fused_kl(losses, scores, target, 1 / B)
        dq, dk, dw = np.empty_like(q), np.zeros_like(k), np.empty_like(w)
        cpu.indexer_scores_backward(dq, dk, dw, scores, q, k, w, SCALE, 0)
        for x, dx in ((q, dq), (k, dk), (w, dw)):
            x -= 0.1 * dx
        means.append(losses.mean())
    assert means[-1] < 0.2 * means[0], (means[0], means[-1])


# ----------------------------------------------------------------------------------------------------------------------
# on CUDA: the emulator, and a GPU if there is one


def rounded_inputs(B, T, HI, dI, own):
    return rounded(B, T, HI * dI), rounded(B, T, HI * dI if own else dI, seed=1), rounded(B, T, HI, seed=2)


@pytest.mark.parametrize("B, T, HI, dI, own, R, offset", SIZES)
def test_scores_on_cuda(runtime, B, T, HI, dI, own, R, offset):
    q, k, w = rounded_inputs(B, T, HI, dI, own)
    for first, end in blocks_of_rows(T, R):
        check_scores(runtime, "indexer_scores_forward", nan(B, end - first, end), q, k, w, SCALE, first, offset=offset)
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
        check_twin(runtime, "indexer_scores_backward", *args, q, k, w, SCALE, first, offset=offset)


def test_scores_of_a_block_in_the_middle(runtime):
    """Many keys, few queries: several ranges of keys, tiles of the future, rows before and after that stay."""
    B, T, HI, dI, first, R = 1, 330, 2, 8, 195, 70
    q, k, w = rounded_inputs(B, T, HI, dI, False)
    check_scores(runtime, "indexer_scores_forward", nan(B, R, T), q, k, w, SCALE, first)
    dscores, dk = rounded(B, R, 300, seed=3), rounded(*k.shape, seed=4)
    args = rounded(*q.shape, seed=5), dk, rounded(*w.shape, seed=6), dscores
    check_twin(runtime, "indexer_scores_backward", *args, q, k, w, SCALE, first)


@pytest.mark.parametrize("B, T, HI, dI, own, R, offset", SIZES)
def test_gathered_on_cuda(runtime, B, T, HI, dI, own, R, offset):
    check_gathered(runtime, B, T, HI, dI, own, offset, [(1, 0), (min(T, 11), 0), (min(T, 40), 1)])


@pytest.mark.parametrize("T, HI, dI, own, K", [(135, 6, 4, 0, 133), (3, 5, 300, 1, 2), (5, 9, 120, 0, 5)])
def test_gathered_where_threads_take_several_turns(runtime, T, HI, dI, own, K):
    """More keys, heads and columns than a block has threads for."""
    check_gathered(runtime, 1, T, HI, dI, own, 0, [(K, 0)])


def check_gathered(runtime, B, T, HI, dI, own, offset, lists):
    """lists: (K, leak) of select_topk"""
    q, k, w = rounded_inputs(B, T, HI, dI, own)
    for K, leak in lists:
        index, count = selection(B, T, K, leak)
        args = q, k, w, index, count, SCALE
        check_scores(runtime, "indexer_gathered_forward", nan(B, T, K), *args, offset=offset)
        dscores = np.where(index >= 0, rounded(B, T, K, seed=3), np.nan)
        outs = (nan(*x.shape) for x in (q, k, w))
        check_twin(runtime, "indexer_gathered_backward", *outs, dscores, *args, offset=offset)


@pytest.mark.parametrize("cut", [61, 64, 70])
def test_causal_bit_for_bit_on_cuda(runtime, cut):
    """What comes at position `cut` and after changes no bit of what belongs to queries before it."""
    B, T, K, HI, dI, first = 1, 75, 20, 2, 8, 60
    results = []
    for garbage in (None, 1e3, INF, np.nan):
        q, k, w = rounded_inputs(B, T, HI, dI, False)
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
