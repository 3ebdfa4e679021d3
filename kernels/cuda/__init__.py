"""Every op as CUDA kernels under its one name, bound to a runtime: the device that trainers get for a GPU.

kernels.cpu is the readable reference. A launcher, <op>.py, computes a grid and launches; the mathematics is in <op>.cu.
"""

from functools import partial
from types import SimpleNamespace

from kernels.cpu.band_mask import band_count, band_fan_in
from kernels.cuda.adamw import adamw_update, band_adamw_update
from kernels.cuda.attention import attention_backward, attention_forward
from kernels.cuda.band_mask import band_mask
from kernels.cuda.band_matmul import band_matmul_backward, band_matmul_forward
from kernels.cuda.column_sum import column_sum
from kernels.cuda.encoder import encoder_backward, encoder_forward
from kernels.cuda.fused_classifier import fused_classifier
from kernels.cuda.gelu import gelu_backward, gelu_forward
from kernels.cuda.global_norm import global_norm
from kernels.cuda.layernorm import fused_residual_forward, layernorm_backward, layernorm_forward
from kernels.cuda.matmul import matmul_backward, matmul_forward
from kernels.cuda.residual import residual_forward
from kernels.cuda.take_columns import take_columns

OPS = (
    adamw_update,
    attention_backward,
    attention_forward,
    band_adamw_update,
    band_mask,
    band_matmul_backward,
    band_matmul_forward,
    column_sum,
    encoder_backward,
    encoder_forward,
    fused_classifier,
    fused_residual_forward,
    gelu_backward,
    gelu_forward,
    global_norm,
    layernorm_backward,
    layernorm_forward,
    matmul_backward,
    matmul_forward,
    residual_forward,
    take_columns,
)
MEMORY = ("zeros", "to_device", "copy_in", "to_host", "to_host_later", "synchronize")


def device(runtime) -> SimpleNamespace:
    """The ops and the memory functions of kernels.cpu, on `runtime`: kernels.cuda.runtime.Runtime or an emulator's."""

    def describe() -> str:
        used, total = runtime.memory()
        return f"{runtime.name}, {used >> 20} of {total >> 20} MiB used"

    ops = {op.__name__: partial(op, runtime) for op in OPS}
    memory = {name: getattr(runtime, name) for name in MEMORY}
    counts = dict(band_count=band_count, band_fan_in=band_fan_in)  # plain arithmetic, the same for every device
    return SimpleNamespace(**ops, **memory, **counts, describe=describe, tf32=runtime.tf32)
