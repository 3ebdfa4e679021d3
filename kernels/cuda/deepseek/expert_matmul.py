"""Launchers of expert_matmul.cu, and on GPUs with tensor cores those of expert_matmul_tensor.cu instead."""

from kernels.cuda.deepseek.expert_matmul_tensor import tensor_expert_backward, tensor_expert_forward
from kernels.cuda.gpt2.matmul_tensor import tensor_products
from kernels.cuda.runtime.grid import TILE_THREADS, ceil_div

ROWS, COLUMNS = 64, 128  # sides of a tile: BM and BN of expert_matmul.cu


def expert_matmul_forward(cuda, out, inp, weight, tile_expert):
    """As kernels.cpu.deepseek.expert_matmul.expert_matmul_forward."""
    if products := tensor_products(cuda):
        tensor_expert_forward(cuda, products, out, inp, weight, tile_expert)
        return
    (_, OC, C), tiles = weight.shape, len(tile_expert)
    args = (out, inp, weight, tile_expert, len(inp) // tiles, C, OC)
    cuda.launch("expert_matmul_forward_kernel", (ceil_div(OC, COLUMNS), tiles), TILE_THREADS, args)


def expert_matmul_backward(cuda, dinp, dweight, dout, inp, weight, tile_expert, beta=0):
    """As kernels.cpu.deepseek.expert_matmul.expert_matmul_backward."""
    if products := tensor_products(cuda):
        tensor_expert_backward(cuda, products, dinp, dweight, dout, inp, weight, tile_expert, beta)
        return
    (E, OC, C), tiles = weight.shape, len(tile_expert)
    tile = len(inp) // tiles
    if dinp is not None:
        args = (dinp, dout, weight, tile_expert, tile, C, OC)
        cuda.launch("expert_matmul_dinp_kernel", (ceil_div(C, COLUMNS), tiles), TILE_THREADS, args)
    grid = ceil_div(C, COLUMNS), ceil_div(OC, ROWS), E
    args = (dweight, dout, inp, tile_expert, tiles, tile, C, OC, beta)
    cuda.launch("expert_matmul_dweight_kernel", grid, TILE_THREADS, args)
