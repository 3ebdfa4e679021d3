"""Kernels of latent_attention_tensor.cu by size: latent_attention.py launches them where tensor cores are worth it."""

from typing import NamedTuple

from kernels.cuda.runtime.grid import WARP

TENSOR_HEADS = 16  # the most heads of a block: the rows of a product, and fewer take as long


class Tile(NamedTuple):
    """A kernel, the most heads of a block, keys of a tile, threads, bytes of dynamic shared memory (0: it says so)."""

    kernel: str
    heads: int
    keys: int
    threads: int
    shared_mem: int = 0


class TensorTile(NamedTuple):
    """The name of two kernels up to the products, the largest kv_rank, keys of a tile, warps."""

    kernel: str
    kv_rank: int
    keys: int
    warps: int


# by the most columns of a latent
TENSOR_TILES = {128: TensorTile("latent_attention", 128, 32, 4), 576: TensorTile("latent_attention_wide", 512, 16, 6)}


def tensor_size(kv_rank: int, D: int) -> int | None:
    """The first size of TENSOR_TILES that holds latents of D = kv_rank + R columns; None if none does."""
    return next((size for size, tile in TENSOR_TILES.items() if size >= D and kv_rank <= tile.kv_rank), None)


def tensor_tile(cuda, size: int) -> Tile:
    """The kernel of that size; operands of products are rounded only if cuda.tf32."""
    kernel, _, keys, warps = TENSOR_TILES[size]
    return Tile(f"{kernel}_{'tf32' if cuda.tf32 else '3xtf32'}_kernel", TENSOR_HEADS, keys, WARP * warps)
