"""The whole banded GPT-2: every gradient by finite differences, causality, accumulation, memory of a step."""

import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest

import train_banded
from kernels import cpu
from kernels.cpu.band.band_matmul import best_channels
from llmc.checkpoint import GPT2Config, named_views, tensor_shapes
from llmc.init import gpt2_init
from systems.band import Band

TINY = GPT2Config(maxT=6, V=11, L=2, NH=2, C=8, Vp=16)
IN_FLOAT64 = SimpleNamespace(**{name: getattr(cpu, name) for name in cpu.__all__} | {"zeros": np.zeros})


def tiny_model(B, T, *bands, dtype=np.float64, device=None) -> train_banded.GPT2:
    """A model with every parameter random, biases and layernorms too; padding rows of wte are 0, as they must be."""
    params = np.random.default_rng(1).standard_normal(gpt2_init(TINY, 1).size).astype(dtype) * 0.3
    named_views(params, tensor_shapes(TINY))["wte"][TINY.V :] = 0
    device = device or (IN_FLOAT64 if dtype == np.float64 else cpu)
    model = train_banded.GPT2(device, TINY, params, B, T, Band(*bands))
    model.mask_weights()
    return model


def batch(B, T, seed=2):
    return np.random.default_rng(seed).integers(0, TINY.V, (2, B, T)).astype(np.int32)


@pytest.mark.parametrize("bands", [(0, 0), (16, 0), (0, 12), (12, 20)])
def test_every_gradient_of_the_model(bands):
    """Each parameter of each tensor against a central difference in float64: relative error <= 1e-6."""
    model, (inputs, targets) = tiny_model(2, 5, *bands), batch(2, 5)
    model.forward(inputs, targets)
    model.backward()
    kept = {"fcw": np.ones((2, 32, 8)), "fcprojw": np.ones((2, 8, 32))}
    for name, bandwidth in zip(kept, bands):
        if bandwidth:
            cpu.band_mask(kept[name], bandwidth)
    step, errors = 1e-5, {}
    for name, grad in vars(model.grads).items():
        values, numeric = getattr(model.params, name).reshape(-1), np.zeros(grad.size)
        for i in np.flatnonzero(kept.get(name, np.ones(grad.shape))):
            value = values[i]
            values[i] = value + step
            model.forward(inputs, targets)
            above = model.mean_loss()
            values[i] = value - step
            model.forward(inputs, targets)
            numeric[i] = (above - model.mean_loss()) / (2 * step)
            values[i] = value
        errors[name] = np.abs(numeric - grad.reshape(-1)).max() / np.abs(grad).max()
    print(bands, ", ".join(f"d{name} {error:.1e}" for name, error in errors.items()))
    assert len(errors) == 16 and max(errors.values()) <= 1e-6, errors
    for name, mask in kept.items():
        assert not getattr(model.grads, name)[mask == 0].any()


def test_what_is_added_to_starts_from_0():
    """All but what a product writes: in GPT-2 five views, since neighbours are one."""
    model = tiny_model(1, 4)
    model.allocate_gradients()
    model.grads_flat.fill(np.nan)
    for grads in model.added_to:
        grads.fill(0)
    tensors = vars(model.grads).items()
    assert {name for name, grad in tensors if np.isnan(grad).all()} == set(train_banded.WRITTEN)
    assert all(name in train_banded.WRITTEN or not grad.any() for name, grad in tensors)
    assert len(model.added_to) == 5


def test_accumulated_gradients_equal_one_batch():
    """Two micro-steps of B = 2 are one step of B = 4: same loss, gradients within float64 rounding."""
    inputs, targets = batch(4, 5)
    whole, halves = tiny_model(4, 5, 16, 16), tiny_model(2, 5, 16, 16)
    whole.forward(inputs, targets)
    loss = whole.mean_loss()
    whole.backward()
    for _ in range(2):  # the second round starts from what the first one left in the buffers
        parts = []
        for micro_step in range(2):
            rows = slice(2 * micro_step, 2 * micro_step + 2)
            halves.forward(inputs[rows], targets[rows], grad_accum=2)
            parts.append(halves.mean_loss())
            halves.backward(first=micro_step == 0)
        assert abs(sum(parts) / 2 - loss) < 1e-14
        assert np.abs(halves.grads_flat - whole.grads_flat).max() < 1e-15


def test_band_products_train_as_masked_dense_ones():
    """Twenty updates by blocks equal twenty with dense products, masked gradients and masked weights."""
    config, bands, B, T = GPT2Config(maxT=64, V=11, L=2, NH=2, C=96, Vp=16), (8, 12), 4, 64
    assert best_channels(384, 96, 8, B * T) == best_channels(96, 384, 12, B * T) == 16
    params = gpt2_init(config, 1).astype(np.float64)
    by_blocks, masked = (
        train_banded.GPT2(IN_FLOAT64, config, params.copy(), B, T, Band(*bands), kernel) for kernel in ("band", "mask")
    )
    for model in (by_blocks, masked):
        model.mask_weights()
    for t in range(1, 21):
        inputs, targets = batch(B, T, seed=t)
        losses = []
        for model in (by_blocks, masked):
            model.forward(inputs, targets)
            losses.append(model.mean_loss())
            model.backward()
            model.update(t, 1e-3, weight_decay=0.1)
        assert abs(losses[0] - losses[1]) < 1e-12
    assert np.abs(by_blocks.params_flat - masked.params_flat).max() < 1e-10
    for model in (by_blocks, masked):
        outside = model.params.fcw.copy()
        kept = np.ones_like(outside)
        cpu.band_mask(kept, 8)
        assert not outside[kept == 0].any() and not model.m.fcw[kept == 0].any() and not model.v.fcw[kept == 0].any()


@pytest.mark.parametrize("bands", [(0, 0), (16, 12)])
def test_model_is_causal_bit_for_bit(bands):
    """Changing token t+1 and later changes no bit of the logits up to t, though BLAS sees other matrices."""
    T = 6
    model, (inputs, _) = tiny_model(2, T, *bands, dtype=np.float32), batch(2, T)
    model.forward(inputs)
    before = model.acts.logits.reshape(2, T, -1).copy()
    for t in range(T - 1):
        changed = inputs.copy()
        changed[:, t + 1 :] = (changed[:, t + 1 :] + 1) % TINY.V
        model.forward(changed)
        after = model.acts.logits.reshape(2, T, -1)
        assert after[:, : t + 1].tobytes() == before[:, : t + 1].tobytes()
        assert (after[:, t + 1] != before[:, t + 1]).any()


def test_extend_gives_the_logits_of_forward():
    """Token by token, in pieces, or all at once: the key-value cache changes nothing but rounding."""
    model, (inputs, _) = tiny_model(1, 6, 16, 16), batch(1, 6)
    model.forward(inputs)
    expected = model.acts.logits[:, : TINY.V]
    for sizes in ([1] * 6, [3, 1, 2], [6]):
        start = 0
        for n in sizes:
            logits = model.extend(inputs[0, start : start + n], start)
            start += n
            assert np.abs(logits - expected[start - 1]).max() < 1e-14


def test_update_clips_and_decays():
    """Clipping scales the gradient to the norm asked for; decay_all=False spares biases and layernorms."""
    inputs, targets = batch(2, 5)
    results = []
    for scale, clip in ((1.0, 0.05), (None, 0.0)):
        model = tiny_model(2, 5)
        model.forward(inputs, targets)
        model.backward()
        norm = np.linalg.norm(model.grads_flat)
        if scale is None:
            model.grads_flat *= 0.05 / norm
        returned = model.update(1, 0.1, weight_decay=0.5, decay_all=False, grad_clip=clip)
        assert returned is None if scale is None else abs(returned - norm) < 1e-12
        results.append(model.params_flat.copy())
    assert np.abs(results[0] - results[1]).max() < 1e-12

    model = tiny_model(2, 5)
    model.forward(inputs, targets)
    model.backward()
    model.grads_flat.fill(0)
    before = {name: tensor.copy() for name, tensor in vars(model.params).items()}
    model.update(1, 0.1, weight_decay=0.5, decay_all=False)
    for name, tensor in vars(model.params).items():
        decayed = name in ("wte", "wpe", "qkvw", "attprojw", "fcw", "fcprojw")
        assert np.abs(tensor - before[name] * (0.95 if decayed else 1)).max() < 1e-15, name


def test_steps_after_the_first_allocate_nothing_of_activation_size():
    """Peak of Python's allocations in a step of B*T = 256 rows: below the smallest activation, 256 x C floats."""
    config = GPT2Config(maxT=64, V=5000, L=2, NH=4, C=128, Vp=5120)
    model = train_banded.GPT2(cpu, config, gpt2_init(config, 1), 4, 64, Band(256, 256))
    inputs, targets = np.random.default_rng(3).integers(0, config.V, (2, 4, 64)).astype(np.int32)

    def step(t):
        for micro_step in range(2):
            model.forward(inputs, targets, grad_accum=2)
            model.backward(first=micro_step == 0)
        model.update(t, 1e-4, grad_clip=1.0)

    for t in (1, 2):
        step(t)
    tracemalloc.start()
    step(3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    print(f"peak of a step: {peak} bytes")
    assert peak < 256 * 128 * 4
