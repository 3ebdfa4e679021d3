"""Launchers of depth_fusion.cu."""

from kernels.cuda.gpt2.column_sum import column_sum
from kernels.cuda.runtime.grid import BLOCKS, THREADS, ceil_div
from llmc.errors import UserError

TILE = 2048  # floats of a tile, whole heads of them
PLATTERS = 64  # the most platters: what shared memory holds of omega beside two tiles
SQUARE = 32  # side of the part of domega (D,D) that a block sums up


def depth_fusion_forward(cuda, out, inp, omega, NH, depth_major=0):
    """As kernels.cpu.torus.depth_fusion.depth_fusion_forward.

    Raises UserError for more than 64 platters, 256 channels of a platter or 2048 of a head.
    """
    _mix(cuda, out, inp, omega, NH, 0, 0, depth_major)


def depth_fusion_backward(cuda, dinp, domega, dout, inp, omega, NH, depth_major=0):
    """As kernels.cpu.torus.depth_fusion.depth_fusion_backward. Raises UserError as the forward."""
    if domega is None:
        _mix(cuda, dinp, dout, omega, NH, 1, depth_major, 0)
        return
    heads, D, hd, blocks = _sizes(inp, omega, NH)
    partial = cuda.scratch("depth_fusion_backward", (blocks, D * D))
    shift = (ceil_div(min(D, SQUARE), 2) - 1).bit_length()
    args = (dinp, partial, dout, inp, omega, heads, NH, D, hd, depth_major, shift)
    grid = blocks, ceil_div(D, SQUARE) ** 2
    cuda.launch("depth_fusion_backward_kernel", grid, THREADS, args, _shared_mem(2, D))
    column_sum(cuda, domega.reshape(-1), partial)


def _mix(cuda, out, inp, omega, NH, transposed, from_depth_major, to_depth_major):
    heads, D, hd, blocks = _sizes(inp, omega, NH)
    args = (out, inp, omega, heads, NH, D, hd, transposed, from_depth_major, to_depth_major)
    cuda.launch("depth_fusion_kernel", blocks, THREADS, args, _shared_mem(1, D))


def _sizes(inp, omega, NH):
    """Heads of all rows, platters, channels of a platter, blocks."""
    (N, C), D = inp.shape, len(omega)
    dk = C // NH
    hd = dk // D
    if D > PLATTERS or hd > THREADS or dk > TILE:
        problem = f"{D} platters of {hd} channels, on a GPU at most {PLATTERS} of {THREADS}, and {TILE} a head"
        raise UserError(f"depth_fusion: {problem}", "--device cpu")
    return N * NH, D, hd, min(ceil_div(N * NH, TILE // dk), BLOCKS)


def _shared_mem(tiles, D):
    return 4 * (tiles * TILE + D * D)
