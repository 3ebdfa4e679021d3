"""Launchers of attention.cu."""

from kernels.cuda.runtime.grid import ceil_div, warp_a_row
from llmc.errors import UserError

THREADS = 128  # of a tile kernel
ROWS = {64: 64, 128: 32}  # queries or keys of a tile, by padded head size
DECODE_THREADS = 256
DECODE = 8  # queries at most that get a block each: a tile costs as much as 64


def attention_forward(cuda, out, lse, qkv, NH, start=0):
    """As kernels.cpu.gpt2.attention.attention_forward. Raises UserError for hs > 128."""
    B, T, C3 = qkv.shape
    hs = C3 // 3 // NH
    size, queries = _padded("attention_forward", hs), T - start
    args = (out, lse, qkv, T, NH, hs, start)
    if queries <= DECODE:
        cuda.launch(f"attention_decode_{size}_kernel", (B * NH, queries), DECODE_THREADS, args)
    else:
        grid = (B * NH, ceil_div(queries, ROWS[size]))
        cuda.launch(f"attention_forward_{size}_kernel", grid, THREADS, args)


def attention_backward(cuda, dqkv, dout, qkv, out, lse, NH):
    """As kernels.cpu.gpt2.attention.attention_backward. Raises UserError for hs > 128."""
    B, T, C3 = qkv.shape
    hs = C3 // 3 // NH
    size, rows = _padded("attention_backward", hs), B * T * NH
    delta = cuda.scratch("attention_delta", (B, NH, T))
    cuda.launch("attention_delta_kernel", *warp_a_row(rows), (delta, dout, out, T, NH, hs, rows))
    grid, args = (B * NH, ceil_div(T, ROWS[size])), (dqkv, dout, qkv, lse, delta, T, NH, hs)
    cuda.launch(f"attention_dkdv_{size}_kernel", grid, THREADS, args)
    cuda.launch(f"attention_dq_{size}_kernel", grid, THREADS, args)


def _padded(op, hs):
    """The smallest head size that attention.cu has kernels for and that holds hs."""
    sizes = [size for size in ROWS if hs <= size]
    if not sizes:
        raise UserError(
            f"{op}: head size {hs}, on a GPU at most {max(ROWS)}", "--device cpu, or a model with more heads"
        )
    return sizes[0]
