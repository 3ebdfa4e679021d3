"""Attention on tensor cores: the emulator as a GPU that has them, in TF32 and in 3xTF32, and a GPU if any."""

import numpy as np
import pytest
from availability import open_gpu, skip_off_linux
from check_op import check_twin, nan, place, relative, rounded
from cuda_emulator.runtime import EmulatedRuntime

from kernels import cpu, cuda
from kernels.cuda.runtime import tensor_cores

SIZES = [  # B, T, NH, hs
    (1, 9, 1, 4), (2, 35, 2, 8), (1, 150, 1, 64), (1, 33, 3, 40), (1, 131, 1, 36), (1, 67, 2, 80), (1, 65, 1, 128),
    (1, 40, 2, 5), (1, 17, 1, 1), (1, 10, 1, 127),
]  # fmt: skip
# of float64, relative to a tensor's largest value: at most, and at least where operands are rounded
TF32, FLOAT32, ROUNDED = 1.5e-3, 5e-6, 2e-5


def opened(kind: str, tf32: bool):
    if kind == "gpu":
        gpu = open_gpu(tf32)
        if not tensor_cores.worth_it(gpu):
            pytest.skip(f"{gpu.name} has no tensor cores that are worth it")
        return gpu
    skip_off_linux()
    return EmulatedRuntime(kind, schedule="random", seed=3, capability=(8, 0), tf32=tf32)


@pytest.fixture(scope="module", params=["check", pytest.param("gpu", marks=pytest.mark.gpu)])
def kind(request):
    return request.param


@pytest.fixture(scope="module", params=[False, True], ids=["3xtf32", "tf32"])
def runtime(request, kind):
    return opened(kind, request.param)


def tolerance(runtime) -> float:
    return TF32 if runtime.tf32 else FLOAT32


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("B, T, NH, hs", SIZES)
def test_forward(runtime, B, T, NH, hs, offset):
    """Aligned rows and others, any head size, the last rows alone as well."""
    for start in {0, T // 3}:
        n = T - start
        if n > 8:
            given = nan(B * n, NH * hs), nan(B, NH, n), rounded(B, T, 3 * NH * hs), NH, start
            check_twin(runtime, "attention_forward", *given, offset=offset, tol=tolerance(runtime))


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("B, T, NH, hs", SIZES)
def test_backward(runtime, B, T, NH, hs, offset):
    qkv, dout = rounded(B, T, 3 * NH * hs), rounded(B * T, NH * hs)
    out, lse = np.empty_like(dout), np.empty((B, NH, T))
    cpu.attention_forward(out, lse, qkv, NH)
    out, lse = (array.astype(np.float32).astype(np.float64) for array in (out, lse))
    check_twin(
        runtime, "attention_backward", nan(*qkv.shape), dout, qkv, out, lse, NH, offset=offset, tol=tolerance(runtime)
    )


def results(runtime, qkv, dout, NH) -> list[np.ndarray]:
    """out, lse, dqkv"""
    B, T, C3 = qkv.shape
    device, C = cuda.device(runtime), C3 // 3
    qkv, dout = place(runtime, qkv, 0), place(runtime, dout, 0)
    out, lse, dqkv = (place(runtime, nan(*shape), 0) for shape in ((B * T, C), (B, NH, T), (B, T, C3)))
    device.attention_forward(out, lse, qkv, NH)
    device.attention_backward(dqkv, dout, qkv, out, lse, NH)
    return [runtime.to_host(array) for array in (out, lse, dqkv)]


def test_tf32_rounds_and_3xtf32_does_not(kind):
    """Errors of many values in the norm; twice the same bits; today's kernels for older GPUs are as good as 3xTF32."""
    B, T, NH, C = 1, 130, 2, 128
    qkv, dout = rounded(B, T, 3 * C), rounded(B * T, C)
    out, lse, dqkv = np.empty((B * T, C)), np.empty((B, NH, T)), np.empty((B, T, 3 * C))
    cpu.attention_forward(out, lse, qkv, NH)
    cpu.attention_backward(dqkv, dout, qkv, out, lse, NH)
    errors = {}
    for tf32 in (False, True):
        runtime = opened("fast" if kind == "check" else kind, tf32)
        ours, again = (results(runtime, qkv, dout, NH) for _ in range(2))
        assert all(a.tobytes() == b.tobytes() for a, b in zip(ours, again))
        errors[tf32] = [relative(a, b) for a, b in zip(ours, (out, lse, dqkv))]
    print(f"out, lse, dqkv: 3xTF32 {errors[False]}, TF32 {errors[True]}")
    assert max(errors[False]) <= FLOAT32 and max(errors[True]) <= TF32
    assert errors[True][0] >= ROUNDED


@pytest.mark.parametrize("t, hs", [(3, 16), (31, 16), (64, 16), (31, 72)])
def test_causal_bit_for_bit(runtime, t, hs):
    """What belongs to positions before t keeps its bits whatever comes from t on, and dk, dv from t on whatever queries
    there are before; what sees a NaN is NaN."""
    B, T, NH = 1, 75, 2
    C = NH * hs

    def run(garbage=None, rows=None, columns=None):
        qkv, dout = rounded(B, T, 3 * C), rounded(B * T, C)
        if garbage is not None:
            qkv[:, rows, columns] = dout[rows] = garbage
        return results(runtime, qkv, dout, NH)

    out, lse, dqkv = run()
    assert all(np.isfinite(array).all() for array in (out, lse, dqkv))
    for garbage in (-3.4028e38, np.inf, np.nan):
        later = run(garbage, slice(t, T), slice(0, 3 * C))
        assert later[0][:t].tobytes() == out[:t].tobytes() and later[1][..., :t].tobytes() == lse[..., :t].tobytes()
        assert later[2][0, :t, :C].tobytes() == dqkv[0, :t, :C].tobytes()
        earlier = run(garbage, slice(0, t), slice(0, C))
        assert earlier[2][0, t:, C:].tobytes() == dqkv[0, t:, C:].tobytes()
        values = run(garbage, slice(t, T), slice(2 * C, 3 * C))
        assert values[0][:t].tobytes() == out[:t].tobytes() and values[1].tobytes() == lse.tobytes()
        assert np.isfinite(garbage) or not np.isfinite(values[0][t:]).any()


@pytest.mark.parametrize("n", [9, 40])
def test_the_last_queries_alone_give_what_they_give_among_all(runtime, n):
    T, NH, C = 75, 2, 32
    device, qkv = cuda.device(runtime), rounded(1, T, 3 * C)
    whole, lse = (place(runtime, nan(*shape), 0) for shape in ((T, C), (1, NH, T)))
    device.attention_forward(whole, lse, place(runtime, qkv, 0), NH)
    part, lse = (place(runtime, nan(*shape), 0) for shape in ((n, C), (1, NH, n)))
    device.attention_forward(part, lse, place(runtime, qkv, 0), NH, T - n)
    assert runtime.to_host(whole)[T - n :].tobytes() == runtime.to_host(part).tobytes()


def test_large_scores(runtime):
    qkv = 300 * rounded(1, 70, 48)
    assert all(np.isfinite(array).all() for array in results(runtime, qkv, np.ones((70, 16)), 2))
