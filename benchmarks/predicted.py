"""What an H100 should take, by arithmetic from what one has taken: the tables of doc/gpu.md that say so.

    make roofline          # also: python benchmarks/predicted.py

Nothing here was measured with today's kernels. Inputs are benchmarks/GPU.md, of one day and an older commit, and what
other programs took on that day: kernels of the same plan as ours (attention, products of bands), a step as one graph.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))  # so that it runs from any folder
if __name__ == "__main__":
    from llmc import startup

    startup.begin()

from pathlib import Path
from textwrap import fill

from benchmarks import sparse_cost
from kernels.cuda.gpt2.attention import ALONE, PASSING
from kernels.cuda.gpt2.attention_join import split_keys
from kernels.cuda.runtime.grid import ceil_div
from kernels.cuda.runtime.roofline import GPUS, ROWS_OF_TABLE, sizes
from llmc.cli import ArgumentParser
from llmc.errors import run

PAGE = Path(__file__).parent.parent / "doc" / "gpu.md"
BEGIN, END = "<!-- table: make roofline -->\n", "<!-- end of the table -->\n"
L, NH, P = 12, 12, sizes(4, 1024)["P"]  # GPT-2 124M
PARTS = {"forward": ("forward",), "backward": ("dq", "dkdv")}

# microseconds of a layer's attention, forward and backward: kernels for tensor cores of ours' plan in TF32, and ours
# for CUDA cores
ATTENTION = {
    (4, 1024): ((62, 193), (212, 869)),
    (16, 1024): ((223, 716), (749, 3135)),
    (1, 4096): ((205, 634), (746, 3131)),
    (1, 16384): ((2551, 7920), (10933, 47706)),
}
# milliseconds a step, 124M at B=4 T=1024; (4.48, a graph's 1.31): C=128 L=4 B=4 T=64
STEPS = {("TF32", "dense"): 32.2, ("TF32", "banded"): 41.1, ("float32", "dense"): 84.4, ("float32", "banded"): 70.1}
SMALL = 4.48, 1.31
ATTENTION_MS, SUMS_MS = 13.0, 0.3  # of these: attention; what sums of columns in one launch save
# microseconds of a layer's six products of both MLP matrices, w = 256: on CUDA cores, and kernels of ours' plan
BANDS = {"TF32": (1385, 297), "float32": (1385, 437)}
GRAPH_MS = 32.29 - 31.47  # what a graph saved of a dense TF32 step
PRODUCTS_MS, MMA_TFLOPS = 64.3, 314  # cuBLAS's float32 products of a dense step; the most that mma.sync did in TF32

# a decoded token: microseconds of the host for a launch; and, assumed, of the GPU for the smallest kernel and for a
# block that meets PASSING keys, a load from memory and its sums
HOST, KERNEL, TILE = 14, 2, 1
POSITIONS = 1024  # of the model: one graph serves them all, so its blocks are for that many keys


def bound(kernel: str, tensor: str, names: dict) -> float:
    """Microseconds below which a kernel of attention cannot come on an H100: its bytes or its FLOP (roofline.py)."""
    gigabytes, teraflops, tf32 = GPUS["H100"]
    row = next(row for row in ROWS_OF_TABLE if row.kernel == f"attention_{kernel}{tensor}_64_kernel")
    must, flop = (eval(text, {"__builtins__": {}}, names) for text in (row.must, row.flop))
    return max(4e-3 * must / gigabytes, 1e-6 * flop / (tf32 / row.tensor if row.tensor else teraflops))


def attention_table() -> str:
    """Bounds of attention's kernels beside what kernels of the same plan took."""
    lines = [
        "| B, T | | TF32: bound, us | such kernels took | times | 3xTF32: bound | CUDA cores: bound | took | times |"
    ]
    lines.append("|---|---|" + "---:|" * 7)
    for (B, T), measured in ATTENTION.items():
        names = sizes(B, T)
        for way, *took in zip(PARTS, *measured):
            tf32, exact, cores = (
                sum(bound(kernel, tensor, names) for kernel in PARTS[way]) for tensor in ("_tf32", "_3xtf32", "")
            )
            cells = [f"{B}, {T}", way, f"{tf32:.0f}", took[0], f"{took[0] / tf32:.1f}", f"{exact:.0f}"]
            cells += [f"{cores:.0f}", took[1], f"{took[1] / cores:.1f}"]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def attention_ms(precision: str) -> float:
    """A step's attention on tensor cores; 3xTF32 makes three products of one, so at most three times TF32's time."""
    (took, _), times = ATTENTION[4, 1024], 3 if precision == "float32" else 1
    return times * L * sum(took) / 1000


def predicted_step(precision: str, kind: str) -> tuple[float, float, float]:
    """Milliseconds with attention on tensor cores, with the band's products as well, and all of it one graph."""
    now = STEPS[precision, kind] - ATTENTION_MS + attention_ms(precision) - SUMS_MS
    before, after = BANDS[precision]
    bands = now - L * (before - after) / 1000 if kind == "banded" else now
    return now, bands, bands - GRAPH_MS


def step_table() -> str:
    lines = ["| ms a step | took | attention on tensor cores | and bands on tensor cores | and one graph |"]
    lines.append("|---|---:|" + "---:|" * 3)
    for (precision, kind), took in STEPS.items():
        now, bands, graph = predicted_step(precision, kind)
        cells = f"{now:.1f}", f"{bands:.1f}" if kind == "banded" else "", f"{graph:.1f}"
        lines.append(f"| 124M, {precision}, {kind} | {took} | {' | '.join(cells)} |")
    lines.append(f"| C=128 L=4 B=4 T=64, float32, dense | {SMALL[0]} | | | {SMALL[1]} |")
    return "\n".join(lines) + "\n"


def decoded_token(keys: int, split: bool, fused: bool) -> tuple[int, float]:
    """(launches, the GPU's microseconds) of a token that meets `keys` keys.

    split: keys over several blocks. fused: products add their biases, and the new row is copied into the cache.
    """
    parts, share = split_keys(POSITIONS, NH, PASSING[64]) if split else (1, keys)
    launches = L * ((10 if fused else 13) + (parts > 1)) + 3
    weights = 4e-3 * P / GPUS["H100"][0]
    return launches, weights + KERNEL * launches + L * TILE * ceil_div(min(share, keys), PASSING[64])


def decode_table() -> str:
    lines = ["| keys | launches before, now | GPU, us | tokens/s | now, as one graph | that without split keys |"]
    lines.append("|---:|" + "---|" * 2 + "---:|" * 3)
    for keys in (256, 512, 1000):
        before, now, whole = (decoded_token(keys, *how) for how in ((False, False), (True, True), (False, True)))
        rates = [1e6 / max(HOST * launches, gpu) for launches, gpu in (before, now)]
        cells = [f"{keys}", f"{before[0]}, {now[0]}", f"{before[1]:.0f}, {now[1]:.0f}"]
        cells += [f"{rates[0]:.0f}, {rates[1]:.0f}", f"{1e6 / now[1]:.0f}", f"{1e6 / whole[1]:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def step_notes() -> list[str]:
    """How a step's table came about, and what it leaves out: two paragraphs."""
    rate, most = 6 * P * 4096 / PRODUCTS_MS / 1e9, MMA_TFLOPS / 3  # TFLOP/s
    least = predicted_step("float32", "dense")[0] - PRODUCTS_MS * (1 - rate / most)
    (cores, tf32), (_, exact) = BANDS["TF32"], BANDS["float32"]
    how = (
        "**A step** of GPT-2 124M, B=4 T=1024. What it took is in [benchmarks/GPU.md](../benchmarks/GPU.md), "
        f"{ATTENTION_MS} ms of it attention on CUDA cores. On tensor cores a layer's is put at "
        f"{sum(ATTENTION[4, 1024][0])} us in TF32 and at three times that in float32, the most that three products for "
        f"one can cost; sums of columns save {SUMS_MS} ms. Both bands of 256: the six products of a layer in {tf32} us "
        f"(TF32) and {exact} (3xTF32) in place of {cores}. One graph saved {GRAPH_MS:.1f} ms. The last two columns are "
        "of kernels, and of a step, that other programs ran on that card."
    )
    products = (
        f"A dense step in float32 stays with its products: cuBLAS takes {PRODUCTS_MS} ms for them, {rate:.0f} TFLOP/s. "
        "3xTF32 is faster only in a kernel that does more than that: those of the bands did about 37 in the tiles that "
        f"they cover, and are ahead because they leave most out. mma.sync did {MMA_TFLOPS} TFLOP/s in TF32; a third of "
        f"it, {most:.0f}, would make the step {least:.0f} ms."
    )
    return [how, products]


def decode_note() -> str:
    """What the table of decoded tokens assumes."""
    weights = 4e-3 * P / GPUS["H100"][0]
    return (
        f"**A decoded token** of 124M, float32, one text. A launch takes the host {HOST} us, which is the limit, not "
        f"what the GPU does meanwhile: {weights:.0f} us for the weights' way from memory and, assumed, {KERNEL} us a "
        f"kernel and {TILE} us for {PASSING[64]} keys of a head in one block. Biases added in products save four "
        "launches a layer; a copy into the cache, so that all positions are one graph, costs one, and to split keys "
        f"over blocks, in a model of more than {ALONE} positions, another. Both pay in a graph, and only a graph makes "
        "a token three times as fast."
    )


def text() -> str:
    """What stands between the page's markers."""
    how, products = step_notes()
    attention = "**A layer's attention**, 12 heads of 64, and its [roofline](../kernels/cuda/README.md):"
    parts = how, step_table(), products, attention, attention_table(), *sparse_cost.parts_of_page()
    parts += decode_note(), decode_table()
    return "".join(f"\n{part if part.startswith('|') else fill(part, 120) + chr(10)}" for part in parts) + "\n"


def with_tables(page: str) -> str:
    """`page` with today's tables between its two markers."""
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}{text()}{END}{rest.partition(END)[2]}"


def main(argv: list[str] | None = None) -> int:
    ArgumentParser(description=(__doc__ or "").partition("\n")[0]).parse(argv)
    PAGE.write_text(with_tables(PAGE.read_text()))
    print(text(), end="")
    return 0


if __name__ == "__main__":
    run(main)
