"""Milliseconds of a training step on a GPU: ours, PyTorch's and llm.c's, one table, written to benchmarks/GPU.md.

    make bench_gpu                                              # all of it: meant for 4 minutes on an H100
    python benchmarks/gpu_step_time.py --sizes 124M --precisions tf32 --profile

Each program is a process of its own that has run a step, and runs one more when told to. They take turns, step by
step; times are medians of 12 steps after 4, from the batch on the host until the GPU is through with AdamW. PyTorch
runs where it is installed and sees the GPU, eager and by torch.compile, in bfloat16 by autocast. With LLMC=FOLDER in
the environment, llm.c's folder, in which train_gpt2fp32cu and train_gpt2cu are built, llm.c runs as well, by itself and
its own clock. Memory is what CuPy's or PyTorch's allocator took, and what llm.c says that it allocates.

All programs of a size hold their memory at once, some 70 GB for 124M. On a smaller card name one of --precisions at a
time; one that ends early is left out, and what it said is above the table. --profile adds tables of kernels.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))  # so that it runs from any folder
if __name__ == "__main__":
    from llmc import startup

    startup.begin()

import datetime
import re
import resource
import subprocess
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import kernels  # before NumPy, as in the trainers  # isort: skip
import kernel_times
import numpy as np
import step_time
import turns

from kernels.cuda.gpt2 import matmul_tensor
from kernels.cuda.runtime.tensor_cores import FAST_TF32
from llmc.checkpoint import BFLOAT16, GPT2Config, Model, write_model
from llmc.cli import ArgumentParser, positive_int
from llmc.dataloader import write_tokens
from llmc.errors import UserError, run
from llmc.init import gpt2_init
from llmc.mfu import card_name

PAGE = turns.RESULTS.with_name("GPU.md")
WARM_UP, STEPS = 4, 12
K, DEPTH, BANDWIDTH = 256, 2, 256
PROGRAMS = {
    "dense": "ours, dense",
    "own": "ours, dense, its products by 3xTF32",
    "both256": "ours, FC1 and FC2 banded, w = 256",
    "toroidal": "ours, toroidal, all layers, depth 2",
    "sparse": "ours, indexer, k = 256",
    "shared": "ours, indexer, k = 256, one list for 64 queries",
    "recency": "ours, recency, k = 256",
    "torch": "PyTorch eager",
    "compiled": "PyTorch compiled",
    "llmc": "llm.c",
}
PRECISIONS = {"float32": "float32", "tf32": "TF32", "bfloat16": "bfloat16"}
THEIRS = ("torch", "compiled", "llmc")  # what has bfloat16


class Size(NamedTuple):
    config: GPT2Config
    B: int
    T: int
    ours: tuple[str, ...]

    def __str__(self):
        return f"C={self.config.C} L={self.config.L} B={self.B} T={self.T}"


SIZES = {
    "124M": Size(GPT2Config(), 4, 1024, ("dense", "own", "both256", "toroidal")),
    "tiny": Size(step_time.SIZES["tiny"].config, 4, 64, ("dense", "both256", "toroidal")),
    "long": Size(GPT2Config(maxT=4096, L=4), 1, 4096, ("dense", "sparse", "shared", "recency")),
}
PROFILED = {"124M": ("dense", "both256", "toroidal"), "tiny": ("dense",), "long": ("dense", "sparse", "shared")}


# ----------------------------------------------------------------------------------------------------------------------
# programs


def our_model(program: str, size: Size, device):
    """A trainer's model, and its backward and update as functions of t."""
    config, B, T, _ = size
    params = gpt2_init(config, 1)
    if program in ("sparse", "shared", "recency"):
        from systems.sparsity import Sparsity, extra_init
        from train_sparse_attn import GPT2

        learns, k = program != "recency", min(K, T)
        selector, indexer = ("indexer", "lightning") if learns else ("recency", "none")
        share = k // 4 if program == "shared" else 1
        sparsity = Sparsity((k,) * config.L, selector=selector, indexer=indexer, share=share)
        params = np.concatenate([params, extra_init(Model(config, params), sparsity, "", 1)])
        model = GPT2(device, config, sparsity, params, B, T)
        return model, lambda: model.backward(indexer=learns), lambda t: model.update(t, 1e-4, learns * t, 2e-3)
    if program == "toroidal":
        from systems.torus import Torus, extra_init
        from train_toroidal import GPT2

        torus = Torus(tuple(range(config.L)), depth=DEPTH)
        params = np.concatenate([params, extra_init(Model(config, params), torus, 1)])
        model = GPT2(device, config, torus, params, B, T)
    else:
        from systems.band import NO_BAND, Band
        from train_banded import GPT2

        model = GPT2(
            device, config, params, B, T, NO_BAND if program in ("dense", "own") else Band(BANDWIDTH, BANDWIDTH)
        )
        model.mask_weights()
    return model, model.backward, lambda t: model.update(t, 1e-4)


def our_step(program: str, size: Size, device) -> Callable:
    """A step as the trainers make it; pause() is called where it has waited for the GPU."""
    model, backward, update = our_model(program, size, device)

    def step(t: int, inputs: np.ndarray, targets: np.ndarray, pause: Callable = lambda: None) -> float:
        pause()
        model.forward(inputs, targets)
        backward()
        loss = model.mean_loss()
        pause()
        update(t)
        device.synchronize()
        return loss

    return step


def opened(program: str, size: Size, precision: str, device: str) -> tuple[Callable, Callable]:
    """(a program's step, the MiB that it has taken): on the CPU of the whole process."""
    if program in THEIRS:
        import torch

        torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        config, B, T, _ = size
        step = step_time.torch_step(config, B, T, device, program == "compiled", precision == "bfloat16")
        taken = torch.cuda.max_memory_reserved
    else:
        if program == "own":  # what has to be known before a card belongs into that set
            matmul_tensor.FASTER_THAN_CUBLAS = frozenset(FAST_TF32)
        step = our_step(program, size, kernels.open_device(device, precision == "tf32"))
        if device == "cuda":
            import cupy

            taken = cupy.get_default_memory_pool().total_bytes
    if device == "cpu":
        return step, lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    return step, lambda: taken() >> 20


def batches(size: Size):
    """Token ids drawn at random, the same for all programs."""
    drawn = np.random.default_rng(2)
    while True:
        yield drawn.integers(0, size.config.V, (2, size.B, size.T)).astype(np.int32)


def work(program: str, size: Size, precision: str, device: str) -> None:
    """A worker: one step at once, one for each line on stdin; prints milliseconds, the first step's loss, and MiB."""
    answers, sys.stdout = sys.stdout, open(os.devnull, "w")  # the model reports what it allocates
    step, taken = opened(program, size, precision, device)
    tokens = batches(size)
    first = step(1, *next(tokens))
    for t, _ in enumerate(sys.stdin, 2):
        inputs, targets = next(tokens)
        started = time.perf_counter()
        step(t, inputs, targets)
        elapsed = time.perf_counter() - started
        print(elapsed * 1e3, first, taken(), file=answers, flush=True)


class Figure(NamedTuple):
    """Of a program: median milliseconds of a step, MiB, loss of the first step, NaN if it does not say."""

    ms: float
    mib: float
    loss: float = np.nan


def compare(name: str, pairs: list[tuple[str, str]], steps: int, device: str) -> dict[tuple[str, str], Figure]:
    """What each (program, precision) of a size took, all taking turns; one that ends early is left out."""
    options = ["--sizes", name, "--device", device]
    workers = {pair: turns.start(__file__, "--worker", pair[0], "--precisions", pair[1], *options) for pair in pairs}
    answers = {pair: [] for pair in pairs}
    for _ in range(WARM_UP + steps):
        for pair, worker in list(workers.items()):
            try:
                answers[pair].append(turns.turn(worker))
            except UserError:
                print(f"{name}, {PROGRAMS[pair[0]]}, {pair[1]}: ended early, see above", file=sys.stderr)
                turns.stop([workers.pop(pair)])
    turns.stop(workers.values())
    return {pair: figure_of(answers[pair]) for pair in workers}


def figure_of(rows: list[list[float]]) -> Figure:
    return Figure(float(np.median([ms for ms, _, _ in rows[WARM_UP:]])), rows[-1][2], rows[0][1])


# ----------------------------------------------------------------------------------------------------------------------
# llm.c

LLMC_STEP = re.compile(r"^step +\d+/\d+(?:: train loss .*?\(| \|.*\| )([\d.]+) ms", re.MULTILINE)


def llmc_command(folder: Path, size: Size, precision: str) -> list[str]:
    """train_gpt2_fp32.cu's or train_gpt2.cu's command line, on the files that run_llmc writes."""
    files = ["-i", "train.bin", "-j", "val.bin", "-b", size.B, "-t", size.T, "-l", "1e-4"]
    seldom = ["-v", 1_000_000, "-m", 1, "-s", 1_000_000, "-g", 4]  # 0 would divide by zero
    if precision == "bfloat16":
        words = [folder / "train_gpt2cu", "-e", "gpt2_124M_bf16.bin", *files, *seldom, "-d", size.B * size.T]
    else:
        words = [folder / "train_gpt2fp32cu", *files, *seldom]
    return [str(word) for word in words]


def run_llmc(folder: Path, size: Size, precision: str, steps: int) -> Figure | None:
    """What llm.c took, run by itself on a random model and random tokens; None, and why on stderr, if it did not run.

    TF32 is what train_gpt2_fp32.cu takes where there is any; NVIDIA_TF32_OVERRIDE=0 tells cuBLAS not to.
    """
    command = llmc_command(folder, size, precision)
    if not os.access(command[0], os.X_OK):
        print(f"{command[0]} is not there: no row of it (make {Path(command[0]).name} in {folder})", file=sys.stderr)
        return None
    environment = os.environ | ({"NVIDIA_TF32_OVERRIDE": "0"} if precision == "float32" else {})
    with tempfile.TemporaryDirectory() as place:
        model = Model(size.config, gpt2_init(size.config, 1))
        write_model(f"{place}/gpt2_124M.bin", model)
        if precision == "bfloat16":
            model.version = BFLOAT16
            write_model(f"{place}/gpt2_124M_bf16.bin", model)
        batch = size.B * size.T
        for name, count in (("train", (WARM_UP + steps) * batch + 1), ("val", 2 * batch + 1)):
            tokens = np.random.default_rng(2).integers(0, size.config.V, count)
            write_tokens(f"{place}/{name}.bin", tokens.astype(np.uint16))
        done = subprocess.run(
            command, cwd=place, env=environment, capture_output=True, text=True, errors="replace", check=False
        )
    ms = [float(each) for each in LLMC_STEP.findall(done.stdout)][WARM_UP:]
    if done.returncode or not ms:
        said = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["nothing"]
        print(f"{command[0]} ended with {done.returncode} and said: {said[0]}", file=sys.stderr)
        return None
    return Figure(float(np.median(ms)), sum(map(int, re.findall(r"allocated (\d+) MiB", done.stdout))))


# ----------------------------------------------------------------------------------------------------------------------
# tables


def table(figures: dict[str, dict[tuple[str, str], Figure]], precisions: list[str]) -> str:
    """Markdown, a row for each program of each size: milliseconds and MiB in each precision."""
    heads = [f"{PRECISIONS[precision]}, ms | MiB" for precision in precisions]
    lines = [f"| size | program | {' | '.join(heads)} |", f"|---|---|{'---:|' * 2 * len(precisions)}"]
    for name, of_size in figures.items():
        for program, shown in PROGRAMS.items():
            row = [of_size.get((program, precision)) for precision in precisions]
            if any(row):
                cells = "".join(f" {each.ms:.2f} | {each.mib:.0f} |" if each else " | |" for each in row)
                lines.append(f"| {SIZES[name]} | {shown} |{cells}")
    return "\n".join(lines)


def losses_apart(of_size: dict[tuple[str, str], Figure]) -> str:
    """How far the first losses of the programs that compute the same are apart, which tells a wrong one."""
    dense = ("dense", "own", "torch", "compiled")
    same = [figure.loss for pair, figure in of_size.items() if pair[0] in dense and pair[1] != "bfloat16"]
    return f"{max(same) - min(same):.1e}" if same else "none"


def versions(name: str) -> str:
    """The card, its driver, CUDA, CuPy and PyTorch."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = "unknown"
    import cupy

    cuda = cupy.cuda.runtime.runtimeGetVersion()
    torch = torch_version() or "no PyTorch"
    return f"{name}, driver {driver}, CUDA {cuda // 1000}.{cuda % 1000 // 10}, CuPy {cupy.__version__}, {torch}"


def torch_version() -> str:
    """PyTorch and its CUDA; "" if it is not installed or sees no GPU. A process finds out, and lets go of the GPU."""
    if not find_spec("torch"):
        return ""
    code = (
        "import torch; print('PyTorch', torch.__version__, 'for CUDA', torch.version.cuda, torch.cuda.is_available())"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False).stdout.strip()
    return said.removesuffix(" True") if said.endswith(" True") else ""


def profiles(name: str, precision: str, card: str) -> list[str]:
    """Tables of the kernels of our programs of a size."""
    from kernels.cuda import device as device_of
    from kernels.cuda.runtime.runtime import Runtime

    size, texts = SIZES[name], []
    for program in PROFILED[name]:
        runtime = Runtime(precision == "tf32")
        step, tokens, at = our_step(program, size, device_of(runtime)), batches(size), iter(range(1, 1000))
        spent = kernel_times.measure(runtime, lambda pause: step(next(at), *next(tokens), pause))  # noqa: B023
        width = BANDWIDTH if program == "both256" else 0
        names = kernel_times.names_of(size.config, size.B, size.T, min(K, size.T), DEPTH, width)
        rows = kernel_times.table(spent, names, card, runtime.tf32)
        texts.append(f"{size}, {PROGRAMS[program]}, {PRECISIONS[precision]}:\n\n{rows}")
    return texts


# ----------------------------------------------------------------------------------------------------------------------


def precisions_of(program: str) -> tuple[str, ...]:
    """In which a program can be timed."""
    if program == "own":
        return ("float32",)
    return tuple(PRECISIONS) if program in THEIRS else ("float32", "tf32")


def chosen(flag: str, text: str, known) -> list[str]:
    """The words of a flag's list. Raises UserError for one that is not known."""
    words = text.split(",")
    unknown = set(words) - set(known)
    if unknown:
        raise UserError(f"{flag} {', '.join(sorted(unknown))}: expected some of {','.join(known)}", None, 2)
    return words


def main() -> int:
    parser = ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--sizes", default=",".join(SIZES), help="which models")
    add("--precisions", default=",".join(PRECISIONS), help="in which precisions; ours have no bfloat16")
    add("--steps", type=positive_int, default=STEPS, help="steps to time")
    add("--profile", action="store_true", help="tables of our kernels: time, share, launches, the roofline's bound")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try the script; nothing is written")
    add("--worker", choices=tuple(PROGRAMS), help="used by the program itself")
    args = parser.parse()
    names, precisions = chosen("--sizes", args.sizes, SIZES), chosen("--precisions", args.precisions, PRECISIONS)
    if args.worker:
        work(args.worker, SIZES[names[0]], precisions[0], args.device)
        return 0
    on_gpu = args.device == "cuda"
    card = card_name((turns.open_gpu() if on_gpu else kernels.open_device("cpu")).describe())
    title = versions(card) if on_gpu else card
    print(title, flush=True)
    theirs = ["torch", "compiled"] if (torch_version() if on_gpu else find_spec("torch")) else []
    if not theirs:
        print("PyTorch is not installed, or sees no GPU: no rows of it", file=sys.stderr)
    llmc = Path(os.environ["LLMC"]).resolve() if on_gpu and os.environ.get("LLMC") else None
    figures = {}
    for name in names:
        programs = [*SIZES[name].ours, *theirs]
        wanted = [(program, each) for each in precisions for program in programs]
        pairs = [pair for pair in wanted if pair[1] in precisions_of(pair[0])]
        figures[name] = compare(name, pairs, args.steps, args.device)
        for precision in precisions if llmc else ():
            figure = run_llmc(llmc, SIZES[name], precision, args.steps)
            figures[name] |= {("llmc", precision): figure} if figure else {}
        print(f"{SIZES[name]}: first losses of the dense programs within {losses_apart(figures[name])}", flush=True)
    text = table(figures, precisions)
    print(f"\n{text}", flush=True)
    if args.profile and on_gpu:
        for name in names:
            for precision in precisions:
                for part in profiles(name, precision, card) if precision != "bfloat16" else ():
                    print(f"\n{part}", flush=True)
                    text += f"\n\n{part}"
    if on_gpu and (names, precisions, args.steps) == ([*SIZES], [*PRECISIONS], STEPS):
        today = datetime.date.today().isoformat()
        how = f"Medians of {STEPS} steps after {WARM_UP}, the programs of a size taking turns, llm.c alone."
        turns.write_section(f"{card}, {today}: make bench_gpu", f"{title}, {today}. {how}\n\n{text}", PAGE)
    return 0


if __name__ == "__main__":
    run(main)
