"""Draw the band's weights before and after training.

    make train_banded
    python experiments/draw_band.py -e checkpoint.bin --before model.bin --layer 0

Left and middle: the size of the weights before and after. Right: their root mean square across the band, by how far a
hidden unit lies from the middle of its channel.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))  # so that it runs from any folder
if __name__ == "__main__":
    from llmc import startup

    startup.begin()

from pathlib import Path

import numpy as np

from experiments.report import figure
from kernels.cpu.band.band_mask import band_mask
from llmc.checkpoint import BANDED, named_views, read_model, tensor_shapes
from llmc.cli import ArgumentParser, natural
from llmc.errors import UserError, run
from systems.band import read_band


def weights_of(path: str, layer: int, band) -> dict[str, np.ndarray]:
    """FC1 (4C,C) and FC2 (4C,C), transposed so that rows are hidden units in both; masked as a run begins."""
    file = read_model(path)
    views = named_views(file.params, tensor_shapes(file.config))
    found = {}
    for name, width, place in (("fcw", band.fc1, band.place(file.config.C)), ("fcprojw", band.fc2, None)):
        weight = views[name].copy()
        if width:
            band_mask(weight, width, place)
        found[name] = weight[layer] if name == "fcw" else weight[layer].T
    return found


def along_the_band(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(offsets, root mean square): of the weights whose hidden unit lies so far from the middle of its channel, 4i."""
    units, channels = np.indices(weight.shape)
    offset = units - 4 * channels
    kept = weight != 0
    offsets = np.unique(offset[kept])
    squares = np.array([np.mean(weight[kept & (offset == each)] ** 2) for each in offsets])
    return offsets, np.sqrt(squares)


def draw(path: Path, before: dict, after: dict, layer: int) -> None:
    names = {"fcw": "FC1", "fcprojw": "FC2, transposed"}
    with figure(path, 2, 3, 3.6, 3.2) as axes:
        for row, (name, label) in zip(axes, names.items()):
            most = np.quantile(np.abs(after[name][after[name] != 0]), 0.99)
            for axis, when, weight in ((row[0], "before", before[name]), (row[1], "after", after[name])):
                axis.imshow(np.abs(weight), cmap="Greys", vmin=0, vmax=most, aspect="auto", interpolation="nearest")
                axis.set(title=f"{label}, layer {layer}, {when}", xlabel="channel", ylabel="hidden unit")
            for style, when, weight in (("--", "before", before[name]), ("-", "after", after[name])):
                row[2].plot(*along_the_band(weight), style, color="0", linewidth=1, label=when)
            row[2].set(title="size across the band", xlabel="hidden unit less 4 x channel", ylabel="root mean square")
            row[2].set_ylim(bottom=0)


def main(argv: list[str] | None = None) -> int:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("-e", "--checkpoint", required=True, help="what train_banded.py wrote")
    add("--before", required=True, help="the model file that the run started from")
    add("--layer", type=natural, default=0, help="the layer to draw")
    add("-o", "--output", type=Path, default=Path("band_weights.png"), help="picture to write")
    args = parser.parse(argv)
    file, first = read_model(args.checkpoint), read_model(args.before)
    if file.kind != BANDED:
        raise UserError(f"{args.checkpoint}: it has no band", "train_banded.py -1 256 -2 256 -c NAME writes one")
    if first.config != file.config or args.layer >= file.config.L:
        sizes = f"{first.config}, {args.checkpoint} is {file.config}"
        raise UserError(
            f"--before {args.before} --layer {args.layer}: {sizes}", "name the file that the run began with"
        )
    band = read_band(file, args.checkpoint)
    before, after = (weights_of(path, args.layer, band) for path in (args.before, args.checkpoint))
    draw(args.output, before, after, args.layer)
    print(f"wrote {args.output}")
    return 0


if __name__ == "__main__":
    run(main)
