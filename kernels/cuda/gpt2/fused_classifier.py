"""Launcher of fused_classifier.cu."""

from kernels.cuda.runtime.grid import WARP, ceil_div

MAX_THREADS = 512  # the most threads of a block, which has one row


def fused_classifier(cuda, losses, logits, targets, V, dloss):
    """As kernels.cpu.gpt2.fused_classifier.fused_classifier; a target outside 0..V-1 gives a loss of NaN."""
    N, Vp = logits.shape
    threads = min(MAX_THREADS, ceil_div(Vp, 4 * WARP) * WARP)
    cuda.launch("fused_classifier_kernel", N, threads, (losses, logits, targets, V, Vp, dloss))
