"""Ops for GPT-2 training: kernels.cpu is NumPy, kernels.cuda handwritten CUDA. Device lists what both can do.

Import this before NumPy: kernels/threads.py tells OpenBLAS about its threads.
"""

import sys

from kernels import threads  # noqa: F401  # before NumPy, which comes with the next line  # isort: skip
from kernels.device import Device
from llmc.errors import UserError


def open_device(name: str = "auto", tf32: bool = False, graph: str = "auto", ranks=None) -> Device:
    """The device "cpu" or "cuda"; "auto" is the GPU if there is one that works, else the CPU.

    ranks: the processes that train together, a GPU each (llmc.ranks.Ranks). All of them have one, or all run on the CPU
    or end with the same error; NCCL is told of them before this returns.

    tf32: the GPU may round the operands of matrix products to TF32. graph: whether a model's calls become CUDA graphs
    (kernels/graph.py): "auto" where they can, "1" or it is an error, "0" never. Raises UserError if "cuda" cannot be
    had, or graphs. Tells on stderr why "auto" is the CPU, though not on a machine without an NVIDIA driver, and if tf32
    has no effect.
    """
    from kernels import cpu

    device = cpu if name == "cpu" else _open_cuda(tf32, graph, name == "cuda", ranks) or cpu
    if tf32 and not device.tf32:
        print(f"--tf32 1 has no effect: no TF32 on {device.describe()}", file=sys.stderr)
    if graph == "1" and device is cpu:
        raise UserError(f"--graph 1: there are no CUDA graphs on {device.describe()}", "--graph auto, or a GPU")
    return device


def _open_cuda(tf32: bool, graph: str, needed: bool, ranks) -> Device | None:
    """The GPU, or None; of several ranks all have one or none has. Raises UserError if it is `needed`."""
    from kernels.driver import NoDevice, NoDriver, check_driver, why_none

    several = ranks is not None and ranks.size > 1
    try:
        check_driver()  # first: a machine without a GPU need not even import what drives one
        from kernels.cuda.runtime import nccl
        from kernels.cuda.runtime.runtime import Runtime

        runtime = Runtime(tf32, local_rank=ranks.local_rank if several else 0)
        if several:
            nccl.import_nccl()
        found = runtime.place
    except NoDevice as error:
        found = error
    # told by MPI, before NCCL, in which one rank would wait for the others for ever
    reason = why_none(ranks.gather(found) if several else [found])
    if reason is None:
        from kernels.cuda import device

        return device(runtime, graph, nccl.Communicator(runtime, ranks) if several else None)
    if needed:
        raise UserError(f"--device cuda: {reason}", reason.hint)
    if not isinstance(reason, NoDriver):
        print(f"running on the CPU: {reason}; --device cuda says what helps", file=sys.stderr)
    return None
