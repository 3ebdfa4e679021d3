"""A fake CuPy in the place of CuPy, for Runtime and whoever opens one."""

import sys
from types import SimpleNamespace

import fake_cupy
import pytest

from kernels import driver
from kernels.cuda.runtime import runtime as runtime_module
from kernels.cuda.runtime import source


@pytest.fixture
def driver_says(monkeypatch):
    """driver_says(code=0, count=1): cuInit's answer and how many GPUs there are."""

    def says(code=0, count=1):
        def get_count(pointer):
            pointer._obj.value = count
            return 0

        library = SimpleNamespace(cuInit=lambda flags: code, cuDeviceGetCount=get_count)
        monkeypatch.setattr(driver.ctypes, "CDLL", lambda name: library)

    return says


@pytest.fixture
def fake(monkeypatch, tmp_path, driver_says):
    """A FakeCupy in the place of CuPy, a driver with one GPU, and the planted kernels."""
    for name, text in fake_cupy.PLANTED.items():
        (tmp_path / name).write_text(text)
    planted = source.kernels(tmp_path)
    monkeypatch.setattr(runtime_module.source, "kernels", lambda *_: planted)
    monkeypatch.setattr(runtime_module, "loaded_cublas", lambda: None)
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "cache"))
    runtime_module.open_cache.cache_clear()
    driver_says()
    planted_in_python = {
        "scale_kernel": fake_cupy.scale,
        "count_kernel": fake_cupy.count,
        "scale_again_kernel": lambda out, N: None,
    }
    fake = fake_cupy.FakeCupy(kernels=planted_in_python)
    monkeypatch.setitem(sys.modules, "cupy", fake.module)
    yield fake
    runtime_module.open_cache.cache_clear()
