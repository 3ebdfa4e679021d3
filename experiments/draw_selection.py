"""Draw the keys that queries keep over dense attention: a trained indexer's, the most recent, and random ones.

    python experiments/draw_selection.py -e checkpoint_sparse.bin -j data/shakespeare/shakespeare_val.bin
    python experiments/draw_selection.py -e recall.bin -j data/recall/recall_val.bin --answers-after 256:288

The first checkpoint is that of make train_sparse_attn; the second one of tagged recall (data/recall.py), whose answers
are marked, and whose other queries are left out. A row is a query, a column a key. Grey: the probability that dense
attention gives it, mean of the heads, darkest for the query's likeliest key. Dots: keys that are selected. Rings: the
key that holds the answer. All three select from the same activations.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))  # so that it runs from any folder
if __name__ == "__main__":
    from llmc import startup

    startup.begin()

import contextlib
from dataclasses import replace
from pathlib import Path

import kernels  # before NumPy, see its docstring  # isort: skip
import numpy as np

import train_sparse_attn
from experiments.report import figure
from llmc.checkpoint import SPARSE_ATTENTION, Model, read_model
from llmc.cli import ArgumentParser, positive_int
from llmc.dataloader import DataLoader
from llmc.errors import UserError, run
from systems.selection import answers, ids, selected, sources
from systems.sparsity import read_sparsity

SELECTORS = {"indexer": "trained indexer", "recency": "the most recent keys", "random": "keys at random"}


def layers_of(path: str, file: Model, inputs: np.ndarray, selector: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """(p, mask) of each layer, both (T,T): dense attention's probabilities, and which keys `selector` takes."""
    sparsity = replace(read_sparsity(file, path), selector=selector, adaptive="none")
    B, T = inputs.shape
    device = kernels.open_device("cpu")
    with contextlib.redirect_stdout(sys.stderr):  # what is allocated
        params = np.concatenate([file.params, file.extra])
        model = train_sparse_attn.GPT2(device, file.config, sparsity, params, B, T)
        model.forward(inputs, dense=True)
    found = []
    for l, a in enumerate(model.layers):
        model.indexer.forward(l, a)
        model.selection.forward(l, a, 0, leak=False)
        p = np.zeros((B, T, T), np.float32)
        device.attention_mean(p, a.qkv, a.lse, file.config.NH, 0)
        found.append((p[0], selected(a.index, T)[0]))
    return found


def draw(path: Path, found: dict[str, list], rows: np.ndarray, source: np.ndarray) -> None:
    """found: {selector: layers_of}; rows: the queries to draw; source (T): where the answer of each is, -1: nowhere."""
    shown = np.arange(len(rows))
    with figure(path, len(next(iter(found.values()))), len(found), 4.6, 2.6) as axes:
        for column, (selector, layers) in zip(axes.T, found.items()):
            for l, (axis, (p, mask)) in enumerate(zip(column, layers)):
                p, mask = p[rows], mask[rows]
                axis.imshow(np.sqrt(p / p.max(1, keepdims=True)), cmap="Greys", vmin=0, vmax=1.6, aspect="auto")
                queries, keys = np.nonzero(mask)
                axis.plot(keys, queries, ".", color="0", ms=1.5)
                title = f"layer {l}: {SELECTORS[selector]}"
                asked = shown[source[rows] >= 0]
                if len(asked):
                    where = source[rows][asked]
                    axis.plot(where, asked, "o", color="0", ms=6, fillstyle="none", markeredgewidth=0.8)
                    title += f", {int(mask[asked, where].sum())} of {len(asked)} answers kept"
                axis.set(title=title, xlabel="key", ylabel="query" if selector == "indexer" else "")
                axis.title.set_size("medium")


def main(argv: list[str] | None = None) -> int:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("-e", "--checkpoint", required=True, help="what train_sparse_attn.py wrote, with a trained indexer")
    add("-j", "--val-data", required=True, help="pattern of the data that the sequence is taken from")
    add("-t", "--seq-len", type=positive_int, default=128, help="tokens of the sequence")
    add("--answers-after", type=ids, metavar="FIRST:END", help="ids whose next token is an answer, to be marked")
    add("-o", "--output", type=Path, default=Path("selection.png"), help="picture to write")
    args = parser.parse(argv)
    file = read_model(args.checkpoint)
    if file.kind != SPARSE_ATTENTION or read_sparsity(file, args.checkpoint).indexer != "lightning":
        raise UserError(f"{args.checkpoint}: no indexer in it", "train_sparse_attn.py --indexer-warmup 150 trains one")
    loader = DataLoader(args.val_data, 1, args.seq_len, vocab_size=file.config.V)
    inputs, targets = loader.next_batch()
    rows, source = np.arange(args.seq_len), np.full(args.seq_len, -1)
    if args.answers_after:
        asked = answers(inputs, targets, *map(int, args.answers_after.split(":")))[0]
        rows, source = np.flatnonzero(asked), np.where(asked, sources(inputs, targets)[0], -1)
        if not len(rows):
            raise UserError(f"--answers-after {args.answers_after}: no answers in {args.val_data}", "256:288 of recall")
    found = {selector: layers_of(args.checkpoint, file, inputs, selector) for selector in SELECTORS}
    draw(args.output, found, rows, source)
    print(f"wrote {args.output}")
    return 0


if __name__ == "__main__":
    run(main)
