"""Launchers of torus_rope.cu."""

from kernels.cuda.runtime.grid import THREADS, ceil_div


def torus_rope_forward(cuda, qkv, w, f, NH, D, P, start=0):
    """As kernels.cpu.torus.torus_rope.torus_rope_forward."""
    _rotate(cuda, qkv, w, f, NH, D, P, start, 0)


def torus_rope_backward(cuda, qkv, w, f, NH, D, P, start=0):
    """As kernels.cpu.torus.torus_rope.torus_rope_backward."""
    _rotate(cuda, qkv, w, f, NH, D, P, start, 1)


def _rotate(cuda, qkv, w, f, NH, D, P, start, back):
    B, T, C3 = qkv.shape
    dk = C3 // 3 // NH
    blocks = ceil_div(B * T * dk // 2, THREADS)
    cuda.launch("torus_rope_kernel", blocks, THREADS, (qkv, w, f, B * T, T, NH, D, dk // D, P, start, back))
