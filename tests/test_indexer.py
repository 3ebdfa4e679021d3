"""The indexer and what is done with its scores, on the CPU: gradients, exact selection, causality."""

import numpy as np
import pytest
from check_op import check_op, relative

from kernels import cpu as ops
from kernels.cpu.sparse import indexer

SCALE = 0.7
INF = np.inf


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


def blocks(T, R):
    """(first, end) of blocks of R queries."""
    return [(first, min(first + R, T)) for first in range(0, T, R)]


def inputs(B, T, HI, dI, own, dtype=np.float64, seed=0):
    """q, k, w; own: a key for each head."""
    rng = np.random.default_rng(seed)
    shapes = (B, T, HI * dI), (B, T, HI * dI if own else dI), (B, T, HI)
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def scores_of(q, k, w, R):
    """(B,T,T) from blocks of R queries, as much of them as is causal."""
    B, T, _ = q.shape
    scores = np.full((B, T, T), -INF, q.dtype)
    for first, end in blocks(T, R):
        block = np.full((B, end - first, end), np.nan, q.dtype)
        ops.indexer_scores_forward(block, q, k, w, SCALE, first)
        scores[:, first:end, :end] = block
    return scores


# ----------------------------------------------------------------------------------------------------------------------
# scores

SIZES = [(1, 1, 5, 1, 0, 1), (2, 20, 3, 5, 0, 7), (2, 13, 4, 4, 1, 13), (1, 200, 2, 3, 0, 128)]


@pytest.mark.parametrize("B, T, HI, dI, own, R", SIZES)
def test_scores(B, T, HI, dI, own, R):
    def forward(q, k, w):
        scores = scores_of(q, k, w, R)
        assert np.array_equal(scores == -INF, np.broadcast_to(np.tri(T) == 0, scores.shape))
        return (np.where(scores == -INF, q.dtype.type(0), scores),)

    def backward(dout, saved, q, k, w):
        dq, dw, dk = np.full_like(q, np.nan), np.full_like(w, np.nan), np.zeros_like(k)
        for first, end in reversed(blocks(T, R)):
            dscores = np.ascontiguousarray(dout[:, first:end, :end])
            dscores[:, np.tri(end - first, end, first) == 0] = np.nan  # counts as 0
            ops.indexer_scores_backward(dq, dk, dw, dscores, q, k, w, SCALE, first)
        return dict(q=dq, k=dk, w=dw)

    q, k, w = inputs(B, T, HI, dI, own)
    assert relative(np.exp(scores_of(q, k, w, R)), np.exp(causal(plain_scores(q, k, w)))) < 1e-12
    check_op(forward, backward, q=q.shape, k=k.shape, w=w.shape)


def test_scores_of_a_block_alone_and_wider_than_its_past():
    """start: only the new rows are there, as in cached decoding; what S has beyond the past is -inf."""
    q, k, w = inputs(2, 30, 3, 4, False)
    expected = causal(plain_scores(q, k, w))
    for first, end in ((29, 30), (11, 20)):
        block = np.full((2, end - first, 30), np.nan)
        rows = [np.ascontiguousarray(x[:, first - 1 : end]) for x in (q, w)]
        ops.indexer_scores_forward(block, rows[0], k, rows[1], SCALE, first, first - 1)
        assert np.array_equal(block == -INF, expected[:, first:end] == -INF)
        assert relative(np.exp(block), np.exp(expected[:, first:end])) < 1e-12


def test_where_a_product_is_0_there_is_no_gradient():
    q, k, w = np.zeros((1, 2, 3)), np.ones((1, 2, 3)), np.ones((1, 2, 1))
    dq, dk, dw = np.full_like(q, np.nan), np.zeros_like(k), np.full_like(w, np.nan)
    ops.indexer_scores_backward(dq, dk, dw, np.ones((1, 2, 2)), q, k, w, SCALE, 0)
    assert not dq.any() and not dk.any() and not dw.any()


# ----------------------------------------------------------------------------------------------------------------------
# gathered scores


@pytest.fixture(params=["whole rows", "gathered keys"])
def form(request, monkeypatch):
    """Both ways to the same numbers, whatever the sizes."""
    gathers = request.param == "gathered keys"
    for name in ("GATHER_FORWARD", "GATHER_BACKWARD"):
        monkeypatch.setattr(indexer, name, 0 if gathers else 10**9)
    monkeypatch.setattr(indexer, "GATHER_SIZE", 0)


def selection(B, T, K, leak=0, seed=1):
    """index (B,T,K), count (B,T) of random scores, with lists of different lengths."""
    rng = np.random.default_rng(seed)
    index, count = np.empty((B, T, K), np.int32), np.empty((B, T), np.int32)
    keep = rng.integers(1, K + 1, (B, T)).astype(np.int32)
    ops.select_topk(index, count, rng.standard_normal((B, T, T)), keep, 0, leak=leak)
    return index, count


@pytest.mark.parametrize("B, T, HI, dI, own, K, leak", [
    (1, 1, 5, 1, 0, 1, 0), (2, 20, 3, 5, 0, 7, 0), (2, 13, 4, 4, 1, 13, 0), (1, 40, 2, 3, 0, 11, 1),
    (1, 40, 2, 3, 1, 40, 1),
])  # fmt: skip
def test_gathered(B, T, HI, dI, own, K, leak, form):
    index, count = selection(B, T, K, leak)
    valid = index >= 0

    def forward(q, k, w):
        scores = np.full((B, T, K), np.nan, q.dtype)
        ops.indexer_gathered_forward(scores, q, k, w, index, count, SCALE)
        assert np.array_equal(scores == -INF, ~valid)
        return (np.where(valid, scores, q.dtype.type(0)),)

    def backward(dout, saved, q, k, w):
        dq, dk, dw = (np.full_like(x, np.nan) for x in (q, k, w))
        dscores = np.where(valid, dout, np.nan).astype(q.dtype)  # padding counts as 0
        ops.indexer_gathered_backward(dq, dk, dw, dscores, q, k, w, index, count, SCALE)
        return dict(q=dq, k=dk, w=dw)

    q, k, w = inputs(B, T, HI, dI, own)
    taken = np.take_along_axis(plain_scores(q, k, w), np.maximum(index, 0), axis=2)
    assert relative(forward(q, k, w)[0], np.where(valid, taken, 0)) < 1e-12
    check_op(forward, backward, q=q.shape, k=k.shape, w=w.shape)


def test_all_keys_gathered_give_what_whole_rows_give(form):
    q, k, w = inputs(1, 50, 2, 4, False)
    index = np.where(np.tri(50), np.arange(50), -1).astype(np.int32)[None]
    count = np.arange(1, 51, dtype=np.int32)[None]
    gathered, dscores = np.empty((1, 50, 50)), np.random.default_rng(2).standard_normal((1, 50, 50))
    ops.indexer_gathered_forward(gathered, q, k, w, index, count, SCALE)
    assert relative(np.exp(gathered), np.exp(scores_of(q, k, w, 16))) < 1e-12
    ours, theirs = ([np.zeros_like(x) for x in (q, k, w)] for _ in range(2))
    ops.indexer_gathered_backward(*ours, dscores, q, k, w, index, count, SCALE)
    ops.indexer_scores_backward(*theirs, dscores, q, k, w, SCALE, 0)
    assert all(relative(a, b) < 1e-12 for a, b in zip(ours, theirs))


# ----------------------------------------------------------------------------------------------------------------------
# selection


def expected_selection(scores, keep, K, force_self, sink, leak):
    """As select_topk says, row by row with a stable sort of all keys."""
    B, T, _ = scores.shape
    index, count = np.full((B, T, K), -1), np.zeros((B, T), int)
    for b, t in np.ndindex(B, T):
        n = max(1, min(keep[b, t], K))
        if leak and t < n - 1:
            chosen = np.arange(n)
        else:
            n = min(n, t + 1)
            row = np.where(np.isnan(scores[b, t, : t + 1]), -INF, scores[b, t, : t + 1])
            forced = (np.arange(t + 1) == t) & bool(force_self) | (np.arange(t + 1) == 0) & bool(sink)
            row[forced] = 0  # among themselves the most recent one wins as well
            chosen = np.sort(np.lexsort((-np.arange(t + 1), -row, ~forced))[:n])
        index[b, t, :n], count[b, t] = chosen, n
    return index, count


def awkward_scores(kind, B, T, dtype, rng):
    """Scores with many equals, zeros of both signs, denormals, infinities, NaN."""
    scores = rng.standard_normal((B, T, T)).astype(dtype)
    if kind == "equal":
        scores[...] = scores[0, 0, 0]
    elif kind == "relu":
        scores = np.maximum(scores, 0)
        scores[rng.random(scores.shape) < 0.3] *= -1
    elif kind == "none":
        scores[...] = -INF
    elif kind == "extreme":
        tiny = np.finfo(dtype).smallest_subnormal
        scores = rng.choice(
            np.array([0, -0.0, tiny, -tiny, 1, -1, INF, -INF, np.nan, 3e38, -3e38], dtype), scores.shape
        )
    return scores


def select(scores, keep, K, R, **options):
    """select_topk of whole rows (B,T,T) in blocks of R, with garbage behind the diagonal and in what it writes."""
    B, T, _ = scores.shape
    index, count = np.full((B, T, K), 99, np.int32), np.full((B, T), 99, np.int32)
    for first, end in blocks(T, R):
        block = scores[:, first:end].copy()
        block[:, np.tri(end - first, T, first) == 0] = np.random.default_rng(first).choice([np.nan, INF, 5])
        ops.select_topk(index, count, block, keep, first, **options)
    return index, count


@pytest.mark.parametrize("force_self, sink, leak", [(1, 0, 0), (0, 0, 0), (1, 1, 0), (0, 1, 0), (1, 0, 1), (0, 0, 1)])
@pytest.mark.parametrize("kind", ["normal", "equal", "relu", "none", "extreme"])
def test_select_topk(kind, force_self, sink, leak):
    rng = np.random.default_rng(3)
    for dtype, B, T, K, R in (("f", 2, 70, 9, 32), ("d", 1, 40, 40, 7), ("f", 1, 33, 1, 33), ("f", 1, 1, 1, 1)):
        scores = awkward_scores(kind, B, T, dtype, rng)
        for keep in (np.full((B, T), K), rng.integers(-1, K + 3, (B, T))):
            keep = keep.astype(np.int32)
            index, count = select(scores, keep, K, R, force_self=force_self, sink=sink, leak=leak)
            expected = expected_selection(scores, keep, K, force_self, sink, leak)
            assert np.array_equal(index, expected[0]) and np.array_equal(count, expected[1])


def test_of_equals_the_most_recent_are_kept():
    index, count = select(np.zeros((1, 20, 20)), np.full((1, 20), 4, np.int32), 4, 20, force_self=0)
    assert index[0, 19].tolist() == [16, 17, 18, 19] and index[0, 1].tolist() == [0, 1, -1, -1]
    assert count[0].tolist() == [1, 2, 3] + [4] * 17


def test_a_query_that_keeps_one_key_keeps_its_own():
    scores = np.tile(np.arange(20.0, 0, -1), (1, 20, 1))  # the first key is the best one
    one = np.ones((1, 20), np.int32)
    for options, chosen in (((1, 0), range(20)), ((1, 1), range(20)), ((0, 1), [0] * 20), ((0, 0), [0] * 20)):
        index, _ = select(scores, one, 1, 20, force_self=options[0], sink=options[1])
        assert index[0, :, 0].tolist() == list(chosen)


@pytest.mark.parametrize("T, K", [(1, 1), (8, 8), (64, 32), (64, 48), (96, 5)])
def test_the_leak_has_as_many_future_pairs_as_published(T, K):
    scores, keep = np.random.default_rng(4).standard_normal((1, T, T)), np.full((1, T), K, np.int32)
    index, count = select(scores, keep, K, 16, leak=1)
    future = (index > np.arange(T)[:, None]).sum()
    assert future == K * (K - 1) // 2 and (count == K).all()
    assert ((index > np.arange(T)[:, None]).any(axis=2)).sum() == K - 1
    index, count = select(scores, keep, K, 16)
    assert (index <= np.arange(T)[:, None]).all() and count.sum() == K * (K + 1) // 2 + (T - K) * K


def test_selection_of_the_new_rows_alone():
    scores = np.random.default_rng(5).standard_normal((2, 30, 30))
    keep = np.full((2, 30), 6, np.int32)
    expected, _ = select(scores, keep, 6, 30)
    index, count = np.full((2, 4, 6), 99, np.int32), np.full((2, 4), 99, np.int32)
    ops.select_topk(index, count, scores[:, 27:].copy(), keep[:, 26:].copy(), 27, 26)
    assert np.array_equal(index[:, 1:], expected[:, 27:]) and (index[:, 0] == 99).all()
    assert count.tolist() == [[99, 6, 6, 6]] * 2


# ----------------------------------------------------------------------------------------------------------------------
# what is read off the scores


@pytest.mark.parametrize("B, R, S, first", [(1, 1, 2, 1), (2, 9, 14, 5), (1, 70, 1000, 30)])
def test_fused_kl(B, R, S, first):
    rng = np.random.default_rng(6)
    p = rng.random((B, R, S)) * (rng.random((B, R, S)) < 0.7)  # zeros; the gradient holds for any sum
    hidden = (rng.random((B, R, S)) < 0.3) & (np.arange(S) > 0)
    p[hidden] = 0
    p /= p.max()

    def run(scores, dscale):
        scores, losses = (
            np.where(hidden, -INF, scores).astype(scores.dtype),
            np.full((B, first + R), np.nan, scores.dtype),
        )
        ops.fused_kl(losses, scores, p.astype(scores.dtype), dscale, first)
        assert np.isnan(losses[:, :first]).all() and not scores[hidden].any()
        return losses[:, first:], scores

    def forward(scores):
        return (run(scores, 1.0)[0].sum(keepdims=True),)

    check_op(forward, lambda dout, saved, scores: dict(scores=run(scores, dout.item())[1]), scores=(B, R, S))
    scores = rng.standard_normal((B, R, S))
    losses, _ = run(scores, 1.0)
    e = np.where(hidden, 0, np.exp(scores))
    log_q = scores - np.log(e.sum(axis=2, keepdims=True))
    assert relative(losses, np.sum(p * (np.log(np.where(p > 0, p, 1)) - log_q), axis=2)) < 1e-12


def test_kl_of_equal_distributions_and_of_one_key():
    x = 3 * np.random.default_rng(7).standard_normal((1, 5, 9))
    x[0, 0, 1:] = -INF
    p = np.exp(x) / np.exp(x).sum(axis=2, keepdims=True)
    p[0, 0, 0] = 0.9999999
    losses = np.full((1, 5), np.nan)
    ops.fused_kl(losses, x, p, 2.0)
    assert np.abs(losses[0, 1:]).max() < 1e-14 and np.abs(x).max() < 1e-15 and not x[0, 0].any()


@pytest.mark.parametrize("first, R, S", [(0, 1, 1), (0, 20, 20), (13, 7, 25)])
def test_row_entropy(first, R, S):
    x = 2 * np.random.default_rng(8).standard_normal((2, R, S))
    x[:, np.tri(R, S, first) == 0] = np.nan  # not looked at
    x[1, R // 2, 0] = -INF if R > 1 else 0
    entropy = np.full((2, R + 1), np.nan)
    ops.row_entropy(entropy, x, first, first - 1)
    for b, r in np.ndindex(2, R):
        e = np.exp(x[b, r, : first + r + 1])
        q = e[e > 0] / e.sum()
        expected = -(q * np.log(q)).sum() / np.log(first + r + 1) if first + r else 0
        assert abs(entropy[b, r + 1] - expected) < 1e-12
    assert np.isnan(entropy[:, 0]).all()


def test_entropy_is_1_of_equals_and_0_of_a_peak():
    for dtype in "fd":
        x, entropy = np.full((1, 50, 50), 3, dtype), np.empty((1, 50), dtype)
        ops.row_entropy(entropy, x, 0)
        assert entropy[0, 0] == 0 and np.abs(entropy[0, 1:] - 1).max() < 1e-6 and entropy.max() <= 1
        x[:, :, 0] = 1000
        ops.row_entropy(entropy, x, 0)
        assert not entropy.any()


@pytest.mark.parametrize("softmax", [0, 1])
@pytest.mark.parametrize("mass", [0.0, 0.3, 0.95, 1.0])
def test_mass_count(softmax, mass):
    rng, B, T = np.random.default_rng(9), 2, 60
    values = rng.random((B, T, T)) ** 3
    values[rng.random(values.shape) < 0.2] = 0
    values[..., 0] = 0.1  # some mass in every row
    with np.errstate(divide="ignore"):
        scores = np.log(values) + 100 if softmax else values.copy()
    keep = np.full((B, T + 1), -7, np.int32)
    for first, end in blocks(T, 25):
        block = scores[:, first:end].copy()
        block[:, np.tri(end - first, T, first) == 0] = INF  # not looked at
        ops.mass_count(keep, block, mass, first, -1, softmax)
    assert (keep[:, 0] == -7).all()
    for b, t in np.ndindex(B, T):
        largest = np.sort(values[b, t, : t + 1])[::-1]
        held = np.cumsum(largest)
        m, slack = keep[b, t + 1], 1e-12 * held[-1]
        assert 1 <= m <= t + 1 and held[m - 1] >= mass * held[-1] - slack
        assert m == 1 or held[m - 2] < mass * held[-1] + slack


def test_mass_of_equals_and_of_a_peak():
    keep = np.empty((1, 40), np.int32)
    ops.mass_count(keep, np.zeros((1, 40, 40), "f"), 0.5, 0)
    assert keep[0].tolist() == [t // 2 + 1 for t in range(40)]  # half of t + 1, rounded up
    peak = np.zeros((1, 40, 40), "f")
    peak[..., 0] = 30
    ops.mass_count(keep, peak, 0.99, 0)
    assert (keep == 1).all()


def random_by_hand(seed, t, s):
    """The documented formula in Python's integers."""

    def mix(bits):
        bits = (bits ^ bits >> 16) * 0x85EBCA6B % 2**32
        bits = (bits ^ bits >> 13) * 0xC2B2AE35 % 2**32
        return bits ^ bits >> 16

    return (mix((mix((mix(seed) + t) % 2**32) + 0x9E3779B1 * s) % 2**32) >> 8) / 2**24


@pytest.mark.parametrize("seed", [0, 7, 2**31 + 5, 2**32 - 1])
def test_random_scores(seed):
    T = 300
    scores = np.full((2, T, T), np.nan, "f")
    for first, end in blocks(T, 128):
        block = np.empty((2, end - first, T), "f")
        ops.random_scores(block, seed, first)
        scores[:, first:end] = block
    past = np.tri(T) > 0
    for t, s in ((0, 0), (5, 0), (299, 123), (128, 128)):
        assert scores[0, t, s] == random_by_hand(seed, t, s)
    assert scores[0].tobytes() == scores[1].tobytes() and (scores[0][~past] == -INF).all()
    x = scores[0][past].astype(float)  # 45150 of them
    assert x.min() >= 0 and x.max() < 1 and abs(x.mean() - 0.5) < 0.006 and abs(x.var() - 1 / 12) < 0.002
    rows, columns = scores[0, 200:, :200].astype(float), scores[0, 200:, 1:201].astype(float)
    assert abs(np.corrcoef(rows.ravel(), columns.ravel())[0, 1]) < 0.03  # of neighbouring keys
    assert abs(np.corrcoef(rows[:-1].ravel(), rows[1:].ravel())[0, 1]) < 0.03  # of neighbouring queries


# ----------------------------------------------------------------------------------------------------------------------
# properties


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
        for first, end in blocks(T, R):
            scores = np.empty((B, end - first, end), "f")
            ops.indexer_scores_forward(scores, q, k, w, SCALE, first)
            ops.select_topk(index, count, scores, keep, first)
            ops.row_entropy(entropy, scores, first)
            ops.mass_count(mass, scores, 0.9, first)
            saved.append(scores[:, : max(0, cut - first)].tobytes())
        gathered = np.empty((B, T, K), "f")
        ops.indexer_gathered_forward(gathered, q, k, w, index, count, SCALE)
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
        ops.fused_kl(losses, scores, target, 1 / B)
        dq, dk, dw = np.empty_like(q), np.zeros_like(k), np.empty_like(w)
        ops.indexer_scores_backward(dq, dk, dw, scores, q, k, w, SCALE, 0)
        for x, dx in ((q, dq), (k, dk), (w, dw)):
            x -= 0.1 * dx
        means.append(losses.mean())
    assert means[-1] < 0.2 * means[0], (means[0], means[-1])
