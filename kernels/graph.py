"""A model's calls as CUDA graphs: what they launch is recorded once, and from then on launched as a whole.

A GPU does the launches of a small step faster than a host can make them: each costs the host some 10 us. A graph is one
launch, and nothing in it can change: what does (tokens, learning rate, the step's number) is in arrays of the device,
which are written before. Kernels, their order and their bits are the same either way.
"""

import sys
from collections.abc import Callable

from kernels.device import Device
from llmc.errors import UserError


class Replay:
    """replay(work, *args) does work(*args): at first as it is, the second time into a graph, then by that graph.

    work tells the device what to do, and that alone: it copies nothing to or from the host and makes no arrays after
    its first time; what it depends on besides args does not change. It must be idempotent on the host. On a CPU, and
    where device.graph is "0", it is called each time.
    """

    def __init__(self, device: Device):
        self._device, self._graphs, self._captures = device, {}, device.graph != "0"

    def __call__(self, work: Callable[..., None], *args) -> None:
        """Raises UserError where a graph must be and cannot."""
        key = work.__name__, args
        if key in self._graphs:
            if self._graphs[key] is None:
                self._graphs[key] = self._captured(work, args)
            self._graphs[key]()
        else:
            work(*args)
            if self._captures:
                self._graphs[key] = None

    def _captured(self, work: Callable[..., None], args: tuple) -> Callable[[], None]:
        """work(*args) as a graph; as it is, with a line on stderr the first time, where the GPU cannot."""
        if self._captures:
            try:
                return self._device.capture(lambda: work(*args))
            except UserError as error:
                if self._device.graph == "1":
                    raise UserError(f"--graph 1: {error.message}", "--graph auto") from None
                self._captures = False
                print(f"no CUDA graphs, kernels are launched one by one: {error.message}", file=sys.stderr)
        return lambda: work(*args)
