"""make kernels: every kernel for every GPU, and that a spill, a warning and an error are each caught."""

import hashlib
import json
import os
import re
from importlib.metadata import distributions
from pathlib import Path

import pytest
from availability import ROOT, import_cupy

from kernels.cuda.runtime import compile as compiler
from kernels.cuda.runtime import source
from kernels.cuda.runtime.compile import Usage, occupancy
from llmc.errors import UserError

GOOD = """extern "C" __global__ void __launch_bounds__(256)
double_kernel(float* out, int N) {
    __shared__ float sums[64];
    sums[threadIdx.x % 64] = out[threadIdx.x];
    __syncthreads();
    out[threadIdx.x] = 2 * sums[(threadIdx.x + N) % 64];
}
"""
# 100 values at once; 1024 threads a block leave 64 registers for each
SPILLS = """extern "C" __global__ void __launch_bounds__(1024)
reverse_kernel(float* __restrict__ out, const float* __restrict__ inp, int N) {
    float held[100];
#pragma unroll
    for (int i = 0; i < 100; i++) { held[i] = inp[threadIdx.x + i * N]; }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 100; i++) { out[threadIdx.x + i * N] = held[i] * held[99 - i]; }
}
"""
WARNS = """extern "C" __global__ void __launch_bounds__(32)
unused_kernel(float* out) {
    int unused = 1;
    out[0] = 0.0f;
}
"""
FAILS = """extern "C" __global__ void __launch_bounds__(32)
unknown_kernel(float* out) {
    out[0] = nowhere;
}
"""


@pytest.fixture(scope="module")
def architectures():
    """All that are compiled for. A compiler that is missing or does not load is an error where there are wheels."""
    import_cupy()
    return [f"sm_{architecture}" for architecture in compiler.open_nvrtc()]


def compile_files(tmp_path, capsys, **files) -> tuple[int, list[str], list[str]]:
    """compile_files(..., gelu=text): exit code, lines of stdout and of stderr for a folder with gelu.cu."""
    for name, text in files.items():
        (tmp_path / f"{name}.cu").write_text(text)
    code = compiler.main([str(tmp_path)])
    said = capsys.readouterr()
    return code, said.out.splitlines(), said.err.splitlines()


def build_once(path: Path, architecture: int) -> tuple[bool, str]:
    """compile.build, kept in build/nvrtc: the same text for the same GPU by the same compiler gives the same log."""
    options = *compiler.OPTIONS, *compiler.LIKE_CUPY, *compiler.STATISTICS
    compilers = sorted(f"{each.name} {each.version}" for each in distributions() if re.match("cupy|nvidia", each.name))
    parts = source.text(path), path.name, str(architecture), *compilers, *options
    kept = ROOT / "build" / "nvrtc" / f"{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:24]}.json"
    if not kept.exists():
        result = compiler.build(path, architecture)
        kept.parent.mkdir(parents=True, exist_ok=True)
        made = kept.with_suffix(f".{os.getpid()}")
        made.write_text(json.dumps(result))
        os.replace(made, kept)
    compiled, log = json.loads(kept.read_text())
    return compiled, log


@pytest.mark.parametrize(
    "wanted", [pytest.param(compiler.ARCHITECTURES, marks=pytest.mark.slow, id="all"), pytest.param((75, 90))]
)
def test_every_kernel_for_every_gpu(wanted, architectures, capsys, monkeypatch):
    """No spills, no warnings, and a row for each. With tensor cores for TF32 and without: all take ten minutes."""
    monkeypatch.setattr(compiler, "build", build_once)  # its own processes have the original
    monkeypatch.setattr(compiler, "ARCHITECTURES", wanted)
    code = compiler.main([])
    said = capsys.readouterr()
    print(said.out)
    assert said.err == "" and code == 0
    rows = {line.split()[0]: line.split()[1:] for line in said.out.splitlines() if re.match(r"\w+_kernel\w* ", line)}
    assert list(rows) == list(source.kernels())
    for name, (threads, *cells) in rows.items():  # registers, the most, shared, stack, spills; occupancy
        assert int(threads) == source.kernels()[name].threads
        numbers = [int(cell) for cell in cells if not cell.endswith("%")]
        occupied = [int(cell.removesuffix("%")) for cell in cells[len(numbers) :]]
        *registers, most, shared, _, spills = numbers
        dynamic = source.kernels()[name].shared
        assert 0 < max(registers) <= most <= 255 and spills == 0 and len(registers) == len(occupied)
        assert dynamic <= shared <= dynamic + 49152
        assert all(0 < share <= 100 for share in occupied)
    found = re.search(r"^(\d+) kernels for (\d+) architectures in .*: no spills, no warnings$", said.out, re.MULTILINE)
    assert (int(found[1]), int(found[2])) == (len(rows), len({f"sm_{each}" for each in wanted} & set(architectures)))


def test_the_table(architectures, tmp_path, capsys):
    code, out, err = compile_files(tmp_path, capsys, good=GOOD)
    assert (code, err) == (0, [])
    assert out[1].split() == ["threads", "registers", "shared", "stack", "spills", "occupancy"]
    assert re.sub(" +", " ", out[2]) == "kernel a block sm_80 sm_90 most bytes bytes bytes sm_80 sm_90"
    row = out[3].split()
    assert row[:2] == ["double_kernel", "256"] and row[5:] == ["256", "0", "0", "100%", "100%"]
    assert len(out[1].rstrip()) <= len(out[2]) == len(out[3])


def test_declared_shared_memory_counts(architectures, tmp_path, capsys):
    """70 KiB and the 256 bytes: 2 blocks of 256 threads on an A100, 3 on an H100, of 8 that registers allow."""
    code, out, err = compile_files(tmp_path, capsys, good=GOOD.replace("(256)", "(256) DYNAMIC_SHARED(71680)"))
    row = out[3].split()
    assert (code, err) == (0, []) and row[:2] == ["double_kernel", "256"]
    assert row[5:] == [str(71680 + 256), "0", "0", "25%", "38%"]


def test_a_spill_is_caught(architectures, tmp_path, capsys):
    code, out, err = compile_files(tmp_path, capsys, good=GOOD, spills=SPILLS)
    assert code == 1 and len(err) >= 1
    assert all(re.fullmatch(r"reverse_kernel spills \d+ bytes \[sm_\d+( sm_\d+)*\]", line) for line in err)
    assert sorted(re.findall(r"sm_\d+", " ".join(err))) == sorted(architectures)
    most = max(int(line.split()[2]) for line in err)
    assert next(line for line in out if line.startswith("reverse_kernel")).split()[7] == str(most)
    assert out[-1].endswith(f"s: {len(err)} wrong")


def test_a_warning_is_caught_and_sm_70s_is_not_one(architectures, tmp_path, capsys):
    code, _, err = compile_files(tmp_path, capsys, good=GOOD, warns=WARNS)
    (line,) = err
    assert code == 1 and line.startswith("warns.cu(3): warning ") and '"unused" was declared but never' in line
    assert line.endswith(f" [{' '.join(architectures)}]")


def test_an_error_is_caught(architectures, tmp_path, capsys):
    code, out, err = compile_files(tmp_path, capsys, good=GOOD, fails=FAILS)
    (line,) = err
    assert code == 1 and line.startswith('fails.cu(3): error: identifier "nowhere" is undefined [sm_')
    assert not any("unknown_kernel" in line for line in out)


def test_a_kernel_without_figures_and_an_error_without_a_reason():
    """Should a later compiler word its log differently, nothing passes unseen."""
    assert list(compiler.problems(["a_kernel"], True, "ptxas info: nothing we know")) == [
        "a_kernel is not in the compiler's log"
    ]
    assert list(compiler.problems(["a_kernel"], False, "")) == ["a_kernel: not compiled, without a reason"]


def test_a_folder_without_kernels(tmp_path):
    with pytest.raises(UserError, match=r"no kernels, expected \.cu files"):
        compiler.main([str(tmp_path)])


@pytest.mark.parametrize(
    "registers, shared, threads, on_80, on_90",
    [
        (32, 0, 256, 1.0, 1.0),  # 2048 threads have 32 each
        (33, 0, 256, 0.75, 0.75),  # 40 with the unit: 48 warps
        (64, 0, 256, 0.5, 0.5),
        (128, 0, 128, 0.25, 0.25),
        (255, 0, 1024, 0.0, 0.0),  # no block fits
        (32, 0, 32, 0.5, 0.5),  # 32 blocks at most
        (16, 0, 1024, 1.0, 1.0),
        (32, 48 << 10, 256, 0.375, 0.5),  # 49 KiB with the system's: 3 and 4 blocks
        (32, 20 << 10, 128, 0.4375, 0.625),  # 7 and 10 blocks
    ],
)
def test_occupancy(registers, shared, threads, on_80, on_90):
    usage = Usage(registers, shared, 0, 0)
    assert occupancy(usage, threads, compiler.SHARED[80]) == on_80
    assert occupancy(usage, threads, compiler.SHARED[90]) == on_90
