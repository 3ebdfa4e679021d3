"""Fully connected layer whose weight is zero outside a band: only the blocks that the band touches are multiplied.

A block is some rows of the weight and the contiguous columns that their bands cover together, which BLAS takes as a
strided view. 32 channels or 128 hidden units make a block. At C = 768 and bandwidth 256 the blocks hold 12% of the
weight, the band itself 8%; with 256 rows of input, forward and backward take a quarter of the dense time. Bandwidth 0
stands for no band.
"""

from functools import lru_cache

import numpy as np

from kernels.cpu.band_mask import band_columns
from kernels.cpu.blocks import scratch
from kernels.cpu.column_sum import column_sum
from kernels.cpu.matmul import matmul_backward, matmul_forward

CHANNELS = 32  # in a block; of the 4C hidden units four times as many
PAYS = 0.5  # blocks that cover more of the weight than this are multiplied no faster than the whole


@lru_cache(maxsize=64)
def blocks_of_band(rows, columns, bandwidth):
    """[(row slice, column slice)] that cover the band of a (rows,columns) weight; a single one if many save little."""
    height = CHANNELS if rows < columns else 4 * CHANNELS
    blocks = []
    for first in range(0, rows, height):
        end = min(first + height, rows)
        start, _ = band_columns(first, rows, columns, bandwidth)  # both ends of the band move on with the row
        _, stop = band_columns(end - 1, rows, columns, bandwidth)
        blocks.append((slice(first, end), slice(start, max(start, stop))))
    area = sum((r.stop - r.start) * (c.stop - c.start) for r, c in blocks)
    return blocks if area <= PAYS * rows * columns else [(slice(0, rows), slice(0, columns))]


@lru_cache(maxsize=64)
def _masks(rows, columns, bandwidth):
    """The band within each block, as float32 0 and 1."""
    masks = []
    for block_rows, block_columns in blocks_of_band(rows, columns, bandwidth):
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
    for rows, columns in blocks_of_band(*weight.shape, bandwidth):
        np.matmul(inp[:, columns], weight[rows, columns].T, out=out[:, rows])
    out += bias


def band_matmul_backward(dinp, dweight, dbias, dout, inp, weight, bandwidth, beta=0):
    """As matmul_backward; what is outside the band in dweight (OC,C) must be zero and stays so."""
    if not bandwidth:
        matmul_backward(dinp, dweight, dbias, dout, inp, weight, beta)
        return
    OC, C = weight.shape
    for columns, rows in blocks_of_band(C, OC, bandwidth):  # the band of the transposed weight
        np.matmul(dout[:, rows], weight[rows, columns], out=dinp[:, columns])
    for (rows, columns), mask in zip(blocks_of_band(OC, C, bandwidth), _masks(OC, C, bandwidth)):
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
