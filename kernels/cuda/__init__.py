"""A GPU, a Device: every op as CUDA kernels, bound to a runtime.

kernels.cpu is the readable reference. A launcher, <op>.py, computes a grid and launches; the mathematics is in <op>.cu.
"""

from functools import partial
from types import SimpleNamespace

from kernels.device import Device, ops_on_shelves

MEMORY = ("zeros", "to_device", "copy_in", "to_host", "to_host_later", "synchronize", "capture")
OPS = ops_on_shelves("cuda")


def device(runtime, graph: str = "0", communicator=None) -> Device:
    """The Device that `runtime` is, a Runtime or an emulator's; graph: see Device.

    communicator: of several processes with a GPU each, this one's (runtime/nccl.py).
    """

    def describe() -> str:
        used, total = runtime.memory()
        return f"{runtime.name}, {used >> 20} of {total >> 20} MiB used"

    def memory_used() -> int:
        return runtime.memory()[0]

    def all_reduce(array, ranks) -> None:
        if ranks.size > 1:
            communicator.add_up(array, ranks)

    def all_reduce_begin(array, views, ranks) -> None:
        if ranks.size > 1:
            runtime.outside_graphs(lambda: communicator.begin(array, views, ranks))

    def all_gather(array, ranks) -> None:
        if ranks.size > 1 and ranks.zero:
            communicator.share_parts(array, ranks)

    ops = {name: partial(op, runtime) for name, op in OPS.items()}
    memory = {name: getattr(runtime, name) for name in MEMORY}
    own = dict(describe=describe, memory_used=memory_used, tf32=runtime.tf32, graph=graph)
    among_ranks = dict(all_reduce=all_reduce, all_reduce_begin=all_reduce_begin, all_gather=all_gather)
    return SimpleNamespace(**ops, **memory, **own, **among_ranks)
