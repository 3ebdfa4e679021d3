"""The number of threads changes no bit, whatever the op."""

import numpy as np

from kernels import cpu
from kernels.cpu import blocks
from kernels.cpu.blocks import PARALLEL_BYTES
from kernels.cpu.gpt2 import attention


def test_threads_do_not_change_a_bit(monkeypatch):
    rng = np.random.default_rng(10)
    inp, dout = (rng.standard_normal((5000, 512), np.float32) for _ in range(2))
    assert inp.nbytes > PARALLEL_BYTES  # or a single thread does it all
    results = []
    monkeypatch.setattr(blocks, "usable_cores", lambda: 3)
    for threads in ("1", "2", "3"):
        monkeypatch.setenv("OPENBLAS_NUM_THREADS", threads)
        out, mean, rstd = np.empty_like(inp), np.empty(5000, "f"), np.empty(5000, "f")
        weight, dweight, dbias = np.ones(512, "f"), np.zeros(512, "f"), np.zeros(512, "f")
        cpu.layernorm_forward(out, mean, rstd, inp, weight, dbias)
        dinp = np.zeros_like(inp)
        cpu.layernorm_backward(dinp, dweight, dbias, dout, inp, weight, mean, rstd)
        cpu.gelu_forward(out, dinp)
        results.append(out.tobytes() + dinp.tobytes() + dweight.tobytes() + dbias.tobytes())
    assert results[0] == results[1] == results[2]


def test_threads_do_not_change_a_bit_of_attention(monkeypatch):
    rng = np.random.default_rng(11)
    B, T, C, NH, D = 3, 200, 60, 5, 3  # neither rows, nor heads, nor blocks of queries divide evenly
    qkv, dout = rng.standard_normal((B, T, 3 * C), np.float32), rng.standard_normal((B * T, C), np.float32)
    index = np.full((B, T, 128), -1, np.int32)
    for t in range(T):
        index[:, t, : min(t + 1, 128)] = np.sort(rng.permutation(t + 1)[:128])
    count = np.count_nonzero(index >= 0, axis=2).astype(np.int32)
    strength = np.linspace(0.1, 1, NH, dtype=np.float32)
    results = []
    share = blocks.for_blocks
    monkeypatch.setattr(attention, "for_blocks", lambda work, rows, block, _: share(work, rows, block, 1 << 23))
    monkeypatch.setattr(blocks, "usable_cores", lambda: 3)
    for threads in ("1", "2", "3"):
        monkeypatch.setenv("OPENBLAS_NUM_THREADS", threads)
        out, lse, dqkv = np.empty_like(dout), np.empty((B, NH, T), "f"), np.empty_like(qkv)
        cpu.attention_forward(out, lse, qkv, NH)
        cpu.attention_backward(dqkv, dout, qkv, out, lse, NH)
        bits = [out.tobytes(), lse.tobytes(), dqkv.tobytes()]
        cpu.sparse_attention_forward(out, lse, qkv, index, count, NH)
        cpu.sparse_attention_backward(dqkv, dout, qkv, out, lse, index, count, NH)
        mean = np.empty(index.shape, "f")
        cpu.sparse_attention_mean(mean, qkv, lse, index, count, NH)
        bits += [out.tobytes(), dqkv.tobytes(), mean.tobytes()]
        lse, sums = np.empty((B, NH, T, D), "f"), np.zeros((2, NH), "f")
        cpu.torus_attention_forward(out, lse, qkv, strength, strength, NH, D, T)
        cpu.torus_attention_backward(dqkv, *sums, dout, qkv, out, lse, strength, strength, NH, D, T)
        results.append(b"".join([*bits, out.tobytes(), dqkv.tobytes(), sums.tobytes()]))
    assert results[0] == results[1] == results[2]
