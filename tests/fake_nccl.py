"""Ranks on emulated GPUs: as much of cupy.cuda.nccl as kernels/cuda/runtime/nccl.py uses, checked as CuPy and NCCL do.

What ranks give each other goes by Ranks.gather, which is MPI's in processes (run_ranks.py), and a barrier's in threads.
"""

import ctypes
import threading
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
from cuda_emulator.memory import enqueue, refuse_capture
from cuda_emulator.runtime import EmulatedRuntime

from kernels.cuda.runtime import nccl, runtime
from kernels.driver import NoDevice, Place
from llmc.ranks import Ranks

UNIQUE_ID_BYTES = 128  # nccl.h
TIMEOUT = 60  # seconds that a thread waits for the others


class NcclError(RuntimeError):
    """As CuPy's."""


def refuse_but(kind: type, **arguments) -> None:
    """What Cython refuses: a parameter of a C type that is given something else."""
    for name, value in arguments.items():
        if type(value) is not kind:
            raise TypeError(f"{name}: expected {kind.__name__}, got {type(value).__name__}")


class NcclCommunicator:
    """A rank of cupy.cuda.nccl.NcclCommunicator. calls: (count, stream) of each sum, as it was told; None: a group's
    end."""

    def __init__(self, ndev, commId, rank):
        refuse_but(int, ndev=ndev, rank=rank), refuse_but(bytes, commId=commId)
        self._ranks, self._gpu, self.calls = current.ranks, current.gpu, []
        met = self._ranks.gather((ndev, commId, rank, self._gpu.place))
        others = [other for number, other in enumerate(met) if number != self._ranks.rank]
        if len(commId) != UNIQUE_ID_BYTES or not 0 <= rank < ndev == len(met) or {one[1] for one in met} != {commId}:
            raise NcclError("NCCL_ERROR_INVALID_ARGUMENT: invalid argument (run with NCCL_DEBUG=WARN for details)")
        if any(other[2] == rank or other[3] == self._gpu.place for other in others):  # Duplicate GPU detected
            raise NcclError("NCCL_ERROR_INVALID_USAGE: invalid usage (run with NCCL_DEBUG=WARN for details)")
        current.communicator = self

    def allReduce(self, sendbuf, recvbuf, count, datatype, op, stream):
        self._check(sendbuf, recvbuf, count, datatype, stream, op=op)
        self._together(sendbuf, recvbuf, count, stream, lambda parts: sum(parts[1:], start=parts[0]))

    def reduce(self, sendbuf, recvbuf, count, datatype, op, root, stream):
        self._check(sendbuf, recvbuf, count, datatype, stream, op=op, root=root)
        takes = root == self._ranks.rank  # the others' receive buffers stay as they are
        self._together(sendbuf, recvbuf, count, stream, lambda parts: sum(parts[1:], start=parts[0]) if takes else None)

    def broadcast(self, sendbuff, recvbuff, count, datatype, root, stream):
        self._check(sendbuff, recvbuff, count, datatype, stream, root=root)
        self._together(sendbuff, recvbuff, count, stream, lambda parts: parts[root])

    def _check(self, given, taken, count, datatype, stream, op=0, root=0):
        refuse_but(int, given=given, taken=taken, count=count, datatype=datatype, op=op, root=root, stream=stream)
        fits = stream in self._gpu.streams and count >= 0 and 0 <= root < self._ranks.size
        if (datatype, op) != (NCCL_FLOAT32, NCCL_SUM) or not fits:
            raise NcclError("NCCL_ERROR_INVALID_ARGUMENT: invalid argument (run with NCCL_DEBUG=WARN for details)")
        for address in (given, taken):
            assert self._gpu.holds(address, 4 * count), "an illegal memory access"
        self.calls.append((count, stream))

    def _together(self, sent, received, count, stream, made_of):
        """Enqueue that `received` becomes what made_of makes of the values that all ranks sent; in a group at its end.

        Not while a graph is captured: NCCL may, with its own rules, which nothing here keeps.
        """
        refuse_capture("NCCL")
        given, taken = (
            np.ctypeslib.as_array((ctypes.c_float * count).from_address(address)) for address in (sent, received)
        )

        def meet():
            parts = self._ranks.gather(given.copy())
            assert {part.size for part in parts} == {count}  # NCCL would wait for ever
            if (made := made_of(parts)) is not None:
                np.copyto(taken, made)

        if current.group is None:
            self._gpu.enqueue(meet, stream)
        else:
            current.group.append(lambda: self._gpu.enqueue(meet, stream))

    def abort(self):
        self._ranks = None


# all that the stand-in has of the module's names
available, NCCL_FLOAT32, NCCL_SUM = True, 7, 0  # nccl.h


def get_unique_id() -> bytes:
    return bytes(range(UNIQUE_ID_BYTES))


def groupStart():
    assert current.group is None, "groups may be nested; ours are not"
    current.group = []


def groupEnd():
    group, current.group = current.group, None
    for enqueue_one in group:
        enqueue_one()
    if current.communicator is not None:
        current.communicator.calls.append(None)


class _Current(threading.local):
    """Whose calls these are: the process's, or the thread's."""

    ranks: Ranks | None = None
    gpu = communicator = group = None


current = _Current()


class EmulatedGPU(EmulatedRuntime):
    """The emulator as one GPU of a machine, or NoDevice. events: what it did, in order.

    Its second stream is as late as may be: what is enqueued there is done when the first one waits for it.
    """

    streams = (2,)  # that NCCL may be given

    def __init__(self, tf32: bool = False, local_rank: int = 0, visible: int = 2, missing: str = ""):
        super().__init__("fast", tf32=tf32)
        if missing:
            raise NoDevice(missing)
        self.place = Place("here", f"0000:{0x3B + local_rank % visible:02x}:00", visible)
        self.events: list[str] = []
        self._late: list[Callable] = []
        current.gpu = self

    def holds(self, address: int, nbytes: int) -> bool:
        return self._memory.holds(address, nbytes)

    def launch(self, kernel, *args, **options):
        enqueue(lambda: self.events.append(kernel))
        super().launch(kernel, *args, **options)

    def enqueue(self, operation, stream: int) -> None:
        self._late.append(operation)
        self.events.append("sum")

    def second_stream(self) -> SimpleNamespace:
        return SimpleNamespace(address=2, fork=lambda: refuse_capture("making a stream wait"), join=self._join)

    def _join(self) -> None:
        refuse_capture("making a stream wait")
        late, self._late = self._late, []
        for operation in late:
            operation()
        self.events.append("join")


def install(patch: Callable, visible: int = 2, missing: Callable[[int], str] = lambda local_rank: "") -> None:
    """Emulated GPUs in the place of NVIDIA's. patch: setattr, or a monkeypatch's.

    visible: GPUs of the machine. missing: why a local rank finds none, "" if it does.
    """
    import kernels.driver

    def open_gpu(tf32=False, local_rank=0):
        return EmulatedGPU(tf32, local_rank, visible, missing(local_rank))

    patch(kernels.driver, "check_driver", lambda: None)
    patch(runtime, "Runtime", open_gpu)
    patch(nccl, "import_nccl", lambda: __import__(__name__))


class Threads:
    """Ranks that are threads: what they gather. Raises BrokenBarrierError where one does not come."""

    def __init__(self, size: int):
        self.size, self._given, self._barrier = size, [None] * size, threading.Barrier(size)

    def run(self, work: Callable[[Ranks], object]) -> list:
        """What work(ranks) returns, or the exception that it raises, of each rank."""
        found: list = [None] * self.size

        def begin(rank):
            current.ranks = Ranks(_Comm(self, rank), rank)
            try:
                found[rank] = work(current.ranks)
            except Exception as error:
                found[rank] = error

        threads = [threading.Thread(target=begin, args=(rank,), daemon=True) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(TIMEOUT)
        assert not any(thread.is_alive() for thread in threads), "ranks wait for each other"
        return found

    def gather(self, rank: int, what) -> list:
        self._given[rank] = what
        self._barrier.wait(TIMEOUT / 2)
        found = list(self._given)
        self._barrier.wait(TIMEOUT / 2)
        return found


class _Comm:
    """What Ranks asks of a communicator of mpi4py."""

    def __init__(self, threads: Threads, rank: int):
        self._threads, self._rank = threads, rank

    def Get_rank(self) -> int:
        return self._rank

    def Get_size(self) -> int:
        return self._threads.size

    def allgather(self, what) -> list:
        return self._threads.gather(self._rank, what)
