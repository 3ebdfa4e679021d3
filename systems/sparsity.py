"""How a model attends: the options, the fields by which the header of its file keeps them, and the extra tensors.

The fields behind kind SPARSE_ATTENTION, all int32 (coverage as the bits of a float32), then k for each layer:

    layout 2, attention, selector, indexer, heads, width, rotated dims, force self, sink, adaptive, leak, coverage,
    seed, share

Layout 1 has no share. A selector is a word in SELECTORS and a branch of Selection.score in train_sparse_attn.py. Files
keep a word's place: new ones go to the end.
"""

import struct
from argparse import ArgumentTypeError, Namespace
from dataclasses import dataclass, replace
from math import prod

import numpy as np

from kernels.cpu.sparse.keep_controller import FEATURES, HIDDEN, keep_controller_init
from kernels.cpu.sparse.upstream_controller import upstream_controller_init, upstream_controller_shapes
from llmc import header, table
from llmc.checkpoint import SPARSE_ATTENTION, DeepSeekConfig, GPT2Config, Model, check_trains, named_views
from llmc.cli import (
    ArgumentParser,
    flag01,
    fraction,
    natural,
    natural_float,
    positive_float,
    positive_int,
    refuse,
    resolve,
)
from llmc.errors import UserError
from llmc.header import Field, Real
from llmc.rand import normals
from systems.selection import kept_pairs

ATTENTION = ("dense", "sparse")
SELECTORS = ("indexer", "top-p", "recency", "random", "oracle")
SCORED = ("indexer", "top-p")  # the selectors that need an indexer
INDEXERS = ("none", "lightning", "upstream")
ADAPTIVE = ("none", "prefix", "upstream")
MAX_LAYERS, MAX_HEADS, MAX_WIDTH = 100, 256, 1024
CONTROLLER = ("ctlw1", "ctlb1", "ctlw2", "ctlb2")  # tensors of --adaptive prefix

LAYOUT = 2  # the first field
FIELDS = (
    Field("attention", ATTENTION),
    Field("selector", SELECTORS),
    Field("indexer", INDEXERS),
    Field("heads", range(1, MAX_HEADS + 1), "indexer heads"),
    Field("width", range(1, MAX_WIDTH + 1), "indexer width"),
    Field("rotated", range(MAX_WIDTH + 1), "rotated dims"),
    Field("force_self", bool),
    Field("sink", bool),
    Field("adaptive", ADAPTIVE),
    Field("leak", bool),
    Field("coverage", Real(0, 1, above=True)),
    Field("seed", range(1 << 31)),
    Field("share", range(1, 1 << 31)),  # since layout 2
)
HINT = "save it again with train_sparse_attn.py"


@dataclass(frozen=True)
class Sparsity:
    """attention: what the model runs; k: how many keys a query of each layer keeps at most; the rest by their flags.

    coverage is the share of attention that top-p keeps and that --adaptive prefix learns to keep. share: queries of a
    tile with one list of keys (kernels/cpu/sparse/share_topk.py), 1: each has its own.
    """

    k: tuple[int, ...]
    attention: str = "sparse"
    selector: str = "indexer"
    indexer: str = "none"
    heads: int = 4
    width: int = 64
    rotated: int = 0
    force_self: bool = True
    sink: bool = False
    adaptive: str = "none"
    leak: bool = False
    coverage: float = 0.95
    seed: int = 1
    share: int = 1

    @property
    def adapts(self) -> bool:
        """Whether queries of one layer keep different numbers of keys; k is their limit then."""
        return self.selector == "top-p" or self.adaptive != "none"

    @property
    def indexer_has_loss(self) -> bool:
        """Whether there is an indexer and attention for it to learn from: not where future keys are seen."""
        return self.indexer != "none" and self.attention == "sparse" and not self.leak

    def fields(self) -> tuple[int, ...]:
        """The header fields."""
        return (LAYOUT, *header.write_fields(FIELDS, self), *self.k)


def read_fields(fields: tuple[int, ...], layers: int, positions: int, name: str) -> Sparsity:
    """The Sparsity of header fields. Raises UserError naming the file `name` for anything out of range."""
    if fields[0] not in (1, LAYOUT):
        raise UserError(f"{name}: layout {fields[0]} of the sparse attention's fields, expected 1 or {LAYOUT}", HINT)
    if layers > MAX_LAYERS:
        raise UserError(f"{name}: {layers} layers, the header has room for {MAX_LAYERS}", HINT)
    there = FIELDS if fields[0] == LAYOUT else FIELDS[:-1]
    values, behind = header.read_fields(there, fields[1:], name, HINT), 1 + len(there)
    s = Sparsity(k=tuple(fields[behind : behind + layers]), **values)
    header.check_range(s.rotated, range(s.width + 1), "rotated dims", name, HINT)
    for l, k in enumerate(s.k):
        header.check_range(k, range(1, positions + 1), f"k of layer {l}", name, HINT)
    if s.rotated % 2:
        raise UserError(f"{name}: {s.rotated} rotated dims of the indexer, expected an even number", HINT)
    if wrong := conflict(s)[0]:
        raise UserError(f"{name}: {wrong.replace('--', '')}", HINT)
    return s


def conflict(s: Sparsity) -> tuple[str, str]:
    """What does not go together, in terms of the flags, and what helps; nothing if all does."""
    other, hint = "--selector top-p" if s.selector == "top-p" else f"--adaptive {s.adaptive}", "leave one of them out"
    if s.selector in SCORED and s.indexer == "none":
        return f"--selector {s.selector} without an indexer", hint
    if s.adaptive != "none" and s.selector != "indexer":
        return f"--adaptive {s.adaptive} with --selector {s.selector}: it chooses k for --selector indexer alone", hint
    if s.leak and s.adapts:
        return f"--legacy-leak with {other}: it takes the same k for all queries", hint
    if s.share > 1 and (s.leak or s.adapts):
        other = "--legacy-leak" if s.leak else other
        return f"--share with {other}: queries with one list have one k, and no keys of the future", "--share 1"
    least, k = 2 * s.share + s.sink, min(s.k)
    if s.share > 1 and k < least:
        kept = f"two tiles of {s.share}{' and the first key' if s.sink else ''}"
        hint = f"--top-k {least} or more, or a smaller --share"
        return f"--share {s.share} with k = {k}: a query keeps {kept}", hint
    return "", ""


def is_mla(config: GPT2Config) -> bool:
    """Whether queries, keys and values go through latents (multi-head latent attention)."""
    return isinstance(config, DeepSeekConfig) and config.kv_rank > 0


def is_moe(config: GPT2Config) -> bool:
    """Whether the MLPs are mixtures of experts."""
    return isinstance(config, DeepSeekConfig) and config.E > 0


# ----------------------------------------------------------------------------------------------------------------------
# the extra tensors


def extra_shapes(config: GPT2Config, s: Sparsity) -> dict[str, tuple[int, ...]]:
    """The tensors behind the model's own, in file order: the indexer's and the controllers'."""
    L, C, width, shapes = config.L, config.C, s.heads * s.width, {}
    if s.indexer == "lightning":
        shapes |= {
            "idxqw": (L, width, config.q_rank if is_mla(config) else C),  # from MLA's query latent, as in the original
            "idxkw": (L, s.width, C),
            "idxknw": (L, s.width),
            "idxknb": (L, s.width),
            "idxww": (L, s.heads, C),
        }
    elif s.indexer == "upstream":
        shapes |= {
            "idxqw": (L, width, C),
            "idxqb": (L, width),
            "idxkw": (L, width, C),
            "idxkb": (L, width),
            "idxwb": (L, s.heads),
        }
    if s.adaptive == "prefix":
        shapes |= {"ctlw1": (L, HIDDEN, FEATURES), "ctlb1": (L, HIDDEN), "ctlw2": (L, 1, HIDDEN), "ctlb2": (L, 1)}
    elif s.adaptive == "upstream":  # 313,596 values a layer for C = 256
        shapes |= {"controller": (L, sum(map(prod, upstream_controller_shapes(C).values())))}
    return shapes


def extra_init(file: Model, s: Sparsity, path: str, seed: int) -> np.ndarray:
    """Values of the extra tensors, flat float32: those that the file `path` has are its own, all others are drawn.

    Raises UserError for a file with a field out of range or a wrong number of extras.
    """
    config, generator = file.config, normals(seed)
    shapes = extra_shapes(config, s)
    flat = np.zeros(sum(map(prod, shapes.values())), np.float32)
    views = named_views(flat, shapes)
    for name, values in views.items():
        if name in ("idxqw", "idxkw"):
            values[...] = generator.standard_normal(values.shape) * 0.02
        elif name == "idxww":
            values[...] = generator.standard_normal(values.shape) * config.C**-0.5
        elif name == "idxwb":  # as published
            values[...] = abs(generator.standard_normal(values.shape)) * 0.1
        elif name == "idxknw":
            values[...] = 1
        elif name == "controller":
            for layer in values:
                layer[...] = upstream_controller_init(config.C, generator)
    if s.adaptive == "prefix":
        for l in range(config.L):
            drawn = named_views(keep_controller_init(generator), {name: shapes[name][1:] for name in CONTROLLER})
            for name in CONTROLLER:
                views[name][l] = drawn[name]
    for name, values in named_views(file.extra, extra_shapes(config, read_sparsity(file, path))).items():
        if name in views:
            views[name][...] = values
    return flat


def read_sparsity(file: Model, name: str) -> Sparsity:
    """How the model of a file attends. Raises UserError for a field out of range or a wrong number of extras."""
    config = file.config
    if file.kind != SPARSE_ATTENTION:
        return Sparsity((1,) * config.L, attention="dense")
    s = read_fields(file.fields, config.L, config.maxT, name)
    expected = sum(map(prod, extra_shapes(config, s).values()))
    if file.extra.size != expected:
        raise UserError(f"{name}: {file.extra.size} extra values, its indexer and controller have {expected}", HINT)
    return s


# ----------------------------------------------------------------------------------------------------------------------
# the options

HOW_MANY = {"top_k", "keep_ratio", "layer_keep"}
SAVED = {  # flag: field of Sparsity
    "attention": "attention",
    "selector": "selector",
    "force_self": "force_self",
    "sink": "sink",
    "adaptive": "adaptive",
    "legacy_leak": "leak",
    "coverage": "coverage",
    "share": "share",
}
OF_INDEXER = {"indexer": "indexer", "indexer_heads": "heads", "indexer_dim": "width", "indexer_rope": "rotated"}
CHOICES = HOW_MANY | set(SAVED) | set(OF_INDEXER)


def layer_ratios(text: str, layers: int) -> tuple[float, ...]:
    """--layer-keep: a share for each layer, or three: of the first third of the layers, the last and those between.

    Thirds are cut at layers // 3 from either end, as the published schedules do. Raises ValueError for another number
    of shares, or one that is not in (0, 1].
    """
    shares = [float(word) for word in text.split(",")]
    if not all(0 < share <= 1 for share in shares):
        raise ValueError("expected numbers above 0, at most 1")
    if len(shares) == layers:
        return tuple(shares)
    if len(shares) != 3:
        raise ValueError(f"{len(shares)} shares, expected {layers} (one a layer) or 3 (early, middle, late layers)")
    third = layers // 3
    return tuple(shares[0 if layer < third else 2 if layer >= layers - third else 1] for layer in range(layers))


def share(text: str) -> float:
    """A number above 0, at most 1."""
    if not (value := fraction(text)):
        raise ArgumentTypeError(f"{text!r}, expected a number above 0, at most 1")
    return value


def coverage(text: str) -> float:
    """A share as the header keeps it, rounded to float32: a resumed run goes on with the same number."""
    (value,) = struct.unpack("<f", struct.pack("<f", share(text)))
    if not value:
        raise ArgumentTypeError(f"{text!r}, expected a number above 0, at most 1")
    return value


def add_sparsity_options(parser: ArgumentParser) -> None:
    """Add the options about attention, the indexer and DeepSeek-style models to `parser`."""
    add = parser.add_argument_group("attention (defaults: the -e file's, if it is sparse)").add_argument
    add("--attention", choices=ATTENTION, default="sparse", help="dense: all keys, as GPT-2")
    add("--selector", choices=SELECTORS, default="indexer", help="what chooses the keys: " + ", ".join(SELECTORS))
    add("--top-k", type=positive_int, help="keys of a query, at most (default: --keep-ratio's)")
    add("--keep-ratio", type=share, help="the same in parts of -t (default: 0.125; with top-p and --adaptive: 1)")
    add("--layer-keep", metavar="R,R,...", help="--keep-ratio of each layer, or of early, middle and late layers")
    add("--force-self", type=flag01, default=True, help="1: a query always keeps its own key")
    add("--sink", type=flag01, default=False, help="1: and the first one")
    add("--adaptive", choices=ADAPTIVE, default="none", help="k by query (prefix) or, acausal, sequence (upstream)")
    add("--coverage", type=coverage, default="0.95", help="share of attention that top-p keeps, prefix learns to keep")
    add("--share", type=positive_int, default=1, help="neighbouring queries with one list of keys; 64 suits a GPU")
    add("--legacy-leak", type=flag01, default=False, help="1: k keys for the first queries, too, so future ones")
    add = parser.add_argument_group("indexer (sizes: of the -e file, if it has one)").add_argument
    add("--indexer", choices=INDEXERS[1:], default="lightning", help="upstream: a key per head, constant head weights")
    add("--indexer-heads", type=positive_int, default=4, help="heads of the indexer")
    add("--indexer-dim", type=positive_int, default=64, help="width of a head of the indexer")
    add("--indexer-rope", type=natural, help="rotated dims of the indexer (default: the model's, 0 for GPT-2)")
    warmup = "first steps, in which attention is dense and it learns alone"
    add("--indexer-warmup", type=natural, default=0, help=warmup)
    add("--indexer-lr", type=positive_float, default=5e-3, help="its learning rate in the warm-up")
    add("--indexer-lr-sparse", type=positive_float, default=2e-3, help="and after it")
    add("--train-indexer", type=flag01, default=True, help="0: leave it as it is")
    add = parser.add_argument_group("DeepSeek-style models").add_argument
    add("--mla", type=flag01, default=None, help="1: the -e file must have latent attention, 0: must not")
    add("--experts", type=natural, help="experts that the -e file must have, 0: none")
    add("--top-experts", type=positive_int, help="experts that a token of the -e file must take")
    add("--balance", type=natural_float, default=0.01, help="weight of the experts' load-balance loss")


def check_architecture(args: Namespace, config: GPT2Config):
    """--mla, --experts and --top-experts name what the file must be: they cannot make another model of it.

    Raises UserError, exit code 2, for another one.
    """
    moe = is_moe(config)
    found = {
        "mla": (args.mla, is_mla(config)),
        "experts": (args.experts, config.E if moe else 0),
        "top_experts": (args.top_experts, config.top if moe else 0),
    }
    kind = "a DeepSeek-style model" if isinstance(config, DeepSeekConfig) else "a plain GPT-2"
    hint = "python data/create_model.py --preset dsa -o dsa.bin writes a model with both"
    refuse(
        (
            wanted is not None and wanted != value,
            f"{flag_of(name)} {int(wanted or 0)}: {args.model} is {kind} with {name.replace('_', ' ')} {int(value)}",
            hint,
        )
        for name, (wanted, value) in found.items()
    )


def choose_sparsity(args: Namespace, typed: set[str], file: Model) -> Sparsity:
    """How the model will attend: by the flags typed, then by its file, then by the flags' defaults.

    Raises UserError for a file that cannot be trained here, exit code 2 for flags that do not go together.
    """
    check_file(args, typed, file)
    config = file.config
    old = read_sparsity(file, args.model) if file.kind == SPARSE_ATTENTION else None
    chosen = resolve(args, typed, SAVED, old, Sparsity(k=(1,) * config.L, seed=args.seed or 1337))
    chosen = with_k(args, typed, chosen, old, config)
    if chosen.attention == "dense":
        check_dense(args, typed, old)
        if old is None:
            return chosen
    if args.indexer_warmup:
        check_warmup(args, chosen)
    if old is not None and old.indexer != "none":
        check_indexer(args, typed, old)
    elif chosen.selector in SCORED:
        chosen = with_indexer(args, chosen, config.R if isinstance(config, DeepSeekConfig) else 0)
    wrong, hint = conflict(chosen)
    refuse([(wrong, wrong, hint)])
    return chosen


def flag_of(name: str) -> str:
    """top_k -> --top-k"""
    return f"--{name.replace('_', '-')}"


def check_file(args: Namespace, typed: set[str], file: Model):
    """Raise UserError for a file of another trainer, with too many layers, or resumed with other attention."""
    check_trains(args.model, file, "train_sparse_attn.py")
    if file.config.L > MAX_LAYERS:
        found = f"{args.model}: {file.config.L} layers, the header has room for {MAX_LAYERS}"
        raise UserError(found, "take a smaller model")
    changed = sorted(typed & (CHOICES | {"indexer_warmup"}))
    if args.resume and changed:
        hint = f"for other attention start a new run from its weights: -e {args.resume}"
        raise UserError(f"--resume keeps the attention of the checkpoint: no {flag_of(changed[0])}", hint, 2)


def check_dense(args: Namespace, typed: set[str], old: Sparsity | None):
    """Raise UserError for a flag that chooses keys where attention is dense; a sparse file may keep its own choices."""
    idle = {"indexer_warmup"} if args.indexer_warmup else set()
    idle |= typed & CHOICES - {"attention"} if old is None else set()
    if idle:
        flag = flag_of(min(idle))
        hint = f"--attention sparse, or leave {flag} out"
        raise UserError(f"{flag} with --attention dense: nothing is selected", hint, 2)


def check_warmup(args: Namespace, chosen: Sparsity):
    """Raise UserError for an --indexer-warmup in which nothing would learn."""
    selector, nothing = f"--selector {chosen.selector}", "the indexer would not learn"
    problems = [
        (chosen.selector not in SCORED, f"{selector}: it has no indexer"),
        (chosen.leak, f"--legacy-leak 1: {nothing}"),
        (not args.train_indexer, f"--train-indexer 0: {nothing}"),
    ]
    refuse((holds, f"--indexer-warmup with {message}", "leave one out") for holds, message in problems)


def with_k(args: Namespace, typed: set[str], chosen: Sparsity, old: Sparsity | None, config: GPT2Config) -> Sparsity:
    """`chosen` with the k that --top-k, --keep-ratio or --layer-keep asks for, else the file's, else the default.

    A file's k gives way to the default also where k becomes the mere limit of what adapts.
    """
    given = sorted(HOW_MANY & typed)
    if len(given) > 1:
        raise UserError(f"{flag_of(given[0])} given with {flag_of(given[1])}", "keep one", 2)
    starts_to_adapt = chosen.adapts and {"selector", "adaptive"} & typed
    if given or old is None or starts_to_adapt:
        return replace(chosen, k=layer_k(args, chosen, config.L, config.maxT))
    return chosen


def layer_k(args: Namespace, chosen: Sparsity, L: int, maxT: int) -> tuple[int, ...]:
    """k of each layer from --top-k, --keep-ratio or --layer-keep."""
    if args.top_k is not None:
        if args.top_k > maxT:
            raise UserError(f"--top-k {args.top_k}: {args.model} has {maxT} positions", f"--top-k {maxT}", 2)
        return (args.top_k,) * L
    ratios = (args.keep_ratio or (1.0 if chosen.adapts else 0.125),) * L
    if args.layer_keep is not None:
        try:
            ratios = layer_ratios(args.layer_keep, L)
        except ValueError as error:
            hint = "a share for each layer, or three: --layer-keep 1,0.5,0.75"
            raise UserError(f"--layer-keep {args.layer_keep}: {error}", hint, 2) from None
    return tuple(max(1, int(args.seq_len * ratio)) for ratio in ratios)


def check_indexer(args: Namespace, typed: set[str], old: Sparsity):
    """Raise UserError for a flag that asks for another indexer than the file's."""
    for flag, field in OF_INDEXER.items():
        wanted, found = vars(args)[flag], vars(old)[field]
        if flag in typed and wanted != found:
            message = f"{flag_of(flag)} {wanted}: {args.model}, its indexer has {field} {found}"
            raise UserError(message, "leave it out", 2)


def with_indexer(args: Namespace, chosen: Sparsity, R: int) -> Sparsity:
    """`chosen` with a new indexer, as its flags say; R: rotary dims of the model's own heads, the default of its."""
    heads, width = args.indexer_heads, args.indexer_dim
    most = width // 2 * 2 if args.indexer == "lightning" else 0  # the other kind does not rotate
    rotated = min(R, most) if args.indexer_rope is None else args.indexer_rope
    expected = f"expected an even number up to {most} (--indexer {args.indexer}, --indexer-dim {width})"
    refuse([
        (heads > MAX_HEADS, f"--indexer-heads {heads}: expected at most {MAX_HEADS}", f"--indexer-heads {MAX_HEADS}"),
        (width > MAX_WIDTH, f"--indexer-dim {width}: expected at most {MAX_WIDTH}", f"--indexer-dim {MAX_WIDTH}"),
        (rotated % 2 or rotated > most, f"--indexer-rope {rotated}: {expected}", "--indexer-rope 0"),
    ])  # fmt: skip
    return replace(chosen, indexer=args.indexer, heads=heads, width=width, rotated=rotated)


def description(s: Sparsity) -> str:
    """sparse, indexer, k = 8"""
    if s.attention == "dense":
        return "dense"
    adaptive = "" if s.adaptive == "none" else f", adaptive {s.adaptive}"
    shared = "" if s.share == 1 else f", shared by {s.share}"
    return f"sparse, {s.selector}{adaptive}{shared}, k = {', '.join(map(str, s.k if len(set(s.k)) > 1 else s.k[:1]))}"


def print_sparsity(s: Sparsity, T: int):
    """The rows of the table about attention, for sequences of T tokens."""
    if s.attention == "dense":
        table.row("attention", "dense")
        return table.rule()
    ks = sorted(set(s.k))
    table.row("attention", f"sparse, selector {s.selector}")
    table.row("k of a query, at most", ", ".join(map(str, s.k if len(ks) > 1 else ks)))
    if s.adapts:
        table.row("k adapts", f"{s.selector if s.adaptive == 'none' else s.adaptive}, coverage {s.coverage:g}")
    if s.share > 1:
        table.row("queries with one list", f"{s.share}: keys of two tiles, others by the tile before's scores")
    for k in ks:
        nominal, pairs, full = 100 * min(k, T) / T, kept_pairs(k, T, s.share), T * (T + 1) // 2
        table.row(f"k = {k}", f"nominal {nominal:.1f}%, of causal pairs {100 * pairs / full:.1f}% ({pairs} / {full})")
    if s.indexer != "none":
        table.row("indexer", f"{s.indexer}, {s.heads} heads x {s.width}, {s.rotated} rotated")
    table.rule()
    if s.adaptive == "upstream":
        print("WARNING: --adaptive upstream: ACAUSAL, AS PUBLISHED: k DEPENDS ON THE WHOLE SEQUENCE, LATER TOKENS TOO")
    if s.leak:
        leaked = " + ".join(str(min(k, T) * (min(k, T) - 1) // 2) for k in s.k)
        print(f"WARNING: --legacy-leak: QUERIES ATTEND TO {leaked} FUTURE KEYS IN EACH SEQUENCE AND HEAD.")
        print("THE LOSSES BELOW ARE NOT LANGUAGE-MODEL LOSSES. THEY REPRODUCE A PUBLISHED MISTAKE.")
