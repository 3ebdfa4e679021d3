"""kernels/device.py: both devices are what Device lists, ops are in files of their names, and shelves stay apart."""

import ast
import inspect
import re
from pathlib import Path

import pytest

from kernels import cpu, cuda
from kernels.cuda.runtime import source
from kernels.device import NAMES, SHELVES, Device

ROOT = Path(__file__).parent.parent.parent
KERNELS = ROOT / "kernels"
TRIAL = KERNELS / "cuda/runtime/tensor_cores"  # kernels that belong to no op
OPS = {"cpu": {name: getattr(cpu, name) for name in cuda.OPS}, "cuda": cuda.OPS}
# ops whose file has another op's name, because they share its inside
GUESTS = {
    "fused_residual_forward": "layernorm",  # layernorm with an addition in front
    "expert_scatter": "expert_gather",  # its backward
    "expert_combine_forward": "expert_gather",  # sums rows as expert_scatter does
    "expert_combine_backward": "expert_gather",
}


def parameters(function, without: int = 0) -> list[tuple]:
    """(name, default) of each parameter, from number `without` on."""
    return [(p.name, p.default) for p in inspect.signature(function).parameters.values()][without:]


# ----------------------------------------------------------------------------------------------------------------------
# signatures


def test_both_devices_have_what_device_lists(emulator):
    assert set(vars(cuda.device(emulator))) == set(NAMES)
    assert all(hasattr(cpu, name) for name in NAMES) and cpu.__all__ == NAMES


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("tf32", "graph")])
def test_signatures_are_those_of_device(emulator, name):
    """Names, order and defaults; a launcher has `cuda` in front."""
    expected = parameters(getattr(Device, name), without=1)
    assert parameters(getattr(cpu, name)) == expected
    assert parameters(getattr(cuda.device(emulator), name)) == expected
    if name in cuda.OPS:
        assert parameters(cuda.OPS[name]) == [("cuda", inspect.Parameter.empty), *expected]
    assert inspect.getdoc(getattr(Device, name))


# ----------------------------------------------------------------------------------------------------------------------
# files


@pytest.mark.parametrize("name", cuda.OPS)
def test_an_op_is_in_the_file_of_its_name_on_the_same_shelf(name):
    ours, theirs = (OPS[where][name].__module__.split(".") for where in ("cpu", "cuda"))
    assert ours[2:] == theirs[2:] and ours[2] in SHELVES
    assert name.startswith(ours[3]) or GUESTS[name] == ours[3]


def test_device_lists_ops_shelf_by_shelf():
    shelves = [function.__module__.split(".")[2] for function in map(cuda.OPS.get, NAMES) if function]
    assert shelves == sorted(shelves, key=SHELVES.index)


def test_a_launcher_launches_what_is_in_its_cu_file_or_in_one_it_names():
    """Every .cu file has its launcher, upstream_controller alone has no kernels; the trial is no op."""
    files = {path.with_suffix("") for path in KERNELS.glob("cuda/*/*.cu")} - {TRIAL}
    launchers = {path.with_suffix("") for path in KERNELS.glob("cuda/*/*.py")} - {*KERNELS.glob("cuda/runtime/*")}
    launchers = {path for path in launchers if path.parent.name in SHELVES}
    assert launchers - files == {KERNELS / "cuda/sparse/upstream_controller"} and files <= launchers
    assert {kernel.path.parent.name for kernel in source.kernels().values()} <= {*SHELVES, TRIAL.parent.name}


# ----------------------------------------------------------------------------------------------------------------------
# who may import whom

# kernels knows neither llmc's file modules nor systems nor scripts
OUTSIDE = {
    "llmc.errors": "wherever a user is told what to do",
    "llmc.cli": "the commands in cuda/runtime",
    "llmc.startup": "the commands in cuda/runtime",
}
COMMANDS = {KERNELS / "cuda/runtime/compile.py", KERNELS / "cuda/runtime/roofline.py"}
OURS = {"kernels", "llmc", "systems", "experiments", "benchmarks", "dev", "data", "tests"}
OURS |= {path.stem for path in ROOT.glob("*.py")}


def imported(path: Path) -> set[str]:
    """The modules of this repository that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            below = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name for name in below if is_module(name)} or {node.module}
    return {name for name in found if name.partition(".")[0] in OURS}


def is_module(name: str) -> bool:
    path = ROOT / name.replace(".", "/")
    return path.is_dir() or path.with_suffix(".py").exists()


FILES = sorted(KERNELS.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(KERNELS)))
def test_kernels_knows_no_files_no_systems_and_no_scripts(path):
    others = {name for name in imported(path) if name.partition(".")[0] != "kernels"}
    tells_of_buffers = {"llmc.buffers"} if path.name == "shares.py" else set()
    assert others <= {*(OUTSIDE if path in COMMANDS else ["llmc.errors"]), *tells_of_buffers}


@pytest.mark.parametrize("shelf", SHELVES)
def test_a_shelf_knows_gpt2_and_what_lies_beside_the_shelves(shelf):
    """The CPU's knows nothing of CUDA; CUDA's may use the constants of its own op on the CPU."""
    for path in FILES:
        where, _, name = str(path.relative_to(KERNELS)).partition("/")
        if not name.startswith(f"{shelf}/"):
            continue
        for module in imported(path):
            _, device, *rest = module.split(".")
            if module.startswith("llmc"):
                continue
            assert device == where or (where == "cuda" and rest == name.removesuffix(".py").split("/")), (path, module)
            assert rest[0] not in {*SHELVES} - {shelf, "gpt2"}, (path, module)


def test_kernels_of_a_shelf_are_launched_by_it_and_gpt2s_by_all():
    for path in KERNELS.glob("cuda/*/*.py"):
        shelf = path.parent.name
        if shelf in SHELVES:
            for kernel in re.findall(r'cuda\.launch\(\s*"(\w+)"', path.read_text()):
                assert source.kernels()[kernel].path.parent.name in (shelf, "gpt2"), (path, kernel)


# ----------------------------------------------------------------------------------------------------------------------
# the table of kernels/README.md


def table() -> str:
    """A row for each shelf: the files that hold its ops."""
    rows = []
    for shelf in SHELVES:
        files = {op.__module__.split(".")[3] for op in cuda.OPS.values() if op.__module__.split(".")[2] == shelf}
        rows.append(f"| {shelf} | {', '.join(f'[{file}](cpu/{shelf}/{file}.py)' for file in sorted(files))} |\n")
    return "".join(rows)


def test_the_readme_lists_todays_ops():
    text = (KERNELS / "README.md").read_text()
    found = text[text.index("|---|---|\n") + len("|---|---|\n") :].partition("\n\n")[0] + "\n"
    assert found == table()
