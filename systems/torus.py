"""Toroidal attention: a run's settings, the flags that choose them, their fields in a model file, their table rows.

The fields behind kind TOROIDAL, each an int32:

    layout 1, then those of FIELDS, then the number of replaced layers, then these layers

Behind the 16 tensors stand, each over the replaced layers: lambda of sequence and of depth, a value a head; the two
factors of the fusion, if it has any. llm.c reads the file as a plain GPT-2 with the same weights.
"""

import re
from argparse import Namespace
from dataclasses import dataclass, replace
from math import prod

import numpy as np

from kernels.cpu.torus import fusion_matrix
from kernels.cpu.torus.fusion_matrix import FUSIONS, fusion_init
from llmc import table
from llmc.checkpoint import DENSE, TOROIDAL, GPT2Config, Model, check_trains, named_views, tensor_shapes
from llmc.cli import ArgumentParser, any_int, flag01, natural_float, positive_int, refuse, resolve
from llmc.errors import UserError
from llmc.header import Field, Real, check_range, read_fields, write_fields
from llmc.init import gpt2_init
from llmc.rand import normals

ATTENTION = ("qkvw", "qkvb", "attprojw", "attprojb")  # the tensors of a layer's attention in GPT-2
MODES = ("causal", "upstream")
ROPES = ("none", "int", "upstream", "orth")
INITS = ("copy", "random")
RANKED = (FUSIONS[fusion_matrix.LOW_RANK], FUSIONS[fusion_matrix.LOW_RANK_RESIDUAL])  # --fusion-rank is theirs
MAX_POSITIONS = 1 << 24
MAX_LAYERS = 100  # replaced layers that a header has room for
LAMBDAS = Real(0, 1e6)

LAYOUT = 1
INT32 = range(-(1 << 31), 1 << 31)
FIELDS = (
    Field("mode", MODES),
    Field("depth", INT32),  # read_torus checks it against the model's channels
    Field("period", range(1, MAX_POSITIONS + 1)),
    Field("rope", ROPES),
    Field("fusion", FUSIONS),
    Field("rank", INT32),  # read_torus checks it against the depth
    Field("window", range(-1, MAX_POSITIONS + 1)),
    Field("wrap_depth", bool),
    Field("learn_lambda", bool),
    Field("lam", LAMBDAS, "lambda"),
)
HINT = "save it again with train_toroidal.py"


@dataclass(frozen=True)
class Torus:
    """The replaced layers, ascending, and the geometry of their attention.

    mode: causal or upstream; depth: platters D of a head; period: positions P of the ring; rope: rotary embedding;
    fusion, rank: of the platters; window: largest distance on the ring that attends, -1 for any; wrap_depth: depth is
    a ring, too; lam: lambda at the start; learn_lambda: whether it learns, for each head, sequence and depth apart.
    """

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
        return (LAYOUT, *write_fields(FIELDS, self), len(self.layers), *self.layers)


def read_torus(file: Model, name: str) -> Torus:
    """The settings that a file was trained with; no layer is replaced in a plain GPT-2.

    Raises UserError, naming the file, for another trainer's kind, a field out of range, or a wrong number of extras.
    """
    check_trains(name, file, "train_toroidal.py")
    if file.kind == DENSE:
        return Torus()
    layout, L = file.fields[0], file.config.L
    if layout != LAYOUT:
        raise UserError(f"{name}: layout {layout} of the toroidal attention's fields, expected {LAYOUT}", HINT)
    values = read_fields(FIELDS, file.fields[1:], name, HINT)
    check_range(values["depth"], range(1, file.config.C + 1), "depth", name, HINT)
    check_range(values["rank"], range(1, values["depth"] + 1), "rank", name, HINT)
    count, *rest = file.fields[1 + len(FIELDS) :]
    check_range(count, range(1, min(L, MAX_LAYERS) + 1), "number of layers", name, HINT)
    layers = tuple(rest[:count])
    if sorted(set(layers)) != list(layers) or not 0 <= min(layers) <= max(layers) < L:
        raise UserError(f"{name}: replaced layers are {layers}, expected ascending ones of 0..{L - 1}", HINT)
    torus = Torus(layers, **values)
    for condition, message in shape_problems(torus, file.config):
        if condition:
            raise UserError(f"{name}: {message}", HINT)
    expected = sum(map(prod, extra_shapes(file.config, torus).values()))
    if file.extra.size != expected:
        raise UserError(f"{name}: {file.extra.size} extra values, its toroidal layers have {expected}", HINT)
    return torus


def shape_problems(torus: Torus, config: GPT2Config) -> tuple[tuple[bool, str], ...]:
    """(condition, message) of what keeps head size, depth, rotary embedding and fusion rank from going together."""
    hs, D, rope = config.C // config.NH, torus.depth, torus.rope
    hd, least = hs // D, 4 if rope == "orth" else 2
    unpaired = rope != "none" and (hd % 2 != 0 or hd < least)
    needs = f"rope {rope} needs an even number, {least} or more"
    return (
        (hs % D != 0, f"depth {D} does not divide the head size {hs} (C / NH)"),
        (unpaired, f"depth {D} leaves {hd} channels of a head of {hs} to a platter, {needs}"),
        (not 1 <= torus.rank <= D, f"fusion rank {torus.rank}, expected 1..{D} (depth)"),
    )


def factor_shape(torus: Torus) -> tuple[int, int] | None:
    """The shape of either factor of a layer's fusion, None if it has none."""
    if torus.fusion in RANKED:
        return torus.depth, torus.rank
    return (torus.depth, torus.depth) if torus.fusion == FUSIONS[fusion_matrix.ATTENTION] else None


def extra_shapes(config: GPT2Config, torus: Torus) -> dict[str, tuple[int, ...]]:
    """The tensors behind GPT-2's 16, each over the replaced layers: lambda by head, and the factors of the fusion."""
    n, factor = len(torus.layers), factor_shape(torus)
    if not n:
        return {}
    shapes = {"lams": (n, config.NH), "lamd": (n, config.NH)}
    if factor:
        shapes |= {"fuse1": (n, *factor), "fuse2": (n, *factor)}
    return shapes


def trained_shapes(config: GPT2Config, torus: Torus, learns: tuple[int, ...] | None) -> dict[str, tuple[int, ...]]:
    """The tensors that learn: all of GPT-2's, or attention's over the layers `learns`; and the extra ones.

    Lambda learns only if the torus says so.
    """
    shapes, extra = tensor_shapes(config), extra_shapes(config, torus)
    if learns is not None:
        shapes = {name: (len(learns), *shapes[name][1:]) for name in ATTENTION}
    if not torus.learn_lambda:
        extra = {name: shape for name, shape in extra.items() if name not in ("lams", "lamd")}
    return shapes | extra


def extra_init(file: Model, torus: Torus, seed: int) -> np.ndarray:
    """The values of lambda and of the fusion's factors, flat: the file's if it is toroidal, else new ones."""
    if file.kind == TOROIDAL:
        return file.extra
    shapes, generator = extra_shapes(file.config, torus), normals(seed)
    flat = np.zeros(sum(map(prod, shapes.values())), np.float32)
    views = named_views(flat, shapes)
    for i in range(len(torus.layers)):
        views["lams"][i] = views["lamd"][i] = torus.lam
        if factor_shape(torus):
            first, second = fusion_init(FUSIONS.index(torus.fusion), torus.depth, torus.rank, generator)
            views["fuse1"][i], views["fuse2"][i] = first, second
    return flat


def replace_attention(file: Model, layers: tuple[int, ...], seed: int) -> None:
    """--init random: GPT-2's random initialisation for the attention of these layers, in place."""
    shapes = tensor_shapes(file.config)
    ours, drawn = named_views(file.params, shapes), named_views(gpt2_init(file.config, seed), shapes)
    for name in ATTENTION:
        ours[name][list(layers)] = drawn[name][list(layers)]


# ----------------------------------------------------------------------------------------------------------------------
# the flags


def add_flags(parser: ArgumentParser) -> None:
    """The flags about attention, without their checks."""
    add = parser.add_argument_group("toroidal attention (kept in the file: not for one that is toroidal)").add_argument
    add("--layers", default="0", help="layers to replace: 0,6 or first:N, last:N, none")
    add("--depth", type=positive_int, help="platters D that a head is cut into (default: 2, 1 for an odd head size)")
    add("--period", type=positive_int, help="positions P of the ring (default: -t)")
    add("--lambda", type=natural_float, default=1.0, help="weight of the distance, of sequence and of depth")
    add("--learn-lambda", type=flag01, default=False, help="1: learn it, for each head, sequence and depth apart")
    add("--rope", choices=ROPES, default="none", help="rotary embedding: int (periodic), upstream, orth")
    add("--fusion", choices=FUSIONS, default="low_rank_residual", help="of platters: " + ", ".join(FUSIONS))
    add("--fusion-rank", type=positive_int, help="of low_rank and low_rank_residual (default: D/4, at least 1)")
    add("--window", type=any_int, default=-1, help="largest distance on the ring that attends, -1: any")
    add("--wrap-depth", type=flag01, default=False, help="1: depth is a ring, too")
    add("--mode", choices=MODES, default="causal", help="upstream: as published, every token sees all others")
    add("--init", choices=INITS, default="copy", help="attention of the replaced layers: the file's, or random")
    add("--control", type=flag01, default=False, help="1: leave the layers' attention as it is, train the same weights")


FLAGS = {  # flag: field of Torus
    "mode": "mode",
    "depth": "depth",
    "period": "period",
    "rope": "rope",
    "fusion": "fusion",
    "fusion_rank": "rank",
    "window": "window",
    "wrap_depth": "wrap_depth",
    "learn_lambda": "learn_lambda",
    "lambda": "lam",
}
NUMBER = re.compile("[0-9]{1,9}")


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
    """The settings of a run: the file's if it is toroidal, else the flags'. Raises UserError.

    typed: the names of the flags that were given.
    """
    old, toroidal = read_torus(file, args.model), file.kind == TOROIDAL
    kept = sorted(typed & {*FLAGS, "layers", "init", "control"})
    flag = "--" + kept[0].replace("_", "-") if kept else ""
    refuse(
        (
            (flag and args.resume, f"--resume given together with {flag}", "a resumed run has it from its checkpoint"),
            (
                flag and toroidal,
                f"{flag}: {args.model} is toroidal already and keeps its layers",
                "start from the plain GPT-2 that it was made of",
            ),
        )
    )
    torus = resolve(args, typed, FLAGS, old if toroidal else None, Torus())
    if toroidal:
        return torus if torus.causal else replace(torus, period=args.seq_len)
    L, hs = file.config.L, file.config.C // file.config.NH
    if L > MAX_LAYERS:
        raise UserError(f"{args.model}: {L} layers, the header has room for {MAX_LAYERS}", "take a smaller model")
    depth = torus.depth or (1 if hs % 2 else 2)
    torus = replace(
        torus,
        layers=parse_layers(args.layers, L),
        depth=depth,
        period=torus.period or args.seq_len,
        rank=torus.rank or max(1, depth // 4),
    )
    refuse(flag_problems(args, typed, torus, file.config))
    return torus


def flag_problems(args: Namespace, typed: set[str], torus: Torus, config: GPT2Config) -> list[tuple[object, str, str]]:
    """(condition, message, hint) of what flags cannot ask for."""
    found = []
    for flag, value, least, most in (
        ("--period", torus.period, 1, MAX_POSITIONS),
        ("--window", torus.window, -1, MAX_POSITIONS),
        ("--lambda", torus.lam, LAMBDAS.least, LAMBDAS.most),
    ):
        outside = not least <= value <= most
        found.append((outside, f"{flag} {value}: expected {least}..{most:g}", f"leave {flag} out"))
    unranked = "fusion_rank" in typed and torus.fusion not in RANKED
    found.append((unranked, f"--fusion-rank with --fusion {torus.fusion}, which has none", "leave it out"))
    if torus.layers and not args.control:
        for condition, message in shape_problems(torus, config):
            found.append((condition, f"--depth {torus.depth}: {message}", "--depth 2, or --rope none"))
    other_ring = not torus.causal and torus.period != args.seq_len
    takes = f"--period {torus.period} with --mode upstream: it takes the current length"
    return [*found, (other_ring, takes, "leave it out")]


def print_torus(config: GPT2Config, torus: Torus, trained: int, args: Namespace) -> None:
    """The rows of the table about attention, and of how many parameters are trained."""
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
        rank = f", rank {torus.rank}" if torus.fusion in RANKED else ""
        table.row("fusion", f"{torus.fusion}{rank}")
    table.row("trained parameters", f"{trained} ({args.train})")
    table.rule()
    if torus.layers and not torus.causal and not args.control:
        print("WARNING: --mode upstream: EVERY TOKEN ATTENDS TO ALL OTHERS, LATER ONES TOO.")
        print("THE LOSSES BELOW ARE NOT LANGUAGE-MODEL LOSSES. THEY REPRODUCE A PUBLISHED MISTAKE.")
