"""Launchers of inverse_lists.cu."""

import numpy as np

from kernels.cuda.runtime.grid import THREADS, WARP, ceil_div

LISTS = 32  # the fewest lists of a chunk
CHUNKS = 64  # the most chunks of a sequence: they take the memory of 64 columns of the lists
SUM_THREADS = 1024  # the most threads of a block of inverse_sum


def inverse_lists(cuda, index, count):
    """Lists of keys for each query -> (offsets, pairs): lists of queries for each key. Both are scratch.

    index (B,T,K) int32, strictly ascending in the first count (B,T) int32 of a list. offsets (B,T+1) and pairs (B,T*K)
    int32: key s is in the lists t at the places j for the pairs t*K + j from offsets[b,s] to offsets[b,s+1], ascending.
    """
    B, T, K = index.shape
    lists = max(LISTS, ceil_div(T, CHUNKS))
    chunks = ceil_div(T, lists)
    offsets = cuda.scratch("inverse_offsets", (B, T + 1), np.int32)
    pairs = cuda.scratch("inverse_pairs", (B, T * K), np.int32)
    places = cuda.scratch("inverse_places", (B, chunks, T), np.int32)
    cuda.launch("inverse_count_kernel", (chunks, B), THREADS, (places, index, count, T, K, lists))
    threads = min(SUM_THREADS, ceil_div(T, WARP) * WARP)
    cuda.launch("inverse_sum_kernel", B, threads, (offsets, places, T, chunks))
    cuda.launch("inverse_place_kernel", (chunks, B), THREADS, (pairs, places, index, count, T, K, lists))
    return offsets, pairs
