"""All that kernels/cuda/runtime/runtime.py asks of CuPy is there, as it takes it, and it asks for no more."""

import ast
import functools
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import fake_cupy
import numpy as np
import pytest
from availability import import_cupy
from cuda_emulator.memory import DeviceArray
from cuda_emulator.runtime import EmulatedRuntime
from stub_library import described

from kernels.cuda.runtime import runtime as runtime_module
from kernels.cuda.runtime.runtime import Runtime

ROOT = Path(__file__).parent.parent.parent
RUNTIME = ROOT / "kernels" / "cuda" / "runtime" / "runtime.py"
F = np.float32


@pytest.fixture(scope="module")
def cupy():
    return import_cupy()


# what is passed to each: by position and by name
CALLS = {
    "RawModule": ([], ["code", "options"]),
    "RawModule.get_function": (["name"], []),
    "RawKernel.__call__": (["grid", "block", "args"], ["shared_mem"]),
    "zeros": (["shape", "dtype"], []),
    "empty": (["shape", "dtype"], []),
    "ndarray": (["shape", "dtype"], ["memptr"]),
    "ndarray.set": (["arr"], []),
    "ndarray.get": ([], ["out", "blocking"]),
    "cuda.alloc_pinned_memory": (["size"], []),
    "cuda.Event": ([], ["disable_timing"]),
    "cuda.Event.record": (["stream"], []),
    "cuda.Event.synchronize": ([], []),
    "cuda.Stream": ([], ["non_blocking"]),
    "cuda.Stream.use": ([], []),
    "cuda.Stream.begin_capture": ([], []),
    "cuda.Stream.end_capture": ([], []),
    "cuda.Stream.wait_event": (["event"], []),
    "cuda.Graph.launch": ([], []),
    "cuda.get_current_stream": ([], []),
    "cuda.get_cublas_handle": ([], []),
    "cuda.runtime.getDeviceCount": ([], []),
    "cuda.runtime.setDevice": (["device"], []),
    "cuda.runtime.getDeviceProperties": (["device"], []),
    "cuda.runtime.memGetInfo": ([], []),
    "cuda.runtime.deviceSynchronize": ([], []),
}
CUBLAS = {  # a signature, or a value of cublas_api.h
    "sgemm": "sgemm(intptr_t handle, int transa, int transb, int m, int n, int k, size_t alpha, size_t A, int lda, "
    "size_t B, int ldb, size_t beta, size_t C, int ldc)",
    "setMathMode": "setMathMode(intptr_t handle, int mode)",
    "CUBLAS_OP_N": 0,
    "CUBLAS_OP_T": 1,
    "CUBLAS_DEFAULT_MATH": 0,
}


@pytest.fixture(scope="module")
def cublas(cupy, tmp_path_factory) -> dict:
    """{name: its value, or the signature of a function} of the real cupy.cuda.cublas."""
    return described("cublas", tmp_path_factory.mktemp("cublas"))


# of which type an attribute is, where the type alone is looked at
TYPES = {
    "ndarray.data": "cuda.MemoryPointer",
    "ndarray.device": "cuda.Device",
    "ndarray.flags": "_core.flags.Flags",
}


def in_cupy(cupy, cublas: dict, name: str) -> bool:
    """Whether the real CuPy has the dotted name."""
    if name.startswith("cuda.cublas."):
        return name.removeprefix("cuda.cublas.") in cublas
    if name == "cuda.cublas":
        return bool(cublas)
    thing, so_far = cupy, ""
    for part in name.split("."):
        if not hasattr(thing, part):
            return f"~{so_far.rpartition('.')[2]}.{part} (" in (thing.__doc__ or "")  # what __init__ sets
        so_far = f"{so_far}.{part}".lstrip(".")
        thing = in_type(cupy, TYPES[so_far]) if so_far in TYPES else getattr(thing, part)
    return True


def in_type(cupy, name: str):
    return functools.reduce(getattr, name.split("."), cupy)


def parameters(function) -> list[str]:
    """The names of a function's parameters, `self` left out, from its signature or the one in its docstring."""
    first = next((line for line in (function.__doc__ or "").splitlines() if re.match(r"\s*[\w.]+\(.*\)", line)), "")
    if not first:
        return [name for name in inspect.signature(function).parameters if name != "self"]
    inside = re.sub(r"=\(\)", "", first)[len(first.partition("(")[0]) + 1 :].partition(")")[0]
    words = (part.partition("=")[0].split() for part in inside.split(","))
    return [word[-1] for word in words if word and word[-1] not in ("self", "*", "\\*")]


@pytest.mark.parametrize("name", CALLS)
def test_cupy_takes_what_we_pass(cupy, name):
    function = cupy
    for part in name.split("."):
        function = getattr(function, part)
    if name == "RawKernel.__call__":  # its own line has **kwargs, the next one what they are
        function = SimpleNamespace(__doc__=function.__doc__.partition("\n")[2])
    found = parameters(function)
    positional, named = CALLS[name]
    assert found[: len(positional)] == positional
    assert set(named) <= set(found[len(positional) :])


def test_cupy_has_every_name_that_we_touch(cupy, cublas):
    names = {name.removeprefix("cupy.") for name in names_used(RUNTIME)}
    names |= {f"ndarray.{name}" for name in names_of_device_arrays()}
    assert len(names) > 30 and [name for name in sorted(names) if not in_cupy(cupy, cublas, name)] == []
    # that a name is missed: CuPy 14 had neither
    assert not in_cupy(cupy, cublas, "cuda.cublas.CUBLAS_TF32_TENSOR_OP_MATH")
    assert not in_cupy(cupy, cublas, "ndarray.data.address")


def test_the_fake_has_no_name_that_cupy_lacks(fake, cupy, cublas):
    """Nor one that the list in runtime.py lacks, so that a test on the fake is one of what is listed."""
    Runtime()  # which goes on with the stream that it makes
    offered = names_offered(fake) - FOR_TESTS
    assert [name for name in sorted(offered) if not in_cupy(cupy, cublas, name)] == []
    listed = {name.removeprefix("cupy.") for name in names_listed(RUNTIME)}
    outer = {name.rpartition(".")[0] for name in listed} | {"cuda", "ndarray.device", "ndarray.flags"}
    assert offered - listed - outer == set()
    launchers = {f"ndarray.{name}" for name in names_of_device_arrays()}
    assert listed - offered - launchers == set()
    fake.module.cuda.cublas.CUBLAS_TF32_TENSOR_OP_MATH = 3
    assert "cuda.cublas.CUBLAS_TF32_TENSOR_OP_MATH" in names_offered(fake)


def test_errors_of_cupy(cupy):
    error = cupy.cuda.compiler.CompileException("gelu.cu(3): error: no", "source", "name", ())
    assert isinstance(error, Exception) and str(error) == "gelu.cu(3): error: no"
    assert issubclass(cupy.cuda.runtime.CUDARuntimeError, RuntimeError)
    assert issubclass(cupy.cuda.driver.CUDADriverError, RuntimeError)
    assert issubclass(cupy.cuda.memory.OutOfMemoryError, MemoryError)


def test_cublas_takes_what_we_pass(cublas):
    for name, expected in CUBLAS.items():
        found = cublas[name]
        assert (found if isinstance(expected, int) else found.splitlines()[0]) == expected, name
    assert runtime_module.CUBLAS_TF32_TENSOR_OP_MATH == 3  # cublas_api.h of CUDA 11.0 to 13.0


def test_a_gpu_that_is_not_there_is_no_device(cupy):
    """Real CuPy without a GPU, which is hidden where there is one; the driver made to look as if it showed one."""
    code = "from kernels.cuda.runtime import runtime; runtime.check_driver = lambda: None; runtime.Runtime()"
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stderr.splitlines()[-1].startswith("kernels.driver.NoDevice: the GPU: cudaError")


def test_cupy_is_imported_from_a_home_that_cannot_be_written(cupy):
    """CuPy alone cannot: it makes its folder when it is imported."""
    environment = {name: value for name, value in os.environ.items() if name != "CUPY_CACHE_DIR"} | {"HOME": os.devnull}

    def run(code):
        words = [sys.executable, "-c", code]
        return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)

    ours = run("from kernels.cuda.runtime import runtime as r; print(r.open_cache()[0], r.import_cupy().__name__)")
    assert ours.returncode == 0 and ours.stdout.endswith(" cupy\n"), ours
    expected = f"{os.devnull}/.cupy/kernel_cache cannot be written; set CUPY_CACHE_DIR"
    assert ours.stderr == f"compiling kernels in every run: {expected}\n"
    assert not Path(ours.stdout.split()[0]).exists()  # removed at the end
    assert run("import cupy").returncode == 1


# what variables and attributes of runtime.py hold, where it is not seen from how they are assigned
HOLD = {
    "_cupy": "cupy",
    "array": "cupy.ndarray",
    "copy": "cupy.ndarray",
    "out": "cupy.ndarray",
    "a": "cupy.ndarray",
    "b": "cupy.ndarray",
    "value": "cupy.ndarray",
    "_buffers": "cupy.ndarray",  # at each key
    "copied": "cupy.cuda.Event",
    "_copied": "cupy.cuda.Event",
    "current": "cupy.cuda.Stream",
    "_stream": "cupy.cuda.Stream",
    "_first": "cupy.cuda.Stream",
    "_second": "cupy.cuda.Stream",
    "_event": "cupy.cuda.Event",
    "graph": "cupy.cuda.Graph",
    "function": "cupy.RawKernel",
    "module": "cupy.RawModule",
}


def names_used(path: Path) -> set[str]:
    """The dotted names of CuPy in a module: "cupy.cuda.runtime.getDevice", "cupy.ndarray.data.ptr", ..."""
    tree, found, aliases = ast.parse(path.read_text()), set(), {}

    def chain(node) -> str | None:
        if isinstance(node, ast.Subscript):
            return chain(node.value) if isinstance(node.value, ast.Attribute) and node.value.attr in HOLD else None
        if isinstance(node, ast.Attribute):
            if isinstance(node.value, ast.Name) and node.value.id == "self":
                return HOLD.get(node.attr)
            head = chain(node.value)
            return head and f"{head}.{node.attr}"
        return aliases.get(node.id, HOLD.get(node.id)) if isinstance(node, ast.Name) else None

    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            pairs = zip(node.targets, [node.value])
            if isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs = zip(node.targets[0].elts, node.value.elts)
            aliases |= {to.id: chain(value) for to, value in pairs if isinstance(to, ast.Name) and chain(value)}
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        name = chain(node) if isinstance(node, ast.Attribute) and id(node) not in inner else None
        direct = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
        if name and not direct and name not in aliases.values():
            found.add(name)
    return found


def names_of_device_arrays() -> set[str]:
    """What the emulator's arrays have: trainers and launchers run on them in tests, so they use no more."""
    public = {name for name in vars(DeviceArray) if name[0] != "_"} - {"values"}
    return public | {"__len__", "__getitem__"}


# what the fake has for tests to look at
FOR_TESTS = {"ndarray.values", "ndarray.data.bytes", *(f"cuda.Stream.{name}" for name in ("queue", "enqueued", "done"))}


def names_offered(fake) -> set[str]:
    """The dotted names, without "cupy.", that a FakeCupy offers to runtime.py."""
    array = fake.module.zeros(1, np.float32)
    objects = {
        "ndarray": array,
        "RawModule": fake.module.RawModule(code="", options=()),
        "RawKernel": fake_cupy.RawKernel(None),
        "cuda.Event": fake.module.cuda.Event(disable_timing=True),
        "cuda.Stream": fake.module.cuda.Stream(non_blocking=True),
        "cuda.Graph": fake_cupy.Graph(fake, []),
    }
    found = set()

    def look(prefix: str, thing):
        for name in (name for name in dir(thing) if name[0] != "_"):
            found.add(prefix + name)
            inner = objects.get(prefix + name, getattr(thing, name))
            ours = fake_cupy.Memory | fake_cupy.Event | fake_cupy.RawKernel | fake_cupy.Stream | fake_cupy.Graph
            if isinstance(inner, SimpleNamespace | fake.module.ndarray | ours):
                look(f"{prefix}{name}.", inner)

    look("", fake.module)
    return found


def names_listed(path: Path) -> set[str]:
    """The dotted names that the list in the module's docstring has."""
    docstring, found = ast.get_docstring(ast.parse(path.read_text()), clean=False), set()
    for line in re.findall(r"^    (cupy.*)$", re.sub(r"\([^()]*\)", "", docstring), re.MULTILINE):
        prefix, colon, names = line.partition(": ")
        if colon:
            found |= {f"{prefix}.{name}" for name in names.split(", ")}
        else:
            found |= set(re.findall(r"cupy(?:\.\w+)+", line))
    return found


def test_runtime_uses_no_more_of_cupy_than_it_says():
    listed, used = names_listed(RUNTIME), names_used(RUNTIME)
    words = set(re.findall(r"\w+", RUNTIME.read_text()))
    assert HOLD.keys() <= words
    in_launchers = {f"cupy.ndarray.{name}" for name in names_of_device_arrays()}
    assert used <= listed and listed - used <= in_launchers
    assert {name for name in in_launchers if not any(f"{one}.".startswith(f"{name}.") for one in listed)} == set()
    called = {f"cupy.{name}" for name in CALLS} | {f"cupy.cuda.cublas.{name}" for name in CUBLAS}
    read = {"dtype", "shape", "ndim", "nbytes", "data", "data.ptr", "device.id", "flags.c_contiguous"}
    others = {"cupy.cuda.compiler.CompileException", "cupy.RawKernel.max_dynamic_shared_size_bytes"}
    others |= {"cupy.cuda.Stream.ptr"}
    assert used - called == others | {f"cupy.ndarray.{name}" for name in read}


def test_launchers_ask_a_runtime_for_what_both_runtimes_have():
    used = set()
    folder = RUNTIME.parents[1]
    for path in {*folder.rglob("*.py")} - {*RUNTIME.parent.glob("*.py")}:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                used |= {node.attr} if node.value.id in ("cuda", "runtime") else set()
    assert used > {"launch", "scratch", "gemm", "memory", "name", "tf32"}
    for runtime in (Runtime, EmulatedRuntime):
        assigned = set(re.findall(r"self\.(\w+)", inspect.getsource(runtime.__init__) + inspect.getsource(runtime)))
        assert used - set(dir(runtime)) - assigned == set(), runtime


def test_nothing_else_imports_cupy():
    folders = [path for path in ROOT.iterdir() if path.is_dir() and path.name[0] != "." and path.name != "build"]
    files = [*ROOT.glob("*.py"), *(file for folder in folders for file in folder.rglob("*.py"))]
    importing = {}
    for path in files:
        for line in re.findall(r"^ *((?:import|from) +cupy\b.*)$", path.read_text(), re.MULTILINE):
            importing.setdefault(str(path.relative_to(ROOT)), []).append(line)
    for path in ("kernels/test_cupy.py", "kernels/test_cuda_nccl.py", "availability.py", "stub_library.py"):
        importing.pop(f"tests/{path}", None)
    assert importing == {
        "kernels/cuda/runtime/runtime.py": ["import cupy"],
        "kernels/cuda/runtime/nccl.py": ["from cupy.cuda import nccl"],
        "kernels/cuda/runtime/compile.py": ["from cupy.cuda import nvrtc"] * 2,
        "benchmarks/gpu_step_time.py": ["import cupy"] * 2,  # memory and versions
        "benchmarks/kernel_times.py": ["import cupy"],  # events
    }
