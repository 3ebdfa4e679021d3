"""Ops for GPT-2 training: kernels.cpu is NumPy. A device is a namespace of ops and of zeros, to_device, to_host.

Import this before NumPy: it sets how long the threads of OpenBLAS spin when they have nothing to do.
"""

import os

from llmc.errors import UserError

# 2^10 cycles instead of 2^26. while they spin they hold a core that the elementwise ops need: measured on 2 cores,
# AdamW 24 -> 13 ms and classifier 20 -> 10 ms of a 7.3M parameter step
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "10")


def open_device(name: str = "auto"):
    """The device "cpu", or the best there is for "auto". Raises UserError for a device that this version lacks."""
    if name not in ("auto", "cpu"):
        raise UserError(f"--device {name}: not in this version, which runs on the CPU", "--device cpu")
    from kernels import cpu

    return cpu
