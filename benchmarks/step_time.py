"""Milliseconds of a training step, ours and PyTorch's, the same GPT-2 on the same tokens.

    python benchmarks/step_time.py                          # all sizes; PyTorch if it is installed
    python benchmarks/step_time.py --sizes 124M --steps 10
    python benchmarks/step_time.py --sizes chars128 --ops 1 # where a step's time goes, op by op

Each program is a process of its own that runs one step when told to. They take turns, step by step, so that whatever
else the machine does meets all of them alike; medians are of the steps after the first three, ratios are the medians of
those of five turns, with the lowest and the highest. A step is forward, backward and AdamW in float32. The products'
rows are what no dense step on NumPy can beat: its BLAS on nothing but the products of the fully connected layers.
OPENBLAS_CORETYPE and OPENBLAS_L2_SIZE are unset for all: they override what OpenBLAS finds out about the processor.
Peak memory is the operating system's figure, of all processes of a program.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))  # so that it runs from any folder
if __name__ == "__main__":
    from llmc import startup

    startup.begin()

import resource
import time
from collections import defaultdict
from importlib.util import find_spec
from types import SimpleNamespace
from typing import NamedTuple

from kernels import cpu  # before NumPy, as in the trainers  # isort: skip
import numpy as np
import turns

from kernels.device import ops_on_shelves
from kernels.shares import Shares, share_rows
from llmc.checkpoint import GPT2Config, Model, named_views, tensor_shapes
from llmc.cli import ArgumentParser, flag01, natural
from llmc.errors import UserError, run
from llmc.init import gpt2_init
from systems.band import Band
from systems.sparsity import Sparsity
from systems.torus import Torus, extra_init

PROGRAMS = {
    "torch": "PyTorch eager",
    "compiled": "torch.compile",
    "dense": "ours, dense",
    "w256": "ours, FC1 band 256",
    "both256": "ours, both 256",
    "torch_window": "PyTorch, mask",
    "window": "ours, window of 32",
    "torch_torus": "PyTorch, the same",
    "torus": "ours, toroidal",
    "products": "products of dense",
    "products1": "products, 1 thread",
}
PEERS = ("torch", "torch_window", "torch_torus")  # what a ratio is to: the first of a size's programs
BANDED = ("torch", "dense", "w256", "both256", "products")
DENSE = ("torch", "compiled", "dense", "products", "products1")


class Size(NamedTuple):
    """A model, its batch, how many steps are timed, and of which programs."""

    config: GPT2Config
    B: int
    T: int
    steps: int
    programs: tuple[str, ...]


SMALL = dict(V=65, Vp=128, L=4, NH=4, C=128)  # 65 characters, as in Shakespeare's plays
SIZES = {
    "chars64": Size(GPT2Config(maxT=64, **SMALL), 12, 64, 40, DENSE),
    "chars128": Size(GPT2Config(maxT=128, **SMALL), 8, 128, 40, DENSE),
    "chars256": Size(GPT2Config(maxT=256, V=65, Vp=128, L=6, NH=6, C=384), 4, 256, 15, DENSE),
    "window": Size(GPT2Config(maxT=128, **SMALL), 8, 128, 40, ("torch_window", "window")),
    "torus": Size(GPT2Config(maxT=128, **SMALL), 8, 128, 40, ("torch_torus", "torus")),
    "tiny": Size(GPT2Config(maxT=256, L=4, NH=4, C=128), 4, 64, 40, BANDED),
    "124M": Size(GPT2Config(), 4, 64, 15, BANDED),
    "124M-long": Size(GPT2Config(), 1, 1024, 5, BANDED),
}
WINDOW, DEPTH = 32, 2  # keys of a query; platters of a head
WARM_UP, TURNS = 3, 5


def peak() -> int:
    """The most memory that this process has had, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def peak_of_share(shares: Shares, k: int) -> int:
    return peak()


def our_models(program: str, config: GPT2Config, B: int, T: int, device) -> Shares:
    """The batch of the trainer that a program is, as its main makes it."""
    import train_banded
    import train_sparse_attn
    import train_toroidal

    params = gpt2_init(config, 1)
    rows = share_rows(cpu, B, T, config.C, params.size)
    if program == "window":
        sparsity = Sparsity((WINDOW,) * config.L, selector="recency")
        return Shares(device, rows, lambda device, B: train_sparse_attn.GPT2(device, config, sparsity, params, B, T))
    if program == "torus":
        torus = Torus(tuple(range(config.L)), depth=DEPTH, period=T, fusion="identity")
        params = np.concatenate([params, extra_init(Model(config, params), torus, 1)])
        return Shares(device, rows, lambda device, B: train_toroidal.GPT2(device, config, torus, params, B, T))
    bands = Band(*{"dense": (0, 0), "w256": (256, 0), "both256": (256, 256)}[program])
    batch = Shares(device, rows, lambda device, B: train_banded.GPT2(device, config, params, B, T, bands))
    for model in batch.models:
        model.mask_weights()
    return batch


def our_step(program: str, config: GPT2Config, B: int, T: int, device=cpu):
    """Functions: one step of a trainer on a batch, which returns the loss; its peak memory, of all processes."""
    batch = our_models(program, config, B, T, device)

    def step(t: int, inputs: np.ndarray, targets: np.ndarray) -> float:
        batch.forward(inputs, targets)
        loss = batch.mean_loss()
        batch.backward()
        if program == "window":
            batch.models[0].update(t, 1e-4, 0, 0.0)
        else:
            batch.models[0].update(t, 1e-4)
        return loss

    return step, lambda: sum(batch.each(*len(batch.models) * [peak_of_share]))


def op_times(size: str, B: int, T: int, steps: int) -> str:
    """A table of the ops of a dense step: milliseconds, of a batch in shares those of the first."""
    config, spent = SIZES[size].config, defaultdict(float)

    def timed(name, op):
        def call(*arguments, **named):
            began = time.perf_counter()
            op(*arguments, **named)
            spent[name] += time.perf_counter() - began

        return call

    ops = {name: timed(name, op) for name, op in ops_on_shelves("cpu").items() if name != "global_norm"}
    device = SimpleNamespace(**{name: getattr(cpu, name) for name in cpu.__all__} | ops)
    step, _ = our_step("dense", config, B, T, device)
    tokens, whole = np.random.default_rng(2), []
    for t in range(1, WARM_UP + steps + 1):
        if t == WARM_UP + 1:
            spent.clear()
        inputs, targets = tokens.integers(0, config.V, (2, B, T)).astype(np.int32)
        began = time.perf_counter()
        step(t, inputs, targets)
        whole.append(time.perf_counter() - began)
    total = np.mean(whole[WARM_UP:])
    rows = [
        f"{name:<28} {1e3 * seconds / steps:8.2f} ms {100 * seconds / steps / total:5.1f}%"
        for name, seconds in sorted(spent.items(), key=lambda item: -item[1])
    ]
    shares = len(share_rows(cpu, B, T, config.C, gpt2_init(config, 1).size))
    return "\n".join(
        [f"{size}: {1e3 * total:.1f} ms a step in {shares} shares, of which the first one spends in", *rows]
    )


def causal_attention(q, k, v):
    """q, k, v (B,NH,T,hs), causal, PyTorch's own."""
    import torch.nn.functional as F

    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def window_attention(T: int):
    """Each query's last WINDOW keys, by a mask."""
    import torch
    import torch.nn.functional as F

    lag = torch.arange(T)[:, None] - torch.arange(T)
    mask = (lag >= 0) & (lag < WINDOW)
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def torus_attention(T: int):
    """What train_toroidal.py computes with --fusion identity --rope none --lambda 1 on a ring of T: T D sub-tokens."""
    import torch
    import torch.nn.functional as F

    token, depth = (x.reshape(-1) for x in torch.meshgrid(torch.arange(T), torch.arange(DEPTH), indexing="ij"))
    lag = token[:, None] - token
    bias = -torch.minimum(lag % T, -lag % T) / T - (depth[:, None] - depth).abs() / DEPTH
    bias[lag < 0] = -torch.inf

    def attend(q, k, v):
        B, NH, _, hs = q.shape
        q, k, v = (x.reshape(B, NH, T * DEPTH, hs // DEPTH) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).reshape(B, NH, T, hs)

    return attend


def torch_step(
    config: GPT2Config, B: int, T: int, device: str = "cpu", compiled=False, bfloat16=False, attend=causal_attention
):
    """The same in PyTorch as one writes it today: scaled_dot_product_attention, cross_entropy, fused AdamW.

    compiled: by torch.compile; bfloat16: under autocast, which keeps parameters and AdamW in float32; attend: of a
    layer's q, k, v.
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
            h = attend(q, k, v).transpose(1, 2).reshape(B, T, C)
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


def step_of(program: str, config: GPT2Config, B: int, T: int):
    """The function that is timed, and one that tells its peak memory."""
    if program.startswith("products"):
        return products_step(config, B, T), peak
    if program == "compiled":
        return torch_step(config, B, T, compiled=True), peak
    if program in PEERS:
        own = dict(torch_window=window_attention, torch_torus=torus_attention)
        return torch_step(config, B, T, attend=own[program](T) if program in own else causal_attention), peak
    return our_step(program, config, B, T)


def work(program: str, size: str, B: int, T: int) -> None:
    """A worker: one step for each line on stdin; prints its milliseconds, the loss and the peak memory in MiB."""
    config = SIZES[size].config
    answers, sys.stdout = sys.stdout, open(os.devnull, "w")  # the model reports what it allocates
    (step, memory), tokens = step_of(program, config, B, T), np.random.default_rng(2)
    for t, _ in enumerate(sys.stdin, 1):
        inputs, targets = tokens.integers(0, config.V, (2, B, T)).astype(np.int32)
        started = time.perf_counter()
        loss = step(t, inputs, targets)
        elapsed = time.perf_counter() - started
        print(elapsed * 1e3, loss, memory(), file=answers, flush=True)


def compare(size: str, programs: list[str], steps: int, B: int, T: int) -> str:
    """Print, and return, a row for each program: median ms, ratio to PyTorch's, first loss, peak memory."""
    config = SIZES[size].config
    lines = [f"{size}: C={config.C} L={config.L} V={config.V} B={B} T={T}, float32, medians of {steps} steps"]
    options = ["--sizes", size, "-b", B, "-t", T]
    threads = {"products1": 1}
    workers = {
        program: turns.start(__file__, "--worker", program, *options, threads=threads.get(program))
        for program in programs
    }
    answers = {program: [] for program in programs}
    for _ in range(WARM_UP + steps):
        for program, worker in workers.items():
            answers[program].append(turns.turn(worker))
    turns.stop(workers.values())
    times = {program: np.array([ms for ms, _, _ in rows[WARM_UP:]]) for program, rows in answers.items()}
    peer = next((program for program in programs if program in PEERS), None)
    for program, rows in answers.items():
        ratio = "      -"
        if peer:  # of each turn, several steps
            pairs = zip(*(np.array_split(times[each], min(TURNS, steps)) for each in (peer, program)))
            ratios = [np.median(theirs) / np.median(ours) for theirs, ours in pairs]
            ratio = f"{np.median(ratios):5.2f} x ({min(ratios):.2f} .. {max(ratios):.2f})"
        own = times[program]
        row = f"  {PROGRAMS[program]:<20} {np.median(own):8.1f} ms (fastest {min(own):8.1f})  {ratio}"
        if not program.startswith("products"):
            row += f"  first loss {rows[0][1]:.5f}  peak {rows[-1][2]:.0f} MiB"
        lines.append(row)
    print("\n".join(lines), flush=True)
    return "\n".join(lines)


def main() -> int:
    parser = ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--sizes", default=",".join(SIZES), help="which models")
    add("--steps", type=natural, default=0, help="steps to time, 0: as many as each size says")
    add("-b", "--batch-size", type=natural, default=0, help="rows B, 0: as each size says")
    add("-t", "--seq-len", type=natural, default=0, help="tokens T of a row, 0: as each size says")
    add("--ops", type=flag01, default=False, help="1: where the time of a dense step goes, instead")
    add("--worker", choices=tuple(PROGRAMS), help="used by the program itself")
    args = parser.parse()
    sizes = args.sizes.split(",")
    unknown = set(sizes) - set(SIZES)
    if unknown:
        raise UserError(f"--sizes {', '.join(sorted(unknown))}: expected some of {','.join(SIZES)}", None, 2)
    batches = {size: (args.batch_size or SIZES[size].B, args.seq_len or SIZES[size].T) for size in sizes}
    if args.worker:
        work(args.worker, sizes[0], *batches[sizes[0]])
        return 0
    if args.ops:
        with open(os.devnull, "w") as nowhere:
            answers, sys.stdout = sys.stdout, nowhere
            tables = [op_times(size, *batches[size], args.steps or SIZES[size].steps) for size in sizes]
            sys.stdout = answers
        print("\n\n".join(tables))
        return 0
    has_torch = find_spec("torch")
    if not has_torch:
        print("PyTorch is not installed: our figures alone (pip install torch)")
    tables = []
    for size in sizes:
        programs = [each for each in SIZES[size].programs if has_torch or each not in (*PEERS, "compiled")]
        tables.append(compare(size, programs, args.steps or SIZES[size].steps, *batches[size]))
    if args.sizes == ",".join(SIZES) and not (args.steps or args.batch_size or args.seq_len):
        block = "\n".join(tables)
        turns.write_section("training steps: make bench", f"{turns.machine()}.\n\n```\n{block}\n```")
    return 0


if __name__ == "__main__":
    run(main)
