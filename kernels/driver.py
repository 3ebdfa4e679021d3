"""What the NVIDIA driver says, before anything large is imported: no GPU, no time lost."""

import ctypes
import os
import sys

LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
CUDA_ERROR_NO_DEVICE = 100  # cuda.h, as the two functions


class NoDevice(RuntimeError):
    """There is no GPU to run on. The message is the reason, in one line."""


class NoDriver(NoDevice):
    """An ordinary machine, without an NVIDIA driver."""


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
