"""Every CUDA op against its NumPy twin in float64, on the emulator (numbers; races and bounds) and on a GPU if any."""

import inspect

import numpy as np
import pytest
from check_op import relative

from kernels import cpu, cuda
from kernels.cpu.band.band_mask import band_columns, band_count
from llmc.errors import UserError

TOL = 1e-5  # of float32 against float64, relative to the tensor's largest value


def rounded(*shape, seed=0) -> np.ndarray:
    """Normal values in float64 that float32 holds exactly."""
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32).astype(np.float64)


def place(runtime, array: np.ndarray, offset: int):
    """`array` on the device, floats in single precision, `offset` values behind an aligned address."""
    array = array.astype(np.float32) if array.dtype == np.float64 else array
    padded = np.concatenate([np.zeros(offset, array.dtype), array.ravel()])
    return runtime.to_device(padded)[offset:].reshape(array.shape)


def check(runtime, op: str, *args, offset: int = 0, tol: float = TOL) -> None:
    """Run an op on both devices; every array among its arguments must agree afterwards, outputs and inputs."""
    device = cuda.device(runtime)
    ours = [place(runtime, arg, offset) if isinstance(arg, np.ndarray) else arg for arg in args]
    reference = [arg.copy() if isinstance(arg, np.ndarray) else arg for arg in args]
    returned, expected = getattr(device, op)(*ours), getattr(cpu, op)(*reference)
    names = inspect.signature(getattr(cpu, op)).parameters
    errors = {}
    for name, array, twin, before in zip(names, ours, reference, args):
        if isinstance(twin, np.ndarray):
            values = runtime.to_host(array)
            same = np.array_equal(twin, before, equal_nan=True)  # an input, or all zeros: not a bit may change
            assert not same or np.array_equal(values, before.astype(values.dtype), equal_nan=True), (
                f"{op} changed {name}"
            )
            errors[name] = 0.0 if same else relative(values, twin)
    if expected is not None:
        errors["returned"] = relative(np.float64(returned), np.float64(expected))
    print(f"{op}: " + ", ".join(f"{name} {error:.1e}" for name, error in errors.items() if error))
    assert all(error <= tol for error in errors.values()), errors


def nan(*shape) -> np.ndarray:
    """What an op has to overwrite."""
    return np.full(shape, np.nan)


# ----------------------------------------------------------------------------------------------------------------------
# numbers


@pytest.mark.parametrize("B, T, C, V, start, offset", [
    (1, 1, 1, 3, 0, 0), (3, 5, 8, 6, 2, 0), (2, 33, 12, 50, 0, 1), (2, 70, 7, 5, 1, 0), (1, 3, 1100, 4, 0, 0),
])  # fmt: skip
def test_encoder(runtime, B, T, C, V, start, offset):
    tokens = np.random.default_rng(1).integers(0, V, (B, T)).astype(np.int32)  # with repeats
    wte, wpe = rounded(V, C), rounded(T + 2, C)
    check(runtime, "encoder_forward", nan(B * T, C), tokens, wte, wpe, start, offset=offset)
    check(runtime, "encoder_backward", wte, wpe, rounded(B * T, C, seed=1), tokens, offset=offset)


def test_encoder_gives_nan_for_tokens_outside_the_embedding(runtime):
    device = cuda.device(runtime)
    tokens, out = runtime.to_device(np.array([[0, 5, 4, -1]], np.int32)), runtime.zeros((4, 8))
    wte, wpe = runtime.to_device(np.ones((5, 8), np.float32)), runtime.zeros((4, 8))
    device.encoder_forward(out, tokens, wte, wpe)
    assert np.isnan(runtime.to_host(out)).all(axis=1).tolist() == [False, True, False, True]
    device.encoder_backward(wte, wpe, runtime.to_device(np.ones((4, 8), np.float32)), tokens)
    assert runtime.to_host(wte)[:, 0].tolist() == [2, 1, 1, 1, 2]


@pytest.mark.parametrize("N, C, offset", [
    (1, 4, 0), (1, 1, 0), (7, 36, 0), (9, 50, 0), (33, 768, 0), (5, 64, 1), (600, 16, 0), (3, 1600, 0), (2, 4096, 0),
    (2, 1030, 0),
])  # fmt: skip
def test_layernorm(runtime, N, C, offset):
    inp, inp2, weight, bias = rounded(N, C), rounded(N, C, seed=1), rounded(C, seed=2), rounded(C, seed=3)
    check(runtime, "layernorm_forward", nan(N, C), nan(N), nan(N), inp, weight, bias, offset=offset)
    outs = nan(N, C), nan(N, C), nan(N), nan(N)
    check(runtime, "fused_residual_forward", *outs, inp, inp2, weight, bias, offset=offset)
    mean, var = inp.mean(axis=1), inp.var(axis=1)
    args = inp2, weight, bias, rounded(N, C, seed=4), inp, weight, mean, 1 / np.sqrt(var + 1e-5)
    check(runtime, "layernorm_backward", *args, offset=offset)


def test_sizes_that_a_kernel_cannot_hold_are_refused(emulator):
    device, x = cuda.device(emulator), emulator.zeros((1, 4100))
    with pytest.raises(UserError, match="4100 channels, on a GPU at most 4096"):
        device.layernorm_backward(x, x[0], x[0], x, x, x[0], x, x)
    qkv, out, lse = (emulator.zeros(shape) for shape in ((1, 2, 3 * 130), (2, 130), (1, 1, 2)))
    for refused in (
        lambda: device.attention_forward(out, lse, qkv, 1),
        lambda: device.attention_backward(qkv, out, qkv, out, lse, 1),
    ):
        with pytest.raises(UserError, match="head size 130, on a GPU at most 128"):
            refused()


@pytest.mark.parametrize("N, C, OC", [(1, 1, 3), (5, 12, 20), (64, 48, 600), (300, 10, 130)])
def test_matmul(runtime, N, C, OC):
    inp, weight, bias, dout = rounded(N, C), rounded(OC, C), rounded(OC), rounded(N, OC)
    check(runtime, "matmul_forward", nan(N, OC), inp, weight, bias)
    check(runtime, "matmul_forward", nan(N, OC), inp, weight, None)
    for beta in (0, 1):
        dweight = weight if beta else nan(OC, C)
        check(runtime, "matmul_backward", nan(N, C), dweight, bias, dout, inp, weight, beta)
    check(runtime, "matmul_backward", nan(N, C), nan(OC, C), None, dout, inp, weight)


@pytest.mark.parametrize("N, C, offset", [(1, 1, 0), (64, 33, 0), (65, 128, 0), (700, 132, 0), (300, 132, 1)])
def test_column_sum(runtime, N, C, offset):
    check(runtime, "column_sum", rounded(C), rounded(N, C), offset=offset)


def banded(weight, bandwidth) -> np.ndarray:
    cpu.band_mask(weight[None], bandwidth)
    return weight


@pytest.mark.parametrize("N, OC, C, bandwidth", [
    (1, 16, 4, 1), (5, 64, 16, 7), (130, 256, 64, 40), (3, 300, 75, 30), (5, 16, 64, 7), (130, 64, 256, 40),
    (3, 75, 300, 31), (9, 64, 16, 1000), (4, 64, 16, 0),
])  # fmt: skip
def test_band_matmul(runtime, N, OC, C, bandwidth):
    inp, bias, dout = rounded(N, C), rounded(OC), rounded(N, OC)
    weight = banded(rounded(OC, C), bandwidth) if bandwidth else rounded(OC, C)
    check(runtime, "band_matmul_forward", nan(N, OC), inp, weight, bias, bandwidth)
    for beta in (0, 1):
        dweight = weight if beta else np.zeros((OC, C))
        check(runtime, "band_matmul_backward", nan(N, C), dweight, bias, dout, inp, weight, bandwidth, beta)


@pytest.mark.parametrize("L, rows, columns", [(1, 16, 4), (2, 60, 15), (2, 15, 60), (3, 33, 132)])
@pytest.mark.parametrize("bandwidth", [1, 2, 9, 64, 10**9])
def test_band_mask(runtime, L, rows, columns, bandwidth):
    check(runtime, "band_mask", rounded(L, rows, columns), bandwidth)
    check(
        runtime,
        "band_mask",
        rounded(L, rows, columns),
        bandwidth,
        np.random.default_rng(1).permutation(rows).astype(np.int32),
    )
    device = cuda.device(runtime)
    weight = runtime.to_device(np.ones((L, rows, columns), np.float32))
    device.band_mask(weight, bandwidth)
    kept = runtime.to_host(weight)
    assert kept.sum() == L * band_count(rows, columns, bandwidth)
    start, stop = band_columns(rows // 2, rows, columns, bandwidth)
    assert np.flatnonzero(kept[0, rows // 2]).tolist() == list(range(start, stop))


@pytest.mark.parametrize("B, T, NH, hs", [
    (1, 1, 1, 4), (2, 5, 3, 4), (1, 33, 2, 8), (2, 64, 2, 16), (1, 130, 2, 64), (1, 70, 1, 80), (1, 65, 2, 128),
    (1, 40, 2, 5), (1, 7, 1, 1),
])  # fmt: skip
def test_attention(runtime, B, T, NH, hs):
    C = NH * hs
    qkv, out, lse = rounded(B, T, 3 * C), nan(B * T, C), nan(B, NH, T)
    check(runtime, "attention_forward", out, lse, qkv, NH)
    cpu.attention_forward(out, lse, qkv, NH)
    check(runtime, "attention_backward", nan(B, T, 3 * C), rounded(B * T, C), qkv, out, lse, NH)
    for start in {T - 1, T // 2, max(T - 8, 0), max(T - 9, 0)}:  # up to 8 queries have a kernel of their own
        n = T - start
        check(runtime, "attention_forward", nan(B * n, C), nan(B, NH, n), qkv, NH, start)


@pytest.mark.parametrize("n, offset", [(1, 0), (4, 0), (1027, 0), (64, 1), (63, 3)])
def test_elementwise(runtime, n, offset):
    inp, dout = 3 * rounded(n), rounded(n, seed=1)
    check(runtime, "gelu_forward", nan(n), inp, offset=offset)
    check(runtime, "gelu_backward", nan(n), inp, dout, offset=offset)
    check(runtime, "residual_forward", nan(n), inp, dout, offset=offset)


def test_elementwise_in_place(runtime):
    inp, dout = rounded(77), rounded(77, seed=1)
    device = cuda.device(runtime)
    x, dx, y = (place(runtime, array, 0) for array in (inp, dout, inp))
    device.residual_forward(y, y, x)
    device.gelu_backward(dx, x, dx)
    device.gelu_forward(x, x)
    out, dinp = nan(77), nan(77)
    cpu.gelu_forward(out, inp)
    cpu.gelu_backward(dinp, inp, dout)
    assert relative(runtime.to_host(y), 2 * inp) == 0
    assert relative(runtime.to_host(x), out) <= TOL and relative(runtime.to_host(dx), dinp) <= TOL


@pytest.mark.parametrize("N, V, Vp", [(1, 1, 4), (3, 5, 8), (2, 510, 512), (2, 3001, 3001), (4, 1000, 1003)])
def test_fused_classifier(runtime, N, V, Vp):
    logits, targets = 5 * rounded(N, Vp), np.random.default_rng(1).integers(0, V, N).astype(np.int32)
    logits[:, V:] = np.inf  # padding may hold anything
    check(runtime, "fused_classifier", nan(N), logits, targets, V, 1 / N)


def test_fused_classifier_of_large_logits_and_a_target_outside(runtime):
    logits = np.array([[1e4, 0, -1e4, 0], [-1e30, -1e30, 1e30, 0], [0, 0, 0, 0]])
    targets = np.array([0, 2, 3], np.int32)
    ours = [place(runtime, array, 0) for array in (nan(3), logits, targets)]
    cuda.device(runtime).fused_classifier(*ours, 3, 1.0)
    losses, gradient = (runtime.to_host(array) for array in ours[:2])
    assert losses[:2].tolist() == [0, 0] and np.isnan(losses[2])
    assert not gradient[:2].any()


@pytest.mark.parametrize("n, offset, decay, scale", [(1, 0, 0.0, 1.0), (1030, 0, 0.1, 0.5), (64, 1, 0.1, 1.0)])
def test_adamw(runtime, n, offset, decay, scale):
    params, grads, m, v = (rounded(n, seed=seed) for seed in range(4))
    for t in (1, 1000):
        args = t, 1e-2, 0.9, 0.999, 1e-8, decay, scale
        check(runtime, "adamw_update", params, grads, m, v * v, *args, offset=offset)


@pytest.mark.parametrize("L, rows, columns, bandwidth", [(2, 60, 15, 9), (2, 15, 60, 9), (1, 16, 4, 100)])
def test_band_adamw(runtime, L, rows, columns, bandwidth):
    arrays = [rounded(L, rows, columns, seed=seed) for seed in range(4)]
    arrays[3] *= arrays[3]
    for array in arrays:
        cpu.band_mask(array, bandwidth)
    check(runtime, "band_adamw_update", *arrays, bandwidth, 3, 1e-2, 0.9, 0.95, 1e-8, 0.1, 0.7)


@pytest.mark.parametrize("n, offset", [(1, 0), (5000, 0), (263_000, 0), (1001, 1)])
def test_global_norm(runtime, n, offset):
    check(runtime, "global_norm", rounded(n), offset=offset)


# ----------------------------------------------------------------------------------------------------------------------
# properties


@pytest.mark.parametrize("t", [3, 31, 64])
def test_attention_is_causal_bit_for_bit(runtime, t):
    """What belongs to positions before t keeps its bits whatever comes from t on, and dk, dv from t on whatever queries
    there are before."""
    B, T, NH, C = 1, 75, 2, 32
    device = cuda.device(runtime)

    def run(garbage=None, rows=None, columns=None):
        """Forward, its last rows by decoding, backward; with garbage in some rows and columns of qkv, and in dout."""
        qkv, dout = rounded(B, T, 3 * C), rounded(B * T, C)
        if garbage is not None:
            qkv[:, rows, columns] = dout[rows] = garbage
        qkv, dout = place(runtime, qkv, 0), place(runtime, dout, 0)
        out, lse, dqkv = (place(runtime, nan(*shape), 0) for shape in ((B * T, C), (B, NH, T), (B, T, 3 * C)))
        device.attention_forward(out, lse, qkv, NH)
        device.attention_backward(dqkv, dout, qkv, out, lse, NH)
        return runtime.to_host(out), runtime.to_host(lse), runtime.to_host(dqkv)[0]

    out, lse, dqkv = run()
    assert all(np.isfinite(array).all() for array in (out, lse, dqkv))
    for garbage in (1e30, np.inf, np.nan):
        later = run(garbage, slice(t, T), slice(0, 3 * C))
        assert later[0][:t].tobytes() == out[:t].tobytes() and later[1][..., :t].tobytes() == lse[..., :t].tobytes()
        assert later[2][:t, :C].tobytes() == dqkv[:t, :C].tobytes()
        earlier = run(garbage, slice(0, t), slice(0, C))
        assert earlier[2][t:, C:].tobytes() == dqkv[t:, C:].tobytes()


@pytest.mark.parametrize("n", [1, 8, 9, 40])
def test_the_last_queries_alone_give_what_they_give_among_all(runtime, n):
    """With the cache of keys: to the bit if the kernel is the same, else within 1e-6; and causal."""
    T, NH, C = 75, 2, 32
    device, qkv = cuda.device(runtime), rounded(1, T, 3 * C)
    whole, lse = (place(runtime, nan(*shape), 0) for shape in ((T, C), (1, NH, T)))
    device.attention_forward(whole, lse, place(runtime, qkv, 0), NH)
    part, lse = (place(runtime, nan(*shape), 0) for shape in ((n, C), (1, NH, n)))
    device.attention_forward(part, lse, place(runtime, qkv, 0), NH, T - n)
    whole, part = runtime.to_host(whole)[T - n :], runtime.to_host(part)
    assert relative(part, whole) <= (0 if n > 8 else 1e-6)
    qkv[0, T - 1, C:] = np.nan  # the last key and value are for the last query alone
    device.attention_forward(again := place(runtime, nan(n, C), 0), lse, place(runtime, qkv, 0), NH, T - n)
    assert runtime.to_host(again)[: n - 1].tobytes() == part[: n - 1].tobytes()
