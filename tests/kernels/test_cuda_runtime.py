"""kernels/cuda/runtime/runtime.py on a fake CuPy, and on a GPU where there is one."""

import ctypes
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import fake_cupy
import numpy as np
import pytest
from availability import open_gpu, skip_off_linux
from cuda_emulator import build
from cuda_emulator.runtime import EmulatedRuntime

from kernels import cuda
from kernels.cuda.runtime import runtime as runtime_module
from kernels.cuda.runtime import source
from kernels.cuda.runtime.runtime import CudaError, Runtime
from llmc.errors import UserError

ROOT = Path(__file__).parent.parent.parent
RUNTIME = ROOT / "kernels" / "cuda" / "runtime" / "runtime.py"
F = np.float32


@pytest.fixture
def gpu(fake):
    return Runtime()


def test_arrays_go_there_and_back(gpu):
    values = np.arange(12, dtype=F).reshape(3, 4)
    array = gpu.to_device(values)
    values[...] = -1
    assert gpu.is_array(array) and not gpu.is_array(values)
    assert gpu.to_host(array).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert gpu.to_host(gpu.zeros(3)).tolist() == [0, 0, 0]
    assert gpu.to_host(gpu.zeros((1, 2), np.int32)).dtype == np.int32
    assert gpu.name == "Fake GPU" and gpu.memory() == (50 << 30, 80 << 30)


def test_copy_in_waits_for_nothing_but_its_own_last_copy(gpu, fake):
    array, values = gpu.zeros((2, 2), np.int32), np.array([[1, 2], [3, 4]], np.int32)
    gpu.synchronize()
    fake.waits.clear()
    gpu.copy_in(array, values)
    values[...] = 9  # the copy is still to run
    assert array.values.sum() == 0
    assert gpu.to_host(array).tolist() == [[1, 2], [3, 4]]
    gpu.copy_in(array, values)
    between = gpu.to_host_later(array)
    gpu.copy_in(array, values + 1)  # while the one before may not have run
    assert gpu.to_host(array).tolist() == [[10, 10], [10, 10]]
    assert between().tolist() == [[9, 9], [9, 9]]
    assert "pageable copy" not in fake.waits


@pytest.mark.parametrize(
    "values, message",
    [
        (np.zeros((2, 3), F), r"values are float32\(2, 3\) for an array float32\(2, 2\)"),
        (np.zeros((2, 2)), r"values are float64\(2, 2\)"),
        ([[0, 0], [0, 0]], "values are a list"),
    ],
)
def test_copy_in_refuses_another_shape_or_dtype(gpu, values, message):
    with pytest.raises(TypeError, match=message):
        gpu.copy_in(gpu.zeros((2, 2)), values)
    with pytest.raises(TypeError, match="array is a ndarray, expected an array on Fake GPU"):
        gpu.copy_in(np.zeros((2, 2), F), values)


def test_to_host_later_waits_for_its_copy_alone(gpu, fake):
    array, more = gpu.to_device(np.array([1, 2], F)), gpu.zeros(2)
    later = gpu.to_host_later(array)
    gpu.launch("scale_kernel", 1, 2, (array, array, 10, 0, 2))
    gpu.launch("scale_kernel", 1, 2, (more, more, 1, 0, 2))
    assert later().tolist() == [1, 2]
    assert len(fake.stream.queue) == 2  # the kernels after the copy have not run, and need not
    second = gpu.to_host_later(array)
    gpu.launch("scale_kernel", 1, 2, (array, array, 10, 0, 2))
    third = gpu.to_host_later(array)  # its buffer is the second's, which nobody has fetched
    gpu.launch("scale_kernel", 1, 2, (array, array, 10, 0, 2))
    assert gpu.to_host(array).tolist() == [1000, 2000]
    assert third().tolist() == [100, 200] and second().tolist() == [10, 20] and later().tolist() == [1, 2]


def test_arrays_of_another_kind_are_refused(gpu, fake):
    elsewhere, transposed = gpu.zeros((2, 2)), gpu.zeros((2, 2))
    elsewhere.device.id, transposed.flags.c_contiguous = 1, False
    for call in (gpu.to_host, gpu.to_host_later):
        with pytest.raises(TypeError, match="array is a ndarray, expected an array on Fake GPU"):
            call(elsewhere)
        with pytest.raises(TypeError, match=r"array of shape \(2, 2\) is not C-contiguous"):
            call(transposed)
    assert len(fake.launches) == 2  # the probe's


def test_scratch_is_kept_and_grows(gpu, fake):
    first = gpu.scratch("sums", (2, 3))
    assert first.shape == (2, 3) and first.dtype == F
    assert gpu.scratch("sums", (2, 3)) is first
    assert gpu.scratch("sums", 6).data.ptr == gpu.scratch("sums", 3, np.float64).data.ptr == first.data.ptr
    assert gpu.scratch("other", 1).data.ptr != first.data.ptr
    grown = gpu.scratch("sums", (2, 4))
    assert grown.data.ptr != first.data.ptr and gpu.scratch("sums", (2, 3)).data.ptr == grown.data.ptr
    assert [size for _, size in fake.allocations][-3:] == [24, 4, 32]


def test_nothing_is_allocated_after_the_first_step(gpu, fake):
    array, losses = gpu.zeros((4, 4)), gpu.zeros(4)

    def step():
        gpu.copy_in(array, np.eye(4, dtype=F))
        gpu.gemm(gpu.scratch("product", (4, 4)), array, array, transb=True, beta=0.5)
        gpu.launch("scale_kernel", 1, 4, (losses, array, 2.0, 0, 4))
        return gpu.to_host_later(losses)

    step()()
    allocations = len(fake.allocations)
    for _ in range(3):
        assert step()().shape == (4,)
    assert len(fake.allocations) == allocations


# launches


def test_launch_passes_what_the_kernel_declares(gpu, fake):
    inp, out = gpu.to_device(np.arange(8, dtype=F)), gpu.zeros(8)
    gpu.launch("scale_kernel", np.int64(3), (32, 2), (out, inp, 3, 2, 4), shared_mem=64)
    assert fake.launches[-1] == ("scale_kernel", (3, 1, 1), (32, 2, 1), 64)
    assert gpu.to_host(out).tolist() == [0, 0, 6, 9, 12, 15, 0, 0]
    gpu.launch("count_kernel", (1, 1, 1), 64, (gpu.zeros(3, np.int32), 3))


def test_launch_refuses_arguments_that_do_not_fit(gpu):
    inp, ints = gpu.zeros(8), gpu.zeros(8, np.int32)
    with pytest.raises(TypeError, match="scale_kernel: 2 arguments, expected 5"):
        gpu.launch("scale_kernel", 1, 32, (inp, inp))
    with pytest.raises(TypeError, match="scale_kernel: inp has dtype int32, expected float32"):
        gpu.launch("scale_kernel", 1, 32, (inp, ints, 1.0, 0, 8))
    with pytest.raises(TypeError, match="scale_kernel: out is a ndarray, expected an array on the device"):
        gpu.launch("scale_kernel", 1, 32, (np.zeros(8, F), inp, 1.0, 0, 8))
    with pytest.raises(TypeError, match=r"scale_kernel: N is 8.0, expected a number for int"):
        gpu.launch("scale_kernel", 1, 32, (inp, inp, 1.0, 0, 8.0))
    with pytest.raises(KeyError, match="no_kernel"):
        gpu.launch("no_kernel", 1, 32, ())


@pytest.mark.parametrize(
    "grid, block, shared_mem, problem",
    [
        (0, 32, 0, r"grid \(0, 1, 1\), expected 1 to \(2147483647, 65535, 65535\)"),
        (2**31, 32, 0, r"grid \(2147483648, 1, 1\)"),
        ((1, 65536), 32, 0, r"grid \(1, 65536, 1\)"),
        ((1, 1, 65536), 32, 0, r"grid \(1, 1, 65536\)"),
        (1, 0, 0, r"block \(0, 1, 1\), expected 1 to \(1024, 1024, 64\)"),
        (1, 129, 0, "129 threads a block, its launch bound is 128"),
        (1, (64, 4), 0, "256 threads a block, its launch bound is 128"),
        (1, 32, 49153, "49153 bytes of shared memory, at most 49152"),
        (1, 32, -1, "-1 bytes of shared memory"),
    ],
)
def test_launch_refuses_sizes_that_no_gpu_takes(gpu, fake, grid, block, shared_mem, problem):
    with pytest.raises(ValueError, match=problem) as error:
        gpu.launch("scale_kernel", grid, block, (gpu.zeros(8), gpu.zeros(8), 1.5, 0, 8), shared_mem)
    assert "scale_kernel<<<(" in str(error.value)
    assert "(out=float32(8,), inp=float32(8,), by=1.5, first=0, N=8)" in str(error.value)
    assert len(fake.launches) == 2


@pytest.mark.parametrize("major, limit", [(7, 96), (8, 163), (9, 227), (12, 99), (20, 99)])
def test_more_shared_memory_is_declared_and_asked_for_once(fake, monkeypatch, major, limit):
    """99 KB and a byte more: what is declared is given, as far as the GPU has it."""
    names = ("count_kernel", "large_kernel", "largest_kernel")
    other = fake_cupy.FakeCupy(major=major, kernels=dict.fromkeys(names, fake_cupy.count))
    monkeypatch.setitem(sys.modules, "cupy", other.module)
    gpu = Runtime()
    args = gpu.zeros(3, np.int32), 3
    for kernel, nbytes in (("large_kernel", 99 << 10), ("largest_kernel", (99 << 10) + 1)):
        if nbytes <= limit << 10:
            gpu.launch(kernel, 1, 64, args)
            assert other.launches[-1] == (kernel, (1, 1, 1), (64, 1, 1), nbytes)
            with pytest.raises(ValueError, match=f"{nbytes + 1} bytes of shared memory, at most {nbytes}"):
                gpu.launch(kernel, 1, 64, args, nbytes + 1)
        else:
            with pytest.raises(ValueError, match=f"{nbytes} bytes of shared memory, at most {limit << 10}"):
                gpu.launch(kernel, 1, 64, args)
    gpu.launch("count_kernel", 1, 64, args)  # of the same file
    assert gpu.capability == (major, 0)


def test_sizes_are_whole_numbers_and_three_at_most(gpu):
    args = (gpu.zeros(8, np.int32), 8)
    with pytest.raises(TypeError, match="float"):
        gpu.launch("count_kernel", 8 / 4, 32, args)
    with pytest.raises(ValueError, match="more than three"):
        gpu.launch("count_kernel", (1, 1, 1, 1), 32, args)


def test_a_failed_launch_says_which(gpu, fake):
    fake.launch_error = RuntimeError("CUDA_ERROR_LAUNCH_FAILED: unspecified launch failure")
    with pytest.raises(CudaError) as error:
        gpu.launch("count_kernel", 2, (8, 4), (gpu.zeros((4, 2), np.int32), 8), shared_mem=16)
    expected = "count_kernel<<<(2, 1, 1), (8, 4, 1), 16>>>(out=int32(4, 2), N=8): CUDA_ERROR_LAUNCH_FAILED: unspecified"
    assert error.value.message.startswith(expected)
    assert "CUDA_LAUNCH_BLOCKING=1" in error.value.hint


def test_an_error_that_a_wait_finds_is_no_traceback(gpu, fake, monkeypatch):
    array = gpu.zeros(2)
    later = gpu.to_host_later(array)

    def fail(*_):
        raise RuntimeError("cudaErrorIllegalAddress: an illegal memory access was encountered")

    monkeypatch.setattr(fake, "run", fail)
    fake.module.cuda.runtime.deviceSynchronize = fail
    for call, doing in (
        (lambda: gpu.to_host(array), "copying to the host"),
        (later, "copying to the host"),
        (lambda: gpu.to_device(np.zeros(2)), "copying to the GPU"),
        (gpu.synchronize, "waiting for the GPU"),
    ):
        with pytest.raises(CudaError, match=f"{doing}: cudaErrorIllegalAddress"):
            call()


# compilation


def test_a_file_is_compiled_once(gpu, fake, capfd):
    modules = []
    compile_module = fake.module.RawModule
    fake.module.RawModule = lambda code, options: modules.append((code, options)) or compile_module(code, options)
    for _ in range(2):
        gpu.launch("scale_again_kernel", 1, 1, (gpu.zeros(8), 8))
        gpu.launch("count_kernel", 1, 1, (gpu.zeros(8, np.int32), 8))
        gpu.launch("scale_kernel", 1, 1, (gpu.zeros(8), gpu.zeros(8), 1, 0, 8))
    paths = [source.kernels()[name].path for name in ("scale_kernel", "count_kernel")]
    assert modules == [(source.text(path), ("--std=c++17",)) for path in paths]


def test_compiling_is_told_once_and_not_when_cupy_has_the_kernels(fake, tmp_path, capfd):
    told = f"compiling kernels for Fake GPU, once: CuPy keeps them in {tmp_path / 'cache'}\n"
    first = Runtime()
    first.launch("count_kernel", 1, 1, (first.zeros(8, np.int32), 8))
    assert capfd.readouterr().err == told
    second = Runtime()
    second.launch("count_kernel", 1, 1, (second.zeros(8, np.int32), 8))
    assert capfd.readouterr().err == ""


def test_a_folder_that_cannot_be_written(fake, tmp_path, monkeypatch, capfd):
    """A read-only home: CuPy fails on import there, so it is given another folder."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "file" / "cache"))
    Runtime()
    assert capfd.readouterr().err == (
        f"compiling kernels in every run: {tmp_path / 'file' / 'cache'} cannot be written; set CUPY_CACHE_DIR\n"
    )
    folder, kept = runtime_module.open_cache()
    assert not kept and Path(folder).is_dir() and folder != str(tmp_path / "file" / "cache")


def test_a_compiler_error_shows_file_line_and_message(gpu, fake):
    fake.compile_error = fake_cupy.CompileException('count.cu(3): error: identifier "x" is undefined\n\n1 error.\n')
    with pytest.raises(CudaError) as error:
        gpu.launch("count_kernel", 1, 1, (gpu.zeros(8, np.int32), 8))
    lines = error.value.message.splitlines()
    assert lines[:2] == ["compiling count.cu for Fake GPU:", 'count.cu(3): error: identifier "x" is undefined']


def test_a_full_disk_and_a_module_that_does_not_load(gpu, fake):
    array = gpu.zeros(8, np.int32)
    fake.compile_error = OSError(28, "No space left on device")
    with pytest.raises(UserError, match="No space left on device"):
        gpu.launch("count_kernel", 1, 1, (array, 8))
    fake.compile_error = RuntimeError("CUDA_ERROR_NO_BINARY_FOR_GPU")
    with pytest.raises(CudaError, match=r"loading count.cu on Fake GPU: CUDA_ERROR_NO_BINARY_FOR_GPU"):
        gpu.launch("count_kernel", 1, 1, (array, 8))


# products


@pytest.mark.parametrize("M, N, K", [(3, 5, 7), (1, 4, 6), (4, 1, 6), (5, 6, 1), (1, 1, 1), (2, 3, 3)])
@pytest.mark.parametrize("transa", [False, True])
@pytest.mark.parametrize("transb", [False, True])
@pytest.mark.parametrize("beta", [0.0, 1.0, 0.25])
def test_gemm(gpu, fake, M, N, K, transa, transb, beta):
    random = np.random.default_rng(M * N * K)
    a, b, c = (random.standard_normal(shape).astype(F) for shape in ((M, K), (K, N), (M, N)))
    out = gpu.to_device(c if beta else np.full((M, N), np.nan, F))
    arrays = [gpu.to_device(np.ascontiguousarray(x.T) if t else x) for x, t in ((a, transa), (b, transb))]
    allocations = len(fake.allocations)
    gpu.gemm(out, *arrays, transa=transa, transb=transb, beta=beta)
    assert fake.launches[-1] == ("sgemm", (N, M, K)) and len(fake.allocations) == allocations
    assert np.allclose(gpu.to_host(out), a @ b + (beta * c if beta else 0), atol=1e-5)


def test_gemm_reads_beta_when_it_is_called(gpu):
    """The products run later: beta of the first must not become the second's."""
    one = gpu.to_device(np.ones((1, 1), F))
    outs = [gpu.to_device(np.full((1, 1), 10, F)) for _ in range(2)]
    gpu.gemm(outs[0], one, one, beta=1)
    gpu.gemm(outs[1], one, one, beta=0)
    assert [gpu.to_host(out).item() for out in outs] == [11, 1]


def test_gemm_refuses_what_it_would_have_to_copy(gpu):
    a, b, out = gpu.zeros((2, 3)), gpu.zeros((3, 4)), gpu.zeros((2, 4))
    sliced = gpu.zeros((2, 3))
    sliced.flags.c_contiguous = False
    for arrays, message in (
        ((out, np.zeros((2, 3), F), b), "gemm: a is a ndarray, expected an array on Fake GPU"),
        ((out, sliced, b), r"gemm: a of shape \(2, 3\) is not C-contiguous"),
        ((gpu.zeros((2, 4), np.float64), a, b), r"gemm: out is float64\(2, 4\), expected a float32 matrix"),
        ((out, a, gpu.zeros((1, 3, 4))), r"gemm: b is float32\(1, 3, 4\), expected a float32 matrix"),
    ):
        with pytest.raises(TypeError, match=message):
            gpu.gemm(*arrays)
    for arrays, options in (
        ((out, a, a), {}),
        ((out, a, b), {"transb": True}),
        ((gpu.zeros((4, 2)), a, b), {}),
        ((gpu.zeros((0, 4)), gpu.zeros((0, 3)), b), {}),
    ):
        with pytest.raises(ValueError, match=r"gemm: float32.* @ float32.* does not fit float32"):
            gpu.gemm(*arrays, **options)


def test_a_failed_product_says_which(gpu, monkeypatch):
    def fail(*_):
        raise RuntimeError("CUBLAS_STATUS_EXECUTION_FAILED")

    monkeypatch.setattr(gpu, "_sgemm", fail)
    a = gpu.zeros((2, 2))
    with pytest.raises(CudaError, match=r"gemm of float32\(2, 2\) and float32\(2, 2\) into .*EXECUTION_FAILED"):
        gpu.gemm(gpu.zeros((2, 2)), a, a)


# graphs


@pytest.fixture
def library(fake, monkeypatch):
    """The functions of cuBLAS that are called by ctypes, on the fake; calls: what else than products was asked for."""
    calls, status = [], []

    def sgemm(*arguments):
        fake.sgemm(*arguments)
        return status[0] if status else 0

    functions = SimpleNamespace(
        cublasSetStream_v2=lambda *arguments: calls.append(("stream", *arguments)) or 0,
        cublasSetWorkspace_v2=lambda *arguments: calls.append(("workspace", *arguments)) or 0,
        cublasSgemm_v2=sgemm,
    )
    monkeypatch.setattr(runtime_module, "loaded_cublas", lambda: functions)
    return SimpleNamespace(functions=functions, calls=calls, status=status)


def test_a_graph_does_later_what_was_captured(fake, library):
    """A launch, a product, a fill and a kernel on scratch, on what the arrays hold when the graph is launched."""
    gpu = Runtime()
    array, out, product = gpu.zeros((2, 2)), gpu.zeros((2, 2)), gpu.zeros((2, 2))

    def work():
        gpu.launch("scale_kernel", 1, 4, (gpu.scratch("twice", (2, 2)), array, 2, 0, 4))
        gpu.gemm(product, gpu.scratch("twice", (2, 2)), array)
        gpu.launch("scale_kernel", 1, 4, (out, product, 1, 0, 4))

    work()
    gpu.copy_in(array, np.full((2, 2), 1, F))
    launches, allocations = len(fake.launches), len(fake.allocations)
    replay = gpu.capture(work)
    assert gpu.to_host(out).tolist() == [[0, 0], [0, 0]] and len(fake.allocations) == allocations
    assert len(fake.launches) == launches + 3  # told, not done
    gpu.scratch("twice", (20, 20))  # the graph's own buffer stays
    for value in (3, 5):
        gpu.copy_in(array, np.full((2, 2), value, F))
        replay()
        assert gpu.to_host(out).tolist() == [[4 * value**2] * 2] * 2
    assert [launch for launch in fake.launches if launch[0] == "graph"] == [("graph", 3)] * 2
    assert replay.args[1]["twice"].nbytes == 16


def test_what_is_outside_of_graphs_comes_between_them(fake, library):
    """At once where nothing is captured; else in its place at every launch, and not while it is captured."""
    gpu, seen = Runtime(), []
    array = gpu.to_device(np.full(4, 1, F))

    def work():
        gpu.launch("scale_kernel", 1, 4, (array, array, 2, 0, 4))
        gpu.outside_graphs(lambda: seen.append(gpu.to_host(array)[0]))  # which a graph could not hold
        gpu.launch("scale_kernel", 1, 4, (array, array, 3, 0, 4))

    work()
    replay = gpu.capture(work)
    assert seen == [2] and gpu.to_host(array)[0] == 6
    replay(), replay()
    assert seen == [2, 12, 72] and gpu.to_host(array)[0] == 216
    assert [launch for launch in fake.launches if launch[0] == "graph"] == 4 * [("graph", 1)]
    fake.capture_error = RuntimeError("cudaErrorStreamCaptureInvalidated")
    with pytest.raises(CudaError, match="capturing a CUDA graph: cudaErrorStreamCaptureInvalidated"):
        gpu.capture(work)
    fake.capture_error = None
    work()
    assert seen == [2, 12, 72, 432] and fake.captured is None


def test_all_runs_on_one_stream_that_can_be_captured(fake, library):
    """cuBLAS as well, with a workspace of its own, set behind the stream; a caller's stream is kept."""
    first = Runtime()
    assert fake.stream.ptr == 1000 and first._stream is fake.stream
    (stream, workspace) = library.calls
    assert stream == ("stream", 77, 1000)
    assert workspace[:2] == ("workspace", 77) and workspace[3] == 32 << 20
    assert workspace[2] == runtime_module._workspaces[-1].data.ptr
    assert Runtime()._stream is first._stream
    types = library.functions.cublasSgemm_v2.argtypes
    assert len(types) == 14 and {*types} == {ctypes.c_int, ctypes.c_void_p}


@pytest.mark.parametrize(
    "what, doing",
    [
        (lambda gpu, array: gpu.copy_in(array, np.ones(4, F)), "copying to the GPU"),
        (lambda gpu, array: gpu.to_host(array), "copying to the host"),
        (lambda gpu, array: gpu.to_host_later(array), "copying to the host"),
        (lambda gpu, array: gpu.to_device(np.ones(4, F)), "copying to the GPU"),
        (lambda gpu, array: gpu.synchronize(), "waiting for the GPU"),
    ],
)
def test_what_a_graph_cannot_hold_is_an_error_and_the_gpu_goes_on(what, doing, fake, library):
    """The same on the emulator."""
    for gpu in (Runtime(), EmulatedRuntime()):
        array = gpu.zeros(4)
        with pytest.raises(CudaError, match=doing):
            gpu.capture(lambda gpu=gpu, array=array: what(gpu, array))
        gpu.copy_in(array, np.full(4, 2, F))
        assert gpu.to_host(array).tolist() == [2, 2, 2, 2]
        gpu.capture(lambda array=array: array)()


def test_a_capture_that_cuda_refuses_is_an_error(fake, library):
    gpu = Runtime()
    fake.capture_error = RuntimeError("cudaErrorStreamCaptureInvalidated")
    with pytest.raises(CudaError, match="capturing a CUDA graph: cudaErrorStreamCaptureInvalidated"):
        gpu.capture(lambda: None)
    with pytest.raises(ZeroDivisionError):  # what ended the work is told, not what it led to
        gpu.capture(lambda: 1 / 0)
    gpu.gemm(gpu.zeros((2, 2)), gpu.zeros((2, 2)), gpu.zeros((2, 2)))
    assert fake.captured is None
    library.status.append(14)
    with pytest.raises(CudaError, match=r"gemm of float32\(2, 2\).*cublasSgemm_v2: status 14"):
        gpu.gemm(gpu.zeros((2, 2)), gpu.zeros((2, 2)), gpu.zeros((2, 2)))


def test_without_cublas_by_ctypes_there_are_products_but_no_graphs(fake, gpu):
    """CuPy's own sgemm, which refuses to be captured."""
    with pytest.raises(CudaError, match=r"capturing a CUDA graph: the library of cuBLAS .* was not found"):
        gpu.capture(lambda: None)
    assert fake.captured is None and fake.launches[-1][0] == "sgemm"  # the probe's


def test_cublas_is_found_among_what_is_loaded(monkeypatch, tmp_path):
    skip_off_linux()
    (tmp_path / "cublas.c").write_text("int cublasSgemm_v2(void) { return 7; }")
    library = tmp_path / "libcublas.so.12"
    subprocess.run([build.COMPILER, "-xc", "-shared", "-fPIC", "-o", library, tmp_path / "cublas.c"], check=True)
    code = "import ctypes; from kernels.cuda.runtime import runtime; print(runtime.loaded_cublas(), end=' ')\n"
    code += f"ctypes.CDLL({str(library)!r}); print(runtime.loaded_cublas().cublasSgemm_v2())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "None 7\n", done.stderr


def test_constants_are_made_once(gpu, fake):
    values = np.arange(4, dtype=np.int32)
    first = gpu.constant(values)
    values[0] = 9
    second = gpu.constant(values)
    assert gpu.constant(np.arange(4, dtype=np.int32)) is first and gpu.to_host(first).tolist() == [0, 1, 2, 3]
    assert second is not first and gpu.to_host(second).tolist() == [9, 1, 2, 3]


def test_tf32_is_a_mode_of_cublas(fake, monkeypatch):
    assert not Runtime().tf32 and fake.math_mode == (77, 0)
    assert Runtime(tf32=True).tf32 and fake.math_mode == (77, 3)
    older = fake_cupy.FakeCupy(major=7)
    monkeypatch.setitem(sys.modules, "cupy", older.module)
    assert not Runtime(tf32=True).tf32 and older.math_mode == (77, 0)


# ----------------------------------------------------------------------------------------------------------------------
# on a GPU


@pytest.fixture(scope="module", params=[False, True], ids=["float32", "tf32"])
def real(request):
    return open_gpu(tf32=request.param)


@pytest.mark.gpu
@pytest.mark.parametrize("M, N, K", [(64, 128, 256), (1, 50304, 768), (7, 5, 3)])
@pytest.mark.parametrize("transa", [False, True])
@pytest.mark.parametrize("transb", [False, True])
def test_gemm_of_cublas(real, M, N, K, transa, transb):
    random = np.random.default_rng(1)
    a, b, c = (random.standard_normal(shape).astype(F) for shape in ((M, K), (K, N), (M, N)))
    arrays = [real.to_device(np.ascontiguousarray(x.T) if t else x) for x, t in ((a, transa), (b, transb))]
    for beta in (0, 1, 0.5):
        out = real.to_device(c if beta else np.full((M, N), np.nan, F))
        real.gemm(out, *arrays, transa=transa, transb=transb, beta=beta)
        expected = a.astype(float) @ b + (beta * c if beta else 0)
        error = np.abs(real.to_host(out) - expected).max() / np.sqrt(K)
        print(f"gemm {M}x{N}x{K} beta {beta}: {error:.1e} sqrt(K)")
        assert error < (5e-3 if real.tf32 else 5e-6)


@pytest.mark.gpu
def test_tf32_is_switched_on_where_it_is_asked_for(real):
    """Operands keep 11 bits of 24: products of normal values are off by about 3e-4, the largest of many by 1e-3."""
    random = np.random.default_rng(2)
    a, b = (random.standard_normal((512, 512)).astype(F) for _ in range(2))
    out = real.zeros((512, 512))
    real.gemm(out, real.to_device(a), real.to_device(b))
    error = np.abs(real.to_host(out) - a.astype(float) @ b).max() / np.sqrt(512)
    print(f"tf32 {real.tf32}: {error:.1e} sqrt(K)")
    assert 1e-4 < error < 5e-3 if real.tf32 else error < 5e-6


@pytest.mark.gpu
def test_copies_on_a_gpu(real):
    array = real.zeros((256, 256))
    laters = []
    for i in range(10):
        values = np.full((256, 256), i, F)
        real.copy_in(array, values)
        values[...] = -1
        laters.append(real.to_host_later(array))
    assert [np.unique(later()).tolist() for later in laters] == [[i] for i in range(10)]
    assert real.to_host(array).mean() == 9


@pytest.mark.gpu
def test_graphs_on_a_gpu(real):
    """A product, a copy of it, memory that is filled: the bits of the same launches one by one; copies are refused."""
    random = np.random.default_rng(3)
    a, b = (real.to_device(random.standard_normal((768, 768)).astype(F)) for _ in range(2))
    out, total = real.zeros((768, 768)), real.zeros((768, 768))
    device = cuda.device(real)

    def work():
        real.gemm(out, a, b, transb=True)
        total.fill(0)
        device.residual_forward(total, total, out)

    def values():
        real.copy_in(a, random.standard_normal((768, 768)).astype(F))

    values()
    work()
    replay = real.capture(work)
    with pytest.raises(CudaError):
        real.capture(lambda: real.copy_in(a, np.ones((768, 768), F)))
    with pytest.raises(CudaError):
        real.capture(lambda: real.to_host(a))
    for _ in range(3):
        values()
        work()
        expected = real.to_host(total)
        total.fill(1)
        replay()
        assert real.to_host(total).tobytes() == expected.tobytes()


@pytest.mark.gpu
def test_memory_stays_as_it_is_after_the_first_step(real):
    array, losses = real.zeros((64, 64)), real.zeros((64, 64))

    def step():
        real.copy_in(array, np.eye(64, dtype=F))
        real.gemm(real.scratch("product", (64, 64)), array, array)
        real.gemm(losses, array, real.scratch("product", (64, 64)), beta=1.0)
        return real.to_host_later(losses)().sum()

    step()
    used, _ = real.memory()
    sums = [step() for _ in range(20)]
    assert sums == [64.0 * (i + 2) for i in range(20)]
    assert real.memory()[0] == used


BAD = """extern "C" __global__ void __launch_bounds__(32)
large_kernel(float* out, int N) {
    __shared__ float held[10240];
    extern __shared__ float more[];
    held[N + threadIdx.x] = out[threadIdx.x];
    more[N + threadIdx.x] = out[threadIdx.x];
    __syncthreads();
    out[threadIdx.x] = held[N - threadIdx.x] + more[N];
}
"""


@pytest.mark.gpu
def test_errors_on_a_gpu(real, tmp_path, monkeypatch):
    """40 KiB of static and 16 of dynamic shared memory, and a file that is not CUDA."""
    (tmp_path / "large.cu").write_text(BAD)
    (tmp_path / "wrong.cu").write_text(BAD.replace("large", "wrong").replace("held[N", "nowhere[N"))
    monkeypatch.setattr(real, "_kernels", source.kernels(tmp_path))
    out = real.zeros(32)
    with pytest.raises(CudaError, match=r"large_kernel<<<.*, 16384>>>\(out=float32.*CUDA_ERROR_INVALID_VALUE"):
        real.launch("large_kernel", 1, 32, (out, 0), shared_mem=16384)
    with pytest.raises(CudaError, match=r'wrong.cu for .*:\n.*wrong\.cu\(5\): error: identifier "nowhere"'):
        real.launch("wrong_kernel", 1, 32, (out, 0))
    real.synchronize()
