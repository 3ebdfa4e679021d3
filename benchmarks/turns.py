"""Programs that are timed beside each other: each a process of its own, which works when it is its turn."""

import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from kernels import open_device
from kernels.cpu.blocks import num_threads
from llmc.errors import UserError
from llmc.files import atomic_write

RESULTS = Path(__file__).resolve().parent / "RESULTS.md"

SETTLE = 0.02  # seconds between turns: the threads of a BLAS spin a while before they sleep
OVERRIDES = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")  # of what OpenBLAS finds out about the processor


def start(script: str, *arguments, threads: int | None = None) -> subprocess.Popen:
    """A worker: `script` with these arguments, that answers every line it is sent with a line of numbers.

    threads: of its BLAS, if not as many as there are cores.
    """
    environment = {name: value for name, value in os.environ.items() if name not in OVERRIDES}
    if threads:
        environment["OPENBLAS_NUM_THREADS"] = str(threads)
    command = [sys.executable, script, *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def turn(worker: subprocess.Popen, request: str = "") -> list[float]:
    """Send a worker a line and return its numbers. Raises UserError if it ended."""
    time.sleep(SETTLE)
    with suppress(BrokenPipeError):  # it ended
        worker.stdin.write(f"{request}\n")
        worker.stdin.flush()
    answer = worker.stdout.readline()
    if not answer:
        raise UserError(f"{' '.join(worker.args)}: stopped without an answer", "its own message is above")
    return [float(word) for word in answer.split()]


def stop(workers: Iterable[subprocess.Popen]) -> None:
    """Let workers end."""
    for worker in workers:
        with suppress(BrokenPipeError):
            worker.stdin.close()
        worker.wait()


def open_gpu():
    """The GPU as a Device. Raises UserError, one line, where there is none that works."""
    try:
        return open_device("cuda")
    except UserError as error:
        raise UserError(error.message.replace("--device cuda", "no GPU")) from None


def machine() -> str:
    """What the figures were measured on."""
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    model = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        model = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if "model name" in line), model)
    torch = f"PyTorch {version('torch')}" if find_spec("torch") else "no PyTorch"
    where = f"{model}, {num_threads()} threads, {platform.system()}"
    return (
        f"{where}; NumPy {np.__version__}, {blas['name']} {blas['version']}; {torch}; {' and '.join(OVERRIDES)} unset"
    )


def write_section(title: str, text: str, page: Path = RESULTS) -> None:
    """Put `text` under the heading `title` into a page, benchmarks/RESULTS.md, instead of what stood there."""
    old = page.read_text() if page.exists() else "# Benchmarks\n"
    rest = re.sub(rf"\n## {re.escape(title)}\n.*?(?=\n## |\Z)", "", old, flags=re.DOTALL)
    page.parent.mkdir(exist_ok=True)
    with atomic_write(page) as file:
        file.write(f"{rest.rstrip()}\n\n## {title}\n\n{text.strip()}\n".encode())
