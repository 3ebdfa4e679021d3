"""Launchers of rmsnorm.cu."""

from kernels.cuda.gpt2.column_sum import column_sum
from kernels.cuda.runtime.grid import BLOCKS, ceil_div, threads_for, warp_a_row
from llmc.errors import UserError

WIDEST = 2048  # the most channels that a block's registers hold


def rmsnorm_forward(cuda, out, rrms, inp, weight):
    """As kernels.cpu.deepseek.rmsnorm.rmsnorm_forward."""
    N, C = out.shape
    cuda.launch("rmsnorm_forward_kernel", *warp_a_row(N), (out, rrms, inp, weight, N, C, inp.shape[1]))


def rmsnorm_backward(cuda, dinp, dweight, dout, inp, weight, rrms):
    """As kernels.cpu.deepseek.rmsnorm.rmsnorm_backward. Raises UserError for C > 2048."""
    N, C = dout.shape
    if C > WIDEST:
        raise UserError(f"rmsnorm_backward: {C} channels, on a GPU at most {WIDEST}", "--device cpu")
    rows = ceil_div(N, BLOCKS)
    blocks, threads = ceil_div(N, rows), threads_for(C)
    partial = cuda.scratch("rmsnorm_backward", (blocks, C))
    kernel = "rmsnorm_backward_kernel" if 4 * threads >= C else "rmsnorm_backward_wide_kernel"
    args = (dinp, partial, dout, inp, weight, rrms, N, C, dinp.shape[1], inp.shape[1], rows)
    cuda.launch(kernel, blocks, threads, args)
    column_sum(cuda, dweight, partial)
