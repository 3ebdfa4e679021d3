"""Draw a torus: how far tokens are on the ring, what the distance takes off a score, and how platters are mixed.

    make train_toroidal
    python experiments/draw_torus.py -e checkpoint_toroidal.bin -t 128

Left: the distance between two tokens on the ring, for the keys that a query sees. Middle: what each head takes off a
score by it. Right: the matrix that mixes the platters of a layer's heads, the identity at first by default.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))  # so that it runs from any folder
if __name__ == "__main__":
    from llmc import startup

    startup.begin()

from pathlib import Path

import numpy as np

from experiments.report import STYLES, figure
from kernels.cpu.torus.fusion_matrix import FUSIONS, fusion_matrix_forward
from kernels.cpu.torus.torus_attention import ring_distance
from llmc.checkpoint import TOROIDAL, named_views, read_model
from llmc.cli import ArgumentParser, positive_int
from llmc.errors import UserError, run
from systems.torus import Torus, extra_shapes, read_torus


def distances(T: int, P: int, window: int) -> np.ndarray:
    """(T,T): ds = min(r, P - r) / P of query i and key j <= i, NaN for keys that it does not see."""
    lag = np.arange(T)[:, None] - np.arange(T)
    ring = ring_distance(lag, P)
    seen = (lag >= 0) & (window < 0 or ring <= window)
    return np.where(seen, ring / P, np.nan)


def mixing(torus: Torus, extra: dict, i: int) -> np.ndarray:
    """omega (D,D) of replaced layer number i."""
    omega = np.zeros((torus.depth, torus.depth), np.float32)
    factors = (extra["fuse1"][i], extra["fuse2"][i]) if "fuse1" in extra else (None, None)
    fusion_matrix_forward(omega, *factors, FUSIONS.index(torus.fusion))
    return omega


def draw(path: Path, torus: Torus, extra: dict, T: int) -> None:
    n = len(torus.layers)
    lags = np.arange(T)
    ring = ring_distance(lags, torus.period) / torus.period
    with figure(path, n, 3, 3.8, 3.2) as axes:
        for i, (layer, row) in enumerate(zip(torus.layers, axes)):
            near, bias, mix = row
            image = near.imshow(distances(T, torus.period, torus.window), cmap="Greys", vmin=0, vmax=0.5)
            near.figure.colorbar(image, ax=near, shrink=0.8)
            near.set(title=f"distance, ring of {torus.period}", xlabel="key", ylabel="query")
            for h, weight in enumerate(extra["lams"][i]):
                shade = dict(color=("0", "0.45")[h // 4 % 2], linestyle=STYLES[h % 4])
                bias.plot(lags, -weight * ring, linewidth=1.2, label=f"head {h}", **shade)
            bias.set(title=f"layer {layer}: added to a score", xlabel="tokens back")
            omega = mixing(torus, extra, i)
            mix.imshow(np.abs(omega), cmap="Greys", vmin=0, vmax=max(1.0, float(np.abs(omega).max())))
            for (k, other), value in np.ndenumerate(omega):
                color = "white" if abs(value) > 0.5 else "black"
                mix.text(other, k, f"{value:.2f}", ha="center", va="center", color=color, size=8)
            mix.set(title=f"layer {layer}: mixing, {torus.fusion}", xlabel="platter behind", ylabel="platter before")
            mix.set_xticks(range(torus.depth))
            mix.set_yticks(range(torus.depth))


def main(argv: list[str] | None = None) -> int:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("-e", "--checkpoint", required=True, help="what train_toroidal.py wrote")
    add("-t", "--seq-len", type=positive_int, default=128, help="tokens to draw")
    add("-o", "--output", type=Path, default=Path("torus.png"), help="picture to write")
    args = parser.parse(argv)
    file = read_model(args.checkpoint)
    if file.kind != TOROIDAL:
        raise UserError(f"{args.checkpoint}: no layer is toroidal", "train_toroidal.py --layers 0 -c NAME writes one")
    torus = read_torus(file, args.checkpoint)
    draw(args.output, torus, named_views(file.extra, extra_shapes(file.config, torus)), args.seq_len)
    print(f"wrote {args.output}")
    return 0


if __name__ == "__main__":
    run(main)
