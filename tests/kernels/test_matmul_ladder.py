"""dev/matmul_ladder.py: every version is right, on the emulator and on a GPU if any, and compiles without warnings."""

import pytest
from availability import emulate, import_cupy, open_gpu

from dev import matmul_ladder
from kernels.cuda.runtime import compile as compiler


@pytest.fixture(scope="module", params=["fast", "check", pytest.param("gpu", marks=pytest.mark.gpu)])
def runtime(request):
    folders = matmul_ladder.FOLDERS
    return open_gpu(folders=folders) if request.param == "gpu" else emulate(request.param, folders)


@pytest.mark.parametrize("version", matmul_ladder.LADDER)
@pytest.mark.parametrize("N, C, OC", matmul_ladder.SHAPES)
def test_every_version_is_numpys_product(runtime, version, N, C, OC):
    assert matmul_ladder.error_of(runtime, version, N, C, OC) <= matmul_ladder.TOL


def test_the_script_checks_every_version(monkeypatch, capsys):
    monkeypatch.setattr(matmul_ladder, "open_runtime", lambda: (emulate("fast", matmul_ladder.FOLDERS), False))
    assert matmul_ladder.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["on", "v1", "v2", "v3"] and "WRONG" not in " ".join(lines)


def test_it_compiles_without_spills_and_warnings(capsys):
    import_cupy()
    assert compiler.main([str(matmul_ladder.FOLDER)]) == 0 and capsys.readouterr().err == ""
