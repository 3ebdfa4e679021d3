"""Rotation by position on the ring and by platter."""

import numpy as np
import pytest
from check_op import check_twin, place, rounded

from kernels import cpu, cuda
from kernels.cpu.torus.torus_rope import torus_frequencies


def inputs(B, T, NH, D, hd, seed=0, dtype=np.float64):
    rng = np.random.default_rng([seed, B, T])
    qkv = rng.standard_normal((B, T, 3 * NH * D * hd))
    return qkv.astype(dtype), rng.normal(2, 1, NH).astype(dtype), rng.normal(2, 1, NH).astype(dtype)


SIZES = [  # B, T, NH, D, hd, P, start, offset
    (2, 5, 2, 2, 4, 8, 0, 0), (1, 9, 1, 1, 6, 4, 3, 0), (1, 3, 3, 4, 8, 100, 700, 0), (1, 1, 1, 1, 4, 1, 0, 0),
    (2, 9, 3, 2, 8, 4, 0, 0), (1, 5, 2, 4, 6, 100, 50, 0), (2, 7, 1, 3, 4, 12, 3, 1),
    (1, 3, 2, 2, 32, 1024, 100_000, 0),
]  # fmt: skip


@pytest.mark.parametrize("kind", ["int", "upstream", "orth"])
@pytest.mark.parametrize("B, T, NH, D, hd, P, start, offset", SIZES)
def test_rotation_by_its_formula_and_back(B, T, NH, D, hd, P, start, offset, kind):
    qkv = inputs(B, T, NH, D, hd)[0]
    w, f = torus_frequencies(kind, hd, D, P)
    turned = qkv.copy()
    cpu.torus_rope_forward(turned, w, f, NH, D, P, start)
    x, y = (each.reshape(B, T, 3, NH, D, hd) for each in (qkv, turned))
    assert np.array_equal(x[:, :, 2], y[:, :, 2])
    for t, k, n in np.ndindex(T, D, hd // 2):
        angle = 2 * np.pi * ((start + t) / P * w[n] + k / D * f[n])
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        pair = np.s_[:, t, :2, :, k, 2 * n : 2 * n + 2]
        assert np.abs(x[pair] @ turn.T - y[pair]).max() < 1e-11
    assert np.abs(np.linalg.norm(x, axis=-1) - np.linalg.norm(y, axis=-1)).max() < 1e-13
    cpu.torus_rope_backward(turned, w, f, NH, D, P, start)
    assert np.abs(turned - qkv).max() < 1e-13


def test_whole_frequencies_are_periodic_at_any_position():
    qkv, (w, f) = inputs(1, 6, 2, 4, 8)[0].astype(np.float32), torus_frequencies("int", 8, 4, 24)
    w, f = w.astype(np.float32), f.astype(np.float32)
    near, far = qkv.copy(), qkv.copy()
    cpu.torus_rope_forward(near, w, f, 2, 4, 24, 3)
    cpu.torus_rope_forward(far, w, f, 2, 4, 24, 3 + 24 * 40)
    assert np.array_equal(near, far) and near.dtype == np.float32


@pytest.mark.parametrize("hd, D", [(64, 1), (32, 2), (16, 4), (8, 8), (4, 16), (40, 2)])
def test_frequencies(hd, D):
    P = 256
    w, f = torus_frequencies("int", hd, D, P)
    assert np.array_equal(w, w.astype(int)) and np.array_equal(f, f.astype(int)) and w.min() == 1
    assert w[0] == round(P / (2 * np.pi)) and set(f) == set(range(min(D, hd // 2)))
    w, f = torus_frequencies("orth", hd, D, P)
    assert abs(w @ f) < 1e-12 * (w @ w) and abs(w @ w - f @ f) < 1e-12 * (w @ w)
    w, f = torus_frequencies("upstream", hd, D, P)
    expected = 1, 10000 ** (-2 / hd), 1, 10000 ** (-2 / (hd * max(2 * D, 3)))
    assert np.allclose([*w[:2], *f[:2]], expected, rtol=1e-14, atol=0)


def test_published_depth_frequencies():
    assert np.round(torus_frequencies("orth", 32, 2, 256)[1][:3], 3).tolist() == [-0.345, 0.121, 0.341]


@pytest.mark.parametrize("kind, hd", [("int", 3), ("upstream", 1), ("orth", 2), ("orth", 5), ("int", 0), ("rope", 8)])
def test_frequencies_that_do_not_exist(kind, hd):
    with pytest.raises(ValueError, match=f"rope '?{kind}'?"):
        torus_frequencies(kind, hd, 2, 16)


# ----------------------------------------------------------------------------------------------------------------------
# on CUDA: the emulator, and a GPU if there is one


@pytest.mark.parametrize("kind", ["int", "upstream", "orth"])
@pytest.mark.parametrize("B, T, NH, D, hd, P, start, offset", SIZES)
def test_torus_rope(runtime, B, T, NH, D, hd, P, start, offset, kind):
    w, f = (x.astype(np.float32).astype(np.float64) for x in torus_frequencies(kind, hd, D, P))
    for op in ("torus_rope_forward", "torus_rope_backward"):
        check_twin(runtime, op, rounded(B, T, 3 * NH * D * hd), w, f, NH, D, P, start, offset=offset, tol=1e-6)


def test_whole_frequencies_are_periodic_to_the_bit_at_large_positions(runtime):
    device, P, NH, D, hd = cuda.device(runtime), 1000, 1, 2, 8
    w, f = (place(runtime, x, 0) for x in torus_frequencies("int", hd, D, P))
    results = []
    for start in (7, 7 + 10**6):
        qkv = place(runtime, rounded(1, 3, 3 * NH * D * hd), 0)
        device.torus_rope_forward(qkv, w, f, NH, D, P, start)
        results.append(runtime.to_host(qkv))
    assert np.array_equal(*results)
