"""Every op in NumPy, under its one name, and what a trainer needs of a device. The readable reference, and fast."""

from collections.abc import Callable

import numpy as np

from kernels.cpu.adamw import adamw_update, band_adamw_update
from kernels.cpu.attention import attention_backward, attention_forward
from kernels.cpu.band_mask import band_count, band_fan_in, band_mask
from kernels.cpu.band_matmul import band_matmul_backward, band_matmul_forward
from kernels.cpu.blocks import num_threads
from kernels.cpu.column_sum import column_sum
from kernels.cpu.encoder import encoder_backward, encoder_forward
from kernels.cpu.fused_classifier import fused_classifier
from kernels.cpu.gelu import gelu_backward, gelu_forward
from kernels.cpu.global_norm import global_norm
from kernels.cpu.layernorm import fused_residual_forward, layernorm_backward, layernorm_forward
from kernels.cpu.matmul import matmul_backward, matmul_forward
from kernels.cpu.residual import residual_forward
from kernels.cpu.take_columns import take_columns

__all__ = [
    "adamw_update",
    "attention_backward",
    "attention_forward",
    "band_adamw_update",
    "band_count",
    "band_fan_in",
    "band_mask",
    "band_matmul_backward",
    "band_matmul_forward",
    "column_sum",
    "copy_in",
    "describe",
    "encoder_backward",
    "encoder_forward",
    "fused_classifier",
    "fused_residual_forward",
    "gelu_backward",
    "gelu_forward",
    "global_norm",
    "layernorm_backward",
    "layernorm_forward",
    "matmul_backward",
    "matmul_forward",
    "residual_forward",
    "synchronize",
    "take_columns",
    "tf32",
    "to_device",
    "to_host",
    "to_host_later",
    "zeros",
]

tf32 = False  # products never round their operands


def describe() -> str:
    """What the parameter table shows as the device."""
    return f"CPU, NumPy {np.__version__}, {num_threads()} threads"


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
