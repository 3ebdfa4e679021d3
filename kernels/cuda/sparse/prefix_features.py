"""Launchers of prefix_features.cu."""

from kernels.cuda.runtime.grid import THREADS, WARP, ceil_div


def prefix_features(cuda, features, state, x, maxT, start=0):
    """As kernels.cpu.sparse.prefix_features.prefix_features."""
    B, Tq, C = x.shape
    groups, N = ceil_div(C, WARP), B * Tq
    partial = cuda.scratch("prefix_features", (3, groups, N))
    cuda.launch("prefix_sums_kernel", (groups, B), WARP, (partial, state, x, Tq, C, start))
    args = (features, partial, groups, N, Tq, C, maxT, start)
    cuda.launch("prefix_features_kernel", ceil_div(N, THREADS), THREADS, args)
