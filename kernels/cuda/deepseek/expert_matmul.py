"""Launchers of expert_matmul_tensor.cu, and of expert_matmul.cu where there are no tensor cores that are worth it."""

from kernels.cuda.gpt2.matmul_tensor import tensor_products
from kernels.cuda.runtime.grid import TILE_THREADS, ceil_div

ROWS, COLUMNS = 64, 128  # sides of a tile: BM and BN of expert_matmul.cu
TENSOR_COLUMNS = 64  # of expert_matmul_tensor.cu, by as many rows


def expert_matmul_forward(cuda, out, inp, weight, tile_expert):
    """As kernels.cpu.deepseek.expert_matmul.expert_matmul_forward."""
    (_, OC, C), tiles = weight.shape, len(tile_expert)
    args = (out, inp, weight, tile_expert, len(inp) // tiles, C, OC)
    kind, columns = _kind(cuda)
    cuda.launch(f"expert_matmul_forward_{kind}kernel", (ceil_div(OC, columns), tiles), TILE_THREADS, args)


def expert_matmul_backward(cuda, dinp, dweight, dout, inp, weight, tile_expert, beta=0):
    """As kernels.cpu.deepseek.expert_matmul.expert_matmul_backward."""
    (E, OC, C), tiles = weight.shape, len(tile_expert)
    tile = len(inp) // tiles
    kind, columns = _kind(cuda)
    if dinp is not None:
        args = (dinp, dout, weight, tile_expert, tile, C, OC)
        cuda.launch(f"expert_matmul_dinp_{kind}kernel", (ceil_div(C, columns), tiles), TILE_THREADS, args)
    grid = ceil_div(C, columns), ceil_div(OC, ROWS), E
    args = (dweight, dout, inp, tile_expert, tiles, tile, C, OC, beta)
    cuda.launch(f"expert_matmul_dweight_{kind}kernel", grid, TILE_THREADS, args)


def _kind(cuda) -> tuple[str, int]:
    """(the word in the kernels' names, columns of their tiles)"""
    products = tensor_products(cuda)
    return (f"{products}_", TENSOR_COLUMNS) if products else ("", COLUMNS)
