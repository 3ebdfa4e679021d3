"""Memory, launches and matrix products on an NVIDIA GPU: all that this project asks of CuPy but NCCL (nccl.py).

    cupy.RawModule(code=, options=), and the call of a kernel (grid, block, args, shared_mem=)
    cupy.RawModule: get_function(name)
    cupy.RawKernel: max_dynamic_shared_size_bytes
    cupy.cuda.compiler.CompileException
    cupy.zeros(shape, dtype), cupy.empty(shape, dtype), cupy.ndarray(shape, dtype, memptr=)
    cupy.ndarray: set(arr), get(out=, blocking=), data, data.ptr, device.id, flags.c_contiguous
    cupy.ndarray: dtype, shape, ndim, nbytes
    cupy.cuda.alloc_pinned_memory(size)
    cupy.cuda.Event(disable_timing=)
    cupy.cuda.Event: record(stream), synchronize()
    cupy.cuda.Stream(non_blocking=), cupy.cuda.get_current_stream()
    cupy.cuda.Stream: ptr, use(), begin_capture(), end_capture(), wait_event(event)
    cupy.cuda.Graph: launch()
    cupy.cuda.get_cublas_handle()
    cupy.cuda.cublas: sgemm, setMathMode, CUBLAS_OP_N, CUBLAS_OP_T, CUBLAS_DEFAULT_MATH
    cupy.cuda.runtime: getDeviceCount(), setDevice(device), getDeviceProperties(device)
    cupy.cuda.runtime: memGetInfo(), deviceSynchronize()

and what launchers and trainers, which never import it, do with its arrays (tests/cuda_emulator/memory.py has no more):

    cupy.ndarray: size, data.ptr, fill(value), reshape(shape), __len__(), __getitem__(integers and slices)

Everything but NCCL runs in order on CuPy's current stream, which is made one that can be captured; the default one
cannot.
cuBLAS is called by ctypes where its library is found: CuPy's own calls refuse to be captured. No arithmetic is CuPy's
own, which would allocate its results and launch kernels that nobody here has read. Which GPUs there are to choose from,
CUDA_VISIBLE_DEVICES says.
"""

import atexit
import ctypes
import math
import operator
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path

import numpy as np

from kernels.cuda.runtime import source
from kernels.driver import NoDevice, Place, check_driver
from llmc.errors import UserError, explain_os_error

OPTIONS = ("--std=c++17",)  # CuPy adds the architecture, -ftz=true and --device-as-default-execution-space
# CUDA C++ Programming Guide, technical specifications, compute capability 7.0 and above
MAX_GRID = (2**31 - 1, 65535, 65535)
MAX_BLOCK = (1024, 1024, 64)
MAX_SHARED = 48 << 10  # bytes; a kernel that is to be given more declares them: DYNAMIC_SHARED in common.cuh
# the same table, maximum amount of shared memory per thread block, in KB by compute capability
OPT_IN = {(7, 0): 96, (7, 2): 96, (7, 5): 64, (8, 0): 163, (8, 6): 99, (8, 7): 163, (8, 9): 99, (9, 0): 227}
OPT_IN |= {(10, 0): 227, (10, 1): 227, (10, 3): 227, (11, 0): 227, (12, 0): 99, (12, 1): 99}
OPT_IN_AT_LEAST = 99  # what a later one than these has, it is assumed
MAX_INT = 2**31 - 1  # cuBLAS counts rows and columns in ints
AMPERE = (8, 0)  # compute capability from which on there is TF32
CUBLAS_TF32_TENSOR_OP_MATH = 3  # cublas_api.h, cublasMath_t; CuPy 14 has no name for it
WORKSPACE = 32 << 20  # bytes for cuBLAS: the most that its documentation asks for, on Hopper

PROBE = """extern "C" __global__ void __launch_bounds__(32) probe_kernel(float* out, float step, int N) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < N) { out[i] = i * step - 1.0f; }
}
"""


_workspaces = []  # cuBLAS has their addresses, as long as its handle lives: to the end


class CudaError(UserError):
    """What CUDA or its compiler reported, and where."""


class Readback:
    """A copy to the host that was enqueued: a call waits for it, and for nothing after it, and returns the values."""

    def __init__(self, pinned: np.ndarray, copied):
        self._pinned, self._copied, self._values = pinned, copied, None

    def __call__(self) -> np.ndarray:
        if self._values is None:
            with explained("copying to the host"):
                self._copied.synchronize()
            self._values = self._pinned.copy()
        return self._values


class SecondStream:
    """A stream for what goes on beside the runtime's. address: the CUDA stream's."""

    def __init__(self, first, second, event):
        self._first, self._second, self._event, self.address = first, second, event, second.ptr

    def fork(self) -> None:
        """What is enqueued here from now on waits for all that the runtime's stream has been given, and for no more."""
        with explained("making a stream wait"):
            self._event.record(self._first)
            self._second.wait_event(self._event)

    def join(self) -> None:
        """What the runtime's stream is given from now on waits for all that has been enqueued here."""
        with explained("making a stream wait"):
            self._event.record(self._second)
            self._first.wait_event(self._event)


class Runtime:
    """A GPU. Its arrays are CuPy's, row-major.

    name: the GPU's. capability: its compute capability, as (9, 0). tf32: whether products are computed in TF32, which
    takes the wish for it and a GPU that has it. place: which GPU it is.
    """

    def __init__(self, tf32: bool = False, folders: tuple[Path, ...] = (source.FOLDER,), local_rank: int = 0):
        """folders: where the .cu files are. local_rank: of several processes on this machine, which one this is.

        The GPU is number local_rank of the visible ones, modulo their number: a launcher may show each process its own.
        Raises NoDevice unless a kernel and a product, tried for real, gave what they should.
        """
        check_driver()
        self._folder, kept = open_cache()
        self._said_compiling = not kept
        self._cupy = import_cupy()
        self._kernels = {name: kernel for folder in folders for name, kernel in source.kernels(folder).items()}
        self._functions, self._buffers, self._views, self._pinned, self._readbacks = {}, {}, {}, {}, {}
        self._constants = {}
        self.name = "the GPU"
        try:
            self._open(tf32, local_rank)
            self._probe()
        except Exception as error:  # any error means that the GPU cannot be used
            raise NoDevice(f"{self.name}: {one_line(error)}") from error

    def _open(self, tf32: bool, local_rank: int):
        visible = self._cupy.cuda.runtime.getDeviceCount()
        self._device = local_rank % visible
        self._cupy.cuda.runtime.setDevice(self._device)
        properties = self._cupy.cuda.runtime.getDeviceProperties(self._device)
        self.name = properties["name"].decode()
        self.capability = properties["major"], properties["minor"]
        on_bus = (properties[f"pci{part}ID"] for part in ("Domain", "Bus", "Device"))
        self.place = Place(platform.node(), "{:04x}:{:02x}:{:02x}".format(*on_bus), visible)
        self.tf32 = tf32 and self.capability >= AMPERE
        current = self._cupy.cuda.get_current_stream()
        self._stream = current if current.ptr else self._cupy.cuda.Stream(non_blocking=True)
        self._stream.use()
        self._pieces = None  # of what is captured: graphs, and what is done between them
        self._cublas, cublas = self._cupy.cuda.get_cublas_handle(), self._cupy.cuda.cublas
        # the default mode never rounds float32 operands
        cublas.setMathMode(self._cublas, CUBLAS_TF32_TENSOR_OP_MATH if self.tf32 else cublas.CUBLAS_DEFAULT_MATH)
        self._operations = cublas.CUBLAS_OP_N, cublas.CUBLAS_OP_T
        self._sgemm = self._sgemm_by_ctypes() or cublas.sgemm
        self._captures = self._sgemm is not cublas.sgemm
        # cuBLAS reads alpha and beta from the host before its call returns: the pointer mode that a handle starts with
        # and that nobody changes
        self._alpha, self._beta = np.ones(1, np.float32), np.zeros(1, np.float32)
        self._alpha_address, self._beta_address = self._alpha.ctypes.data, self._beta.ctypes.data

    def _sgemm_by_ctypes(self) -> Callable | None:
        """cublasSgemm on the runtime's stream, with a workspace of its own; None where cuBLAS's library is not found.

        For products of a graph and all others alike, so that cuBLAS chooses the same kernels for both.
        """
        library = loaded_cublas()
        if library is None:
            return None

        def function(name: str, *types) -> Callable:
            own = getattr(library, name)
            own.argtypes, own.restype = (ctypes.c_void_p, *types), ctypes.c_int

            def call(*arguments):
                if status := own(*arguments):
                    raise RuntimeError(f"{name}: status {status}")

            return call

        number, address = ctypes.c_int, ctypes.c_void_p
        _workspaces.append(self._cupy.empty(WORKSPACE, np.uint8))
        # setting the stream gives the handle cuBLAS's own workspace back: it comes first
        function("cublasSetStream_v2", address)(self._cublas, self._stream.ptr)
        function("cublasSetWorkspace_v2", address, ctypes.c_size_t)(self._cublas, _workspaces[-1].data.ptr, WORKSPACE)
        matrix = address, number
        return function("cublasSgemm_v2", *[number] * 5, address, *matrix, *matrix, address, *matrix)

    def _probe(self):
        """A small kernel and a small product, both exact in float32 and in TF32. Raises RuntimeError if wrong."""
        N, step = 40, 0.5
        out = self.zeros(N)
        probe = self._compile(PROBE, "the probe kernel", ["probe_kernel"])["probe_kernel"]
        probe((2, 1, 1), (32, 1, 1), (out, np.float32(step), np.int32(N)), shared_mem=0)
        left, right = np.arange(6.0).reshape(2, 3), np.arange(12.0).reshape(4, 3)
        product = self.zeros((2, 4))
        self.gemm(product, *(self.to_device(x.astype(np.float32)) for x in (left, right)), transb=True)
        for what, found, expected in (
            ("the probe kernel", self.to_host(out), np.arange(N) * step - 1),
            ("cuBLAS", self.to_host(product), left @ right.T),
        ):
            if not np.array_equal(found, expected):
                wrong = np.flatnonzero(found != expected)[0]
                raise RuntimeError(f"{what} computed {found.flat[wrong]}, expected {expected.flat[wrong]}")

    # ------------------------------------------------------------------------------------------------------------------
    # memory

    def zeros(self, shape, dtype=np.float32):
        """A new array of zeros. Raises MemoryError."""
        return self._cupy.zeros(shape, dtype)

    def to_device(self, array: np.ndarray):
        """A new array with the values of `array`. Raises MemoryError, CudaError."""
        copy = self._cupy.empty(array.shape, array.dtype)
        with explained("copying to the GPU"):
            copy.set(array)
        self.synchronize()  # the driver may still be reading `array`
        return copy

    def copy_in(self, array, values: np.ndarray) -> None:
        """Enqueue array = values, of the same shape and dtype; `values` may be changed when this returns.

        For what changes every step: a page-locked buffer is kept for each array. From ordinary memory a copy would
        first wait for all that the GPU was given to do. Raises TypeError, CudaError.
        """
        self._check_array(array, "copy_in: array")
        if not isinstance(values, np.ndarray) or (values.shape, values.dtype) != (array.shape, array.dtype):
            raise TypeError(f"copy_in: values are {shown(values)} for an array {shown(array)}")
        pinned, copied = self._page_locked("in", array)
        with explained("copying to the GPU"):
            copied.synchronize()  # the copy before this one has left the buffer
            pinned[...] = values
            array.set(pinned)
            copied.record(self._stream)

    def to_host(self, array) -> np.ndarray:
        """The values of `array` once all that was launched is done. Raises TypeError, CudaError."""
        self._check_array(array, "to_host: array")
        values = np.empty(array.shape, array.dtype)
        with explained("copying to the host"):
            array.get(out=values)
        return values

    def to_host_later(self, array) -> Callable[[], np.ndarray]:
        """Enqueue a copy to the host; the callable waits for it alone and returns its values, in an array of its own.

        The page-locked buffer is kept for the array's next copy, which first fetches what nobody has yet.
        Raises TypeError, CudaError; so does the callable.
        """
        self._check_array(array, "to_host_later: array")
        key = _identity(array)
        if key in self._readbacks:
            self._readbacks[key]()
        pinned, copied = self._page_locked("out", array)
        with explained("copying to the host"):
            array.get(out=pinned, blocking=False)
            copied.record(self._stream)
        self._readbacks[key] = Readback(pinned, copied)
        return self._readbacks[key]

    def _page_locked(self, way: str, array) -> tuple:
        """A page-locked host array like `array`, and the event of its last copy; made once for an array and way."""
        key = way, _identity(array)
        if key not in self._pinned:
            memory = self._cupy.cuda.alloc_pinned_memory(array.nbytes)
            values = np.frombuffer(memory, array.dtype, math.prod(array.shape)).reshape(array.shape)
            self._pinned[key] = values, self._cupy.cuda.Event(disable_timing=True)
        return self._pinned[key]

    def scratch(self, key: str, shape, dtype=np.float32):
        """An array in the buffer that is kept under `key` and grows to the largest asked for; contents undefined."""
        views = self._views.setdefault(key, {})
        if (shape, dtype) not in views:
            nbytes = math.prod(np.atleast_1d(shape).tolist()) * np.dtype(dtype).itemsize
            if key not in self._buffers or self._buffers[key].nbytes < nbytes:
                views.clear()
                self._buffers[key] = self._cupy.empty(nbytes, np.uint8)
            views[shape, dtype] = self._cupy.ndarray(shape, dtype, memptr=self._buffers[key].data)
        return views[shape, dtype]

    def constant(self, values: np.ndarray):
        """An array of these values, which nobody writes to; made once for the same values."""
        key = values.tobytes(), values.shape, values.dtype
        if key not in self._constants:
            self._constants[key] = self.to_device(values)
        return self._constants[key]

    def synchronize(self) -> None:
        """Wait until the GPU has done all that it was given. Raises CudaError."""
        with explained("waiting for the GPU"):
            self._cupy.cuda.runtime.deviceSynchronize()

    def memory(self) -> tuple[int, int]:
        """(used, total) bytes of the GPU; used by whatever process."""
        free, total = self._cupy.cuda.runtime.memGetInfo()
        return total - free, total

    def is_array(self, value) -> bool:
        """Whether `value` is an array of this GPU."""
        return isinstance(value, self._cupy.ndarray) and value.device.id == self._device

    def _check_array(self, array, what: str):
        if not self.is_array(array):
            raise TypeError(f"{what} is a {type(array).__name__}, expected an array on {self.name}")
        if not array.flags.c_contiguous:
            raise TypeError(f"{what} of shape {array.shape} is not C-contiguous")

    # ------------------------------------------------------------------------------------------------------------------
    # kernels

    def second_stream(self) -> SecondStream:
        """A new stream, for what goes on beside everything else."""
        second, event = self._cupy.cuda.Stream(non_blocking=True), self._cupy.cuda.Event(disable_timing=True)
        return SecondStream(self._stream, second, event)

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """A function that enqueues what work() enqueues, as a CUDA graph; now nothing of it is enqueued.

        There is one graph, or one more for each call of outside_graphs.

        work launches, multiplies and fills what it has launched, multiplied and filled before, as compiling and
        allocating are no part of a graph; its arrays live as long as the function does. Raises CudaError where work
        copies or waits, or CUDA refuses; the GPU then goes on as before.
        """
        what = "capturing a CUDA graph"
        if not self._captures:
            raise CudaError(f"{what}: the library of cuBLAS that CuPy has loaded was not found", None)
        with explained(what):
            self._pieces = pieces = []
            self._stream.begin_capture()
            try:
                work()
                graph = self._stream.end_capture()
                pieces.append(graph.launch)
            except BaseException:
                with suppress(RuntimeError):  # of a capture that is no longer valid; it is over all the same
                    self._stream.end_capture()
                raise
            finally:
                self._pieces = None
        return partial(self._replay, pieces, dict(self._buffers))

    def outside_graphs(self, work: Callable[[], None]) -> None:
        """Do work() now; while a graph is captured, whenever it is launched, between what came before and what comes.

        For what enqueues something that is better not in a graph. Raises CudaError.
        """
        if self._pieces is None:
            work()
            return
        with explained("capturing a CUDA graph"):
            graph = self._stream.end_capture()
            self._pieces += [graph.launch, work]
            self._stream.begin_capture()

    def _replay(self, pieces: list, scratch: dict) -> None:
        """Enqueue graphs; `scratch` are the buffers that they use, kept for them when the runtime has larger ones."""
        with explained("launching a CUDA graph"):
            for piece in pieces:
                piece()

    def launch(self, kernel: str, grid, block, args, shared_mem: int = 0) -> None:
        """Launch a kernel of the .cu files.

        grid, block: an int or a tuple of up to three. args: arrays and Python numbers in the kernel's order.
        shared_mem: bytes of dynamic shared memory; 0 is what the kernel declares, if it does. Raises KeyError for an
        unknown kernel, TypeError (source.arguments), ValueError (check_launch), CudaError for what CUDA reports,
        possibly of an earlier launch.
        """
        declared = self._kernels[kernel]
        shared_mem = shared_mem or declared.shared
        values = tuple(source.arguments(declared, args, self.is_array))
        grid, block = _three(grid), _three(block)
        check_launch(declared, grid, block, values, shared_mem, self.capability)
        if kernel not in self._functions:
            self._functions |= self._load(declared)
        try:
            self._functions[kernel](grid, block, values, shared_mem=shared_mem)
        except RuntimeError as error:
            raise _cuda_error(shown_launch(declared, grid, block, values, shared_mem), error) from None

    def _load(self, kernel: source.Kernel) -> dict:
        """The kernel and all others of its file, by name, ready to be launched."""
        names = [name for name, other in self._kernels.items() if other.path == kernel.path]
        functions = self._compile(source.text(kernel.path), kernel.path.name, names)
        for name, function in functions.items():
            if 0 < self._kernels[name].shared <= opt_in(self.capability):
                with explained(f"shared memory of {name}"):
                    function.max_dynamic_shared_size_bytes = self._kernels[name].shared
        return functions

    def _compile(self, code: str, what: str, names: list[str]) -> dict:
        """The kernels `names` of `code`; says so, once, if CuPy did not have them on disk. Raises CudaError."""
        before = _changed(self._folder)
        module = self._cupy.RawModule(code=code, options=OPTIONS)
        try:
            functions = {name: module.get_function(name) for name in names}
        except self._cupy.cuda.compiler.CompileException as error:
            message = f"compiling {what} for {self.name}:\n{str(error).strip()}"
            raise CudaError(message, "undo what was changed in kernels/cuda, or update CuPy and its CUDA") from None
        except OSError as error:
            raise explain_os_error(error, self._folder, "keeping compiled kernels in") from None
        except RuntimeError as error:
            raise CudaError(f"loading {what} on {self.name}: {one_line(error)}", "update the NVIDIA driver") from None
        if not self._said_compiling and _changed(self._folder) != before:
            self._said_compiling = True
            print(f"compiling kernels for {self.name}, once: CuPy keeps them in {self._folder}", file=sys.stderr)
        return functions

    def gemm(self, out, a, b, transa: bool = False, transb: bool = False, beta: float = 0.0) -> None:
        """out (M,N) = op(a) (M,K) @ op(b) (K,N) + beta * out, where op transposes if asked to; float32, cuBLAS.

        Raises TypeError for what is no C-contiguous float32 matrix on the device, ValueError for shapes that do not
        fit, CudaError.
        """
        for name, array in (("out", out), ("a", a), ("b", b)):
            self._check_array(array, f"gemm: {name}")
            if array.dtype != np.float32 or array.ndim != 2:
                raise TypeError(f"gemm: {name} is {shown(array)}, expected a float32 matrix")
        M, K = a.shape[::-1] if transa else a.shape
        K_of_b, N = b.shape[::-1] if transb else b.shape
        if out.shape != (M, N) or K_of_b != K or not 0 < min(M, N, K) <= max(M, N, K) <= MAX_INT:
            product = f"{shown(a)}{'.T' * transa} @ {shown(b)}{'.T' * transb}"
            raise ValueError(f"gemm: {product} does not fit {shown(out)}")
        # cuBLAS reads by columns, where a row-major matrix is its own transpose, with rows as leading dimension. so it
        # is asked for out.T = op(b).T @ op(a).T: operands change places and keep their flags.
        # sgemm is called itself because it has nothing to copy or allocate with. cupy.cublas.gemm gets to it by way of
        # two NumPy scalars, three calls about the pointer mode and, for operands of another order, silent copies;
        # cupy.matmul knows no beta
        op_a, op_b = self._operations[transa], self._operations[transb]
        operands = (b.data.ptr, b.shape[1], a.data.ptr, a.shape[1])
        self._beta[0] = beta
        try:
            self._sgemm(
                self._cublas, op_b, op_a, N, M, K, self._alpha_address, *operands, self._beta_address, out.data.ptr, N
            )
        except RuntimeError as error:
            raise _cuda_error(f"gemm of {shown(a)} and {shown(b)} into {shown(out)}", error) from None


# ----------------------------------------------------------------------------------------------------------------------
# before CuPy is there


@cache
def open_cache() -> tuple[str, bool]:
    """CuPy's folder of compiled kernels, and whether it is kept: CUPY_CACHE_DIR, ~/.cupy/kernel_cache, or a temporary
    one if that cannot be written. To be called before CuPy is imported, which fails where it cannot make its folder."""
    folder = os.environ.get("CUPY_CACHE_DIR") or os.path.expanduser("~/.cupy/kernel_cache")
    try:
        os.makedirs(folder, exist_ok=True)
        kept = os.access(folder, os.W_OK | os.X_OK)
    except OSError:
        kept = False
    if not kept:
        unwritable, folder = folder, tempfile.mkdtemp(prefix="kernel_cache_")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        print(f"compiling kernels in every run: {unwritable} cannot be written; set CUPY_CACHE_DIR", file=sys.stderr)
    os.environ["CUPY_CACHE_DIR"] = folder
    return folder, kept


def import_cupy():
    """CuPy, or NoDevice."""
    try:
        import cupy
    except ModuleNotFoundError as error:
        if error.name == "cupy":
            raise NoDevice("CuPy is not installed") from None
        raise NoDevice(f"CuPy does not load: {one_line(error)}") from error
    except Exception as error:  # its libraries, its folders, its version of NumPy: all fail in ways of their own
        raise NoDevice(f"CuPy does not load: {one_line(error)}") from error
    return cupy


def loaded_cublas() -> ctypes.CDLL | None:
    """The library of cuBLAS that CuPy has loaded; None where the system does not say which (Linux does)."""
    try:
        with open("/proc/self/maps") as maps:
            paths = [line.split(maxsplit=5)[5].strip() for line in maps if "/libcublas.so" in line]
        return ctypes.CDLL(paths[0]) if paths else None
    except OSError:
        return None


def _changed(folder: str) -> int:
    """When an entry of `folder` was last added or renamed: CuPy adds one for what it compiles."""
    try:
        return os.stat(folder).st_mtime_ns
    except OSError:
        return 0


# ----------------------------------------------------------------------------------------------------------------------
# checks and words


def opt_in(capability: tuple[int, int]) -> int:
    """Bytes of shared memory that a block may have on a GPU of that compute capability, if its kernel asks for them."""
    return OPT_IN.get(capability, OPT_IN_AT_LEAST) << 10


def shared_limit(kernel: source.Kernel, capability: tuple[int, int]) -> int:
    """Bytes of shared memory that a block of the kernel may have, static and dynamic."""
    return opt_in(capability) if kernel.shared else MAX_SHARED


def check_launch(kernel: source.Kernel, grid: tuple, block: tuple, values, shared_mem: int, capability: tuple) -> None:
    """Raise ValueError, naming all that was given, for a launch that CUDA would refuse or the launch bound does."""
    problem = None
    most = min(max(kernel.shared, MAX_SHARED), shared_limit(kernel, capability))
    if not all(1 <= size <= most for size, most in zip(grid, MAX_GRID)):
        problem = f"grid {grid}, expected 1 to {MAX_GRID}"
    elif not all(1 <= size <= most for size, most in zip(block, MAX_BLOCK)):
        problem = f"block {block}, expected 1 to {MAX_BLOCK}"
    elif math.prod(block) > kernel.threads:
        problem = f"{math.prod(block)} threads a block, its launch bound is {kernel.threads}"
    elif not 0 <= shared_mem <= most:
        problem = f"{shared_mem} bytes of shared memory, at most {most}"
    if problem:
        raise ValueError(f"{shown_launch(kernel, grid, block, values, shared_mem)}: {problem}")


def shown_launch(kernel: source.Kernel, grid: tuple, block: tuple, values, shared_mem: int) -> str:
    """gelu_kernel<<<(2, 1, 1), (256, 1, 1), 0>>>(out=float32(4, 8), N=32)"""
    arguments = ", ".join(f"{name}={shown(value)}" for (name, _), value in zip(kernel.parameters, values))
    return f"{kernel.name}<<<{grid}, {block}, {shared_mem}>>>({arguments})"


def shown(value) -> str:
    """float32(4, 8) for an array, the value for a number, the type for anything else."""
    if isinstance(value, (int, float, np.number)):
        return str(value)
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"{value.dtype}{value.shape}"
    return f"a {type(value).__name__}"


def one_line(error: Exception) -> str:
    """What `error`, or what it was raised from, says, without line breaks and cut to 300 characters."""
    error = error.__cause__ or error
    text = " ".join(str(error).split())[:300]
    says_enough = text and isinstance(error, (RuntimeError, ImportError, UserError))
    return text if says_enough else f"{type(error).__name__} {text}"


@contextmanager
def explained(what: str):
    """RuntimeErrors of CUDA, while doing `what`, as a CudaError that says so."""
    try:
        yield
    except RuntimeError as error:
        raise _cuda_error(what, error) from None


def _cuda_error(what: str, error: Exception) -> CudaError:
    hint = "it may be an earlier launch that failed: with CUDA_LAUNCH_BLOCKING=1 before the command it is the one named"
    return CudaError(f"{what}: {one_line(error)}", hint)


def _identity(array) -> tuple:
    return array.data.ptr, array.shape, array.dtype


def _three(size) -> tuple[int, int, int]:
    """2 or (2, 3) -> (2, 1, 1) or (2, 3, 1)"""
    sizes = tuple(map(operator.index, size)) if isinstance(size, (tuple, list)) else (operator.index(size),)
    if len(sizes) > 3:
        raise ValueError(f"{size} has more than three dimensions")
    return sizes + (1,) * (3 - len(sizes))
