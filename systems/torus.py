"""Toroidal attention: its options, and the fields by which the header of a model file keeps them.

The fields behind kind TOROIDAL, all int32 (lambda as the bits of a float32), then the replaced layers:

    layout 1, mode, depth, period, rope, fusion, rank, window, wrap depth, learn lambda, lambda, number of layers

Behind the 16 tensors stand, each over the replaced layers: lambda of sequence and of depth, a value a head; the two
factors of the fusion, if it has any. llm.c reads the file as a plain GPT-2 with the same weights.
"""

import re
import struct
from argparse import Namespace
from dataclasses import dataclass, replace
from math import prod

from llmc import table
from llmc.checkpoint import DENSE, TOROIDAL, GPT2Config, Model, check_trains
from llmc.errors import UserError

LAYOUT = 1
MODES = ("causal", "upstream")
ROPES = ("none", "int", "upstream", "orth")
FUSIONS = ("identity", "mean", "low_rank", "low_rank_residual", "attention")  # kernels/cpu/torus/fusion_matrix.py
FACTORED = ("low_rank", "low_rank_residual")
NUM_FIELDS = 12  # in front of the layers
MAX_LAYERS = 100
MAX_POSITIONS, MAX_LAMBDA = 1 << 24, 1e6
HINT = "save it again with train_toroidal.py"
NUMBER = re.compile("[0-9]{1,9}")
SAVED = {name: name for name in ("mode", "depth", "period", "rope", "fusion", "window", "wrap_depth", "learn_lambda")}
SAVED |= {"lambda": "lam", "fusion_rank": "rank"}  # flag: field of Torus


@dataclass(frozen=True)
class Torus:
    """layers: the replaced ones, ascending; the rest by their flags. period: of the ring; window -1: none."""

    layers: tuple[int, ...] = ()
    mode: str = "causal"
    depth: int = 2
    period: int = 1024
    rope: str = "none"
    fusion: str = "low_rank_residual"
    rank: int = 1
    window: int = -1
    wrap_depth: bool = False
    learn_lambda: bool = False
    lam: float = 1.0

    @property
    def causal(self) -> bool:
        return self.mode == "causal"

    def fields(self) -> tuple[int, ...]:
        """The header fields."""
        numbers = (MODES.index(self.mode), self.depth, self.period, ROPES.index(self.rope), FUSIONS.index(self.fusion))
        numbers += (self.rank, self.window, int(self.wrap_depth), int(self.learn_lambda))
        return (LAYOUT, *numbers, *struct.unpack("<i", struct.pack("<f", self.lam)), len(self.layers), *self.layers)


def read_torus(file: Model, name: str) -> Torus:
    """How the attention of a file is replaced. Raises UserError for a field out of range or a wrong extras count."""
    check_trains(name, file, "train_toroidal.py")
    if file.kind == DENSE:
        return Torus()
    fields, L = file.fields, file.config.L
    if fields[0] != LAYOUT:
        raise UserError(f"{name}: layout {fields[0]} of the toroidal attention's fields, expected {LAYOUT}", HINT)
    mode, depth, period, rope, fusion, rank, window, wrap_depth, learn, lam, count = fields[1:NUM_FIELDS]
    (lam,) = struct.unpack("<f", struct.pack("<i", lam))
    limits = {"mode": (mode, 0, 1), "depth": (depth, 1, file.config.C), "period": (period, 1, MAX_POSITIONS)}
    limits |= {"rope": (rope, 0, 3), "fusion": (fusion, 0, 4), "rank": (rank, 1, depth)}
    limits |= {"window": (window, -1, MAX_POSITIONS)}
    limits |= {"wrap depth": (wrap_depth, 0, 1), "learn lambda": (learn, 0, 1)}
    limits |= {"number of layers": (count, 1, min(L, MAX_LAYERS))}
    for what, (value, least, most) in limits.items():
        if not least <= value <= most:
            raise UserError(f"{name}: {what} is {value}, expected {least}..{most}", HINT)
    layers = fields[NUM_FIELDS : NUM_FIELDS + count]
    if sorted(set(layers)) != list(layers) or not 0 <= min(layers) <= max(layers) < L:
        raise UserError(f"{name}: replaced layers are {layers}, expected ascending ones of 0..{L - 1}", HINT)
    if not 0 <= lam <= MAX_LAMBDA:
        raise UserError(f"{name}: lambda is {lam}, expected 0..{MAX_LAMBDA:g}", HINT)
    names, flags = (ROPES[rope], FUSIONS[fusion]), (bool(wrap_depth), bool(learn))
    torus = Torus(tuple(layers), MODES[mode], depth, period, *names, rank, window, *flags, lam)
    check_shapes(torus, file.config, name, HINT, 1)
    expected = sum(map(prod, extra_shapes(file.config, torus).values()))
    if file.extra.size != expected:
        raise UserError(f"{name}: {file.extra.size} extra values, its toroidal layers have {expected}", HINT)
    return torus


def check_shapes(torus: Torus, config: GPT2Config, name: str, hint: str, code: int) -> None:
    """Raise UserError unless head size, depth and rotary embedding go together."""
    hs, D = config.C // config.NH, torus.depth
    if hs % D:
        raise UserError(f"{name}: depth {D} does not divide the head size {hs} (C / NH)", hint, code)
    hd, least = hs // D, {"none": 1, "orth": 4}.get(torus.rope, 2)
    if torus.rope != "none" and (hd % 2 or hd < least):
        found = f"depth {D} leaves {hd} channels of a head of {hs} to a platter"
        raise UserError(f"{name}: {found}, rope {torus.rope} needs an even number, {least} or more", hint, code)
    if not 1 <= torus.rank <= D:
        raise UserError(f"{name}: fusion rank {torus.rank}, expected 1..{D} (depth)", hint, code)


def factors(torus: Torus) -> tuple[int, ...] | None:
    """The shape of each of the two factors of a layer's fusion, None if it has none."""
    if torus.fusion in FACTORED:
        return (torus.depth, torus.rank)
    return (torus.depth, torus.depth) if torus.fusion == "attention" else None


def extra_shapes(config: GPT2Config, torus: Torus) -> dict[str, tuple[int, ...]]:
    """The tensors behind GPT-2's 16, each over the replaced layers: lambda by head, and the factors of the fusion."""
    n = len(torus.layers)
    if not n:
        return {}
    shapes = dict(lams=(n, config.NH), lamd=(n, config.NH))
    if factors(torus):
        shapes |= dict(fuse1=(n, *factors(torus)), fuse2=(n, *factors(torus)))
    return shapes


# ----------------------------------------------------------------------------------------------------------------------
# the options


def parse_layers(text: str, L: int) -> tuple[int, ...]:
    """--layers: "0,6", "first:2", "last:2" or "none" -> ascending layer numbers. Raises UserError."""
    expected = f"expected layers of 0..{L - 1} as in 0,{L // 2}, first:N, last:N or none"
    where, colon, count = text.partition(":")
    if text == "none":
        return ()
    if colon and where in ("first", "last") and NUMBER.fullmatch(count) and 1 <= int(count) <= L:
        return tuple(range(int(count)) if where == "first" else range(L - int(count), L))
    words = text.split(",")
    layers = sorted(int(word) for word in words if NUMBER.fullmatch(word) and int(word) < L)
    if len(set(layers)) < len(words):
        raise UserError(f"--layers {text}: {expected}", "--layers 0", 2)
    return tuple(layers)


def choose_torus(args: Namespace, typed: set[str], file: Model) -> Torus:
    """What replaces attention: as in the file if it is toroidal, else by the flags."""
    old = read_torus(file, args.model)
    flag = min(typed & {*SAVED, "layers", "init", "control"}, default="").replace("_", "-")
    if flag and args.resume:
        raise UserError(f"--resume given together with --{flag}", "a resumed run has it from its checkpoint", 2)
    if flag and file.kind == TOROIDAL:
        hint = "start from the plain GPT-2 that it was made of"
        raise UserError(f"--{flag}: {args.model} is toroidal already and keeps its layers", hint, 2)
    if file.kind == TOROIDAL:
        return old if old.causal else replace(old, period=args.seq_len)
    L = file.config.L
    if L > MAX_LAYERS:
        raise UserError(f"{args.model}: {L} layers, the header has room for {MAX_LAYERS}", "take a smaller model")
    values = {field: vars(args)[flag] for flag, field in SAVED.items()}
    values["period"] = args.period or args.seq_len
    values["depth"] = args.depth or (1 if file.config.C // file.config.NH % 2 else 2)
    values["rank"] = args.fusion_rank or max(1, values["depth"] // 4)
    torus = replace(old, layers=parse_layers(args.layers, L), **values)
    limits = dict(period=(1, MAX_POSITIONS), window=(-1, MAX_POSITIONS)) | {"lambda": (0, MAX_LAMBDA)}
    for flag, (least, most) in limits.items():
        if not least <= values[SAVED[flag]] <= most:
            raise UserError(f"--{flag} {values[SAVED[flag]]}: expected {least}..{most:g}", f"leave --{flag} out", 2)
    if "fusion_rank" in typed and torus.fusion not in FACTORED:
        raise UserError(f"--fusion-rank with --fusion {torus.fusion}, which has none", "leave it out", 2)
    if torus.layers and not args.control:
        check_shapes(torus, file.config, f"--depth {torus.depth}", "--depth 2, or --rope none", 2)
    if not torus.causal and torus.period != args.seq_len:
        raise UserError(f"--period {torus.period} with --mode upstream: it takes the current length", "leave it out", 2)
    return torus


def print_torus(config: GPT2Config, torus: Torus, trained: int, args: Namespace):
    """The rows of the table about attention."""
    table.row("toroidal layers", ", ".join(map(str, torus.layers)) or "none")
    if torus.layers and args.control:
        table.row("control", "their attention stays GPT-2's")
    elif torus.layers:
        platter = config.C // config.NH // torus.depth
        table.row("depth", f"{torus.depth} platters of {platter} channels a head")
        table.row("period", torus.period, "%d")
        how = "learnt, by head" if torus.learn_lambda else "fixed"
        table.row("lambda", f"{torus.lam:g}, {how}, depth {'wraps' if torus.wrap_depth else 'does not wrap'}")
        table.row("window", "none" if torus.window < 0 else f"{torus.window} positions on the ring")
        table.row("rope", torus.rope)
        rank = f", rank {torus.rank}" if torus.fusion in FACTORED else ""
        table.row("fusion", f"{torus.fusion}{rank}")
    table.row("trained parameters", f"{trained} ({args.train})")
    table.rule()
    if torus.layers and not torus.causal and not args.control:
        print("WARNING: --mode upstream: EVERY TOKEN ATTENDS TO ALL OTHERS, LATER ONES TOO.")
        print("THE LOSSES BELOW ARE NOT LANGUAGE-MODEL LOSSES. THEY REPRODUCE A PUBLISHED MISTAKE.")
