"""Programs that are timed beside each other: each a process of its own, which works when it is its turn."""

import os
import subprocess
import sys
import time
from collections.abc import Iterable

from llmc.errors import UserError

SETTLE = 0.02  # seconds between turns: the threads of a BLAS spin a while before they sleep
OVERRIDES = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")  # of what OpenBLAS finds out about the processor


def start(script: str, *arguments) -> subprocess.Popen:
    """A worker: `script` with these arguments, that answers every line it is sent with a line of numbers."""
    environment = {name: value for name, value in os.environ.items() if name not in OVERRIDES}
    command = [sys.executable, script, *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def turn(worker: subprocess.Popen, request: str = "") -> list[float]:
    """Send a worker a line and return its numbers. Raises UserError if it ended."""
    time.sleep(SETTLE)
    worker.stdin.write(f"{request}\n")
    worker.stdin.flush()
    answer = worker.stdout.readline()
    if not answer:
        raise UserError(f"{' '.join(worker.args)}: stopped without an answer", "its own message is above")
    return [float(word) for word in answer.split()]


def stop(workers: Iterable[subprocess.Popen]) -> None:
    """Let workers end."""
    for worker in workers:
        worker.stdin.close()
        worker.wait()
