"""Several processes that train one model together: who is who, and what they tell each other, by MPI.

    mpiexec -n 2 python train_banded.py -e model.bin -b 4        # two ranks of four rows each, a batch of eight

Every rank has the whole model and rows of its own. What they agree on before an update, the sum of the gradients, is
the same in all of them to the bit, and so are the weights. Without mpiexec nothing is imported, and nothing changes. On
GPUs, one a rank, gradients add up by NCCL (Device.all_reduce), all else by MPI.
Source: train_gpt2.cu and llmc/zero.cuh, for what is per rank and what of all.
"""

import math
import os
import sys
import time
from collections.abc import Iterable
from typing import Any, TextIO

import numpy as np

from llmc import errors
from llmc.errors import UserError

# what a launcher tells each process: how many there are, in all and on this machine
COUNTS = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS", "WORLD_SIZE")
LOCAL_RANKS = ("OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID", "LOCAL_RANK")
BUCKET = 1 << 22  # values in one reduction: 16 MiB
ALIGN = 256  # values: a part begins where any kernel may
PATIENCE = 1.0  # seconds in which the first rank may tell an error that all have
FORWARDED = 0.3  # seconds in which mpiexec passes on what was printed: what it still has when a rank aborts is lost


def launched() -> int:
    """How many processes the launcher says it started; 1 without one."""
    counts = [int(os.environ[name]) for name in COUNTS if os.environ.get(name, "").isdigit()]
    return max(counts, default=1)


class Ranks:
    """This process, `rank` of `size`, and local_rank on its machine.

    comm: an mpi4py communicator, None for a process alone, in which every method returns what it was given. zero: each
    rank updates its part of the parameters and has AdamW's m and v of that part alone: ZeRO stage 1 (Rajbhandari et al.
    2020, arXiv 1910.02054).
    """

    def __init__(self, comm=None, local_rank: int = 0, zero: bool = False):
        self.comm, self.local_rank, self.zero = comm, local_rank, zero
        self.rank, self.size = (comm.Get_rank(), comm.Get_size()) if comm else (0, 1)
        self.overlaps = self.size > 1  # on GPUs sums begin while backward goes on
        self.stderr: TextIO | None = None  # of a rank that is silent, for its errors

    def broadcast(self, values: np.ndarray) -> None:
        """values become those of rank 0."""
        if self.comm:
            self.comm.Bcast(values)

    def part(self, size: int) -> slice:
        """The values of a flat buffer that this rank updates: all of them without ZeRO."""
        return part_of(size, self.rank, self.size) if self.zero else slice(0, size)

    def parts(self, size: int) -> list[slice]:
        """Those of all ranks, with ZeRO."""
        return [part_of(size, rank, self.size) for rank in range(self.size)]

    def add_up(self, values: np.ndarray) -> None:
        """values (n) float32 of the CPU become their sum over all ranks, the same bits in each.

        With ZeRO those of a rank's own part; its others are of no meaning afterwards.
        """
        if not self.comm:
            return
        from mpi4py import MPI

        if not self.zero:
            for start in range(0, values.size, BUCKET):
                self.comm.Allreduce(MPI.IN_PLACE, values[start : start + BUCKET])
            return
        for root, part in enumerate(self.parts(values.size)):
            for start in range(part.start, part.stop, BUCKET):
                bucket = values[start : min(start + BUCKET, part.stop)]
                sent, received = (MPI.IN_PLACE, bucket) if root == self.rank else (bucket, None)
                self.comm.Reduce(sent, received, root=root)

    def share(self, values: np.ndarray) -> None:
        """With ZeRO, where each rank has its part of `values` (n) float32: now all have all."""
        if self.comm and self.zero:
            from mpi4py import MPI

            parts = self.parts(values.size)
            sizes = [part.stop - part.start for part in parts]
            self.comm.Allgatherv(MPI.IN_PLACE, [values, sizes, [part.start for part in parts], MPI.FLOAT])

    def norm(self, x: float) -> float:
        """The norm of the whole, of which x is that of this rank's part."""
        return math.sqrt(self.total(x * x)) if self.zero else x

    def total(self, x: float) -> float:
        """The sum over all ranks of a float64."""
        return sum(self.gather(x))

    def mean(self, x: float) -> float:
        """The mean over all ranks of a float64."""
        return self.total(x) / self.size

    def gather(self, what: Any) -> list:
        """What each rank gave, in their order; anything that can be pickled."""
        return self.comm.allgather(what) if self.comm else [what]

    def meet(self) -> None:
        """Wait until all ranks are here."""
        if self.comm:
            self.comm.Barrier()


def part_of(size: int, rank: int, count: int) -> slice:
    """Which of `size` values of a flat buffer one of `count` ranks updates: about as many each, in whole rows of ALIGN.

    The last ones may have fewer, or none. llm.c cuts each tensor; then a rank's values are in many places.
    """
    each = -(-size // (count * ALIGN)) * ALIGN
    return slice(min(rank * each, size), min((rank + 1) * each, size))


ALONE = Ranks()
_opened = ALONE


def open_ranks() -> Ranks:
    """The processes that mpiexec, srun or a launcher with WORLD_SIZE started; this one alone without.

    From then on only rank 0 prints. Raises UserError if they cannot find each other.
    """
    global _opened
    count = launched()
    if count == 1:
        return Ranks()
    if _opened.size > 1:
        return _opened
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        hint = "pip install -r requirements-mpi.txt, or start one process without mpiexec"
        raise UserError(f"one of {count} processes, and mpi4py does not work here: {error}", hint) from None
    comm = MPI.COMM_WORLD
    if comm.Get_size() != count:
        found = f"the launcher started {count} processes, MPI finds {comm.Get_size()}"
        hint = "start them by the mpiexec of the MPI that mpi4py uses: python -m mpi4py --mpi-lib-version"
        raise UserError(found, hint)
    local = [int(os.environ[name]) for name in LOCAL_RANKS if os.environ.get(name, "").isdigit()]
    here = comm.Split_type(MPI.COMM_TYPE_SHARED).Get_rank() if not local else local[0]
    _opened = Ranks(comm, here)
    errors.end_others = end_all
    if _opened.rank:
        be_silent(_opened)
    return _opened


def be_silent(ranks: Ranks) -> None:
    """Whatever this process prints is lost, but for its errors."""
    sys.stdout.flush(), sys.stderr.flush()
    ranks.stderr = os.fdopen(os.dup(2), "w", buffering=1, errors="backslashreplace")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1), os.dup2(nowhere, 2)


def end_all(code: int, lines: Iterable[str] = ()) -> None:
    """End the processes of all ranks with exit status `code`: they would wait for this one for ever.

    lines: an error that a silent rank tells in its own name, unless rank 0 does so in the next second, as it does with
    one that all have.
    """
    if _opened.rank:
        time.sleep(PATIENCE)
        for line in lines:
            print(f"rank {_opened.rank}: {line}", file=_opened.stderr)
    sys.stdout.flush(), sys.stderr.flush()
    time.sleep(FORWARDED)
    _opened.comm.Abort(code)
