"""How a model attends: the options, and the fields by which the header of its file keeps them.

The fields behind kind SPARSE_ATTENTION, all int32 (coverage as the bits of a float32), then k for each layer:

    layout 1, attention, selector, indexer, heads, width, rotated dims, force self, sink, adaptive, leak, coverage, seed
"""

import struct
from argparse import ArgumentTypeError, Namespace
from dataclasses import dataclass, replace
from math import prod

from llmc import table
from llmc.checkpoint import SPARSE_ATTENTION, DeepSeekConfig, GPT2Config, Model, check_trains
from llmc.cli import fraction
from llmc.errors import UserError
from systems.selection import kept_pairs

LAYOUT = 1
ATTENTION = ("dense", "sparse")
SELECTORS = ("indexer", "top-p", "recency", "random", "oracle")
SCORED = SELECTORS[:2]  # by the indexer
INDEXERS = ("none", "lightning", "upstream")
ADAPTIVE = ("none", "prefix", "upstream")
FEATURES, HIDDEN = 5, 16  # of --adaptive prefix: kernels/cpu/sparse/keep_controller.py
NUM_FIELDS = 13  # in front of the layers' k
MAX_LAYERS, MAX_HEADS, MAX_WIDTH = 100, 256, 1024
HINT = "save it again with train_sparse_attn.py"


@dataclass(frozen=True)
class Sparsity:
    """attention: what the model runs; k: how many keys a query of each layer keeps at most; the rest by their flags.

    coverage is the share of attention that top-p keeps and that --adaptive prefix learns to.
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

    def fields(self) -> tuple[int, ...]:
        """The header fields."""
        numbers = (ATTENTION.index(self.attention), SELECTORS.index(self.selector), INDEXERS.index(self.indexer))
        numbers += (self.heads, self.width, self.rotated, int(self.force_self), int(self.sink))
        numbers += (ADAPTIVE.index(self.adaptive), int(self.leak))
        return (LAYOUT, *numbers, *struct.unpack("<i", struct.pack("<f", self.coverage)), self.seed, *self.k)


def read_fields(fields: tuple[int, ...], layers: int, positions: int, name: str) -> Sparsity:
    """The Sparsity of header fields. Raises UserError naming the file `name` for anything out of range."""
    if fields[0] != LAYOUT:
        raise UserError(f"{name}: layout {fields[0]} of the sparse attention's fields, expected {LAYOUT}", HINT)
    if layers > MAX_LAYERS:
        raise UserError(f"{name}: {layers} layers, the header has room for {MAX_LAYERS}", HINT)
    attention, selector, indexer, heads, width, rotated, force_self, sink, adaptive, leak, coverage, seed = fields[1:13]
    k = fields[NUM_FIELDS : NUM_FIELDS + layers]
    (coverage,) = struct.unpack("<f", struct.pack("<i", coverage))
    limits = {"attention": (attention, 0, 1), "selector": (selector, 0, 4), "indexer": (indexer, 0, 2)}
    limits |= {"indexer heads": (heads, 1, MAX_HEADS), "indexer width": (width, 1, MAX_WIDTH)}
    limits |= {"rotated dims": (rotated, 0, width)}
    limits |= {"force self": (force_self, 0, 1), "sink": (sink, 0, 1), "adaptive": (adaptive, 0, 2)}
    limits |= {"leak": (leak, 0, 1), "seed": (seed, 0, 2**31 - 1)}
    limits |= {f"k of layer {layer}": (value, 1, positions) for layer, value in enumerate(k)}
    for what, (value, least, most) in limits.items():
        if not least <= value <= most:
            raise UserError(f"{name}: {what} is {value}, expected {least}..{most}", HINT)
    if not 0 < coverage <= 1:
        raise UserError(f"{name}: coverage is {coverage}, expected above 0, at most 1", HINT)
    if rotated % 2:
        raise UserError(f"{name}: {rotated} rotated dims of the indexer, expected an even number", HINT)
    names = ATTENTION[attention], SELECTORS[selector], INDEXERS[indexer]
    flags = bool(force_self), bool(sink), ADAPTIVE[adaptive], bool(leak)
    s = Sparsity(tuple(k), *names, heads, width, rotated, *flags, coverage, seed)
    if wrong := conflict(s):
        raise UserError(f"{name}: {wrong.replace('--', '')}", HINT)
    return s


def conflict(s: Sparsity) -> str:
    """What does not go together, in terms of the flags; nothing if all does."""
    if s.selector in SCORED and s.indexer == "none":
        return f"--selector {s.selector} without an indexer"
    if s.adaptive != "none" and s.selector != "indexer":
        return f"--adaptive {s.adaptive} with --selector {s.selector}: it chooses k for --selector indexer alone"
    if s.leak and (s.adaptive != "none" or s.selector == "top-p"):
        other = "--selector top-p" if s.selector == "top-p" else f"--adaptive {s.adaptive}"
        return f"--legacy-leak with {other}: it takes the same k for all queries"
    return ""


def is_mla(config: GPT2Config) -> bool:
    """Whether queries, keys and values go through latents (multi-head latent attention)."""
    return getattr(config, "kv_rank", 0) > 0


def extra_shapes(config: GPT2Config, s: Sparsity) -> dict[str, tuple[int, ...]]:
    """The tensors behind the model's own, in file order: the indexer's and the controllers'."""
    L, C, width, shapes = config.L, config.C, s.heads * s.width, {}
    if s.indexer == "lightning":  # queries from MLA's query latent where there is one, as in the original
        shapes |= dict(idxqw=(L, width, config.q_rank if is_mla(config) else C), idxkw=(L, s.width, C))
        shapes |= dict(idxknw=(L, s.width), idxknb=(L, s.width), idxww=(L, s.heads, C))
    elif s.indexer == "upstream":
        shapes |= dict(idxqw=(L, width, C), idxqb=(L, width), idxkw=(L, width, C), idxkb=(L, width), idxwb=(L, s.heads))
    if s.adaptive == "prefix":
        shapes |= dict(ctlw1=(L, HIDDEN, FEATURES), ctlb1=(L, HIDDEN), ctlw2=(L, 1, HIDDEN), ctlb2=(L, 1))
    elif s.adaptive == "upstream":  # 313,596 values a layer for C = 256: kernels/cpu/sparse/upstream_controller.py
        shapes |= dict(controller=(L, 4 * C * C + 200 * C + 252))
    return shapes


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


# ----------------------------------------------------------------------------------------------------------------------
# the options

HOW_MANY = {"top_k", "keep_ratio", "layer_keep"}
SAVED = {"attention": "attention", "selector": "selector", "force_self": "force_self", "sink": "sink"}
SAVED |= {"adaptive": "adaptive", "legacy_leak": "leak", "coverage": "coverage"}  # flag: field of Sparsity
OF_INDEXER = {"indexer": "indexer", "indexer_heads": "heads", "indexer_dim": "width", "indexer_rope": "rotated"}
CHOICES = HOW_MANY | set(SAVED) | set(OF_INDEXER)


def ids(text: str) -> str:
    """FIRST:END, two token ids."""
    first, colon, end = text.partition(":")
    if not (colon and first.isdigit() and end.isdigit() and int(first) < int(end) < 1 << 24):
        raise ArgumentTypeError(f"{text!r}, expected FIRST:END, two token ids")
    return text


def share(text: str) -> float:
    """A number above 0, at most 1."""
    if not (value := fraction(text)):
        raise ArgumentTypeError(f"{text!r}, expected a number above 0, at most 1")
    return value


def coverage(text: str) -> float:
    """The same, rounded to float32: as the header has it, so that a resumed run goes on with the same number."""
    (value,) = struct.unpack("<f", struct.pack("<f", share(text)))
    if not value:
        raise ArgumentTypeError(f"{text!r}, expected a number above 0, at most 1")
    return value


def check_architecture(args: Namespace, config: GPT2Config):
    """--mla, --experts and --top-experts name what the file must be: they cannot make another model of it."""
    found = {
        "mla": is_mla(config),
        "experts": getattr(config, "E", 0),
        "top_experts": getattr(config, "top", 0),
    }
    for name, value in found.items():
        wanted = getattr(args, name)
        if wanted is not None and wanted != value:
            kind = "a DeepSeek-style model" if isinstance(config, DeepSeekConfig) else "a plain GPT-2"
            flag = f"--{name.replace('_', '-')} {int(wanted)}"
            hint = "python data/create_model.py --preset dsa -o dsa.bin writes a model with both"
            raise UserError(f"{flag}: {args.model} is {kind} with {name.replace('_', ' ')} {int(value)}", hint, 2)


def choose_sparsity(args: Namespace, typed: set[str], file: Model) -> Sparsity:
    """How the model will attend: by the flags typed, then by its file, then by the flags' defaults."""
    L, T, maxT, old = file.config.L, args.seq_len, file.config.maxT, None
    check_trains(args.model, file, "train_sparse_attn.py")
    if L > MAX_LAYERS:
        raise UserError(f"{args.model}: {L} layers, the header has room for {MAX_LAYERS}", "take a smaller model")
    if args.resume and (changed := sorted(typed & (CHOICES | {"indexer_warmup"}))):
        hint = f"for other attention start a new run from its weights: -e {args.resume}"
        raise UserError(f"--resume keeps the attention of the checkpoint: no {flag_of(changed[0])}", hint, 2)
    if file.kind == SPARSE_ATTENTION:
        old = read_sparsity(file, args.model)
    chosen = old or Sparsity(k=(1,) * L, seed=args.seed or 1337)
    flags = {flag: field for flag, field in SAVED.items() if old is None or flag in typed}
    chosen = replace(chosen, **{field: getattr(args, flag) for flag, field in flags.items()})
    if len(given := sorted(HOW_MANY & typed)) > 1:
        raise UserError(f"{flag_of(given[0])} given with {flag_of(given[1])}", "keep one", 2)
    adapts = chosen.selector == "top-p" or chosen.adaptive != "none"  # and did not before: then k is only its limit
    if given or old is None or (adapts and {"selector", "adaptive"} & typed):
        chosen = replace(chosen, k=layer_k(args, chosen, L, T, maxT))
    if chosen.attention == "dense":
        idle = {"indexer_warmup"} if args.indexer_warmup else set()
        idle |= typed & CHOICES - {"attention"} if old is None else set()
        if idle:
            flag = flag_of(min(idle))
            hint = f"--attention sparse, or leave {flag} out"
            raise UserError(f"{flag} with --attention dense: nothing is selected", hint, 2)
        if old is None:
            return chosen
    if args.indexer_warmup:
        check_warmup(args, chosen)
    chosen = with_indexer(args, typed, chosen, old, getattr(file.config, "R", 0))
    if wrong := conflict(chosen):
        raise UserError(wrong, "leave one of them out", 2)
    return chosen


def flag_of(name: str) -> str:
    """top_k -> --top-k"""
    return f"--{name.replace('_', '-')}"


def check_warmup(args: Namespace, chosen: Sparsity):
    """Raise UserError for an --indexer-warmup in which nothing would learn."""
    if chosen.selector not in SCORED:
        raise UserError(f"--indexer-warmup with --selector {chosen.selector}: it has no indexer", "leave one out", 2)
    if chosen.leak or not args.train_indexer:
        other = "--legacy-leak 1" if chosen.leak else "--train-indexer 0"
        raise UserError(f"--indexer-warmup with {other}: the indexer would not learn", "leave one out", 2)


def layer_k(args: Namespace, chosen: Sparsity, L: int, T: int, maxT: int) -> tuple[int, ...]:
    """k of each layer from --top-k, --keep-ratio or --layer-keep."""
    if args.top_k is not None:
        if args.top_k > maxT:
            raise UserError(f"--top-k {args.top_k}: {args.model} has {maxT} positions", f"--top-k {maxT}", 2)
        return (args.top_k,) * L
    default = 1.0 if chosen.selector == "top-p" or chosen.adaptive != "none" else 0.125
    ratios = (args.keep_ratio or default,) * L
    if args.layer_keep is not None:
        try:
            ratios = layer_ratios(args.layer_keep, L)
        except ValueError as error:
            hint = "a share for each layer, or three: --layer-keep 1,0.5,0.75"
            raise UserError(f"--layer-keep {args.layer_keep}: {error}", hint, 2) from None
    return tuple(max(1, int(T * ratio)) for ratio in ratios)


def with_indexer(args: Namespace, typed: set[str], chosen: Sparsity, old: Sparsity | None, R: int) -> Sparsity:
    """`chosen` with the file's indexer, or with a new one if it needs one; R of the model's own dims are rotated."""
    if old is not None and old.indexer != "none":
        for flag, field in OF_INDEXER.items():
            if flag in typed and getattr(args, flag) != getattr(old, field):
                found = f"its indexer has {field} {getattr(old, field)}"
                raise UserError(f"{flag_of(flag)} {getattr(args, flag)}: {args.model}, {found}", "leave it out", 2)
    elif chosen.selector in SCORED:
        heads, width = args.indexer_heads, args.indexer_dim
        for flag, size, most in (("--indexer-heads", heads, MAX_HEADS), ("--indexer-dim", width, MAX_WIDTH)):
            if size > most:
                raise UserError(f"{flag} {size}: expected at most {most}", f"{flag} {most}", 2)
        most = width // 2 * 2 if args.indexer == "lightning" else 0  # the other kind does not rotate
        rotated = min(R, most) if args.indexer_rope is None else args.indexer_rope
        if rotated % 2 or rotated > most:
            expected = f"expected an even number up to {most} (--indexer {args.indexer}, --indexer-dim {width})"
            raise UserError(f"--indexer-rope {rotated}: {expected}", "--indexer-rope 0", 2)
        chosen = replace(chosen, indexer=args.indexer, heads=heads, width=width, rotated=rotated)
    return chosen


def description(s: Sparsity) -> str:
    """In a line: sparse, indexer, k = 8"""
    if s.attention == "dense":
        return "dense"
    adaptive = "" if s.adaptive == "none" else f", adaptive {s.adaptive}"
    return f"sparse, {s.selector}{adaptive}, k = {', '.join(map(str, s.k if len(set(s.k)) > 1 else s.k[:1]))}"


def print_sparsity(config: GPT2Config, s: Sparsity, T: int):
    """The rows of the table about attention."""
    if s.attention == "dense":
        table.row("attention", "dense")
        return table.rule()
    ks = sorted(set(s.k))
    table.row("attention", f"sparse, selector {s.selector}")
    table.row("k of a query, at most", ", ".join(map(str, s.k if len(ks) > 1 else ks)))
    if s.adaptive != "none" or s.selector == "top-p":
        table.row("k adapts", f"{s.selector if s.adaptive == 'none' else s.adaptive}, coverage {s.coverage:g}")
    for k in ks:
        nominal, pairs, full = 100 * min(k, T) / T, kept_pairs(k, T), T * (T + 1) // 2
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
