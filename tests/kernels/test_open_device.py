"""kernels.open_device: which device there is, and what is said where it is not the GPU."""

import ctypes
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny

import kernels
import train_banded
from kernels import cpu, driver
from kernels.cuda.runtime import runtime as runtime_module
from kernels.cuda.runtime.runtime import Runtime
from kernels.driver import NoDevice, NoDriver
from llmc.errors import UserError
from llmc.options import print_model

ROOT = Path(__file__).parent.parent.parent
RUNTIME = ROOT / "kernels" / "cuda" / "runtime" / "runtime.py"
F = np.float32


def check_falls_back(reason: str, capfd, silent=False):
    """--device auto is the CPU and says `reason` on stderr, cuda refuses with it and a hint; stdout stays empty."""
    capfd.readouterr()
    assert kernels.open_device("auto") is cpu
    said = capfd.readouterr()
    if silent:
        assert said.err == ""
    else:
        assert re.fullmatch(rf"running on the CPU: .*{reason}.*; --device cuda says what helps\n", said.err), said.err
    with pytest.raises(UserError, match=f"--device cuda: .*{reason}") as error:
        kernels.open_device("cuda")
    assert 'pip install "cupy-cuda12x[ctk]"' in error.value.hint and "--device cpu" in error.value.hint
    assert said.out == capfd.readouterr().out == ""
    assert "\n" not in error.value.message


def test_without_a_driver(monkeypatch, capfd):
    """An ordinary laptop: nothing is said, nothing is imported."""

    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setitem(sys.modules, "kernels.cuda.runtime.runtime", None)
    check_falls_back("no NVIDIA driver", capfd, silent=True)
    with pytest.raises(NoDriver):
        driver.check_driver()


@pytest.mark.parametrize(
    "code, count, reason",
    [
        (100, 0, "the NVIDIA driver shows no GPU, CUDA_VISIBLE_DEVICES is ''"),
        (0, 0, "the NVIDIA driver shows no GPU, CUDA_VISIBLE_DEVICES is ''"),
        (803, 0, "the NVIDIA driver does not start, CUDA error 803; nvidia-smi may say why"),
    ],
)
def test_without_a_gpu(driver_says, monkeypatch, capfd, code, count, reason):
    driver_says(code, count)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    check_falls_back(reason, capfd)


def test_without_cupy(fake, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "cupy", None)  # import raises ModuleNotFoundError
    check_falls_back("CuPy is not installed", capfd)


def test_with_a_cupy_that_does_not_load(fake, monkeypatch, tmp_path, capfd):
    broken = tmp_path / "site"
    (broken / "cupy").mkdir(parents=True)
    banner = "try:\n    raise ImportError('libcublas.so.12: no such file')\nexcept ImportError as error:\n"
    (broken / "cupy" / "__init__.py").write_text(banner + "    raise ImportError('====\\nFailed\\n====') from error\n")
    monkeypatch.delitem(sys.modules, "cupy")
    monkeypatch.syspath_prepend(str(broken))
    check_falls_back("CuPy does not load: libcublas.so.12: no such file", capfd)
    (broken / "cupy" / "__init__.py").write_text("import nothing_of_the_kind")
    check_falls_back("CuPy does not load: No module named 'nothing_of_the_kind'", capfd)


def test_with_a_driver_that_is_too_old(fake, capfd):
    def fail():
        raise RuntimeError("cudaErrorInsufficientDriver: CUDA driver version is insufficient for CUDA runtime version")

    fake.module.cuda.runtime.getDeviceCount = fail
    check_falls_back("the GPU: cudaErrorInsufficientDriver: CUDA driver version is insufficient", capfd)


def test_with_a_cupy_that_lacks_a_part(fake, capfd):
    del fake.module.cuda.cublas
    check_falls_back("Fake GPU: AttributeError .*cublas", capfd)


def test_with_a_gpu_that_computes_nonsense(fake, capfd):
    def wrong(out, step, N):
        fake.probe(out, step, N)
        out[3] = 7

    fake.kernels["probe_kernel"] = wrong
    Path(runtime_module.open_cache()[0]).mkdir(exist_ok=True)
    with pytest.raises(NoDevice, match=r"Fake GPU: the probe kernel computed 7.0, expected 0.5"):
        Runtime()
    fake.kernels["probe_kernel"] = lambda out, step, N: None
    with pytest.raises(NoDevice, match=r"Fake GPU: the probe kernel computed 0.0, expected -1.0"):
        Runtime()
    fake.kernels["probe_kernel"] = fake.probe
    fake.module.cuda.cublas.sgemm = lambda *_: None
    with pytest.raises(NoDevice, match=r"Fake GPU: cuBLAS computed 0.0, expected 5.0"):
        Runtime()


def test_with_a_gpu(fake, capfd):
    for name in ("auto", "cuda"):
        device = kernels.open_device(name)
        assert device is not cpu and device.describe().startswith("Fake GPU")
    assert kernels.open_device("cpu", tf32=False) is cpu


def test_tf32_where_there_is_none_is_told(capfd):
    assert kernels.open_device("cpu", tf32=True) is cpu
    said = capfd.readouterr()
    assert said.out == "" and re.fullmatch(r"--tf32 1 has no effect: no TF32 on CPU, NumPy .*\n", said.err)


def test_tf32_in_the_trainers_table(folder, capfdbinary):
    run = tiny.call(capfdbinary, train_banded.main, *tiny.options(), "-n", 1, "--device", "cpu", "--tf32", 1)
    assert run.code == 0 and run.err.startswith("--tf32 1 has no effect: ")
    assert f"| {'TF32':<21} | {'disabled':<50} |\n" in run.out
    print_model("a GPU", True, tiny.CONFIG)
    assert f"| {'TF32':<21} | {'enabled':<50} |\n".encode() in capfdbinary.readouterr().out
