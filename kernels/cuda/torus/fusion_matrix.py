"""Launchers of fusion_matrix.cu."""

from kernels.cpu.torus.fusion_matrix import IDENTITY, MEAN
from kernels.cuda.runtime.grid import warp_a_row

BACKWARD_THREADS = 128  # threads of a block of the backward pass


def fusion_matrix_forward(cuda, omega, first, second, mode):
    """As kernels.cpu.torus.fusion_matrix.fusion_matrix_forward."""
    D = len(omega)
    if mode in (IDENTITY, MEAN):
        first = second = omega  # not read
    r = first.shape[1]
    cuda.launch("fusion_matrix_forward_kernel", *warp_a_row(D), (omega, first, second, D, r, mode))


def fusion_matrix_backward(cuda, dfirst, dsecond, domega, omega, first, second, mode):
    """As kernels.cpu.torus.fusion_matrix.fusion_matrix_backward."""
    if mode in (IDENTITY, MEAN):
        return
    D, r = first.shape
    args = (dfirst, dsecond, domega, omega, first, second, D, r, mode)
    cuda.launch("fusion_matrix_backward_kernel", D, BACKWARD_THREADS, args, 4 * D)
