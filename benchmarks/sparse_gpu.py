"""Sparse attention on a GPU, a layer at a time: with shared rows and one by one, beside dense attention; the indexer.

    make bench_sparse                                     # after the CPU's, where a GPU works
    python benchmarks/sparse_gpu.py --tf32 1 --lengths 4096,16384
    python benchmarks/sparse_gpu.py --device cpu --lengths 64 --channels 64     # to try the script; nothing is written

One sequence, heads of 64, k keys a query, three kinds of lists:

    recency    the last k
    coherent   half recent, half by a popularity that all queries share and noise of their own: unions of 64 lists as
               trained models have them
    random     any keys up to the query

u is the share of pairs up to the diagonal that is in tiles of 64 queries. Kernels that share rows between 64 queries
and those for single queries take turns; times are medians, until the GPU is through.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))  # so that it runs from any folder
if __name__ == "__main__":
    from llmc import startup

    startup.begin()

import datetime
import time
from collections.abc import Callable
from contextlib import contextmanager

import kernels  # before NumPy, as in the trainers  # isort: skip
import numpy as np
import turns

from kernels.cuda.sparse import indexer, sparse_attention
from llmc.buffers import query_blocks
from llmc.cli import ArgumentParser, flag01, positive_int
from llmc.errors import UserError, run
from llmc.mfu import card_name
from systems.selection import rows_at_once

PAGE = turns.RESULTS.with_name("GPU.md")
LENGTHS, CHANNELS, HEAD, K, TILE = (1024, 2048, 4096, 8192, 16384, 32768), 768, 64, 256, 64
KINDS = ("recency", "coherent", "random")
SPREAD = 1.5  # of popularity, in units of the noise
HI, DI = 4, 64  # the indexer's heads and their size
SCALE = (HI * DI) ** -0.5
FORMS = {"shared rows": 0, "one by one": 1 << 62}  # from how much work on rows are shared


def lists(kind: str, T: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """index (1,T,k), count (1,T): keys up to each query, ascending, -1 behind them."""
    rng, index = np.random.default_rng(0), np.full((1, T, k), -1, np.int32)
    popularity = SPREAD * rng.standard_normal(T, np.float32) * (kind == "coherent")
    recent = {"recency": k, "coherent": k // 2, "random": 1}[kind]
    for t in range(T):
        old = max(0, t + 1 - recent)
        more, chosen = min(k - recent, old), np.arange(old, t + 1)
        if more:
            scores = popularity[:old] + rng.standard_normal(old, np.float32)
            chosen = np.concatenate([np.sort(np.argpartition(-scores, more - 1)[:more]), chosen])
        index[0, t, : len(chosen)] = chosen
    return index, np.minimum(np.arange(1, T + 1, dtype=np.int32), k)[None]


def share_of_pairs(index: np.ndarray) -> float:
    """u: keys in the unions of 64 lists over those of a dense tile."""
    T, union, dense = index.shape[1], 0, 0
    for first in range(0, T, TILE):
        tile = np.unique(index[0, first : first + TILE])
        union, dense = union + np.count_nonzero(tile >= 0), dense + min(first + TILE, T)
    return union / dense


@contextmanager
def form(name: str):
    """The kernels of one form, whatever the rule by sizes would take."""
    before = sparse_attention.WORTH, indexer.WORTH
    sparse_attention.WORTH = indexer.WORTH = FORMS[name]
    try:
        yield
    finally:
        sparse_attention.WORTH, indexer.WORTH = before


def medians(device, calls: dict[str, Callable], repeats: int) -> dict[str, float]:
    """Milliseconds of each call; they take turns, and the first turn does not count."""
    times = {name: [] for name in calls}
    for turn in range(1 + repeats):
        for name, call in calls.items():
            device.synchronize()
            began = time.perf_counter()
            call()
            device.synchronize()
            times[name] += [1000 * (time.perf_counter() - began)] * (turn > 0)
    return {name: float(np.median(of_call)) for name, of_call in times.items()}


def within(name: str, call: Callable, *args) -> Callable:
    def formed():
        with form(name):
            call(*args)

    return formed


class Layer:
    """A layer's buffers on the device, and what is timed of it."""

    def __init__(self, device, C: int, T: int):
        rng = np.random.default_rng(1)

        def drawn(*shape):
            return device.to_device(rng.standard_normal(shape, np.float32))

        self.ops, self.C, self.T, self.NH, self.k = device, C, T, C // HEAD, min(K, T)
        self.qkv, self.dout = drawn(1, T, 3 * C), drawn(T, C)
        self.out, self.lse, self.dqkv = (device.zeros(shape) for shape in ((T, C), (1, self.NH, T), (1, T, 3 * C)))
        self.iq, self.ik, self.iw = drawn(1, T, HI * DI), drawn(1, T, DI), drawn(1, T, HI)
        self.diq, self.dik, self.diw = (device.zeros(x.shape) for x in (self.iq, self.ik, self.iw))
        self.rows = rows_at_once(device, 1, T)
        self.scores, self.keep = device.zeros((self.rows * T,)), device.zeros((1, T), np.int32)
        self.index, self.count = (device.zeros(shape, np.int32) for shape in ((1, T, self.k), (1, T)))
        self.p = device.zeros((1, T, self.k))
        self.keep.fill(self.k)

    def dense(self) -> dict[str, Callable]:
        ops, NH = self.ops, self.NH
        return dict(
            forward=lambda: ops.attention_forward(self.out, self.lse, self.qkv, NH),
            backward=lambda: ops.attention_backward(self.dqkv, self.dout, self.qkv, self.out, self.lse, NH),
        )

    def sparse(self) -> dict[str, Callable]:
        """Of the lists that are in index and count; mean: the indexer's target."""
        ops, chosen = self.ops, (self.index, self.count, self.NH)
        return dict(
            forward=lambda: ops.sparse_attention_forward(self.out, self.lse, self.qkv, *chosen),
            backward=lambda: ops.sparse_attention_backward(self.dqkv, self.dout, self.qkv, self.out, self.lse, *chosen),
            mean=lambda: ops.sparse_attention_mean(self.p, self.qkv, self.lse, *chosen),
        )

    def select(self) -> None:
        """The indexer's scores and the choice, block by block as a model does it."""
        for first, scores in query_blocks(self.scores, 1, 0, self.T, self.rows):
            self.ops.indexer_scores_forward(scores, self.iq, self.ik, self.iw, SCALE, first)
            self.ops.select_topk(self.index, self.count, scores, self.keep, first)

    def learning(self) -> dict[str, Callable]:
        """The indexer's scores of the keys in the lists, and its gradients."""
        ops, inputs = self.ops, (self.iq, self.ik, self.iw, self.index, self.count, SCALE)
        grads = self.diq, self.dik, self.diw, self.p
        return dict(
            scores=lambda: ops.indexer_gathered_forward(self.p, *inputs),
            gradients=lambda: ops.indexer_gathered_backward(*grads, *inputs),
        )


def rows_of_length(device, C: int, T: int, repeats: int) -> tuple[list[str], str]:
    """Rows of the table of attention, and the row of the indexer's."""
    layer, rows, forms = Layer(device, C, T), [], list(FORMS)
    for kind in KINDS:
        index, count = lists(kind, T, layer.k)
        device.copy_in(layer.index, index)
        device.copy_in(layer.count, count)
        calls = {f"dense {part}": call for part, call in layer.dense().items()}
        for part, call in layer.sparse().items():  # a pass has what the one before it left
            calls |= {f"{name} {part}": within(name, call) for name in forms}
        ms = medians(device, calls, repeats)
        cells = [f"{T}, {kind}", f"{share_of_pairs(index):.2f}"]
        cells += [f"{ms['dense forward']:.2f} + {ms['dense backward']:.2f}"]
        cells += [
            f"{ms[f'{name} forward']:.2f} + {ms[f'{name} backward']:.2f}, {ms[f'{name} mean']:.2f}" for name in forms
        ]
        rows.append(f"| {' | '.join(cells)} |")
    calls = dict(select=layer.select)
    for part, call in layer.learning().items():
        calls |= {f"{name} {part}": within(name, call) for name in forms}
    ms = medians(device, calls, repeats)
    learning = (f"{ms[f'{name} scores']:.2f} + {ms[f'{name} gradients']:.2f}" for name in forms)
    return rows, f"| {T} | {ms['select']:.2f} | {' | '.join(learning)} |"


def main(argv: list[str] | None = None) -> int:
    parser = ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--lengths", default=",".join(map(str, LENGTHS)), help="lengths T of a sequence")
    add("--channels", type=positive_int, default=CHANNELS, help=f"C, a multiple of {HEAD}")
    add("--repeats", type=positive_int, default=9, help="turns that count")
    add("--tf32", type=flag01, default=True, help="0: products in 3xTF32, or on CUDA cores")
    add("--device", choices=("auto", "cuda", "cpu"), default="cuda", help="auto: nothing is done without a GPU")
    args = parser.parse(argv)
    try:
        lengths = [int(word) for word in args.lengths.split(",")]
    except ValueError:
        raise UserError(f"--lengths {args.lengths}: expected numbers like 1024,4096", None, 2) from None
    if args.channels % HEAD:
        raise UserError(f"--channels {args.channels}: expected a multiple of {HEAD}", f"--channels {CHANNELS}", 2)
    device = kernels.open_device(args.device)
    on_gpu = device is not kernels.cpu
    if args.device == "auto" and not on_gpu:
        print("no GPU: its table of sparse attention is not made")
        return 0
    device = kernels.open_device("cuda", args.tf32) if on_gpu else device
    card = card_name(device.describe()) if on_gpu else device.describe()
    attention = [f"| T, lists | u | dense | {' | '.join(FORMS)} |", "|---|" + "---:|" * 4]
    learning = [f"| T | scores and selection | {' | '.join(FORMS)} |", "|---|" + "---:|" * 3]
    for T in lengths:
        rows, row = rows_of_length(device, args.channels, T, args.repeats)
        print("\n".join([*rows, row]), flush=True)
        attention += rows
        learning.append(row)
    precision = "TF32" if device.tf32 else "float32"
    text = (
        f"C = {args.channels}, heads of {HEAD}, k = {K}, {precision}; milliseconds forward + backward, and the mean of "
        f"the heads; medians of {args.repeats} turns.\n\n{chr(10).join(attention)}\n\nThe indexer, {HI} heads of {DI}; "
        f"of selected keys, scores + gradients:\n\n{chr(10).join(learning)}"
    )
    print(f"\n{text}")
    if on_gpu and (lengths, args.channels) == ([*LENGTHS], CHANNELS):
        title = f"{card}, {datetime.date.today().isoformat()}, {precision}: make bench_sparse"
        turns.write_section(title, text, PAGE)
    return 0


if __name__ == "__main__":
    run(main)
