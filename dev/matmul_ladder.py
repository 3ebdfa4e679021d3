"""Three handwritten kernels for a fully connected layer, from one thread an output to tiles in registers.

    python dev/matmul_ladder.py                    # each against NumPy: on a GPU, else on the emulator of the tests
    python dev/matmul_ladder.py -n 2048            # on a GPU: 2048 rows in place of 4096, and how long each takes

The kernels, and why each is faster than the one before, are in dev/matmul_ladder.cu. cuBLAS comes last, for comparison.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))  # so that it runs from any folder
if __name__ == "__main__":
    from llmc import startup

    startup.begin()

import time
from pathlib import Path

from kernels import cuda  # before NumPy, as in the trainers  # isort: skip
import numpy as np

from kernels.cuda.runtime import source
from kernels.cuda.runtime.grid import THREADS, ceil_div
from kernels.cuda.runtime.runtime import Runtime
from kernels.driver import NoDevice
from llmc.cli import ArgumentParser, positive_int
from llmc.errors import run

FOLDER = Path(__file__).parent
FOLDERS = (source.FOLDER, FOLDER)  # where the .cu files are
# version: kernel, side of a block's tile of outputs, threads of a block
LADDER = {
    1: ("matmul_forward_kernel1", 16, THREADS),
    2: ("matmul_forward_kernel2", 32, 1024),
    3: ("matmul_forward_kernel3", 128, THREADS),
}
SHAPES = ((1, 1, 1), (33, 20, 50), (130, 37, 131), (128, 64, 256))  # N, C, OC of the check
TOL = 1e-5  # float32 against float64, relative to the largest output
C, OC = 768, 3072  # GPT-2 124M's FC1, for the times
WARM_UP, RUNS = 3, 20


def matmul_forward(runtime, version: int, out, inp, weight, bias) -> None:
    """out (N,OC) from inp (N,C), weight (OC,C), bias (OC), by a version of LADDER."""
    kernel, side, threads = LADDER[version]
    (N, C), OC = inp.shape, len(weight)
    grid = (ceil_div(OC, side), ceil_div(N, side))
    runtime.launch(kernel, grid, threads, (out, inp, weight, bias, N, C, OC))


def error_of(runtime, version: int, N: int, C: int, OC: int) -> float:
    """The largest deviation from NumPy in float64, relative to the largest output."""
    rng = np.random.default_rng([N, C, OC])
    inp, weight, bias = (rng.standard_normal(shape).astype(np.float32) for shape in ((N, C), (OC, C), OC))
    expected = inp.astype(np.float64) @ weight.T.astype(np.float64) + bias
    out = runtime.to_device(np.full((N, OC), np.nan, np.float32))
    matmul_forward(runtime, version, out, *map(runtime.to_device, (inp, weight, bias)))
    return float(np.abs(runtime.to_host(out) - expected).max() / np.abs(expected).max())


def milliseconds(runtime, work) -> float:
    """The time of one call of `work`, on average over RUNS of them in a row."""
    for _ in range(WARM_UP):
        work()
    runtime.synchronize()
    started = time.perf_counter()
    for _ in range(RUNS):
        work()
    runtime.synchronize()
    return 1000 * (time.perf_counter() - started) / RUNS


def print_times(runtime, N: int) -> None:
    """A line for each version and for cuBLAS."""
    out, inp, weight, bias = (runtime.zeros(shape) for shape in ((N, OC), (N, C), (OC, C), OC))
    works = {f"v{version}": version for version in LADDER}
    times = {
        name: milliseconds(runtime, lambda version=version: matmul_forward(runtime, version, out, inp, weight, bias))
        for name, version in works.items()
    }
    ops = cuda.device(runtime)
    times["cuBLAS"] = milliseconds(runtime, lambda: ops.matmul_forward(out, inp, weight, bias))
    print(f"N={N} C={C} OC={OC}, float32, mean of {RUNS} runs")
    for name, time_of_one in times.items():
        print(f"{name:6} {time_of_one:8.3f} ms  {2e-9 * N * C * OC / time_of_one:6.2f} TFLOP/s")


def open_runtime():
    """(the GPU, True) if there is one that works, else (the emulator, False)."""
    try:
        return Runtime(folders=FOLDERS), True
    except NoDevice as reason:
        print(f"no GPU, so the emulator, without times: {reason}", file=sys.stderr)
    sys.path.insert(0, str(FOLDER.parent / "tests"))
    from cuda_emulator.runtime import EmulatedRuntime

    return EmulatedRuntime("check", folders=FOLDERS), False


def main(argv: list[str] | None = None) -> int:
    parser = ArgumentParser(prog="python dev/matmul_ladder.py", description=__doc__)
    parser.add_argument("-n", "--rows", type=positive_int, default=4096, help="rows of the input when it is timed")
    args = parser.parse(argv)
    runtime, is_gpu = open_runtime()
    print(f"on {runtime.name}")
    wrong = 0
    for version, (kernel, *_) in LADDER.items():
        error = max(error_of(runtime, version, *shape) for shape in SHAPES)
        wrong += error > TOL
        print(f"v{version} {kernel}: {error:.1e} from NumPy{' WRONG' if error > TOL else ''}")
    if is_gpu:
        print_times(runtime, args.rows)
    return 1 if wrong else 0


if __name__ == "__main__":
    run(main)
