"""Launchers of band_matmul_tensor.cu: band_matmul.py takes them where tensor cores multiply a band the fastest."""

from functools import lru_cache

from kernels.cuda.band.band_mask import band_of_rows
from kernels.cuda.gpt2.matmul_tensor import parts_of
from kernels.cuda.runtime.grid import ceil_div

# sides of tiles and threads of their blocks: rows of inp and dout, by 64 columns; hidden units, by channels
TILES = {"tf32": (128, 64, 256), "3xtf32": (64, 64, 128)}
GRADIENT_TILES = {"tf32": (128, 96), "3xtf32": (128, 64)}
GRADIENT_THREADS, GROUPS = 256, 2  # blocks of a tile that join parts


def tensor_band_forward(cuda, products, out, inp, weight, bias, bandwidth):
    """band_matmul_forward; products: "tf32" or "3xtf32"."""
    (N, C), OC = inp.shape, len(weight)
    grid, threads = _tiles(products, N, OC)
    args = (out, inp, weight, bias, N, C, OC, bandwidth)
    cuda.launch(f"band_matmul_forward_{products}_kernel", grid, threads, args)


def tensor_band_backward(cuda, products, dinp, dweight, dout, inp, weight, bandwidth, beta):
    """band_matmul_backward without dbias."""
    (N, C), OC = inp.shape, len(weight)
    grid, threads = _tiles(products, N, C)
    cuda.launch(f"band_matmul_dinp_{products}_kernel", grid, threads, (dinp, dout, weight, N, C, OC, bandwidth))

    channels, transposed = min(OC, C), int(OC < C)
    hidden, channel = (inp, dout) if transposed else (dout, inp)
    down, across, used = gradient_tiles(products, channels, bandwidth)
    count, rows = parts_of(N, used)
    parts = dweight
    if count > 1:
        parts = cuda.scratch("band_parts", (count, down * across, *GRADIENT_TILES[products]))
    args = (dweight, parts, hidden, channel, N, channels, bandwidth, rows, transposed, beta)
    cuda.launch(f"band_matmul_dweight_{products}_kernel", (across, down, count), GRADIENT_THREADS, args)
    if count > 1:
        args = (dweight, parts, channels, bandwidth, count, transposed, beta)
        cuda.launch(f"band_matmul_join_{products}_kernel", (across, down, GROUPS), GRADIENT_THREADS, args)


def _tiles(products, rows, columns):
    height, width, threads = TILES[products]
    return (ceil_div(columns, width), ceil_div(rows, height)), threads


@lru_cache(maxsize=64)
def gradient_tiles(products: str, C: int, bandwidth: int) -> tuple[int, int, int]:
    """(tiles of hidden units, most tiles of channels that the bands of one cover, tiles that are used)"""
    height, width = GRADIENT_TILES[products]
    bands = [band_of_rows(first, height, 4 * C, C, bandwidth) for first in range(0, 4 * C, height)]
    across = [ceil_div(max(stop - start, 0), width) for start, stop in bands]
    return len(across), max(across), max(sum(across), 1)
