"""Our causal controller of how many keys a query keeps."""

import numpy as np
import pytest
from check_op import check_gradients, check_twin, nan, place, relative, rounded
from test_prefix_features import features_of

from kernels import cpu, cuda
from kernels.cpu.sparse.keep_controller import FEATURES, HIDDEN, TYPICAL, keep_controller_init


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
        cpu.keep_controller_forward(keep, kappa, hidden, features, w1, b1, w2, b2, first, rows, most)
    return keep, kappa, hidden


SIZES = [  # B, T, offset
    (1, 1, 0), (2, 33, 0), (3, 70, 0), (3, 128, 1), (2, 129, 0),
]  # fmt: skip


@pytest.mark.parametrize("B, T, offset", SIZES)
def test_keep_controller(B, T, offset):
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
        cpu.keep_controller_backward(losses, *grads, *args, dscale)
        once = [grad.copy() for grad in grads]
        cpu.keep_controller_backward(losses, *grads, *args, dscale)
        assert all(relative(twice, 2 * grad) < 1e-6 for twice, grad in zip(grads, once))
        once[2] /= 8
        return np.array([losses.mean()], dtype), *once

    def backward(dout, saved, **inputs):
        return {name: dout[0] * grad for name, grad in zip(("w1", "b1", "w2", "b2"), saved[1:])}

    check_gradients(loss_of, backward, w1=(16, 5), b1=(16,), w2=(1, 16), b2=(1,))


def test_losses_are_the_cross_entropy_and_stay_finite():
    kappa = np.array([[0.5, 0.25, 1.0, 0.0, 1.0]])
    target = np.array([[1, 1, 3, 4, 1]], np.int32)
    losses, grads = np.full((1, 5), np.nan), [np.zeros(shape) for shape in ((16, 5), 16, (1, 16), 1)]
    args = target, kappa, np.ones((1, 5, 16)), np.ones((1, 5, 5)), np.ones((1, 16))
    cpu.keep_controller_backward(losses, *grads, *args, 1.0)
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
    cpu.keep_controller_forward(*arrays, features[:, start:], *weights, 33, 8, 20, start)
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
        cpu.keep_controller_backward(losses, *grads, target, kappa, hidden, features, weights[2], 1 / (B * T))
        for weight, grad in zip(weights, grads):
            weight -= grad
    error = np.abs(kappa - wanted)[:, 16:]
    print(f"mean distance of kappa from what is wanted: {error.mean():.3f}")
    assert error.mean() < 0.03 and np.corrcoef(keep[:, -1], target[:, -1])[0, 1] > 0.9


# ----------------------------------------------------------------------------------------------------------------------
# on CUDA: the emulator, and a GPU if there is one


def weights(seed=0) -> tuple[np.ndarray, ...]:
    """w1, b1, w2, b2, no zeros among the biases."""
    return tuple(0.3 * rounded(*shape, seed=seed).astype("f") for shape in ((16, 5), (16,), (1, 16), (1,)))


def as_double(arrays) -> list[np.ndarray]:
    return [array.astype(np.float64) for array in arrays]


@pytest.mark.parametrize("B, Tq, first, rows, most, start, offset", [
    (1, 1, 0, 1, 5, 0, 0), (2, 9, 0, 9, 4, 0, 0), (3, 70, 32, 32, 1000, 0, 1), (2, 6, 33, 3, 20, 30, 3),
    (5, 7, 6, 1, 7, 0, 0),
])  # fmt: skip
def test_keep_controller_forward(runtime, B, Tq, first, rows, most, start, offset):
    features, (w1, b1, w2, b2) = rounded(B, Tq, 5), as_double(weights())
    keep, kappa, hidden = np.full((B, Tq), -1, np.int32), rounded(B, Tq, seed=1), rounded(B, Tq, 16)
    args = features, w1, b1, w2, b2, first, rows, most, start
    check_twin(runtime, "keep_controller_forward", keep, kappa, hidden, *args, offset=offset)
    cpu.keep_controller_forward(keep, kappa, hidden, *args)
    written = slice(first - start, first - start + rows)
    shares = kappa[:, written] * np.arange(first + 1, first + rows + 1)
    assert np.abs(shares % 1 - 0.5).min() > 1e-4  # else rounding of kappa decides
    assert (np.delete(keep, np.r_[written], axis=1) == -1).all() and (keep[:, written] > 0).all()


def test_keep_is_rounded_half_to_even_and_limited_on_cuda(runtime):
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


@pytest.mark.parametrize("B, T, offset", SIZES)
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
    check_twin(runtime, "keep_controller_backward", nan(B, T), *grads, *args, offset=offset)
    grads = [np.zeros_like(grad) for grad in grads]
    check_twin(runtime, "keep_controller_backward", nan(B, T), *grads, *args, offset=offset)


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
