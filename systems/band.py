"""Banded MLPs: the bands of a run, the fields by which the header of its file keeps them, and its rows of the table.

The fields behind kind BANDED, all int32:

    bandwidth of FC1, bandwidth of FC2, whether --band-init fan-in scaled the weights, --permute's seed, its generator
"""

from argparse import Namespace
from dataclasses import dataclass, replace

import numpy as np

from kernels.cpu.band.band_mask import band_count, band_fan_in, band_mask
from llmc import table
from llmc.checkpoint import BANDED, DENSE, GPT2Config, Model, check_trains, named_views, tensor_shapes
from llmc.cli import refuse
from llmc.errors import UserError
from llmc.header import Field, read_fields, write_fields
from llmc.rand import permutation

DEFAULT = 256  # FC1's bandwidth where neither a flag nor the file says another
GENERATORS = ("numpy", "mersenne")  # default_rng, in older files; llm.c's Mersenne Twister
FIELDS = (
    Field("fc1", range(2**31), "FC1 bandwidth"),
    Field("fc2", range(2**31), "FC2 bandwidth"),
    Field("fan_in", bool, "fan-in init"),
    Field("permute", range(2**31), "seed of the hidden units' order"),
    Field("generator", GENERATORS, "generator of the hidden units' order"),
)
HINT = "train it again from its model file"
BY_W, BY_12, INIT = {"bandwidth", "dense"}, {"fc1_bandwidth", "fc2_bandwidth"}, {"mask_init", "band_init", "permute"}


@dataclass(frozen=True)
class Band:
    """fc1, fc2: bandwidths in the 4C-wide space, 0 is dense; fan_in: the initial weights were scaled to the band's.

    permute: seed of the order in which FC1's band lies over the hidden units, 0 is their own; generator: what drew it.
    """

    fc1: int = 0
    fc2: int = 0
    fan_in: bool = False
    permute: int = 0
    generator: str = "mersenne"

    @property
    def dense(self) -> bool:
        return not (self.fc1 or self.fc2)

    def place(self, C: int) -> np.ndarray | None:
        """The place (4C) int32 of each hidden unit along FC1's band, None if that is its own number."""
        if not self.permute:
            return None
        if self.generator == "numpy":  # NumPy may change this stream, and then check_in_band refuses the file
            order = np.random.default_rng(self.permute).permutation(4 * C)
        else:
            order = permutation(4 * C, self.permute)
        return np.argsort(order).astype(np.int32)  # order[p] is the unit at place p

    def header(self) -> tuple[int, tuple[int, ...]]:
        """The kind and the fields that a model file's header keeps."""
        return (DENSE, ()) if self.dense else (BANDED, write_fields(FIELDS, self))


NO_BAND = Band()


def read_band(file: Model, path: str) -> Band:
    """The bands of a model file. Raises UserError for a field out of its range."""
    if file.kind != BANDED:
        return NO_BAND
    return Band(**read_fields(FIELDS, file.fields, path, HINT))


def choose_band(args: Namespace, typed: set[str], file: Model) -> Band:
    """The bands of a run: what was typed, else the file's, else DEFAULT for FC1.

    typed: the names of the flags that were given. Scales the file's weights for --band-init fan-in. Raises UserError
    for flags that do not go together, and for a banded file whose weights are not all in its bands.
    """
    check_trains(args.model, file, "train_banded.py")
    old = read_band(file, args.model)
    if args.resume:
        chosen = old
    elif typed & BY_12:
        chosen = replace(old, fc1=args.fc1_bandwidth or 0, fc2=args.fc2_bandwidth or 0)
    elif args.dense:
        chosen = NO_BAND
    elif args.bandwidth is not None:
        chosen = replace(old, fc1=max(args.bandwidth, 1), fc2=0)  # -w 0 keeps the centres alone, and so does 1
    else:
        chosen = old if file.kind == BANDED else Band(fc1=DEFAULT)
    if "permute" in typed or file.kind != BANDED:
        chosen = replace(chosen, permute=args.permute if chosen.fc1 else 0, generator="mersenne")
    scale = args.band_init == "fan-in" and not args.resume
    refuse(problems(args, typed, old, chosen, scale))
    if (chosen.fc1, chosen.fc2) == (old.fc1, old.fc2):
        check_in_band(args.model, file, old)
    if scale:
        scale_to_fan_in(file, chosen)
        chosen = replace(chosen, fan_in=True)
    return chosen


def problems(args: Namespace, typed: set[str], old: Band, chosen: Band, scale: bool) -> list[tuple]:
    """(condition, message, hint) of what does not go together."""
    return [
        (
            args.resume and typed & (BY_W | BY_12 | INIT),
            "--resume keeps the bands of the checkpoint: no -w, -d, -1, -2, --mask-init, --band-init or --permute",
            f"for another band start a new run from its weights: -e {args.resume}",
        ),
        (
            typed & BY_W and typed & BY_12,
            "-w or -d given together with -1 or -2",
            "-w N is -1 N -2 0: keep to one of the two",
        ),
        (
            "permute" in typed and args.permute and not chosen.fc1,
            "--permute: it is FC1's band that it moves, and FC1 is dense",
            "add -w N or -1 N",
        ),
        (
            scale and chosen.dense,
            "--band-init fan-in: there is no band",
            "add -w N, -1 N or -2 N",
        ),
        (
            scale and not args.mask_init,
            "--band-init fan-in with --mask-init 0: the weights outside still count",
            "leave one out",
        ),
        (
            scale and old.fan_in,
            f"--band-init fan-in: the weights of {args.model} are scaled to theirs already",
            "leave it out",
        ),
    ]


def check_in_band(path: str, file: Model, band: Band) -> None:
    """Raise UserError if a banded model file has weights outside its bands, which training would silently drop."""
    weights = named_views(file.params, tensor_shapes(file.config))
    for name, bandwidth, place in (("fcw", band.fc1, band.place(file.config.C)), ("fcprojw", band.fc2, None)):
        if bandwidth:
            kept = np.ones((1, *weights[name].shape[1:]), bool)
            band_mask(kept, bandwidth, place)
            if outside := int(np.count_nonzero(weights[name][:, ~kept[0]])):
                found = f"{outside} weights of {name} that are not 0 lie outside its band of {bandwidth}"
                order = (
                    f" (hidden units in the order of {band.generator}'s seed {band.permute})" if band.permute else ""
                )
                hint = f"-e {path} with -w or -1 and -2 makes a band of it, and drops them"
                raise UserError(f"{path}: {found}{order}", hint)


def scale_to_fan_in(file: Model, band: Band) -> None:
    """Scale each row of the banded weights by sqrt(all its inputs / those that the band keeps), in place.

    Outputs then have the variance of the dense layer's at the start, whose weights had that many inputs to add up.
    """
    weights = named_views(file.params, tensor_shapes(file.config))  # (L,OC,C)
    for name, bandwidth, place in (("fcw", band.fc1, band.place(file.config.C)), ("fcprojw", band.fc2, None)):
        if bandwidth:
            kept = np.array(band_fan_in(*weights[name].shape[1:], bandwidth))
            kept = kept if place is None else kept[place]
            scale = np.sqrt(weights[name].shape[2] / np.maximum(kept, 1)).astype(np.float32)
            weights[name] *= scale[:, None]


# ----------------------------------------------------------------------------------------------------------------------
# the table


def has_two_bands(args: Namespace, band: Band) -> bool:
    """Whether the table is experiment 00009's (two bands) or 00007's (one)."""
    return args.fc1_bandwidth is not None or args.fc2_bandwidth is not None or band.fc2 > 0


def print_band(args: Namespace, band: Band) -> None:
    """The reference's first rows."""
    if has_two_bands(args, band):
        table.row("FC1 bandwidth", band.fc1, "%d")
        table.row("FC2 bandwidth", band.fc2, "%d")
        names = [name for name, bandwidth in (("FC1", band.fc1), ("FC2", band.fc2)) if bandwidth]
        banded = " + ".join(names) if len(names) == 2 else f"{names[0]} only" if names else ""
        table.row("Sparsity mode", f"BANDED ({banded})" if banded else "DENSE (no sparsity)")
    else:
        mode = "ENABLED" if band.fc1 else "DISABLED"
        print(f"| BANDED SPARSITY       | {mode} (bandwidth={band.fc1})                          |")


def print_masks(args: Namespace, config: GPT2Config, band: Band) -> None:
    """The reference's mask rows, with exact counts; a warning for a band that leaves nothing out."""
    L, C = config.L, config.C
    full, two = 4 * C * C, has_two_bands(args, band)
    for name, rows, columns, bandwidth in (("FC1", 4 * C, C, band.fc1), ("FC2", C, 4 * C, band.fc2)):
        if bandwidth:
            kept = band_count(rows, columns, bandwidth)
            density = f"bandwidth={bandwidth}, density={100 * kept / full:.1f}%"
            print(f"| {name} banded mask       | {density}                       |")
            print(f"| {name} connections       | {L * kept} / {L * full} (per layer: {kept} / {full})              |")
            if kept == full:
                print(f"WARNING: {name} bandwidth {bandwidth} covers all of {rows} x {columns}: {name} is dense")
        elif two:
            print(f"| {name}                   | DENSE (bandwidth=0)                                |")
    if not band.dense:
        mode = "initial weights masked" if args.mask_init else "gradients + post-update only"
        label = "Mask mode" if two else "FC1 mask applied" if args.mask_init else "FC1 mask mode"
        table.row(label, mode)
        if args.band_init == "fan-in":
            table.row("Band init", "rows scaled by sqrt(inputs / kept inputs)")
        if band.permute:
            table.row("FC1 hidden units", f"in random order (seed {band.permute})")
        if args.kernel == "mask":
            table.row("Band kernel", "dense products, then masks")
    table.rule()
