"""Compile all kernels for all GPUs that this project knows, without a GPU: make kernels

Prints what each kernel takes of a multiprocessor, and fails on a spill and on a warning of the compiler.
"""

if __name__ == "__main__":
    from llmc import startup

    startup.begin()

import re
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from os import cpu_count
from pathlib import Path
from typing import NamedTuple

from kernels.cuda.runtime import source
from kernels.cuda.runtime.runtime import OPTIONS, import_cupy, one_line, open_cache
from kernels.driver import NoDevice
from llmc.cli import ArgumentParser
from llmc.errors import UserError, run

# Volta, Turing, Ampere (A100; RTX 30), Ada (RTX 40, L4), Hopper, Blackwell (B200; RTX 50)
ARCHITECTURES = (70, 75, 80, 86, 89, 90, 100, 120)
# what CuPy adds to the options that Runtime gives it, and the registers and spills in the log
LIKE_CUPY = ("-ftz=true", "--device-as-default-execution-space")
STATISTICS = ("--ptxas-options=-v",)
DEPRECATED = "Architectures prior to"  # what NVRTC 12.9 says of sm_70 in general

# limits of a multiprocessor. CUDA C++ Programming Guide, technical specifications per compute capability (8.0, 9.0);
# its chapters 8.x and 9.0 and the Ampere and Hopper tuning guides for shared memory and what a block's system part
# takes of it; Nsight Compute's occupancy calculator for the units of allocation
WARP, MAX_WARPS, MAX_BLOCKS = 32, 64, 32
REGISTERS, REGISTER_UNIT, PARTS = 65536, 256, 4  # a warp's registers come from one of four parts
SHARED = {80: 164 << 10, 90: 228 << 10}  # bytes
SHARED_UNIT, SHARED_OF_SYSTEM = 128, 1024

ENTRY = re.compile(
    r"""Compiling\ entry\ function\ '(?P<name>\w+)' .*?
        Function\ properties\ for\ (?P=name)\n
        \D* (?P<stack>\d+)\ bytes\ stack\ frame,\ (?P<stores>\d+)\ bytes\ spill\ stores,\ (?P<loads>\d+)\ bytes .*?
        Used\ (?P<registers>\d+)\ registers (?: [^\n]*? (?P<shared>\d+)\ bytes\ smem )?""",
    re.VERBOSE | re.DOTALL,
)
MESSAGE = re.compile(r"\b(warning|error)\b.*:")  # not: 1 error detected in the compilation of


class Usage(NamedTuple):
    """What a kernel takes: registers of a thread, bytes of shared memory of a block, and of a thread's stack, bytes of
    registers that spills store and load. The compiler's log knows of static shared memory alone."""

    registers: int
    shared: int
    stack: int
    spills: int


def build(path: Path, architecture: int) -> tuple[bool, str]:
    """Compile a .cu file for sm_<architecture> -> whether that worked, and the compiler's log."""
    from cupy.cuda import nvrtc

    program = nvrtc.createProgram(source.text(path), path.name, (), ())
    try:
        nvrtc.compileProgram(program, (*OPTIONS, *LIKE_CUPY, *STATISTICS, f"--gpu-architecture=sm_{architecture}"))
        return True, nvrtc.getProgramLog(program)
    except nvrtc.NVRTCError:
        return False, nvrtc.getProgramLog(program)
    finally:
        nvrtc.destroyProgram(program)


def usages(log: str) -> dict[str, Usage]:
    """Kernel -> Usage, as a log of --ptxas-options=-v has it."""
    found = {}
    for match in ENTRY.finditer(log):
        spills = int(match["stores"]) + int(match["loads"])
        found[match["name"]] = Usage(int(match["registers"]), int(match["shared"] or 0), int(match["stack"]), spills)
    return found


def problems(names: list[str], compiled: bool, log: str) -> Iterator[str]:
    """What is wrong with a file that holds the kernels `names`: errors, warnings, spills."""
    messages = [line.strip() for line in log.split("\n") if MESSAGE.search(line) and DEPRECATED not in line]
    yield from messages
    if not compiled:
        yield from [] if messages else [f"{', '.join(names)}: not compiled, {log.strip() or 'without a reason'}"]
        return
    found = usages(log)
    for name in names:
        if name not in found:
            yield f"{name} is not in the compiler's log"
        elif found[name].spills:
            yield f"{name} spills {found[name].spills} bytes"


def occupancy(usage: Usage, threads: int, shared: int) -> float:
    """Part of a multiprocessor's warps that run at once, with blocks of `threads` and `shared` bytes for all blocks.

    Dynamic shared memory counts if the kernel declares it (compile_all); else it is only known at a launch.
    """
    warps = round_up(threads, WARP) // WARP  # of a block
    of_a_warp = round_up(usage.registers * WARP, REGISTER_UNIT)
    by_registers = REGISTERS // PARTS // of_a_warp * PARTS // warps
    by_shared = shared // (round_up(usage.shared, SHARED_UNIT) + SHARED_OF_SYSTEM)
    return min(MAX_BLOCKS, MAX_WARPS // warps, by_registers, by_shared) * warps / MAX_WARPS


def round_up(n: int, unit: int) -> int:
    """The smallest multiple of `unit` from n on."""
    return -(-n // unit) * unit


def print_table(kernels: dict[str, source.Kernel], found: dict[tuple[str, int], Usage]) -> None:
    """A row for each kernel; found: (kernel, architecture) -> Usage."""
    architectures = {architecture for _, architecture in found}
    shown = [architecture for architecture in SHARED if architecture in architectures]
    width = max((len(name) for name, _ in found), default=6)
    columns = "".join(f"{f'sm_{architecture}':>7}" for architecture in shown)
    print(f"{'':{width}}  threads  {'registers':<{7 * len(shown) + 5}}  shared  stack  spills  occupancy")
    print(f"{'kernel':{width}}  a block{columns}   most   bytes  bytes   bytes{columns}")
    for name, kernel in kernels.items():
        used = {architecture: usage for (other, architecture), usage in found.items() if other == name}
        if used:
            most = Usage(*map(max, zip(*used.values())))
            registers = "".join(f"{used[a].registers if a in used else '':>7}" for a in shown)
            occupied = (f"{occupancy(used[a], kernel.threads, SHARED[a]):.0%}" if a in used else "" for a in shown)
            row = f"{registers}{most.registers:7}  {most.shared:6}  {most.stack:5}  {most.spills:6}"
            print(f"{name:{width}}  {kernel.threads:7}{row}{''.join(f'{text:>7}' for text in occupied)}")
    print("\nmost, shared, stack, spills: the largest of all architectures. shared: static, and dynamic where it is")
    print("declared. occupancy: what registers, shared memory and blocks of the launch bound's threads allow, by")
    print("CUDA's programming, tuning and occupancy guides")


def compile_all(kernels: dict[str, source.Kernel], architectures: list[int]) -> tuple[dict, dict]:
    """-> {(kernel, architecture): Usage}, and {what is wrong: the architectures where}."""
    files = sorted({kernel.path for kernel in kernels.values()}, key=lambda path: -path.stat().st_size)
    jobs = [(path, architecture) for path in files for architecture in architectures]
    with ProcessPoolExecutor(min(len(jobs), cpu_count() or 1), get_context("spawn")) as pool:
        results = list(pool.map(build, *zip(*jobs)))
    found, wrong = {}, {}
    for (path, architecture), (compiled, log) in zip(jobs, results):
        for name, usage in usages(log).items():
            dynamic = kernels[name].shared if name in kernels else 0
            found[name, architecture] = usage._replace(shared=usage.shared + dynamic)
        names = [name for name, kernel in kernels.items() if kernel.path == path]
        for problem in problems(names, compiled, log):
            wrong.setdefault(problem, []).append(f"sm_{architecture}")
    return found, wrong


def open_nvrtc() -> list[int]:
    """Print which NVRTC this is; the ones of ARCHITECTURES that it knows. Raises UserError if it cannot be loaded."""
    open_cache()
    try:
        import_cupy()
        from cupy.cuda import nvrtc

        version, supported = nvrtc.getVersion(), nvrtc.getSupportedArchs()
    except (NoDevice, RuntimeError) as error:
        raise UserError(f"no compiler: {one_line(error)}", "pip install -r requirements-test.txt") from None
    print(f"NVRTC {'.'.join(map(str, version))} {' '.join((*OPTIONS, *LIKE_CUPY))}")
    for architecture in sorted(set(ARCHITECTURES) - set(supported)):
        print(f"left out: sm_{architecture}, which this NVRTC does not know")
    return [architecture for architecture in ARCHITECTURES if architecture in supported]


def main(argv: list[str] | None = None) -> int:
    parser = ArgumentParser(prog="python -m kernels.cuda.runtime.compile", description=__doc__)
    parser.add_argument("folder", nargs="?", default=source.FOLDER, type=Path, help="where the .cu files are")
    folder = parser.parse(argv).folder
    kernels = source.kernels(folder)
    if not kernels:
        raise UserError(f"{folder}: no kernels, expected .cu files", "name the folder that holds them")
    architectures, started = open_nvrtc(), time.perf_counter()
    found, wrong = compile_all(kernels, architectures)
    print_table(kernels, found)
    for problem, where in wrong.items():
        print(f"{problem} [{' '.join(where)}]", file=sys.stderr)
    verdict = f"{len(wrong)} wrong" if wrong else "no spills, no warnings"
    seconds = time.perf_counter() - started
    print(f"{len(kernels)} kernels for {len(architectures)} architectures in {seconds:.0f} s: {verdict}")
    return 1 if wrong else 0


if __name__ == "__main__":
    run(main)
