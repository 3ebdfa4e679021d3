"""Launcher of fused_kl.cu."""

from kernels.cuda.runtime.grid import warp_a_row


def fused_kl(cuda, losses, scores, p, dscale, first=0):
    """As kernels.cpu.sparse.fused_kl.fused_kl."""
    B, R, S = scores.shape
    args = (losses, scores, p, dscale, B * R, R, S, losses.shape[1], first)
    cuda.launch("fused_kl_kernel", *warp_a_row(B * R), args)
