"""What our controller knows of a prefix."""

import numpy as np
import pytest
from check_op import check_twin, nan, place, relative, rounded

from kernels import cpu, cuda


def features_of(x, maxT, parts=None) -> tuple[np.ndarray, np.ndarray]:
    """(features, state) of x (B,T,C), in one call or in calls for `parts` rows, which sum to T."""
    B, T, C = x.shape
    features, state, start = np.full((B, T, 5), 7, x.dtype), np.full((B, 4, C), np.nan, x.dtype), 0
    for rows in parts or [T]:
        part = np.full((B, rows, 5), 7, x.dtype)
        cpu.prefix_features(part, state, x[:, start : start + rows], maxT, start)
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


# ----------------------------------------------------------------------------------------------------------------------
# on CUDA: the emulator, and a GPU if there is one


@pytest.mark.parametrize("B, T, C, maxT, offset", [
    (1, 1, 1, 1, 0), (2, 5, 33, 8, 0), (3, 70, 40, 70, 1), (1, 32, 64, 1000, 0), (2, 33, 7, 64, 3),
    (1, 300, 32, 300, 0),
])  # fmt: skip
def test_prefix_features(runtime, B, T, C, maxT, offset):
    x = rounded(B, T, C)
    check_twin(runtime, "prefix_features", rounded(B, T, 5), nan(B, 4, C), x, maxT, offset=offset)
    if T > 1:  # what comes behind a cached prefix
        state, cut = nan(B, 4, C), T // 2
        cpu.prefix_features(nan(B, cut, 5), state, x[:, :cut], maxT)
        state = state.astype(np.float32).astype(np.float64)
        args = rounded(B, T - cut, 5), state, x[:, cut:].copy(), maxT, cut
        check_twin(runtime, "prefix_features", *args, offset=offset)


def test_prefix_features_leave_the_entropy_alone(runtime):
    features = rounded(2, 40, 5)
    ours = [place(runtime, array, 0) for array in (features, nan(2, 4, 9), rounded(2, 40, 9))]
    cuda.device(runtime).prefix_features(*ours, 64)
    assert np.array_equal(runtime.to_host(ours[0])[..., 4], features[..., 4])


def test_prefix_features_of_states_far_from_zero_on_cuda(runtime):
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


def test_prefix_features_in_parts_have_the_bits_of_one_call_on_cuda(runtime):
    x = rounded(2, 70, 45)
    whole = features_in_parts(runtime, x, [70], 100)
    for parts in ([1] * 70, [33, 36, 1]):
        assert features_in_parts(runtime, x, parts, 100) == whole
