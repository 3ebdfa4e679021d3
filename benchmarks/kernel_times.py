"""What each kernel of a training step takes on a GPU, by CUDA events around every launch and product.

A launch takes the host longer than a small kernel takes the GPU, and the time between two events would hold the wait.
So the GPU is first given a pause, in which the host gets ahead of it. What CuPy does itself is not seen: fills, copies.
"""

from collections import defaultdict
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from kernels.cuda.runtime import roofline
from llmc.checkpoint import GPT2Config, num_parameters
from llmc.mfu import promised

PAUSE = """extern "C" __global__ void pause_kernel(long long cycles) {
    const long long began = clock64();
    while (clock64() - began < cycles) {}
}
"""
CYCLES = 60_000_000  # some 35 ms: what a step's launches take the host
PRODUCTS = "cuBLAS"
# GB/s, float32 and TF32 TFLOP/s: the roofline's, and the H200's from its data sheet
RATES = {
    "NVIDIA A100-SXM4-80GB": roofline.GPUS["A100"],
    "NVIDIA H100 80GB HBM3": roofline.GPUS["H100"],
    "NVIDIA GeForce RTX 4090": roofline.GPUS["RTX 4090"],
    "NVIDIA H200": (4800, *roofline.GPUS["H100"][1:]),
}
# the (M, N, K, beta) of our own dense products, from their kernels' arguments
OWN_PRODUCTS = {
    "matmul_forward_3xtf32_kernel": lambda out, inp, weight, bias, has_bias, N, C, OC: (N, OC, C, 0),
    "matmul_dinp_3xtf32_kernel": lambda dinp, dout, weight, N, C, OC: (N, C, OC, 0),
    "matmul_dweight_3xtf32_kernel": lambda dweight, parts, dout, inp, N, C, OC, rows, beta: (OC, C, N, beta),
}
# calls a step of kernels that a dense GPT-2 has none of, band_matmul's two a layer; all others are called once a layer
CALLS = {"band_adamw_kernel": "2", "band_mask_kernel": "2"}


class Spent(NamedTuple):
    """Of one kernel, in a step: milliseconds, launches, and of products the (M, N, K, beta) of each."""

    ms: float
    launches: int
    shapes: tuple = ()


class Stopwatch:
    """While it is open, a runtime's launches and products are between two events each.

    event: makes one, with record(); elapsed(start, stop): milliseconds between two, once the GPU is through.
    """

    def __init__(self, runtime, event: Callable, elapsed: Callable):
        self.runtime, self.event, self.elapsed, self.records = runtime, event, elapsed, []

    def __enter__(self):
        launch, gemm = self.runtime.launch, self.runtime.gemm

        def timed_launch(kernel, grid, block, args, **options):
            shape = OWN_PRODUCTS[kernel](*args) if kernel in OWN_PRODUCTS else None
            return self.between(kernel, shape, lambda: launch(kernel, grid, block, args, **options))

        def timed_gemm(out, a, b, transa=False, transb=False, beta=0.0, **more):
            M, N = out.shape
            shape = M, N, a.shape[0] if transa else a.shape[1], beta
            return self.between(PRODUCTS, shape, lambda: gemm(out, a, b, transa, transb, beta, **more))

        self.runtime.launch, self.runtime.gemm = timed_launch, timed_gemm
        return self

    def __exit__(self, *_):
        del self.runtime.launch, self.runtime.gemm  # the class's own again

    def between(self, name: str, shape: tuple | None, work: Callable):
        start, stop = self.event(), self.event()
        start.record()
        result = work()
        stop.record()
        self.records.append((name, shape, start, stop))
        return result

    def spent(self, steps: int) -> dict[str, Spent]:
        """What each kernel took in one of `steps` equal steps, the longest first."""
        ms, shapes = defaultdict(float), defaultdict(list)
        for name, shape, start, stop in self.records:
            ms[name] += self.elapsed(start, stop) / steps
            shapes[name].append(shape)
        names = sorted(ms, key=ms.get, reverse=True)
        once = {name: shapes[name][: len(shapes[name]) // steps] for name in names}
        return {name: Spent(ms[name], len(once[name]), tuple(filter(None, once[name]))) for name in names}


def measure(runtime, step: Callable, steps: int = 5) -> dict[str, Spent]:
    """The kernels of step(pause), which calls pause() wherever it has waited for the GPU; after 4 that do not count."""
    import cupy

    pause_kernel = cupy.RawModule(code=PAUSE, options=("--std=c++17",)).get_function("pause_kernel")

    def pause():
        runtime.synchronize()
        pause_kernel((1,), (1,), (np.int64(CYCLES),))

    for _ in range(4):
        step(lambda: None)
    with Stopwatch(runtime, cupy.cuda.Event, cupy.cuda.get_elapsed_time) as stopwatch:
        for _ in range(steps):
            step(pause)
        runtime.synchronize()
        return stopwatch.spent(steps)


# ----------------------------------------------------------------------------------------------------------------------
# bounds


def names_of(config: GPT2Config, B: int, T: int, k: int, depth: int, w: int) -> dict:
    """The sizes in the roofline's expressions; w: the width of both bands, 0 if there is none."""
    names = roofline.sizes(B, T, config.C, config.L, config.NH, config.V, config.Vp, w or 256)
    banded = 8 * config.L * config.C**2 if w else 0  # adamw_kernel does not see these
    return names | dict(P=num_parameters(config) - banded, k=k, Dp=depth)


def bound(kernel: str, spent: Spent, names: dict, card: str, tf32: bool) -> float | None:
    """The milliseconds below which a step's calls of a kernel cannot come, by the roofline; None if unknown.

    Of products by their own shapes; of kernels that work in blocks of rows, of whole layers.
    """
    if card not in RATES:
        return None
    gigabytes, teraflops, tensor = RATES[card]
    if kernel == PRODUCTS or kernel in OWN_PRODUCTS:
        peak = promised(card, tf32) if kernel == PRODUCTS else 1e12 * tensor / 3
        work = [(4 * (M * K + K * N + M * N * (2 if beta else 1)), 2 * M * N * K) for M, N, K, beta in spent.shapes]
        return sum(1e3 * max(nbytes / (1e9 * gigabytes), flop / peak) for nbytes, flop in work)
    kernel = kernel.replace("_128_", "_64_").replace("_wide_", "_").replace("_placed_", "_")
    total = 0.0
    for row in roofline.ROWS_OF_TABLE:
        if row.kernel.partition(" ")[0] == kernel:
            often = "2*L" if kernel.startswith("band_matmul") else CALLS.get(kernel, "L")
            text = often if row.calls == "0" else row.calls
            must, flop, calls = (eval(each, {"__builtins__": {}}, names) for each in (row.must, row.flop, text))
            rate = tensor / row.tensor if row.tensor else teraflops
            total += calls * max(4e-6 * must / gigabytes, 1e-9 * flop / rate)
    return total or None


def table(kernels: dict[str, Spent], names: dict, card: str, tf32: bool, most: int = 16) -> str:
    """A Markdown table: a row for each of the `most` longest, one for the others."""
    total = sum(spent.ms for spent in kernels.values())
    lines = ["| kernel | ms a step | share | launches | of the bound |", "|---|---:|---:|---:|---:|"]
    for kernel, spent in list(kernels.items())[:most]:
        least = bound(kernel, spent, names, card, tf32)
        share = "" if least is None else f" {100 * least / spent.ms:.0f}%"
        name = kernel.removesuffix("_kernel")
        lines.append(f"| {name} | {spent.ms:.3f} | {100 * spent.ms / total:.1f}% | {spent.launches} |{share} |")
    rest = list(kernels.values())[most:]
    if rest:
        ms, launches = sum(spent.ms for spent in rest), sum(spent.launches for spent in rest)
        lines.append(f"| {len(rest)} others | {ms:.3f} | {100 * ms / total:.1f}% | {launches} | |")
    launches = sum(spent.launches for spent in kernels.values())
    lines.append(f"| all | {total:.3f} | 100.0% | {launches} | |")
    return "\n".join(lines)
