"""Launchers of encoder.cu."""

from kernels.cuda.gpt2.append_rows import position
from kernels.cuda.runtime.grid import ceil_div, packs_of_four, threads_for, warp_a_row


def encoder_forward(cuda, out, inp, wte, wpe, start=0):
    """As kernels.cpu.gpt2.encoder.encoder_forward, but a token id outside 0..Vp-1 gives a row of NaN, no error."""
    (B, T), (Vp, C) = inp.shape, wte.shape
    args = (out, inp, wte, wpe, B * T, T, C, Vp, *position(cuda, start))
    cuda.launch("encoder_forward_kernel", *warp_a_row(B * T), args)


def encoder_backward(cuda, dwte, dwpe, dout, inp):
    """As kernels.cpu.gpt2.encoder.encoder_backward, to the order of the sums."""
    (B, T), (Vp, C) = inp.shape, dwte.shape
    threads = threads_for(C)
    grid = (B * T, ceil_div(C, 4 * threads))
    cuda.launch("encoder_backward_wte_kernel", grid, threads, (dwte, dout, inp, B * T, C, Vp))
    cuda.launch("encoder_backward_wpe_kernel", *packs_of_four(T * C), (dwpe, dout, B, T, C))
