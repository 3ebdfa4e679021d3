"""Fixtures that several test files share."""

import pytest
import tiny
from cuda_emulator import build
from cuda_emulator.runtime import EmulatedRuntime

from kernels.cuda.runtime import NoDevice, Runtime


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the tiny model, shards and tokenizer, which is the current one during the test."""
    monkeypatch.chdir(tiny.make_folder(tmp_path / "run"))
    return tmp_path / "run"


def emulate(mode: str) -> EmulatedRuntime:
    """The emulator in a mode; skips the test where nothing can be compiled."""
    if missing := build.missing_tool():
        pytest.skip(missing)
    return EmulatedRuntime(mode)


@pytest.fixture(scope="session")
def emulator():
    """The emulator that only computes, fast."""
    return emulate("fast")


@pytest.fixture(scope="session", params=["fast", "check", pytest.param("gpu", marks=pytest.mark.gpu)])
def runtime(request):
    """What CUDA kernels run on: the emulator, which finds races and stray accesses in mode check, and a GPU."""
    if request.param != "gpu":
        return emulate(request.param)
    try:
        return Runtime()
    except NoDevice as error:
        pytest.skip(f"no GPU: {error}")
