"""What data parallelism should cost, by counting: how long gradients take between GPUs, and where more of them end.

    python benchmarks/scaling_model.py                                   # H100s, eight to a node; into doc/scaling.md
    python benchmarks/scaling_model.py --network 5.9 --bucket 256        # one 400 Gb/s card a node, larger calls

Nothing here was measured on several GPUs. A sum of S bytes over R ranks, G of them to a node, M = R / G nodes, in n
calls of NCCL, takes

    2 (R - 1) / R * S / bandwidth + n (base + 2 (G - 1) hop + 2 log2(M) net_hop)

A call has up to 64 MiB (kernels/cuda/runtime/nccl.py). With overlap a layer's matrices are a call each, beside the
layers below; what is left, the embeddings and all vectors, lies in five places and is summed behind backward. For the
calls of a group NCCL may need less than their sum.

The first part is a ring's: all but its own Rth of every byte passes a rank twice. bandwidth is a GPU's link in one
node, else the smaller one of that and the node's network cards together. The second is a chain in the node and a tree
over nodes. A step grows with llmc/mfu.py's FLOP from what one H100 took for 124M, B=4 T=1024. With other rates than
the defaults nothing is written.

Sources of the rates: NVLink, 450 GB/s each way, of which NCCL's ring gets 370 (NVIDIA/nccl-tests issue 212); a network
card of 400 Gb/s, one a GPU, of which 46 to 48 GB/s arrive (issue 290 there); PCIe gen 5 x16, 64 GB/s each way;
latencies from NCCL's own cost model (NVIDIA/nccl, src/graph/tuning.cc at 01afd20, ring, protocol Simple);
2 (R - 1) / R from nccl-tests' PERFORMANCE.md.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))  # so that it runs from any folder
if __name__ == "__main__":
    from llmc import startup

    startup.begin()

from argparse import Namespace
from itertools import groupby
from math import ceil, log2, prod
from pathlib import Path
from textwrap import fill

from kernels.cuda.runtime.nccl import BUCKET
from llmc.checkpoint import MATRICES, OUTSIDE, GPT2Config, num_parameters, tensor_shapes
from llmc.cli import ArgumentParser, positive_float, positive_int
from llmc.errors import run
from llmc.files import atomic_write
from llmc.mfu import flops_per_token

PAGE = Path(__file__).resolve().parent.parent / "doc" / "scaling.md"
BEGIN, END = "<!-- table: benchmarks/scaling_model.py -->\n", "<!-- end of the table -->\n"
T = 1024
MODELS = {"124M": GPT2Config(), "1558M": GPT2Config(C=1600, L=48, NH=25)}
# tokens of an update: llm.c's for these models (scripts/run_gpt2_124M.sh, run_gpt2_1558M.sh), as much as GPT-3 of about
# their size had (Brown et al. 2020, table 2.1: 0.5M for 125M, 1M for 1.3B); MOST is that table's for 6.7B
USUAL = {"124M": 1 << 19, "1558M": 1 << 20}
MOST = 1 << 21
GPUS = tuple(8 << i for i in range(8))  # 8 .. 1024
ROWS = 1, 4, 16  # B of a rank
ENOUGH = 0.8  # efficiency
BACKWARD = 2 / 3  # of a step's products: two of three
MEMORY = 80e9  # bytes of an H100
KEPT = 16  # floats of C that a layer keeps of a token for backward: train_banded.py, layer_shapes

# ----------------------------------------------------------------------------------------------------------------------
# formulas


def size(config: GPT2Config) -> int:
    """Bytes of the gradients, float32."""
    return 4 * num_parameters(config)


def pieces(config: GPT2Config) -> tuple[list[int], list[int]]:
    """Bytes of each matrix of the layers, whose sums begin while backward goes on, and of what lies between them.

    That is wte, which embeds and classifies, wpe and the vectors: their sums begin behind backward.
    """
    beside, behind = [], []
    for early, names in groupby(tensor_shapes(config), lambda name: name in MATRICES and name not in OUTSIDE):
        sizes = [4 * prod(tensor_shapes(config)[name]) for name in names]
        if early:
            beside += [S // config.L for S in sizes for _ in range(config.L)]
        else:
            behind.append(sum(sizes))
    return beside, behind


def all_reduce(parts: list[int], R: int, rates: Namespace) -> float:
    """Seconds of the sums of so many bytes each over R ranks; the formula is the module's."""
    if R == 1:
        return 0.0
    G = min(R, rates.node)
    M = R / G
    bandwidth = 1e9 * (rates.nvlink if M == 1 else min(rates.nvlink, G * rates.network))
    latency = 1e-6 * (rates.base + 2 * (G - 1) * rates.hop + 2 * log2(M) * rates.net_hop)
    calls = sum(ceil(S / (rates.bucket * 2**20)) for S in parts)
    return 2 * (R - 1) / R * sum(parts) / bandwidth + calls * latency


def compute(config: GPT2Config, B: int, rates: Namespace) -> float:
    """Seconds of a rank's step of B rows without others: FLOP at the rate of the measured step."""
    measured = flops_per_token(MODELS["124M"], T) * 4
    return 1e-3 * rates.step * flops_per_token(config, T) * B / measured


def waiting(config: GPT2Config, B: int, R: int, rates: Namespace, overlap: bool, zero: int = 0) -> float:
    """Seconds of a step in which a rank does nothing but reduce.

    overlap: those of a layer start as soon as backward has them; left are those beyond backward's time, and the last
    part's. zero: with 1 it is a sum of which each rank has a part, half the bytes, and behind the update the new
    weights go to all, the other half, beside which there is nothing to do.
    """
    whole = all_reduce([size(config)], R, rates)
    if not overlap:
        return whole
    beside, last = (all_reduce(parts, R, rates) for parts in pieces(config))
    hidden = BACKWARD * compute(config, B, rates)
    return max(beside - hidden, 0) + last if zero == 0 else max(beside / 2 - hidden, 0) + last / 2 + whole / 2


def efficiency(config: GPT2Config, B: int, R: int, rates: Namespace, overlap: bool = False, zero: int = 0) -> float:
    """Tokens a second of R ranks over R times those of one."""
    alone = compute(config, B, rates)
    return alone / (alone + waiting(config, B, R, rates, overlap, zero))


def last_count(config: GPT2Config, B: int, rates: Namespace, overlap: bool) -> int:
    """The most ranks, a power of 2 up to 4096, that keep ENOUGH; 1 if 2 do not."""
    counts = [1 << i for i in range(13)]
    return max(R for R in counts if all(efficiency(config, B, r, rates, overlap) >= ENOUGH for r in counts if r <= R))


def memory(config: GPT2Config, B: int, R: int, zero: int, recompute: bool = False) -> float:
    """Bytes of a rank: weights, gradients, m and v, of zero 1 their part; activations of B rows, logits among them."""
    layers = KEPT + config.L if recompute else KEPT * config.L
    activations = 4 * B * T * (layers * config.C + config.Vp)
    return 2 * size(config) + 2 * size(config) / (R if zero else 1) + activations


def rows_that_fit(config: GPT2Config, R: int, zero: int, recompute: bool = False) -> int:
    """The largest B whose weights and activations an H100 holds."""
    none, one = (memory(config, B, R, zero, recompute) for B in (0, 1))
    return max(0, int((MEMORY - none) / (one - none)))


def predicted(R: int, alone: float, reducing: float, cores: int) -> float:
    """Tokens/s of R ranks over one's, from the time of one's step and of the sum of R, without overlap."""
    return R * alone / (alone * max(1, R / cores) + reducing)


# ----------------------------------------------------------------------------------------------------------------------
# what doc/scaling.md shows


def short(tokens: float) -> str:
    return f"{tokens / 2**20:g}M"


def efficiency_table(name: str, rates: Namespace) -> str:
    config = MODELS[name]
    lines = [f"| {name}: GPUs | all-reduce, ms |" + "".join(f" B = {B} | zero 1 |" for B in ROWS)]
    lines.append("|---:|---:|" + "---|---:|" * len(ROWS))
    for R in GPUS:
        cells = [f"{R}", f"{1e3 * all_reduce([size(config)], R, rates):.1f}"]
        for B in ROWS:
            ways = [efficiency(config, B, R, rates, *way) for way in ((False,), (True,), (True, 1))]
            tokens = R * B * T
            mark = " ++" if tokens > MOST else " +" if tokens > USUAL[name] else ""
            cells += [f"{ways[0]:.2f}, {ways[1]:.2f}{mark}", f"{ways[2]:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def end_of(name: str, B: int, rates: Namespace, overlap: bool) -> tuple[int, str]:
    """GPUs at which data parallelism of B rows a rank ends, and by what: "batch" or "time"."""
    by_batch, by_time = USUAL[name] // (B * T), last_count(MODELS[name], B, rates, overlap)
    return (by_batch, "batch") if by_batch <= by_time else (by_time, "time")


def end_table(rates: Namespace) -> str:
    lines = [f"| model, B | step of one, ms | GPUs at the usual batch | at {short(MOST)} tokens | ends, no overlap |"]
    lines[0] += " step there, ms | ends, overlap |"
    lines.append("|---|---:|---:|---:|---|---:|---|")
    for name, config in MODELS.items():
        for B in (1, 2, 4, 8, 16):
            now, later = (end_of(name, B, rates, overlap) for overlap in (False, True))
            alone = 1e3 * compute(config, B, rates)
            there = alone + 1e3 * waiting(config, B, now[0], rates, False)
            cells = [f"{name}, {B}", f"{alone:.0f}", f"{USUAL[name] // (B * T)}", f"{MOST // (B * T)}"]
            cells += [f"{now[0]}, {now[1]}", f"{there:.0f}", f"{later[0]}, {later[1]}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def memory_table() -> str:
    lines = ["| model | weights, gradients, GB | m, v | zero 1 on 8 | on 1024 | a row's activations |"]
    lines[0] += " rows in 80 GB | zero 1 on 8 | and recompute |"
    lines.append("|---|" + "---:|" * 8)
    for name, config in MODELS.items():
        bytes_of = [2 * size(config), 2 * size(config), 2 * size(config) / 8, 2 * size(config) / 1024]
        bytes_of.append(memory(config, 1, 1, 0) - memory(config, 0, 1, 0))
        rows = [rows_that_fit(config, 8, *way) for way in ((0,), (1,), (1, True))]
        lines.append(f"| {name} | {' | '.join([f'{x / 1e9:.2f}' for x in bytes_of] + [str(B) for B in rows])} |")
    return "\n".join(lines) + "\n"


def other_links(rates: Namespace) -> dict[str, Namespace]:
    """Rates of which one is another: what a row of the table is called -> rates."""
    return {
        "as above": rates,
        "PCIe gen 5 in place of NVLink": Namespace(**vars(rates) | {"nvlink": 64.0}),
        "one card of 400 Gb/s a node": Namespace(**vars(rates) | {"network": rates.network / rates.node}),
        "16 MiB a call": Namespace(**vars(rates) | {"bucket": 16.0}),
    }


def link_table(rates: Namespace) -> str:
    lines = ["| B = 4 |" + "".join(f" {name}, {R} GPUs |" for name in MODELS for R in (8, 64))]
    lines.append("|---|" + "---|" * 4)
    for what, others in other_links(rates).items():
        pairs = [
            ", ".join(f"{efficiency(config, 4, R, others, overlap):.2f}" for overlap in (False, True))
            for config in MODELS.values()
            for R in (8, 64)
        ]
        lines.append(f"| {what} | {' | '.join(pairs)} |")
    return "\n".join(lines) + "\n"


def text(rates: Namespace) -> str:
    """What stands between the page's markers."""
    share = sum(pieces(MODELS["124M"])[1]) / size(MODELS["124M"])
    gigabytes = " and ".join(f"{size(config) / 1e9:.2f}" for config in MODELS.values())
    how = (
        f"**Efficiency**: tokens a second of R GPUs over R times those of one, T = {T}, without overlap "
        "(`--ranks-timing 1`) and, behind the comma, with it. +: the batch is larger than llm.c's for that model, "
        f"++: than {short(MOST)} tokens. All-reduce is of float32 gradients, {gigabytes} GB, {rates.bucket:g} MiB a "
        f"call at most. A node has {rates.node} GPUs; a GPU sends {rates.nvlink:g} GB/s to its neighbours and "
        f"{rates.network:g} through a network card of its own; a call waits {rates.base:g} us, and {rates.hop:g} a "
        f"hop in the node, {rates.net_hop:g} between nodes. One H100's step of 124M at B = 4 is {rates.step:g} ms; "
        f"other steps grow with their FLOP. Overlap hides a layer's matrices, a call each, and not the embedding's "
        f"gradients, {100 * share:.0f} % of 124M's, as backward ends with them. zero 1 is with overlap, but for the "
        "new weights, which follow the update."
    )
    end = (
        f"**Where it ends**: at the last power of two that keeps an efficiency of {ENOUGH} (time), or where the batch "
        f"is llm.c's, {short(USUAL['124M'])} tokens for 124M and {short(USUAL['1558M'])} for 1558M (batch), whichever "
        "comes first."
    )
    held = (
        "**Memory** of a rank. m and v are divided by zero 1, weights and gradients are not. A row is 1024 tokens with "
        f"{KEPT} C floats a layer and its logits, with `--recompute 1` one such layer and C floats of each; "
        "backward's own buffers come on top."
    )
    of_124M, at_once = [size(MODELS["124M"])], Namespace(**vars(rates) | {"base": 0, "hop": 0, "net_hop": 0})
    latency = 1 - all_reduce(of_124M, 64, at_once) / all_reduce(of_124M, 64, rates)
    links = (
        f"**Other links**, efficiency without and with overlap. Of the sum of 124M over 64 GPUs {100 * latency:.0f} % "
        "is latency:"
    )
    parts = [how, *(efficiency_table(name, rates) for name in MODELS), end, end_table(rates), links, link_table(rates)]
    parts += [held, memory_table()]
    return "".join(f"\n{part if part.startswith('|') else fill(part, 120) + chr(10)}" for part in parts) + "\n"


def with_block(page: str, begin: str, block: str) -> str:
    """`page` with `block` between the marker `begin` and the next END."""
    before, _, rest = page.partition(begin)
    return f"{before}{begin}{block}{END}{rest.partition(END)[2]}"


def write_block(begin: str, block: str, page: Path = PAGE) -> None:
    """Put `block` into the page."""
    new = with_block(page.read_text(), begin, block)
    with atomic_write(page) as file:
        file.write(new.encode())


def arguments() -> ArgumentParser:
    parser = ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--node", type=positive_int, default=8, help="GPUs of a node")
    add("--nvlink", type=positive_float, default=370.0, help="GB/s that a GPU sends to others of its node")
    add("--network", type=positive_float, default=47.0, help="GB/s of the network for each GPU of a node")
    add("--base", type=positive_float, default=8.4, help="microseconds of a reduction of nothing")
    add("--hop", type=positive_float, default=3.4, help="microseconds from GPU to GPU in a node")
    add("--net-hop", type=positive_float, default=9.6, help="microseconds from node to node")
    add("--bucket", type=positive_float, default=4 * BUCKET / 2**20, help="MiB of one call")
    add("--step", type=positive_float, default=32.2, help="milliseconds a step of 124M, B=4 T=1024, takes on one GPU")
    return parser


def main(argv: list[str] | None = None) -> int:
    rates = arguments().parse(argv)
    if rates == arguments().parse([]):
        write_block(BEGIN, text(rates))
    print(text(rates), end="")
    return 0


if __name__ == "__main__":
    run(main)
