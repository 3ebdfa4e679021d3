"""Launchers of attention.cu, and on GPUs with tensor cores those of attention_tensor.cu instead."""

import numpy as np

from kernels.cpu.gpt2 import attention as numpy_attention
from kernels.cuda.gpt2.append_rows import position
from kernels.cuda.gpt2.attention_join import attention_join, part_buffers, split_keys
from kernels.cuda.gpt2.attention_tensor import tensor_backward, tensor_forward
from kernels.cuda.runtime.grid import THREADS, TILE_THREADS, ceil_div, padded_head, warp_a_row
from kernels.cuda.runtime.tensor_cores import Results, takes_tensor_cores

ROWS = {64: 64, 128: 32}  # padded head size: queries or keys of a tile
DECODE = 8  # the most queries that get a block each, or several: a tile costs as much as 64
ALONE = 512  # the most keys that a block meets alone, in some 8 us on an H100; the join takes a launch
PASSING = {64: 64, 128: 32}  # padded head size: keys that a decoding block meets at a time


def attention_forward(cuda, out, lse, qkv, NH, start=0):
    """As kernels.cpu.gpt2.attention.attention_forward. Raises UserError for hs > 128.

    Few queries run in blocks for all tokens that qkv has: an array `start` changes no launch.
    """
    B, T, C3 = qkv.shape
    hs, queries = C3 // 3 // NH, len(out) // B
    size = padded_head("attention_forward", hs, ROWS)
    args = (out, lse, qkv, T, NH, hs, start)
    if queries <= DECODE or cuda.is_array(start):
        _decode(cuda, out, lse, qkv, NH, start, size)
    elif _on_tensor_cores(cuda, hs, size):
        tensor_forward(cuda, out, lse, qkv, NH, start, size)
    else:
        grid = (B * NH, ceil_div(queries, ROWS[size]))
        cuda.launch(f"attention_forward_{size}_kernel", grid, TILE_THREADS, args)


def attention_backward(cuda, dqkv, dout, qkv, out, lse, NH):
    """As kernels.cpu.gpt2.attention.attention_backward. Raises UserError for hs > 128."""
    B, T, C3 = qkv.shape
    hs = C3 // 3 // NH
    size, rows = padded_head("attention_backward", hs, ROWS), B * T * NH
    if _on_tensor_cores(cuda, hs, size):
        tensor_backward(cuda, dqkv, dout, qkv, out, lse, NH, size)
        return
    delta = cuda.scratch("attention_delta", (B, NH, T))
    cuda.launch("attention_delta_kernel", *warp_a_row(rows), (delta, dout, out, T, NH, hs, rows))
    grid, args = (B * NH, ceil_div(T, ROWS[size])), (dqkv, dout, qkv, lse, delta, T, NH, hs)
    cuda.launch(f"attention_dkdv_{size}_kernel", grid, TILE_THREADS, args)
    cuda.launch(f"attention_dq_{size}_kernel", grid, TILE_THREADS, args)


def _decode(cuda, out, lse, qkv, NH, start, size):
    """attention_forward of few queries."""
    B, T, C3 = qkv.shape
    hs, queries = C3 // 3 // NH, len(out) // B
    rows = B * queries * NH
    parts, share = split_keys(T, rows, PASSING[size]) if T > ALONE else (1, T)
    part_sums, part_softmax = part_buffers(cuda, parts, rows, hs) if parts > 1 else (out, lse)  # else not written
    args = (out, lse, part_sums, part_softmax, qkv, T, NH, hs, *position(cuda, start), share)
    cuda.launch(f"attention_decode_{size}_kernel", (B * NH, queries, parts), THREADS, args)
    if parts > 1:
        attention_join(cuda, out, lse, part_sums, part_softmax)


def _on_tensor_cores(cuda, hs: int, size: int) -> bool:
    """Whether heads of hs, padded to `size`, go to tensor cores; those of four channels each move in packs."""
    return takes_tensor_cores(cuda, attention_trial, size if hs % 4 == 0 else size - 1)


def attention_trial(cuda, hs: int) -> Results:
    """Forward and backward of two heads: several blocks, and tiles enough that a stage is used again."""
    T, NH, rng = 150, 2, np.random.default_rng(0)
    C, size = NH * hs, padded_head("attention", hs, ROWS)
    given = [rng.standard_normal(shape).astype(np.float32) for shape in ((1, T, 3 * C), (T, C))]
    shapes = dict(out=(T, C), lse=(1, NH, T), dqkv=(1, T, 3 * C))
    qkv, dout = (cuda.to_device(values) for values in given)
    out, lse, dqkv = found = [cuda.zeros(shape) for shape in shapes.values()]
    tensor_forward(cuda, out, lse, qkv, NH, 0, size)
    tensor_backward(cuda, dqkv, dout, qkv, out, lse, NH, size)
    qkv, dout = (values.astype(np.float64) for values in given)
    out, lse, dqkv = expected = [np.empty(shape) for shape in shapes.values()]
    numpy_attention.attention_forward(out, lse, qkv, NH)
    numpy_attention.attention_backward(dqkv, dout, qkv, out, lse, NH)
    for name, ours, theirs in zip(shapes, found, expected):
        yield f"attention's {name}", cuda.to_host(ours), theirs
