"""Ops for GPT-2 training: kernels.cpu is NumPy, kernels.cuda handwritten CUDA. Device lists what both can do.

Import this before NumPy: it sets how long the threads of OpenBLAS spin when they have nothing to do.
"""

import os
import sys

from llmc.errors import UserError

# 2^20 cycles, 0.3 ms, instead of 2^26. longer, and they hold a core that the elementwise ops want: in a step of 7.3M
# parameters on 2 cores AdamW takes 13 ms instead of 24, the classifier 10 instead of 20. shorter, and every product has
# to wake them
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "20")

from kernels.device import Device  # NumPy comes with it


def open_device(name: str = "auto", tf32: bool = False, graph: str = "auto") -> Device:
    """The device "cpu" or "cuda"; "auto" is the GPU if there is one that works, else the CPU.

    tf32: the GPU may round the operands of matrix products to TF32. graph: whether a model's calls become CUDA graphs
    (kernels/graph.py): "auto" where they can, "1" or it is an error, "0" never. Raises UserError if "cuda" cannot be
    had, or graphs. Tells on stderr why "auto" is the CPU, though not on a machine without an NVIDIA driver, and if tf32
    has no effect.
    """
    from kernels import cpu

    device = cpu if name == "cpu" else _open_cuda(tf32, graph, name == "cuda") or cpu
    if tf32 and not device.tf32:
        print(f"--tf32 1 has no effect: no TF32 on {device.describe()}", file=sys.stderr)
    if graph == "1" and device is cpu:
        raise UserError(f"--graph 1: there are no CUDA graphs on {device.describe()}", "--graph auto, or a GPU")
    return device


def _open_cuda(tf32: bool, graph: str, needed: bool) -> Device | None:
    """The GPU, or None. Raises UserError if it is `needed`."""
    from kernels.driver import NoDevice, NoDriver, check_driver

    try:
        check_driver()  # first: a machine without a GPU need not even import what drives one
        from kernels.cuda import device
        from kernels.cuda.runtime.runtime import Runtime

        return device(Runtime(tf32), graph)
    except NoDevice as reason:
        if needed:
            hint = 'pip install "cupy-cuda12x[ctk]" on a machine with an NVIDIA GPU, or --device cpu'
            raise UserError(f"--device cuda: {reason}", hint) from None
        if not isinstance(reason, NoDriver):
            print(f"running on the CPU: {reason}; --device cuda says what helps", file=sys.stderr)
        return None
