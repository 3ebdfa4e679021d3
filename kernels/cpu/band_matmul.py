"""Fully connected layer whose weight is zero outside a band: only the blocks that the band touches are multiplied.

A block is some rows of the weight and the contiguous columns that their bands cover together, which BLAS takes as a
strided view. Small blocks hold little besides the band, large ones keep BLAS efficient: best_blocks weighs one against
the other, and takes the weight whole where that is as fast. At C = 768 and bandwidth 256 it takes 32 channels at a
time; the blocks hold 12% of the weight, the band itself 8%. Bandwidth 0 stands for no band.
"""

from functools import lru_cache

import numpy as np

from kernels.cpu.band_mask import band_columns
from kernels.cpu.blocks import scratch
from kernels.cpu.column_sum import column_sum
from kernels.cpu.matmul import matmul_backward, matmul_forward

CHANNELS = (8, 16, 32, 64, 128)  # in a block; of the 4C hidden units four times as many
# measured at C = 128 to 1024, bandwidth C/4 to 2C, B*T = 256 to 4096, OpenBLAS on 2 cores with AVX-512: a product of N
# tokens and a (rows,columns) block takes as long as if the block had 24 rows and 24 columns more, and 3 us. Blocks
# chosen by this were 3% slower on average than the fastest ones, most of which is noise
BORDER = 24
CALL = 2.7e5  # multiplications that BLAS makes in these 3 us
GAIN = 0.8  # of the time of the whole weight: what blocks must promise, so that they never lose


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
def best_blocks(rows, columns, bandwidth, N):
    """The blocks that promise to be fastest for N rows of input; a single one, the whole, if none are faster."""

    def cost(blocks):
        return sum((r.stop - r.start + BORDER) * (c.stop - c.start + BORDER) + CALL / N for r, c in blocks)

    whole = [(slice(0, rows), slice(0, columns))]
    blocks = min((blocks_of_band(rows, columns, bandwidth, channels) for channels in CHANNELS), key=cost)
    return blocks if cost(blocks) < GAIN * cost(whole) else whole


@lru_cache(maxsize=64)
def _masks(rows, columns, bandwidth, N):
    """The band within each block, as float32 0 and 1."""
    masks = []
    for block_rows, block_columns in best_blocks(rows, columns, bandwidth, N):
        mask = np.zeros((block_rows.stop - block_rows.start, columns), np.float32)
        for row in range(block_rows.start, block_rows.stop):
            mask[row - block_rows.start, slice(*band_columns(row, rows, columns, bandwidth))] = 1
        masks.append(mask[:, block_columns].copy())
    return masks


def band_matmul_forward(out, inp, weight, bias, bandwidth):
    """out (N,OC) from inp (N,C), weight (OC,C) that is zero outside its band, bias (OC); OC = 4C or C = 4 OC."""
    if not bandwidth:
        matmul_forward(out, inp, weight, bias)
        return
    for rows, columns in best_blocks(*weight.shape, bandwidth, len(inp)):
        np.matmul(inp[:, columns], weight[rows, columns].T, out=out[:, rows])
    out += bias


def band_matmul_backward(dinp, dweight, dbias, dout, inp, weight, bandwidth, beta=0):
    """As matmul_backward; what is outside the band in dweight (OC,C) must be zero and stays so."""
    if not bandwidth:
        matmul_backward(dinp, dweight, dbias, dout, inp, weight, beta)
        return
    (OC, C), N = weight.shape, len(inp)
    for columns, rows in best_blocks(C, OC, bandwidth, N):  # the band of the transposed weight
        np.matmul(dout[:, rows], weight[rows, columns], out=dinp[:, columns])
    for (rows, columns), mask in zip(best_blocks(OC, C, bandwidth, N), _masks(OC, C, bandwidth, N)):
        block = dweight[rows, columns]
        if beta:
            product = scratch("band_matmul_dweight", block.shape, block.dtype)
            np.matmul(dout[:, rows].T, inp[:, columns], out=product)
            product *= mask
            block += product
        else:
            np.matmul(dout[:, rows].T, inp[:, columns], out=block)
            block *= mask
    column_sum(dbias, dout)
