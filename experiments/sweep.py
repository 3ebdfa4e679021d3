"""The runs of a protocol: which are on file, making the others, and what a trainer's output tells.

A run is a trainer as one types it, in a process of its own. It is on file as long as its commands, the code that it
imports and its data stay what they were.
"""

import functools
import hashlib
import importlib
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from types import ModuleType, SimpleNamespace

import numpy as np

from benchmarks.turns import OVERRIDES
from llmc.errors import UserError
from llmc.files import atomic_write
from systems.selection import kept_pairs

ROOT = Path(__file__).resolve().parent.parent
BUILD = Path("build") / "experiments"  # below ROOT: data, models, checkpoints
UNIT = 20 if sys.platform == "darwin" else 10  # bits from the unit of ru_maxrss, bytes or KiB, to MiB
DIVERGED = re.compile(r"(?:train|val|indexer's) loss (?:nan|inf) at step (\d+)")


@dataclass(frozen=True)
class Run:
    """`trainer` with `flags`, from a model that `model` and `change` make or from the checkpoint of the run `after`.

    All runs of a seed share initial weights and order of data. {k} in the flags is the k at which a fixed number of
    keys keeps as many pairs as the run `match` did. later: the run was added when results were on file, and a seed is
    complete without it.
    """

    name: str
    seed: int
    trainer: str
    flags: str
    data: str  # a data script and its flags
    model: str = ""  # flags of data/create_model.py
    change: str = ""  # flags of experiments/initial_model.py
    after: str = ""
    match: str = ""
    later: bool = False
    settings: dict = field(default_factory=dict, hash=False)  # what the tables group by

    def flag(self, name: str) -> str:
        """The value of a flag: run.flag("-n")."""
        words = self.flags.split()
        return words[words.index(name) + 1]

    @property
    def tokens(self) -> int:
        """Tokens that it trains on, and those of 20 steps for its start: how long it takes, roughly."""
        return (int(self.flag("-n")) + 20) * int(self.flag("-b")) * int(self.flag("-t"))


# ----------------------------------------------------------------------------------------------------------------------
# what a run needs: data, initial weights, and a key that says whether it is on file


def shell(words: list[str]) -> None:
    """Run a script of ours in ROOT. Raises UserError with what it said if it fails."""
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"python {shlex.join(words)}: {done.stderr.strip()}")


def slug(text: str) -> str:
    """A part of a file's name: "both 64, fan-in init" -> "both_64_fan_in_init"."""
    return re.sub(r"\W+", "_", text).strip("_")


def short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@functools.cache
def digest(path: Path) -> str:
    return hashlib.sha256((ROOT / path).read_bytes()).hexdigest()


def made(path: Path, command: str) -> Path:
    """`path`, made by `command` if it is not there."""
    if not (ROOT / path).exists():
        (ROOT / path).parent.mkdir(parents=True, exist_ok=True)
        shell(shlex.split(command))
    return path


def data_command(data: str) -> tuple[Path, str]:
    """The folder of a data set and what makes it."""
    folder = BUILD / "data" / slug(data.removeprefix("data/").replace(".py", ""))
    return folder, f"{data} -o {folder}"


@functools.cache
def data_files(data: str) -> tuple[Path, Path]:
    """The training and the validation file of a data set, made if they are not there."""
    folder, command = data_command(data)
    if len(list((ROOT / folder).glob("*_val.bin"))) != 1:
        shell(shlex.split(command))
    return tuple(next((ROOT / folder).glob(f"*_{split}.bin")).relative_to(ROOT) for split in ("train", "val"))


def model_commands(each: Run) -> list[tuple[Path, str]]:
    """(file, command) of each model that leads to the initial weights, the last is what the run starts from."""
    flags = f"{each.model} --seed {each.seed}"
    path = BUILD / "models" / f"{short(flags)}.bin"
    commands = [(path, f"data/create_model.py {flags} -o {path} --force")]
    if each.change:
        changed = BUILD / "models" / f"{short(flags + each.change)}.bin"
        commands.append(
            (changed, f"experiments/initial_model.py -e {path} -o {changed} --seed {each.seed} {each.change}")
        )
    return commands


@functools.cache
def imported(trainer: str, device: str) -> list[Path]:
    """Our own files that a trainer imports; on a GPU, all launchers and kernels too."""
    script = f"import {trainer.removesuffix('.py')}, sys\n"
    script += "print(*(m.__file__ for m in [*sys.modules.values()] if getattr(m, '__file__', None)), sep='\\n')"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    ours = {Path(line).resolve() for line in done.stdout.splitlines()}
    if device == "cuda":
        ours |= {path for path in (ROOT / "kernels" / "cuda").rglob("*") if path.suffix in (".py", ".cu", ".cuh")}
    inside = (path.relative_to(ROOT) for path in ours if path.is_relative_to(ROOT))
    return sorted(path for path in inside if not path.parts[0].startswith("."))


def code(trainer: str, device: str) -> str:
    """A digest of the code as it is now, which may change during a sweep."""
    found = hashlib.sha256()
    for path in imported(trainer, device):
        found.update((ROOT / path).read_bytes())
    return found.hexdigest()[:16]


class Sweep:
    """The runs of one experiment with one preset: their commands, keys and files."""

    def __init__(self, name: str, preset: str, folder: Path):
        """folder: where results/PRESET lies, README.md and figures."""
        self.name, self.preset, self.folder = name, preset, folder
        self.protocol: ModuleType = importlib.import_module(f"experiments.{name}.protocol")
        if preset not in self.protocol.PRESETS:
            raise UserError(f"--preset {preset}: experiment {name} has none", f"{', '.join(self.protocol.PRESETS)}", 2)
        self.sizes = SimpleNamespace(**self.protocol.PRESETS[preset])
        self.device = getattr(self.sizes, "device", "cpu")

    def runs(self, seed: int) -> list[Run]:
        return self.protocol.runs(seed, self.sizes)

    def path(self, each: Run) -> Path:
        return self.folder / "results" / self.preset / f"{each.name}.{each.seed}.json"

    def other(self, each: Run, name: str) -> Run:
        """The run `name` of the same seed."""
        return next(other for other in self.runs(each.seed) if other.name == name)

    def checkpoint(self, each: Run) -> Path:
        return BUILD / "checkpoints" / f"{self.key(each)}.bin"

    def words(self, each: Run) -> list[str]:
        """The command of a run, as one types it in ROOT, but for {k} and -c."""
        train, val = data_files(each.data)
        model = self.checkpoint(self.other(each, each.after)) if each.after else model_commands(each)[-1][0]
        files = f"-e {model} -i {train} -j {val} --seed {each.seed} --device {self.device} -s 0"
        return [each.trainer, *files.split(), *each.flags.split()]

    def key(self, each: Run) -> str:
        """What a result hangs on: the commands, the code, the data; of the run that it goes on from, too."""
        parts = [*self.words(each), code(each.trainer, self.device), *map(digest, data_files(each.data))]
        if each.after:
            parts.append(self.key(self.other(each, each.after)))
        else:
            parts.append(digest(made_model(each)))
        if each.match:
            parts.append(self.key(self.other(each, each.match)))
        return short(" ".join(parts))

    def result(self, each: Run) -> dict | None:
        """What is on file of a run, None if nothing is, or something out of date."""
        found = self.read(each) if self.path(each).exists() else {}
        return found if found.get("key") == self.key(each) else None

    def pending(self, seeds: list[int], only: str) -> list[Run]:
        """Runs to be done, in their order: those not on file, and those whose checkpoint one of these starts from."""
        runs = [each for seed in seeds for each in self.runs(seed)]
        missing = {(each.name, each.seed) for each in runs if only in each.name and self.result(each) is None}
        for each in reversed(runs):  # what a run needs stands in front of it
            if (each.name, each.seed) in missing:
                if each.after and not (ROOT / self.checkpoint(self.other(each, each.after))).exists():
                    missing.add((each.after, each.seed))
                if each.match and self.result(self.other(each, each.match)) is None:
                    missing.add((each.match, each.seed))
        return [each for each in runs if (each.name, each.seed) in missing]

    def complete(self) -> list[dict]:
        """The results on file of all seeds that lack none, in the protocol's order. Whatever code they came from."""
        names = (path.stem for path in (self.folder / "results" / self.preset).glob("*.json"))
        found = []
        for seed in sorted({int(name.rpartition(".")[2]) for name in names}):
            runs = self.runs(seed)
            there = [each for each in runs if self.path(each).exists()]
            if all(each.later or each in there for each in runs):
                found += [self.read(each) for each in there]
        return found

    def read(self, each: Run) -> dict:
        """What is on file of a run; the settings are the protocol's of today, and the k that was matched."""
        found = json.loads(self.path(each).read_text())
        return found | {"settings": found["settings"] | each.settings}


def made_model(each: Run) -> Path:
    """The file of a run's initial weights, made if it is not there."""
    for path, command in model_commands(each):
        made(path, command)
    return path


# ----------------------------------------------------------------------------------------------------------------------
# a run


def perform(sweep: Sweep, each: Run) -> dict:
    """Train, and write the result. Raises UserError if the trainer fails otherwise than by a loss that is no number."""
    words, settings = sweep.words(each), dict(each.settings)
    if each.match:
        T, kept = int(each.flag("-t")), sweep.result(sweep.other(each, each.match))["found"]["kept_pairs"]
        mean = sum(kept) / len(kept)
        settings["k"] = min(range(1, T + 1), key=lambda k: abs(kept_pairs(k, T) - mean))
        words = [word.format(k=settings["k"]) for word in words]
    if any(other.after == each.name for other in sweep.runs(each.seed)):
        checkpoint = sweep.checkpoint(each)
        (ROOT / checkpoint).parent.mkdir(parents=True, exist_ok=True)
        words += ["-c", str(checkpoint), "--overwrite", "1"]
    key, version_of_code = sweep.key(each), code(each.trainer, sweep.device)
    environment = {name: value for name, value in os.environ.items() if name not in OVERRIDES}  # they change losses
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *words],
        cwd=ROOT,
        env=environment | {"OPENBLAS_NUM_THREADS": "1"},  # several runs at a time
        stdout=subprocess.PIPE,  # closed if this process is killed, which ends the run
        stderr=subprocess.STDOUT,
        text=True,
    )
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)  # its memory is not told otherwise
    process.returncode = os.waitstatus_to_exitcode(status)
    diverged = DIVERGED.search(printed)
    if process.returncode and not diverged:
        told = printed[printed.find("error: ") :].strip()
        raise UserError(f"{each.name}, seed {each.seed}: python {shlex.join(words)}: {told}")
    result = {
        "experiment": sweep.name,
        "preset": sweep.preset,
        "name": each.name,
        "seed": each.seed,
        "settings": settings,
        "commands": [
            f"python {command}"
            for command in (
                data_command(each.data)[1],
                *([] if each.after else [command for _, command in model_commands(each)]),
                shlex.join(words),
            )
        ],
        "key": key,
        "code": version_of_code,
        "data": {str(path.relative_to(BUILD / "data")): digest(path) for path in data_files(each.data)},
        "versions": versions(),
        **read_output(printed),
        "diverged": int(diverged[1]) if diverged else None,
    }
    result["measured"] |= {"seconds": round(time.perf_counter() - began, 1), "memory_MiB": usage.ru_maxrss >> UNIT}
    write_result(sweep.path(each), result)
    return result


def versions() -> dict[str, str]:
    """On what a run is made."""
    blas, processor = np.show_config(mode="dicts")["Build Dependencies"]["blas"], platform.processor()
    if os.path.exists("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), processor)
    found = {"processor": processor, "python": platform.python_version(), "blas": f"{blas['name']} {blas['version']}"}
    for package in ("numpy", "cupy-cuda12x"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


STEP = re.compile(r"step +\d+/\d+: train loss (\S+) \((\S+) ms, ")
VAL = re.compile(r"val loss (\S+)")
LAYER = re.compile(r"layer \d+: (?:KL (\S+), )?recall@k (\S+), mass@k (\S+), kept (\S+) of (\d+) pairs")
ANSWERS = re.compile(r"answers: accuracy ([\d.]+)(?:, source selected ([\d., ]+))?")
ONCE = {  # name: the line that says it
    "parameters": r"\| num_parameters +\| (\d+)",
    "parameters_in_all": r"\d+ parameters of indexer and controller, (\d+) in all",
    "trained": r"\| trained parameters +\| (\d+)",
    "fc1_kept": r"\| FC1 connections +\| (\d+) /",
    "fc2_kept": r"\| FC2 connections +\| (\d+) /",
    "fc_full": r"\| FC\d connections +\| \d+ / (\d+)",
    "activation_MiB": r"activations: (\d+) MiB predicted",
    "leaked_pairs": r"WARNING: --legacy-leak: QUERIES ATTEND TO (\d+)",
}


def read_output(printed: str) -> dict:
    """The figures of a trainer's output: every loss, and of all else the last that was said."""
    train, val, milliseconds, layers, answers = [], [], [], [], []
    for line in printed.splitlines():
        if match := STEP.match(line):
            train.append(float(match[1]))
            milliseconds.append(float(match[2]))
        elif match := VAL.match(line):
            val.append([len(train), float(match[1])])
            layers = []
        elif match := LAYER.match(line):
            layers.append(match.groups())
        elif match := ANSWERS.match(line):
            answers.append([len(train), float(match[1])])
            source = [float(share) for share in match[2].split(",")] if match[2] else None
    found = {name: int(match[1]) for name, line in ONCE.items() if (match := re.search(line, printed))}
    if layers:
        found["kept_pairs"] = [float(layer[3]) for layer in layers]
        found["causal_pairs"] = int(layers[0][4])
        found["recall"], found["mass"] = ([float(layer[i]) for layer in layers] for i in (1, 2))
        if layers[0][0]:
            found["kl"] = [float(layer[0]) for layer in layers]
    if answers:
        found["answers"], found["source_selected"] = answers, source
    measured = {"ms_per_step": round(median(milliseconds), 3)} if milliseconds else {}
    device = re.findall(r"^device: (.*)", printed, re.MULTILINE)
    return {
        "device": device[-1] if device else "",
        "train_loss": [round(loss, 4) for loss in train],
        "val_loss": val,
        "found": found,
        "measured": measured,
    }


def write_result(path: Path, result: dict) -> None:
    """One line a field, so that a change shows as one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(f" {json.dumps(name)}: {json.dumps(value)}" for name, value in result.items())
    with atomic_write(path) as file:
        file.write(f"{{\n{lines}\n}}\n".encode())


# ----------------------------------------------------------------------------------------------------------------------
# a sweep


def perform_all(todo: list[tuple[Sweep, Run]], jobs: int) -> None:
    """All runs, `jobs` at a time. A run waits for those that it needs, which stand in front of it.

    A run that fails stops only those that need it. Raises UserError in the end if there was one.
    """
    total, done, failed, began = sum(each.tokens for _, each in todo), 0, 0, time.perf_counter()
    futures: dict[tuple, Future] = {}

    def one(sweep: Sweep, each: Run) -> dict:
        for name in (each.after, each.match):
            if future := futures.get((sweep.name, name, each.seed)):
                future.result()
        return perform(sweep, each)

    with ThreadPoolExecutor(jobs) as pool:
        for sweep, each in todo:
            futures[sweep.name, each.name, each.seed] = pool.submit(one, sweep, each)
        try:
            for number, ((sweep, each), future) in enumerate(zip(todo, futures.values()), 1):
                try:
                    ended = outcome(future.result())
                except UserError as error:
                    failed, ended = failed + 1, f"failed: {error}"
                done += each.tokens
                left = (time.perf_counter() - began) * (total - done) / done
                place = f"{number}/{len(todo)}, {100 * done / total:.0f}%, {clock(left)} left"
                print(f"[{place}] {sweep.name} {each.name}, seed {each.seed}: {ended}", flush=True)
        except BaseException:  # those that are under way end, no others begin
            pool.shutdown(cancel_futures=True)
            raise
    if failed:
        raise UserError(f"{failed} of {len(todo)} runs failed, see above", "the same command makes them again")


def outcome(result: dict) -> str:
    """val 2.2062, 46 s"""
    if result["diverged"]:
        return f"diverged at step {result['diverged']}"
    return f"val {result['val_loss'][-1][1]:.4f}, {result['measured']['seconds']:.0f} s"


def clock(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min" if minutes else f"{seconds:.0f} s"
