"""The emulated device's memory: arrays that host code cannot look into, between guard zones."""

import ctypes
import threading
import weakref
from types import SimpleNamespace

import numpy as np

from kernels.cuda.runtime.runtime import CudaError

ALIGNMENT = 512  # of an allocation, as CuPy's
GUARD = 4096  # bytes on either side of an allocation
GUARD_BYTES = b"\xff" * GUARD  # NaN, whatever the type


class _Capture(threading.local):
    recorded: list | None = None  # what this thread told its device while a capture goes on


_capture = _Capture()


def enqueue(operation) -> None:
    """Do what the device is told, or record it while a capture goes on."""
    if _capture.recorded is None:
        operation()
    else:
        _capture.recorded.append(operation)


def record(work) -> list:
    """What work() tells the device, none of it done."""
    _capture.recorded = recorded = []
    try:
        work()
    finally:
        _capture.recorded = None
    return recorded


def refuse_capture(what: str) -> None:
    """Raise CudaError while a capture goes on: for what CuPy refuses there, and for what a graph must not do."""
    if _capture.recorded is not None:
        raise CudaError(f"{what}: not while a graph is captured", None)


class DeviceArray:
    """Memory that host code must not look into: what CuPy's arrays have, of it what our host code may use.

    NumPy refuses it: code that would only work because this device is NumPy memory fails.
    """

    __slots__ = ("values",)

    def __init__(self, values: np.ndarray):
        self.values = values  # for the emulator alone

    shape = property(lambda self: self.values.shape)
    dtype = property(lambda self: self.values.dtype)
    size = property(lambda self: self.values.size)
    ndim = property(lambda self: self.values.ndim)
    nbytes = property(lambda self: self.values.nbytes)
    flags = property(lambda self: self.values.flags)
    data = property(lambda self: SimpleNamespace(ptr=address_of(self.values)))

    def __getitem__(self, index) -> "DeviceArray":
        index = index if isinstance(index, tuple) else (index,)
        if not all(part is None or part is ... or isinstance(part, (int, np.integer, slice)) for part in index):
            raise TypeError(f"DeviceArray[{index}]: only integers and slices, which copy nothing")
        if ... not in index:
            index += (...,)  # an element, too, is a view
        return DeviceArray(self.values[index])

    def reshape(self, *shape) -> "DeviceArray":
        if not self.values.flags.c_contiguous:
            raise TypeError(f"DeviceArray.reshape: {self.shape} is not C-contiguous, this would copy")
        return DeviceArray(self.values.reshape(*shape))

    def fill(self, value) -> None:
        enqueue(lambda: self.values.fill(value))

    def __len__(self) -> int:
        return len(self.values)

    def __repr__(self) -> str:
        return f"DeviceArray(shape={self.shape}, dtype={self.dtype})"

    def _refuse(self, *args, **kwargs):
        raise TypeError("a DeviceArray is not for NumPy or Python: launch a kernel, or copy it with to_host")

    __array__ = __array_ufunc__ = __array_function__ = _refuse
    __bool__ = __int__ = __float__ = __index__ = __iter__ = __eq__ = __ne__ = __setitem__ = _refuse
    __hash__ = None


class Memory:
    """Allocates bytes between guard zones, and counts them. sanitized: the address sanitizer watches the guards."""

    def __init__(self, sanitized: bool):
        self.used = 0
        self._sanitizer = ctypes.CDLL(None) if sanitized else None
        self._allocations: dict[int, tuple] = {}  # by number: (weak reference to the whole, start, bytes)
        self._count = 0

    def allocate(self, nbytes: int) -> np.ndarray:
        """`nbytes` uninitialised bytes at a multiple of ALIGNMENT."""
        refuse_capture("allocating memory")
        whole = np.empty(nbytes + 2 * GUARD + ALIGNMENT, np.uint8)
        start = GUARD - (address_of(whole) + GUARD) % ALIGNMENT + ALIGNMENT
        for guard in (whole[:start], whole[start + nbytes :]):
            guard.fill(0xFF)
            self._tell_sanitizer("__asan_poison_memory_region", address_of(guard), guard.nbytes)
        self.used += nbytes
        self._count += 1
        self._allocations[self._count] = weakref.ref(whole), start, nbytes
        weakref.finalize(whole, self._release, self._count, address_of(whole), whole.nbytes)
        return whole[start : start + nbytes]

    def holds(self, address: int, nbytes: int) -> bool:
        """Whether so many bytes from that address on are inside of one allocation."""
        for reference, start, size in list(self._allocations.values()):
            whole = reference()
            if whole is not None and 0 <= address - address_of(whole) - start <= size - nbytes:
                return True
        return False

    def stray_stores(self) -> list[str]:
        """Where guards were overwritten, in words; each is told once."""
        found = []
        for reference, start, nbytes in list(self._allocations.values()):
            whole = reference()
            if whole is None or self._sanitizer:
                continue
            for guard, where in ((whole[start - GUARD : start], "in front of"), (whole[start + nbytes :], "behind")):
                if guard[:GUARD].tobytes() != GUARD_BYTES:
                    found.append(f"{where} an array of {nbytes} bytes")
                    guard.fill(0xFF)
        return found

    def _release(self, number: int, address: int, nbytes: int) -> None:
        self.used -= self._allocations.pop(number)[2]
        self._tell_sanitizer("__asan_unpoison_memory_region", address, nbytes)

    def _tell_sanitizer(self, function: str, address: int, nbytes: int) -> None:
        if self._sanitizer:
            getattr(self._sanitizer, function)(ctypes.c_void_p(address), ctypes.c_size_t(nbytes))


def address_of(values: np.ndarray) -> int:
    return values.__array_interface__["data"][0]
