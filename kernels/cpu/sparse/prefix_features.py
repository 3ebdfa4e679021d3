"""Features of a sequence up to a token, for a controller: statistics of its prefix, summed in the order of positions.

With x_s the normed hidden states and m_t = mean_{s<=t} x_s, all of one channel and then averaged over the C channels:

    column 0   ln(t+1) / ln(maxT)                       length
           1   mean_{s<=t} (x_s - m_t)^2                variance of the prefix
           2   mean_{1<=s<=t} (x_s - x_{s-1})^2         error of the simplest prediction, "as before"; 0 at t = 0
           3   (x_t - m_t)^2                            surprise of the last token

No column depends on a later token. The variance is updated as Welford (1962) does, sum_t = sum_{t-1} + (x_t - m_t)^2 *
(t+1)/t: nothing cancels, as it would in mean(x^2) - m^2.
"""

from math import log

import numpy as np

from kernels.cpu.blocks import rows_per_block, scratch


def prefix_features(features, state, x, maxT, start=0):
    """features (B,Tq,5), columns 0..3, from x (B,Tq,C) at positions start..; maxT is the longest sequence.

    state (B,4,C), of the positions so far: sum x, sum (x_s - m_s)^2 (s+1)/s, sum (x_s - x_{s-1})^2, and the last x.
    It is read if start > 0 and left as after the last row: calls for parts of a sequence give the bits of one call.
    """
    B, Tq, C = x.shape
    features[:, :, 0] = [log(t + 1) / log(maxT) if maxT > 1 else 0 for t in range(start, start + Tq)]
    if start == 0:
        state[...] = 0
        state[:, 3] = x[:, 0]
    block = rows_per_block(Tq, B * C)
    for first in range(0, Tq, block):
        rows = slice(first, min(first + block, Tq))
        _block_features(features[:, rows], state, x[:, rows], start + first)


def _block_features(features, state, x, start):
    """prefix_features for a block that stays in the cache; time is its first axis: a step of a sum is one addition."""
    B, n, C = x.shape
    x = x.transpose(1, 0, 2)  # (n,B,C)
    features = features.transpose(1, 0, 2)
    sums = scratch("prefix_features", (n + 1, B, C), x.dtype)  # row 0 is the state's, row i + 1 token i's
    values = sums[1:]
    counts = np.arange(start + 1, start + n + 1).astype(x.dtype)[:, None]  # (n,1) tokens up to each row
    before = np.maximum(counts - 1, 1)

    sums[0], values[...] = state[:, 0], x
    _running_sums(sums)
    state[:, 0] = sums[n]

    values /= counts[:, :, None]  # m_t
    np.subtract(x, values, out=values)
    np.square(values, out=values)
    features[..., 3] = np.add.reduce(values, axis=2) / C
    values *= (counts / before)[:, :, None]
    sums[0] = state[:, 1]
    _running_sums(sums)
    state[:, 1] = sums[n]
    features[..., 1] = np.add.reduce(values, axis=2) / C / counts

    np.subtract(x[0], state[:, 3], out=values[0])
    np.subtract(x[1:], x[:-1], out=values[1:])
    np.square(values, out=values)
    sums[0] = state[:, 2]
    _running_sums(sums)
    state[:, 2] = sums[n]
    features[..., 2] = np.add.reduce(values, axis=2) / C / before
    state[:, 3] = x[n - 1]


def _running_sums(sums):
    """sums (n,B,C): row i += row i - 1, in order. np.add.accumulate goes down columns, at a quarter of the speed."""
    for i in range(1, len(sums)):
        np.add(sums[i - 1], sums[i], out=sums[i])
