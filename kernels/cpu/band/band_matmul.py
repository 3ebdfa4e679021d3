"""Fully connected layer whose weight is zero outside a band: only the blocks that the band touches are multiplied.

A block is some rows of the weight and the contiguous columns that their bands cover together, which BLAS takes as a
strided view. Small blocks hold little besides the band, large ones keep BLAS efficient: best_channels weighs one
against the other, and takes the weight whole where that is as fast. For 1024 tokens at C = 768 and bandwidth 256 it
takes 32 channels at a time; the blocks hold 12% of the weight, the band itself 8%. Bandwidth 0 stands for no band.
"""

from functools import lru_cache

import numpy as np

from kernels.cpu.band.band_mask import band_columns, band_mask
from kernels.cpu.blocks import for_blocks, scratch
from kernels.cpu.gpt2.column_sum import column_sum
from kernels.cpu.gpt2.matmul import add_bias, matmul_backward, matmul_forward

CHANNELS = (8, 16, 32, 64, 128)  # channels in a block, with four times as many hidden units
# measured at C = 128 to 1024, bandwidth C/4 to 2C, B*T = 256 to 4096, OpenBLAS on 2 cores with AVX-512: a product of N
# tokens and a (rows,columns) block takes as long as if the block had 24 rows and 24 columns more, and 4 us. Blocks
# chosen by this were 3% slower on average than the fastest ones, most of which is noise
BORDER = 24
CALL = 3.4e5  # multiplications that BLAS makes in these 4 us
TOKENS = 64  # reading and packing a weight costs as much as meeting this many tokens; measured at 1 to 16 of them
# from this many multiplications of a weight gradient on, our threads take a block each: up to 20% faster than
# OpenBLAS's threads, which share every block, but wake up sooner
OWN_THREADS = 2e8
GAIN = 0.84  # blocks are taken if they promise this share of the whole weight's time, so that they never lose


@lru_cache(maxsize=64)
def blocks_of_band(rows, columns, bandwidth, channels):
    """[(row slice, column slice)] of `channels` channels each that cover the band of a (rows,columns) weight."""
    height = channels if rows < columns else 4 * channels
    blocks = []
    for first in range(0, rows, height):
        end = min(first + height, rows)
        start, _ = band_columns(first, rows, columns, bandwidth)  # both ends of the band move on with the row
        _, stop = band_columns(end - 1, rows, columns, bandwidth)
        blocks.append((slice(first, end), slice(start, max(start, stop))))
    return blocks


@lru_cache(maxsize=64)
def best_channels(rows, columns, bandwidth, N):
    """The channels of a block that promise to be fastest for N rows of input; 0 if the whole weight is as fast."""

    def cost(blocks):
        return sum((r.stop - r.start + BORDER) * (c.stop - c.start + BORDER) + CALL / (N + TOKENS) for r, c in blocks)

    whole = [(slice(0, rows), slice(0, columns))]
    costs = {channels: cost(blocks_of_band(rows, columns, bandwidth, channels)) for channels in CHANNELS}
    best = min(costs, key=costs.get)
    return best if costs[best] < GAIN * cost(whole) else 0


@lru_cache(maxsize=64)
def _edges(rows, columns, bandwidth, channels):
    """[(row slice, column slice, mask of 0 and 1)]: where the rows of a block differ, its band's two slanting edges."""
    edges = []
    for block_rows, _ in blocks_of_band(rows, columns, bandwidth, channels):
        bands = [band_columns(row, rows, columns, bandwidth) for row in range(block_rows.start, block_rows.stop)]
        (start, stop), (last_start, last_stop) = bands[0], bands[-1]
        spans = [(start, last_start), (stop, last_stop)] if last_start < stop else [(start, last_stop)]
        for first, end in spans:
            column = np.arange(first, end)
            mask = np.array([(column >= start) & (column < stop) for start, stop in bands], np.float32)
            edges.append((block_rows, slice(first, end), mask))
    return edges


@lru_cache(maxsize=4)
def _mask(rows, columns, bandwidth):
    """(rows,columns), 1 inside the band and 0 outside: after a product of the whole, faster than cutting edges"""
    mask = np.ones((1, rows, columns), np.float32)
    band_mask(mask, bandwidth)
    return mask[0]


def _cut_edges(weight, bandwidth, channels):
    """Zero what lies outside the band in the blocks of a (rows,columns) weight."""
    for rows, columns, mask in _edges(*weight.shape, bandwidth, channels):
        weight[rows, columns] *= mask


def band_matmul_forward(out, inp, weight, bias, bandwidth):
    """out (N,OC) from inp (N,C), weight (OC,C) that is zero outside its band, bias (OC); OC = 4C or C = 4 OC."""
    channels = bandwidth and best_channels(*weight.shape, bandwidth, len(inp))
    if not channels:
        matmul_forward(out, inp, weight, bias)
        return
    for rows, columns in blocks_of_band(*weight.shape, bandwidth, channels):
        np.matmul(inp[:, columns], weight[rows, columns].T, out=out[:, rows])
    add_bias(out, bias)


def band_matmul_backward(dinp, dweight, dbias, dout, inp, weight, bandwidth, beta=0):
    """matmul_backward, of dweight (OC,C) the band alone: outside it dweight must be zero, and stays so."""
    OC, C = weight.shape
    channels = bandwidth and best_channels(OC, C, bandwidth, len(inp))
    if not channels:
        matmul_backward(dinp, dweight, dbias, dout, inp, weight, beta)
        if bandwidth:
            dweight *= _mask(OC, C, bandwidth)
        return
    for columns, rows in blocks_of_band(C, OC, bandwidth, channels):  # the band of the transposed weight
        np.matmul(dout[:, rows], weight[rows, columns], out=dinp[:, columns])
    blocks = blocks_of_band(OC, C, bandwidth, channels)

    def some(start, stop):
        for rows, columns in blocks[start:stop]:
            block = dweight[rows, columns]
            if beta:
                product = scratch("band_matmul_dweight", block.shape, block.dtype)
                block += np.matmul(dout[:, rows].T, inp[:, columns], out=product)
            else:
                np.matmul(dout[:, rows].T, inp[:, columns], out=block)

    work = len(inp) * sum((r.stop - r.start) * (c.stop - c.start) for r, c in blocks)
    for_blocks(some, len(blocks), 1 if work > OWN_THREADS else len(blocks), work // len(blocks))
    _cut_edges(dweight, bandwidth, channels)
    column_sum(dbias, dout)
