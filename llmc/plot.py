"""Draw -o logs: losses and, of sparse runs, the indexer's KL, recall@k and mass@k.

    make plot                                                          # log_sparse.txt of make train_sparse_attn
    python -m llmc.plot log_sparse.txt -o plot.png --mark 100
    python -m llmc.plot log_dense.txt log_sparse.txt -o plot.png       # several runs on one axis

The training loss is drawn twice: every step, thin, and the mean of --smooth steps around each. Validations are points.
llm.c's own main.log can be read, too. Needs matplotlib: pip install -r requirements-plot.txt
"""

if __name__ == "__main__":
    from llmc import startup

    startup.begin()

import re
from pathlib import Path

import numpy as np

from llmc.cli import ArgumentParser, natural, positive_int
from llmc.errors import UserError, run
from llmc.files import atomic_write, open_file

FORMATS = (".png", ".svg", ".pdf")
LINE = re.compile(rb"s:(\d+) ([a-z]+):(\S+)[^\n]*\n")
PANELS = {  # title: {name in the log: label}
    "loss, nats": {"trl": "training", "tel": "validation"},
    "KL(attention || indexer), nats a query": {"kl": "mean of the layers"},
    "of dense attention, the selection has": {
        "recall": "recall@k: of its k likeliest keys",
        "mass": "mass@k: of its probability",
    },
    "answers": {"answers": "right"},
}
DASHES = ("-", "--", ":", "-.")  # a run's, so that a page without colours tells them apart
MARKERS = ("o", "s", "^", "D", "v")


def read_log(path: str) -> dict[str, list[tuple[int, float]]]:
    """{name: [(step, value)]}. Raises UserError for a file without a line of a log."""
    values: dict[str, list[tuple[int, float]]] = {}
    with open_file(path) as file:
        for step, name, value in LINE.findall(file.read()):
            values.setdefault(name.decode(), []).append((int(step), float(value)))
    if not values:
        raise UserError(f"{path}: no line like s:20 tel:4.5", "name a file that -o wrote")
    return values


def smoothed(values: list[float], width: int) -> np.ndarray:
    """The mean of the `width` values around each, of fewer at the ends."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    first, end = np.maximum(at - (width - 1) // 2, 0), np.minimum(at + width // 2 + 1, len(values))
    return (sums[end] - sums[first]) / (end - first)


def run_name(path: str) -> str:
    """log_fc1_w64.txt -> "fc1 w64"."""
    return Path(path).stem.removeprefix("log_").replace("_", " ")


def draw(logs: dict[str, dict], path: Path, mark: int = 0, smooth: int = 20) -> None:
    """{name of a run: read_log's values} -> a panel for each of PANELS that a log has something of."""
    try:
        import matplotlib
    except ImportError:
        raise UserError(
            "matplotlib is not installed here", "make plot, or pip install -r requirements-plot.txt"
        ) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    there = {name for log in logs.values() for name in log}
    panels = {title: names for title, names in PANELS.items() if names.keys() & there}
    size = (4.5 * len(panels), 3.4)
    figure, axes = pyplot.subplots(1, len(panels), figsize=size, squeeze=False, layout="constrained")
    for axis, (title, names) in zip(axes[0], panels.items()):
        for number, (run_label, log) in enumerate(logs.items()):
            for place, (name, label) in enumerate(names.items()):
                if points := log.get(name):  # a colour a run, or of a single run one a line
                    color = f"C{number if len(logs) > 1 else place}"
                    whose = f"{run_label}: {label}" if len(logs) > 1 else label
                    draw_points(axis, name, *zip(*points), number, color, whose, smooth)
        if mark:
            axis.axvline(mark, color="0.6", linestyle=":", linewidth=1, label="end of the warm-up")
        axis.set(title=title, xlabel="step")
        axis.grid(color="0.9")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(edgecolor="none", framealpha=0.8, fontsize="small")
    with atomic_write(path) as file:
        figure.savefig(file, dpi=110, format=path.suffix[1:])
    pyplot.close(figure)


def draw_points(axis, name: str, steps, values, number: int, color: str, label: str, smooth: int) -> None:
    """One line of run `number`; a training loss thin and smoothed."""
    dashes, marker = DASHES[number % len(DASHES)], MARKERS[number % len(MARKERS)]
    if name == "trl" and len(values) > smooth > 1:
        axis.plot(steps, values, color=color, linewidth=0.4, alpha=0.5)
        label = f"{label}, mean of {smooth} steps"
        axis.plot(steps, smoothed(values, smooth), dashes, color=color, linewidth=1.5, label=label)
    elif name == "trl":
        axis.plot(steps, values, dashes, color=color, linewidth=1, label=label)
    else:
        axis.plot(steps, values, dashes, color=color, marker=marker, markersize=4, linewidth=0.8, label=label)


def main(argv: list[str] | None = None) -> int:
    parser = ArgumentParser(prog="python -m llmc.plot", description=__doc__)
    parser.add_argument("logs", nargs="+", metavar="LOG", help="files that -o wrote")
    parser.add_argument("-o", "--output", type=Path, default=Path("plot.png"), help="picture to write")
    parser.add_argument("--mark", type=natural, default=0, help="a step to mark, as the end of the warm-up, 0: none")
    parser.add_argument("--smooth", type=positive_int, default=20, help="steps in a mean of the training loss")
    args = parser.parse(argv)
    if args.output.suffix not in FORMATS:  # the log itself, say, would be replaced by a picture
        raise UserError(f"-o {args.output}: expected a name ending in {', '.join(FORMATS)}", "-o plot.png", 2)
    names = [run_name(log) for log in args.logs]
    if len(set(names)) < len(names):
        names = args.logs
    draw({name: read_log(log) for name, log in zip(names, args.logs)}, args.output, args.mark, args.smooth)
    print(f"wrote {args.output}")
    return 0


if __name__ == "__main__":
    run(main)
