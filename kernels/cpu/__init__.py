"""The CPU, a Device: every op in NumPy, the readable reference, and fast."""

import os
import sys
from collections.abc import Callable

import numpy as np

from kernels.cpu.blocks import num_threads
from kernels.device import NAMES, ops_on_shelves

globals().update(ops_on_shelves("cpu"))
__all__ = NAMES

tf32 = False  # products never round their operands
graph = "0"  # nothing to gain: an op is called, not launched


def describe() -> str:
    """The device's name in the parameter table."""
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
    """A function that gives `array` in NumPy; the device meanwhile goes on. Here it gives the array itself."""
    return lambda: array


def synchronize() -> None:
    """Wait until the device has done all it was told to; here it has."""


def capture(work: Callable[[], None]) -> Callable[[], None]:
    """A function that does what work() tells the device to do; here work itself."""
    return work


def all_reduce(array: np.ndarray, ranks) -> None:
    """array (n) float32 becomes its sum over all processes of `ranks` (llmc.ranks.Ranks), by MPI."""
    ranks.add_up(array)


def all_reduce_begin(array: np.ndarray, views: list[np.ndarray], ranks) -> None:
    """all_reduce of these views of the array may begin: not here, where a sum takes the cores from what goes on."""


def all_gather(array: np.ndarray, ranks) -> None:
    """With ZeRO each process of `ranks` has a part of array (n) float32: now all have all of it, by MPI."""
    ranks.share(array)
