"""The published controller runs on the host: see kernels/cpu/sparse/upstream_controller.py."""

import numpy as np

from kernels.cpu.sparse.upstream_controller import upstream_controller as on_host


def upstream_controller(cuda, keep, x, params, maxpos=2048):
    """As kernels.cpu.sparse.upstream_controller, which runs it: waits for the GPU, copies x and params to the host."""
    chosen = np.empty(keep.shape, np.int32)
    on_host(chosen, cuda.to_host(x), cuda.to_host(params), maxpos)
    cuda.copy_in(keep, chosen)
