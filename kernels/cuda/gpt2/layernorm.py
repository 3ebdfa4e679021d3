"""Launchers of layernorm.cu."""

from kernels.cuda.gpt2.column_sum import two_column_sums
from kernels.cuda.runtime.grid import BLOCKS, ceil_div, threads_for, warp_a_row
from llmc.errors import UserError

WIDEST = 4096  # the most channels that a block's registers hold


def layernorm_forward(cuda, out, mean, rstd, inp, weight, bias):
    """As kernels.cpu.gpt2.layernorm.layernorm_forward."""
    N, C = inp.shape
    cuda.launch("layernorm_forward_kernel", *warp_a_row(N), (out, mean, rstd, inp, weight, bias, N, C))


def fused_residual_forward(cuda, residual, out, mean, rstd, inp1, inp2, weight, bias):
    """As kernels.cpu.gpt2.layernorm.fused_residual_forward."""
    N, C = inp1.shape
    args = (residual, out, mean, rstd, inp1, inp2, weight, bias, N, C)
    cuda.launch("fused_residual_forward_kernel", *warp_a_row(N), args)


def layernorm_backward(cuda, dinp, dweight, dbias, dout, inp, weight, mean, rstd):
    """As kernels.cpu.gpt2.layernorm.layernorm_backward. Raises UserError for C > 4096."""
    N, C = inp.shape
    if C > WIDEST:
        raise UserError(f"layernorm_backward: {C} channels, on a GPU at most {WIDEST}", "--device cpu")
    rows = ceil_div(N, BLOCKS)
    blocks, threads = ceil_div(N, rows), threads_for(C)
    partial = cuda.scratch("layernorm_backward", (2, blocks, C))
    kernel = "layernorm_backward_kernel" if 4 * threads >= C else "layernorm_backward_wide_kernel"
    cuda.launch(kernel, blocks, threads, (dinp, partial, dout, inp, weight, mean, rstd, N, C, rows))
    two_column_sums(cuda, dweight, dbias, partial)
