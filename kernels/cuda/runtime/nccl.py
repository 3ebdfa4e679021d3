"""Sums over the GPUs of several processes: all that this project asks of NCCL, through CuPy.

    cupy.cuda.nccl: available, get_unique_id(), NCCL_FLOAT32, NCCL_SUM, groupStart(), groupEnd()
    cupy.cuda.nccl.NcclCommunicator(ndev, commId, rank)
    cupy.cuda.nccl.NcclCommunicator: allReduce(sendbuf, recvbuf, count, datatype, op, stream), abort()
    cupy.cuda.nccl.NcclCommunicator: reduce(sendbuf, recvbuf, count, datatype, op, root, stream)
    cupy.cuda.nccl.NcclCommunicator: broadcast(sendbuff, recvbuff, count, datatype, root, stream)

A sum is enqueued on a stream of its own, and is part of no graph. In the last micro-step of an update that of a layer
begins as soon as backward is through with the layer, as in train_gpt2.cu, and goes on beside the layers below it:

    kernels   backward: head | layer L-1 | layer L-2 | ... | layer 0 | embedding |           | update
    NCCL                                 | layer L-1 | ...           | layer 0   | the rest  | with ZeRO the parameters

An update waits for all sums, a sum for what the kernels' stream was given before it, the host for nothing. Where
backward is a graph, it is one for each of these pieces.
"""

import atexit
import warnings
from contextlib import contextmanager

import numpy as np

from kernels.cuda.runtime.runtime import CudaError, explained, one_line, shown
from kernels.driver import NoDevice
from llmc.errors import UserError

BUCKET = 1 << 24  # values in one call: 64 MiB
HINT = "pip install nvidia-nccl-cu12 (-cu13 for cupy-cuda13x), or --device cpu"


def import_nccl():
    """CuPy's NCCL. Raises NoDevice where CuPy finds none."""
    with warnings.catch_warnings(record=True) as told:  # CuPy warns, and says why in it
        warnings.simplefilter("always")
        try:
            from cupy.cuda import nccl
        except Exception as error:  # a CuPy that was built without it
            raise NoDevice(f"CuPy has no NCCL: {one_line(error)}", HINT) from error
    if not nccl.available:
        lines = [line.strip() for warning in told for line in str(warning.message).splitlines()]
        why = next((line.removeprefix("Reason:") for line in lines if line.startswith("Reason:")), "")
        raise NoDevice(f"CuPy finds no NCCL{why and ':'}{why}", HINT)
    return nccl


class Communicator:
    """This process and its GPU among those that train together."""

    def __init__(self, runtime, ranks):
        """runtime: this process's, each with another GPU. ranks: llmc.ranks.Ranks, by which the first tells NCCL's id.

        Waits for all ranks, and tries a sum. Raises CudaError; the process must end then, as others may wait for it.
        """
        nccl = import_nccl()
        self._runtime, self._float32, self._sum = runtime, nccl.NCCL_FLOAT32, nccl.NCCL_SUM
        self._group_start, self._group_end = nccl.groupStart, nccl.groupEnd
        self._stream = runtime.second_stream()
        self._begun: dict[int, list[slice]] = {}  # by address of an array: what of it adds up already
        (unique_id, *_) = ranks.gather(_unique_id(nccl) if ranks.rank == 0 else None)
        if isinstance(unique_id, UserError):  # which every rank raises
            raise unique_id
        try:
            self._nccl = nccl.NcclCommunicator(ranks.size, unique_id, ranks.rank)
        except RuntimeError as error:
            raise _nccl_error(f"connecting the GPUs of {ranks.size} processes", error) from None
        # not destroyed: that may wait for a rank that has ended. all sums are done by then
        atexit.register(self._nccl.abort)
        self._probe(ranks)

    def _probe(self, ranks) -> None:
        """A small sum of all, exact in float32. Raises CudaError if wrong."""
        array = self._runtime.to_device(np.full(3, ranks.rank + 1, np.float32))
        with self._group(array):
            self._bucket_by_bucket(array, slice(0, array.size), self._nccl.allReduce, self._sum)
        self._stream.join()
        with explained("the first sum by NCCL"):
            found = self._runtime.to_host(array).tolist()
        expected = ranks.size * (ranks.size + 1) / 2
        if found != [expected] * 3:
            raise _nccl_error("adding up", RuntimeError(f"NCCL computed {found}, expected {expected}"))

    def begin(self, array, views, ranks) -> None:
        """Enqueue add_up for these views of the array, without overlap, which nobody touches until add_up of it all.

        They wait for what the runtime's stream was given so far, and for nothing that it is given from now on. Every
        rank calls it with the same views. Raises TypeError as add_up, ValueError for what has begun, CudaError.
        """
        self._check(array)
        begins = [(view.data.ptr - array.data.ptr) // array.dtype.itemsize for view in views]
        parts = [slice(begin, begin + view.size) for begin, view in zip(begins, views)]
        begun = self._begun.setdefault(array.data.ptr, [])
        for part in parts:
            if any(part.start < other.stop and other.start < part.stop for other in begun):
                raise ValueError(f"begin: {part} of {shown(array)} has begun, and add_up has not ended it")
            begun.append(part)
        self._add_up(array, parts, ranks)

    def add_up(self, array, ranks) -> None:
        """Enqueue array += those of all other ranks, in float32, the same bits in each; with ZeRO this rank's part.

        In place, of what has not begun; what the runtime's stream is given from now on waits for all of it. Every rank
        calls it, with as many values. Raises TypeError for what is no contiguous float32 array of the GPU, CudaError.
        """
        self._check(array)
        self._add_up(array, rest_of(array.size, self._begun.pop(array.data.ptr, [])), ranks)
        self._stream.join()

    def _add_up(self, array, parts: list[slice], ranks) -> None:
        with self._group(array):
            for part in parts:
                if not ranks.zero:
                    self._bucket_by_bucket(array, part, self._nccl.allReduce, self._sum)
                    continue
                for root, own in enumerate(ranks.parts(array.size)):
                    both = slice(max(part.start, own.start), min(part.stop, own.stop))
                    self._bucket_by_bucket(array, both, self._nccl.reduce, self._sum, root)

    def share_parts(self, array, ranks) -> None:
        """Enqueue that each rank's part of array becomes all ranks'. As add_up."""
        self._check(array)
        with self._group(array):
            for root, part in enumerate(ranks.parts(array.size)):
                self._bucket_by_bucket(array, part, self._nccl.broadcast, root)
        self._stream.join()

    def _check(self, array) -> None:
        if not self._runtime.is_array(array) or array.dtype != np.float32 or not array.flags.c_contiguous:
            raise TypeError(f"add_up: {shown(array)}, expected contiguous float32 on {self._runtime.name}")

    @contextmanager
    def _group(self, array):
        """What is called inside is launched as one, behind all that the runtime's stream was given."""
        self._stream.fork()
        try:
            self._group_start()
            yield
            self._group_end()
        except RuntimeError as error:
            raise _nccl_error(f"adding up {shown(array)}", error) from None

    def _bucket_by_bucket(self, array, part: slice, call, *arguments: int) -> None:
        """call(address, address, count, float32, *arguments, stream) over a part of the array."""
        for start in range(part.start, part.stop, BUCKET):
            address, count = array.data.ptr + array.dtype.itemsize * start, min(BUCKET, part.stop - start)
            call(address, address, count, self._float32, *arguments, self._stream.address)


def rest_of(size: int, parts: list[slice]) -> list[slice]:
    """What `parts` of `size` values, none of which overlap, leave out."""
    found, end = [], 0
    for part in (*sorted(parts, key=lambda part: part.start), slice(size, size)):
        if end < part.start:
            found.append(slice(end, part.start))
        end = part.stop
    return found


def _unique_id(nccl):
    """What NCCL's communicators find each other by; an error is returned, for all ranks to raise."""
    try:
        return nccl.get_unique_id()
    except RuntimeError as error:
        return _nccl_error("making an id", error)


def _nccl_error(what: str, error: Exception) -> CudaError:
    return CudaError(
        f"NCCL, {what}: {one_line(error)}", "NCCL_DEBUG=WARN before the command says more, or --device cpu"
    )
