"""As much of CuPy as kernels/cuda/runtime/runtime.py uses, in NumPy, on a GPU that works when somebody waits for it.

Addresses are the host's, so sgemm reads through pointers as cuBLAS does. Sources are not compiled: a kernel is a Python
function in FakeCupy.kernels.
"""

import ctypes
import hashlib
import math
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np


class CompileException(Exception):
    """As cupy.cuda.compiler's: its str is the compiler's log."""


class Memory:
    """Bytes of the device or of the host; data.ptr of an array."""

    def __init__(self, nbytes: int):
        self.bytes = np.full(nbytes, 0xFF, np.uint8)  # NaN
        self.ptr = self.bytes.ctypes.data


class Event:
    """What a stream was given up to record()."""

    def __init__(self, fake):
        self._fake, self._stream, self._position = fake, None, 0

    def record(self, stream=None):
        assert isinstance(stream, Stream), "the null stream, on which nothing is"
        self._fake.refuse_capture()
        self._stream, self._position = stream, stream.enqueued

    def synchronize(self):
        self._fake.waits.append("event")
        if self._stream:
            self._fake.run(self._stream, self._position)


class Stream:
    """A queue of operations; what is captured is what is told while the stream is current.

    queue: [(event that it waits for, operation)], each may be None. An event is what it was when the wait was enqueued.
    """

    def __init__(self, fake, ptr: int):
        self._fake, self.ptr, self.queue = fake, ptr, []
        self.enqueued = self.done = 0  # operations so far

    def use(self):
        self._fake.stream = self
        return self

    def begin_capture(self):
        if self.ptr == 0:
            raise RuntimeError("cannot capture on the default (legacy) stream")
        self._fake.captured = []

    def end_capture(self):
        if self._fake.capture_error:
            self._fake.captured = None
            raise self._fake.capture_error
        if self._fake.captured is None:
            raise RuntimeError("cudaErrorIllegalState: the stream is not capturing")
        captured, self._fake.captured = self._fake.captured, None
        return Graph(self._fake, captured)

    def wait_event(self, event):
        self._fake.refuse_capture()
        self._enqueue((event._stream, event._position), None)

    def _enqueue(self, behind, operation):
        self.queue.append((behind, operation))
        self.enqueued += 1

    def _step(self) -> bool:
        """Do the first operation of the queue; False if there is none, or it waits."""
        if not self.queue or (self.queue[0][0] and self.queue[0][0][0].done < self.queue[0][0][1]):
            return False
        _, operation = self.queue.pop(0)
        if operation:
            operation()
        self.done += 1
        return True


class Graph:
    def __init__(self, fake, operations: list):
        self._fake, self._operations = fake, operations

    def launch(self):
        self._fake.launches.append(("graph", len(self._operations)))
        for operation in self._operations:
            self._fake.enqueue(operation)


class RawKernel:
    """A kernel of a module; launched: what happens when it is called."""

    def __init__(self, launched):
        self._launched, self.max_dynamic_shared_size_bytes = launched, 48 << 10

    def __call__(self, grid, block, args, shared_mem=0):
        if shared_mem > self.max_dynamic_shared_size_bytes:
            raise RuntimeError("CUDA_ERROR_INVALID_VALUE: invalid argument")
        self._launched(grid, block, args, shared_mem)


class FakeCupy:
    """module stands for cupy, and has nothing that CuPy lacks. allocations: what was asked for; launches, waits: what
    was done, in order."""

    def __init__(self, name=b"Fake GPU", major=9, kernels=None, gpus=1):
        self.allocations, self.launches, self.waits = [], [], []
        self.kernels = {"probe_kernel": self.probe} | (kernels or {})
        self.launch_error = self.compile_error = self.capture_error = None
        self.stream, self.captured = Stream(self, 0), None  # captured: operations, while that goes on
        self.streams, self.newest_first = [self.stream], True  # which of them goes as far ahead as it may
        self.math_mode = None
        self.pinned = []
        self.device = 0  # the current one
        fake = self

        class ndarray:
            def __init__(self, shape, dtype=float, memptr=None):
                self.shape, self.dtype = (shape,) if isinstance(shape, int) else tuple(shape), np.dtype(dtype)
                self.ndim, self.size = len(self.shape), math.prod(self.shape)
                self.nbytes = self.size * self.dtype.itemsize
                if memptr is None:
                    fake.allocations.append(("device", self.nbytes))
                self.data = memptr or Memory(self.nbytes)
                self.values = self.data.bytes[: self.nbytes].view(self.dtype).reshape(self.shape)
                self.device = SimpleNamespace(id=fake.device)
                self.flags = SimpleNamespace(c_contiguous=True)

            def set(self, arr):
                assert (arr.shape, arr.dtype) == (self.shape, self.dtype)
                fake.refuse_capture()
                if not fake.is_pinned(arr):  # the driver waits for the stream, then copies
                    fake.waits.append("pageable copy")
                    fake.run(fake.stream, fake.stream.enqueued)
                    self.values[...] = arr
                else:
                    fake.enqueue(lambda: np.copyto(self.values, arr))

            def get(self, out, blocking=True):
                assert (out.shape, out.dtype) == (self.shape, self.dtype)
                fake.refuse_capture()
                fake.enqueue(lambda: np.copyto(out, self.values))
                if blocking:
                    fake.waits.append("all")
                    fake.run(fake.stream, fake.stream.enqueued)
                return out

        self.ndarray = ndarray
        cuda = SimpleNamespace(
            alloc_pinned_memory=self.alloc_pinned_memory,
            Event=lambda disable_timing: Event(self),
            get_cublas_handle=lambda: 77,
            Stream=lambda non_blocking: self.new_stream(),
            get_current_stream=lambda: self.stream,
            Graph=Graph,
            cublas=SimpleNamespace(
                sgemm=self.cupys_sgemm,
                setMathMode=lambda handle, mode: setattr(self, "math_mode", (handle, mode)),
                CUBLAS_OP_N=0,
                CUBLAS_OP_T=1,
                CUBLAS_DEFAULT_MATH=0,
            ),
            runtime=SimpleNamespace(
                getDeviceCount=lambda: gpus,
                setDevice=lambda device: setattr(self, "device", device),
                getDeviceProperties=lambda device: {
                    "name": name,
                    "major": major,
                    "minor": 0,
                    "pciDomainID": 0,
                    "pciBusID": 0x3B + device,
                    "pciDeviceID": 0,
                },
                memGetInfo=lambda: (30 << 30, 80 << 30),
                deviceSynchronize=self.synchronize,
            ),
            compiler=SimpleNamespace(CompileException=CompileException),
        )
        self.module = SimpleNamespace(
            ndarray=ndarray,
            empty=self.empty,
            zeros=self.zeros,
            RawModule=self.RawModule,
            RawKernel=RawKernel,
            cuda=cuda,
        )

    def enqueue(self, operation):
        if self.captured is not None:
            self.captured.append(operation)
            return
        self.stream._enqueue(None, operation)

    def new_stream(self) -> Stream:
        self.streams.append(Stream(self, 999 + len(self.streams)))
        return self.streams[-1]

    def refuse_capture(self):
        if self.captured is not None:
            raise RuntimeError("the current stream is capturing")

    def synchronize(self):
        self.refuse_capture()
        self.run()

    def run(self, stream: Stream | None = None, position: int = 0):
        """Run what was enqueued, of `stream` as far as `position`; of the others what may go ahead, or what must."""
        ordered = self.streams[::-1] if self.newest_first else self.streams
        while stream is None or stream.done < position:
            if not any(one._step() for one in ordered):
                assert not any(one.queue for one in self.streams), "streams wait for each other"
                return

    def empty(self, shape, dtype):
        return self.ndarray(shape, dtype)

    def zeros(self, shape, dtype):
        array = self.ndarray(shape, dtype)
        self.enqueue(lambda: array.values.fill(0))
        return array

    def alloc_pinned_memory(self, size):
        self.allocations.append(("pinned", size))
        memory = Memory(size + 100)  # CuPy rounds up
        self.pinned.append(memory)
        return memory.bytes

    def is_pinned(self, array) -> bool:
        return any(0 <= array.ctypes.data - memory.ptr < memory.bytes.size for memory in self.pinned)

    def RawModule(self, code, options):
        assert isinstance(options, tuple)
        return SimpleNamespace(get_function=lambda name: self.get_function(code, name))

    def get_function(self, code, name):
        """As CuPy does it: the whole source is compiled, unless the disk has the result."""
        if self.compile_error:
            raise self.compile_error
        entry = Path(os.environ["CUPY_CACHE_DIR"], hashlib.sha1(code.encode()).hexdigest() + ".cubin")
        if not entry.exists():
            entry.write_bytes(b"cubin")
        assert f"{name}(" in code

        def launched(grid, block, args, shared_mem):
            assert [type(size) for size in (*grid, *block)] == [int] * 6
            assert all(isinstance(a, self.ndarray) or type(a) in (np.int32, np.float32, np.uint64) for a in args)
            if self.launch_error:
                raise self.launch_error
            self.launches.append((name, grid, block, shared_mem))
            self.enqueue(lambda: self.kernels[name](*(getattr(a, "values", a) for a in args)))

        return RawKernel(launched)

    @staticmethod
    def probe(out, step, N):
        out[:N] = np.arange(N) * step - 1

    def cupys_sgemm(self, *arguments):
        """CuPy's, which sets the stream first."""
        if self.captured is not None:
            raise NotImplementedError("cannot be captured")
        self.sgemm(*arguments)

    def sgemm(self, handle, transa, transb, m, n, k, alpha, A, lda, B, ldb, beta, C, ldc):
        """C (m,n) = alpha * op(A) (m,k) op(B) (k,n) + beta * C: all read by columns, alpha and beta on the host."""
        assert handle == 77 and all(type(size) is int for size in (transa, transb, m, n, k, lda, ldb, ldc))
        a, b = (columns(A, lda, *((k, m) if transa else (m, k))), columns(B, ldb, *((n, k) if transb else (k, n))))
        c = columns(C, ldc, m, n)
        alpha, beta = (ctypes.c_float.from_address(pointer).value for pointer in (alpha, beta))

        def product():
            new = alpha * (a.T if transa else a) @ (b.T if transb else b)
            c[...] = new + beta * c if beta else new

        self.launches.append(("sgemm", (m, n, k)))
        self.enqueue(product)


def columns(pointer: int, ld: int, rows: int, cols: int) -> np.ndarray:
    """The matrix (rows,cols) at an address, a column every `ld` floats."""
    if ld < max(1, rows):
        raise RuntimeError("CUBLAS_STATUS_INVALID_VALUE")
    flat = np.ctypeslib.as_array((ctypes.c_float * (ld * (cols - 1) + rows)).from_address(pointer))
    return np.lib.stride_tricks.as_strided(flat, (rows, cols), (4, 4 * ld))


# kernels for it: what its compiler sees, and what they do
PLANTED = {
    "scale.cu": """
extern "C" __global__ void __launch_bounds__(128)
scale_kernel(float* __restrict__ out, const float* __restrict__ inp, float by, size_t first, int N) {}
extern "C" __global__ void __launch_bounds__(128)
scale_again_kernel(float* out, int N) {}
""",
    "count.cu": """
extern "C" __global__ void __launch_bounds__(64)
count_kernel(int* out, int N) {}
extern "C" __global__ void __launch_bounds__(64, 2) DYNAMIC_SHARED(101376)
large_kernel(int* out, int N) {}
extern "C" __global__ void __launch_bounds__(64) DYNAMIC_SHARED(101377)
largest_kernel(int* out, int N) {}
""",
}


def scale(out, inp, by, first, N):
    part = slice(int(first), int(first) + N)
    out.flat[part] = inp.flat[part] * by


def count(out, N):
    out[:N] = np.arange(N)
