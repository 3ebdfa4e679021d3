"""The published controller, with its defects."""

import numpy as np
import pytest
from check_op import check_twin, rounded

from kernels import cpu
from kernels.cpu.sparse.upstream_controller import upstream_controller_init, upstream_controller_shapes


def normalised(*shape, seed=0) -> np.ndarray:
    """What a layernorm without weights would give of random states."""
    x = np.random.default_rng(seed).standard_normal(shape, np.float32)
    return (x - x.mean(axis=-1, keepdims=True)) / x.std(axis=-1, keepdims=True)


def k_of(x, params, maxpos=2048) -> list[int]:
    """k of each row."""
    keep = np.full(x.shape[:2], -1, np.int32)
    cpu.upstream_controller(keep, x, params, maxpos)
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
        cpu.upstream_controller(np.zeros((1, 2), np.int32), normalised(1, 2, 256), params[:-1])


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


# ----------------------------------------------------------------------------------------------------------------------
# on CUDA: the emulator, and a GPU if there is one


def test_upstream_controller(runtime):
    params = upstream_controller_init(8, np.random.default_rng(0)).astype(np.float64)
    check_twin(runtime, "upstream_controller", np.full((2, 50), -1, np.int32), rounded(2, 50, 8), params)
    check_twin(runtime, "upstream_controller", np.full((2, 50), -1, np.int32), rounded(2, 50, 8), params, 64)
