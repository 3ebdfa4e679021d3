"""What a test needs that not every machine has. It is skipped only where that cannot be had, and fails where it could.

cannot be had: a GPU without an NVIDIA driver, CuPy on a system that has no wheel of it, the CUDA emulator off Linux.
could be had: a package that a requirements file asks for on this machine, a compiler, a GPU that a driver shows.
"""

import sys
from functools import cache
from pathlib import Path

import pytest
from cuda_emulator import build
from cuda_emulator.runtime import EmulatedRuntime
from packaging.requirements import Requirement

from kernels.cuda.runtime import source
from kernels.cuda.runtime.runtime import Runtime
from kernels.driver import NoDriver, check_driver

ROOT = Path(__file__).parent.parent


def required(package: str) -> bool:
    """Whether requirements.txt or its siblings ask for `package` on this machine."""
    lines = [line for path in sorted(ROOT.glob("requirements*.txt")) for line in path.read_text().splitlines()]
    asked = [f" {line}".partition(" #")[0] for line in lines]  # without remarks
    wanted = [Requirement(line) for line in asked if line.strip()]
    markers = [each.marker for each in wanted if each.name == package]
    if not markers:
        raise ValueError(f"{package}: in no requirements file of {ROOT}")
    return any(marker is None or marker.evaluate() for marker in markers)


def import_cupy():
    """CuPy. Skips the test where there is no wheel of it, raises ImportError where it should be installed."""
    if required("cupy-cuda12x"):
        import cupy

        return cupy
    return pytest.importorskip("cupy", reason=f"there is no CuPy for {sys.platform} and this Python")


def open_gpu(tf32: bool = False, folders: tuple[Path, ...] = (source.FOLDER,)) -> Runtime:
    """The GPU. Skips the test on a machine without an NVIDIA driver; with one, raises NoDevice if it cannot be used."""
    try:
        check_driver()
    except NoDriver as reason:
        pytest.skip(f"no GPU: {reason}")
    return Runtime(tf32, folders)


def emulate(mode: str, folders: tuple[Path, ...] = (source.FOLDER,)) -> EmulatedRuntime:
    """The CUDA emulator in a mode. Skips the test on a system that is not Linux, raises BuildError without g++."""
    skip_off_linux()
    return EmulatedRuntime(mode, folders=folders)


@cache
def open_runtime(name: str) -> Runtime | EmulatedRuntime:
    """ "gpu", or a mode of the emulator, opened once for all tests."""
    return open_gpu() if name == "gpu" else emulate(name)


def skip_off_linux() -> None:
    """Skips the test, or the file of tests that calls this first, where the CUDA emulator does not run."""
    if reason := build.foreign_system():
        pytest.skip(reason, allow_module_level=True)
