"""kernels/cuda/runtime/mma.cuh: fragments, rounding and copies, on the emulator's fallbacks and on a GPU if any."""

from pathlib import Path

import numpy as np
import pytest
from availability import ROOT, emulate, import_cupy, open_gpu
from check_op import relative

from kernels.cuda.runtime import compile as compiler
from kernels.cuda.runtime import source

DEV = ROOT / "dev"
# the largest error of a product of normal values, relative to its largest value, and the least: that rounding happens
LIMITS = {"tf32": (1e-5, 1.5e-3), "3xtf32": (0, 5e-6), "bf16": (1e-4, 1.2e-2)}


@pytest.fixture(scope="module", params=["fast", "check", pytest.param("gpu", marks=pytest.mark.gpu)])
def runtime(request):
    return open_gpu(folders=(DEV,)) if request.param == "gpu" else emulate(request.param, (DEV,))


def product(runtime, kind: str, a, b, skip=0) -> np.ndarray:
    out = runtime.to_device(np.full((16, 8), np.nan, np.float32))
    operands = (runtime.to_device(x.astype(np.float32)) for x in (a, b))
    runtime.launch(f"mma_{kind}_kernel", 1, 32, (out, *operands, skip))
    return runtime.to_host(out)


@pytest.mark.parametrize("kind", LIMITS)
def test_every_value_is_where_the_layout_says(runtime, kind):
    """Whole numbers, which no format rounds: a different one at each place, then each column of b alone."""
    K = 16 if kind == "bf16" else 8
    a, b = np.arange(16 * K).reshape(16, K), 1 + np.arange(8 * K).reshape(K, 8)
    np.testing.assert_array_equal(product(runtime, kind, a, b), a @ b)
    for k in range(K):
        one = np.zeros((K, 8))
        one[k, k % 8] = 1
        np.testing.assert_array_equal(product(runtime, kind, a, one), a @ one)


@pytest.mark.parametrize("kind", LIMITS)
def test_errors(runtime, kind):
    K, (least, most) = 16 if kind == "bf16" else 8, LIMITS[kind]
    worst = 0.0
    for seed in range(10):
        rng = np.random.default_rng(seed)
        a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((16, K), (K, 8)))
        worst = max(worst, relative(product(runtime, kind, a, b), a.astype(float) @ b))
    print(f"{kind}: {worst:.1e}")
    assert least < worst <= most


@pytest.mark.parametrize("kind", LIMITS)
def test_what_is_not_wanted_is_not_read(runtime, kind):
    """The last row of a is NaN; its copy is refused, so its products are 0."""
    K = 16 if kind == "bf16" else 8
    a, b = np.ones((16, K)), np.ones((K, 8))
    a[15] = np.nan
    assert np.isnan(product(runtime, kind, a, b)[15]).all()
    np.testing.assert_array_equal(product(runtime, kind, a, b, skip=1), np.repeat([K] * 15 + [0], 8).reshape(16, 8))


def test_rounding_is_to_nearest(runtime):
    """TF32 keeps 10 bits behind the point; a tie goes away from zero."""
    unit = 2.0**-10
    inp = np.array([1, 1 + 0.49 * unit, 1 + unit / 2, 1 + 0.51 * unit, 0, -0.0, np.inf, -np.inf, np.nan], np.float32)
    inp = np.concatenate([inp, -inp, np.array([np.finfo(np.float32).max, 1e-30], np.float32)])
    expected = np.array([1, 1, 1 + unit, 1 + unit, 0, -0.0, np.inf, -np.inf, np.nan])
    out = runtime.zeros(len(inp))
    runtime.launch("round_tf32_kernel", 1, 32, (out, runtime.to_device(inp), len(inp)))
    found = runtime.to_host(out)
    np.testing.assert_array_equal(found[:18], np.concatenate([expected, -expected]))
    np.testing.assert_array_equal(np.signbit(found[4:6]), [False, True])
    assert np.isposinf(found[18]) and abs(found[19] / 1e-30 - 1) <= unit / 2


def test_only_files_that_name_mma_are_compiled_behind_it(tmp_path):
    texts = {}
    for name, first in (("with", "// tiles: mma.cuh\n"), ("without", "// tiles\n")):
        path = Path(tmp_path, f"{name}.cu")
        path.write_text(first)
        texts[name] = source.text(path)
    assert "mma_tf32" in texts["with"] and "mma_tf32" not in texts["without"]
    assert texts["with"].endswith('#line 1 "with.cu"\n// tiles: mma.cuh\n')


def test_it_compiles_without_spills_and_warnings(capsys, tmp_path):
    import_cupy()
    (tmp_path / "mma_fragments.cu").write_text((DEV / "mma_fragments.cu").read_text())
    assert compiler.main([str(tmp_path)]) == 0 and capsys.readouterr().err == ""
