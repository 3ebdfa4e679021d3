"""Draw a training log of -o: losses and, of a sparse run, the indexer's KL, recall@k and mass@k.

    make plot                                                       # log_sparse.txt of make train_sparse_attn
    python experiments/plot_log.py log_sparse.txt -o plot.png --mark 100

Needs matplotlib: pip install -r requirements-plot.txt
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))  # so that it runs from any folder
if __name__ == "__main__":
    from llmc import startup

    startup.begin()

import re
from pathlib import Path

from llmc.cli import ArgumentParser, natural
from llmc.errors import UserError, run
from llmc.files import atomic_write, open_file

FORMATS = (".png", ".svg", ".pdf")
LINE = re.compile(rb"s:(\d+) ([a-z]+):(\S+)\n")
PANELS = {  # title: {name in the log: label}
    "loss, nats": {"trl": "training", "tel": "validation"},
    "KL(attention || indexer), nats a query": {"kl": "mean of the layers"},
    "of dense attention, the selection has": {
        "recall": "recall@k: of its k likeliest keys",
        "mass": "mass@k: of its probability",
    },
    "answers": {"answers": "right"},
}


def read_log(path: str) -> dict[str, list[tuple[int, float]]]:
    """{name: [(step, value)]}. Raises UserError for a file without a line of a log."""
    values: dict[str, list[tuple[int, float]]] = {}
    with open_file(path) as file:
        for step, name, value in LINE.findall(file.read()):
            values.setdefault(name.decode(), []).append((int(step), float(value)))
    if not values:
        raise UserError(f"{path}: no line like s:20 tel:4.5", "name a file that -o wrote")
    return values


def draw(values: dict, path: Path, mark: int) -> None:
    """A panel for each of PANELS that the log has something of."""
    try:
        import matplotlib
    except ImportError:
        raise UserError(
            "matplotlib is not installed here", "make plot, or pip install -r requirements-plot.txt"
        ) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = {title: names for title, names in PANELS.items() if names.keys() & values.keys()}
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(4.5 * len(panels), 3.4), squeeze=False, layout="constrained"
    )
    for axis, (title, names) in zip(axes[0], panels.items()):
        for name, label in names.items():
            if points := values.get(name):
                dense = len(points) > 60
                axis.plot(*zip(*points), "-" if dense else ".-", linewidth=0.8 if dense else 1.5, label=label)
        if mark:
            axis.axvline(mark, color="0.6", linestyle=":", linewidth=1, label="end of the warm-up")
        axis.set(title=title, xlabel="step")
        axis.grid(color="0.9")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(edgecolor="none", framealpha=0.8, fontsize="small")
    with atomic_write(path) as file:
        figure.savefig(file, dpi=110, format=path.suffix[1:])


def main(argv: list[str] | None = None) -> int:
    parser = ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("log", help="a file that -o wrote")
    parser.add_argument("-o", "--output", type=Path, default=Path("plot.png"), help="picture to write")
    parser.add_argument("--mark", type=natural, default=0, help="a step to mark, as the end of the warm-up, 0: none")
    args = parser.parse(argv)
    if args.output.suffix not in FORMATS:  # the log itself, say, would be replaced by a picture
        raise UserError(f"-o {args.output}: expected a name ending in {', '.join(FORMATS)}", "-o plot.png", 2)
    draw(read_log(args.log), args.output, args.mark)
    print(f"wrote {args.output}")
    return 0


if __name__ == "__main__":
    run(main)
