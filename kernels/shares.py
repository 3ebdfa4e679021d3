"""A batch in shares: rows of their own for several processes, which meet a few times a step.

What a small model's step waits for on a CPU is not arithmetic. Two BLAS threads meet at every product, most of what
lies between products is too short to be cut up, and threads of Python meet at each of its calls. Processes that share
nothing but parameters and gradients wait for nothing, and all that a share does fits its core's cache better. It costs
a buffer of gradients for every share but the first.

The first share is this process's. The others are forked from it at the first call, with all that models hold, and end
with it: whatever ends it closes the pipes that they listen to.
"""

import mmap
import os
import signal
import sys
import weakref
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from math import prod
from multiprocessing import Pipe
from types import SimpleNamespace

import numpy as np

from kernels import cpu
from kernels.cpu.blocks import alone, num_threads, sets_blas_threads
from kernels.device import NAMES
from llmc.buffers import told_together
from llmc.errors import UserError

# measured on 2 cores, times as fast as one share, whose products have two BLAS threads. by tokens times channels of a
# share: 4096 0.85 and 0.87, 8192 0.94, 16384 0.93 to 1.20, 32768 1.10 to 1.88, more 1.13 to 1.31. by parameters for a
# token of a share, with V = 50257 or C = 768: 28,000 1.10, 57,000 1.07, 243,000 1.06, 330,000 0.93, 400,000 0.99,
# 970,000 0.96
VALUES = 1 << 14  # tokens times channels of a share: below it shares wait for each other more than they work
PARAMETERS = 1 << 17  # of the model for a token of a share: each share writes all their gradients
ALONE = "memory may be short: with OPENBLAS_NUM_THREADS=1 before the command one process does it all"


def share_rows(device, B: int, T: int, C: int, num_params: int) -> list[int]:
    """How many of B rows of T tokens each share has: about as many each core's, or all of them one share.

    The only place that decides; by sizes and the number of cores, so that a command gives the same bits every time.
    """
    # of another BLAS than OpenBLAS, each share's products would take all cores
    cores = num_threads() if device is cpu and sys.platform == "linux" and sets_blas_threads() else 1
    shares = min(cores, B)
    tokens = B * T // shares
    if tokens * C < VALUES or num_params > PARAMETERS * tokens:
        shares = 1
    return [B * (k + 1) // shares - B * k // shares for k in range(shares)]


class Shares:
    """Models with the same parameters, each for its rows of a batch; the first one's gradients are those of all.

    Of a model it needs B, acts, grads_flat, allocate_activations, allocate_gradients, forward, backward, mean_loss and
    losses.
    What is done to a model here reaches the others up to the first call, later through its parameters alone.
    """

    def __init__(self, device, rows: list[int], make: Callable):
        """make(device, B): a model for B rows. rows: B of each share."""
        device = with_shared_memory(device) if len(rows) > 1 else device
        self.models, self.B = [make(device, B) for B in rows], sum(rows)
        ends = np.cumsum(rows).tolist()
        self.rows = [slice(end - B, end) for B, end in zip(rows, ends)]
        self._pipes = []  # to all shares but the first, from their start on

    def forward(self, inputs: np.ndarray, targets: np.ndarray | None = None, grad_accum: int = 1, **phase) -> None:
        """As the model's: inputs, targets (B,T). The mean is over all B rows."""
        given = [inputs] if targets is None else [inputs, targets]
        self.each(
            *(
                partial(_call, "forward", *(array[rows] for array in given), **self._scaled(k, phase, grad_accum))
                for k, rows in enumerate(self.rows)
            )
        )

    def backward(self, first: bool = True, *stages: bool, **phase) -> None:
        """As the model's, then the sum of all shares' gradients."""
        self.each(
            *(
                partial(_call, "backward", first if k == 0 else True, *stages, **self._scaled(k, phase))
                for k in range(len(self.models))
            )
        )
        if len(self.models) > 1:
            self.each(*len(self.models) * [_add_up])

    def mean_loss(self) -> float:
        """As the model's, over all rows."""
        return self.mean("mean_loss")

    def losses(self) -> np.ndarray:
        """As the model's: (B*T) of all rows."""
        return np.concatenate(self.each(*len(self.models) * [partial(_call, "losses")]))

    def mean(self, of: str) -> float:
        """The mean over all rows of what a model's method of that name returns, a mean over its rows."""
        found = self.each(*len(self.models) * [partial(_call, of)])
        return sum(value * model.B for value, model in zip(found, self.models)) / self.B

    def memory_used(self) -> int:
        """Bytes of memory in use, by all processes together."""
        return sum(self.each(*len(self.models) * [_memory_used]))

    def each(self, *commands: Callable) -> list:
        """[command(self, k) for the k-th share, all at the same time]; they are pickled. Raises what one raises."""
        if len(self.models) == 1:
            return [commands[0](self, 0)]
        if not self._pipes:
            self._start()
        for pipe, command in zip(self._pipes, commands[1:]):
            with suppress(BrokenPipeError):  # its process has ended, as the answer tells
                pipe.send(command)
        try:
            with alone():
                found = [(True, commands[0](self, 0))]
        finally:  # also then: their answers would be taken for the next ones
            others = [self._answer(pipe) for pipe in self._pipes]
        for well, answer in (*found, *others):
            if not well:
                raise answer
        return [answer for _, answer in (*found, *others)]

    def _scaled(self, k: int, phase: dict, grad_accum: int | None = None) -> dict:
        """The arguments of a share, whose mean is over fewer rows."""
        grad_accum = phase.get("grad_accum", grad_accum)
        return phase if grad_accum is None else phase | dict(grad_accum=grad_accum * self.B / self.models[k].B)

    def _start(self) -> None:
        with told_together():  # gradients are in memory that all have
            for model in self.models:
                if model.acts is None:
                    model.allocate_activations()
                if model.grads_flat is None:
                    model.allocate_gradients()
        pids = []
        for k in range(1, len(self.models)):
            ours, theirs = Pipe()
            try:
                pid = os.fork()
            except OSError as error:
                raise UserError(f"a process for a share of the batch: {error.strerror}", ALONE) from None
            if not pid:
                try:  # whatever happens, this process must not go on with what the first share's does
                    # a pipe that another one has open as well would not close with the first share's; nor would files
                    os.closerange(3, theirs.fileno())
                    os.closerange(theirs.fileno() + 1, os.sysconf("SC_OPEN_MAX"))
                    self._listen(k, theirs)
                finally:
                    os._exit(1)
            theirs.close()
            self._pipes.append(ours)
            pids.append(pid)
        weakref.finalize(self, _end, self._pipes, pids)

    def _listen(self, k: int, pipe) -> None:
        """What a share's process does all its life. A signal to the whole group is the first share's to answer."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        with alone():
            while True:
                try:
                    command = pipe.recv()
                except (EOFError, OSError):
                    os._exit(0)
                try:
                    answer = True, command(self, k)
                except Exception as error:
                    answer = False, error
                try:
                    pipe.send(answer)
                except BrokenPipeError:
                    os._exit(0)

    def _answer(self, pipe) -> tuple:
        try:
            return pipe.recv()
        except (EOFError, OSError):
            return False, UserError("a process that had a share of the batch has ended", ALONE)


def _call(name: str, *args, **named):
    """A command: the method of a share's model."""
    *args, shares, k = args
    return getattr(shares.models[k], name)(*args, **named)


def _memory_used(shares: Shares, k: int) -> int:
    """A command."""
    return shares.models[k].ops.memory_used()


def _add_up(shares: Shares, k: int) -> None:
    """A command: a share's part of the sum of all gradients."""
    total, *others = (model.grads_flat for model in shares.models)
    size, count = len(total), len(shares.models)
    part = slice(size * k // count, size * (k + 1) // count)
    for grads in others:
        total[part] += grads[part]


def _end(pipes: list, pids: list[int]) -> None:
    for pipe in pipes:
        pipe.close()
    for pid in pids:
        os.waitpid(pid, 0)


def with_shared_memory(device):
    """A device like `device`, whose new arrays are the same memory in this process and in those forked from it."""
    copies = {}  # id of an array: the array and its copy

    def zeros(shape, *dtype) -> np.ndarray:
        like = device.zeros(0, *dtype)
        shape = tuple(np.atleast_1d(shape).tolist())
        return np.ndarray(shape, like.dtype, mmap.mmap(-1, max(1, prod(shape) * like.itemsize)))

    def to_device(array: np.ndarray) -> np.ndarray:
        if id(array) not in copies:
            copies[id(array)] = array, zeros(array.shape, array.dtype)
            copies[id(array)][1][...] = array
        return copies[id(array)][1]

    return SimpleNamespace(**{name: getattr(device, name) for name in NAMES} | dict(zeros=zeros, to_device=to_device))
