"""Check a GPU: a line for each check, ok or FAILED, and exit code 1 if one failed. Meant for four minutes.

    make gpu_check
    python benchmarks/gpu_check.py --device cpu      # the same runs, fewer steps, on the CPU: tries the script itself

What every run printed stays in build/gpu_check. The model is that of the golden runs: 2 layers of 64 channels. Losses
may differ by LIMITS from those of llm.c or of the CPU: sums are taken in another order. Sparse attention's more, as the
last bit of a score may decide which key is taken. compute-sanitizer is used where it is installed: it comes with the
CUDA toolkit, not with CuPy.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))  # so that it runs from any folder
if __name__ == "__main__":
    from llmc import startup

    startup.begin()

import re
import shutil
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import kernels  # before NumPy, as in the trainers  # isort: skip
import turns

from llmc.cli import ArgumentParser
from llmc.errors import UserError, run
from llmc.resume import load_checkpoint
from tests import golden_run

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "gpu_check"
TRAINERS = {
    "banded": ["train_banded.py", "-1", "96", "-2", "64"],
    "sparse": ["train_sparse_attn.py", "--top-k", "8"],
    "toroidal": ["train_toroidal.py", "--layers", "0", "--train", "all"],
}
LIMITS = {"golden": 5e-5, "banded": 1e-4, "sparse": 5e-3, "toroidal": 1e-4, "TF32": 1e-2}
STEPS = {"cuda": 20, "cpu": 4}
JOBS = {"cuda": 3, "cpu": 2}  # processes at a time
TIMEOUT = 200  # seconds of a process
SANITIZERS = {"memcheck": r"ERROR SUMMARY: (\d+) error", "racecheck": r"RACECHECK SUMMARY: (\d+) hazard"}
TOOLKITS = [os.environ.get("CUDA_HOME", ""), os.environ.get("CUDA_PATH", ""), "/usr/local/cuda"]


class Failed(Exception):
    """A check does not hold; the message is what its line says."""


class LeftOut(Exception):
    """A check cannot be made here; the message is why."""


class Checks:
    """The checks of a device. Each is a method that returns what its line says, or raises Failed or LeftOut."""

    def __init__(self, device: str, folder: Path):
        self.device, self.folder, self.steps = device, folder, STEPS[device]

    def all(self) -> dict[str, Callable[[], str]]:
        """The checks by name, in order."""
        checks = {
            "pytest -m gpu": self.tests,
            "losses are llm.c's": self.golden,
            "the same run gives the same file": self.same_file,
            "a stop and --resume change no bit": self.resumed,
            "CUDA graphs change no bit": self.graphs,
            "losses are the CPU's": self.as_on_cpu,
            "losses in TF32 are float32's": self.tf32,
            "memcheck of two steps": lambda: self.sanitized("memcheck"),
            "racecheck of two steps": lambda: self.sanitized("racecheck"),
        }
        of_the_gpu = (
            "pytest -m gpu",
            "CUDA graphs change no bit",
            "memcheck of two steps",
            "racecheck of two steps",
        )
        return {name: check for name, check in checks.items() if self.device == "cuda" or name not in of_the_gpu}

    def call(self, name: str, command: list, cwd: Path | None = None) -> str:
        """What a process prints, stderr as well, kept in NAME.txt. Raises Failed if it does not end with 0."""
        path = self.folder / f"{name}.txt"
        environment = os.environ | ({"OPENBLAS_NUM_THREADS": "1"} if self.device == "cpu" else {})
        with open(path, "w") as capture:
            output = dict(stdin=subprocess.DEVNULL, stdout=capture, stderr=subprocess.STDOUT)
            try:
                words = list(map(str, command))
                code = subprocess.run(
                    words, cwd=cwd or self.folder, env=environment, timeout=TIMEOUT, check=False, **output
                ).returncode
            except subprocess.TimeoutExpired:
                code = f"{TIMEOUT} s, stopped"
        text = path.read_text(errors="replace")
        if code:
            errors = [line for line in text.splitlines() if "rror" in line] or text.splitlines() or ["no output"]
            raise Failed(f"{name}: exit code {code}, {errors[-1].strip()[:160]}; all of it in {path}")
        return text

    def train(self, name: str, *flags, trainer: str = "", device: str = "", before: tuple = ()) -> str:
        """What a trainer prints, of a run on the golden runs' files; `before`: words in front of the command."""
        script, *own = TRAINERS[trainer or name]
        own = [] if "--resume" in flags else [*golden_run.FILES, *own]
        short = ["-t", 32, "-b", 4, "-l", "3e-4", "-v", 10, "-m", 2, "-s", 0, "--overwrite", 1]
        command = [*before, sys.executable, ROOT / script, *own, *short, "--device", device or self.device, *flags]
        return self.call(name, command)

    def each(self, check: Callable[[str], str]) -> str:
        """What `check` says of each trainer, some at a time."""
        with ThreadPoolExecutor(JOBS[self.device]) as pool:
            return ", ".join(pool.map(check, TRAINERS))

    def largest_difference(self, name: str, other: Path, limit: float) -> str:
        """Of the losses in NAME.txt and another capture, by llmc.diff. Raises Failed above the limit."""
        diff = [sys.executable, "-m", "llmc.diff", self.folder / f"{name}.txt", other, "--tol", limit]
        try:
            return difference(self.call(f"{name}_diff", diff, cwd=ROOT))
        except Failed:
            found = difference((self.folder / f"{name}_diff.txt").read_text())
            raise Failed(f"{name}: losses {found} apart, at most {limit} expected") from None

    # ------------------------------------------------------------------------------------------------------------------
    # the checks

    def tests(self) -> str:
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-m",
            "gpu",
            "-n",
            "auto",
            "--maxprocesses",
            8,
            "-p",
            "no:cacheprovider",
        ]
        return counts(self.call("pytest", command, cwd=ROOT))

    def golden(self) -> str:
        def one(name: str) -> str:
            words = [*golden_run.FILES, *golden_run.SIZES, *golden_run.RUNS[name], "--device", self.device]
            self.call(f"golden_{name}", [sys.executable, ROOT / "train_banded.py", *words])
            found = self.largest_difference(f"golden_{name}", golden_run.GOLDEN / f"{name}.log", LIMITS["golden"])
            return f"{name} {found}"

        with ThreadPoolExecutor(JOBS[self.device]) as pool:
            return ", ".join(pool.map(one, golden_run.RUNS))

    def same_file(self) -> str:
        def one(name: str) -> str:
            for run_name in ("one", "two"):
                self.train(f"{name}_{run_name}", "-n", self.steps, "-c", f"{name}_{run_name}.bin", trainer=name)
            self.compare(f"{name}_one.bin", f"{name}_two.bin")
            return name

        return self.each(one)

    def resumed(self) -> str:
        """Half of the steps, the rest by --resume, and all in one go, which same_file has left."""

        def one(name: str) -> str:
            half = f"{name}_half.bin"
            self.train(f"{name}_half", "-n", self.steps // 2, "-c", half, trainer=name)
            self.train(f"{name}_rest", "--resume", half, "-n", self.steps, trainer=name)
            self.compare(f"{name}_one.bin", half)
            return f"{name} {self.steps // 2}+{self.steps // 2}"

        return self.each(one)

    def graphs(self) -> str:
        """Two micro-steps a step and clipped gradients, launched one by one and by graphs."""

        def one(name: str) -> str:
            for run_name, flag in (("eager", 0), ("graphs", 1)):
                flags = ["-n", self.steps, "--grad-accum", 2, "--grad-clip", 1, "--graph", flag]
                self.train(f"{name}_{run_name}", *flags, "-c", f"{name}_{run_name}.bin", trainer=name)
            self.compare(f"{name}_eager.bin", f"{name}_graphs.bin")
            return name

        return self.each(one)

    def compare(self, one: str, other: str) -> None:
        """Raise Failed unless two checkpoints have the same weights, m and v, bit for bit, at the same step."""
        if not (self.folder / one).exists():
            raise Failed(f"{one} is not there: the run that writes it failed")
        (a, state_a), (b, state_b) = (load_checkpoint(self.folder / path) for path in (one, other))
        of_a = {"weights": a.params, "extra weights": a.extra, "m": state_a.m, "v": state_a.v}
        of_b = {"weights": b.params, "extra weights": b.extra, "m": state_b.m, "v": state_b.v}
        for what, values in of_a.items():
            if values.tobytes() != of_b[what].tobytes():
                wrong = int((values != of_b[what]).sum())
                raise Failed(f"{one} and {other}: {wrong} of {values.size} values of {what} differ")
        if (a.step, state_a.shard, state_a.sample) != (b.step, state_b.shard, state_b.sample):
            raise Failed(f"{one} and {other} stand at different steps or data")

    def as_on_cpu(self) -> str:
        def one(name: str) -> str:
            self.train(f"{name}_cpu", "-n", self.steps, trainer=name, device="cpu")
            self.train(f"{name}_device", "-n", self.steps, trainer=name)
            found = self.largest_difference(f"{name}_device", self.folder / f"{name}_cpu.txt", LIMITS[name])
            return f"{name} {found}"

        return self.each(one)

    def tf32(self) -> str:
        for name, flag in (("float32", 0), ("TF32", 1)):
            self.train(name, "-n", self.steps, "--tf32", flag, trainer="banded")
        return self.largest_difference("TF32", self.folder / "float32.txt", LIMITS["TF32"])

    def sanitized(self, tool: str) -> str:
        program = sanitizer()
        if program is None:
            raise LeftOut("compute-sanitizer is not installed")

        def one(name: str) -> str:
            flags, before = ("-n", 2, "-v", 0, "-m", 1), (program, "--tool", tool)
            text = self.train(f"{name}_{tool}", *flags, trainer=name, before=before)
            return f"{name} {problems(tool, f'{name}_{tool}', text)}"

        return self.each(one)


def sanitizer() -> str | None:
    """compute-sanitizer, on the path or in a CUDA toolkit."""
    folders = [os.path.join(root, "bin") for root in TOOLKITS if root]
    return shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", ""), *folders]))


def problems(tool: str, name: str, text: str) -> int:
    """The number in a sanitizer's summary, which is 0. Raises Failed for another, or none."""
    found = re.search(SANITIZERS[tool], text)
    if found is None:
        raise Failed(f"{name}: {tool} gave no summary")
    if int(found[1]):
        raise Failed(f"{name}: {tool} found {found[1]}")
    return 0


def counts(text: str) -> str:
    """pytest's last line: "433 passed, 2 skipped". Raises Failed if none passed."""
    found = re.findall(r"(\d+) (passed|skipped|failed|errors?)", text)
    if not any(what == "passed" for _, what in found):
        raise Failed("pytest: no test ran")
    return ", ".join(" ".join(pair) for pair in found)


def difference(text: str) -> str:
    """The largest difference that llmc.diff found."""
    found = re.search(r"largest difference ([\w.+-]+)", text)
    return found[1] if found else "no losses"


def report(checks: dict[str, Callable[[], str]]) -> int:
    """Make the checks, print a line for each; the number of those that failed."""
    failed, width = 0, max(map(len, checks))
    for name, check in checks.items():
        started, outcome = time.perf_counter(), "ok"
        try:
            said = check()
        except LeftOut as reason:
            outcome, said = "left out", str(reason)
        except (Failed, UserError) as reason:
            outcome, said, failed = "FAILED", str(reason), failed + 1
        print(f"{outcome:<8} {time.perf_counter() - started:6.1f} s  {name:<{width}}  {said}", flush=True)
    return failed


def main(argv: list[str] | None = None) -> int:
    parser = ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: fewer checks, to try the script"
    )
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where runs write")
    args = parser.parse(argv)
    device = turns.open_gpu() if args.device == "cuda" else kernels.open_device("cpu")
    folder = args.folder.resolve()
    if folder == FOLDER:  # what an earlier run left
        shutil.rmtree(folder, ignore_errors=True)
    elif folder.exists() and any(folder.iterdir()):
        raise UserError(f"--folder {args.folder}: there are files in it", "name a new folder", 2)
    folder.mkdir(parents=True, exist_ok=True)
    golden_run.write_inputs(folder)
    print(device.describe(), flush=True)
    checks = Checks(args.device, folder).all()
    failed = report(checks)
    print(f"{failed} of {len(checks)} checks failed" if failed else f"{len(checks)} checks, none failed")
    return 1 if failed else 0


if __name__ == "__main__":
    run(main)
