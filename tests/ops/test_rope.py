"""Rotary position embedding."""

import numpy as np
import pytest
from check_op import check_gradients, check_twin, place, relative, rounded

from kernels import cpu, cuda


def rotated_by_hand(x, heads, rotated, start):
    """x (B,T,W) turned pair by pair with cosine and sine of the textbook's angle."""
    out, (_, T, W) = x.copy(), x.shape
    for t in range(T):
        for h in range(heads):
            for i in range(rotated // 2):
                angle = (t + start) * 10000 ** (-2 * i / rotated)
                j = h * (W // heads) + 2 * i
                a, b = x[:, t, j], x[:, t, j + 1]
                out[:, t, j] = a * np.cos(angle) - b * np.sin(angle)
                out[:, t, j + 1] = a * np.sin(angle) + b * np.cos(angle)
    return out


SIZES = [  # B, T, heads, width, rotated, start, offset
    (1, 1, 1, 2, 2, 0, 0), (2, 5, 3, 7, 4, 0, 0), (2, 5, 3, 7, 4, 3, 0), (1, 3, 2, 8, 8, 1000, 0),
    (1, 40, 1, 6, 2, 7, 0), (2, 33, 4, 16, 8, 0, 1), (1, 70, 1, 12, 12, 0, 2), (1, 3, 2, 64, 64, 4093, 0),
    (1, 2, 1, 4, 4, 10**6, 0),
]  # fmt: skip


@pytest.mark.parametrize("B, T, heads, width, rotated, start, offset", SIZES)
def test_rope(B, T, heads, width, rotated, start, offset):
    def forward(x):
        out = x.copy()
        cpu.rope_forward(out, heads, rotated, start)
        return (out,)

    def backward(dout, saved, x):
        dx = dout.copy()
        cpu.rope_backward(dx, heads, rotated, start)
        return dict(x=dx)

    check_gradients(forward, backward, x=(B, T, heads * width))
    x = np.random.default_rng(1).standard_normal((B, T, heads * width))
    far = max(1, start / 1000)  # the last bit of an angle grows with it
    assert relative(forward(x)[0], rotated_by_hand(x, heads, rotated, start)) < 1e-13 * far
    assert relative(backward(forward(x)[0], None, x)["x"], x) < 1e-15  # and back: a rotation's transpose is its inverse
    rest = forward(x)[0].reshape(B, T, heads, width)[..., rotated:]
    assert rest.tobytes() == x.reshape(B, T, heads, width)[..., rotated:].tobytes()


def test_rope_is_by_position_in_whatever_pieces():
    x = np.random.default_rng(2).standard_normal((2, 300, 12), np.float32)
    whole, pieces = x.copy(), x.copy()
    cpu.rope_forward(whole, 2, 4)
    for start, stop in ((0, 1), (1, 130), (130, 300)):
        piece = pieces[:, start:stop].copy()
        cpu.rope_forward(piece, 2, 4, start)
        pieces[:, start:stop] = piece
    assert relative(pieces, whole) < 1e-6


def test_rotated_products_depend_on_the_distance_alone():
    """q at position t times k at position s is the same at t + 1000 and s + 1000, and differs at another distance."""
    q, k = np.random.default_rng(3).standard_normal((2, 1, 1, 16))

    def product(t, s):
        turned = [q.copy(), k.copy()]
        cpu.rope_forward(turned[0], 1, 16, t)
        cpu.rope_forward(turned[1], 1, 16, s)
        return float(np.vdot(*turned))

    for distance in (0, 1, 17, 300):
        here, there = product(distance, 0), product(distance + 1000, 1000)
        assert abs(here - there) < 1e-11
    assert abs(product(0, 0) - np.vdot(q, k)) < 1e-14
    assert abs(product(5, 0) - product(6, 0)) > 1e-2


def test_rope_in_float32_is_exact_at_far_positions():
    """The angle is computed in double: at position 4095 a float32 angle would be off by 1e-4."""
    x = np.random.default_rng(4).standard_normal((1, 8, 32))
    far, far32 = x.copy(), x.astype(np.float32)
    cpu.rope_forward(far, 2, 16, 4088)
    cpu.rope_forward(far32, 2, 16, 4088)
    assert relative(far, rotated_by_hand(x, 2, 16, 4088)) < 1e-12
    assert far32.dtype == np.float32 and relative(far32, far) < 2e-7


# ----------------------------------------------------------------------------------------------------------------------
# on CUDA: the emulator, and a GPU if there is one


@pytest.mark.parametrize("B, T, heads, width, rotated, start, offset", SIZES)
def test_rope_on_cuda(runtime, B, T, heads, width, rotated, start, offset):
    for op in ("rope_forward", "rope_backward"):
        check_twin(runtime, op, rounded(B, T, heads * width), heads, rotated, start, offset=offset, tol=5e-7)


@pytest.mark.parametrize("rotated", [2, 16, 64])
def test_positions_that_a_float_angle_would_miss(runtime, rotated):
    """Every 512th position up to 4096, to 5e-7: the angle of pair 0 is the position itself."""
    device, x = cuda.device(runtime), rounded(1, 1, rotated)
    for start in range(0, 4097, 512):
        ours, reference = place(runtime, x, 0), x.copy()
        device.rope_forward(ours, 1, rotated, start)
        cpu.rope_forward(reference, 1, rotated, start)
        assert relative(runtime.to_host(ours), reference) < 5e-7
