"""Random numbers that do not hang on NumPy's version: llm.c's Mersenne Twister and its shuffle (rand.h), and normals.

NumPy promises the streams of MT19937 and of RandomState for ever, but not those of default_rng (NEP 19).
"""

from array import array

import numpy as np


def mersenne(seed: int) -> np.random.MT19937:
    """MT19937 as llm.c's manual_seed leaves it; the lower 32 bits of the seed count."""
    generator = np.random.MT19937()
    # RandomState seeds as llm.c's init_genrand does, MT19937 alone does not
    generator.state = np.random.RandomState(seed & 0xFFFFFFFF).get_state(legacy=False)
    return generator


def shuffle(indices: np.ndarray, generator: np.random.MT19937, block: int = 1 << 16) -> None:
    """Fisher-Yates from the end, in place: for i = n-1 .. 1, swap i with u32 % (i+1) (llm.c random_permutation)."""
    order = array("i", indices.tobytes())  # indexing an array.array is several times faster than indexing NumPy's
    for stop in range(len(order), 1, -block):  # blocks keep the draws of a large shard small
        i = np.arange(stop - 1, max(stop - 1 - block, 0), -1)
        j = generator.random_raw(i.size) % (i + 1).astype(np.uint64)
        for a, b in zip(i.tolist(), j.tolist()):
            order[a], order[b] = order[b], order[a]
    indices[:] = order


def permutation(n: int, seed: int) -> np.ndarray:
    """0 .. n-1 in a random order, int32: llm.c's shuffle by a fresh Mersenne Twister."""
    indices = np.arange(n, dtype=np.int32)
    shuffle(indices, mersenne(seed))
    return indices


def normals(seed: int) -> np.random.RandomState:
    """A source of weights: the same float32 values everywhere (to the last bits of the C library's logarithm)."""
    return np.random.RandomState(seed if seed < 1 << 32 else [seed & 0xFFFFFFFF, seed >> 32])
