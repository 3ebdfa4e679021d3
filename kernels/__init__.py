"""Ops for GPT-2 training: kernels.cpu is NumPy. A device is a namespace of ops and of zeros, to_device, to_host.

Import this before NumPy: it sets how long the threads of OpenBLAS spin when they have nothing to do.
"""

import os

from llmc.errors import UserError

# 2^20 cycles, 0.3 ms, instead of 2^26. longer, and they hold a core that the elementwise ops want: in a step of 7.3M
# parameters on 2 cores AdamW takes 13 ms instead of 24, the classifier 10 instead of 20. shorter, and every product has
# to wake them
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "20")


def open_device(name: str = "auto"):
    """The device "cpu", or the best there is for "auto". Raises UserError for a device that this version lacks."""
    if name not in ("auto", "cpu"):
        raise UserError(f"--device {name}: not in this version, which runs on the CPU", "--device cpu")
    from kernels import cpu

    return cpu
