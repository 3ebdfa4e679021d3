"""Ctrl-C and SIGTERM let a training loop finish its step and save; a further Ctrl-C stops at once."""

import contextlib
import os
import signal
import threading

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupt:
    """Hold back SIGINT and SIGTERM while the block runs.

        with Interrupt() as interrupt:
            for step in range(steps):
                ...
                if interrupt.signal:
                    save(); break
        return interrupt.exit_code

    doing: what the first signal is answered with. signal: None, or the number of the first signal. A signal that was
    ignored before (nohup, a shell's background job) stays ignored. Only the main thread may set handlers; in any other
    the block runs without.
    """

    def __init__(self, doing: str = "finishing this step"):
        self.signal: int | None = None
        self._doing, self._previous = doing, {}

    @property
    def exit_code(self) -> int:
        """What a shell reports for the signal: 130 for SIGINT, 143 for SIGTERM; 0 without one."""
        return 0 if self.signal is None else 128 + self.signal

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) != signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: set by C code, which Python cannot restore

    def _handle(self, number, frame) -> None:
        if self.signal is None:
            self.signal = number
        # by the system's own action the next one stops the process even inside a long BLAS call. a second SIGTERM is
        # ignored: make passes on the one that its process group got as well, and the save must outlive both
        for other in self._previous:
            signal.signal(other, signal.SIG_IGN if other == number == signal.SIGTERM else signal.SIG_DFL)
        again = "again " if number == signal.SIGINT else ""
        text = f"{self._doing}; press Ctrl-C {again}to stop at once\n"
        with contextlib.suppress(OSError):  # not print: the handler may have cut into a print on the same stream
            os.write(2, (("\n" if os.isatty(2) else "") + text).encode())
