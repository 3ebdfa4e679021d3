"""What the .cu files say about themselves: which kernels there are, their parameters, the text to compile.

A file is compiled after common.cuh, gemm_tile.cuh and attention_tile.cuh, whose device functions all share, and after
topk.cuh, mma.cuh, gemm_mma.cuh and attention_mma.cuh if it names them; nothing is included. Line numbers stay those of
the files.
"""

import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

FOLDER = Path(__file__).parent.parent
PRELUDE = tuple(FOLDER / "runtime" / name for name in ("common.cuh", "gemm_tile.cuh", "attention_tile.cuh"))
# for files that name them: what few need, inline PTX, and for the emulator templates that cost g++ time
NAMED = tuple(FOLDER / "runtime" / name for name in ("topk.cuh", "mma.cuh", "gemm_mma.cuh", "attention_mma.cuh"))
KERNEL = re.compile(
    r"""extern \s "C" \s __global__ \s void \s
        __launch_bounds__\( (?P<threads>\d+) (?:,\ \d+)? \) \s
        (?: DYNAMIC_SHARED\( (?P<shared>\d+) \) \s )?
        (?P<name>\w+) \( (?P<parameters>[^)]*) \)""",
    re.VERBOSE,
)
ARRAYS = {"float*": np.float32, "int*": np.int32, "double*": np.float64}
SCALARS = {"int": np.int32, "float": np.float32, "size_t": np.uint64}


class Kernel(NamedTuple):
    """A kernel as declared: its file, its launch bound (threads of a block), and parameters as (name, C type).

    shared: bytes of dynamic shared memory that it is launched with; above 48 KB a GPU wants to be told of them.
    """

    name: str
    path: Path
    threads: int
    parameters: tuple[tuple[str, str], ...]
    shared: int = 0


@cache
def kernels(folder: Path = FOLDER) -> dict[str, Kernel]:
    """All kernels of the .cu files in and below `folder`, by name.

    Every one is `extern "C" __global__ void __launch_bounds__(N) name(parameters)`, a parameter one of ARRAYS, const or
    not, with __restrict__ or not, or of SCALARS. The bound may have a second number, blocks of a multiprocessor, and
    DYNAMIC_SHARED(bytes) may follow it. Raises ValueError for another type.
    """
    found = {}
    for path in sorted(folder.rglob("*.cu")):
        for match in KERNEL.finditer(path.read_text()):
            parameters = tuple(_parameter(text, path) for text in match["parameters"].split(","))
            threads, shared = int(match["threads"]), int(match["shared"] or 0)
            found[match["name"]] = Kernel(match["name"], path, threads, parameters, shared)
    return found


def _parameter(text: str, path: Path) -> tuple[str, str]:
    """ "const float* __restrict__ inp" -> ("inp", "float*")"""
    *words, name = text.replace("*", "* ").replace("__restrict__", "").replace("const ", "").split()
    if len(words) != 1 or words[0] not in ARRAYS | SCALARS:
        raise ValueError(f"{path}: parameter {text.strip()!r} is none of {', '.join(ARRAYS | SCALARS)}")
    return name, words[0]


@cache
def text(path: Path) -> str:
    """The text to compile for the kernels of a .cu file: the prelude, then the file."""
    own = [] if path in PRELUDE else [path]
    named = [header for header in NAMED if any(header.name in each.read_text() for each in own)]
    parts = [*PRELUDE, *named, *own]
    return "".join(f'#line 1 "{part.name}"\n{part.read_text()}' for part in parts)


def arguments(kernel: Kernel, values, is_array) -> list:
    """`values` as the kernel takes them: arrays checked, Python numbers as NumPy scalars of the declared type.

    is_array tells an array of the device from other things. Raises TypeError, naming the kernel and the parameter, for
    a wrong number of values, an array of another dtype or device, or one that is not C-contiguous.
    """
    if len(values) != len(kernel.parameters):
        names = ", ".join(name for name, _ in kernel.parameters)
        raise TypeError(f"{kernel.name}: {len(values)} arguments, expected {len(kernel.parameters)}: {names}")
    converted = []
    for value, (name, ctype) in zip(values, kernel.parameters):
        where = f"{kernel.name}: {name}"
        if ctype in SCALARS:
            if (isinstance(value, float) and ctype != "float") or not isinstance(value, (int, float, np.number)):
                raise TypeError(f"{where} is {value!r}, expected a number for {ctype}")
            converted.append(SCALARS[ctype](value))
            continue
        if not is_array(value):
            raise TypeError(f"{where} is a {type(value).__name__}, expected an array on the device")
        if value.dtype != ARRAYS[ctype]:
            raise TypeError(f"{where} has dtype {value.dtype}, expected {np.dtype(ARRAYS[ctype])}")
        if not value.flags.c_contiguous:
            raise TypeError(f"{where} of shape {value.shape} is not C-contiguous")
        converted.append(value)
    return converted
