"""What the experiments' tables share: results by their settings, cells with intervals, Markdown; how figures look."""

import io
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from experiments.stats import Interval, detectable, mean_interval
from llmc.errors import UserError
from llmc.files import atomic_write

STYLES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D", "v", "x", "*")


def pick(runs: list[dict], **settings) -> list[dict]:
    """The results with these settings, in the order of their seeds."""
    return [each for each in runs if all(each["settings"].get(name) == value for name, value in settings.items())]


def values(runs: list[dict], name: str) -> list:
    """The values that a setting takes, in the order of the runs."""
    return list(dict.fromkeys(each["settings"][name] for each in runs if name in each["settings"]))


def final(run: dict) -> float:
    """The last validation loss; infinite if the run diverged."""
    return float("inf") if run["diverged"] else run["val_loss"][-1][1]


def losses(runs: list[dict], value: Callable[[dict], float] = final, **settings) -> np.ndarray:
    """(n): the last validation loss, or another `value`, of each seed's run with these settings."""
    return np.array([value(each) for each in pick(runs, **settings)])


# ----------------------------------------------------------------------------------------------------------------------
# cells


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Markdown; all columns but the first are figures."""
    header = list(header)
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def plain(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Markdown; all columns are text."""
    header = list(header)
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in [header, ["---"] * len(header), *rows])


def shown(interval: Interval, digits: int = 4, unit: str = "", sign: str = "") -> str:
    """2.1034 [2.1001, 2.1067]"""
    if not np.isfinite(interval.mean):
        return "diverged"
    text = f"{interval.mean:{sign}.{digits}f}{unit}"
    return (
        text
        if np.isnan(interval.low)
        else f"{text} [{interval.low:{sign}.{digits}f}, {interval.high:{sign}.{digits}f}]"
    )


def cell(numbers, digits: int = 4) -> str:
    """Mean and half the width of its 95 % interval: 2.1034 ± 0.0033."""
    interval = mean_interval(numbers)
    if not np.isfinite(interval.mean):
        return "diverged"
    return f"{interval.mean:.{digits}f}" + ("" if np.isnan(interval.low) else f" ± {interval.half:.{digits}f}")


def percent(arm, base) -> Interval:
    """By how many per cent the arm's loss is above the base's, seed by seed."""
    return mean_interval(100 * (np.asarray(arm) / np.asarray(base) - 1))


def delta(arm, base) -> str:
    """+1.07 % [+0.90, +1.24]"""
    return shown(percent(arm, base), 2, " %", "+")


def verdict(differences, above: str, below: str, unit: str = "", digits: int = 2) -> str:
    """What paired differences show: `above` or `below` 0, or no difference and the size that would have been found."""
    interval = mean_interval(differences)
    text = shown(interval, digits, unit, "+")
    if not np.isfinite(interval.mean):
        return "a run diverged"
    if np.isnan(interval.low):
        return f"{text} of one seed, which shows nothing"
    if interval.excludes(0):
        return f"{above if interval.mean > 0 else below}: {text}"
    size = f"{detectable(differences):.{digits}f}{unit}"  # with power 0.8
    return f"no difference found: {text}, {size} would have been"


def claims(rows: Iterable[tuple[str, str, str]]) -> str:
    """The table of published claims: claim, what we find, why it differs."""
    return plain(("published claim", "what we find", "why it differs"), rows)


# ----------------------------------------------------------------------------------------------------------------------
# figures


@contextmanager
def figure(path: Path, rows: int = 1, columns: int = 1, width: float = 4.6, height: float = 3.4):
    """Axes (rows, columns) of a figure that is written to `path`; it reads in black and white."""
    try:
        import matplotlib
    except ImportError:
        hint = "pip install -r requirements-experiments.txt"
        raise UserError("matplotlib is not installed here", hint) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = (width * columns, height * rows)
    drawn, axes = pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    yield axes
    for axis in axes.flat:
        if not axis.images:
            axis.grid(color="0.92")
            axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        if axis.get_legend_handles_labels()[1]:
            axis.legend(edgecolor="none", framealpha=0.8, fontsize="small")
    from PIL import Image  # comes with matplotlib

    buffer = io.BytesIO()
    drawn.savefig(buffer, dpi=90, format="png")
    pyplot.close(drawn)
    with atomic_write(path) as file:  # 16 shades of grey, a fifth of the bytes
        Image.open(buffer).convert("L").quantize(16).save(file, format="png", optimize=True)


def line(axis, x, by_seed, number: int, label: str) -> None:
    """The mean of by_seed (n, points) over x, each seed a thin line, told from others by its dashes and marker."""
    shade = ("0", "0.35", "0.55")[number % 3]
    style = dict(color=shade, linestyle=STYLES[number % len(STYLES)])
    for each in by_seed:
        axis.plot(x, each, linewidth=0.5, alpha=0.5, **style)
    axis.plot(
        x, np.mean(by_seed, axis=0), linewidth=1.8, marker=MARKERS[number % len(MARKERS)], ms=4, label=label, **style
    )
