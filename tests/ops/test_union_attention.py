"""Attention over selected keys on tensor cores: the emulator as a GPU with them, in TF32 and in 3xTF32, and a GPU."""

import numpy as np
import pytest
from availability import open_gpu, skip_off_linux
from check_op import TOL_TENSOR, check_twin, nan, place, relative, rounded
from cuda_emulator.runtime import SCHEDULES, EmulatedRuntime
from selected_keys import lists, selection

from kernels import cpu, cuda
from kernels.cuda.runtime.tensor_cores import worth_it
from kernels.cuda.sparse import sparse_attention


@pytest.fixture(scope="module", autouse=True)
def taken():
    """64 queries share their keys whatever the sizes, without a trial."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse_attention, "WORTH", 0)
        patch.setattr(sparse_attention, "takes_tensor_cores", lambda cuda, *_: worth_it(cuda))
        yield


def opened(kind: str, tf32: bool, schedule: str = "random"):
    if kind == "gpu":
        gpu = open_gpu(tf32)
        if not worth_it(gpu):
            pytest.skip(f"{gpu.name} has no tensor cores that are worth it")
        return gpu
    skip_off_linux()
    return EmulatedRuntime(kind, schedule=schedule, seed=3, capability=(8, 0), tf32=tf32)


@pytest.fixture(scope="module", params=["check", pytest.param("gpu", marks=pytest.mark.gpu)])
def kind(request):
    return request.param


@pytest.fixture(scope="module", params=[False, True], ids=["3xtf32", "tf32"])
def runtime(request, kind):
    return opened(kind, request.param)


def all_the_same(B, T, K):
    """The oldest K keys, for all queries, of the future for some."""
    return np.broadcast_to(np.arange(K, dtype=np.int32), (B, T, K)).copy(), np.full((B, T), K, np.int32)


def none_shared(B, T, K):
    """K keys of its own for each of the last T / K - 1 queries, and the first key for the others."""
    index, count = np.full((B, T, K), -1, np.int32), np.ones((B, T), np.int32)
    index[:, :, 0] = 0
    for i, t in enumerate(range(T - T // K + 1, T)):
        index[:, t], count[:, t] = K * i + np.arange(K), K
    return index, count


def the_latest(B, T, K):
    """The K keys up to a query's own."""
    index = np.arange(T)[:, None] + np.arange(1 - K, 1)  # (T,K)
    index = np.where(index >= 0, index, T)
    index.sort(axis=1)
    index = np.where(index < T, index, -1).astype(np.int32)
    return np.repeat(index[None], B, axis=0), np.repeat((index >= 0).sum(axis=1, dtype=np.int32)[None], B, axis=0)


# B, T, NH, hs, and the lists' K and kind
CASES = [
    (1, 1, 1, 4, 1, lists), (2, 70, 2, 16, 9, lists), (1, 150, 1, 64, 40, lists), (1, 67, 2, 80, 30, lists),
    (1, 65, 1, 128, 65, lists), (1, 40, 2, 5, 7, lists), (1, 66, 1, 127, 1, lists), (2, 66, 1, 40, 20, all_the_same),
    (1, 90, 1, 32, 9, none_shared), (1, 130, 1, 16, 20, selection), (2, 70, 1, 16, 10, the_latest),
]  # fmt: skip


def saved(qkv, index, count, NH):
    """out, lse in float64, of values that float32 has"""
    B, T, C3 = qkv.shape
    out, lse = np.empty((B * T, C3 // 3)), np.empty((B, NH, T))
    cpu.sparse_attention_forward(out, lse, qkv, index, count, NH)
    return [array.astype(np.float32).astype(np.float64) for array in (out, lse)]


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("B, T, NH, hs, K, chosen", CASES)
def test_it_computes_what_numpy_does(runtime, B, T, NH, hs, K, chosen, offset):
    """Forward, backward, mean: aligned rows and others, any head size, lists that share all or nothing."""
    C, (index, count), tol = NH * hs, chosen(B, T, K), TOL_TENSOR[runtime.tf32]
    qkv, dout = rounded(B, T, 3 * C), rounded(B * T, C)
    given, options = (qkv, index, count, NH), dict(offset=offset, tol=tol)
    check_twin(runtime, "sparse_attention_forward", nan(B * T, C), nan(B, NH, T), *given, **options)
    out, lse = saved(*given)
    check_twin(runtime, "sparse_attention_mean", nan(B, T, K), qkv, lse, index, count, NH, **options)
    check_twin(runtime, "sparse_attention_backward", nan(B, T, 3 * C), dout, qkv, out, lse, index, count, NH, **options)


@pytest.mark.parametrize("start, future", [(3, False), (60, True), (74, False)])
def test_the_last_queries_alone(runtime, start, future):
    B, T, NH, C, K = 2, 75, 2, 32, 12
    index, count = lists(B, T, K, start, future)
    args = nan(B * (T - start), C), nan(B, NH, T - start), rounded(B, T, 3 * C), index, count, NH, start
    check_twin(runtime, "sparse_attention_forward", *args, tol=TOL_TENSOR[runtime.tf32])


def results(runtime, qkv, dout, index, count, NH) -> dict[str, np.ndarray]:
    B, T, C3 = qkv.shape
    device, C = cuda.device(runtime), C3 // 3
    shapes = dict(out=(B * T, C), lse=(B, NH, T), dqkv=(B, T, C3), mean=index.shape)
    out, lse, dqkv, mean = found = [place(runtime, nan(*shape), 0) for shape in shapes.values()]
    qkv, dout, index, count = (place(runtime, array, 0) for array in (qkv, dout, index, count))
    device.sparse_attention_forward(out, lse, qkv, index, count, NH)
    device.sparse_attention_backward(dqkv, dout, qkv, out, lse, index, count, NH)
    device.sparse_attention_mean(mean, qkv, lse, index, count, NH)
    return dict(zip(shapes, map(runtime.to_host, found)))


GARBAGE = (-3.4028e38, np.inf, np.nan)


@pytest.mark.parametrize("cut, T, K, hs", [(1, 75, 12, 16), (100, 150, 2, 16), (64, 75, 12, 72), (31, 64, 2, 72)])
def test_causal_bit_for_bit(runtime, cut, T, K, hs):
    """Not a bit before position `cut` depends on what comes there and after, NaN and other lists included; not even
    where they bring their tile many keys that it did not have."""
    B, NH = 1, 1
    C = NH * hs
    qkv, dout, (index, count) = rounded(B, T, 3 * C), rounded(B * T, C), lists(B, T, K)

    def before():
        found = results(runtime, qkv, dout, index, count, NH)
        parts = found["out"][:cut], found["lse"][..., :cut], found["dqkv"][:, :cut, :C], found["mean"][:, :cut]
        assert all(np.isfinite(part).all() for part in parts)
        return [part.tobytes() for part in parts]

    expected = before()
    for seed, garbage in enumerate(GARBAGE):
        qkv[:, cut:] = dout[cut:] = garbage
        other = lists(B, T, K, full=True, seed=seed + 1)
        index[:, cut:], count[:, cut:] = other[0][:, cut:], other[1][:, cut:]
        assert before() == expected


@pytest.mark.parametrize("hs", [16, 72])
def test_what_was_not_selected_reaches_nothing(runtime, hs):
    """A key's values change no bit of the queries that did not select it, a query's none of keys that it did not."""
    B, T, NH = 1, 70, 1
    C, (index, count) = NH * hs, lists(B, T, 10)
    chosen = np.zeros((T, T), bool)
    chosen[np.nonzero(index[0] >= 0)[0], index[index >= 0]] = True

    def run(garbage=0.0, row=0, columns=None):
        qkv, dout = rounded(B, T, 3 * C), rounded(B * T, C)
        if columns is not None:
            qkv[:, row, columns] = garbage
            if columns.start == 0:
                dout[row] = garbage
        return results(runtime, qkv, dout, index, count, NH)

    plain = run()
    key, query = 5, 66
    assert 0 < chosen[:, key].sum() < T - key - 1 and 0 < chosen[query].sum() < query
    for garbage in GARBAGE:
        found, others = run(garbage, key, slice(2 * C, 3 * C)), ~chosen[:, key]  # values
        assert found["out"][others].tobytes() == plain["out"][others].tobytes()
        assert found["lse"].tobytes() == plain["lse"].tobytes() and found["mean"].tobytes() == plain["mean"].tobytes()
        assert found["dqkv"][0, others, :C].tobytes() == plain["dqkv"][0, others, :C].tobytes()
        assert np.isfinite(garbage) or not np.isfinite(found["out"][~others]).any()
        found = run(garbage, key, slice(C, 2 * C))  # keys
        for name, of in (("out", others), ("mean", (0, others))):
            assert found[name][of].tobytes() == plain[name][of].tobytes()
        found, others = run(garbage, query, slice(0, C)), ~chosen[query]  # a query, and its gradient
        assert found["dqkv"][0, others, C:].tobytes() == plain["dqkv"][0, others, C:].tobytes()
        assert np.isfinite(garbage) or not np.isfinite(found["dqkv"][0, ~others, C:]).any()


def test_a_key_that_nobody_selected_gets_no_gradient(runtime):
    T, NH, C = 100, 1, 16
    index = (np.arange(T, dtype=np.int32) // 10 * 10).reshape(1, T, 1)
    found = results(runtime, rounded(1, T, 3 * C), rounded(T, C), index, np.ones((1, T), np.int32), NH)
    dkdv = found["dqkv"][0, :, C:]
    assert not dkdv[np.arange(T) % 10 > 0].any() and dkdv[::10, C:].all()
    assert np.array_equal(found["mean"], np.ones((1, T, 1)))  # with one key each the weight is 1


def test_tf32_rounds_and_3xtf32_does_not(kind):
    """Errors of many values in the norm; the same bits under three schedules."""
    B, T, NH, C, K = 1, 130, 2, 128, 30
    qkv, dout, (index, count) = rounded(B, T, 3 * C), rounded(B * T, C), lists(B, T, K)
    out, lse = saved(qkv, index, count, NH)
    dqkv, mean = np.empty_like(qkv), np.empty((B, T, K))
    cpu.sparse_attention_backward(dqkv, dout, qkv, out, lse, index, count, NH)
    cpu.sparse_attention_mean(mean, qkv, lse, index, count, NH)
    expected = dict(out=out, lse=lse, dqkv=dqkv, mean=mean)
    for tf32 in (False, True):
        runs = [
            results(opened("fast" if kind == "check" else kind, tf32, schedule), qkv, dout, index, count, NH)
            for schedule in SCHEDULES
        ]
        for name, array in expected.items():
            assert len({run[name].tobytes() for run in runs}) == 1, name
            error = relative(runs[0][name], array)
            print(f"{name}: {error:.1e}")
            assert error <= TOL_TENSOR[tf32] and (not tf32 or error >= 1e-5)


def test_large_scores(runtime):
    index, count = lists(1, 70, 9)
    found = results(runtime, 300 * rounded(1, 70, 48), np.ones((70, 16)), index, count, 2)
    assert all(np.isfinite(array).all() for array in found.values())
