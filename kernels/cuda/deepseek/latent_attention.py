"""Launchers of latent_attention.cu."""

import numpy as np

from kernels.cuda.gpt2.attention_join import attention_join, part_buffers, split_keys
from kernels.cuda.runtime.grid import TILE_THREADS, ceil_div
from llmc.errors import UserError

HEADS = 8  # the most heads of a block
# kernel: keys of a tile, float4s of sums that a thread keeps; as many as fit 48 KiB beside the latents
TILES = {"latent_attention_kernel": (32, 5), "latent_attention_wide_kernel": (8, 8)}
SHARED = 46 << 10  # bytes for queries and keys; the rest is for scores and sums


def latent_attention_forward(cuda, out, qlat, latent, index, count, scale, start=0):
    """As kernels.cpu.deepseek.latent_attention.latent_attention_forward. UserError for kv_rank > 512, R > 220."""
    n, NH, kv_rank = out.shape
    D = qlat.shape[2]
    kernel, keys, shared_mem = _kernel(kv_rank, D)
    groups = ceil_div(NH, HEADS)
    heads = ceil_div(NH, groups)
    K, most = (0, start + n) if index is None else (index.shape[2], index.shape[2])
    parts, share = split_keys(most, n * groups, keys)
    if index is None:
        index = count = cuda.scratch("latent_no_index", (1,), np.int32)  # K = 0 says that it is not read
    part_sums, part_softmax = (
        part_buffers(cuda, parts, n * NH, kv_rank) if parts > 1 else (out, out)
    )  # else not written
    args = (out, part_sums, part_softmax, qlat, latent, index, count)
    sizes = (scale, NH, kv_rank, D, heads, K, share, start)
    cuda.launch(kernel, (n, groups, parts), TILE_THREADS, (*args, *sizes), shared_mem)
    if parts > 1:
        attention_join(cuda, out, cuda.scratch("latent_lse", (1, NH, n)), part_sums, part_softmax)


def _kernel(kv_rank, D):
    """The first kernel whose tile and sums hold such latents, its keys, and its bytes of dynamic shared memory."""
    for kernel, (keys, packs) in TILES.items():
        shared_mem = 16 * (HEADS + keys) * (ceil_div(D, 4) | 1)
        if HEADS * ceil_div(kv_rank, 4) <= packs * TILE_THREADS and shared_mem <= SHARED:
            return kernel, keys, shared_mem
    problem = f"kv_rank {kv_rank} and R {D - kv_rank}, on a GPU at most 512 and 220"
    raise UserError(f"latent_attention_forward: {problem}", "--device cpu, or a model with smaller latents")
