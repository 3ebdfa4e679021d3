"""Controllers that choose how many keys a query keeps: our causal one, and the published one with its defects."""

import numpy as np
import pytest
from check_op import check_op, relative

from kernels import cpu as ops
from kernels.cpu.sparse.keep_controller import FEATURES, HIDDEN, TYPICAL, keep_controller_init
from kernels.cpu.sparse.upstream_controller import upstream_controller_init, upstream_controller_shapes


def features_of(x, maxT, parts=None) -> tuple[np.ndarray, np.ndarray]:
    """(features, state) of x (B,T,C), in one call or in calls for `parts` rows, which sum to T."""
    B, T, C = x.shape
    features, state, start = np.full((B, T, 5), 7, x.dtype), np.full((B, 4, C), np.nan, x.dtype), 0
    for rows in parts or [T]:
        part = np.full((B, rows, 5), 7, x.dtype)
        ops.prefix_features(part, state, x[:, start : start + rows], maxT, start)
        features[:, start : start + rows] = part
        start += rows
    assert start == T
    return features, state


def features_by_definition(x, t, maxT) -> np.ndarray:
    """(B,4): columns 0..3 of row t, from its whole prefix"""
    prefix = x[:, : t + 1]
    error = np.square(np.diff(prefix, axis=1)).mean(axis=(1, 2)) if t else np.zeros(len(x))
    last = np.square(x[:, t] - prefix.mean(axis=1)).mean(axis=1)
    length = np.full(len(x), np.log(t + 1) / np.log(maxT))
    return np.stack([length, prefix.var(axis=1).mean(axis=1), error, last], axis=1)


@pytest.mark.parametrize("B, T, C", [(1, 2, 1), (2, 40, 5), (3, 200, 48), (1, 2500, 256)])  # the last one is two blocks
def test_prefix_features_equal_their_definition(B, T, C):
    x = np.random.default_rng(1).standard_normal((B, T, C)) + np.arange(C) % 3
    features, state = features_of(x, 2 * T)
    for t in range(T) if T <= 200 else (0, 1, 1249, 1250, T - 1):
        assert np.abs(features[:, t, :4] - features_by_definition(x, t, 2 * T)).max() < 1e-12
    assert (features[:, :, 4] == 7).all() and np.array_equal(state[:, 3], x[:, -1])
    assert relative(state[:, 0], x.sum(axis=1)) < 1e-12
    single, _ = features_of(x.astype(np.float32), 2 * T)
    assert single.dtype == np.float32 and relative(single, features) < 1e-6


def test_prefix_features_of_states_far_from_zero():
    """mean(x^2) - m^2 would lose all but one digit of the variance in float32."""
    x = np.random.default_rng(2).standard_normal((1, 4096, 8)) + 1000
    features, _ = features_of(x.astype(np.float32), 4096)
    assert relative(features[..., 1:4], features_of(x.astype(np.float32).astype(np.float64), 4096)[0][..., 1:4]) < 1e-3


def test_prefix_features_of_a_single_token_and_of_constants():
    features, _ = features_of(np.full((2, 1, 4), 3.0), 1)
    assert features[:, 0].tolist() == [[0, 0, 0, 0, 7]] * 2
    features, _ = features_of(np.full((1, 50, 4), 3.0, np.float32), 100)
    assert not features[..., 1:4].any() and features[0, 9, 0] == np.float32(0.5)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("B, T, C", [(1, 9, 3), (2, 40, 17), (3, 33, 256)])
def test_prefix_features_in_parts_have_the_bits_of_one_call(B, T, C, dtype):
    x = np.random.default_rng(3).standard_normal((B, T, C)).astype(dtype)
    whole = features_of(x, T)
    for parts in ([1] * T, [T - 4, 3, 1], [4, T - 4]):
        for once, again in zip(whole, features_of(x, T, parts)):
            assert once.tobytes() == again.tobytes()


def controller(seed=0, dtype=np.float64) -> tuple[np.ndarray, ...]:
    """w1, b1, w2, b2"""
    flat = keep_controller_init(np.random.default_rng(seed)).astype(dtype)
    return flat[:80].reshape(16, 5), flat[80:96], flat[96:112].reshape(1, 16), flat[112:]


def forward(features, w1, b1, w2, b2, most=10**6, block=None):
    """(keep, kappa, hidden) of features (B,T,5), `block` queries at a time."""
    B, T, _ = features.shape
    keep, kappa = np.full((B, T), -1, np.int32), np.full((B, T), np.nan, features.dtype)
    hidden = np.full((B, T, HIDDEN), np.nan, features.dtype)
    for first in range(0, T, block or T):
        rows = min(block or T, T - first)
        ops.keep_controller_forward(keep, kappa, hidden, features, w1, b1, w2, b2, first, rows, most)
    return keep, kappa, hidden


@pytest.mark.parametrize("B, T", [(1, 1), (2, 33), (3, 70)])
def test_keep_controller(B, T):
    """Gradients of the mean loss, by finite differences; rows of the first token count too."""
    rng = np.random.default_rng(4)
    features, dscale = rng.standard_normal((B, T, FEATURES)), 1 / (B * T)
    target = rng.integers(1, np.arange(2, T + 2), (B, T)).astype(np.int32)
    assert (target[:, 0] == 1).all()

    def loss_of(w1, b1, w2, b2):
        dtype = w1.dtype
        w2 = w2 / 8  # or kappa would be nearer to 0 and 1 than losses tell apart
        _, kappa, hidden = forward(features.astype(dtype), w1, b1, w2, b2)
        losses = np.full((B, T), np.nan, dtype)
        grads = [np.zeros_like(each) for each in (w1, b1, w2, b2)]
        args = target, kappa, hidden, features.astype(dtype), w2
        ops.keep_controller_backward(losses, *grads, *args, dscale)
        once = [grad.copy() for grad in grads]
        ops.keep_controller_backward(losses, *grads, *args, dscale)
        assert all(relative(twice, 2 * grad) < 1e-6 for twice, grad in zip(grads, once))
        once[2] /= 8
        return np.array([losses.mean()], dtype), *once

    def backward(dout, saved, **inputs):
        return {name: dout[0] * grad for name, grad in zip(("w1", "b1", "w2", "b2"), saved[1:])}

    check_op(loss_of, backward, w1=(16, 5), b1=(16,), w2=(1, 16), b2=(1,))


def test_losses_are_the_cross_entropy_and_stay_finite():
    kappa = np.array([[0.5, 0.25, 1.0, 0.0, 1.0]])
    target = np.array([[1, 1, 3, 4, 1]], np.int32)
    losses, grads = np.full((1, 5), np.nan), [np.zeros(shape) for shape in ((16, 5), 16, (1, 16), 1)]
    args = target, kappa, np.ones((1, 5, 16)), np.ones((1, 5, 5)), np.ones((1, 16))
    ops.keep_controller_backward(losses, *grads, *args, 1.0)
    most, least = 23 * np.log(2), 2**-23  # certain and wrong, certain and right
    expected = [np.log(2), -0.5 * np.log(0.25 * 0.75), least, most, 0.8 * most + 0.2 * least]
    assert np.abs(losses[0] - expected).max() < 1e-12
    assert abs(grads[3][0] - (-0.5 - 0.25 + 0 - 1 + 0.8)) < 1e-15


def test_keep_is_rounded_half_to_even_and_limited():
    """All weights 0: kappa = 1/2 exactly, so keep is (t+1)/2."""
    zero = [np.zeros_like(each) for each in controller()]
    keep, kappa, _ = forward(np.ones((1, 9, 5)), *zero, most=3)
    assert (kappa == 0.5).all() and keep[0].tolist() == [1, 1, 2, 2, 2, 3, 3, 3, 3]
    for b2, expected in ((-1000.0, [1] * 9), (1000.0, [1, 2, 3, 4, 5, 5, 5, 5, 5]), (np.nan, None)):
        keep, kappa, _ = forward(np.ones((1, 9, 5), np.float32), *zero[:3], np.array([b2], np.float32), most=5)
        assert expected is None or keep[0].tolist() == expected
        assert (keep >= 1).all() and (keep <= np.minimum(np.arange(1, 10), 5)).all()


def test_keep_controller_starts_at_one_half():
    for seed in range(20):
        weights = controller(seed, np.float32)
        _, kappa, hidden = forward(TYPICAL[None, None], *weights)
        assert abs(kappa[0, 0] - 0.5) < 1e-6 and 0 < (hidden > 0).sum() < HIDDEN
    flat = np.array([keep_controller_init(np.random.default_rng(seed)) for seed in range(50)])
    assert flat.shape == (50, 113) and flat.dtype == np.float32
    assert abs(flat[:, :80].std() - 0.3) < 0.02 and abs(flat[:, 96:112].std() - 0.3) < 0.03 and not flat[:, 80:96].any()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_keep_controller_for_single_queries_has_the_bits_of_one_call(dtype):
    features, weights = np.random.default_rng(5).standard_normal((3, 41, 5)).astype(dtype), controller(dtype=dtype)
    whole = forward(features, *weights, most=20)
    for block in (1, 7):
        for once, again in zip(whole, forward(features, *weights, most=20, block=block)):
            assert once.tobytes() == again.tobytes()
    start, arrays = 30, [np.zeros((3, 11, *each.shape[2:]), each.dtype) for each in whole]  # only the new rows
    ops.keep_controller_forward(*arrays, features[:, start:], *weights, 33, 8, 20, start)
    for once, again in zip(whole, arrays):
        assert once[:, 33:].tobytes() == again[:, 3:].tobytes() and not again[:, :3].any()


@pytest.mark.parametrize("cut", [1, 17, 64, 89])
def test_our_controller_is_causal_bit_for_bit(cut):
    """What comes at position `cut` and after changes no bit of features, kappa and keep before it."""
    B, T, C = 2, 90, 24
    rng = np.random.default_rng(6)
    x, entropy = rng.standard_normal((B, T, C), np.float32), rng.random((B, T), np.float32)
    results, later = [], []
    for _ in range(2):
        features, _ = features_of(x, T)
        features[:, :, 4] = entropy
        keep, kappa, hidden = forward(features, *controller(dtype=np.float32), most=50, block=32)
        results.append([array[:, :cut].tobytes() for array in (features, keep, kappa, hidden)])
        later.append(kappa[:, cut:])
        x[:, cut:], entropy[:, cut:] = 3 * x[:, cut:], 0
    assert results[0] == results[1] and (later[0] != later[1]).all()


def test_training_brings_kappa_to_the_wanted_share():
    """The wanted share depends on one feature: plain gradient descent finds out."""
    rng = np.random.default_rng(7)
    B, T = 8, 64
    features = rng.standard_normal((B, T, 5))
    wanted = 1 / (1 + np.exp(-features[:, :, 1]))
    target = np.maximum(np.rint(wanted * np.arange(1, T + 1)), 1).astype(np.int32)
    weights, losses = controller(), np.empty((B, T))
    for _ in range(400):
        keep, kappa, hidden = forward(features, *weights)
        grads = [np.zeros_like(each) for each in weights]
        ops.keep_controller_backward(losses, *grads, target, kappa, hidden, features, weights[2], 1 / (B * T))
        for weight, grad in zip(weights, grads):
            weight -= grad
    error = np.abs(kappa - wanted)[:, 16:]
    print(f"mean distance of kappa from what is wanted: {error.mean():.3f}")
    assert error.mean() < 0.03 and np.corrcoef(keep[:, -1], target[:, -1])[0, 1] > 0.9


# ----------------------------------------------------------------------------------------------------------------------
# the published one


def normalised(*shape, seed=0) -> np.ndarray:
    """What a layernorm without weights would give of random states."""
    x = np.random.default_rng(seed).standard_normal(shape, np.float32)
    return (x - x.mean(axis=-1, keepdims=True)) / x.std(axis=-1, keepdims=True)


def k_of(x, params, maxpos=2048) -> list[int]:
    """k of each row."""
    keep = np.full(x.shape[:2], -1, np.int32)
    ops.upstream_controller(keep, x, params, maxpos)
    assert (keep == keep[:, :1]).all()
    return keep[:, 0].tolist()


def views(flat, C) -> dict[str, np.ndarray]:
    """The parameters by name."""
    shapes = upstream_controller_shapes(C)
    parts = np.split(flat, np.cumsum([np.prod(shape) for shape in shapes.values()])[:-1])
    return {name: part.reshape(shape) for (name, shape), part in zip(shapes.items(), parts)}


def test_upstream_parameters():
    params = upstream_controller_init(256, np.random.default_rng(0))
    assert params.shape == (313_596,) and params.dtype == np.float32
    p = views(params, 256)
    counts = {}
    for name, values in p.items():
        counts[name.partition("_")[0].rstrip("12")] = counts.get(name.partition("_")[0].rstrip("12"), 0) + values.size
    assert counts == dict(
        length=8257, diversity=257, predictor=33_600, combiner=4, attention=263_168, entropy=8257, position=49,
        weights=3, base=1,
    )  # fmt: skip
    bound = np.sqrt(6 / 1024)
    assert abs(p["attention_in_weight"].std() - bound / np.sqrt(3)) < 1e-4
    assert 0.99 * bound < np.abs(p["attention_in_weight"]).max() <= bound
    assert abs(p["attention_out_weight"].std() - 0.02) < 1e-4 and abs(p["predictor1_weight"].std() - 0.02) < 1e-3
    assert (p["predictor_norm_weight"] == 1).all() and not p["attention_in_bias"].any()
    with pytest.raises(ValueError, match="313595 parameters, expected 313596 for 256 channels"):
        ops.upstream_controller(np.zeros((1, 2), np.int32), normalised(1, 2, 256), params[:-1])


@pytest.mark.parametrize("T, published, exact", [(64, 17, 17.45), (128, 35, 35.05), (256, 70, 70.25)])
def test_upstream_k_before_training(T, published, exact):
    """Published 17, 35 and 70. The closed form has c = 1/2; drawn weights move k by about one."""
    params = upstream_controller_init(256, np.random.default_rng(0))
    p = views(params, 256)
    for name in ("length2_weight", "combiner_weight", "position2_weight"):
        p[name][...] = 0
    closed = 0.5 * T * (0.1 + 0.15 + 0.3 / (1 + 1 / T))  # e = sigmoid(ln T)
    assert abs(closed - exact) < 0.01
    assert k_of(normalised(2, T, 256), params) == [published] * 2
    found = [
        k_of(normalised(1, T, 256, seed=seed), upstream_controller_init(256, np.random.default_rng(seed)))[0]
        for seed in range(9)
    ]
    print(f"T = {T}: k = {found}")
    assert np.median(found) == published and max(abs(k - published) for k in found) <= 1


def test_upstream_equals_its_formulas():
    """Against the formulas written out for small sizes, with parameters that are far from the initial ones."""
    B, T, C = 3, 37, 8
    rng = np.random.default_rng(9)
    x = rng.standard_normal((B, T, C))
    params = 0.5 * rng.standard_normal(upstream_controller_size(C))
    p = views(params, C)
    p["weights"][...], p["base"][...] = (0.5, 0.9, 0.2), 0.8

    def linear(name, x):
        return x @ p[f"{name}_weight"].T + p[f"{name}_bias"]

    def sigmoid(z):
        return 1 / (1 + np.exp(-z))

    def two(name, x):
        return sigmoid(linear(f"{name}2", np.maximum(linear(f"{name}1", x), 0)))

    guess = linear("predictor2", np.maximum(linear("predictor1", x[:, :-1]), 0))
    guess = (guess - guess.mean(-1, keepdims=True)) / np.sqrt(guess.var(-1, keepdims=True) + 1e-5)
    guess = guess * p["predictor_norm_weight"] + p["predictor_norm_bias"]
    f1 = x.var(axis=1, ddof=1).mean(axis=1)
    f2 = np.square(guess - x[:, 1:]).mean(axis=(1, 2))
    f3 = x.var(axis=(1, 2), ddof=1)
    complexity = sigmoid(linear("combiner", np.stack([f1, f2, f3], axis=1)))[:, 0]
    q, k, _ = np.split(linear("attention_in", x), 3, axis=2)
    q, k = (each.reshape(B, T, 4, 2).transpose(0, 2, 1, 3) for each in (q, k))
    scores = np.exp(q @ k.transpose(0, 1, 3, 2) / np.sqrt(2))
    a = (scores / scores.sum(axis=3, keepdims=True)).mean(axis=(1, 2)) + 1e-8
    entropy = sigmoid(-(a * np.log(a)).sum(axis=1).mean())
    length = two("length", x.mean(axis=1) + 1e-8)[:, 0]
    position = two("position", np.array([T / 100]))[0]
    factor = (0.5 * length * position + 0.9 * complexity + 0.2 * entropy) / 1.6
    share = T * np.clip(0.8 * factor, 0.1, 0.9)
    assert np.abs(share % 1 - 0.5).min() > 0.01  # no tie that rounding decides
    assert k_of(x, params, maxpos=100) == np.rint(share).tolist()
    assert len(set(k_of(x, params, maxpos=100))) > 1


def upstream_controller_size(C) -> int:
    return sum(int(np.prod(shape)) for shape in upstream_controller_shapes(C).values())


@pytest.mark.parametrize("T, least, most", [(1, 1, 1), (2, 1, 1), (5, 1, 4), (40, 4, 36)])
def test_upstream_limits(T, least, most):
    """A tenth to nine tenths of T, and 1 to T - 1."""
    params = upstream_controller_init(8, np.random.default_rng(9))
    for base, expected in ((0.0, least), (1e6, most)):
        views(params, 8)["base"][...] = base
        assert k_of(normalised(2, T, 8), params) == [expected] * 2


def test_upstream_is_not_causal_and_mixes_the_batch():
    """Why it is for reproduction alone: a last token changes k of all before it, a row that of its neighbour."""
    C, T = 256, 256
    params = upstream_controller_init(C, np.random.default_rng(10))
    p = views(params, C)
    p["combiner_weight"][...] = 0.1
    x = normalised(2, T, C)
    changed = x.copy()
    changed[0, -1] *= 20
    for weights, moves in (((0, 1, 0), [True, False]), ((0, 0, 1), [True, True])):  # complexity alone, entropy alone
        p["weights"][...] = weights
        before, after = k_of(x, params), k_of(changed, params)
        print(f"k = {before}, with another last token in the first row {after}")
        assert [a != b for a, b in zip(after, before)] == moves
