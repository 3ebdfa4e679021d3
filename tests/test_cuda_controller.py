"""The controllers' kernels against their NumPy twins, and properties that hold bit for bit."""

import numpy as np
import pytest
from test_cuda_kernels import check, nan, place, rounded

from kernels import cpu, cuda
from kernels.cpu.sparse.upstream_controller import upstream_controller_init


def weights(seed=0) -> tuple[np.ndarray, ...]:
    """w1, b1, w2, b2, no zeros among the biases."""
    return tuple(0.3 * rounded(*shape, seed=seed).astype("f") for shape in ((16, 5), (16,), (1, 16), (1,)))


def as_double(arrays) -> list[np.ndarray]:
    return [array.astype(np.float64) for array in arrays]


@pytest.mark.parametrize("B, T, C, maxT, offset", [
    (1, 1, 1, 1, 0), (2, 5, 33, 8, 0), (3, 70, 40, 70, 1), (1, 32, 64, 1000, 0), (2, 33, 7, 64, 3),
    (1, 300, 32, 300, 0),
])  # fmt: skip
def test_prefix_features(runtime, B, T, C, maxT, offset):
    x = rounded(B, T, C)
    check(runtime, "prefix_features", rounded(B, T, 5), nan(B, 4, C), x, maxT, offset=offset)
    if T > 1:  # what comes behind a cached prefix
        state, cut = nan(B, 4, C), T // 2
        cpu.prefix_features(nan(B, cut, 5), state, x[:, :cut], maxT)
        state = state.astype(np.float32).astype(np.float64)
        args = rounded(B, T - cut, 5), state, x[:, cut:].copy(), maxT, cut
        check(runtime, "prefix_features", *args, offset=offset)


def test_prefix_features_leave_the_entropy_alone(runtime):
    features = rounded(2, 40, 5)
    ours = [place(runtime, array, 0) for array in (features, nan(2, 4, 9), rounded(2, 40, 9))]
    cuda.device(runtime).prefix_features(*ours, 64)
    assert np.array_equal(runtime.to_host(ours[0])[..., 4], features[..., 4])


def test_prefix_features_of_states_far_from_zero(runtime):
    x = (rounded(1, 600, 8) + 1000).astype(np.float32)
    single, double = [(np.zeros((1, 600, 5), dtype), np.zeros((1, 4, 8), dtype)) for dtype in (np.float32, np.float64)]
    ours = [place(runtime, array, 0) for array in (*single, x)]
    cuda.device(runtime).prefix_features(*ours, 600)
    cpu.prefix_features(*double, x.astype(np.float64), 600)
    error = np.abs(runtime.to_host(ours[0]) - double[0])[..., 1:4].max()
    print(f"largest error of a variance near 1 around a mean of 1000: {error:.1e}")
    assert error < 2e-3  # mean(x^2) - m^2 would be off by as much as the variance itself


def features_in_parts(runtime, x, parts, maxT) -> list[bytes]:
    """Bits of features and of the last state, from calls for `parts` rows."""
    device, (B, T, C), start, rows = cuda.device(runtime), x.shape, 0, []
    state = runtime.to_device(np.full((B, 4, C), np.nan, np.float32))
    for part in parts:
        features = runtime.zeros((B, part, 5))
        device.prefix_features(features, state, place(runtime, x[:, start : start + part], 0), maxT, start)
        rows.append(runtime.to_host(features))
        start += part
    assert start == T
    return [np.concatenate(rows, axis=1).tobytes(), runtime.to_host(state).tobytes()]


def test_prefix_features_in_parts_have_the_bits_of_one_call(runtime):
    x = rounded(2, 70, 45)
    whole = features_in_parts(runtime, x, [70], 100)
    for parts in ([1] * 70, [33, 36, 1]):
        assert features_in_parts(runtime, x, parts, 100) == whole


@pytest.mark.parametrize("B, Tq, first, rows, most, start, offset", [
    (1, 1, 0, 1, 5, 0, 0), (2, 9, 0, 9, 4, 0, 0), (3, 70, 32, 32, 1000, 0, 1), (2, 6, 33, 3, 20, 30, 3),
    (5, 7, 6, 1, 7, 0, 0),
])  # fmt: skip
def test_keep_controller_forward(runtime, B, Tq, first, rows, most, start, offset):
    features, (w1, b1, w2, b2) = rounded(B, Tq, 5), as_double(weights())
    keep, kappa, hidden = np.full((B, Tq), -1, np.int32), rounded(B, Tq, seed=1), rounded(B, Tq, 16)
    args = features, w1, b1, w2, b2, first, rows, most, start
    check(runtime, "keep_controller_forward", keep, kappa, hidden, *args, offset=offset)
    cpu.keep_controller_forward(keep, kappa, hidden, *args)
    written = slice(first - start, first - start + rows)
    shares = kappa[:, written] * np.arange(first + 1, first + rows + 1)
    assert np.abs(shares % 1 - 0.5).min() > 1e-4  # else rounding of kappa decides
    assert (np.delete(keep, np.r_[written], axis=1) == -1).all() and (keep[:, written] > 0).all()


def test_keep_is_rounded_half_to_even_and_limited(runtime):
    device, T = cuda.device(runtime), 9
    zero = [np.zeros(shape) for shape in ((16, 5), (16,), (1, 16))]
    for b2, expected in (
        (0, [1, 1, 2, 2, 2, 3, 3, 3, 3]), (-1000, [1] * 9), (1000, [1, 2, 3] + 6 * [3]), (np.nan, [1, 2, 3] + 6 * [3]),
    ):  # fmt: skip
        keep = runtime.zeros((1, T), np.int32)
        outs = [place(runtime, array, 0) for array in (nan(1, T), nan(1, T, 16))]
        args = [place(runtime, array, 0) for array in (rounded(1, T, 5), *zero, np.array([float(b2)]))]
        device.keep_controller_forward(keep, *outs, *args, 0, T, 3)
        twin = np.zeros((1, T), np.int32)
        cpu.keep_controller_forward(twin, nan(1, T), nan(1, T, 16), *map(runtime.to_host, args), 0, T, 3)
        assert runtime.to_host(keep)[0].tolist() == twin[0].tolist() == expected


@pytest.mark.parametrize("B, T, offset", [(1, 1, 0), (2, 33, 0), (3, 128, 1), (2, 129, 0)])
def test_keep_controller_backward(runtime, B, T, offset):
    rng = np.random.default_rng(1)
    features, (w1, b1, w2, b2) = rounded(B, T, 5), as_double(weights())
    kappa, hidden = np.zeros((B, T)), np.zeros((B, T, 16))
    cpu.keep_controller_forward(np.zeros((B, T), np.int32), kappa, hidden, features, w1, b1, w2, b2, 0, T, T)
    kappa[-1, -1] = 1  # as certain as it gets
    kappa, hidden = (array.astype(np.float32).astype(np.float64) for array in (kappa, hidden))
    target = rng.integers(1, np.arange(2, T + 2), (B, T)).astype(np.int32)
    grads = [rounded(*shape, seed=2) for shape in ((16, 5), (16,), (1, 16), (1,))]
    args = target, kappa, hidden, features, w2, 1 / (B * T)
    check(runtime, "keep_controller_backward", nan(B, T), *grads, *args, offset=offset)
    grads = [np.zeros_like(grad) for grad in grads]
    check(runtime, "keep_controller_backward", nan(B, T), *grads, *args, offset=offset)


@pytest.mark.parametrize("cut", [1, 31, 40])
def test_the_controller_is_causal_bit_for_bit(runtime, cut):
    B, T, C, block = 2, 45, 20, 16
    device, params = cuda.device(runtime), [place(runtime, array, 0) for array in weights()]
    x, entropy = rounded(B, T, C), rounded(B, T)
    results, later = [], []
    for _ in range(2):
        features, state, states = runtime.zeros((B, T, 5)), runtime.zeros((B, 4, C)), place(runtime, x, 0)
        keep, kappa, hidden = runtime.zeros((B, T), np.int32), runtime.zeros((B, T)), runtime.zeros((B, T, 16))
        device.prefix_features(features, state, states, T)
        values = runtime.to_host(features).copy()
        values[..., 4] = entropy
        features = runtime.to_device(values)
        for first in range(0, T, block):
            args = keep, kappa, hidden, features, *params, first, min(block, T - first), 30
            device.keep_controller_forward(*args)
        arrays = [runtime.to_host(array) for array in (features, keep, kappa, hidden)]
        results.append([array[:, :cut].tobytes() for array in arrays])
        later.append(arrays[2][:, cut:].copy())
        x[:, cut:], entropy[:, cut:] = 3 * x[:, cut:] + 1, 0
    assert results[0] == results[1] and (later[0] != later[1]).all()


def test_gradients_have_the_same_bits_twice(runtime):
    device, T = cuda.device(runtime), 700
    target = place(runtime, np.ones((1, T), np.int32), 0)
    args = [
        place(runtime, abs(array), 0) for array in (rounded(1, T), rounded(1, T, 16), rounded(1, T, 5), weights()[2])
    ]
    found = []
    for _ in range(2):
        outs = [runtime.zeros(shape) for shape in ((1, T), (16, 5), (16,), (1, 16), (1,))]
        device.keep_controller_backward(*outs, target, *args, 1.0)
        found.append([runtime.to_host(array).tobytes() for array in outs])
    assert found[0] == found[1]


def test_upstream_controller(runtime):
    params = upstream_controller_init(8, np.random.default_rng(0)).astype(np.float64)
    check(runtime, "upstream_controller", np.full((2, 50), -1, np.int32), rounded(2, 50, 8), params)
    check(runtime, "upstream_controller", np.full((2, 50), -1, np.int32), rounded(2, 50, 8), params, 64)
