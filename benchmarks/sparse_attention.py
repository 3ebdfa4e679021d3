"""From how few keys on gathering them is faster than masking the others: benchmarks/RESULTS.md.

    python benchmarks/sparse_attention.py                  # all sizes; PyTorch if it is installed; half an hour
    python benchmarks/sparse_attention.py --channels 128 --lengths 256,1024 --repeats 3

One layer's attention, forward and backward: dense causal attention, and both forms of the op sparse_attention on lists
of k keys drawn from those up to the query. PyTorch's scaled_dot_product_attention is causal, or gets the lists as a
boolean mask that is made of them first, as ours is. Heads have 64 channels, a batch 4096 tokens in sequences of T.
NumPy and PyTorch are processes of their own and take turns; OPENBLAS_CORETYPE and OPENBLAS_L2_SIZE are unset. Times are
medians.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))  # so that it runs from any folder
if __name__ == "__main__":
    from llmc import startup

    startup.begin()

import time
from importlib.util import find_spec

from kernels import cpu  # before NumPy, as in the trainers  # isort: skip
import numpy as np
import turns

from kernels.cpu.sparse import sparse_attention as sparse
from llmc.cli import ArgumentParser, positive_int
from llmc.errors import UserError, run

CHANNELS, LENGTHS = (128, 768), (256, 1024, 4096)
HEAD, TOKENS = 64, 4096
SHARES = (128, 64, 32, 16, 8, 4, 2)  # k is T divided by these
GATHERED = 8  # the smallest of them that the gathered form is measured at: beyond it takes several times as long
FASTER = 1.03  # as what counts


def causal_lists(B: int, T: int, k: int) -> np.ndarray:
    """index (B,T,k): all keys up to the query where these are k or less, else k of them drawn at random."""
    draws = np.random.default_rng(k).random((T, T), np.float32)
    draws[np.triu_indices(T, 1)] = 2
    chosen = np.sort(np.argpartition(draws, k - 1, axis=1)[:, :k], axis=1)
    chosen[chosen > np.arange(T)[:, None]] = -1
    return np.broadcast_to(chosen.astype(np.int32), (B, T, k)).copy()


def our_attention(C: int, T: int):
    """A function of the form and k that runs a layer's attention by kernels/cpu -> seconds forward and backward."""
    B, NH = max(1, TOKENS // T), C // HEAD
    rng = np.random.default_rng(1)
    qkv, dout = rng.standard_normal((B, T, 3 * C), np.float32), rng.standard_normal((B * T, C), np.float32)
    out, lse, dqkv, lists = np.empty_like(dout), np.empty((B, NH, T), np.float32), np.empty_like(qkv), {}

    def step(form: str, k: int):
        if form != "dense" and k not in lists:
            lists.clear()
            lists[k] = causal_lists(B, T, k)
        started = time.perf_counter()
        if form == "dense":
            cpu.attention_forward(out, lse, qkv, NH)
        else:
            getattr(sparse, f"_{form}_forward")(out, lse, qkv, lists[k], NH)
        between = time.perf_counter()
        if form == "dense":
            cpu.attention_backward(dqkv, dout, qkv, out, lse, NH)
        else:
            getattr(sparse, f"_{form}_backward")(dqkv, dout, qkv, out, lse, lists[k], NH)
        return between - started, time.perf_counter() - between

    return step


def torch_attention(C: int, T: int):
    """The same in PyTorch, dense or masked."""
    import torch
    import torch.nn.functional as F

    B, NH = max(1, TOKENS // T), C // HEAD
    qkv, dout = torch.randn(B, T, 3, NH, HEAD, requires_grad=True), torch.randn(B, NH, T, HEAD)
    lists = {}

    def step(form: str, k: int):
        if form != "dense" and k not in lists:
            lists.clear()
            index = causal_lists(B, T, k)  # where a list is short, its last key again
            lists[k] = torch.from_numpy(np.where(index < 0, index.max(axis=2, keepdims=True), index).astype(np.int64))
        started = time.perf_counter()
        q, key, value = qkv.permute(2, 0, 3, 1, 4)
        if form == "dense":
            out = F.scaled_dot_product_attention(q, key, value, is_causal=True)
        else:
            mask = torch.zeros(B, T, T, dtype=torch.bool).scatter_(2, lists[k], True)
            out = F.scaled_dot_product_attention(q, key, value, attn_mask=mask[:, None])
        between = time.perf_counter()
        out.backward(dout)
        qkv.grad = None
        return between - started, time.perf_counter() - between

    return step


def work(program: str) -> None:
    """A worker: runs "C T form k" of each line, twice, and prints the second's milliseconds forward and backward."""
    size, step = None, None
    for line in sys.stdin:
        C, T, form, k = line.split()
        if size != (C, T):
            size, step = (C, T), (torch_attention if program == "torch" else our_attention)(int(C), int(T))
        step(form, int(k))
        print(*(seconds * 1e3 for seconds in step(form, int(k))), flush=True)


def measure(workers: dict, C: int, T: int, keys: list[int], repeats: int) -> dict:
    """Median milliseconds (forward, backward) by (program, form, k), all taking turns; dense attention has k = 0."""
    runs = [(program, "dense", 0) for program in workers]
    for k in keys:
        forms = [(program, "masked", k) for program in workers]
        runs += forms + ([("ours", "gathered", k)] if k * GATHERED <= T else [])
    times = {run: [] for run in runs}
    for turn in range(1 + repeats):  # the first does not count
        for program, form, k in runs:
            answer = turns.turn(workers[program], f"{C} {T} {form} {k}")
            times[program, form, k] += [answer] * (turn > 0)
    return {run: np.median(values, axis=0) for run, values in times.items()}


def gathers(C: int, T: int, k: int, backward: int) -> bool:
    """What the ops would do."""
    return sparse._gathers(np.empty((1, T, 3 * C), np.bool_), np.empty((1, 1, k), np.bool_), C // HEAD, backward)


def rows_of_size(C: int, T: int, keys: list[int], ms: dict) -> list[str]:
    """The table's rows for a size: milliseconds forward + backward."""
    dense = [shown(ms.get((program, "dense", 0))) for program in ("ours", "torch")]
    rows = [f"| {C} | {T} | dense | {dense[0]} | | | {dense[1]} |"]
    for k in keys:
        times = ms["ours", "masked", k], ms.get(("ours", "gathered", k)), ms.get(("torch", "masked", k))
        masked, gathered, torch = map(shown, times)
        picks = " + ".join("gathered" if gathers(C, T, k, backward) else "masked" for backward in (0, 1))
        rows.append(f"| {C} | {T} | {k} | {masked} | {gathered} | {picks} | {torch} |")
    return rows


def shown(times) -> str:
    """(forward, backward) in milliseconds, or nothing."""
    return "" if times is None else f"{times[0]:.2f} + {times[1]:.2f}"


def crossover(C: int, T: int, ms: dict) -> str:
    """The most keys with which gathering was at least 3% faster than masking, forward and backward, and the rule's."""
    cells = [f"{C}", f"{T}"]
    both = [(k, ms["ours", "masked", k], times) for (_, form, k), times in ms.items() if form == "gathered"]
    for backward in (0, 1):
        faster = [k for k, masked, gathered in both if masked[backward] > FASTER * gathered[backward]]
        rule = [k for k in range(1, T + 1) if gathers(C, T, k, backward)]
        cells += [
            f"{max(faster)} (T/{T // max(faster)})" if faster else "none measured",
            f"{max(rule, default='none')}",
        ]
    return f"| {' | '.join(cells)} |"


def main() -> int:
    parser = ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--channels", default=",".join(map(str, CHANNELS)), help=f"sizes C, multiples of {HEAD}")
    add("--lengths", default=",".join(map(str, LENGTHS)), help="lengths T of a sequence")
    add("--repeats", type=positive_int, default=5, help="turns that count")
    add("--worker", choices=("ours", "torch"), help="used by the program itself")
    args = parser.parse()
    if args.worker:
        work(args.worker)
        return 0
    try:
        sizes = [(int(C), int(T)) for C in args.channels.split(",") for T in args.lengths.split(",")]
    except ValueError:
        raise UserError("--channels and --lengths: expected numbers like 128,768", None, 2) from None
    programs = ["ours", *(["torch"] if find_spec("torch") else [])]
    workers = {program: turns.start(__file__, "--worker", program) for program in programs}
    lines = ["| C | T | k | ours, all keys | ours, gathered | the rule picks | PyTorch |"]
    lines.append("|---|---|---|---:|---:|---|---:|")
    print("\n".join(lines))
    crossovers = [
        "| C | T | k of 3% faster forward | the rule's | k of 3% faster backward | the rule's |",
        "|---|---|---|---|---|---|",
    ]
    for C, T in sizes:
        keys = [T // share for share in SHARES if T // share > 1]
        ms = measure(workers, C, T, keys, args.repeats)
        rows = rows_of_size(C, T, keys, ms)
        print("\n".join(rows), flush=True)
        lines += rows
        crossovers.append(crossover(C, T, ms))
    turns.stop(workers.values())
    text = f"{turns.machine()}; milliseconds forward + backward, medians of {args.repeats} turns.\n\n"
    text += "\n".join(lines) + "\n\nThe most keys with which the gathered form is faster than the masked one:\n\n"
    text += "\n".join(crossovers) + "\n"
    if sizes == [(C, T) for C in CHANNELS for T in LENGTHS]:
        turns.write_section("Sparse attention, masked and gathered: make bench_sparse", text)
    print(f"\n{text.partition(chr(10))[0]}\n" + "\n".join(crossovers))
    return 0


if __name__ == "__main__":
    run(main)
