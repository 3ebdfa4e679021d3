"""The bar under the last line of a terminal: a training's smoothed loss, tokens a second, memory, time left."""

import contextlib
import sys
from collections.abc import Callable

SMOOTHING = 0.95  # of a mean that forgets, llm.c's for tokens a second
FORMAT = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}, {remaining} left{postfix}"


class Smoothed:
    """A mean in which a value counts 0.95 times as much as the one after it: no bias towards 0 at the start."""

    def __init__(self):
        self.sum, self.weight = 0.0, 0.0

    def add(self, x: float) -> float:
        """The mean with x as its latest value."""
        self.sum = SMOOTHING * self.sum + (1 - SMOOTHING) * x
        self.weight = SMOOTHING * self.weight + (1 - SMOOTHING)
        return self.sum / self.weight


class Progress:
    """A bar on stderr while the block runs, out of the way of what is printed between `clear` and `show`.

    mode: "1", "0", or "auto" for a bar if stdout and stderr both are terminals. memory: tells the bytes in use.
    """

    def __init__(self, mode: str, start: int, steps: int, memory: Callable[[], int]):
        self.wanted = mode == "1" or (mode == "auto" and sys.stdout.isatty() and sys.stderr.isatty())
        self.start, self.steps, self.memory, self.bar = start, steps, memory, None
        self.loss, self.rate = Smoothed(), Smoothed()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception) -> None:
        if self.bar is not None:
            with contextlib.suppress(OSError):
                self.bar.close()

    def show(self) -> None:
        """Draw the bar, at the start of a step."""
        if self.bar is not None:
            self.bar.refresh()

    def clear(self) -> None:
        """Wipe the bar away, so that a line can be printed in its place."""
        if self.bar is not None:
            self.bar.clear()

    def count(self, loss: float, rate: float) -> None:
        """A step is done, of this loss and so many tokens a second. The first one tells what it allocates: no bar."""
        if not self.wanted:
            return
        if self.bar is None:
            from tqdm import tqdm

            self.bar = tqdm(
                total=self.steps,
                initial=self.start + 1,  # whose time tells nothing of those to come
                file=sys.stderr,
                leave=False,
                dynamic_ncols=True,
                mininterval=float("inf"),  # only `show` draws it
                bar_format=FORMAT,
            )
            self.bar.clear()
        else:
            self.bar.update()
        told = f"loss {self.loss.add(loss):.4f}, {self.rate.add(rate):,.0f} tok/s, {self.memory() >> 20} MiB"
        self.bar.set_postfix_str(told, refresh=False)
