"""What the NVIDIA driver says, before anything large is imported: no GPU, no time lost."""

import ctypes
import os
import sys
from dataclasses import dataclass, field

LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
CUDA_ERROR_NO_DEVICE = 100  # cuda.h, as the two functions
HINT = 'pip install "cupy-cuda12x[ctk]" on a machine with an NVIDIA GPU, or --device cpu'


class NoDevice(RuntimeError):
    """There is no GPU to run on. The message is the reason, in one line; `hint` is what helps."""

    def __init__(self, reason: str, hint: str = HINT):
        super().__init__(reason)
        self.hint = hint


class NoDriver(NoDevice):
    """An ordinary machine, without an NVIDIA driver."""


@dataclass(frozen=True)
class Place:
    """Where a process has its GPU: the machine, the address on its bus, and how many GPUs the process sees."""

    machine: str
    bus: str
    visible: int = field(compare=False)


def check_driver() -> None:
    """Raise NoDriver if there is no driver, NoDevice if it shows no GPU or does not start."""
    try:
        driver = ctypes.CDLL(LIBRARY)
    except OSError:
        raise NoDriver("no NVIDIA driver") from None
    count = ctypes.c_int()
    code = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    if code == CUDA_ERROR_NO_DEVICE or (code == 0 and count.value == 0):
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        where = "" if hidden is None else f", CUDA_VISIBLE_DEVICES is {hidden!r}"
        raise NoDevice(f"the NVIDIA driver shows no GPU{where}")
    if code:
        raise NoDevice(f"the NVIDIA driver does not start, CUDA error {code}; nvidia-smi may say why")


def why_none(found: list[NoDevice | Place]) -> NoDevice | None:
    """Why the processes that train together, by rank, have no GPU each, which is the same for all; None if they have.

    found: what each of them found. Two on one GPU are refused by NCCL, with "Duplicate GPU detected".
    """
    reasons = [one for one in found if isinstance(one, NoDevice)]
    if len(reasons) == len(found):  # what an ordinary machine lacks is the last thing to tell
        return min(reasons, key=lambda reason: isinstance(reason, NoDriver))
    for rank, one in enumerate(found):
        if isinstance(one, NoDevice):
            return NoDevice(f"rank {rank} of {len(found)}: {one}", one.hint)
        first = found.index(one)
        if first < rank:
            shared = f"ranks {first} and {rank} have the same GPU, {one.bus} of {one.machine}, of {one.visible} visible"
            return NoDevice(shared, f"one process a GPU: mpiexec -n {len(set(found))}, or --device cpu")
    return None
