"""Compare two runs of GPT-2 trainers: their printed losses, -o logs, model files or state files.

    python train_banded.py -e gpt2_124M.bin > ours.txt
    python -m llmc.diff ours.txt theirs.txt

Losses are aligned by step, whichever trainer printed them: train_gpt2.c counts steps from 0, train_gpt2_fp32.cu, the
banded C trainers, train_gpt2.cu and ours from 1, the -o logs from 0. Here a training step counts from 0, and a
validation loss belongs to the number of updates done before it.
"""

if __name__ == "__main__":
    from llmc import startup

    startup.begin()

import math
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain

import numpy as np

from llmc import checkpoint, state
from llmc.cli import ArgumentParser, natural_float
from llmc.dataloader import ShuffleState
from llmc.errors import UserError, run
from llmc.files import EXTENSION, EXTENSION_MAGIC, HEADER_BYTES, open_file

MAX_ROWS = 50
BLOCK = 1 << 20
STDOUT_TOL, LOG_TOL, PARAMETER_TOL, STATE_TOL = 2e-5, 1e-4, 1e-4, 1e-4  # a log has 4 decimals, stdout 6

NUMBER = r"([-+]?(?:\d+(?:\.\d*)?(?:[eE][-+]?\d+)?|(?i:nan|inf)))"
TRAIN = re.compile(rf"step +(\d{{1,9}})(/\d+)?(?:: train loss| \| (?:train )?loss) +{NUMBER}")
EVALUATED = re.compile(rf"(?:(val) loss|(HellaSwag): \d+/\d+ =) {NUMBER}")
LOG = re.compile(rf"s:(\d{{1,9}}) (trl|tel|eval):{NUMBER}")
RESUMED = re.compile(r"[Rr]esum\w+ .*\bstep (\d{1,9})\b")
RUN_STARTS = ("| Parameter             | Value ", "[GPT-2]")
SAMPLE_START = ["generating:", "---"]
ANSI = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b[()].")
LOG_NAMES = {"trl": "train", "tel": "val", "eval": "HellaSwag"}

EPILOG = "exit status: 0 within the tolerance, 1 past it or nothing to compare, 2 wrong usage. NaN is always past it."


@dataclass
class Input:
    """One of the two files: its path, what its first bytes say it is, and those bytes (all of them for a text)."""

    path: str
    what: str
    data: bytes

    @property
    def ours(self) -> bool:
        """Whether the header has our extension; llm.c's own files have not."""
        return int(np.frombuffer(self.data, "<i4")[EXTENSION]) == EXTENSION_MAGIC


def open_input(path: str) -> Input:
    """Recognise `path` by its magic; what has none of ours is taken for text."""
    with open_file(path) as file:
        data = file.read(HEADER_BYTES)
        magic = int.from_bytes(data[:4], "little")
        models = dict.fromkeys((checkpoint.MAGIC, checkpoint.DEEPSEEK_MAGIC), "model file")
        what = (models | {state.MAGIC: "state file"}).get(magic, "text")
        if what == "text":
            data += file.read()
    return Input(path, what, data)


# ---------------------------------------------------------------------------------------------------------------------
# losses


@dataclass
class Losses:
    """values: {(step, "val" | "HellaSwag" | "train"): loss}; rounded: whether any comes with a log's four decimals."""

    values: dict[tuple[int, str], float]
    rounded: bool


def lines_outside_samples(text: str) -> Iterator[str]:
    """The lines of a capture without colours and generated samples; what a carriage return parts counts as lines.

    A sample may hold anything, so it goes on to the last --- line before the next sample or the next run.
    """
    lines = [line.rstrip("\r").split("\r") for line in ANSI.sub("", text).split("\n")]
    last = [pieces[-1] for pieces in lines]
    bounds = [i for i in range(len(last)) if last[i : i + 2] == SAMPLE_START or last[i].startswith(RUN_STARTS)]
    at = 0
    for start, end in zip(bounds, [*bounds[1:], len(lines)]):
        yield from chain.from_iterable(lines[at:start])
        at = start
        if last[start : start + 2] == SAMPLE_START:
            ends = [i for i in range(start + 2, end) if last[i] == "---"]
            at = ends[-1] + 1 if ends else end  # none: killed while sampling
    yield from chain.from_iterable(lines[at:])


def parse_losses(text: str) -> Losses:
    """All losses of a stdout capture, a log, or both in one; of a repeated step the last counts."""
    printed, logged = {}, {}
    waiting = {}  # printed before its step's line: it belongs to the step that follows, or to the end of the run
    done = 0

    def settle(step):
        printed.update({(step, name): value for name, value in waiting.items()})
        waiting.clear()

    for line in lines_outside_samples(text):
        if match := TRAIN.match(line):
            step = int(match[1]) - bool(match[2])  # step 0 of train_gpt2.c, step 1/N of all others
            settle(step)
            printed[step, "train"], done = float(match[3]), step + 1
        elif match := EVALUATED.match(line):
            name = match[1] or match[2]
            if name in waiting:
                settle(done)
            waiting[name] = float(match[3])
        elif match := LOG.match(line):
            logged[int(match[1]), LOG_NAMES[match[2]]] = float(match[3])
        elif match := RESUMED.match(line):
            settle(done)
            done = int(match[1])
    settle(done)
    return Losses(logged | printed, rounded=not logged.keys() <= printed.keys())


def read_losses(source: Input) -> Losses:
    """The losses of a text file. Raises UserError if it holds none."""
    losses = parse_losses(source.data.decode("utf-8", "replace"))
    if not losses.values:
        raise UserError(
            f"{source.path}: no losses found, expected a trainer's stdout, an -o log, a model file or a state file",
            "capture one: python train_banded.py > run.txt",
        )
    return losses


def steps_text(keys) -> str:
    """{(3, "train"), (4, "train"), (4, "val")} -> "2 train (steps 3..4), 1 val (step 4)"."""
    parts = []
    for name in ("train", "val", "HellaSwag"):
        steps = [step for step, other in keys if other == name]
        if steps:
            span = f"step {steps[0]}" if len(steps) == 1 else f"steps {min(steps)}..{max(steps)}"
            parts.append(f"{len(steps)} {name} ({span})")
    return ", ".join(parts)


def loss_difference(a: float, b: float) -> float:
    """|a - b| without float64's rounding of printed decimals; inf if either is not finite."""
    return round(abs(a - b), 10) if math.isfinite(a) and math.isfinite(b) else math.inf


def compare_losses(a: Input, b: Input, tol: float | None) -> bool:
    """Print how the losses of two texts differ; True if none by more than `tol`. Raises UserError without common steps.

    tol: by default 2e-5, which rounding in another order stays within; 1e-4 if either is a log.
    """
    losses_a, losses_b = read_losses(a), read_losses(b)
    if tol is None:
        tol = LOG_TOL if losses_a.rounded or losses_b.rounded else STDOUT_TOL
    values_a, values_b = losses_a.values, losses_b.values
    print(f"A: {a.path}: {steps_text(values_a)}\nB: {b.path}: {steps_text(values_b)}")
    common = sorted(values_a.keys() & values_b.keys(), key=lambda key: (key[0], key[1] == "train", key[1]))
    if not common:
        raise UserError(f"{a.path} and {b.path} have no step in common", "compare runs over the same steps")
    differences = {key: loss_difference(values_a[key], values_b[key]) for key in common}
    show_losses(differences, values_a, values_b, tol)
    for name, only in (("A", values_a.keys() - values_b.keys()), ("B", values_b.keys() - values_a.keys())):
        if only:
            print(f"only in {name}: {steps_text(only)}")
    worst = max(common, key=differences.get)
    past = sum(difference > tol for difference in differences.values())
    print(f"{len(common)} losses compared, largest difference {differences[worst]:.1e}: {worst[1]}, step {worst[0]}")
    return verdict(past, len(common), "losses", tol)


def show_losses(differences: dict, values_a: dict, values_b: dict, tol: float) -> None:
    """Print the losses that differ, in their order; of more than MAX_ROWS the largest differences."""
    different = [key for key, difference in differences.items() if difference > 0]
    largest = set(sorted(different, key=differences.get, reverse=True)[:MAX_ROWS])
    rows = []
    for step, name in filter(largest.__contains__, different):
        key = step, name
        rows.append((name, str(step), f"{values_a[key]:f}", f"{values_b[key]:f}", amount(differences[key], tol)))
    if rows:
        show(("loss", "step", "A", "B", "difference"), rows)
    if len(different) > len(rows):
        print(f"... and {len(different) - len(rows)} differences no larger than these")


# ---------------------------------------------------------------------------------------------------------------------
# model files and state files


@dataclass
class Difference:
    """Of two arrays: largest and mean |a - b|, the position of the largest, and the two values there."""

    name: str
    size: int
    largest: float
    mean: float
    at: str
    a: float
    b: float


def compare_arrays(name: str, a: np.ndarray, b: np.ndarray) -> Difference:
    """Two arrays of one shape, elementwise; what is not finite in either counts as an infinite difference."""
    with np.errstate(invalid="ignore", over="ignore"):
        difference = np.abs(a - b)
    difference[~np.isfinite(difference)] = np.inf
    at = np.unravel_index(np.argmax(difference), a.shape)
    mean = float(difference.mean(dtype=np.float64))
    position = f"[{','.join(str(int(i)) for i in at)}]"
    return Difference(name, a.size, float(difference[at]), mean, position, float(a[at]), float(b[at]))


def show_arrays(arrays: list[Difference], tol: float, unequal: Sequence[str]) -> bool:
    """Print a row for each array and the verdict; `unequal` names the fields that should be equal and are not."""
    show(
        ("array", "A", "B", "max difference", "mean", "at"),
        [(x.name, f"{x.a:.6g}", f"{x.b:.6g}", amount(x.largest, tol), f"{x.mean:.1e}", x.at) for x in arrays],
    )
    worst = max(arrays, key=lambda x: x.largest)
    count = sum(x.size for x in arrays)
    print(f"{count} values compared, largest difference {worst.largest:.1e}: {worst.name}{worst.at}")
    return verdict(sum(x.largest > tol for x in arrays), len(arrays), "arrays", tol, unequal)


def show_fields(a: dict, b: dict) -> list[str]:
    """Print the fields that differ; returns their names."""
    names = [name for name in a | b if a.get(name) != b.get(name)]
    if names:
        show(("field", "A", "B"), [(name, str(a.get(name, "-")), str(b.get(name, "-"))) for name in names])
    return names


def compare_models(a: Input, b: Input, tol: float | None) -> bool:
    """Print how two model files differ, header and tensors; True if the sizes are equal and no parameter is past `tol`.

    step, shard, sample, kind and its fields must be equal, too, if both files have our header extension: llm.c's own
    leave them out. float32 and bfloat16 files are compared by value.
    """
    models = [checkpoint.read_model(source.path) for source in (a, b)]
    print(f"A: {a.path}: model file\nB: {b.path}: model file")
    different = show_fields(*map(model_fields, models))
    shapes_a, shapes_b = (checkpoint.tensor_shapes(model.config) for model in models)
    if shapes_a != shapes_b:
        print("DIFFERENT: tensors of different shapes, nothing to compare")
        return False
    counted = {"V", "NH"} if not (a.ours and b.ours) else set(different) - {"version"}
    unequal = [name for name in different if name in counted]
    if len(unequal) < len(different):
        print(f"not counted: {', '.join(name for name in different if name not in counted)}")
    views_a, views_b = (checkpoint.named_views(model.params, shapes_a) for model in models)
    arrays = [compare_arrays(name, views_a[name], views_b[name]) for name in shapes_a]
    if models[0].extra.size == models[1].extra.size > 0:
        arrays.append(compare_arrays("extra", models[0].extra, models[1].extra))
    return show_arrays(arrays, PARAMETER_TOL if tol is None else tol, unequal)


def model_fields(model: checkpoint.Model) -> dict:
    """What the header of a model file says; of the kind's fields those that are not 0."""
    named = {"version": model.version} | asdict(model.config)
    named |= {"step": model.step, "shard": model.shard, "sample": model.sample, "kind": model.kind}
    named |= {f"field {i}": value for i, value in enumerate(model.fields) if value}
    return named | {"extra values": model.extra.size}


def compare_states(a: Input, b: Input, tol: float | None) -> bool:
    """Print how two state files differ; True if m and v are within `tol` and all else but the options is equal."""
    states = [state.read_state(source.path, num_parameters(source)) for source in (a, b)]
    print(f"A: {a.path}: state file\nB: {b.path}: state file")
    unequal = show_fields(*map(state_fields, states))
    options = show_fields(*(one.options for one in states))
    if options:
        print(f"not counted: {', '.join(options)}")
    if states[0].m.size != states[1].m.size:
        print(f"DIFFERENT: states of {states[0].m.size} and {states[1].m.size} parameters, nothing to compare")
        return False
    arrays = [compare_arrays(name, getattr(states[0], name), getattr(states[1], name)) for name in ("m", "v")]
    return show_arrays(arrays, STATE_TOL if tol is None else tol, unequal)


def state_fields(one: state.TrainState) -> dict:
    """All of a state but m, v and the options; arrays as length and checksum."""
    names = ("rank", "num_processes", "step", "rng_state", "shard", "sample")
    return {name: getattr(one, name) for name in names} | shuffle_fields(one.shuffle)


def shuffle_fields(shuffle: ShuffleState | None) -> dict:
    if shuffle is None:
        return {"shuffle": 0}
    arrays = {name: getattr(shuffle, name) for name in ("shard_indices", "intra_shard_indices", "mt_key")}
    sums = {name: f"{x.size} numbers, crc {zlib.crc32(x.tobytes()):08x}" for name, x in arrays.items()}
    return {"shuffle": 1, "mt_pos": shuffle.mt_pos} | sums


def num_parameters(source: Input) -> int:
    """How many parameters a state file is for, which its header does not tell: m and v are what the rest leaves.

    Checks nothing: what is wrong with the file, read_state says.
    """
    if len(source.data) < HEADER_BYTES:
        return 0
    header = np.frombuffer(source.data, "<i4")
    shuffled = header[5] == 1
    rest = (max(0, int(header[EXTENSION + 2])) if source.ours else 0) + shuffled * state.MERSENNE.itemsize
    count = (os.path.getsize(source.path) - HEADER_BYTES - rest) // 4
    if count <= 0:
        return 0
    ints = np.memmap(source.path, "<i4", mode="r", offset=HEADER_BYTES, shape=(count,))
    if shuffled:
        for _ in ("intra_shard_indices", "shard_indices"):
            ints = ints[: max(0, len(ints) - trailing_permutation(ints) - 2)]
    return len(ints) // 2


def trailing_permutation(ints: np.ndarray) -> int:
    """The length k of the permutation of 0..k-1 that ends `ints` and follows its own length as a uint64; 0 if none.

    No part of it looks like that: its end would follow the 0 of a uint64's upper half and hold another 0.
    """
    for end in range(len(ints) - 1, 0, -BLOCK):
        at = np.arange(max(0, end - BLOCK), end)
        lengths = len(ints) - 2 - at
        for i in at[(ints[at] == lengths) & (ints[at + 1] == 0) & (lengths > 0)][::-1]:
            if np.array_equal(np.sort(ints[i + 2 :]), np.arange(len(ints) - 2 - i)):
                return int(len(ints) - 2 - i)
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# output


def amount(difference: float, tol: float) -> str:
    """A difference, marked if it is past `tol`."""
    return f"{difference:.1e}{' *' if difference > tol else '  '}"


def show(headings: Sequence[str], rows: list[tuple[str, ...]]) -> None:
    """Print a table, its columns flush right."""
    widths = [max(map(len, column)) for column in zip(headings, *rows)]
    for row in (headings, *rows):
        print("  ".join(text.rjust(width) for text, width in zip(row, widths)).rstrip())


def verdict(past: int, count: int, what: str, tol: float, unequal: Sequence[str] = ()) -> bool:
    """Print the last line; True if nothing is past `tol` and no field unequal."""
    found = [f"{past} of {count} {what} past {tol:g}"] if past else []
    found += [f"{', '.join(unequal)} unequal"] if unequal else []
    print(f"DIFFERENT: {'; '.join(found)}" if found else f"the same within {tol:g}")
    return not found


def main() -> int:
    parser = ArgumentParser(prog="python -m llmc.diff", description=__doc__, epilog=EPILOG)
    parser.add_argument("A", help="stdout capture, -o log, model file or state file; recognised by content")
    parser.add_argument("B", help="what to compare it with: a stdout or a log with either, the others with their like")
    parser.add_argument(
        "--tol",
        type=natural_float,
        help="largest absolute difference that passes (default: 2e-5 for stdout, 1e-4 for logs, models and states)",
    )
    args = parser.parse()
    a, b = open_input(args.A), open_input(args.B)
    if a.what != b.what:
        parser.error(f"{a.path} holds a {a.what}, {b.path} a {b.what}; expected two of one sort")
    compare = {"text": compare_losses, "model file": compare_models, "state file": compare_states}[a.what]
    return 0 if compare(a, b, args.tol) else 1


if __name__ == "__main__":
    run(main)
