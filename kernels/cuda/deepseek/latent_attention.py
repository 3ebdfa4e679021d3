"""Launchers of latent_attention.cu, and on GPUs with tensor cores those of latent_attention_tensor.cu instead."""

import numpy as np

from kernels.cpu.deepseek import latent_attention as numpy_latent_attention
from kernels.cuda.deepseek.latent_attention_tensor import TENSOR_TILES, Tile, tensor_size, tensor_tile
from kernels.cuda.gpt2.attention_join import attention_join, part_buffers, split_keys
from kernels.cuda.runtime.grid import TILE_THREADS, ceil_div
from kernels.cuda.runtime.tensor_cores import Results, takes_tensor_cores
from llmc.errors import UserError

HEADS = 8  # the most heads of a block
# kernel: keys of a tile, float4s of sums that a thread keeps; as many as fit 48 KiB beside the latents
TILES = {"latent_attention_kernel": (32, 5), "latent_attention_wide_kernel": (8, 8)}
SHARED = 46 << 10  # bytes for queries and keys; the rest is for scores and sums


def latent_attention_forward(cuda, out, qlat, latent, index, count, scale, start=0):
    """As kernels.cpu.deepseek.latent_attention.latent_attention_forward. UserError for kv_rank > 512, R > 220."""
    kv_rank, D = out.shape[2], qlat.shape[2]
    size = tensor_size(kv_rank, D)
    if size and takes_tensor_cores(cuda, latent_trial, size if D % 4 == 0 else size - 1):
        tile = tensor_tile(cuda, size)
    else:
        tile = _tile(kv_rank, D)
    _attend(cuda, tile, out, qlat, latent, index, count, scale, start)


def _attend(cuda, tile: Tile, out, qlat, latent, index, count, scale, start):
    n, NH, kv_rank = out.shape
    groups = ceil_div(NH, tile.heads)
    heads = ceil_div(NH, groups)
    K, most = (0, start + n) if index is None else (index.shape[2], index.shape[2])
    parts, share = split_keys(most, n * groups, tile.keys)
    if index is None:
        index = count = cuda.scratch("latent_no_index", (1,), np.int32)  # K = 0 says that it is not read
    part_sums, part_softmax = (
        part_buffers(cuda, parts, n * NH, kv_rank) if parts > 1 else (out, out)
    )  # else not written
    args = (out, part_sums, part_softmax, qlat, latent, index, count)
    sizes = (scale, NH, kv_rank, qlat.shape[2], heads, K, share, start)
    cuda.launch(tile.kernel, (n, groups, parts), tile.threads, (*args, *sizes), tile.shared_mem)
    if parts > 1:
        attention_join(cuda, out, cuda.scratch("latent_lse", (1, NH, n)), part_sums, part_softmax)


def _tile(kv_rank, D) -> Tile:
    """The first kernel for CUDA cores whose tile and sums hold such latents."""
    for kernel, (keys, packs) in TILES.items():
        shared_mem = 16 * (HEADS + keys) * (ceil_div(D, 4) | 1)
        if HEADS * ceil_div(kv_rank, 4) <= packs * TILE_THREADS and shared_mem <= SHARED:
            return Tile(kernel, HEADS, keys, TILE_THREADS, shared_mem)
    problem = f"kv_rank {kv_rank} and R {D - kv_rank}, on a GPU at most 512 and 220"
    raise UserError(f"latent_attention_forward: {problem}", "--device cpu, or a model with smaller latents")


def latent_trial(cuda, D: int) -> Results:
    """Two groups of heads, two parts of the keys, tiles enough to use a stage again; by position and by list."""
    n, NH, S, K, rng = 2, 17, 250, 150, np.random.default_rng(0)
    size = tensor_size(1, D)
    kv_rank = TENSOR_TILES[size].kv_rank - 33
    shapes = dict(qlat=(n, NH, D), latent=(S, D))
    given = [rng.standard_normal(shape).astype(np.float32) for shape in shapes.values()]
    index = np.sort([rng.permutation(S)[:K] for _ in range(n)]).astype(np.int32)[None]
    count = np.array([[K, K - 9]], np.int32)
    for name, lists in (("position", (None, None)), ("list", (index, count))):
        ours = [array if array is None else cuda.to_device(array) for array in (*given, *lists)]
        found, expected = cuda.zeros((n, NH, kv_rank)), np.empty((n, NH, kv_rank))
        _attend(cuda, tensor_tile(cuda, size), found, *ours, D**-0.5, S - n)
        exact = (values.astype(np.float64) for values in given)
        numpy_latent_attention.latent_attention_forward(expected, *exact, *lists, D**-0.5, S - n)
        yield f"attention to latents by {name}", cuda.to_host(found), expected
