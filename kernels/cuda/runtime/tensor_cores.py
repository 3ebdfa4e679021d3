"""Which GPUs take the kernels for tensor cores: those where they are worth it, once they computed what NumPy does.

A run tries such kernels itself before it relies on them, on any card: what they compute in a small case is compared
with NumPy's float64. Where it differs, the run says so and takes the kernels for CUDA cores.
"""

import sys
from collections.abc import Callable, Iterator
from weakref import WeakKeyDictionary

import numpy as np

from kernels.cuda.runtime.runtime import AMPERE, CudaError, one_line

# compute capabilities whose tensor cores do TF32 at more than three times the rate of FMAs, A100, H100, B200: NVIDIA's
# data sheets. Of others it is once (RTX 30, 40, 50) or twice (L4, L40S), so that three products would take longer
FAST_TF32 = {(8, 0), (9, 0), (10, 0), (10, 3)}
# with TF32 or without, the largest error of a right result, relative to its largest value: operands in TF32 are off by
# up to 2^-11; without it sums differ in float32's last bits, and a product that had rounded its operands is found out
MOST = {True: 3e-3, False: 2e-5}

# what a trial yields: the name of a result, what the kernels computed, what is right in float64
Results = Iterator[tuple[str, np.ndarray, np.ndarray]]

_passed: WeakKeyDictionary = WeakKeyDictionary()  # runtime -> {trial and its sizes: whether it was passed}


def product_trial(cuda) -> Results:
    """A product of mma.cuh, in many tiles the last of which is not full."""
    K, rng = 60, np.random.default_rng(0)
    a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((16, K), (K, 8)))
    out, kind = cuda.zeros((16, 8)), "tf32" if cuda.tf32 else "3xtf32"
    cuda.launch(f"mma_trial_{kind}_kernel", 1, 32, (out, cuda.to_device(a), cuda.to_device(b), K))
    yield "a product", cuda.to_host(out), a.astype(np.float64) @ b


def worth_it(cuda) -> bool:
    """Whether tensor cores would be faster: with TF32 wherever there is TF32, else where 3xTF32 is faster as well."""
    return cuda.capability >= AMPERE if cuda.tf32 else cuda.capability in FAST_TF32


def takes_tensor_cores(cuda, trial: Callable[..., Results] = product_trial, *sizes: int) -> bool:
    """Whether launchers take kernels for tensor cores: where they are worth it, if they pass trial(cuda, *sizes).

    The trial is made once for a runtime, at the first call, which waits for the GPU; on stderr if it was not passed.
    """
    if not worth_it(cuda):
        return False
    passed, key = _passed.setdefault(cuda, {}), (trial, sizes)
    if key not in passed:
        problem = _problem(cuda, trial(cuda, *sizes))
        passed[key] = not problem
        if problem:
            print(f"{problem}: its work is done without them, slower", file=sys.stderr)
    return passed[key]


def _problem(cuda, results: Results) -> str:
    """What is wrong with the results of a trial; empty if nothing is."""
    most, where = MOST[cuda.tf32], f"tensor cores of {cuda.name} are not used"
    try:
        for name, found, expected in results:
            error = np.abs(found - expected).max() / np.abs(expected).max()
            if not error <= most:  # NaN is wrong, too
                return f"{where}, {name} is off by {error:.1e}, expected at most {most:.0e}"
    except CudaError as error:
        return f"{where}, {one_line(error)}"
    return ""
