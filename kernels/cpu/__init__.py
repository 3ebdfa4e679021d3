"""Every op in NumPy, under its one name, and what a trainer needs of a device. The readable reference, and fast."""

import os
import sys
from collections.abc import Callable

import numpy as np

from kernels.cpu.band.band_adamw import band_adamw_update
from kernels.cpu.band.band_mask import band_count, band_fan_in, band_mask
from kernels.cpu.band.band_matmul import band_matmul_backward, band_matmul_forward
from kernels.cpu.band.take_columns import take_columns
from kernels.cpu.blocks import num_threads
from kernels.cpu.deepseek.expert_gather import (
    expert_combine_backward,
    expert_combine_forward,
    expert_gather,
    expert_scatter,
)
from kernels.cpu.deepseek.expert_matmul import expert_matmul_backward, expert_matmul_forward
from kernels.cpu.deepseek.expert_plan import expert_plan, expert_rows
from kernels.cpu.deepseek.latent_attention import latent_attention_forward
from kernels.cpu.deepseek.mla import mla_absorb, mla_expand, mla_latent, mla_qkv_backward, mla_qkv_forward
from kernels.cpu.deepseek.rmsnorm import rmsnorm_backward, rmsnorm_forward
from kernels.cpu.deepseek.router import router_backward, router_forward
from kernels.cpu.deepseek.silu import silu_backward, silu_forward
from kernels.cpu.gpt2.adamw import adamw_update
from kernels.cpu.gpt2.attention import attention_backward, attention_forward
from kernels.cpu.gpt2.column_sum import column_sum
from kernels.cpu.gpt2.encoder import encoder_backward, encoder_forward
from kernels.cpu.gpt2.fused_classifier import fused_classifier
from kernels.cpu.gpt2.gelu import gelu_backward, gelu_forward
from kernels.cpu.gpt2.global_norm import global_norm
from kernels.cpu.gpt2.layernorm import fused_residual_forward, layernorm_backward, layernorm_forward
from kernels.cpu.gpt2.matmul import matmul_backward, matmul_forward
from kernels.cpu.gpt2.residual import residual_forward
from kernels.cpu.sparse.attention_mean import attention_mean
from kernels.cpu.sparse.fused_kl import fused_kl
from kernels.cpu.sparse.indexer import (
    indexer_gathered_backward,
    indexer_gathered_forward,
    indexer_scores_backward,
    indexer_scores_forward,
)
from kernels.cpu.sparse.keep_controller import keep_controller_backward, keep_controller_forward, keep_controller_init
from kernels.cpu.sparse.mass_count import mass_count
from kernels.cpu.sparse.prefix_features import prefix_features
from kernels.cpu.sparse.random_scores import random_scores
from kernels.cpu.sparse.rope import rope_backward, rope_forward
from kernels.cpu.sparse.row_entropy import row_entropy
from kernels.cpu.sparse.select_topk import select_topk
from kernels.cpu.sparse.sparse_attention import (
    sparse_attention_backward,
    sparse_attention_forward,
    sparse_attention_mean,
)
from kernels.cpu.sparse.upstream_controller import (
    upstream_controller,
    upstream_controller_init,
    upstream_controller_shapes,
)
from kernels.cpu.torus.depth_fusion import depth_fusion_backward, depth_fusion_forward
from kernels.cpu.torus.fusion_matrix import FUSIONS, fusion_init, fusion_matrix_backward, fusion_matrix_forward
from kernels.cpu.torus.torus_attention import torus_attention_backward, torus_attention_forward
from kernels.cpu.torus.torus_rope import torus_frequencies, torus_rope_backward, torus_rope_forward

__all__ = [
    "FUSIONS",
    "adamw_update",
    "attention_backward",
    "attention_forward",
    "attention_mean",
    "band_adamw_update",
    "band_count",
    "band_fan_in",
    "band_mask",
    "band_matmul_backward",
    "band_matmul_forward",
    "column_sum",
    "copy_in",
    "depth_fusion_backward",
    "depth_fusion_forward",
    "describe",
    "encoder_backward",
    "encoder_forward",
    "expert_combine_backward",
    "expert_combine_forward",
    "expert_gather",
    "expert_matmul_backward",
    "expert_matmul_forward",
    "expert_plan",
    "expert_rows",
    "expert_scatter",
    "fused_classifier",
    "fused_kl",
    "fused_residual_forward",
    "fusion_init",
    "fusion_matrix_backward",
    "fusion_matrix_forward",
    "gelu_backward",
    "gelu_forward",
    "global_norm",
    "indexer_gathered_backward",
    "indexer_gathered_forward",
    "indexer_scores_backward",
    "indexer_scores_forward",
    "keep_controller_backward",
    "keep_controller_forward",
    "keep_controller_init",
    "latent_attention_forward",
    "layernorm_backward",
    "layernorm_forward",
    "mass_count",
    "matmul_backward",
    "matmul_forward",
    "memory_used",
    "mla_absorb",
    "mla_expand",
    "mla_latent",
    "mla_qkv_backward",
    "mla_qkv_forward",
    "prefix_features",
    "random_scores",
    "residual_forward",
    "rmsnorm_backward",
    "rmsnorm_forward",
    "rope_backward",
    "rope_forward",
    "router_backward",
    "router_forward",
    "row_entropy",
    "select_topk",
    "silu_backward",
    "silu_forward",
    "sparse_attention_backward",
    "sparse_attention_forward",
    "sparse_attention_mean",
    "synchronize",
    "take_columns",
    "tf32",
    "to_device",
    "to_host",
    "to_host_later",
    "torus_attention_backward",
    "torus_attention_forward",
    "torus_frequencies",
    "torus_rope_backward",
    "torus_rope_forward",
    "upstream_controller",
    "upstream_controller_init",
    "upstream_controller_shapes",
    "zeros",
]

tf32 = False  # products never round their operands


def describe() -> str:
    """What the parameter table shows as the device."""
    return f"CPU, NumPy {np.__version__}, {num_threads()} threads"


def memory_used() -> int:
    """Bytes that this process holds of the machine's memory."""
    if os.path.exists("/proc/self/statm"):
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def zeros(shape, dtype=np.float32) -> np.ndarray:
    """An array of zeros on the device."""
    return np.zeros(shape, dtype)


def to_device(array: np.ndarray) -> np.ndarray:
    """`array` on the device; here the array itself."""
    return array


def copy_in(array: np.ndarray, values: np.ndarray) -> None:
    """Overwrite `array` on the device with `values` of the same shape and dtype."""
    array[...] = values


def to_host(array: np.ndarray) -> np.ndarray:
    """`array` in NumPy; here the array itself."""
    return array


def to_host_later(array: np.ndarray) -> Callable[[], np.ndarray]:
    """What gives `array` in NumPy when called, without keeping the device from what follows; here the array itself."""
    return lambda: array


def synchronize() -> None:
    """Wait until the device has done all it was told to; here it has."""
