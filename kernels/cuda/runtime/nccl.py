"""Sums over the GPUs of several processes: all that this project asks of NCCL, through CuPy.

    cupy.cuda.nccl: available, get_unique_id(), NCCL_FLOAT32, NCCL_SUM
    cupy.cuda.nccl.NcclCommunicator(ndev, commId, rank)
    cupy.cuda.nccl.NcclCommunicator: allReduce(sendbuf, recvbuf, count, datatype, op, stream), abort()
    cupy.cuda.nccl.NcclCommunicator: reduce(sendbuf, recvbuf, count, datatype, op, root, stream)
    cupy.cuda.nccl.NcclCommunicator: broadcast(sendbuff, recvbuff, count, datatype, root, stream)

A sum is enqueued on the runtime's stream, as kernels and graphs are, and is part of no graph. A step is, on that stream

    forward, backward (graphs), for each micro-step | sum | update (a graph) | with ZeRO the parts of the parameters

so the sum begins when the last backward has ended, and the update when the sum has; the host waits for none of them. To
overlap it with backward, as train_gpt2.cu does, would take a second stream, the gradients of a layer side by side in
memory (or a call for each of its tensors, in a group), an event behind each layer for the sum to wait for, and backward
as a graph for each layer, or NCCL's calls inside of one graph.
"""

import atexit
import warnings

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
        self._bucket_by_bucket(array, slice(0, array.size), self._nccl.allReduce, self._sum)
        with explained("the first sum by NCCL"):
            found = self._runtime.to_host(array).tolist()
        expected = ranks.size * (ranks.size + 1) / 2
        if found != [expected] * 3:
            raise _nccl_error("adding up", RuntimeError(f"NCCL computed {found}, expected {expected}"))

    def add_up(self, array, ranks) -> None:
        """Enqueue array += those of all other ranks, in float32, the same bits in each; with ZeRO this rank's part.

        In place, a bucket after the other, on the runtime's stream. Every rank calls it, with as many values. Raises
        TypeError for what is no contiguous float32 array of the GPU, CudaError.
        """
        self._check(array)
        if not ranks.zero:
            self._bucket_by_bucket(array, slice(0, array.size), self._nccl.allReduce, self._sum)
            return
        for root, part in enumerate(ranks.parts(array.size)):
            self._bucket_by_bucket(array, part, self._nccl.reduce, self._sum, root)

    def share_parts(self, array, ranks) -> None:
        """Enqueue that each rank's part of array becomes all ranks'. As add_up."""
        self._check(array)
        for root, part in enumerate(ranks.parts(array.size)):
            self._bucket_by_bucket(array, part, self._nccl.broadcast, root)

    def _check(self, array) -> None:
        if not self._runtime.is_array(array) or array.dtype != np.float32 or not array.flags.c_contiguous:
            raise TypeError(f"add_up: {shown(array)}, expected contiguous float32 on {self._runtime.name}")

    def _bucket_by_bucket(self, array, part: slice, call, *arguments: int) -> None:
        """Enqueue call(address, address, count, float32, *arguments, stream) over a part of the array."""
        for start in range(part.start, part.stop, BUCKET):
            address, count = array.data.ptr + array.dtype.itemsize * start, min(BUCKET, part.stop - start)
            try:
                call(address, address, count, self._float32, *arguments, self._runtime.stream)
            except RuntimeError as error:
                raise _nccl_error(f"adding up {shown(array)}", error) from None


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
