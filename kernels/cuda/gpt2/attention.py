"""Launchers of attention.cu, and on GPUs with tensor cores those of attention_tensor.cu instead."""

from kernels.cuda.gpt2.attention_tensor import takes_tensor_cores, tensor_backward, tensor_forward
from kernels.cuda.runtime.grid import THREADS, TILE_THREADS, ceil_div, padded_head, warp_a_row

ROWS = {64: 64, 128: 32}  # padded head size: queries or keys of a tile
DECODE = 8  # the most queries that get a block each: a tile costs as much as 64


def attention_forward(cuda, out, lse, qkv, NH, start=0):
    """As kernels.cpu.gpt2.attention.attention_forward. Raises UserError for hs > 128."""
    B, T, C3 = qkv.shape
    hs = C3 // 3 // NH
    size, queries = padded_head("attention_forward", hs, ROWS), T - start
    args = (out, lse, qkv, T, NH, hs, start)
    if queries <= DECODE:
        cuda.launch(f"attention_decode_{size}_kernel", (B * NH, queries), THREADS, args)
    elif takes_tensor_cores(cuda):
        tensor_forward(cuda, out, lse, qkv, NH, start, size)
    else:
        grid = (B * NH, ceil_div(queries, ROWS[size]))
        cuda.launch(f"attention_forward_{size}_kernel", grid, TILE_THREADS, args)


def attention_backward(cuda, dqkv, dout, qkv, out, lse, NH):
    """As kernels.cpu.gpt2.attention.attention_backward. Raises UserError for hs > 128."""
    B, T, C3 = qkv.shape
    hs = C3 // 3 // NH
    size, rows = padded_head("attention_backward", hs, ROWS), B * T * NH
    if takes_tensor_cores(cuda):
        tensor_backward(cuda, dqkv, dout, qkv, out, lse, NH, size)
        return
    delta = cuda.scratch("attention_delta", (B, NH, T))
    cuda.launch("attention_delta_kernel", *warp_a_row(rows), (delta, dout, out, T, NH, hs, rows))
    grid, args = (B * NH, ceil_div(T, ROWS[size])), (dqkv, dout, qkv, lse, delta, T, NH, hs)
    cuda.launch(f"attention_dkdv_{size}_kernel", grid, TILE_THREADS, args)
    cuda.launch(f"attention_dq_{size}_kernel", grid, TILE_THREADS, args)
