"""Fixtures that several test files share, and what is compiled before the first test."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # a core a process: their products would wait for each other's threads
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from contextlib import suppress

import pytest
import tiny
from availability import open_runtime
from cuda_emulator import build
from cuda_emulator.runtime import EmulatedRuntime

from kernels import cpu
from kernels.cuda.runtime import source

# formats, random numbers, and short runs of each trainer beside llm.c's; tests/ops on the CPU is quick as well
QUICK = {"test_checkpoint", "test_dataloader", "test_golden", "test_sampler", "test_schedulers", "test_tokenizer"}


@pytest.hookimpl(tryfirst=True)  # before -m looks at the marks
def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.stem in QUICK or (item.path.parent.name == "ops" and not on_cuda(item)):
            item.add_marker("quick")


def pytest_collection_finish(session):
    """Compiles what the selected tests launch on the emulator, all cores at once: else each op's first test waits.

    Of several processes (pytest -n) each compiles its share; what is left out here is compiled at its first launch.
    """
    if session.config.option.collectonly or build.missing_tool():
        return  # without a compiler the tests say so
    process = getattr(session.config, "workerinput", dict(workerid="gw0", workercount=1))
    own, count = int(process["workerid"].removeprefix("gw")), process["workercount"]
    needed = sorted({pair for item in session.items for pair in launched(item)})
    mine = needed[own::count]
    for mode in {mode for mode, _ in mine}:
        with suppress(build.BuildError):  # the test that launches it shows what g++ says
            paths = [path for other, path in mine if other == mode]
            EmulatedRuntime(mode).build(*paths, jobs=max(1, len(os.sched_getaffinity(0)) // count))


def launched(item) -> list[tuple[str, str]]:
    """(mode, .cu file) for each file of kernels that a test launches on the emulator.

    A test of an op launches the op's, in mode check; others are marked with the shelves they use, as in
    @pytest.mark.launches("gpt2", "band").
    """
    files = sorted({kernel.path for kernel in source.kernels().values()})
    if mark := item.get_closest_marker("launches"):
        mode = "check" if "checking" in item.fixturenames else "fast"
        return [(mode, path) for path in files if path.parent.name in mark.args]
    return [("check", path) for path in files if on_cuda(item) and f"test_{path.stem}" == item.path.stem]


def on_cuda(item) -> bool:
    """Whether a test of an op needs the emulator or a GPU."""
    device = item.callspec.params.get("device") if hasattr(item, "callspec") else None
    return device not in (None, "cpu") or bool({"runtime", "emulator", "open_tensor_cores"} & set(item.fixturenames))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the tiny model, shards and tokenizer, which is the current one during the test."""
    monkeypatch.chdir(tiny.make_folder(tmp_path / "run"))
    return tmp_path / "run"


@pytest.fixture(scope="session")
def emulator():
    """The emulator that only computes, fast."""
    return open_runtime("fast")


GPU = pytest.param("gpu", marks=pytest.mark.gpu)


@pytest.fixture(scope="session", params=["check", GPU])
def runtime(request):
    """What CUDA kernels run on: the emulator, which finds races and stray accesses as well, and a GPU."""
    return open_runtime(request.param)


@pytest.fixture(scope="session", params=["cpu", "check", GPU])
def device(request):
    """What an op runs on: kernels.cpu, or what CUDA kernels run on. For check_op."""
    return cpu if request.param == "cpu" else open_runtime(request.param)
