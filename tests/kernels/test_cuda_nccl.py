"""kernels/cuda/runtime/nccl.py: against CuPy's own signatures, and on a fake CuPy that works when somebody waits."""

import ast
import inspect
import re
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import fake_cupy
import fake_nccl
import numpy as np
import pytest
from availability import import_cupy
from fake_cupy import scale
from fake_nccl import Threads
from stub_library import described
from test_cupy import names_listed

from kernels.cuda.runtime import nccl
from kernels.cuda.runtime import runtime as runtime_module
from kernels.cuda.runtime.runtime import CudaError, Runtime
from kernels.driver import NoDevice, Place

MODULE = Path(nccl.__file__)
F = np.float32

# ----------------------------------------------------------------------------------------------------------------------
# CuPy's side


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> dict:
    """{name: its value, or its docstring} of the real cupy.cuda.nccl."""
    import_cupy()
    return described("nccl", tmp_path_factory.mktemp("nccl"))


def test_cupy_has_what_the_module_lists_and_the_module_uses_no_more(real):
    listed = {name.removeprefix("cupy.cuda.nccl.") for name in names_listed(MODULE)} - {"cupy.cuda.nccl"}
    listed |= {"NcclCommunicator"}
    assert len(listed) == 11 and listed - {"available"} <= set(real)
    used = set()
    for node in ast.walk(ast.parse(MODULE.read_text())):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("nccl", "self._nccl"):
            used |= {f"NcclCommunicator.{node.attr}" if ast.unparse(node.value) == "self._nccl" else node.attr}
    assert used == listed
    import cupy

    assert re.search(r"^available = True$", Path(cupy.__file__).with_name("cuda").joinpath("nccl.py").read_text(), re.M)


def test_the_stand_in_takes_what_cupy_takes(real):
    """Names and order; values are those of nccl.h."""
    ours = {name: value for name, value in vars(fake_nccl.NcclCommunicator).items() if name[0] != "_"}
    for name, function in ours.items():
        words = real[f"NcclCommunicator.{name}"].splitlines()[0].partition("(")[2].rstrip(")").split(", ")
        assert [word.split()[-1] for word in words] == list(inspect.signature(function).parameters), name
    first = real["NcclCommunicator"].splitlines()[0]
    assert first.startswith("NcclCommunicator(int ndev, bytes commId, int rank, ") or "Initialize an NCCL" in first
    assert list(inspect.signature(fake_nccl.NcclCommunicator).parameters) == ["ndev", "commId", "rank"]
    assert (real["NCCL_FLOAT32"], real["NCCL_SUM"]) == (fake_nccl.NCCL_FLOAT32, fake_nccl.NCCL_SUM) == (7, 0)
    assert "bytes object" in real["get_unique_id"] and type(fake_nccl.get_unique_id()) is bytes


# ----------------------------------------------------------------------------------------------------------------------
# without NCCL


def test_a_cupy_without_nccl_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "cupy.cuda", SimpleNamespace())
    with pytest.raises(NoDevice, match="CuPy has no NCCL: cannot import name 'nccl'") as error:
        nccl.import_nccl()
    assert error.value.hint.startswith("pip install nvidia-nccl-cu12")
    monkeypatch.setitem(sys.modules, "cupy.cuda", SimpleNamespace(nccl=SimpleNamespace(available=False)))
    with pytest.raises(NoDevice, match=r"^CuPy finds no NCCL$"):
        nccl.import_nccl()


def test_a_cupy_that_finds_no_nccl_says_why(monkeypatch):
    """In a warning, which is not shown."""

    class Cuda:
        @property
        def nccl(self):
            warnings.warn("\nnccl library could not be loaded.\n\nReason: ImportError (libnccl.so.2)\n\n", stacklevel=1)
            return SimpleNamespace(available=False)

    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "cupy.cuda", Cuda())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(NoDevice, match=r"^CuPy finds no NCCL: ImportError \(libnccl.so.2\)$"):
            nccl.import_nccl()


# ----------------------------------------------------------------------------------------------------------------------
# on a fake CuPy


SCALE = """extern "C" __global__ void __launch_bounds__(128)
scale_kernel(float* __restrict__ out, const float* __restrict__ inp, float by, size_t first, int N) {}
"""


@pytest.fixture
def open_gpu(monkeypatch, tmp_path):
    """open_gpu(local_rank) -> (a fake CuPy with two GPUs, the Runtime of that rank on it)"""
    (tmp_path / "scale.cu").write_text(SCALE)
    monkeypatch.setattr(runtime_module, "check_driver", lambda: None)
    monkeypatch.setattr(runtime_module, "loaded_cublas", lambda: None)
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "cache"))
    runtime_module.open_cache.cache_clear()

    def open_one(local_rank):
        cupy = fake_cupy.FakeCupy(kernels={"scale_kernel": scale}, gpus=2)
        monkeypatch.setitem(sys.modules, "cupy", cupy.module)
        return cupy, Runtime(folders=(tmp_path,), local_rank=local_rank)

    yield open_one
    runtime_module.open_cache.cache_clear()


@pytest.mark.parametrize("local_rank, device", [(0, 0), (1, 1), (2, 0), (5, 1)])
def test_a_rank_has_the_gpu_of_its_number(local_rank, device, open_gpu):
    cupy, gpu = open_gpu(local_rank)
    assert cupy.device == device and gpu.is_array(gpu.zeros(2)) and cupy.stream.ptr == 1000
    assert (gpu.place.bus, gpu.place.visible) == (f"0000:{0x3B + device:02x}:00", 2) and gpu.place.machine
    cupy.device = 1 - device
    assert not gpu.is_array(gpu.zeros(2))


@pytest.fixture
def pair(open_gpu, monkeypatch):
    """[(fake CuPy, Runtime on it)] of two ranks, which meet by the stand-in for NCCL."""
    monkeypatch.setattr(nccl, "import_nccl", lambda: fake_nccl)
    monkeypatch.setattr(nccl.atexit, "register", lambda abort: None)
    return [open_gpu(rank) for rank in range(2)]


def connect(pair, ranks) -> tuple:
    """(fake CuPy, its Runtime, the Communicator) of a rank."""
    cupy, gpu = pair[ranks.rank]

    def enqueue(operation, stream):
        (one,) = [one for one in cupy.streams if one.ptr == stream]
        one._enqueue(None, operation)

    fake_nccl.current.gpu = SimpleNamespace(
        streams=(1001,), place=gpu.place, holds=lambda address, nbytes: True, enqueue=enqueue
    )
    return cupy, gpu, nccl.Communicator(gpu, ranks)


@pytest.mark.parametrize("newest_first", [True, False])
def test_a_sum_is_enqueued_and_the_host_waits_for_nothing(newest_first, pair, monkeypatch):
    """Behind what was launched before, in front of what is launched behind, whichever stream is ahead where it may be;
    the last bucket is shorter."""
    monkeypatch.setattr(nccl, "BUCKET", 4)

    def work(ranks):
        cupy, gpu, communicator = connect(pair, ranks)
        cupy.newest_first = newest_first
        array, counts = gpu.to_device(np.full(6, 10.0 * ranks.rank, F)), gpu.zeros(6)
        cupy.waits.clear()
        gpu.launch("scale_kernel", 1, 8, (array, array, 2.0, 0, 6))
        communicator.add_up(array, ranks)
        gpu.launch("scale_kernel", 1, 8, (counts, array, 0.5, 0, 6))
        told = cupy.waits == [] and array.values.tolist() == [10.0 * ranks.rank] * 6
        return told, gpu.to_host(array).tolist(), gpu.to_host(counts).tolist(), fake_nccl.current.communicator.calls

    for told, array, halves, calls in Threads(2).run(work):
        assert told and array == [20.0] * 6 and halves == [10.0] * 6
        assert calls == [(3, 1001), None, (4, 1001), (2, 1001), None]


@pytest.mark.parametrize("newest_first", [True, False])
@pytest.mark.parametrize("zero", [False, True])
def test_what_has_begun_goes_on_beside_what_follows(zero, newest_first, pair):
    """A begun sum has what was there then, goes ahead of what is launched behind it, and is not done again."""
    size, cut = 1024, slice(100, 900)  # across the border of two ranks' parts, at 512

    def work(ranks):
        ranks.zero = zero
        cupy, gpu, communicator = connect(pair, ranks)
        cupy.newest_first = newest_first
        array, done = gpu.to_device(np.full(size, 1.0, F)), []
        view = SimpleNamespace(data=SimpleNamespace(ptr=array.data.ptr + 4 * cut.start), size=800)
        gpu.launch("scale_kernel", 1, 128, (array, array, 10.0, cut.start, view.size))
        communicator.begin(array, [view], ranks)
        gpu.launch("scale_kernel", 1, 128, (array, array, 3.0, 0, cut.start))
        cupy.enqueue(lambda: done.append(array.values[500:502].tolist()))
        communicator.add_up(array, ranks)
        gpu.launch("scale_kernel", 1, 128, (array, array, 0.5, 0, size))
        found = gpu.to_host(array)
        communicator.add_up(array, ranks)  # of the next step: all of it
        return done, found, gpu.to_host(array), fake_nccl.current.communicator.calls

    for rank, (done, found, again, calls) in enumerate(Threads(2).run(work)):
        own = slice(512 * rank, 512 * rank + 512) if zero else slice(0, size)
        expected = np.repeat([3.0, 10.0, 1.0], [100, 800, 124])  # half of what two ranks have
        assert done == [[(20.0 if newest_first and own.start == 0 else 10.0)] * 2]
        assert np.array_equal(found[own], expected[own])
        assert np.array_equal(again[own], (1.5 if zero else 2) * expected[own])  # the other has no sum of this part
        counts = [call and call[0] for call in calls]
        parts = [412, 388, None, 100, 124, None, 512, 512] if zero else [800, None, 100, 124, None, 1024]
        assert counts == [3, None, *parts, None] and {call[1] for call in calls if call} == {1001}


def test_a_sum_begins_between_graphs(pair):
    """And anew whenever they are launched; in one of them its events would be refused."""

    def work(ranks):
        _, gpu, communicator = connect(pair, ranks)
        gpu._captures = True
        array = gpu.to_device(np.full(4, 1.0, F))
        view = SimpleNamespace(data=SimpleNamespace(ptr=array.data.ptr), size=2)

        def step():
            gpu.launch("scale_kernel", 1, 4, (array, array, 3.0, 0, 4))
            gpu.outside_graphs(lambda: communicator.begin(array, [view], ranks))
            gpu.launch("scale_kernel", 1, 4, (array, array, 5.0, 2, 2))

        replay = gpu.capture(step)
        found = []
        for _ in range(2):
            replay()
            communicator.add_up(array, ranks)
            found.append(gpu.to_host(array).tolist())
        with pytest.raises(CudaError, match="the current stream is capturing"):
            gpu.capture(lambda: communicator.begin(array, [view], ranks))
        return found

    for found in Threads(2).run(work):
        assert found == [[6, 6, 30, 30], [36, 36, 900, 900]]


def test_what_has_begun_does_not_begin_again(pair):
    """As it would if a micro-step that is not the last one began."""

    def work(ranks):
        _, gpu, communicator = connect(pair, ranks)
        array = gpu.to_device(np.ones(8, F))
        first, second = (
            SimpleNamespace(data=SimpleNamespace(ptr=array.data.ptr + 4 * begin), size=4) for begin in (0, 3)
        )
        communicator.begin(array, [first], ranks)
        with pytest.raises(ValueError, match=r"begin: slice\(3, 7, None\) of float32\(8,\) has begun"):
            communicator.begin(array, [second], ranks)
        return True

    assert Threads(2).run(work) == [True, True]


def test_the_rest_is_what_no_part_has():
    assert nccl.rest_of(9, []) == [slice(0, 9)] and nccl.rest_of(9, [slice(0, 9)]) == []
    assert nccl.rest_of(9, [slice(5, 7), slice(2, 4)]) == [slice(0, 2), slice(4, 5), slice(7, 9)]


def test_what_cannot_be_added_up_is_refused(pair):
    def work(ranks):
        _, gpu, communicator = connect(pair, ranks)
        messages = []
        for array in (np.zeros(3, F), gpu.zeros(3, np.int32), [1.0]):
            with pytest.raises(TypeError, match="expected contiguous float32 on Fake GPU") as error:
                communicator.add_up(array, ranks)
            messages.append(str(error.value))
        return messages

    assert [messages[1] for messages in Threads(2).run(work)] == [
        "add_up: int32(3,), expected contiguous float32 on Fake GPU"
    ] * 2


def test_an_error_of_a_sum_says_which(pair, monkeypatch):
    def work(ranks):
        _, gpu, communicator = connect(pair, ranks)
        communicator._nccl.abort()
        fail = fake_nccl.NcclError("NCCL_ERROR_REMOTE_ERROR: remote process exited")
        communicator._nccl.allReduce = lambda *_: (_ for _ in ()).throw(fail)
        communicator.add_up(gpu.zeros((2, 2)), ranks)

    for error in Threads(2).run(work):
        assert isinstance(error, CudaError)
        assert error.message == "NCCL, adding up float32(2, 2): NCCL_ERROR_REMOTE_ERROR: remote process exited"


def test_nccl_refuses_two_ranks_on_one_gpu(pair):
    """What why_none finds before; here its error is told, by all."""
    for _, gpu in pair:
        gpu.place = Place("here", "0000:3b:00", 1)
    for error in Threads(2).run(lambda ranks: connect(pair, ranks)):
        assert isinstance(error, CudaError)
        assert error.message.startswith("NCCL, connecting the GPUs of 2 processes: NCCL_ERROR_INVALID_USAGE")
