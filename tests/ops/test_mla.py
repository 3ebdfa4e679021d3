"""Multi-head latent attention: its parts, the whole of it, expanded against absorbed."""

import numpy as np
import pytest
from check_op import TOL, check_gradients, check_twin, nan, place, relative, rounded
from selected_keys import lists_of

from kernels import cpu, cuda

SHAPES = [  # B, T, NH, hs, R
    (1, 1, 1, 2, 2),
    (2, 5, 3, 5, 4),
    (1, 7, 2, 8, 2),
    (3, 4, 2, 4, 4),
]


def inputs_of(B, T, NH, hs, R, kv_rank, dtype=np.float64):
    """q (N,C), kv (N,NH*(2hs-R)), kva (N,kv_rank+R)"""
    rng = np.random.default_rng([B, T, NH, hs, R, kv_rank])
    widths = NH * hs, NH * (2 * hs - R), kv_rank + R
    return [rng.standard_normal((B * T, width)).astype(dtype) for width in widths]


def qkv_of(q, kv, kva, B, T, NH, R, start=0):
    qkv = np.full((B, T, 3 * q.shape[1]), np.nan, q.dtype)
    cpu.mla_qkv_forward(qkv, q, kv, kva, NH, R, start)
    return qkv


SIZES = [  # B, T, NH, hs, R, kv_rank, start, offset
    (1, 1, 1, 2, 2, 1, 0, 0), (2, 5, 3, 5, 4, 3, 0, 0), (2, 5, 3, 5, 4, 7, 0, 0), (1, 7, 2, 8, 2, 3, 0, 0),
    (3, 4, 2, 4, 4, 3, 0, 0), (2, 9, 2, 16, 8, 12, 0, 0), (1, 3, 2, 16, 8, 12, 900, 1), (1, 7, 2, 8, 8, 4, 0, 0),
    (1, 2, 12, 64, 32, 128, 5, 0), (1, 4, 2, 8, 2, 4, 1, 0),
]  # fmt: skip


@pytest.mark.parametrize("B, T, NH, hs, R, kv_rank, start, offset", SIZES)
def test_mla_qkv(B, T, NH, hs, R, kv_rank, start, offset):
    def forward(q, kv, kva):
        return (qkv_of(q, kv, kva, B, T, NH, R),)

    def backward(dout, saved, q, kv, kva):
        dq, dkv, dkva = np.full_like(q, np.nan), np.full_like(kv, np.nan), np.full_like(kva, 7)
        cpu.mla_qkv_backward(dq, dkv, dkva, dout, NH, R)
        assert (dkva[:, :kv_rank] == 7).all()
        dkva[:, :kv_rank] = 0
        return dict(q=dq, kv=dkv, kva=dkva)

    check_gradients(forward, backward, q=(B * T, NH * hs), kv=(B * T, NH * (2 * hs - R)), kva=(B * T, kv_rank + R))


@pytest.mark.parametrize("B, T, NH, hs, R", SHAPES)
def test_mla_qkv_puts_the_parts_where_attention_finds_them(B, T, NH, hs, R):
    start, plain = 11, hs - R
    q, kv, kva = inputs_of(B, T, NH, hs, R, 3)
    third = qkv_of(q, kv, kva, B, T, NH, R, start).reshape(B, T, 3, NH, hs)
    turned_q = q.reshape(B, T, NH, hs)[..., plain:].reshape(B, T, -1).copy()
    turned_k = kva[:, -R:].reshape(B, T, R).copy()
    cpu.rope_forward(turned_q, NH, R, start)
    cpu.rope_forward(turned_k, 1, R, start)
    heads = kv.reshape(B, T, NH, -1)
    assert (third[:, :, 0, :, :plain] == q.reshape(B, T, NH, hs)[..., :plain]).all()
    assert relative(third[:, :, 0, :, plain:], turned_q.reshape(B, T, NH, R)) < 1e-15
    assert (third[:, :, 1, :, :plain] == heads[..., :plain]).all()
    assert relative(third[:, :, 1, :, plain:], turned_k[:, :, None]) < 1e-15
    assert (third[:, :, 2] == heads[..., plain:]).all()


@pytest.mark.parametrize("B, T, NH, hs, R", SHAPES)
def test_mla_qkv_backward_is_the_transpose(B, T, NH, hs, R):
    """dqkv . forward(x) = backward(dqkv) . x for the linear map, over all that it reads."""
    x = inputs_of(B, T, NH, hs, R, 3)
    qkv = qkv_of(*x, B, T, NH, R)
    dqkv = np.random.default_rng(5).standard_normal(qkv.shape)
    dx = [np.zeros_like(each) for each in x]
    cpu.mla_qkv_backward(*dx, dqkv, NH, R)
    assert abs(np.vdot(dqkv, qkv) - sum(map(np.vdot, dx, x))) < 1e-12


B, T, NH, HS, R, C, Q_RANK, KV_RANK = 2, 6, 3, 5, 2, 15, 4, 7

WEIGHTS = dict(qaw=(Q_RANK, C), qnw=(Q_RANK,), qbw=(NH * HS, Q_RANK), kvaw=(KV_RANK + R, C), kvnw=(KV_RANK,))

WEIGHTS |= dict(kvbw=(NH * (2 * HS - R), KV_RANK), attprojw=(C, NH * HS))


def mla_forward(x, qaw, qnw, qbw, kvaw, kvnw, kvbw, attprojw):
    """The whole of MLA, x (B*T,C) -> out (B*T,C) and what its backward needs."""
    N, dtype = B * T, x.dtype
    widths = dict(qa=Q_RANK, qn=Q_RANK, q=NH * HS, kva=KV_RANK + R, kvn=KV_RANK, kv=len(kvbw), atty=NH * HS, out=C)
    a = {name: np.empty((N, width), dtype) for name, width in widths.items()}
    a |= dict(qrrms=np.empty(N, dtype), kvrrms=np.empty(N, dtype), qkv=np.empty((B, T, 3 * NH * HS), dtype))
    a["lse"] = np.empty((B, NH, T), dtype)
    cpu.matmul_forward(a["qa"], x, qaw)
    cpu.rmsnorm_forward(a["qn"], a["qrrms"], a["qa"], qnw)
    cpu.matmul_forward(a["q"], a["qn"], qbw)
    cpu.matmul_forward(a["kva"], x, kvaw)
    cpu.rmsnorm_forward(a["kvn"], a["kvrrms"], a["kva"], kvnw)
    cpu.matmul_forward(a["kv"], a["kvn"], kvbw)
    cpu.mla_qkv_forward(a["qkv"], a["q"], a["kv"], a["kva"], NH, R)
    cpu.attention_forward(a["atty"], a["lse"], a["qkv"], NH)
    cpu.matmul_forward(a["out"], a["atty"], attprojw)
    return a["out"], a


def mla_backward(dout, saved, x, qaw, qnw, qbw, kvaw, kvnw, kvbw, attprojw):
    """The gradients of x and of all seven weights."""
    (_, a), nan = saved, np.nan
    d = {name: np.full_like(a[name], nan) for name in ("qa", "qn", "q", "kva", "kvn", "kv", "atty", "qkv")}
    weights = dict(qaw=qaw, qbw=qbw, kvaw=kvaw, kvbw=kvbw, attprojw=attprojw)
    dw = {name: np.full_like(weight, nan) for name, weight in weights.items()}
    dw |= dict(qnw=np.zeros_like(qnw), kvnw=np.zeros_like(kvnw))
    dx, dx_of_q = np.empty_like(x), np.empty_like(x)
    cpu.matmul_backward(d["atty"], dw["attprojw"], None, dout, a["atty"], attprojw)
    cpu.attention_backward(d["qkv"], d["atty"], a["qkv"], a["atty"], a["lse"], NH)
    cpu.mla_qkv_backward(d["q"], d["kv"], d["kva"], d["qkv"], NH, R)
    cpu.matmul_backward(d["kvn"], dw["kvbw"], None, d["kv"], a["kvn"], kvbw)
    cpu.rmsnorm_backward(d["kva"], dw["kvnw"], d["kvn"], a["kva"], kvnw, a["kvrrms"])
    cpu.matmul_backward(dx, dw["kvaw"], None, d["kva"], x, kvaw)
    cpu.matmul_backward(d["qn"], dw["qbw"], None, d["q"], a["qn"], qbw)
    cpu.rmsnorm_backward(d["qa"], dw["qnw"], d["qn"], a["qa"], qnw, a["qrrms"])
    cpu.matmul_backward(dx_of_q, dw["qaw"], None, d["qa"], x, qaw)
    return dict(x=dx + dx_of_q, **dw)


def test_the_whole_of_mla():
    """All seven weights and the input, against finite differences."""
    check_gradients(mla_forward, mla_backward, x=(B * T, C), **WEIGHTS)


def test_mla_is_causal_bit_for_bit():
    cut, rng = 4, np.random.default_rng(6)
    weights = {name: rng.standard_normal(shape).astype("f") for name, shape in WEIGHTS.items()}
    x, dout = rng.standard_normal((2, B * T, C)).astype("f")
    dout.reshape(B, T, C)[:, cut:] = 0  # a loss on the past alone
    results = []
    for _ in range(2):
        saved = mla_forward(x, **weights)
        dx = mla_backward(dout, saved, x, **weights)["x"]
        results.append([each.reshape(B, T, C)[:, :cut].tobytes() for each in (saved[0], dx)])
        x.reshape(B, T, C)[:, cut:] = 100 * rng.standard_normal((B, T - cut, C))
    assert results[0] == results[1]


def absorbed(x, n, index, count, kvbw, scale, start, NH, R, latent):
    """out (n,C) for the queries of x = (q, normed, kva), at positions start..; fills rows of latent."""
    q, normed, kva = x
    kv_rank, dtype = normed.shape[1], q.dtype
    qlat, olat = np.empty((n, NH, kv_rank + R), dtype), np.empty((n, NH, kv_rank), dtype)
    out = np.full_like(q, np.nan)
    cpu.mla_latent(latent, normed, kva, start)
    cpu.mla_absorb(qlat, q, kvbw, NH, R, start)
    cpu.latent_attention_forward(olat, qlat, latent, index, count, scale, start)
    cpu.mla_expand(out, olat, kvbw, NH, R)
    return out


def selected_attention(qkv, NH, scale, index, count):
    """out (T,C) the textbook way, for the qkv (1,T,3C) of one sequence; over the whole past without an index."""
    _, T, C3 = qkv.shape
    q, k, v = qkv[0].reshape(T, 3, NH, -1).transpose(1, 2, 0, 3)  # (NH,T,hs)
    allowed = np.tri(T, dtype=bool)
    if index is not None:
        allowed = np.zeros((T, T), bool)
        for t in range(T):
            allowed[t, index[0, t, : count[0, t]]] = True
    weights = np.exp(np.where(allowed, q @ k.swapaxes(1, 2) * scale, -np.inf))
    out = weights / weights.sum(axis=2, keepdims=True) @ v
    return out.transpose(1, 0, 2).reshape(T, C3 // 3)


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize(
    "T, NH, hs, R, kv_rank", [(1, 1, 2, 2, 1), (9, 3, 5, 2, 7), (150, 2, 8, 4, 16), (70, 2, 4, 4, 8)]
)
def test_absorbed_equals_expanded(T, NH, hs, R, kv_rank, listed):
    """T = 150 is several blocks of queries; R = hs leaves no plain dimension, so that the latents give values alone."""
    rng = np.random.default_rng([T, hs])
    (q, _, kva), normed = inputs_of(1, T, NH, hs, R, kv_rank), rng.standard_normal((T, kv_rank))
    kvbw, scale = rng.standard_normal((NH * (2 * hs - R), kv_rank)), 0.3
    index, count = lists_of(T, 12) if listed else (None, None)
    expected = selected_attention(qkv_of(q, normed @ kvbw.T, kva, 1, T, NH, R), NH, scale, index, count)

    latent = np.full((T + 3, kv_rank + R), np.nan)  # a cache has room for more
    x = q, normed, kva
    out = absorbed(x, T, index, count, kvbw, scale, 0, NH, R, latent)
    assert relative(out, expected) < 1e-12
    assert np.isfinite(latent[:T]).all() and np.isnan(latent[T:]).all()

    one_by_one, cache = np.empty_like(out), np.full_like(latent, np.nan)
    for t in range(T):
        row = slice(t, t + 1)
        its_list = (index[:, row], count[:, row]) if listed else (None, None)
        one_by_one[row] = absorbed([each[row] for each in x], 1, *its_list, kvbw, scale, t, NH, R, cache)
    assert relative(one_by_one, expected) < 1e-12

    start = T // 3  # a prompt, then the rest at once
    rest = slice(start, T)
    its_list = (index[:, rest], count[:, rest]) if listed else (None, None)
    later = absorbed([each[rest] for each in x], T - start, *its_list, kvbw, scale, start, NH, R, latent)
    assert relative(later, expected[rest]) < 1e-12


# ----------------------------------------------------------------------------------------------------------------------
# on CUDA: the emulator, and a GPU if there is one


@pytest.mark.parametrize("B, T, NH, hs, R, kv_rank, start, offset", SIZES)
def test_mla_qkv_on_cuda(runtime, B, T, NH, hs, R, kv_rank, start, offset):
    N, C = B * T, NH * hs
    widths = C, NH * (2 * hs - R), kv_rank + R
    q, kv, kva = (rounded(N, width, seed=i) for i, width in enumerate(widths))
    check_twin(runtime, "mla_qkv_forward", nan(B, T, 3 * C), q, kv, kva, NH, R, start, offset=offset, tol=5e-7)
    args = q, kv, kva, rounded(B, T, 3 * C, seed=3), NH, R  # dq, dkv, dkva hold something else before
    check_twin(runtime, "mla_qkv_backward", *args, offset=offset, tol=1e-6)


@pytest.mark.parametrize("n, NH, hs, R, kv_rank, start, offset", [
    (1, 1, 2, 2, 1, 0, 0), (1, 3, 5, 2, 7, 40, 0), (8, 2, 8, 4, 16, 0, 0), (19, 2, 12, 4, 132, 3, 0),
    (9, 2, 20, 8, 260, 0, 1), (3, 1, 4, 4, 12, 4000, 0),
])  # fmt: skip
def test_mla_with_a_cache(runtime, n, NH, hs, R, kv_rank, start, offset):
    q, kvbw = rounded(n, NH * hs), rounded(NH * (2 * hs - R), kv_rank)
    normed, kva = rounded(n, kv_rank, seed=1), rounded(n, kv_rank + R)
    check_twin(runtime, "mla_latent", rounded(start + n + 2, kv_rank + R), normed, kva, start, offset=offset, tol=5e-7)
    check_twin(runtime, "mla_absorb", nan(n, NH, kv_rank + R), q, kvbw, NH, R, start, offset=offset)
    check_twin(runtime, "mla_expand", nan(n, NH * hs), rounded(n, NH, kv_rank), kvbw, NH, R, offset=offset)


def test_absorbed_equals_expanded_on_cuda(runtime):
    """The two forms on the device: attention over q, k and v, and latent_attention over a cache filled row by row."""
    device, T, NH, hs, R, kv_rank = cuda.device(runtime), 12, 3, 8, 4, 10
    q, kva, normed = rounded(T, NH * hs), rounded(T, kv_rank + R), rounded(T, kv_rank, seed=1)
    kvbw = rounded(NH * (2 * hs - R), kv_rank)
    arrays = nan(1, T, 3 * NH * hs), q, normed @ kvbw.T, kva, nan(T, NH * hs), nan(1, NH, T), kvbw
    qkv, ours_q, kv, ours_kva, expanded, lse, weight = (place(runtime, each, 0) for each in arrays)
    device.mla_qkv_forward(qkv, ours_q, kv, ours_kva, NH, R)
    device.attention_forward(expanded, lse, qkv, NH)
    latent, absorbed = place(runtime, nan(T, kv_rank + R), 0), np.empty((T, NH * hs))
    for t in range(T):
        row = slice(t, t + 1)
        arrays = nan(1, NH, kv_rank + R), nan(1, NH, kv_rank), nan(1, NH * hs), q[row], kva[row], normed[row]
        qlat, olat, out, q_row, kva_row, normed_row = (place(runtime, each, 0) for each in arrays)
        device.mla_latent(latent, normed_row, kva_row, t)
        device.mla_absorb(qlat, q_row, weight, NH, R, t)
        device.latent_attention_forward(olat, qlat, latent, None, None, hs**-0.5, t)
        device.mla_expand(out, olat, weight, NH, R)
        absorbed[t] = runtime.to_host(out)
    assert relative(absorbed, runtime.to_host(expanded)) <= TOL
