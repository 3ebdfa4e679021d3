"""Milliseconds of a training step, ours and PyTorch's, the same GPT-2 on the same tokens.

    python benchmarks/step_time.py                          # both sizes; PyTorch if it is installed
    python benchmarks/step_time.py --sizes 124M --steps 5

Each program is a process of its own that runs one step when told to. They take turns, step by step, so that whatever
else the machine does meets all of them alike; medians are of the steps after the first three. A step is forward,
backward and AdamW in float32. The last row is what no dense step on NumPy can beat: its BLAS on nothing but the
products of the fully connected layers. OPENBLAS_CORETYPE and OPENBLAS_L2_SIZE are unset for all: they override what
OpenBLAS finds out about the processor. Peak memory is the operating system's figure for the whole process.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))  # so that it runs from any folder
if __name__ == "__main__":
    from llmc import startup

    startup.begin()

import resource
import time
from importlib.util import find_spec

import kernels  # before NumPy, as in the trainers  # isort: skip
import numpy as np
import turns

from llmc.checkpoint import GPT2Config, named_views, tensor_shapes
from llmc.cli import ArgumentParser, natural, positive_int
from llmc.errors import UserError, run
from llmc.init import gpt2_init

SIZES = {"tiny": GPT2Config(maxT=256, L=4, NH=4, C=128), "124M": GPT2Config()}
STEPS = {"tiny": 40, "124M": 12}
PROGRAMS = {
    "torch": "PyTorch eager",
    "dense": "ours, dense",
    "w256": "ours, FC1 band 256",
    "both256": "ours, both 256",
    "products": "products of dense",
}
WARM_UP = 3


def our_step(config: GPT2Config, B: int, T: int, bands: tuple[int, int]):
    """A function that runs one step of train_banded.py on a batch and returns the loss."""
    from systems.band import Band
    from train_banded import GPT2

    model = GPT2(kernels.open_device("cpu"), config, gpt2_init(config, 1), B, T, Band(*bands))
    model.mask_weights()

    def step(t: int, inputs: np.ndarray, targets: np.ndarray) -> float:
        model.forward(inputs, targets)
        loss = model.mean_loss()
        model.backward()
        model.update(t, 1e-4)
        return loss

    return step


def torch_step(config: GPT2Config, B: int, T: int, device: str = "cpu", compiled=False, bfloat16=False):
    """The same in PyTorch as one writes it today: scaled_dot_product_attention, cross_entropy, fused AdamW.

    compiled: by torch.compile; bfloat16: under autocast, which keeps parameters and AdamW in float32.
    """
    import torch
    import torch.nn.functional as F

    C, NH = config.C, config.NH
    tensors = named_views(gpt2_init(config, 1), tensor_shapes(config))
    p = {name: torch.nn.Parameter(torch.tensor(tensor, device=device)) for name, tensor in tensors.items()}
    p["wte"] = torch.nn.Parameter(p["wte"].detach()[: config.V].clone())
    for name in set(p) - {"wte", "wpe", "lnfw", "lnfb"}:  # a parameter for each layer, as modules have them
        p[name] = [torch.nn.Parameter(layer.detach().clone()) for layer in p[name]]
    leaves = [leaf for value in p.values() for leaf in (value if isinstance(value, list) else [value])]
    optimizer = torch.optim.AdamW(leaves, lr=1e-4, betas=(0.9, 0.999), weight_decay=0.0, fused=True)

    def forward(inputs, targets):
        x = p["wte"][inputs] + p["wpe"][:T]
        for l in range(config.L):
            h = F.layer_norm(x, (C,), p["ln1w"][l], p["ln1b"][l])
            q, k, v = F.linear(h, p["qkvw"][l], p["qkvb"][l]).view(B, T, 3, NH, C // NH).permute(2, 0, 3, 1, 4)
            h = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, C)
            x = x + F.linear(h, p["attprojw"][l], p["attprojb"][l])
            h = F.layer_norm(x, (C,), p["ln2w"][l], p["ln2b"][l])
            h = F.gelu(F.linear(h, p["fcw"][l], p["fcb"][l]), approximate="tanh")
            x = x + F.linear(h, p["fcprojw"][l], p["fcprojb"][l])
        logits = F.linear(F.layer_norm(x, (C,), p["lnfw"], p["lnfb"]), p["wte"])
        return F.cross_entropy(logits.view(B * T, -1), targets.reshape(-1))

    forward = torch.compile(forward) if compiled else forward

    def step(t: int, inputs: np.ndarray, targets: np.ndarray) -> float:
        tokens, labels = (torch.from_numpy(values).long().to(device) for values in (inputs, targets))
        with torch.autocast(device, torch.bfloat16, enabled=bfloat16):
            loss = forward(tokens, labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()
        return loss.item()

    return step


def products_step(config: GPT2Config, B: int, T: int):
    """The products of the fully connected layers alone, on numbers drawn once: forward, then both gradients."""
    shapes = tensor_shapes(config)
    tensors, grads = (named_views(flat, shapes) for flat in (gpt2_init(config, 1), gpt2_init(config, 2)))
    layers = [(name, l) for l in range(config.L) for name in ("qkvw", "attprojw", "fcw", "fcprojw")]
    pairs = [(tensors[name][l], grads[name][l]) for name, l in layers] + [(tensors["wte"], grads["wte"])]
    widths = {size for weight, _ in pairs for size in weight.shape}
    rng = np.random.default_rng(1)
    rows = {size: rng.standard_normal((B * T, size), np.float32) for size in widths}
    out = {size: np.empty_like(x) for size, x in rows.items()}

    def step(t: int, inputs: np.ndarray, targets: np.ndarray) -> float:
        for weight, _ in pairs:
            OC, C = weight.shape
            np.matmul(rows[C], weight.T, out=out[OC])
        for weight, grad in reversed(pairs):
            OC, C = weight.shape
            np.matmul(rows[OC], weight, out=out[C])
            np.matmul(rows[OC].T, rows[C], out=grad)
        return np.nan

    return step


def work(program: str, size: str, B: int, T: int) -> None:
    """A worker: one step for each line on stdin; prints its milliseconds, the loss and the peak memory in MiB."""
    config = SIZES[size]
    bands = {"dense": (0, 0), "w256": (256, 0), "both256": (256, 256)}
    others = {"torch": torch_step, "products": products_step}
    step = others[program](config, B, T) if program in others else our_step(config, B, T, bands[program])
    answers, sys.stdout = sys.stdout, open(os.devnull, "w")  # the model reports what it allocates
    tokens = np.random.default_rng(2)
    for t, _ in enumerate(sys.stdin, 1):
        inputs, targets = tokens.integers(0, config.V, (2, B, T)).astype(np.int32)
        started = time.perf_counter()
        loss = step(t, inputs, targets)
        elapsed = time.perf_counter() - started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        print(elapsed * 1e3, loss, peak, file=answers, flush=True)


def compare(size: str, programs: list[str], steps: int, B: int, T: int) -> str:
    """Print, and return, a row for each program: median ms, ratio to PyTorch's, first loss, peak memory."""
    config = SIZES[size]
    lines = [f"{size}: C={config.C} L={config.L} V={config.V} B={B} T={T}, float32, medians of {steps} steps"]
    options = ["--sizes", size, "-b", B, "-t", T]
    workers = {program: turns.start(__file__, "--worker", program, *options) for program in programs}
    answers = {program: [] for program in programs}
    for _ in range(WARM_UP + steps):
        for program, worker in workers.items():
            answers[program].append(turns.turn(worker))
    turns.stop(workers.values())
    median = {program: np.median([ms for ms, _, _ in rows[WARM_UP:]]) for program, rows in answers.items()}
    for program, rows in answers.items():
        ratio = f"{median['torch'] / median[program]:5.2f} x" if "torch" in median else "      -"
        fastest = min(ms for ms, _, _ in rows[WARM_UP:])
        row = f"  {PROGRAMS[program]:<20} {median[program]:8.1f} ms (fastest {fastest:8.1f})  {ratio}"
        if program != "products":
            row += f"  first loss {rows[0][1]:.5f}  peak {rows[-1][2]:.0f} MiB"
        lines.append(row)
    print("\n".join(lines), flush=True)
    return "\n".join(lines)


def main() -> int:
    parser = ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--sizes", default="tiny,124M", help="which models, of tiny and 124M")
    add("--steps", type=natural, default=0, help="steps to time, 0: 40 of tiny, 12 of 124M")
    add("-b", "--batch-size", type=positive_int, default=4, help="rows B")
    add("-t", "--seq-len", type=positive_int, default=64, help="tokens T of a row")
    add("--worker", choices=tuple(PROGRAMS), help="used by the program itself")
    args = parser.parse()
    B, T = args.batch_size, args.seq_len
    unknown = set(args.sizes.split(",")) - set(SIZES)
    if unknown:
        raise UserError(f"--sizes {', '.join(sorted(unknown))}: expected tiny, 124M or tiny,124M", None, 2)
    if args.worker:
        work(args.worker, args.sizes, B, T)
        return 0
    programs = [program for program in PROGRAMS if program != "torch" or find_spec("torch")]
    if "torch" not in programs:
        print("PyTorch is not installed: our figures alone (pip install torch)")
    tables = [compare(size, programs, args.steps or STEPS[size], B, T) for size in args.sizes.split(",")]
    if args.sizes == ",".join(SIZES):
        block = "\n".join(tables)
        turns.write_section(f"training steps, B={B} T={T}: make bench", f"{turns.machine()}.\n\n```\n{block}\n```")
    return 0


if __name__ == "__main__":
    run(main)
