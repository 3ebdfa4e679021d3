"""benchmarks/gpu_check.py: its checks on the CPU, and what it makes of answers that do not hold."""

import shutil
import subprocess
import sys
from pathlib import Path

import golden_run
import gpu_check
import pytest
from gpu_check import Checks, Failed, LeftOut

from kernels.driver import NoDevice, check_driver
from llmc.checkpoint import read_model, write_model

ROOT = Path(__file__).parent.parent


def run(script: str, *flags) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "benchmarks" / script), *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def gpu_there() -> bool:
    try:
        check_driver()
    except NoDevice:
        return False
    return True


@pytest.mark.skipif(gpu_there(), reason="there is a GPU")
@pytest.mark.parametrize("script", ["gpu_check.py", "gpu_step_time.py"])
def test_without_a_gpu(script):
    """One line, exit code 1, nothing written."""
    before = (ROOT / "benchmarks" / "GPU.md").read_bytes()
    done = run(script)
    assert (done.returncode, done.stdout) == (1, "") and done.stderr.startswith("error: no GPU: ")
    assert done.stderr.count("\n") == 1 and (ROOT / "benchmarks" / "GPU.md").read_bytes() == before


def test_all_hold_on_the_cpu(tmp_path):
    done = run("gpu_check.py", "--device", "cpu", "--folder", tmp_path / "runs")
    assert done.returncode == 0 and done.stderr == "", done
    title, *rows, last = done.stdout.splitlines()
    assert title.startswith("CPU, NumPy") and last == "5 checks, none failed"
    assert len(rows) == 5 and all(row.startswith("ok  ") for row in rows)
    assert "both_96_64_nomaskinit" in rows[0] and "sparse 2+2" in rows[2] and "toroidal 0.0e+00" in rows[3]
    again = run("gpu_check.py", "--device", "cpu", "--folder", tmp_path / "runs")
    assert again.returncode == 2 and "there are files in it" in again.stderr


def test_on_a_gpu_there_are_more():
    names = [*Checks("cuda", Path()).all()]
    assert names[0] == "pytest -m gpu" and len(names) == 9 and "racecheck of two steps" in names
    assert [name for name in names if name in Checks("cpu", Path()).all()] == [*Checks("cpu", Path()).all()]


# ----------------------------------------------------------------------------------------------------------------------
# what does not hold


@pytest.fixture
def checks(tmp_path):
    golden_run.write_inputs(tmp_path)
    return Checks("cpu", tmp_path)


def test_losses_too_far_apart(checks, monkeypatch):
    monkeypatch.setitem(gpu_check.LIMITS, "banded", 1e-4)
    checks.train("banded_device", "-n", 2, trainer="banded")
    text = (checks.folder / "banded_device.txt").read_text()
    place = text.index("train loss ") + len("train loss ")
    shifted = f"{float(text[place : place + 8]) + 0.001:f}"
    (checks.folder / "banded_cpu.txt").write_text(text[:place] + shifted + text[place + 8 :])
    with pytest.raises(Failed, match=r"banded_device: losses 1\.0e-03 apart, at most 0\.0001 expected"):
        checks.largest_difference("banded_device", checks.folder / "banded_cpu.txt", 1e-4)
    assert checks.largest_difference("banded_device", checks.folder / "banded_cpu.txt", 0.1) == "1.0e-03"


def test_files_that_differ(checks):
    """One bit of one weight; another state; another step; a run that did not get as far."""
    checks.train("banded_one", "-n", 2, "-c", "banded_one.bin", trainer="banded")
    for path in checks.folder.glob("banded_one*.bin*"):
        shutil.copy(path, path.with_name(path.name.replace("one", "two")))
    checks.compare("banded_one.bin", "banded_two.bin")
    model = read_model(checks.folder / "model.bin")
    with pytest.raises(Failed, match=r"never\.bin is not there"):
        checks.compare("never.bin", "banded_two.bin")
    model.params[100] += 1
    write_model(checks.folder / "model.bin", model)
    checks.train("banded_three", "-n", 2, "-c", "banded_three.bin", trainer="banded")
    with pytest.raises(Failed, match=r"\d+ of \d+ values of weights differ"):
        checks.compare("banded_one.bin", "banded_three.bin")


def test_a_run_that_fails(checks):
    with pytest.raises(Failed, match=r"banded: exit code 2, error: -n/--steps: .x., .*; all of it in .*banded\.txt"):
        checks.train("banded", "-n", "x")


def test_a_run_that_hangs(checks, monkeypatch):
    monkeypatch.setattr(gpu_check, "TIMEOUT", 0.2)
    with pytest.raises(Failed, match=r"exit code 0.2 s, stopped"):
        checks.call("hangs", [sys.executable, "-c", "import time; time.sleep(20)"])


def test_sanitizer(checks, monkeypatch):
    """It stands before the command; its summary counts, not the program's exit code."""
    monkeypatch.setattr(gpu_check, "sanitizer", lambda: None)
    with pytest.raises(LeftOut):
        checks.sanitized("memcheck")
    calls, summary = [], "========= ERROR SUMMARY: 0 errors\n"
    monkeypatch.setattr(gpu_check, "sanitizer", lambda: "/cuda/bin/compute-sanitizer")
    monkeypatch.setattr(checks, "call", lambda name, command: calls.append(command) or summary)
    assert checks.sanitized("memcheck") == "banded 0, sparse 0, toroidal 0"
    assert calls[0][:4] == ["/cuda/bin/compute-sanitizer", "--tool", "memcheck", sys.executable]
    summary = "========= ERROR SUMMARY: 12 errors\n"
    with pytest.raises(Failed, match="memcheck found 12"):
        checks.sanitized("memcheck")
    summary = "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"
    assert checks.sanitized("racecheck").startswith("banded 0")
    with pytest.raises(Failed, match="gave no summary"):
        checks.sanitized("memcheck")


def test_sanitizer_of_a_toolkit_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "TOOLKITS", ["", str(tmp_path)])
    monkeypatch.setenv("PATH", "")
    assert gpu_check.sanitizer() is None
    program = tmp_path / "bin" / "compute-sanitizer"
    program.parent.mkdir()
    program.touch(0o755)
    assert gpu_check.sanitizer() == str(program)


def test_pytest_s_last_line():
    assert gpu_check.counts("....\n419 passed, 14 skipped in 27.01s\n") == "419 passed, 14 skipped"
    for text in ("no tests ran in 0.2s", "14 skipped, 900 deselected in 2s"):
        with pytest.raises(Failed, match="no test ran"):
            gpu_check.counts(text)


def test_report(capsys):
    def fails():
        raise Failed("losses 1e-2 apart")

    def left_out():
        raise LeftOut("not installed")

    assert gpu_check.report({"one": lambda: "well", "another": fails, "third": left_out}) == 1
    rows = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    assert [(row[0].strip(), row[-1]) for row in rows] == [
        ("ok", "well"), ("FAILED", "losses 1e-2 apart"), ("left out", "not installed")
    ]  # fmt: skip


def test_exit_code(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Checks, "all", lambda self: {"one": lambda: "well", "two": self.compare_nothing})
    monkeypatch.setattr(Checks, "compare_nothing", lambda self: self.compare("a.bin", "b.bin"), raising=False)
    assert gpu_check.main(["--device", "cpu", "--folder", str(tmp_path / "runs")]) == 1
    assert capsys.readouterr().out.endswith("1 of 2 checks failed\n")
