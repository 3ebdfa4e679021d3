"""Launchers of mla.cu, and for many queries on GPUs with tensor cores those of mla_tensor.cu."""

from kernels.cuda.deepseek.mla_tensor import tensor_absorb, tensor_expand
from kernels.cuda.gpt2.matmul_tensor import tensor_products
from kernels.cuda.runtime.grid import THREADS, WARP, ceil_div, threads_for

QUERIES = 8  # queries that share a load of the weight in mla_absorb and mla_expand
ABSORB_THREADS = 128  # threads of a block of mla_absorb, one a column


def mla_qkv_forward(cuda, qkv, q, kv, kva, NH, R, start=0):
    """As kernels.cpu.deepseek.mla.mla_qkv_forward."""
    B, T, C3 = qkv.shape
    args = (qkv, q, kv, kva, T, NH, C3 // 3 // NH, R, kva.shape[-1] - R, start)
    cuda.launch("mla_qkv_forward_kernel", B * T, threads_for(C3), args, shared_mem=4 * R)


def mla_qkv_backward(cuda, dq, dkv, dkva, dqkv, NH, R):
    """As kernels.cpu.deepseek.mla.mla_qkv_backward."""
    B, T, C3 = dqkv.shape
    args = (dq, dkv, dkva, dqkv, T, NH, C3 // 3 // NH, R, dkva.shape[-1] - R)
    cuda.launch("mla_qkv_backward_kernel", B * T, threads_for(C3), args, shared_mem=4 * R)


def mla_latent(cuda, latent, normed, kva, start=0):
    """As kernels.cpu.deepseek.mla.mla_latent."""
    n, kv_rank = normed.shape
    args = (latent, normed, kva, kva.shape[1] - kv_rank, kv_rank, start)
    cuda.launch("mla_latent_kernel", n, threads_for(4 * kv_rank), args)


def mla_absorb(cuda, qlat, q, kvbw, NH, R, start=0):
    """As kernels.cpu.deepseek.mla.mla_absorb."""
    (n, C), kv_rank = q.shape, kvbw.shape[1]
    if products := _products(cuda, n):
        tensor_absorb(cuda, products, qlat, q, kvbw, NH, R, start)
        return
    hs = C // NH
    grid = (NH, ceil_div(n, QUERIES), ceil_div(kv_rank, ABSORB_THREADS))
    args = (qlat, q, kvbw, n, NH, hs, R, kv_rank, start)
    cuda.launch("mla_absorb_kernel", grid, ABSORB_THREADS, args, shared_mem=4 * QUERIES * (hs - R))


def mla_expand(cuda, out, olat, kvbw, NH, R):
    """As kernels.cpu.deepseek.mla.mla_expand."""
    (n, C), kv_rank = out.shape, kvbw.shape[1]
    if products := _products(cuda, n):
        tensor_expand(cuda, products, out, olat, kvbw, NH, R)
        return
    hs = C // NH
    grid = (NH, ceil_div(n, QUERIES), ceil_div(hs, THREADS // WARP))
    cuda.launch("mla_expand_kernel", grid, THREADS, (out, olat, kvbw, n, NH, hs, R, kv_rank))


def _products(cuda, n: int) -> str | None:
    """How tensor cores multiply for n queries; None for so few that one read of the weight serves all of them."""
    return tensor_products(cuda) if n > QUERIES else None
