"""Runs the kernels of kernels/cuda on a processor: the interface of kernels.cuda.runtime.runtime, on NumPy memory."""

import ctypes
import math
import operator
import os
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from cuda_emulator import build
from cuda_emulator.memory import ALIGNMENT, GUARD, DeviceArray, Memory, address_of, enqueue, record, refuse_capture
from kernels.cuda.runtime import source
from kernels.cuda.runtime.runtime import check_launch, shared_limit, shown, shown_launch

SCHEDULES = ("ascending", "descending", "random")
ERROR_BYTES = 2000
PLACE = re.compile(r" \[0x([0-9a-f]+)\]")
SCALARS = {"int": ctypes.c_int32, "float": ctypes.c_float, "size_t": ctypes.c_uint64}


class KernelError(RuntimeError):
    """A kernel did what CUDA does not allow."""


# ---- a launch as scheduler.cpp takes it


class _Argument(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("type", ctypes.c_char_p),
        ("begin", ctypes.c_void_p),
        ("bytes", ctypes.c_uint64),
        ("element_bytes", ctypes.c_uint64),
    )


class _Launch(ctypes.Structure):
    _fields_ = (
        ("kernel", ctypes.c_char_p),
        ("values", ctypes.c_void_p),
        ("arguments", ctypes.c_void_p),
        ("error", ctypes.c_void_p),
        ("shared_bytes", ctypes.c_uint64),
        ("shared_limit", ctypes.c_uint64),
        ("seed", ctypes.c_uint64),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("argument_count", ctypes.c_int32),
        ("schedule", ctypes.c_int32),
        ("workers", ctypes.c_int32),
        ("refused", ctypes.c_int32),
    )


class EmulatedRuntime:
    """Memory and kernel launches of an emulated device.

    mode "fast" runs blocks on all cores and notices misused barriers and collectives; "check" also finds data races,
    accesses out of bounds and misaligned ones, on one core; "asan" is for a process with build.asan_environment().
    schedule ("ascending", "descending", "random" with `seed`) is the order of threads and of blocks. capability, the
    GPU's, and tf32 say which kernels launchers take: from (8, 0) on those for tensor cores, by the slow fallbacks of
    mma.cuh. Raises BuildError if g++ is missing or refuses a file, KernelError if a kernel does what CUDA does not
    allow.
    """

    _one_launch = threading.Lock()

    def __init__(
        self,
        mode: str = "fast",
        schedule: str = "ascending",
        seed: int = 0,
        folders: tuple[Path, ...] = (source.FOLDER,),
        portable: bool = False,
        capability: tuple[int, int] = (7, 0),
        tf32: bool = False,
    ):
        if mode not in build.MODES or schedule not in SCHEDULES:
            raise ValueError(f"mode {mode!r}, schedule {schedule!r}: expected one of {build.MODES}, {SCHEDULES}")
        if reason := build.missing_tool():
            raise build.BuildError(reason)
        if mode == "asan" and not hasattr(ctypes.CDLL(None), "__asan_init"):
            raise RuntimeError("mode asan needs the environment that `python tests/cuda_emulator/build.py asan` prints")
        self.name, self.capability, self.tf32 = f"CUDA emulator ({mode})", capability, tf32
        self.mode, self.schedule, self.seed, self.portable = mode, schedule, seed, portable
        # the checker looks at one block after another, and a sanitized process may want to fork
        self.workers = len(os.sched_getaffinity(0)) if mode == "fast" else 1
        self._kernels = {name: kernel for folder in folders for name, kernel in source.kernels(Path(folder)).items()}
        self._memory = Memory(sanitized=mode == "asan")
        self._scratch, self._libraries, self._functions = {}, {}, {}
        self._constants = {}
        self._launched = set()  # names, since guards were looked at
        self.graph_launches = 0

    # ---- memory

    def zeros(self, shape, dtype=np.float32) -> DeviceArray:
        array = _view(self._memory.allocate(_nbytes(shape, dtype)), shape, dtype)
        array.fill(0)
        return array

    def to_device(self, array: np.ndarray) -> DeviceArray:
        refuse_capture("copying to the GPU")
        copy = _view(self._memory.allocate(array.nbytes), array.shape, array.dtype)
        copy.values[...] = array
        return copy

    def copy_in(self, array: DeviceArray, values: np.ndarray) -> None:
        """array = values, of the same shape and dtype."""
        refuse_capture("copying to the GPU")
        self._check_array(array, "copy_in: array")
        if not isinstance(values, np.ndarray) or (values.shape, values.dtype) != (array.shape, array.dtype):
            raise TypeError(f"copy_in: values are {shown(values)} for an array {shown(array)}")
        array.values[...] = values

    def to_host(self, array: DeviceArray) -> np.ndarray:
        refuse_capture("copying to the host")
        self._check_array(array, "to_host: array")
        self.synchronize()
        return array.values.copy()

    def to_host_later(self, array: DeviceArray) -> Callable[[], np.ndarray]:
        """A function that gives the copy begun now."""
        copy = self.to_host(array)
        return lambda: copy

    def scratch(self, key, shape, dtype=np.float32) -> DeviceArray:
        """The buffer of that key, grown when needed. Its contents are undefined: here the bytes of NaN."""
        nbytes = _nbytes(shape, dtype)
        if key not in self._scratch or self._scratch[key].nbytes < nbytes:
            self._scratch[key] = self._memory.allocate(nbytes)
        buffer = self._scratch[key][:nbytes]
        enqueue(lambda: buffer.fill(0xFF))
        return _view(buffer, shape, dtype)

    def constant(self, values: np.ndarray) -> DeviceArray:
        """A device array of these values, made once."""
        key = values.tobytes(), values.shape, values.dtype
        if key not in self._constants:
            self._constants[key] = self.to_device(values)
        return self._constants[key]

    def memory(self) -> tuple[int, int]:
        """Bytes in use and in all."""
        return self._memory.used, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

    def synchronize(self) -> None:
        """A launch returns when it is done. Raises KernelError if there was a store just outside of an array."""
        refuse_capture("waiting for the GPU")
        launched, self._launched = self._launched, set()
        if launched and (stores := self._memory.stray_stores()):
            where = "; ".join(stores)
            raise KernelError(f"{', '.join(sorted(launched))}: stray stores {where}; mode check says by whom")

    def is_array(self, value) -> bool:
        return isinstance(value, DeviceArray)

    def _check_array(self, array, what: str) -> None:
        if not self.is_array(array):
            raise TypeError(f"{what} is a {type(array).__name__}, expected an array on {self.name}")
        if not array.flags.c_contiguous:
            raise TypeError(f"{what} of shape {array.shape} is not C-contiguous")

    def gemm(self, out, a, b, transa: bool = False, transb: bool = False, beta: float = 0.0) -> None:
        """out (M,N) = op(a) (M,K) @ op(b) (K,N) + beta * out; op transposes if transa, transb."""
        for name, array in (("out", out), ("a", a), ("b", b)):
            self._check_array(array, f"gemm: {name}")
            if array.dtype != np.float32 or array.ndim != 2:
                raise TypeError(f"gemm: {name} is {shown(array)}, expected a float32 matrix")
        left, right = a.values.T if transa else a.values, b.values.T if transb else b.values
        if left.shape[1] != right.shape[0] or out.shape != (left.shape[0], right.shape[1]):
            raise ValueError(f"gemm: {shown(left)} @ {shown(right)} does not fit {shown(out)}")

        def product():
            if beta == 0:
                np.matmul(left, right, out=out.values)
            else:
                out.values[...] = left @ right + np.float32(beta) * out.values

        enqueue(product)

    # ---- kernels

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """A function that does what work() tells the device; CudaError for what CuPy refuses to capture."""
        recorded = record(work)

        def launch():
            self.graph_launches += 1
            for operation in recorded:
                operation()

        return launch

    def outside_graphs(self, work: Callable[[], None]) -> None:
        """work() now or, while a capture goes on, in its order whenever that is launched."""
        enqueue(work)

    def build(self, *paths: Path, jobs: int | None = None) -> None:
        """Compiles .cu files now, all of them if none is named, `jobs` at a time; else the first launch does it."""
        paths = paths or tuple({kernel.path for kernel in self._kernels.values()})
        build.scheduler_library(self.mode, self.portable)
        with ThreadPoolExecutor(jobs or len(os.sched_getaffinity(0))) as pool:
            list(pool.map(self._library, paths))

    def launch(self, kernel: str, grid, block, args, shared_mem: int = 0) -> None:
        """Runs a kernel on grid blocks of block threads, each an int or a tuple of up to 3.

        Raises KeyError for an unknown kernel, ValueError for sizes that CUDA or the kernel's launch bound forbids,
        TypeError for arguments that do not fit its parameters, KernelError for what the kernel does wrong.
        """
        declared = self._kernels[kernel]
        shared_mem = shared_mem or declared.shared
        values = source.arguments(declared, args, self.is_array)
        grid, block = _three(grid), _three(block)
        check_launch(declared, grid, block, values, shared_mem, self.capability)

        def run():
            with self._one_launch:
                self._run(declared, grid, block, values, shared_mem)

        enqueue(run)

    def _run(self, kernel, grid, block, values, shared_mem: int) -> None:
        arrays, cells = _arguments(kernel, values)
        moved = self._move_apart(arrays) if self.mode == "check" else []
        begins = (array.begin for array in arrays)
        cells = [ctypes.c_void_p(next(begins)) if cell is None else cell for cell in cells]
        addresses = (ctypes.c_void_p * len(cells))(*map(ctypes.addressof, cells))
        error = ctypes.create_string_buffer(ERROR_BYTES)
        launch = _Launch(
            kernel=kernel.name.encode(),
            values=ctypes.addressof(addresses),
            arguments=ctypes.addressof(arrays),
            error=ctypes.addressof(error),
            shared_bytes=shared_mem,
            shared_limit=shared_limit(kernel, self.capability),
            seed=self.seed,
            grid=grid,
            block=block,
            argument_count=len(arrays),
            schedule=SCHEDULES.index(self.schedule),
            workers=self.workers,
        )
        self._launched.add(kernel.name)
        self._function(kernel)(ctypes.byref(launch))
        for begin, copy, nbytes, _ in moved:
            ctypes.memmove(begin, copy, nbytes)
        if launch.refused:
            raise ValueError(f"{shown_launch(kernel, grid, block, values, shared_mem)}: {error.value.decode()}")
        if error.value:
            raise KernelError(self._with_lines(error.value.decode(), kernel))

    def _move_apart(self, arrays) -> list[tuple]:
        """Gives arrays right behind another a place of their own, so that an overrun does not end in the neighbour.

        Arrays that overlap stay together. Returns (address, address of the copy, bytes, the copy's memory).
        """
        moved, end = [], -GUARD
        for cluster in _clusters(arrays):
            begin, gap = cluster[0].begin, cluster[0].begin - end
            end = max(array.begin + array.bytes for array in cluster)
            if gap >= GUARD:
                continue
            memory = self._memory.allocate(end - begin + ALIGNMENT)
            copy = address_of(memory) + begin % ALIGNMENT  # as aligned as the original
            ctypes.memmove(copy, begin, end - begin)
            moved.append((begin, copy, end - begin, memory))
            for array in cluster:
                array.begin += copy - begin
        return moved

    def _function(self, kernel):
        """launch_<kernel> of the kernel's library, which is built at the first launch."""
        if kernel.name not in self._functions:
            if kernel.path not in self._libraries:
                self._libraries[kernel.path] = ctypes.CDLL(str(self._library(kernel.path)))
            self._functions[kernel.name] = getattr(self._libraries[kernel.path], f"launch_{kernel.name}")
        return self._functions[kernel.name]

    def _library(self, path: Path) -> Path:
        kernels = [kernel for kernel in self._kernels.values() if kernel.path == path]
        return build.kernel_library(path, kernels, source.text(path), self.mode, self.portable)

    def _with_lines(self, message: str, kernel) -> str:
        """Offsets in the library, as in " [0x1234]", become " (layernorm.cu:38)"."""
        library = self._library(kernel.path)

        def line(match) -> str:
            found = build.source_line(library, int(match[1], 16) - 1)  # - 1: from the return address into the call
            return f" ({found})" if found else ""

        return PLACE.sub(line, message)


def _arguments(kernel, values):
    """(the arrays as _Argument, the other arguments as C values with None where an array goes)."""
    arrays, cells = [], []
    for value, (name, ctype) in zip(values, kernel.parameters):
        if ctype in SCALARS:
            cells.append(SCALARS[ctype](value.item()))
        else:
            memory = value.values
            element = ctype.removesuffix("*").encode()
            arrays.append(_Argument(name.encode(), element, address_of(memory), memory.nbytes, memory.itemsize))
            cells.append(None)
    return (_Argument * len(arrays))(*arrays), cells


def _clusters(arrays) -> list[list]:
    """Arrays in the order of their addresses, in lists of those that overlap."""
    clusters, end = [], -1
    for array in sorted(arrays, key=lambda array: array.begin):
        if array.begin >= end:
            clusters.append([])
        clusters[-1].append(array)
        end = max(end, array.begin + array.bytes)
    return clusters


def _tuple(shape) -> tuple:
    return tuple(shape) if isinstance(shape, (tuple, list)) else (shape,)


def _nbytes(shape, dtype) -> int:
    return math.prod(_tuple(shape)) * np.dtype(dtype).itemsize


def _view(buffer: np.ndarray, shape, dtype) -> DeviceArray:
    return DeviceArray(buffer.view(dtype).reshape(shape))


def _three(size) -> tuple[int, int, int]:
    sizes = tuple(map(operator.index, _tuple(size)))
    if len(sizes) > 3:
        raise ValueError(f"{size} has more than three dimensions")
    return sizes + (1,) * (3 - len(sizes))
