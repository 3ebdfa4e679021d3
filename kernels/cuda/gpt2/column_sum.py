"""Launchers of column_sum.cu."""

from kernels.cuda.runtime.grid import ceil_div

BLOCK = 1024  # threads
WIDE = 2048  # columns from which on a block takes 32 of them: 16 would make more blocks than a GPU runs at once


def column_sum(cuda, out, inp):
    """As kernels.cpu.gpt2.column_sum.column_sum, in an order that depends on N and C alone."""
    _launch(cuda, out, out, inp, 1)


def two_column_sums(cuda, out, out2, inp):
    """out (C), out2 (C) += the sums over the rows of inp (2,N,C), in one launch."""
    _launch(cuda, out, out2, inp, 2)


def _launch(cuda, out, out2, inp, matrices):
    N, C = inp.shape[-2:]
    kernel, columns = ("column_sum_kernel", 16) if matrices * C <= WIDE else ("column_sum_wide_kernel", 32)
    cuda.launch(kernel, (ceil_div(C, columns), matrices), BLOCK, (out, out2, inp, N, C))
