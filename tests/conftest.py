"""Fixtures that several test files share."""

from functools import cache

import pytest
import tiny
from availability import emulate, open_gpu

from kernels import cpu


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the tiny model, shards and tokenizer, which is the current one during the test."""
    monkeypatch.chdir(tiny.make_folder(tmp_path / "run"))
    return tmp_path / "run"


@pytest.fixture(scope="session")
def emulator():
    """The emulator that only computes, fast."""
    return emulate("fast")


GPU = pytest.param("gpu", marks=pytest.mark.gpu)


@pytest.fixture(scope="session", params=["check", GPU])
def runtime(request):
    """What CUDA kernels run on: the emulator, which finds races and stray accesses as well, and a GPU."""
    return open_runtime(request.param)


@pytest.fixture(scope="session", params=["cpu", "check", GPU])
def device(request):
    """What an op runs on: kernels.cpu, or what CUDA kernels run on. For check_op."""
    return cpu if request.param == "cpu" else open_runtime(request.param)


@cache
def open_runtime(name: str):
    return open_gpu() if name == "gpu" else emulate(name)
