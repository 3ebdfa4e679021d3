"""Multi-head latent attention (MLA; DeepSeek-V2, 2024): queries, keys and values from two small latents per token.

    cq = rmsnorm(x Wqa^T),  q = cq Wqb^T                             per head: hs-R plain dimensions, then R to rotate
    kva = x Wkva^T = [c | kr],  kv = rmsnorm(c) Wkvb^T               per head: hs-R plain key dimensions, then hs values
    query = [q plain ; RoPE(q rest)],  key = [k plain ; RoPE(kr)],   kr (R) being one for all heads; value = v

Products and norms are ops of their own. mla_qkv puts the parts together for attention as it is (expanded form).
A decoder keeps per token only [rmsnorm(c) ; RoPE(kr)], kv_rank + R values, and attends to these: with
Wkvb = [W^UK_h (hs-R,kv_rank) ; W^UV_h (hs,kv_rank)] per head, q plain . k plain = (q plain W^UK_h) . rmsnorm(c), and
sum_s a v_s = (sum_s a rmsnorm(c_s)) W^UV_h^T. mla_absorb and mla_expand are these two products (absorbed form), with
latent_attention between them; mla_latent fills the cache. It equals the expanded form to rounding.
"""

import numpy as np

from kernels.cpu.blocks import for_blocks, rows_per_block
from kernels.cpu.rotation import pairs, turns


def mla_qkv_forward(qkv, q, kv, kva, NH, R, start=0):
    """qkv (B,T,3C) from q (B*T,C), kv (B*T,NH*(2hs-R)) and the last R columns of kva (B*T,kv_rank+R).

    Positions are start..start+T-1; R is even, 2 to hs.
    """
    B, T, C3 = qkv.shape
    plain = C3 // 3 // NH - R
    qkv = qkv.reshape(B, T, 3, NH, -1)
    q, kv = (x.reshape(B, T, NH, -1) for x in (q, kv))
    shared = pairs(kva.reshape(B, T, -1)[..., -R:])  # (B,T,R/2)
    table = turns(start, start + T, R, kva.dtype)[:, None]  # (T,1,R/2)

    def rows(begin, stop):
        t = slice(begin, stop)
        query, key, value = (qkv[:, t, third] for third in range(3))
        np.copyto(query[..., :plain], q[:, t, :, :plain])
        np.multiply(pairs(q[:, t, :, plain:]), table[t], out=pairs(query[..., plain:]))
        np.copyto(key[..., :plain], kv[:, t, :, :plain])
        np.multiply(shared[:, t, None], table[t], out=pairs(key[..., plain:]))
        np.copyto(value, kv[:, t, :, plain:])

    for_blocks(rows, T, rows_per_block(T, B * C3), B * C3)


def mla_qkv_backward(dq, dkv, dkva, dqkv, NH, R):
    """dq (B*T,C) = ..., dkv (B*T,NH*(2hs-R)) = ..., last R columns of dkva (B*T,kv_rank+R) = ... from dqkv (B,T,3C).

    The shared key's gradient is the sum over the heads, rotated back. Positions are 0..T-1.
    """
    B, T, C3 = dqkv.shape
    plain = C3 // 3 // NH - R
    dqkv = dqkv.reshape(B, T, 3, NH, -1)
    dq, dkv = (x.reshape(B, T, NH, -1) for x in (dq, dkv))
    dshared = pairs(dkva.reshape(B, T, -1)[..., -R:])
    table = turns(0, T, R, dkva.dtype, back=True)

    def rows(begin, stop):
        t = slice(begin, stop)
        dquery, dkey, dvalue = (dqkv[:, t, third] for third in range(3))
        np.copyto(dq[:, t, :, :plain], dquery[..., :plain])
        np.multiply(pairs(dquery[..., plain:]), table[t, None], out=pairs(dq[:, t, :, plain:]))
        np.copyto(dkv[:, t, :, :plain], dkey[..., :plain])
        np.add.reduce(pairs(dkey[..., plain:]), axis=2, out=dshared[:, t])
        dshared[:, t] *= table[t]
        np.copyto(dkv[:, t, :, plain:], dvalue)

    for_blocks(rows, T, rows_per_block(T, B * C3), B * C3)


def mla_latent(latent, normed, kva, start=0):
    """Rows start..start+n-1 of latent (S,kv_rank+R) = [normed ; RoPE(kr)] from normed (n,kv_rank), kva (n,kv_rank+R).

    The cache of one sequence; normed is rmsnorm(c), kr the last R columns of kva.
    """
    n, kv_rank = normed.shape
    rows = latent[start : start + n]
    np.copyto(rows[:, :kv_rank], normed)
    table = turns(start, start + n, kva.shape[1] - kv_rank, kva.dtype)
    np.multiply(pairs(kva[:, kv_rank:]), table, out=pairs(rows[:, kv_rank:]))


def mla_absorb(qlat, q, kvbw, NH, R, start=0):
    """qlat (n,NH,kv_rank+R) = [q plain of head h times W^UK_h ; RoPE(q rest)] from q (n,C), kvbw (NH*(2hs-R),kv_rank).

    For one sequence, at positions start..start+n-1.
    """
    n, kv_rank = len(q), kvbw.shape[1]
    q, weight = q.reshape(n, NH, -1), kvbw.reshape(NH, -1, kv_rank)
    plain = q.shape[2] - R
    np.matmul(q[..., :plain].swapaxes(0, 1), weight[:, :plain], out=qlat[..., :kv_rank].swapaxes(0, 1))
    table = turns(start, start + n, R, q.dtype)[:, None]
    np.multiply(pairs(q[..., plain:]), table, out=pairs(qlat[..., kv_rank:]))


def mla_expand(out, olat, kvbw, NH, R):
    """out (n,C): head h is olat[:,h] (n,kv_rank) times W^UV_h^T; olat (n,NH,kv_rank), kvbw (NH*(2hs-R),kv_rank)."""
    n, hs = len(out), out.shape[1] // NH
    weight = kvbw.reshape(NH, 2 * hs - R, -1)[:, hs - R :]  # (NH,hs,kv_rank)
    np.matmul(olat.swapaxes(0, 1), weight.swapaxes(1, 2), out=out.reshape(n, NH, hs).swapaxes(0, 1))
