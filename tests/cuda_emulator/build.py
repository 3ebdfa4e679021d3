"""Compiles .cu files for the processor with g++; what it makes is kept in build/cuda_emulator.

env $(python tests/cuda_emulator/build.py asan) pytest ...    # the environment that mode "asan" needs
"""

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from functools import cache
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CACHE = ROOT / "build" / "cuda_emulator"

COMPILER = "g++"
# line tables say where an error is. a product and a sum stay two roundings, as written, so that results are the same
# in every mode and on every processor; the GPU fuses them, within the tests' tolerances. without errno sqrtf is an
# instruction
COMMON = [
    "-std=c++17",
    "-fPIC",
    "-march=native",
    "-g1",
    "-gdwarf-4",
    "-fno-plt",
    "-fno-semantic-interposition",
    "-ffp-contract=off",
    "-fno-math-errno",
]
WARNINGS = ["-Wall", "-Wextra", "-Werror"]
# #pragma unroll is not for g++; CUDA code compares an int with blockDim, which is unsigned, all the time; arrays that
# one `if` fills and another one like it reads are taken for uninitialised
KERNEL_WARNINGS = [*WARNINGS, "-Wno-unknown-pragmas", "-Wno-sign-compare", "-Wno-maybe-uninitialized"]
KERNEL_WARNINGS += ["-Wframe-larger-than=32768"]
ASAN = ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
SCHEDULER_FLAGS = {"fast": ["-O3"], "check": ["-O2", "-DEMULATOR_CHECK"], "asan": ASAN}
KERNEL_FLAGS = {
    "fast": ["-O2"],
    "check": ["-O1", "-DEMULATOR_CHECK", "-fsanitize=thread", "-fsanitize=alignment,bounds"],
    "asan": ASAN,
}
MODES = tuple(KERNEL_FLAGS)

COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
SHARED = re.compile(
    r"""(?P<extern>extern\s+)?__shared__\s+
        (?:(?:__align__|alignas)\((?P<alignment>\d+)\)\s+)?
        (?P<type>(?:(?:const|volatile|signed|unsigned|long)\s+)*[\w:]+(?:<[^;{}]*?>[\w:]*)?)\s+
        (?P<names>\w+\s*(?:\[[^;]*?\]\s*)*(?:,\s*\w+\s*(?:\[[^;]*?\]\s*)*)*);""",
    re.VERBOSE,
)
DECLARATOR = re.compile(r"(\w+)\s*((?:\[[^,]*\]\s*)*)$", re.DOTALL)


class BuildError(RuntimeError):
    """g++ is missing, or refuses a file: the message has its own, with file and line."""


def foreign_system() -> str:
    """Why the emulator cannot run on this system, "" if it can."""
    return "" if sys.platform == "linux" else f"the CUDA emulator runs on Linux, not on {sys.platform}"


def missing_tool() -> str:
    """Why nothing can be compiled here, "" if it can."""
    if reason := foreign_system():
        return reason
    missing = [tool for tool in (COMPILER, "addr2line") if not shutil.which(tool)]
    return f"the CUDA emulator needs {' and '.join(missing)}: apt install g++ binutils" if missing else ""


def kernel_library(path: Path, kernels, text: str, mode: str, portable: bool = False) -> Path:
    """The shared library of a .cu file's kernels (see source.Kernel); `text` is what is compiled, with #line marks."""
    scheduler = scheduler_library(mode, portable)
    code = f'#include "{HERE / "cuda_emulator.h"}"\n{processor_text(text, path)}\n#line 1 "callers"\n'
    code += "".join(_caller(kernel) for kernel in kernels)
    flags = [*COMMON, *KERNEL_FLAGS[mode], *KERNEL_WARNINGS, "-fno-exceptions"]
    return _build(f"{path.stem}-{mode}", [("kernels.cpp", code)], flags, [str(scheduler)])


def scheduler_library(mode: str, portable: bool = False) -> Path:
    """The shared library that runs blocks; portable: with the C library's ucontext."""
    names = ["scheduler.cpp", "checker.cpp"] if mode == "check" else ["scheduler.cpp"]
    flags = [*COMMON, *SCHEDULER_FLAGS[mode], *WARNINGS, "-pthread", f"-I{HERE}"]
    if portable:
        flags.append("-DEMULATOR_UCONTEXT")
    files = [(name, (HERE / name).read_text()) for name in names]
    return _build(f"scheduler-{mode}", files, flags, ["-ldl"])


def processor_text(text: str, path: Path) -> str:
    """`text` without comments and with __shared__ declarations as calls, on the same lines."""
    text = COMMENT.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text)
    text = SHARED.sub(_shared, text)
    left = text.find("__shared__")
    if left >= 0:
        line = text[text.rfind("\n", 0, left) + 1 :].split("\n")[0].strip()
        raise BuildError(f"{path}: the emulator cannot read this declaration of shared memory: {line}")
    return text


def _shared(match) -> str:
    """__shared__ float a[2][3], b; -> EMULATOR_SHARED(a, [2][3], 0, float); EMULATOR_SHARED(b, , 0, float);"""
    calls = []
    for declarator in match["names"].split(","):
        name, extents = DECLARATOR.match(declarator.strip()).groups()
        if match["extern"]:
            calls.append(f"EMULATOR_DYNAMIC_SHARED({name}, {match['type']});")
        else:
            calls.append(f"EMULATOR_SHARED({name}, {extents}, {match['alignment'] or 0}, {match['type']});")
    text = " ".join(calls)
    return text + "\n" * (match[0].count("\n") - text.count("\n"))


def _caller(kernel) -> str:
    """C functions that call a kernel: once, with its arguments from an array of addresses; and for a whole launch."""
    types = [ctype for _, ctype in kernel.parameters]
    values = ", ".join(f"*static_cast<{ctype}*>(values[{i}])" for i, ctype in enumerate(types))
    return (
        f"EMULATOR_UNCHECKED static void call_{kernel.name}(void** values) {{ {kernel.name}({values}); }}\n"
        f'extern "C" void launch_{kernel.name}(emulator::Launch* launch) '
        f"{{ emulator::run(launch, call_{kernel.name}); }}\n"
    )


def _build(name: str, files: list[tuple[str, str]], flags: list[str], libraries: list[str]) -> Path:
    """Compiles texts into one shared library, unless the same texts, flags, compiler and processor made it before."""
    headers = [(HERE / header).read_text() for header in ("cuda_emulator.h", "scheduler.h", "fiber.h")]
    parts = [compiler_version(), processor(), *headers, *flags, *libraries, *(text for _, text in files)]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    library = CACHE / f"{name}-{key}.so"
    if library.exists():
        return library
    CACHE.mkdir(parents=True, exist_ok=True)
    with _locked(library.with_suffix(".lock")), tempfile.TemporaryDirectory(dir=CACHE) as folder:
        if library.exists():  # by now
            return library
        objects = []
        for file, text in files:
            made = Path(folder, file)
            made.write_text(text)
            objects.append(made.with_suffix(".o"))
            _compile(name, [*flags, "-c", "-o", objects[-1], made])
        made = Path(folder, "library.so")
        # without -fsanitize=thread, which would want a library of its own here
        linking = [flag for flag in flags if flag == "-pthread" or "=address" in flag]
        _compile(name, [*linking, "-shared", "-o", made, *objects, *libraries])
        os.replace(made, library)
    return library


@contextmanager
def _locked(path: Path):
    """One process, or thread, at a time; the lock ends with its process."""
    import fcntl  # not on Windows, where this is imported though nothing is compiled

    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _compile(name: str, arguments: list) -> None:
    result = subprocess.run([COMPILER, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode:
        raise BuildError(f"{COMPILER} cannot compile {name}:\n{result.stdout}")


@cache
def compiler_version() -> str:
    if reason := missing_tool():
        raise BuildError(reason)
    return subprocess.run([COMPILER, "--version"], capture_output=True, text=True, check=True).stdout


@cache
def processor() -> str:
    """What -march=native depends on: a folder may move to another machine."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return "\n".join(
        [platform.machine(), *sorted({line for line in lines if line.startswith(("flags", "model name"))})]
    )


def source_line(library: Path, offset: int) -> str:
    """ "common.cuh:16, called at layernorm.cu:38" for an offset in a library; "" if unknown."""
    command = ["addr2line", "-i", "-e", library, hex(offset)]
    lines = subprocess.run(command, capture_output=True, text=True).stdout.split("\n")
    places = [Path(line.split(" ")[0]).name for line in lines if ".cu:" in line]
    return ", called at ".join(dict.fromkeys(places))


def asan_environment() -> dict[str, str]:
    """What a process needs in its environment for mode "asan": the sanitizer must be loaded before all else."""
    command = [COMPILER, "-print-file-name=libasan.so"]
    library = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return {"LD_PRELOAD": str(Path(library).resolve()), "ASAN_OPTIONS": "detect_leaks=0"}


if __name__ == "__main__" and sys.argv[1:] == ["asan"]:
    print(*(f"{name}={value}" for name, value in asan_environment().items()))
