"""Launchers of expert_matmul_tensor.cu: expert_matmul.py takes them where there are tensor cores that are worth it."""

from kernels.cuda.runtime.grid import TILE_THREADS, ceil_div

SIDE = 64  # of a tile


def tensor_expert_forward(cuda, products, out, inp, weight, tile_expert):
    """expert_matmul_forward; products: "tf32" or "3xtf32"."""
    (_, OC, C), tiles = weight.shape, len(tile_expert)
    args = (out, inp, weight, tile_expert, len(inp) // tiles, C, OC)
    cuda.launch(f"expert_matmul_forward_{products}_kernel", (ceil_div(OC, SIDE), tiles), TILE_THREADS, args)


def tensor_expert_backward(cuda, products, dinp, dweight, dout, inp, weight, tile_expert, beta):
    """expert_matmul_backward; products: "tf32" or "3xtf32"."""
    (E, OC, C), tiles = weight.shape, len(tile_expert)
    tile = len(inp) // tiles
    if dinp is not None:
        args = (dinp, dout, weight, tile_expert, tile, C, OC)
        cuda.launch(f"expert_matmul_dinp_{products}_kernel", (ceil_div(C, SIDE), tiles), TILE_THREADS, args)
    args = (dweight, dout, inp, tile_expert, tiles, tile, C, OC, beta)
    grid = ceil_div(C, SIDE), ceil_div(OC, SIDE), E
    cuda.launch(f"expert_matmul_dweight_{products}_kernel", grid, TILE_THREADS, args)
