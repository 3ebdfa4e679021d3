"""An op is tested in mode check, which finds more; whole runs are for mode fast."""

import pytest
from availability import open_gpu, open_runtime, skip_off_linux
from cuda_emulator.runtime import EmulatedRuntime

from kernels.cuda.gpt2 import matmul_tensor
from kernels.cuda.gpt2.matmul_tensor import tensor_products
from kernels.cuda.runtime.tensor_cores import worth_it


@pytest.fixture(scope="session")
def emulator():
    return open_runtime("check")


@pytest.fixture(scope="module")
def tried():
    """Launchers take kernels for tensor cores without a trial, and dense products are ours on any card."""
    every_card = frozenset((major, minor) for major in range(8, 13) for minor in range(10))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matmul_tensor, "takes_tensor_cores", lambda cuda, *_: worth_it(cuda))
        patch.setattr(matmul_tensor, "FASTER_THAN_CUBLAS", every_card)
        yield


@pytest.fixture
def failed(monkeypatch):
    """No kernel for tensor cores is taken, as after a trial that failed."""
    monkeypatch.setattr(matmul_tensor, "takes_tensor_cores", lambda cuda, *_: False)


@pytest.fixture(scope="module", params=["check", pytest.param("gpu", marks=pytest.mark.gpu)])
def open_tensor_cores(request, tried):
    """open_tensor_cores(tf32, schedule): a runtime that multiplies on tensor cores, the emulator as a GPU, or a GPU."""

    def opened(tf32: bool, schedule: str = "random"):
        if request.param == "gpu":
            gpu = open_gpu(tf32)
            if not tensor_products(gpu):
                pytest.skip(f"{gpu.name} has no tensor cores that are worth it")
            return gpu
        skip_off_linux()
        return EmulatedRuntime("check", schedule=schedule, seed=3, capability=(9, 0), tf32=tf32)

    return opened


@pytest.fixture(scope="module", params=[False, True], ids=["3xtf32", "tf32"])
def tensor_cores(request, open_tensor_cores):
    """A runtime that multiplies on tensor cores, with float32's accuracy and in TF32."""
    return open_tensor_cores(request.param)
