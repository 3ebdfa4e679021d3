"""A GPU, a Device: every op as CUDA kernels, bound to a runtime.

kernels.cpu is the readable reference. A launcher, <op>.py, computes a grid and launches; the mathematics is in <op>.cu.
"""

from functools import partial
from types import SimpleNamespace

from kernels.cpu.band.band_mask import band_count, band_fan_in
from kernels.cpu.deepseek.expert_plan import expert_rows
from kernels.cpu.sparse.keep_controller import keep_controller_init
from kernels.cpu.sparse.upstream_controller import upstream_controller_init, upstream_controller_shapes
from kernels.cpu.torus.fusion_matrix import FUSIONS, fusion_init
from kernels.cpu.torus.torus_rope import torus_frequencies
from kernels.device import Device, ops_on_shelves

MEMORY = ("zeros", "to_device", "copy_in", "to_host", "to_host_later", "synchronize")
OPS = ops_on_shelves("cuda")


def device(runtime) -> Device:
    """The Device that `runtime` is, a Runtime or an emulator's."""

    def describe() -> str:
        used, total = runtime.memory()
        return f"{runtime.name}, {used >> 20} of {total >> 20} MiB used"

    def memory_used() -> int:
        return runtime.memory()[0]

    ops = {name: partial(op, runtime) for name, op in OPS.items()}
    memory = {name: getattr(runtime, name) for name in MEMORY}
    # plain arithmetic, the same for every device
    counts = dict(band_count=band_count, band_fan_in=band_fan_in, expert_rows=expert_rows)
    controllers = dict(
        keep_controller_init=keep_controller_init,
        upstream_controller_init=upstream_controller_init,
        upstream_controller_shapes=upstream_controller_shapes,
    )  # on the host, too
    fusions = dict(FUSIONS=FUSIONS, fusion_init=fusion_init)
    torus = dict(torus_frequencies=torus_frequencies)
    own = dict(describe=describe, memory_used=memory_used, tf32=runtime.tf32)
    return SimpleNamespace(**ops, **memory, **counts, **controllers, **fusions, **torus, **own)
