"""Launchers of sparse_attention.cu, with attention_delta_kernel of attention.cu and inverse_lists.cu."""

from kernels.cuda.runtime.grid import THREADS, warp_a_row
from kernels.cuda.sparse.inverse_lists import inverse_lists
from llmc.errors import UserError

HEAD_SIZES = (64, 128)  # that there are kernels for
KEY_THREADS = 128  # of a block of sparse_attention_dkdv


def sparse_attention_forward(cuda, out, lse, qkv, index, count, NH, start=0):
    """As kernels.cpu.sparse.sparse_attention.sparse_attention_forward. Raises UserError for hs > 128."""
    B, T, C3 = qkv.shape
    hs, rows = C3 // 3 // NH, B * (T - start) * NH
    kernel = f"sparse_attention_forward_{_padded('sparse_attention_forward', hs)}_kernel"
    args = (out, lse, qkv, index, count, T, NH, hs, index.shape[2], start, rows)
    cuda.launch(kernel, *warp_a_row(rows), args)


def sparse_attention_backward(cuda, dqkv, dout, qkv, out, lse, index, count, NH):
    """As kernels.cpu.sparse.sparse_attention.sparse_attention_backward. Raises UserError for hs > 128."""
    B, T, C3 = qkv.shape
    hs, rows, K = C3 // 3 // NH, B * T * NH, index.shape[2]
    size = _padded("sparse_attention_backward", hs)
    delta = cuda.scratch("sparse_attention_delta", (B, NH, T))
    cuda.launch("attention_delta_kernel", *warp_a_row(rows), (delta, dout, out, T, NH, hs, rows))
    args = (dqkv, dout, qkv, lse, delta, index, count, T, NH, hs, K, rows)
    cuda.launch(f"sparse_attention_dq_{size}_kernel", *warp_a_row(rows), args)
    args = (dqkv, dout, qkv, lse, delta, *inverse_lists(cuda, index, count), T, NH, hs, K)
    cuda.launch(f"sparse_attention_dkdv_{size}_kernel", rows, KEY_THREADS, args)


def sparse_attention_mean(cuda, p, qkv, lse, index, count, NH):
    """As kernels.cpu.sparse.sparse_attention.sparse_attention_mean."""
    B, T, K = index.shape
    args = (p, qkv, lse, index, count, T, NH, qkv.shape[2] // 3 // NH, K)
    cuda.launch("sparse_attention_mean_kernel", B * T, THREADS, args)


def _padded(op, hs):
    """The smallest head size that sparse_attention.cu has kernels for and that holds hs."""
    sizes = [size for size in HEAD_SIZES if hs <= size]
    if not sizes:
        raise UserError(
            f"{op}: head size {hs}, on a GPU at most {max(HEAD_SIZES)}", "--device cpu, or a model with more heads"
        )
    return sizes[0]
