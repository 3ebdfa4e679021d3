"""Launchers of expert_gather.cu."""

from kernels.cuda.runtime.grid import warp_a_row


def expert_gather(cuda, rows_inp, inp, source, top):
    """As kernels.cpu.deepseek.expert_gather.expert_gather."""
    rows, C = rows_inp.shape
    cuda.launch("expert_gather_kernel", *warp_a_row(rows), (rows_inp, inp, source, rows, C, top))


def expert_scatter(cuda, dinp, drows, slot):
    """As kernels.cpu.deepseek.expert_gather.expert_scatter."""
    (N, C), top = dinp.shape, slot.shape[1]
    cuda.launch("expert_scatter_kernel", *warp_a_row(N), (dinp, drows, slot, N, C, top))


def expert_combine_forward(cuda, out, y, gates, slot):
    """As kernels.cpu.deepseek.expert_gather.expert_combine_forward."""
    (N, C), top = out.shape, slot.shape[1]
    cuda.launch("expert_combine_forward_kernel", *warp_a_row(N), (out, y, gates, slot, N, C, top))


def expert_combine_backward(cuda, dy, dgates, dout, y, gates, slot, source):
    """As kernels.cpu.deepseek.expert_gather.expert_combine_backward."""
    (rows, C), top = dy.shape, slot.shape[1]
    args = (dy, dgates, dout, y, gates, source, rows, C, top)
    cuda.launch("expert_combine_backward_kernel", *warp_a_row(rows), args)
