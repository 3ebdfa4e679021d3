"""Tokens a second of one rank and of several, by real runs of train_banded.py under mpiexec, beside what is predicted.

    python benchmarks/scaling.py                             # eight minutes; the table into doc/scaling.md
    python benchmarks/scaling.py --sizes tiny --ranks 1,2
    python benchmarks/scaling.py --no-runs                   # the table anew, from benchmarks/scaling.json

A rank has one BLAS thread and B rows of its own, so R ranks have R times one's tokens in a step. Runs of 1, 2 and 4
ranks take turns; times are the medians of the steps that they print, without the first ones of each run. Apart are as
many single ranks at once, which share the machine and nothing else. Then ranks sum as many floats alone, as a step does
its gradients. Predicted is what one rank's step and that sum give, one behind the other: R t1 / (t1 + sum), on fewer
cores than ranks R t1 / (t1 R / cores + sum). Weights are random, tokens too. OPENBLAS_CORETYPE and OPENBLAS_L2_SIZE
are unset for all: they override what OpenBLAS finds out about the processor.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))  # so that it runs from any folder
if __name__ == "__main__":
    from llmc import startup

    startup.begin()

import json
import re
import shutil
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from textwrap import fill
from typing import NamedTuple

import kernels  # noqa: F401  # before NumPy, see its docstring  # isort: skip
import numpy as np

from benchmarks import turns
from benchmarks.scaling_model import PAGE, predicted, write_block
from data.create_model import PRESETS
from kernels.cpu.blocks import num_threads
from llmc.checkpoint import Model, num_parameters, write_model
from llmc.cli import ArgumentParser, natural, positive_int
from llmc.dataloader import write_tokens
from llmc.errors import UserError, run
from llmc.files import atomic_write
from llmc.init import gpt2_init
from llmc.ranks import open_ranks

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "scaling.json"
BEGIN = "<!-- table: make bench_scaling -->\n"
NOT_YET = "\nNot measured yet: `make bench_scaling` writes its table here.\n\n"
STEP = re.compile(r"^step +\d+/\d+: train loss \S+ \(([\d.]+) ms, \d+ tok/s\)", re.MULTILINE)
WARM_UP = 2  # steps: buffers are allocated, gradients and moments in the first
ASKED = "124M"  # the model of which one figure is told in words
AIM = 1.7  # two ranks' tokens/s over one's, there


class Size(NamedTuple):
    """A model of data/create_model.py, rows and tokens of a rank, steps of a run behind WARM_UP."""

    preset: str
    B: int
    T: int
    steps: int


# a step of 124M takes about 5 s in one thread: 512 tokens a rank, so that the sum is not most of it
SIZES = {"tiny": Size("tiny", 4, 64, 30), "124M": Size("d12", 4, 128, 4)}


# ----------------------------------------------------------------------------------------------------------------------
# runs


def mpiexec() -> str:
    """The mpiexec of this virtual environment, else the system's. Raises UserError if there is none."""
    found = shutil.which("mpiexec", path=str(Path(sys.executable).parent)) or shutil.which("mpiexec")
    if not found:
        raise UserError("no mpiexec here", "pip install -r requirements-mpi.txt")
    return found


def ranks_run(count: int, *words) -> str:
    """What `count` ranks of a script print, each with one BLAS thread. Raises UserError with their error."""
    environment = {name: value for name, value in os.environ.items() if name not in turns.OVERRIDES}
    command = [mpiexec(), "-n", str(count), sys.executable, *map(str, words)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment | {"OPENBLAS_NUM_THREADS": "1"}, check=False
    )
    if done.returncode:
        raise UserError(f"{' '.join(command)}: exit status {done.returncode}", done.stderr.strip()[-500:] or None)
    return done.stdout


def step_times(printed: str) -> list[float]:
    """Milliseconds of a run's steps, without the first ones. Raises UserError if none are left."""
    times = [float(ms) for ms in STEP.findall(printed)][WARM_UP:]
    if not times:
        raise UserError(f"a run printed fewer than {WARM_UP + 1} steps", "--steps 1 or more")
    return times


def prepare(preset: str, folder: Path, tokens: int) -> None:
    """model.bin of a preset and train.bin and val.bin, of so many tokens each, in `folder`."""
    config = PRESETS[preset]
    write_model(folder / "model.bin", Model(config, gpt2_init(config, 1)))
    for seed, split in enumerate(("train", "val")):
        drawn = np.random.default_rng(seed).integers(0, config.V, tokens, dtype=np.uint16)
        write_tokens(folder / f"{split}.bin", drawn)


def training(count: int, size: Size, folder: Path) -> list[float]:
    """Milliseconds of the steps of a dense run of `count` ranks."""
    words = ["-e", "model.bin", "-i", "train.bin", "-j", "val.bin"]
    words = [folder / word if word.endswith(".bin") else word for word in words]
    flags = f"-d 1 -b {size.B} -t {size.T} -n {WARM_UP + size.steps} -v 0 -m 1 -s 0 --device cpu"
    return step_times(ranks_run(count, ROOT / "train_banded.py", *words, *flags.split()))


def apart(count: int, size: Size, folder: Path) -> list[float]:
    """Milliseconds of the steps of `count` runs of one rank at the same time, which do not know each other."""
    with ThreadPoolExecutor(count) as pool:
        return [ms for times in pool.map(lambda _: training(1, size, folder), range(count)) for ms in times]


def sums(count: int, values: int, repeats: int) -> list[float]:
    """Milliseconds of a sum of so many floats over `count` ranks."""
    return [float(word) for word in ranks_run(count, __file__, "--worker", values, "--repeats", repeats).split()]


def work(values: int, repeats: int) -> None:
    """A rank of `sums`: prints the slowest rank's milliseconds of each sum but the first."""
    ranks, floats = open_ranks(), np.ones(values, np.float32)
    for repeat in range(repeats + 1):
        ranks.meet()
        started = time.perf_counter()
        ranks.add_up(floats)
        slowest = max(ranks.gather(time.perf_counter() - started))
        if repeat:
            print(1e3 * slowest, flush=True)


def measure(size: Size, counts: list[int], rounds: int) -> dict:
    """{"B", "T", "values": of the gradients, "ms": {ranks: rounds of times}, "apart" and "sums": {ranks: times}}."""
    values, several = num_parameters(PRESETS[size.preset]), [count for count in counts if count > 1]
    found = {"B": size.B, "T": size.T, "values": values, "ms": {str(count): [] for count in counts}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(size.preset, folder, 16 * max(counts) * size.B * size.T + 1)
        for _ in range(rounds):
            for count in counts:
                found["ms"][str(count)].append(training(count, size, folder))
        found["apart"] = {str(count): apart(count, size, folder) for count in several}
    return found | {"sums": {str(count): sums(count, values, 8) for count in several}}


# ----------------------------------------------------------------------------------------------------------------------
# what they say


def middle(times) -> float:
    return float(np.median(np.concatenate([np.ravel(each) for each in times])))


def gains(found: dict, count: str) -> list[float]:
    """Tokens/s over one rank's, of each round."""
    pairs = zip(found["ms"]["1"], found["ms"][count])
    return [int(count) * float(np.median(one)) / float(np.median(ours)) for one, ours in pairs]


def rows(name: str, found: dict, cores: int) -> list[str]:
    """A size's rows of the table."""
    B, T, alone, lines = found["B"], found["T"], middle(found["ms"]["1"]), []
    for count, times in found["ms"].items():
        R, ms = int(count), middle(times)
        cells = [f"{name}, B={B} T={T}", count, f"{ms:.0f}", f"{1e3 * R * B * T / ms:.0f}"]
        if R == 1:
            cells += ["1.00", "", "", "", ""]
        else:
            each, reducing = gains(found, count), middle([found["sums"][count]])
            rate = 2 * (R - 1) / R * 4 * found["values"] / reducing / 1e6
            cells += [f"{R * alone / ms:.2f} ({min(each):.2f} .. {max(each):.2f})"]
            cells += [f"{R * alone / middle([found['apart'][count]]):.2f}"]
            cells += [f"{predicted(R, alone, reducing, cores):.2f}", f"{reducing:.1f}", f"{rate:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def table(results: dict) -> str:
    """Markdown of all sizes."""
    lines = [
        "| model, a rank's batch | ranks | ms a step | tokens/s | over one's | apart | predicted | sum, ms | GB/s |"
    ]
    lines.append("|---|" + "---:|" * 8)
    for name, found in results["sizes"].items():
        lines += rows(name, found, results["cores"])
    return "\n".join(lines) + "\n"


def answer(results: dict) -> str:
    """The one figure that is asked for, in words; empty without it."""
    found = results["sizes"].get(ASKED, {"ms": {}})
    if not {"1", "2"} <= found["ms"].keys():
        return ""
    ratio = 2 * middle(found["ms"]["1"]) / middle(found["ms"]["2"])
    said = f"Two ranks of {ASKED} with one thread each, B={found['B']} T={found['T']} a rank, do {ratio:.2f} times the "
    said += f"tokens a second of one rank with one thread; the aim was {AIM}."
    most, cores = max(map(int, found["ms"])), results["cores"]
    if most > cores:
        said += f" {most} ranks had {cores} cores: what they show is what more ranks than cores cost."
    return fill(said, 120) + "\n"


def block(results: dict | None) -> str:
    """What stands between the page's markers."""
    if not results:
        return NOT_YET
    parts = fill(f"{results['machine']}.", 120) + "\n", table(results), answer(results)
    return "\n" + "\n".join(part for part in parts if part) + "\n"


def saved() -> dict | None:
    """The last full measurement."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else None


def counts_of(text: str) -> list[int]:
    """--ranks: "1,2" -> [1, 2]. Raises UserError unless they are numbers and 1 is the first."""
    counts = [int(word) for word in text.split(",") if word.isdigit() and int(word)]
    if len(counts) != len(text.split(",")) or counts[0] != 1 or len({*counts}) != len(counts):
        raise UserError(f"--ranks {text}: expected different numbers, 1 the first", "--ranks 1,2", 2)
    return counts


def arguments() -> ArgumentParser:
    parser = ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--sizes", default=",".join(SIZES), help="which models")
    add("--ranks", default="1,2,4", help="how many (default: %(default)s)")
    add("--rounds", type=positive_int, default=2, help="runs of each size and number of ranks")
    add("--steps", type=natural, default=0, help="steps to time in a run, 0: as many as each size says")
    add("-b", "--batch-size", type=natural, default=0, help="rows B of a rank, 0: as each size says")
    add("-t", "--seq-len", type=natural, default=0, help="tokens T of a row, 0: as each size says")
    add("--no-runs", action="store_true", help="write the table anew from benchmarks/scaling.json")
    add("--worker", type=natural, default=0, help="used by the program itself")
    add("--repeats", type=positive_int, default=8, help="used by the program itself")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = arguments().parse(argv)
    if args.worker:
        work(args.worker, args.repeats)
        return 0
    if args.no_runs:
        write_block(BEGIN, block(saved()), PAGE)
        return 0
    names = args.sizes.split(",")
    unknown = {*names} - {*SIZES}
    if unknown:
        raise UserError(f"--sizes {', '.join(sorted(unknown))}: expected some of {','.join(SIZES)}", None, 2)
    counts, whole = counts_of(args.ranks), args == arguments().parse(["--rounds", str(args.rounds)])
    results = {"machine": f"One BLAS thread a rank; {turns.machine()}", "cores": num_threads(), "sizes": {}}
    for name in names:
        size = SIZES[name]
        changed = dict(B=args.batch_size or size.B, T=args.seq_len or size.T, steps=args.steps or size.steps)
        results["sizes"][name] = measure(size._replace(**changed), counts, args.rounds)
    if whole:
        with atomic_write(RESULTS) as file:
            file.write((json.dumps(results, indent=1) + "\n").encode())
        write_block(BEGIN, block(results), PAGE)
    print(block(results), end="")
    return 0


if __name__ == "__main__":
    run(main)
