"""How much of the time of an MLP's products a band saves, and from which density on: benchmarks/RESULTS.md.

    python benchmarks/band_products.py                     # all sizes; PyTorch if it is installed; a few minutes
    python benchmarks/band_products.py --channels 768 --tokens 1024 --repeats 20

FC1 and FC2 of one layer, forward and backward (six products and the biases; no GELU), both banded with the same
bandwidth. NumPy and PyTorch are processes of their own and take turns; OPENBLAS_CORETYPE and OPENBLAS_L2_SIZE are
unset. Times are medians, and so are ratios, each of two times in the same turn.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))  # so that it runs from any folder
if __name__ == "__main__":
    from llmc import startup

    startup.begin()

import time
from importlib.util import find_spec

from kernels import cpu  # before NumPy, as in the trainers  # isort: skip
import numpy as np
import turns

from kernels.cpu.band.band_mask import band_count
from kernels.cpu.band.band_matmul import best_channels
from llmc.cli import ArgumentParser, positive_int
from llmc.errors import UserError, run

CHANNELS, TOKENS = (128, 512, 768, 1024), (256, 1024, 4096)
WIDTHS = (64, 128, 256, 512, 1024, 2048)
WARM_UP, RUNS = 1, 3  # turns that do not count; runs in a turn, as the layers of a step follow one another
DENSE, MASKED = 0, -1  # instead of a bandwidth


def our_mlp(C: int, N: int):
    """A function of the bandwidth that runs both layers forward and backward by kernels/cpu."""
    rng = np.random.default_rng(1)
    x, dy = (rng.standard_normal((N, C), np.float32) for _ in range(2))
    h, dh, y, dx = (np.empty((N, size), np.float32) for size in (4 * C, 4 * C, C, C))
    weights = [0.02 * rng.standard_normal(shape, np.float32) for shape in ((4 * C, C), (C, 4 * C))]
    biases = [np.zeros(size, np.float32) for size in (4 * C, C)]
    grads, dbiases = [np.zeros_like(weight) for weight in weights], [np.zeros_like(bias) for bias in biases]
    banded = {}

    def step(bandwidth: int):
        if bandwidth not in banded:
            banded[bandwidth] = [weight.copy() for weight in weights]
            for weight in banded[bandwidth] if bandwidth else ():
                cpu.band_mask(weight[None], bandwidth)
            for grad in grads:
                grad.fill(0)
        w1, w2 = banded[bandwidth]
        started = time.perf_counter()
        cpu.band_matmul_forward(h, x, w1, biases[0], bandwidth)
        cpu.band_matmul_forward(y, h, w2, biases[1], bandwidth)
        cpu.band_matmul_backward(dh, grads[1], dbiases[1], dy, h, w2, bandwidth)
        cpu.band_matmul_backward(dx, grads[0], dbiases[0], dh, x, w1, bandwidth)
        return time.perf_counter() - started

    return step


def torch_mlp(C: int, N: int):
    """The same in PyTorch, dense, or with weights multiplied by a mask as one would write it there."""
    import torch
    import torch.nn.functional as F

    x = torch.randn(N, C, requires_grad=True)
    dy = torch.randn(N, C)
    layers = [(torch.randn(4 * C, C) * 0.02, torch.zeros(4 * C)), (torch.randn(C, 4 * C) * 0.02, torch.zeros(C))]
    parameters = [tensor.requires_grad_() for layer in layers for tensor in layer]
    masks = [np.ones((1, *weight.shape), np.float32) for weight, _ in layers]
    for mask in masks:
        cpu.band_mask(mask, 256)
    masks = [torch.from_numpy(mask[0]) for mask in masks]

    def step(bandwidth: int):
        started = time.perf_counter()
        h = x
        for (weight, bias), mask in zip(layers, masks):
            h = F.linear(h, weight * mask if bandwidth == MASKED else weight, bias)
        h.backward(dy)
        elapsed = time.perf_counter() - started
        for tensor in (x, *parameters):
            tensor.grad = None
        return elapsed

    return step


def work(program: str) -> None:
    """A worker: runs the MLP "C N bandwidth" of each line and prints its milliseconds."""
    size, step = None, None
    for line in sys.stdin:
        C, N, bandwidth = map(int, line.split())
        if size != (C, N):
            size, step = (C, N), (torch_mlp if program == "torch" else our_mlp)(C, N)
        print(sorted(step(bandwidth) for _ in range(RUNS))[RUNS // 2] * 1e3, flush=True)


def measure(workers: dict, C: int, N: int, widths: list[int], repeats: int) -> dict[tuple[str, int], np.ndarray]:
    """Milliseconds of each turn by (program, bandwidth), all taking turns."""
    runs = [("ours", width) for width in (DENSE, *widths)]
    runs += [("torch", kind) for kind in (DENSE, MASKED) if "torch" in workers]
    times = {run: [] for run in runs}
    for _ in range(WARM_UP + repeats):
        for program, width in runs:
            times[program, width] += turns.turn(workers[program], f"{C} {N} {width}")
    return {run: np.array(values[WARM_UP:]) for run, values in times.items()}


def as_fast(ms: dict[tuple[str, int], np.ndarray], run: tuple[str, int]) -> float:
    """How many times as fast as our dense layers: the median of the ratios in each turn."""
    return float(np.median(ms["ours", DENSE] / ms[run]))


def rows_of_size(C: int, N: int, ms: dict[tuple[str, int], np.ndarray]) -> list[str]:
    """The table's rows for a size."""
    rows = []
    for program, width in ms:
        if program == "torch":
            name = "PyTorch, weight * mask" if width == MASKED else "PyTorch, dense"
            density, how = "", ""
        elif width == DENSE:
            name, density, how = "dense", "100.0%", ""
        else:
            kept = band_count(4 * C, C, width) / (4 * C * C)
            channels = best_channels(4 * C, C, width, N)
            name, density, how = f"w = {width}", f"{kept:.1%}", f"{channels} channels" if channels else "whole"
            how = f"{how}, ideal {1 / kept:.1f} x"
        time_ms, ratio = np.median(ms[program, width]), as_fast(ms, (program, width))
        rows.append(f"| {C} | {N} | {name} | {density} | {how} | {time_ms:.2f} | {ratio:.2f} x |")
    return rows


def crossover(C: int, N: int, ms: dict[tuple[str, int], np.ndarray]) -> str:
    """The densest band that was at least 3% faster than dense."""
    faster = [run[1] for run in ms if run[0] == "ours" and as_fast(ms, run) > 1.03]
    if not faster:
        return f"| {C} | {N} | none measured |"
    return f"| {C} | {N} | {band_count(4 * C, C, max(faster)) / (4 * C * C):.1%} (w = {max(faster)}) |"


def main() -> int:
    parser = ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--channels", default=",".join(map(str, CHANNELS)), help="sizes C")
    add("--tokens", default=",".join(map(str, TOKENS)), help="rows B*T")
    add("--repeats", type=positive_int, default=9, help="turns that count")
    add("--worker", choices=("ours", "torch"), help="used by the program itself")
    args = parser.parse()
    if args.worker:
        work(args.worker)
        return 0
    try:
        sizes = [(int(C), int(N)) for C in args.channels.split(",") for N in args.tokens.split(",")]
    except ValueError:
        raise UserError("--channels and --tokens: expected numbers like 128,768", None, 2) from None
    programs = ["ours", *(["torch"] if find_spec("torch") else [])]
    workers = {program: turns.start(__file__, "--worker", program) for program in programs}
    lines = ["| C | B*T | | density | blocks | ms | as fast as our dense |", "|---|---|---|---:|---|---:|---:|"]
    print("\n".join(lines))
    crossovers = []
    for C, N in sizes:
        ms = measure(workers, C, N, [width for width in WIDTHS if width < 8 * C - 2], args.repeats)
        rows = rows_of_size(C, N, ms)
        print("\n".join(rows), flush=True)
        lines += rows
        crossovers.append(crossover(C, N, ms))
    turns.stop(workers.values())
    text = f"{turns.machine()}; medians of {args.repeats} turns.\n\n"
    text += "\n".join(lines) + "\n\n| C | B*T | densest band at least 3% faster than dense |\n|---|---|---|\n"
    text += "\n".join(crossovers) + "\n"
    if sizes == [(C, N) for C in CHANNELS for N in TOKENS]:
        turns.write_section("MLP products, banded and dense: make bench_band", text)
    print(f"\n{text.partition(chr(10))[0]}\n" + "\n".join(crossovers))
    return 0


if __name__ == "__main__":
    run(main)
