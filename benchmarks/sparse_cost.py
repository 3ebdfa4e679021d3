"""What sparse attention should take on a GPU, by counting: a cost model, beside what proofs of its kernels took.

    python benchmarks/sparse_cost.py                                          # rates of an H100
    python benchmarks/sparse_cost.py --tflops 100 --l2 4 --memory 1.4         # another card's

A kernel takes the longest of three times, and a launch: its FLOP, what passes between L2 and its blocks, and what
memory has to give and take at least; all three are roofline.py's expressions. u and uq are the shares of pairs up to
the diagonal in tiles of 64 queries and of 64 keys. FLOP go at --tflops T / (T + --half): short sequences leave a part
of the card idle. `make roofline` writes the tables into doc/gpu.md.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))  # so that it runs from any folder
if __name__ == "__main__":
    from llmc import startup

    startup.begin()

from argparse import Namespace
from typing import NamedTuple

from kernels.cuda.runtime.roofline import ROWS_OF_TABLE, sizes
from llmc.cli import ArgumentParser, positive_float
from llmc.errors import run


class Proof(NamedTuple):
    """Lists of k keys for T queries, their shares u and uq, and microseconds that kernels took for a layer."""

    T: int
    k: int
    lists: str
    u: float
    uq: float
    forward: int
    dq: int
    dkdv: int


# one H100, C = 768, 12 heads, TF32, see benchmarks/GPU.md; coherent: with the unions that lists of trained models have;
# shared: a list for 64 queries
PROOFS = (
    Proof(4096, 256, "coherent", 0.43, 0.57, 115, 155, 233),
    Proof(4096, 256, "shared", 0.15, 0.51, 50, 68, 222),
    Proof(4096, 256, "recency", 0.15, 0.15, 57, 71, 83),
    Proof(4096, 256, "random", 1.00, 1.00, 230, 325, 389),
    Proof(16384, 256, "coherent", 0.17, 0.20, 555, 845, 1192),
    Proof(16384, 256, "shared", 0.04, 0.19, 152, 221, 1035),
    Proof(16384, 256, "recency", 0.04, 0.04, 152, 224, 263),
    Proof(16384, 256, "random", 0.78, 0.79, 2281, 3532, 4273),
    Proof(16384, 1024, "coherent", 0.41, 0.52, 1230, 1905, 2928),
    Proof(16384, 1024, "shared", 0.13, 0.50, 425, 637, 2572),
)
DENSE = {4096: (205, 634), 16384: (2551, 7920)}  # the same of dense attention on tensor cores, forward and backward
# a step of C = 768 L = 4 B = 1 T = 4096 in TF32, milliseconds, and of that attention on CUDA cores
STEP, ATTENTION, LAYERS = 25.6, 4 * (0.758 + 3.259), 4
PRODUCTS = 248e6  # FLOP a microsecond of cuBLAS's TF32 products: 12.3 ms of a 124M step, B=4 T=1024
GOALS = {("coherent", 4096): 0.85, ("coherent", 16384): 0.5, ("shared", 4096): 0.65, ("shared", 16384): 0.3}

LISTS = ("selected_bits", "union_keys")
BY_KEY = ("key_classes", "key_order", "union_queries")
FORWARD = ("indexer_scores_forward_tf32", "select_topk", *LISTS, "union_forward_tf32_64")
BACKWARD = (*LISTS, "union_dq_tf32_64", *BY_KEY, "union_dkdv_tf32_64")
LEARNING = (*LISTS, "indexer_union_forward_tf32_64", *LISTS, "union_mean_tf32", *LISTS, "indexer_union_dq_tf32_64")
LEARNING += ("indexer_union_dk_tf32_64", "indexer_union_join")
ROWS = {row.kernel.removesuffix("_kernel"): row for row in ROWS_OF_TABLE}


def names(proof: Proof) -> dict:
    return sizes(1, proof.T) | dict(k=proof.k, u=proof.u, uq=proof.uq)


def microseconds(kernel: str, proof: Proof, rates: Namespace) -> float:
    """Of one launch with such lists."""
    row, values = ROWS[kernel], names(proof)
    must, does, flop = (eval(text, {"__builtins__": {}}, values) for text in (row.must, row.does or row.must, row.flop))
    tflops = rates.tflops * proof.T / (proof.T + rates.half) if row.tensor else rates.cores
    return max(flop / tflops, 4 * does / rates.l2, 4 * must / rates.memory) / 1e6 + rates.launch


def projections(proof: Proof, rates: Namespace) -> float:
    """Microseconds of the indexer's own products of a layer, forward: C (HI dI + dI + HI) multiplications a token."""
    of = names(proof)
    return 2e-6 * of["N"] * of["C"] * (of["HI"] * of["dI"] + of["dI"] + of["HI"]) / rates.tflops + 3 * rates.launch


def layer(proof: Proof, rates: Namespace) -> dict[str, float]:
    """Microseconds of a layer's attention: forward, of that indexer and selection, backward, the indexer's learning."""
    together = {
        part: sum(microseconds(kernel, proof, rates) for kernel in kernels)
        for part, kernels in (("forward", FORWARD), ("selection", FORWARD[:2]), ("backward", BACKWARD))
    }
    learning = sum(microseconds(kernel, proof, rates) for kernel in LEARNING) + 2 * projections(proof, rates)
    for part in ("forward", "selection"):
        together[part] += projections(proof, rates)
    return together | dict(learning=learning)


def share_of_forward(proof: Proof, rates: Namespace) -> float:
    """Indexer and selection over a layer's attention and its four products, forward."""
    parts, C = layer(proof, rates), names(proof)["C"]
    return parts["selection"] / (parts["forward"] + 24 * proof.T * C * C / PRODUCTS)


def without_attention(T: int) -> float:
    """The step that dense attention leaves if a sparse one took no time, over the dense step."""
    rest = (STEP - ATTENTION) * T / 4096
    return rest / (rest + LAYERS * sum(DENSE[T]) / 1000)


def step(proof: Proof, rates: Namespace) -> tuple[float, float]:
    """Milliseconds of a step, dense and sparse: all else grows with T."""
    rest, parts = (STEP - ATTENTION) * proof.T / 4096, layer(proof, rates)
    sparse = parts["forward"] + parts["backward"] + parts["learning"]
    return rest + LAYERS * sum(DENSE[proof.T]) / 1000, rest + LAYERS * sparse / 1000


# ----------------------------------------------------------------------------------------------------------------------
# what doc/gpu.md shows


def kernel_table(rates: Namespace) -> str:
    lines = [
        "| T, k, lists | u, uq | forward, us | a proof took | dq | took | dkdv | took |",
        "|---|---|" + "---:|" * 6,
    ]
    for proof in PROOFS:
        cells = [f"{proof.T}, {proof.k}, {proof.lists}", f"{proof.u:.2f}, {proof.uq:.2f}"]
        for part in ("forward", "dq", "dkdv"):
            cells += [f"{microseconds(f'union_{part}_tf32_64', proof, rates):.0f}", str(getattr(proof, part))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def step_table(rates: Namespace) -> str:
    lines = ["| T, lists | dense attention, us | sparse forward | of it selection | backward | learning |"]
    lines[0] += " dense step, ms | sparse | ratio | attention for nothing | aim |"
    lines.append("|---|" + "---:|" * 10)
    for proof in PROOFS:
        if (proof.lists, proof.T) not in GOALS or proof.k != 256:
            continue
        parts, (dense, sparse) = layer(proof, rates), step(proof, rates)
        cells = [f"{proof.T}, {proof.lists}", f"{DENSE[proof.T][0]} + {DENSE[proof.T][1]}", f"{parts['forward']:.0f}"]
        cells += [f"{parts['selection']:.0f}", f"{parts['backward']:.0f}", f"{parts['learning']:.0f}"]
        cells += [f"{dense:.1f}", f"{sparse:.1f}", f"{sparse / dense:.2f}"]
        cells += [f"{without_attention(proof.T):.2f}", f"{GOALS[proof.lists, proof.T]:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def parts_of_page() -> tuple[str, ...]:
    """Paragraphs and tables, for an H100's rates."""
    rates = arguments().parse([])
    coherent = {proof.T: proof for proof in PROOFS if (proof.lists, proof.k) == ("coherent", 256)}
    shares = " and ".join(f"{100 * share_of_forward(proof, rates):.0f} %" for proof in coherent.values())
    how = (
        "**Sparse attention**, one layer, C = 768, 12 heads, TF32: [the cost model](../benchmarks/sparse_cost.py) from "
        f"floats and FLOP of the roofline's table, with {rates.tflops:g} TFLOP/s in long sequences, {rates.l2:g} TB/s "
        f"out of L2 and {rates.memory:g} out of memory, beside kernels of ours' plan that ran on that card. Coherent "
        "lists overlap as those of trained models do; shared ones are one list for 64 queries."
    )
    steps = (
        f"A step of {LAYERS} layers, B = 1, the indexer learning. Selection has the indexer's products, its scores and "
        f"the choice: at T = 4096 and 16384 {shares} of a layer's attention and products, forward. Learning has the "
        "target's mean over heads, the scores of selected keys and all gradients of the indexer. The last column but "
        "one is the step if attention, selection and learning took no time at all: the aims for shared lists are below "
        "it, so no kernel reaches them while the rest of the step is what it is."
    )
    return how, kernel_table(rates), steps, step_table(rates)


def arguments() -> ArgumentParser:
    parser = ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--tflops", type=positive_float, default=140.0, help="TFLOP/s in TF32 that such kernels reach, long sequences")
    add("--half", type=positive_float, default=900.0, help="length of a sequence at which they reach half of it")
    add("--cores", type=positive_float, default=40.0, help="TFLOP/s without tensor cores")
    add("--l2", type=positive_float, default=5.5, help="TB/s between L2 and blocks")
    add("--memory", type=positive_float, default=2.8, help="TB/s of memory")
    add("--launch", type=positive_float, default=4.0, help="microseconds of a launch and of the blocks that end last")
    return parser


def main(argv: list[str] | None = None) -> int:
    rates = arguments().parse(argv)
    print(f"{kernel_table(rates)}\n{step_table(rates)}", end="")
    return 0


if __name__ == "__main__":
    run(main)
