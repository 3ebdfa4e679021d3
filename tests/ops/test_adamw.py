"""AdamW."""

import numpy as np
import pytest
from check_op import TOL, check_twin, relative, rounded

from kernels import cpu, cuda
from kernels.cpu.gpt2.adamw import adamw_rates


def test_adamw_follows_the_formula():
    """Three updates against AdamW as written, with weight decay and a clipped gradient, over several blocks."""
    rng, n = np.random.default_rng(8), 600_001
    p, m, v = rng.standard_normal(n), np.zeros(n), np.zeros(n)
    p2, m2, v2 = p.copy(), np.zeros(n), np.zeros(n)
    lr, b1, b2, eps, decay, clip, norm = 1e-3, 0.9, 0.95, 1e-8, 0.1, 3.0, np.array([6.0])
    scale = 0.5
    for t in (1, 2, 3):
        g = rng.standard_normal(n)
        cpu.adamw_update(p, g, m, v, np.array(adamw_rates(t, lr, b1, b2, eps, decay, clip)), norm)
        m2 = b1 * m2 + (1 - b1) * scale * g
        v2 = b2 * v2 + (1 - b2) * (scale * g) ** 2
        p2 -= lr * (m2 / (1 - b1**t) / (np.sqrt(v2 / (1 - b2**t)) + eps) + decay * p2)
    assert relative(p, p2) < 1e-14 and relative(m, m2) < 1e-14 and relative(v, v2) < 1e-14


def test_adamw_first_step_moves_by_lr():
    """m/c1 = g and sqrt(v/c2) = |g|: without decay the first update is lr, whatever the gradient's size."""
    p, g = np.zeros(4, "f"), np.array([1e-3, -5.0, 2e4, 0.0], "f")
    rates = np.array(adamw_rates(1, 0.01, 0.9, 0.999, 1e-8, 0.0), "f")
    cpu.adamw_update(p, g, np.zeros(4, "f"), np.zeros(4, "f"), rates, np.zeros(1, "f"))
    assert np.abs(p - [-0.01, 0.01, -0.01, 0]).max() < 1e-6


@pytest.mark.parametrize(
    "clip, norm, scale", [(0, 9, 1), (2, 1.5, 1), (2, 2, 1), (2, 8, 0.25), (2, np.nan, 1), (2, np.inf, 0)]
)
def test_gradients_above_the_clip_are_scaled(clip, norm, scale, emulator):
    """beta1 = 0: m becomes the scaled gradient, on both devices."""
    rates = np.array(adamw_rates(1, 0.1, 0.0, 0.999, 1e-8, 0.0, clip), "f")
    arrays = [np.full(4, value, "f") for value in (0, 8, 0, 0)] + [rates, np.array([norm], "f")]
    ours = [emulator.to_device(array) for array in arrays]
    cpu.adamw_update(*arrays)
    cuda.device(emulator).adamw_update(*ours)
    assert arrays[2].tolist() == emulator.to_host(ours[2]).tolist() == [8 * scale] * 4


# ----------------------------------------------------------------------------------------------------------------------
# on CUDA: the emulator, and a GPU if there is one


@pytest.mark.parametrize("n, offset, decay, clip", [(1, 0, 0.0, 0.0), (1030, 0, 0.1, 2.0), (64, 1, 0.1, 9.0)])
def test_adamw(runtime, n, offset, decay, clip):
    params, grads, m, v = (rounded(n, seed=seed) for seed in range(4))
    for t in (1, 1000):
        args = np.array(adamw_rates(t, 1e-2, 0.9, 0.999, 1e-8, decay, clip)), np.array([4.0])
        check_twin(runtime, "adamw_update", params, grads, m, v * v, *args, offset=offset)


@pytest.mark.parametrize("sizes", [(1030, 5, 64, 1024, 2051), (7,) * 70])  # 70: more than a warp looks at once
def test_adamw_of_all_tensors(runtime, sizes):
    """Tensors of two groups of settings, a third that is left out; in params they are two values further apart."""
    buffers = [rounded(sum(sizes) + 2 * len(sizes), seed=seed).astype("f") for seed in range(4)]
    buffers[3] *= buffers[3]
    ours, twins = [runtime.to_device(buffer) for buffer in buffers], [buffer.copy() for buffer in buffers]
    groups = (3, 1e-2, 0.9, 0.95, 1e-8, 0.1, 0.7), (1000, 1e-3, 0.9, 0.999, 1e-8, 0.0, 0.0)
    given = [np.array([adamw_rates(*group) for group in groups], "f"), np.ones(1, "f")]  # rates, norm

    def updates(buffers):
        begin, further = 0, 0
        for i, size in enumerate(sizes):
            views = [b[begin + further * (b is buffers[0]) :][:size] for b in buffers]
            if i % 3 < 2:
                yield *views, i % 3
            begin, further = begin + size, further + 2

    device = cuda.device(runtime)
    device.adamw_update_all(*ours, list(updates(ours)), *map(runtime.to_device, given))
    cpu.adamw_update_all(*twins, list(updates(twins)), *given)
    for array, twin, before in zip(ours, twins, buffers):
        values = runtime.to_host(array)
        assert relative(values, twin) < TOL
        assert np.array_equal(values[twin == before], before[twin == before])


def test_adamw_of_nothing_and_of_strangers(emulator):
    device, flat, other = cuda.device(emulator), emulator.zeros(40), emulator.zeros(8)
    given = emulator.zeros((1, 6)), emulator.zeros(1)
    device.adamw_update_all(flat, flat, flat, flat, [], *given)
    with pytest.raises(ValueError, match=r"\(8,\) is no part of the flat buffer of 40 values"):
        device.adamw_update_all(flat, flat, flat, flat, [(other, flat, flat, flat, 0)], *given)
    with pytest.raises(ValueError, match=r"gradient, m and v begin at \[0, 8\]"):
        device.adamw_update_all(flat, flat, flat, flat, [(flat[:8], flat[:8], flat[:8], flat[8:16], 0)], *given)
