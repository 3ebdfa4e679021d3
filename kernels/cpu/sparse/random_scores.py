"""Scores without meaning, for the random selector: the same for every device, order and number of threads.

A counter-based hash: each number follows from the seed and its own place alone. The mixer is MurmurHash3's finaliser
(Appleby 2011), which makes every bit of 32 depend on every other.
"""

import numpy as np

from kernels.cpu.blocks import scratch
from kernels.cpu.sparse.score_rows import for_score_rows, future

GOLDEN = 0x9E3779B1  # a prime near 2^32 / golden ratio: multiples of it lie far apart


def random_scores(scores, seed, first):
    """scores (B,R,S) in [0,1), multiples of 2^-24, from seed (1) int32, t and s; -inf for s > t = first + r.

    bits = mix(mix(mix(seed) + t) + GOLDEN * s), in 32 bits; the same for every b.
    """
    B, R, S = scores.shape
    columns = np.arange(S, dtype=np.uint32) * np.uint32(GOLDEN)

    def rows(_, begin, stop):
        positions = np.arange(first + begin, first + stop)
        keys, spare = np.full(stop - begin, seed.view(np.uint32), np.uint32), np.empty(stop - begin, np.uint32)
        _mix(keys, spare)
        keys += positions.astype(np.uint32)
        _mix(keys, spare)
        bits, spare = scratch("random_scores", (2, stop - begin, S), np.dtype(np.uint32))
        np.add(keys[:, None], columns, out=bits)
        _mix(bits, spare)
        bits >>= 8
        for b in range(B):
            x = scores[b, begin:stop]
            np.multiply(bits, x.dtype.type(2.0**-24), out=x, casting="unsafe")  # 24 bits: exact in float32
            np.copyto(x[:, positions[0] + 1 :], -np.inf, where=future(positions, S))

    for_score_rows(rows, 1, R, S, cost=8)


def _mix(bits, spare):
    """bits (...) uint32 = MurmurHash3's finaliser of them; spare is like them."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        np.right_shift(bits, shift, out=spare)
        bits ^= spare
        bits *= np.uint32(factor)
