"""Launcher of random_scores.cu."""

from kernels.cuda.runtime.grid import THREADS, ceil_div


def random_scores(cuda, scores, seed, first):
    """As kernels.cpu.sparse.random_scores.random_scores."""
    B, R, S = scores.shape
    cuda.launch("random_scores_kernel", (ceil_div(S, THREADS), min(R, 65535)), THREADS, (scores, seed, B, R, S, first))
