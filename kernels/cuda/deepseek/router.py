"""Launchers of router.cu."""

from kernels.cuda.runtime.grid import warp_a_row
from llmc.errors import UserError

MAX_EXPERTS = 1024  # a lane of a warp keeps its 32 experts as the bits of an int


def router_forward(cuda, probs, gates, experts, logits):
    """As kernels.cpu.deepseek.router.router_forward. Raises UserError for more than 1024 experts."""
    (N, E), top = logits.shape, experts.shape[1]
    if E > MAX_EXPERTS:
        raise UserError(f"{E} experts, on a GPU at most {MAX_EXPERTS}", "use --device cpu")
    cuda.launch("router_forward_kernel", *warp_a_row(N), (probs, gates, experts, logits, N, E, top))


def router_backward(cuda, dlogits, dgates, probs, gates, experts, load, balance):
    """As kernels.cpu.deepseek.router.router_backward."""
    (N, E), top = probs.shape, gates.shape[1]
    scale = balance * E / (N * top) / N
    args = (dlogits, dgates, probs, gates, experts, load, scale, N, E, top)
    cuda.launch("router_backward_kernel", *warp_a_row(N), args)
