"""The CUDA emulator itself: correct kernels are right and raise nothing, and each planted mistake is named.

The kernels are in cuda_emulator/planted: correct.cu and bugs.cu.
"""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from availability import skip_off_linux
from cuda_emulator import build
from cuda_emulator.runtime import SCHEDULES, DeviceArray, EmulatedRuntime, KernelError

PLANTED = Path(__file__).parent.parent / "cuda_emulator" / "planted"
ORDERS = [("ascending", 0), ("descending", 0), ("random", 1), ("random", 2)]

skip_off_linux()


def emulated(mode: str, schedule: str = "ascending", seed: int = 0, **options) -> EmulatedRuntime:
    return EmulatedRuntime(mode, schedule, seed, folders=(PLANTED,), **options)


@pytest.fixture(scope="session", autouse=True)
def built():
    """Compiles all that the tests here use, several files at a time."""
    correct, bugs = PLANTED / "correct.cu", PLANTED / "bugs.cu"
    jobs = [
        (emulated("fast"), (correct, bugs)),
        (emulated("check"), (correct, bugs)),
        (emulated("fast", portable=True), (correct,)),
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda job: job[0].build(*job[1]), jobs))


def normal(*shape, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


# ----------------------------------------------------------------------------------------------------------------------
# correct kernels


def check_row_sum_by_shuffle(cuda):
    inp = normal(21, 50)  # 21 rows: in the last block some warps have none
    out = cuda.zeros(21)
    cuda.launch("row_sum_by_shuffle", 6, 128, (out, cuda.to_device(inp), 21, 50))
    np.testing.assert_allclose(cuda.to_host(out), inp.sum(1), atol=1e-5)


def check_row_sum_by_shared(cuda):
    inp = normal(9, 600)
    out = cuda.zeros(9)
    cuda.launch("row_sum_by_shared", 9, 128, (out, cuda.to_device(inp), 600))
    np.testing.assert_allclose(cuda.to_host(out), inp.sum(1), atol=1e-4)


def check_matmul_by_tiles(cuda):
    a, b = normal(40, 50), normal(50, 20)
    out = cuda.scratch("out", (40, 20))
    args = (out, cuda.to_device(a), cuda.to_device(b), 40, 20, 50)
    cuda.launch("matmul_by_tiles", (2, 3), (16, 16), args, shared_mem=4 * 16 * (17 + 16))
    np.testing.assert_allclose(cuda.to_host(out), a @ b, atol=1e-5)


def check_count_by_atomics(cuda):
    inp = np.random.default_rng(0).integers(0, 10, 1000).astype(np.int32)
    counts, total, largest = cuda.zeros(10, np.int32), cuda.zeros(1), cuda.zeros(1, np.int32)
    cuda.launch("count_by_atomics", 4, 256, (counts, total, largest, cuda.to_device(inp), 1000))
    assert np.array_equal(cuda.to_host(counts), np.bincount(inp))
    assert cuda.to_host(total)[0] == inp.sum() and cuda.to_host(largest).view(np.float32)[0] == 9


def check_group_max_by_mask(cuda):
    inp = np.random.default_rng(1).integers(-50, 50, 1000).astype(np.int32)
    out, counts = cuda.zeros(125, np.int32), cuda.zeros(32, np.int32)
    cuda.launch("group_max_by_mask", 8, 128, (out, counts, cuda.to_device(inp), 1000))
    assert np.array_equal(cuda.to_host(out), inp.reshape(125, 8).max(1))
    assert np.array_equal(cuda.to_host(counts), [np.sum(warp > 0) for warp in np.split(inp, range(32, 1000, 32))])


def check_reverse_by_syncwarp(cuda):
    inp, out = np.arange(64, dtype=np.float32), cuda.zeros(64)
    cuda.launch("reverse_by_syncwarp", 1, 64, (out, cuda.to_device(inp), 3))
    assert np.array_equal(cuda.to_host(out), inp.reshape(8, 8)[:, ::-1].ravel())


def check_functions_in_three_dimensions(cuda):
    grid, block = (3, 2, 2), (4, 2, 3)
    N = 12 * 24
    x = normal(N)
    out, twice = cuda.zeros((6, N)), cuda.zeros(N, np.float64)
    cuda.launch("functions_in_three_dimensions", grid, block, (out, twice, cuda.to_device(x), 0.5, N))
    thread = np.arange(N) % 24
    expected = [
        np.exp(x) * 0.5,
        np.log(np.abs(x) + 1) + x.clip(min=x.clip(max=0)),
        np.tanh(x) * (np.arange(N) % 3 + 1) / 2,
        1 / np.sqrt((x * x + 1) / 2) + np.sqrt(x + 8),
        [(i & -i).bit_length() + 100 * (32 - int(i).bit_length()) + min(i, 7) for i in map(int, thread)],
        -x,
    ]
    np.testing.assert_allclose(cuda.to_host(out), expected, rtol=2e-6, atol=1e-6)
    assert np.array_equal(cuda.to_host(twice), 2.0 * x)


def check_count_by_barrier(cuda):
    inp = normal(3, 256)
    inp[1] = 1
    out, shuffled = cuda.zeros(3, np.int32), cuda.zeros((24, 32), np.int32)
    cuda.launch("count_by_barrier", 3, 256, (out, cuda.to_device(inp), shuffled))
    assert np.array_equal(cuda.to_host(out), [np.sum(inp[0] > 0), -1, np.sum(inp[2] > 0)])
    lane = np.arange(32)
    up, down = np.where(lane % 16 < 3, lane, lane - 3), np.where(lane % 16 > 12, lane, lane + 3)
    assert np.array_equal(cuda.to_host(shuffled), np.tile(up + 100 * down + 10000 * (lane // 8 * 8 + 5), (24, 1)))


CHECKS = [check for name, check in sorted(globals().items()) if name.startswith("check_")]


@pytest.mark.parametrize("schedule, seed", ORDERS)
@pytest.mark.parametrize("mode", ["fast", "check"])
@pytest.mark.parametrize("check", CHECKS)
def test_correct_kernels(check, mode, schedule, seed):
    check(emulated(mode, schedule, seed))


@pytest.mark.parametrize("check", CHECKS)
def test_correct_kernels_with_ucontext(check):
    check(emulated("fast", "random", portable=True))


# ----------------------------------------------------------------------------------------------------------------------
# planted mistakes

ELSEWHERE = r"\(bugs\.cu:\d+\)"


def launch_bug(cuda, kernel: str, *args, block: int = 32, grid: int = 1, shared_mem: int = 0):
    """Runs a kernel of bugs.cu whose first argument is out (64) and whose second, if any, inp (64)."""
    cuda.launch(kernel, grid, block, args, shared_mem)


def line_of(text: str) -> int:
    """The only line of bugs.cu with that text."""
    lines = [number for number, line in enumerate((PLANTED / "bugs.cu").read_text().split("\n"), 1) if text in line]
    assert len(lines) == 1
    return lines[0]


RACES = [
    (
        "missing_syncthreads",
        (),
        dict(block=64),
        r"values .* which thread \d+ .*: a __syncthreads in between is missing",
    ),
    ("missing_syncthreads_at_loop_end", (2,), dict(block=64), r"tile .* which thread \d+ .* __syncthreads in between"),
    ("missing_syncwarp", (), {}, r"values .* which thread \d+ .*: a __syncwarp or __syncthreads in between is missing"),
    (
        "syncwarp_of_too_few",
        (),
        {},
        r"values .* which thread \d+ .*: a __syncwarp or __syncthreads in between is missing",
    ),
    ("missing_atomic", (16,), dict(grid=4), r"out .* which thread \d+ of block \d wrote .*: blocks .* have no order"),
]


@pytest.mark.parametrize("schedule, seed", ORDERS)
@pytest.mark.parametrize("kernel, numbers, sizes, message", RACES)
def test_races_are_found_in_every_order(kernel, numbers, sizes, message, schedule, seed):
    cuda = emulated("check", schedule, seed)
    inp = cuda.to_device(normal(128))
    start = rf"^{kernel}: data race: thread \d+ of block \d (reads|writes) float \d+ of "
    with pytest.raises(KernelError, match=f"{start}{message}") as error:
        launch_bug(cuda, kernel, cuda.zeros(64), inp, *numbers, **sizes)
    assert len(re.findall(ELSEWHERE, str(error.value))) == 2


def test_load_beside_atomics_is_a_race():
    cuda = emulated("check")
    args = cuda.zeros(1), cuda.zeros(1), cuda.to_device(normal(32))
    with pytest.raises(KernelError, match=r"data race: thread \d+ of block 0 .* float 0 of total .*"):
        launch_bug(cuda, "load_beside_atomics", *args)


def test_out_of_bounds_names_thread_array_element_and_line():
    cuda = emulated("check")
    out, inp = cuda.zeros(768), cuda.to_device(normal(768))
    where = f"bugs.cu:{line_of('if (i <= N)')}"
    with pytest.raises(KernelError) as error:
        launch_bug(cuda, "store_out_of_bounds", out, inp, 768, block=256, grid=4)
    assert str(error.value) == (
        f"store_out_of_bounds: out of bounds: thread 0 of block 3 writes float 768 of out, which has 768 ({where})"
    )
    with pytest.raises(KernelError, match="thread 0 of block 0 reads float -1 of inp, which has 768"):
        launch_bug(cuda, "load_out_of_bounds", out, inp, 768, block=256, grid=3)
    with pytest.raises(KernelError, match="thread 0 of block 0 writes float 1000768 of out, which has 768"):
        launch_bug(cuda, "store_far_away", out, 1000768)
    with pytest.raises(KernelError, match=r"writes 4 bytes at 0x[0-9a-f]+, far from all arrays"):
        launch_bug(cuda, "store_far_away", out, 1 << 40)


def test_out_of_bounds_ends_the_kernel_before_the_access():
    cuda = emulated("check")
    flat = cuda.zeros(1000)
    with pytest.raises(KernelError, match="writes float 500 of out, which has 500"):
        launch_bug(
            cuda, "store_out_of_bounds", flat[:500], cuda.to_device(np.ones(500, np.float32)), 500, block=256, grid=2
        )
    assert np.array_equal(cuda.to_host(flat), np.repeat([2, 0], 500))


def test_view_must_not_be_overrun_into_its_neighbour():
    """Also when the neighbour is another argument of the kernel: weight and bias in a flat buffer."""
    cuda = emulated("check")
    flat = cuda.to_device(normal(3, 100))
    with pytest.raises(KernelError, match="writes float 100 of out, which has 100"):
        launch_bug(cuda, "store_out_of_bounds", flat[0], flat[1], 100, block=128)
    before = cuda.to_host(flat)
    with pytest.raises(KernelError, match="reads float -1 of inp, which has 100"):
        launch_bug(cuda, "load_out_of_bounds", flat[0], flat[1], 100, block=128)
    assert np.array_equal(cuda.to_host(flat), before)
    launch_bug(cuda, "store_out_of_bounds", flat[0], flat[1], 100, block=64)  # what is not out of bounds arrives
    assert np.array_equal(cuda.to_host(flat)[0], np.concatenate([2 * before[1, :64], before[0, 64:]]))


def test_misaligned_float4():
    cuda = emulated("check")
    out, inp = cuda.zeros(32), cuda.to_device(np.arange(132, dtype=np.float32))
    launch_bug(cuda, "misaligned_float4", out, inp[4:])
    assert np.array_equal(cuda.to_host(out), np.arange(5, 133, 4))
    where = f"bugs.cu:{line_of('const float4 pack')}"
    with pytest.raises(
        KernelError, match=rf"misaligned: thread 0 of block 0 reads 16 bytes .*, float 0 of inp \({where}"
    ):
        launch_bug(cuda, "misaligned_float4", out, inp[1:])
    with pytest.raises(KernelError, match=r"misaligned: .* float 0 of values, which needs __align__\(16\)"):
        launch_bug(cuda, "misaligned_shared_float4", out)


SHARED = [
    ("overrun_of_dynamic_shared", "out of bounds: thread 31 of block 0 writes float 32 of values, which has 32"),
    ("overrun_of_static_shared", "out of bounds: thread 31 of block 0 writes float 32 of values, which has 32"),
    ("overrun_of_a_row", r"out of bounds: thread 24 of block 0 uses index 8 of a 'float \[8\]'"),
]


@pytest.mark.parametrize("kernel, message", SHARED)
def test_overruns_of_shared_memory(kernel, message):
    cuda = emulated("check")
    with pytest.raises(KernelError, match=f"^{kernel}: {message} {ELSEWHERE}"):
        launch_bug(cuda, kernel, cuda.zeros(32), cuda.to_device(normal(32)), shared_mem=4 * 32)


def test_overrun_of_a_local_array():
    cuda = emulated("check")
    launch_bug(cuda, "overrun_of_a_local_array", cuda.zeros(32), 4)
    with pytest.raises(KernelError, match=r"thread 4 of block 0 uses index 4 of a 'float \[4\]'"):
        launch_bug(cuda, "overrun_of_a_local_array", cuda.zeros(32), 5)


WAITING = [
    ("divergent_shuffle", 32, (), "divergent collective: thread 31 .* calls __syncwarp .* thread 0 .* in __shfl_sync"),
    ("lane_outside_its_mask", 32, (), "__shfl_sync of mask 0xffff .* by thread 16 of block 0, lane 16, which the mask"),
    ("shuffle_from_outside_the_mask", 32, (), "thread 0 .* shuffles from lane 16 .*, which is not in the mask"),
    ("shuffle_from_a_lane_that_left", 32, (20,), "thread 4 .* shuffles from lane 20 .*, which has left the kernel"),
    (
        "masks_that_differ",
        32,
        (),
        "waits for ever: thread 0 .* in __syncwarp of mask 0xf+ .* for lanes with other masks",
    ),
    (
        "barrier_for_one_half",
        64,
        (),
        "thread 32 .* leaves the kernel without .* __syncthreads .* where thread 0 .* waits",
    ),
    ("barriers_in_two_branches", 64, (), "divergent __syncthreads: thread 32 .* while thread 0 .* waits at another"),
    (
        "barrier_against_syncwarp",
        32,
        (),
        "16 threads at __syncthreads .*; thread 16 .* in __syncwarp .* for lanes 0xffff",
    ),
]


@pytest.mark.parametrize("mode", ["fast", "check"])
@pytest.mark.parametrize("kernel, block, numbers, message", WAITING)
def test_misused_barriers_and_collectives(kernel, block, numbers, message, mode):
    cuda = emulated(mode)
    with pytest.raises(KernelError, match=f"^{kernel}: .*{message}") as error:
        launch_bug(cuda, kernel, cuda.zeros(64), *numbers, block=block)
    assert "bugs.cu:" in str(error.value)


@pytest.mark.parametrize("schedule, seed", ORDERS)
@pytest.mark.parametrize("kernel, block, numbers, message", WAITING)
def test_misused_barriers_and_collectives_in_every_order(kernel, block, numbers, message, schedule, seed):
    cuda = emulated("fast", schedule, seed)
    with pytest.raises(KernelError, match=f"^{kernel}: "):
        launch_bug(cuda, kernel, cuda.zeros(64), *numbers, block=block, grid=3)
    check_row_sum_by_shared(cuda)  # the emulator is none the worse for it


@pytest.mark.parametrize("mode", ["fast", "check"])
def test_uninitialised_shared_memory_is_nan(mode):
    cuda = emulated(mode)
    for _ in range(2):  # what the block before left does not count
        out = cuda.zeros(32)
        launch_bug(cuda, "uninitialised_shared", out, shared_mem=4 * 32)
        assert np.array_equal(np.flatnonzero(np.isnan(cuda.to_host(out))), [0, 31])


def test_too_much_shared_memory():
    cuda = emulated("fast")
    launch_bug(cuda, "too_much_shared", cuda.zeros(32), shared_mem=32 << 10)
    with pytest.raises(ValueError, match=r"too_much_shared<<<.*float32\(32,\).*more than 49152 bytes"):
        launch_bug(cuda, "too_much_shared", cuda.zeros(32), shared_mem=(32 << 10) + 4)


@pytest.mark.parametrize("mode", ["fast", "check"])
def test_declared_shared_memory(mode):
    """80 KiB beside 16, which a GPU with 96 for a block gives, one with 64 does not."""
    for capability in ((7, 0), (9, 0)):
        cuda = emulated(mode, capability=capability)
        launch_bug(cuda, "much_shared", out := cuda.zeros(32))
        assert cuda.to_host(out).tolist() == [2] * 32
    with pytest.raises(ValueError, match="81921 bytes of shared memory, at most 81920"):
        launch_bug(cuda, "much_shared", cuda.zeros(32), shared_mem=81921)
    cuda = emulated(mode, capability=(7, 5))
    with pytest.raises(ValueError, match="81920 bytes of shared memory, at most 65536"):
        launch_bug(cuda, "much_shared", cuda.zeros(32))


# ----------------------------------------------------------------------------------------------------------------------
# the address sanitizer, in a process of its own

ASAN = """
import os, sys
import numpy as np
import test_cuda_emulator as tests

cuda = tests.emulated("asan", "random")
for check in tests.CHECKS:
    check(cuda)
print("correct", flush=True)
flat = cuda.zeros(4 * 32 + 1)
for kernel, args in tests.ASAN_BUGS.items():
    print(kernel, flush=True)
    if os.fork() == 0:  # an error ends the process
        tests.launch_bug(cuda, kernel, *(flat[1:] if arg is None else arg for arg in args), shared_mem=4 * 32)
        print("nothing found", flush=True)
        os._exit(0)
    os.wait()
"""
ASAN_BUGS = {
    "store_far_away": (None, 4 * 32 - 16),
    "misaligned_float4": (None, None),
    "overrun_of_dynamic_shared": (None, None),
    "overrun_of_static_shared": (None, None),
    "overrun_of_a_row": (None, None),
}
ASAN_REPORTS = {
    "store_far_away": "AddressSanitizer: use-after-poison",
    "misaligned_float4": "misaligned address",
    "overrun_of_dynamic_shared": "AddressSanitizer: heap-buffer-overflow",
    "overrun_of_static_shared": "AddressSanitizer: heap-buffer-overflow",
    "overrun_of_a_row": "index 8 out of bounds for type 'float [8]'",
}


def test_address_sanitizer():
    environment = os.environ | build.asan_environment() | {"PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, "-c", ASAN], env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0 and result.stdout.startswith("correct"), result.stdout + result.stderr
    assert "nothing found" not in result.stdout
    for report in ASAN_REPORTS.values():
        assert report in result.stderr, report
    assert result.stderr.count("bugs.cu:") >= len(ASAN_BUGS)


def test_address_sanitizer_must_be_loaded():
    with pytest.raises(RuntimeError, match="needs the environment"):
        emulated("asan")


# ----------------------------------------------------------------------------------------------------------------------
# building


def test_compile_error_names_file_and_line():
    with pytest.raises(build.BuildError, match=r"does_not_compile\.cu:5:.*__syncthreadz"):
        emulated("fast").launch("misspelt", 1, 32, (emulated("fast").zeros(32),))


def test_unreadable_shared_declaration_is_an_error():
    with pytest.raises(build.BuildError, match=r"unreadable_shared\.cu: .*cannot read .*: __shared__ struct"):
        emulated("fast").launch("unreadable", 1, 32, (emulated("fast").zeros(32),))


def test_missing_compiler_is_an_error(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(build.BuildError, match="needs g\\+\\+ and addr2line"):
        emulated("fast")


def test_shared_declarations_become_calls_on_the_same_lines():
    text = "a; __shared__ T<2, 3>::U x[2]\n[3], y; // __shared__ int z;\nextern __shared__ __align__(16) float s[];"
    lines = build.processor_text(text, Path("x.cu")).split("\n")
    assert [line.rstrip() for line in lines] == [
        "a; EMULATOR_SHARED(x, [2]",
        "[3], 0, T<2, 3>::U); EMULATOR_SHARED(y, , 0, T<2, 3>::U);",
        "EMULATOR_DYNAMIC_SHARED(s, float);",
    ]


# ----------------------------------------------------------------------------------------------------------------------
# host code


def test_arguments_are_checked():
    cuda = emulated("fast")
    out, inp = cuda.zeros(64), cuda.zeros(64)
    for args, message in [
        ((out, inp), "2 arguments, expected 3: out, inp, C"),
        ((out, np.zeros(64, np.float32), 1), "inp is a ndarray, expected an array on the device"),
        ((out, cuda.zeros(64, np.int32), 1), "inp has dtype int32, expected float32"),
        ((out, inp[::2], 1), "inp of shape .* is not C-contiguous"),
        ((out, inp, 1.5), "C is 1.5, expected a number for int"),
    ]:
        with pytest.raises(TypeError, match=f"missing_atomic: {message}"):
            cuda.launch("missing_atomic", 1, 32, args)
    with pytest.raises(KeyError, match="no_such_kernel"):
        cuda.launch("no_such_kernel", 1, 32, ())


@pytest.mark.parametrize("grid, block, shared_mem", [
    (0, 32, 0), (1, 0, 0), (1, 33, 0), (2**31, 32, 0), ((1, 65536), 32, 0), ((1, 1, 65536), 32, 0), (1, 32, 49153),
    (1, (1, 1, 65), 0), ((1, 1, 1, 1), 1, 0),
])  # fmt: skip
def test_sizes_are_checked(grid, block, shared_mem):
    cuda = emulated("fast")
    with pytest.raises(ValueError):
        cuda.launch("divergent_shuffle", grid, block, (cuda.zeros(32),), shared_mem)


def test_launch_bound_error_names_everything():
    cuda = emulated("fast")
    message = (
        r"divergent_shuffle<<<\(2, 1, 1\), \(33, 1, 1\), 0>>>\(out=float32\(32,\)\): 33 threads a block, .* bound is 32"
    )
    with pytest.raises(ValueError, match=message):
        cuda.launch("divergent_shuffle", 2, 33, (cuda.zeros(32),))


REFUSED = {
    "ufunc": lambda a: np.exp(a),
    "array function": lambda a: np.concatenate([a, a]),
    "asarray": lambda a: np.asarray(a),
    "assignment to NumPy": lambda a: np.zeros(6).__setitem__(slice(None), a),
    "arithmetic": lambda a: a + a,
    "arithmetic from the left": lambda a: np.zeros(6, np.float32) + a,
    "in place": lambda a: a.__iadd__(1) if hasattr(a, "__iadd__") else np.add(a, 1, out=a),
    "comparison": lambda a: a == a,
    "float": lambda a: float(a[0]),
    "int": lambda a: int(a[0]),
    "bool": lambda a: bool(a[0]),
    "iteration": lambda a: list(a),
    "item assignment": lambda a: a.__setitem__(0, 1),
    "matmul": lambda a: a @ a,
    "fancy index": lambda a: a[[0, 2]],
    "boolean index": lambda a: a[np.zeros(6, bool)],
    "reshape that copies": lambda a: a.reshape(2, 3)[:, 1:].reshape(4),
}


@pytest.mark.parametrize("use", REFUSED.values(), ids=REFUSED)
def test_device_arrays_refuse_what_only_numpy_could_do(use):
    with pytest.raises(TypeError):
        use(emulated("fast").zeros(6))


def test_device_arrays_have_what_host_code_uses():
    cuda = emulated("fast")
    values = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    array = cuda.to_device(values)
    assert (array.shape, array.dtype, array.size, array.ndim, array.nbytes) == ((2, 3, 4), np.float32, 24, 3, 96)
    assert len(array) == 2 and array.flags.c_contiguous and not array[:, 1:].flags.c_contiguous
    view = array[1].reshape(-1, 2)
    view.fill(7)
    array[0, 0, 1].fill(9)
    values[1], values[0, 0, 1] = 7, 9
    assert np.array_equal(cuda.to_host(array), values) and type(cuda.to_host(array)) is np.ndarray
    assert isinstance(view, DeviceArray) and cuda.is_array(view) and not cuda.is_array(values)


def test_copies():
    cuda = emulated("fast")
    host = np.arange(6, dtype=np.int32)
    array = cuda.to_device(host)
    later = cuda.to_host_later(array)
    host[0] = 100
    cuda.copy_in(array[3:], np.zeros(3, np.int32))
    assert np.array_equal(cuda.to_host(array), [0, 1, 2, 0, 0, 0]) and np.array_equal(later(), range(6))
    cuda.to_host(array)[:] = -1
    assert np.array_equal(cuda.to_host(array), [0, 1, 2, 0, 0, 0])
    for values in (np.zeros(6), np.zeros((6, 1), np.int32), [0] * 6):
        with pytest.raises(TypeError):
            cuda.copy_in(array, values)


def test_scratch_is_kept_grows_and_is_never_what_it_was():
    cuda = emulated("fast")
    first = cuda.scratch("key", (4, 5))
    first.fill(1)
    again = cuda.scratch("key", (2, 5))
    assert again.shape == (2, 5) and np.isnan(cuda.to_host(again)).all() and np.isnan(cuda.to_host(first)[:2]).all()
    again.fill(3)
    assert (cuda.to_host(first)[:2] == 3).all()
    assert cuda.scratch("key", 100, np.float64).nbytes == 800
    assert (cuda.to_host(cuda.scratch("other", 3, np.int32)) == -1).all()


def test_memory_counts_what_is_in_use():
    cuda = emulated("fast")
    assert cuda.memory()[0] == 0
    array = cuda.zeros((10, 10))
    view = array[1:]
    del array
    assert cuda.memory()[0] == 400 < cuda.memory()[1]
    del view
    assert cuda.memory()[0] == 0


@pytest.mark.parametrize("transa", [False, True])
@pytest.mark.parametrize("transb", [False, True])
def test_gemm(transa, transb):
    cuda = emulated("fast")
    a, b, before = normal(5, 7), normal(7, 4), normal(5, 4)
    args = (cuda.to_device(a.T.copy() if transa else a), cuda.to_device(b.T.copy() if transb else b), transa, transb)
    out = cuda.scratch("out", (5, 4))
    cuda.gemm(out, *args)
    np.testing.assert_allclose(cuda.to_host(out), a @ b, atol=1e-6)
    cuda.copy_in(out, before)
    cuda.gemm(out, *args, beta=0.5)
    np.testing.assert_allclose(cuda.to_host(out), a @ b + before / 2, atol=1e-6)


def test_gemm_checks_its_arguments():
    cuda = emulated("fast")
    a, out = cuda.zeros((4, 4)), cuda.zeros((4, 4))
    for bad in (
        cuda.zeros(4),
        cuda.zeros((4, 4), np.float64),
        cuda.zeros((4, 8))[:, ::2],
        np.zeros((4, 4), np.float32),
    ):
        with pytest.raises(TypeError):
            cuda.gemm(out, a, bad)
    with pytest.raises(ValueError, match="does not fit"):
        cuda.gemm(out, a, cuda.zeros((5, 4)))


def test_stray_store_is_noticed_in_fast_mode():
    """Behind an array there are guards that to_host and synchronize look at."""
    cuda = emulated("fast")
    out = cuda.zeros(100)
    launch_bug(cuda, "store_far_away", out, 100)
    with pytest.raises(KernelError, match=r"^store_far_away: stray stores behind an array of 400 bytes"):
        cuda.synchronize()


def test_orders_are_known():
    assert {schedule for schedule, _ in ORDERS} == set(SCHEDULES)
    with pytest.raises(ValueError, match="schedule"):
        emulated("fast", "backwards")
    with pytest.raises(ValueError, match="mode"):
        emulated("slow")
