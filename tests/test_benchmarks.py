"""What measures speed still runs: every benchmark at its smallest, which writes no table."""

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SEARCHED = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
SMALLEST = {  # script: its flags, what a row of its output looks like, how many of them
    "step_time.py": ("--sizes tiny --steps 1 -b 1 -t 8", r"(ours|products).* \d+\.\d ms \(fastest", 4),
    "band_products.py": ("--channels 64 --tokens 64 --repeats 1", r"\| 64 \| 64 \|", 1),
    "sparse_gpu.py": ("--device cpu --channels 64 --lengths 64,130 --repeats 1", r"\| (64|130), \w+ \| [01]\.\d\d", 6),
    "scaling.py": ("--sizes tiny --ranks 1,2 --steps 1 -b 1 -t 8 --rounds 1", r"\| tiny, B=1 T=8 \| [12] \|", 2),
    "sparse_attention.py": ("--channels 64 --lengths 64 --repeats 1", r"\b64\b", 1),
}
LIBRARIES = {"turns.py", "kernel_times.py"}
NEED_A_GPU = {"gpu_check.py", "gpu_step_time.py"}  # test_gpu_check.py, test_gpu_step_time.py
MEASURE_NOTHING = {"sparse_cost.py", "predicted.py", "scaling_model.py"}  # test_predicted.py, test_scaling.py


def test_every_benchmark_is_here():
    scripts = {path.name for path in (ROOT / "benchmarks").glob("*.py")} - LIBRARIES - NEED_A_GPU - MEASURE_NOTHING
    assert scripts == set(SMALLEST)


@pytest.mark.parametrize("script", SMALLEST)
def test_runs(script):
    if script == "scaling.py" and not (find_spec("mpi4py") and shutil.which("mpiexec", path=SEARCHED)):
        pytest.skip("no MPI here: pip install -r requirements-mpi.txt")
    flags, row, least = SMALLEST[script]
    before = (ROOT / "benchmarks" / "RESULTS.md").read_bytes()
    command = [sys.executable, str(ROOT / "benchmarks" / script), *flags.split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ, check=False)
    assert done.returncode == 0, done.stderr
    assert len(re.findall(row, done.stdout)) >= least, done.stdout
    assert (ROOT / "benchmarks" / "RESULTS.md").read_bytes() == before
