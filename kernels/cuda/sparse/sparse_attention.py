"""Launchers of sparse_attention.cu, with attention_delta_kernel of attention.cu and inverse_lists.cu."""

from kernels.cuda.runtime.grid import THREADS, TILE_THREADS, padded_head, warp_a_row
from kernels.cuda.sparse.inverse_lists import inverse_lists

SIZES = (64, 128)  # padded head sizes


def sparse_attention_forward(cuda, out, lse, qkv, index, count, NH, start=0):
    """As kernels.cpu.sparse.sparse_attention.sparse_attention_forward. Raises UserError for hs > 128."""
    B, T, C3 = qkv.shape
    hs, rows = C3 // 3 // NH, B * (T - start) * NH
    size = padded_head("sparse_attention_forward", hs, SIZES)
    args = (out, lse, qkv, index, count, T, NH, hs, index.shape[2], start, rows)
    cuda.launch(f"sparse_attention_forward_{size}_kernel", *warp_a_row(rows), args)


def sparse_attention_backward(cuda, dqkv, dout, qkv, out, lse, index, count, NH):
    """As kernels.cpu.sparse.sparse_attention.sparse_attention_backward. Raises UserError for hs > 128."""
    B, T, C3 = qkv.shape
    hs, rows, K = C3 // 3 // NH, B * T * NH, index.shape[2]
    size = padded_head("sparse_attention_backward", hs, SIZES)
    delta = cuda.scratch("sparse_attention_delta", (B, NH, T))
    cuda.launch("attention_delta_kernel", *warp_a_row(rows), (delta, dout, out, T, NH, hs, rows))
    args = (dqkv, dout, qkv, lse, delta, index, count, T, NH, hs, K, rows)
    cuda.launch(f"sparse_attention_dq_{size}_kernel", *warp_a_row(rows), args)
    args = (dqkv, dout, qkv, lse, delta, *inverse_lists(cuda, index, count), T, NH, hs, K)
    cuda.launch(f"sparse_attention_dkdv_{size}_kernel", rows, TILE_THREADS, args)


def sparse_attention_mean(cuda, p, qkv, lse, index, count, NH):
    """As kernels.cpu.sparse.sparse_attention.sparse_attention_mean."""
    B, T, K = index.shape
    args = (p, qkv, lse, index, count, T, NH, qkv.shape[2] // 3 // NH, K)
    cuda.launch("sparse_attention_mean_kernel", B * T, THREADS, args)
