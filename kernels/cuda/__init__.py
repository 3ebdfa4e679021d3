"""Every op as CUDA kernels under its one name, bound to a runtime: the device that trainers get for a GPU.

kernels.cpu is the readable reference. A launcher, <op>.py, computes a grid and launches; the mathematics is in <op>.cu.
"""

from functools import partial
from types import SimpleNamespace

from kernels.cpu.band.band_mask import band_count, band_fan_in
from kernels.cpu.deepseek.expert_plan import expert_rows
from kernels.cpu.sparse.keep_controller import keep_controller_init
from kernels.cpu.sparse.upstream_controller import upstream_controller_init, upstream_controller_shapes
from kernels.cpu.torus.fusion_matrix import FUSIONS, fusion_init
from kernels.cpu.torus.torus_rope import torus_frequencies
from kernels.cuda.band.band_adamw import band_adamw_update
from kernels.cuda.band.band_mask import band_mask
from kernels.cuda.band.band_matmul import band_matmul_backward, band_matmul_forward
from kernels.cuda.band.take_columns import take_columns
from kernels.cuda.deepseek.expert_gather import (
    expert_combine_backward,
    expert_combine_forward,
    expert_gather,
    expert_scatter,
)
from kernels.cuda.deepseek.expert_matmul import expert_matmul_backward, expert_matmul_forward
from kernels.cuda.deepseek.expert_plan import expert_plan
from kernels.cuda.deepseek.latent_attention import latent_attention_forward
from kernels.cuda.deepseek.mla import mla_absorb, mla_expand, mla_latent, mla_qkv_backward, mla_qkv_forward
from kernels.cuda.deepseek.rmsnorm import rmsnorm_backward, rmsnorm_forward
from kernels.cuda.deepseek.router import router_backward, router_forward
from kernels.cuda.deepseek.silu import silu_backward, silu_forward
from kernels.cuda.gpt2.adamw import adamw_update
from kernels.cuda.gpt2.attention import attention_backward, attention_forward
from kernels.cuda.gpt2.column_sum import column_sum
from kernels.cuda.gpt2.encoder import encoder_backward, encoder_forward
from kernels.cuda.gpt2.fused_classifier import fused_classifier
from kernels.cuda.gpt2.gelu import gelu_backward, gelu_forward
from kernels.cuda.gpt2.global_norm import global_norm
from kernels.cuda.gpt2.layernorm import fused_residual_forward, layernorm_backward, layernorm_forward
from kernels.cuda.gpt2.matmul import matmul_backward, matmul_forward
from kernels.cuda.gpt2.residual import residual_forward
from kernels.cuda.sparse.attention_mean import attention_mean
from kernels.cuda.sparse.fused_kl import fused_kl
from kernels.cuda.sparse.indexer import (
    indexer_gathered_backward,
    indexer_gathered_forward,
    indexer_scores_backward,
    indexer_scores_forward,
)
from kernels.cuda.sparse.keep_controller import keep_controller_backward, keep_controller_forward
from kernels.cuda.sparse.mass_count import mass_count
from kernels.cuda.sparse.prefix_features import prefix_features
from kernels.cuda.sparse.random_scores import random_scores
from kernels.cuda.sparse.rope import rope_backward, rope_forward
from kernels.cuda.sparse.row_entropy import row_entropy
from kernels.cuda.sparse.select_topk import select_topk
from kernels.cuda.sparse.sparse_attention import (
    sparse_attention_backward,
    sparse_attention_forward,
    sparse_attention_mean,
)
from kernels.cuda.sparse.upstream_controller import upstream_controller
from kernels.cuda.torus.depth_fusion import depth_fusion_backward, depth_fusion_forward
from kernels.cuda.torus.fusion_matrix import fusion_matrix_backward, fusion_matrix_forward
from kernels.cuda.torus.torus_attention import torus_attention_backward, torus_attention_forward
from kernels.cuda.torus.torus_rope import torus_rope_backward, torus_rope_forward

OPS = (
    adamw_update,
    attention_backward,
    attention_forward,
    attention_mean,
    band_adamw_update,
    band_mask,
    band_matmul_backward,
    band_matmul_forward,
    column_sum,
    depth_fusion_backward,
    depth_fusion_forward,
    encoder_backward,
    encoder_forward,
    expert_combine_backward,
    expert_combine_forward,
    expert_gather,
    expert_matmul_backward,
    expert_matmul_forward,
    expert_plan,
    expert_scatter,
    fused_classifier,
    fused_kl,
    fused_residual_forward,
    fusion_matrix_backward,
    fusion_matrix_forward,
    gelu_backward,
    gelu_forward,
    global_norm,
    indexer_gathered_backward,
    indexer_gathered_forward,
    indexer_scores_backward,
    indexer_scores_forward,
    keep_controller_backward,
    keep_controller_forward,
    latent_attention_forward,
    layernorm_backward,
    layernorm_forward,
    mass_count,
    matmul_backward,
    matmul_forward,
    mla_absorb,
    mla_expand,
    mla_latent,
    mla_qkv_backward,
    mla_qkv_forward,
    prefix_features,
    random_scores,
    residual_forward,
    rmsnorm_backward,
    rmsnorm_forward,
    rope_backward,
    rope_forward,
    router_backward,
    router_forward,
    row_entropy,
    select_topk,
    silu_backward,
    silu_forward,
    sparse_attention_backward,
    sparse_attention_forward,
    sparse_attention_mean,
    take_columns,
    torus_attention_backward,
    torus_attention_forward,
    torus_rope_backward,
    torus_rope_forward,
    upstream_controller,
)
MEMORY = ("zeros", "to_device", "copy_in", "to_host", "to_host_later", "synchronize")


def device(runtime) -> SimpleNamespace:
    """The ops and the memory functions of kernels.cpu, on `runtime`: a Runtime or an emulator's."""

    def describe() -> str:
        used, total = runtime.memory()
        return f"{runtime.name}, {used >> 20} of {total >> 20} MiB used"

    def memory_used() -> int:
        return runtime.memory()[0]

    ops = {op.__name__: partial(op, runtime) for op in OPS}
    memory = {name: getattr(runtime, name) for name in MEMORY}
    # plain arithmetic, the same for every device
    counts = dict(band_count=band_count, band_fan_in=band_fan_in, expert_rows=expert_rows)
    controllers = dict(
        keep_controller_init=keep_controller_init,
        upstream_controller_init=upstream_controller_init,
        upstream_controller_shapes=upstream_controller_shapes,
    )  # on the host, too
    fusions = dict(FUSIONS=FUSIONS, fusion_init=fusion_init)
    torus = dict(torus_frequencies=torus_frequencies)
    own = dict(describe=describe, memory_used=memory_used, tf32=runtime.tf32)
    return SimpleNamespace(**ops, **memory, **counts, **controllers, **fusions, **torus, **own)
