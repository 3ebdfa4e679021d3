"""The matrix omega (D,D) that mixes D platters, from two factors F, G (D,r) that can be trained: a mode of FUSIONS.

    0 identity            I
    1 mean                1/D everywhere
    2 low_rank            F G^T / sqrt(r)
    3 low_rank_residual   I + F G^T / sqrt(r)
    4 attention           softmax of the rows of F G^T / sqrt(r), r = D

1, 2 and 4 are published (ZanzyTHEbar/torodial-attention). 1 and 2 keep only 1/D and r/D of a head's values. 4 has rows
of sum 1, but depth fusion sums over the rows' index, so its outputs are not weighted means.
"""

from math import sqrt

import numpy as np

FUSIONS = ("identity", "mean", "low_rank", "low_rank_residual", "attention")
IDENTITY, MEAN, LOW_RANK, LOW_RANK_RESIDUAL, ATTENTION = range(len(FUSIONS))


def fusion_init(mode, D, rank, generator):
    """The factors first, second of a mode, float32 on the host, or None, None for a mode without.

    low_rank: (D,rank), columns orthonormal, so that omega has rank `rank`, its singular values all 1/sqrt(rank).
    low_rank_residual: the same and zeros: omega starts as I, and the zeros have a gradient.
    attention: (D,D), normal. Other modes make no use of rank. Raises ValueError for a rank that is not in 1..D.
    """
    if mode in (IDENTITY, MEAN):
        return None, None
    if mode == ATTENTION:
        return tuple(generator.standard_normal((D, D)).astype(np.float32) for _ in range(2))
    if not 1 <= rank <= D:
        raise ValueError(f"rank {rank} of a fusion of {D} platters, expected 1 to {D}")
    first = _orthonormal(D, rank, generator)
    return first, np.zeros_like(first) if mode == LOW_RANK_RESIDUAL else _orthonormal(D, rank, generator)


def _orthonormal(D, rank, generator):
    """(D,rank) from a Gaussian's QR, whose choice of signs is undone: the diagonal is positive, so D = 1 gives 1."""
    q = np.linalg.qr(generator.standard_normal((D, rank)))[0]
    return (q * np.where(np.diagonal(q) < 0, -1, 1)).astype(np.float32)


def fusion_matrix_forward(omega, first, second, mode):
    """omega (D,D) from first, second: (D,r) for modes 2 and 3, (D,D) for 4, None for 0 and 1."""
    D = len(omega)
    if mode == MEAN:
        omega[...] = 1 / D
        return
    if mode == IDENTITY:
        omega[...] = 0
    else:
        np.matmul(first, second.T, out=omega)
        omega /= sqrt(first.shape[1])
    if mode in (IDENTITY, LOW_RANK_RESIDUAL):
        omega.reshape(-1)[:: D + 1] += 1
    if mode == ATTENTION:
        omega -= omega.max(axis=1, keepdims=True)
        np.exp(omega, out=omega)
        omega /= omega.sum(axis=1, keepdims=True)


def fusion_matrix_backward(dfirst, dsecond, domega, omega, first, second, mode):
    """dfirst, dsecond += ... from domega, omega (D,D), first, second.

        dF = dZ G / sqrt(r),   dG = dZ^T F / sqrt(r),   dZ = domega, for attention omega (domega - sum_k' domega omega)

    Modes 0 and 1 have nothing to learn: nothing happens, and all but mode may be None.
    """
    if mode in (IDENTITY, MEAN):
        return
    dz = domega
    if mode == ATTENTION:
        dz = omega * (domega - np.einsum("kl,kl->k", domega, omega)[:, None])
    scale = 1 / sqrt(first.shape[1])
    dfirst += scale * (dz @ second)
    dsecond += scale * (dz.T @ first)
