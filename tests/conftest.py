"""Fixtures that several test files share."""

import pytest
import tiny
from availability import emulate, open_gpu


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the tiny model, shards and tokenizer, which is the current one during the test."""
    monkeypatch.chdir(tiny.make_folder(tmp_path / "run"))
    return tmp_path / "run"


@pytest.fixture(scope="session")
def emulator():
    """The emulator that only computes, fast."""
    return emulate("fast")


@pytest.fixture(scope="session", params=["fast", "check", pytest.param("gpu", marks=pytest.mark.gpu)])
def runtime(request):
    """What CUDA kernels run on: the emulator, which finds races and stray accesses in mode check, and a GPU."""
    return open_gpu() if request.param == "gpu" else emulate(request.param)
