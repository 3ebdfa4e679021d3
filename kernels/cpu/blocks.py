"""Row blocks: elementwise chains run on blocks that stay in the cache, spread over the cores.

NumPy releases the interpreter lock inside its loops, so plain threads scale. Block boundaries depend on sizes alone and
every block writes its own rows, so the number of threads never changes a bit of the result.
"""

import ctypes
import os
import re
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from importlib.util import find_spec
from math import prod

import numpy as np

# bytes of one operand in a block. measured on 2 cores with 1 MiB of L2 each and 32 MiB of shared L3: a NumPy call costs
# 2 us and the interpreter lock changes hands at each, so 2 MiB is 1.5 (classifier) to 4 times (AdamW) as fast as 64 KiB
BLOCK_BYTES = 1 << 21
# bytes of the largest operand from which on a second thread pays: waking it takes 0.1 ms on a virtual machine
PARALLEL_BYTES = 1 << 23

_local = threading.local()  # scratch buffers, and whether this thread is at work on a block
_workers: list[ThreadPoolExecutor] = []  # one thread each: a share always meets the same scratch buffers
_turn = threading.Lock()  # held by the thread whose blocks are at work: there is one set of workers and of BLAS threads


def _forget_threads() -> None:
    """In the child of a fork: the parent's threads are not there, and would never take a share nor release a turn."""
    global _local, _turn
    _workers.clear()
    _local, _turn = threading.local(), threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def num_threads() -> int:
    """Threads for elementwise work: OPENBLAS_NUM_THREADS or OMP_NUM_THREADS if set, and the usable cores at most.

    As OpenBLAS reads them for its products: the digits in front, 0 is no number, and no more than there are cores.
    """
    cores = usable_cores()
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
        found = re.match(r"\s*\+?([0-9]{1,9})", os.environ.get(name, ""))
        if found and int(found[1]) > 0:
            return min(int(found[1]), cores)
    return cores


def scratch(key: str, shape: tuple[int, ...], dtype) -> np.ndarray:
    """A buffer of this thread's own, kept from call to call and grown when needed; contents are undefined."""
    buffers = _local.__dict__
    size = prod(shape)
    buffer = buffers.get((key, dtype))
    if buffer is None or buffer.size < size:
        buffer = buffers[key, dtype] = np.empty(size, dtype)
    return buffer[:size].reshape(shape)


def rows_per_block(rows: int, row_floats: int) -> int:
    """Rows of `row_floats` float32 values in a block, such that `rows` make blocks of about equal size, an even number.

    One block if all of it fits. Depends on the sizes alone, not on the number of threads.
    """
    size = 4 * row_floats * rows
    blocks = 2 * -(-size // (2 * BLOCK_BYTES)) if size > BLOCK_BYTES else 1
    return -(-rows // blocks)


def _openblas():
    """(set, get): the functions for the number of threads of the OpenBLAS that NumPy uses; None if it uses another."""
    try:
        library = ctypes.CDLL(find_spec("numpy.linalg._umath_linalg").origin)
    except (AttributeError, OSError):  # there is no such module, or it cannot be opened this way
        return None
    for prefix, suffix in (("scipy_", "64_"), ("scipy_", ""), ("", "64_"), ("", "")):
        set_threads, get_threads = (f"{prefix}openblas_{verb}_num_threads{suffix}" for verb in ("set", "get"))
        if hasattr(library, set_threads):
            return getattr(library, set_threads), getattr(library, get_threads)
    return None


_blas = _openblas()


def sets_blas_threads() -> bool:
    """Whether products can be told to stay in the thread that asks for them."""
    return _blas is not None


@contextmanager
def _one_blas_thread():
    """OpenBLAS multiplies in the thread that calls it.

    Left alone it would cut each of the small products of attention in pieces for its own threads and take them one
    after another, whoever asks: twice as long on a quiet machine and up to a hundred times on a busy one.
    """
    if _blas is None:
        yield
        return
    set_threads, get_threads = _blas
    before = get_threads()
    set_threads(1)
    try:
        yield
    finally:
        set_threads(before)


@contextmanager
def alone():
    """All in one thread of this process, which another one has its own of: products, and blocks one after another."""
    with _turn, _one_blas_thread():
        inside, _local.inside = getattr(_local, "inside", False), True
        try:
            yield
        finally:
            _local.inside = inside


def for_blocks(work: Callable[[int, int], None], rows: int, block: int, row_floats: int = 1) -> None:
    """Call work(start, stop) for each block of rows, on all cores if `rows` of `row_floats` values are enough.

    Threads take blocks in turn, so blocks may grow or shrink from first to last. What is all one block leaves the cores
    to BLAS. Inside `work` a further call runs in place, in the thread that calls: the cores are taken, and a worker
    that waited for workers would wait for itself. Raises what `work` raises, once no thread is at work any more; the
    other shares are finished by then.
    """
    starts = range(0, rows, block)
    inside = getattr(_local, "inside", False)
    parallel = not inside and 4 * row_floats * rows >= PARALLEL_BYTES
    threads = min(num_threads(), len(starts)) if parallel else 1

    def share(first):
        _local.inside = inside or len(starts) > 1
        try:
            for start in starts[first::threads]:
                work(start, min(start + block, rows))
        finally:
            _local.inside = inside  # as it was: a worker is outside when it is given a share

    if inside or len(starts) <= 1:
        share(0)
        return
    with _turn, _one_blas_thread():
        others = []
        try:
            for first in range(1, threads):
                if len(_workers) < first:
                    _workers.append(ThreadPoolExecutor(1, thread_name_prefix="kernels.cpu"))
                others.append(_workers[first - 1].submit(share, first))
            share(0)
        finally:
            _wait_for(others)
        for other in others:
            other.result()


def _wait_for(shares: list[Future]) -> None:
    """Wait until all are done, also through a Ctrl-C, which is raised then: each takes milliseconds."""
    try:
        wait(shares)
    except KeyboardInterrupt:
        wait(shares)
        raise
