"""The pages in doc/: code blocks run as they stand, kernels quoted are those of dev/, tests named exist, pictures fit.

A page's Python blocks are one program, top to bottom; a text block right behind one is what it prints.
"""

import contextlib
import io
import re
from pathlib import Path

import numpy as np
import pytest
from availability import skip_off_linux
from cuda_emulator.runtime import EmulatedRuntime

from kernels import cpu, cuda

ROOT = Path(__file__).parent.parent
DEV = ROOT / "dev"
PAGES = sorted((ROOT / "doc").glob("*.md"))
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```\n", re.MULTILINE | re.DOTALL)
PICTURE = re.compile(r"!\[[^\]]+\]\(([^)]+\.png)\)")


def named(path: Path) -> str:
    return path.stem


# ----------------------------------------------------------------------------------------------------------------------
# blocks


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_python_blocks_run_and_print_what_is_shown(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    blocks = [(match[1], match[2]) for match in BLOCK.finditer(page.read_text())]
    program = {}
    for (language, text), (follows, expected) in zip(blocks, [*blocks[1:], ("", "")]):
        if language == "python":
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile(text, page.name, "exec"), program)
            if follows == "text":
                assert printed.getvalue() == expected


def test_the_tutorial_has_blocks():
    found = [language for language, _ in BLOCK.findall((ROOT / "doc" / "layernorm.md").read_text())]
    assert found.count("python") >= 5 and found.count("text") >= 3 and found.count("c") >= 4


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_quoted_kernels_are_in_the_tree(page):
    """A block in C is a piece of some kernel file, line by line; "..." stands for lines left out."""
    sources = [path.read_text() for path in (*DEV.glob("*.cu"), *(ROOT / "kernels" / "cuda").rglob("*.cu"))]
    for language, text in BLOCK.findall(page.read_text()):
        if language == "c":
            parts = re.split(r"^ *\.\.\.\n", text, flags=re.MULTILINE)
            assert any(all(part in source for part in parts) for source in sources), text


# ----------------------------------------------------------------------------------------------------------------------
# the kernels of dev/


@pytest.fixture(scope="module", params=["fast", "check"])
def device(request):
    skip_off_linux()
    return EmulatedRuntime(request.param, folders=(DEV, ROOT / "kernels" / "cuda"))


def normal(*shape, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


SIZES = [(1, 1), (5, 30), (9, 100), (33, 768)]


@pytest.mark.parametrize("N, C", SIZES)
@pytest.mark.parametrize("version", [1, 2, 3, 4])
def test_layernorm_forward(device, version, N, C):
    """Every version against NumPy; 4 is the one that trains."""
    inp, weight, bias = normal(N, C), normal(C, seed=1), normal(C, seed=2)
    expected, means, rstds = np.empty_like(inp), np.empty(N, np.float32), np.empty(N, np.float32)
    cpu.layernorm_forward(expected, means, rstds, inp, weight, bias)
    out, mean, rstd = device.zeros((N, C)), device.zeros(N), device.zeros(N)
    arrays = (out, mean, rstd, *map(device.to_device, (inp, weight, bias)))
    if version == 1:
        device.launch("layernorm_forward1", -(-N // 256), 256, (*arrays, N, C))
    elif version == 2:
        device.launch("layernorm_forward2", N, 256, (*arrays, C))
    elif version == 3:
        device.launch("layernorm_forward3", -(-N // 8), 256, (*arrays, N, C))
    else:
        cuda.device(device).layernorm_forward(*arrays)
    for ours, theirs in ((out, expected), (mean, means), (rstd, rstds)):
        np.testing.assert_allclose(device.to_host(ours), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("N, C", SIZES)
@pytest.mark.parametrize("version", [1, 2])
def test_layernorm_backward(device, version, N, C):
    """Both versions against NumPy, added to what is there; 2 is the one that trains."""
    inp, weight, dout = normal(N, C), normal(C, seed=1), normal(N, C, seed=3)
    before = (normal(N, C, seed=4), normal(C, seed=5), normal(C, seed=6))
    mean = inp.mean(axis=1)
    rstd = 1 / np.sqrt(inp.var(axis=1) + np.float32(1e-5))
    expected = [each.copy() for each in before]
    cpu.layernorm_backward(*expected, dout, inp, weight, mean, rstd)
    ours = dinp, dweight, dbias = [device.to_device(each) for each in before]
    given = d_dout, d_inp, d_weight, d_mean, d_rstd = [device.to_device(a) for a in (dout, inp, weight, mean, rstd)]
    if version == 1:
        device.launch("layernorm_backward1_rows", N, 256, (dinp, d_dout, d_inp, d_weight, d_mean, d_rstd, C))
        columns = (dweight, dbias, d_dout, d_inp, d_mean, d_rstd, N, C)
        device.launch("layernorm_backward1_columns", -(-C // 256), 256, columns)
    else:
        cuda.device(device).layernorm_backward(*ours, *given)
    for array, values in zip(ours, expected):
        np.testing.assert_allclose(device.to_host(array), values, rtol=2e-5, atol=2e-5)


# ----------------------------------------------------------------------------------------------------------------------
# tests that pages name, pictures


def test_named_tests_exist():
    """Every test that a page names in a code span is somewhere in tests/; reliability.md has one in each row."""
    known = {
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^ *def (test_\w+)\(", path.read_text(), re.MULTILINE)
    }
    for page in [*PAGES, *ROOT.glob("*.md")]:
        named_here = set(re.findall(r"`(test_\w+)`", page.read_text()))
        assert named_here <= known, f"{page.name}: {named_here - known}"
    rows = [line for line in (ROOT / "doc" / "reliability.md").read_text().splitlines() if line.startswith("| ")]
    rows = [row for row in rows if "what one sees" not in row]
    assert len(rows) > 35 and all("`test_" in row.rpartition(" | ")[2] for row in rows)


def test_pictures_are_there_and_small():
    """One for each system, drawn by doc/draw.py, and no page shows one that is missing or large."""
    shown = {(page.parent / link).resolve() for page in PAGES for link in PICTURE.findall(page.read_text())}
    drawn = {ROOT / "doc" / f"{name}.png" for name in ("band", "sparse_attention", "toroidal")}
    assert drawn <= shown
    for picture in shown:
        assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size < 150_000


# ----------------------------------------------------------------------------------------------------------------------
# CONTRIBUTING.md


def test_the_op_of_contributing_is_right(tmp_path):
    """Its NumPy against finite differences, its kernels and launchers, in mode check, against its NumPy."""
    skip_off_linux()
    text = (ROOT / "CONTRIBUTING.md").read_text()
    section = text.partition("## add an op")[2].partition("## add a selector")[0]
    (_, reference), (_, kernel), (_, launcher), *_ = BLOCK.findall(section)
    (tmp_path / "relu_squared.cu").write_text(kernel)
    ours, launchers, theirs = EmulatedRuntime("check", folders=(tmp_path,)), {}, {}
    exec(launcher, launchers)
    exec(reference, theirs)

    inp, dout = np.random.default_rng(0).standard_normal((2, 7, 9))
    out, dinp = np.empty_like(inp), np.empty_like(inp)
    theirs["relu_squared_forward"](out, inp)
    theirs["relu_squared_backward"](dinp, inp, dout)
    above, below = np.empty_like(inp), np.empty_like(inp)
    theirs["relu_squared_forward"](above, inp + 1e-5)
    theirs["relu_squared_forward"](below, inp - 1e-5)
    np.testing.assert_allclose(dout * (above - below) / 2e-5, dinp, atol=1e-8)

    x, dy = (ours.to_device(array.astype(np.float32)) for array in (inp, dout))
    y, dx = ours.zeros(inp.shape), ours.zeros(inp.shape)
    launchers["relu_squared_forward"](ours, y, x)
    launchers["relu_squared_backward"](ours, dx, x, dy)
    np.testing.assert_allclose(ours.to_host(y), out, atol=1e-6)
    np.testing.assert_allclose(ours.to_host(dx), dinp, atol=1e-6)
