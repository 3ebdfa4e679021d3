"""Model files, llm.c's version 3 (float32) and 5 (bfloat16), with our header extension.

    int32 header[256]: 20240326, version, maxT, V, L, NH, C, Vp, step, shard, sample, 0 ...
                  128: 20261121, 1, kind, number of extra float32 values, the kind's fields ...
    then the 16 tensors, each stacked over layers, then the extra values (float32 in both versions)

llm.c reads ints 0-7 and the 16 tensors and ignores the rest. Source: llm.c gpt2_build_from_checkpoint (reading) and
write_model in train_gpt2.py (writing, bfloat16 rounding to nearest even).

A model with DeepSeek's attention (MLA) or experts (MoE) is no GPT-2 any more and has a magic of its own, which llm.c
refuses: 20261122, version 1 (float32), ints 2-10 as above, 11-16 F, E, top, q_rank, kv_rank, R, the same extension, and
the tensors of `tensor_shapes`.
"""

import os
import shlex
from dataclasses import astuple, dataclass, field
from math import prod
from typing import BinaryIO

import numpy as np

from llmc.errors import UserError
from llmc.files import (
    EXTENSION,
    EXTENSION_MAGIC,
    EXTENSION_VERSION,
    HEADER_BYTES,
    HEADER_INTS,
    atomic_write,
    check_size,
    open_file,
    read_array,
    read_header,
)

MAGIC = 20240326
FLOAT32, BFLOAT16 = 3, 5  # versions
DEEPSEEK_MAGIC, DEEPSEEK_VERSION = 20261122, 1
DENSE, BANDED, SPARSE_ATTENTION, TOROIDAL = KINDS = range(4)
BLOCK = 1 << 22  # values written at a time
MAX_EXPERTS = 256
MAX_FIELDS = HEADER_INTS - EXTENSION - 4
HINT = "make model writes a random one, python data/starter_pack.py fetches OpenAI's"

# those with two dimensions in a layer or an expert: weight decay applies to them
MATRICES = ("wte", "wpe", "qkvw", "attprojw", "fcw", "fcprojw")  # llm.c's
MATRICES += ("qaw", "qbw", "kvaw", "kvbw", "routerw", "expertw", "expertprojw", "headw")
OUTSIDE = ("wte", "wpe", "headw")  # those that are no layer's


@dataclass(frozen=True)
class GPT2Config:
    """Sizes of a GPT-2: maxT positions, V tokens (Vp with padding), L layers, NH heads, C channels."""

    maxT: int = 1024
    V: int = 50257
    L: int = 12
    NH: int = 12
    C: int = 768
    Vp: int = 50304


@dataclass(frozen=True)
class DeepSeekConfig(GPT2Config):
    """Sizes of a GPT-2 with multi-head latent attention, a mixture of experts, or both, and an untied output head.

    MLA if kv_rank > 0: queries come from q_rank latent channels, keys and values from kv_rank, and R of the hs = C/NH
    channels of a head are rotary. MoE if E > 0: E experts of F hidden units, of which a token takes the `top` best.
    """

    F: int = 0
    E: int = 0
    top: int = 0
    q_rank: int = 0
    kv_rank: int = 0
    R: int = 0


@dataclass
class Model:
    """A model file in memory: sizes, all parameters as one flat float32 array, and what the header says."""

    config: GPT2Config
    params: np.ndarray
    step: int = 0
    shard: int = 0
    sample: int = 0
    kind: int = DENSE
    fields: tuple[int, ...] = ()
    extra: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    version: int = FLOAT32


def trainer_of(model: Model) -> str | None:
    """The script that trains this kind of model; None for a plain GPT-2, which all of them take."""
    if isinstance(model.config, DeepSeekConfig):
        return "train_sparse_attn.py"
    return {
        BANDED: "train_banded.py",
        SPARSE_ATTENTION: "train_sparse_attn.py",
        TOROIDAL: "train_toroidal.py",
    }.get(model.kind)


def check_trains(path: str | os.PathLike, model: Model, trainer: str) -> None:
    """Raise UserError, naming the trainer to use, unless the model is a plain GPT-2 or of this trainer's kind."""
    what = {
        DENSE: "a GPT-2",
        BANDED: "a GPT-2 with banded MLPs",
        SPARSE_ATTENTION: "a GPT-2 with sparse attention",
        TOROIDAL: "a GPT-2 with toroidal attention",
    }
    found = "a model with MLA or MoE" if isinstance(model.config, DeepSeekConfig) else what[model.kind]
    other = trainer_of(model)
    if other not in (None, trainer):
        hint = f"python {other} -e {shlex.quote(os.fspath(path))}"
        raise UserError(f"{path}: {found}, which {trainer} does not train", hint)


def tensor_shapes(config: GPT2Config) -> dict[str, tuple[int, ...]]:
    """The parameter tensors in file order, each with its shape over all layers: 16 in a GPT-2."""
    C, L = config.C, config.L
    deepseek = isinstance(config, DeepSeekConfig)
    return {
        "wte": (config.Vp, C),
        "wpe": (config.maxT, C),
        "ln1w": (L, C),
        "ln1b": (L, C),
        **(_mla_shapes(config) if deepseek and config.kv_rank else _attention_shapes(config)),
        "ln2w": (L, C),
        "ln2b": (L, C),
        **(_moe_shapes(config) if deepseek and config.E else _mlp_shapes(config)),
        "lnfw": (C,),
        "lnfb": (C,),
        **({"headw": (config.Vp, C), "headb": (config.Vp,)} if deepseek else {}),
    }


def _attention_shapes(config: GPT2Config) -> dict[str, tuple[int, ...]]:
    C, L = config.C, config.L
    return {"qkvw": (L, 3 * C, C), "qkvb": (L, 3 * C), "attprojw": (L, C, C), "attprojb": (L, C)}


def _mlp_shapes(config: GPT2Config) -> dict[str, tuple[int, ...]]:
    C, L = config.C, config.L
    return {"fcw": (L, 4 * C, C), "fcb": (L, 4 * C), "fcprojw": (L, C, 4 * C), "fcprojb": (L, C)}


def _mla_shapes(config: DeepSeekConfig) -> dict[str, tuple[int, ...]]:
    C, L, NH, R = config.C, config.L, config.NH, config.R
    return {
        "qaw": (L, config.q_rank, C),
        "qnw": (L, config.q_rank),
        "qbw": (L, C, config.q_rank),
        "kvaw": (L, config.kv_rank + R, C),  # the latent, then the one rotary key of all heads
        "kvnw": (L, config.kv_rank),
        "kvbw": (L, NH * (2 * (C // NH) - R), config.kv_rank),  # of each head hs - R key channels, then hs of the value
        "attprojw": (L, C, C),
    }


def _moe_shapes(config: DeepSeekConfig) -> dict[str, tuple[int, ...]]:
    C, L, E, F = config.C, config.L, config.E, config.F
    return {"routerw": (L, E, C), "expertw": (L, E, F, C), "expertprojw": (L, E, C, F)}


def num_parameters(config: GPT2Config) -> int:
    """Of a GPT-2: Vp*C + maxT*C + L*(12*C*C + 13*C) + 2*C"""
    return sum(map(prod, tensor_shapes(config).values()))


def named_views(flat, shapes: dict[str, tuple[int, ...]]) -> dict:
    """Views of the flat array (NumPy or CuPy), one for each name, in order; nothing is copied."""
    views, at = {}, 0
    for name, shape in shapes.items():
        views[name] = flat[at : at + prod(shape)].reshape(shape)
        at += prod(shape)
    return views


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 -> the upper 16 bits as uint16, rounded to nearest, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    quiet_nan = (bits >> np.uint32(16)) | np.uint32(0x40)
    return np.where(np.isnan(values), quiet_nan, rounded).astype("<u2")


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    """uint16 -> float32, exact."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def check_config(config: GPT2Config, name: str | os.PathLike, hint: str | None = HINT) -> None:
    """Raise UserError naming `name` (a file, or the flags) unless the sizes make a model."""
    limits = dict(maxT=1 << 24, V=1 << 24, L=1 << 12, NH=1 << 12, C=1 << 20, Vp=1 << 24)
    for key, most in limits.items():
        _check_range(config, key, 1, most, name, hint)
    if config.C % config.NH:
        raise UserError(f"{name}: C = {config.C} channels do not divide by NH = {config.NH} heads", hint)
    if config.Vp < config.V:
        raise UserError(f"{name}: padded vocabulary Vp = {config.Vp} is smaller than V = {config.V}", hint)
    if isinstance(config, DeepSeekConfig):
        _check_deepseek(config, name, hint)


def _check_deepseek(config: DeepSeekConfig, name: str | os.PathLike, hint: str | None) -> None:
    hs = config.C // config.NH
    mla, moe = config.kv_rank != 0, config.E != 0
    if not mla and not moe:
        raise UserError(f"{name}: neither MLA (kv_rank is 0) nor MoE (E is 0), expected one of them", hint)
    # the sizes of a part that is absent are 0, so that equal models have equal headers
    _check_range(config, "kv_rank", 0, 1 << 20, name, hint)
    _check_range(config, "q_rank", int(mla), mla << 20, name, hint)
    _check_range(config, "R", 2 * mla, hs * mla, name, hint)
    _check_range(config, "E", 0, MAX_EXPERTS, name, hint)
    _check_range(config, "top", int(moe), config.E, name, hint)
    _check_range(config, "F", int(moe), moe << 20, name, hint)
    if config.R % 2:
        raise UserError(f"{name}: R is {config.R}, expected an even number: rotation takes channels in pairs", hint)


def _check_range(
    config: GPT2Config, key: str, least: int, most: int, name: str | os.PathLike, hint: str | None
) -> None:
    value = getattr(config, key)
    if not least <= value <= most:
        raise UserError(f"{name}: {key} is {value}, expected {least}..{most}", hint)


def read_model(path: str | os.PathLike) -> Model:
    """Read a model file of either magic; parameters come as float32.

    Raises UserError for a wrong magic, version, size or range, or a file that is truncated or too long.
    """
    with open_file(path) as file:
        model, num_extra = read_model_header(file, path)
        count = num_parameters(model.config)
        if model.version == FLOAT32:
            model.params = read_array(file, np.empty(count, "<f4"))
        else:
            model.params = from_bfloat16(read_array(file, np.empty(count, "<u2")))
        model.extra = read_array(file, np.empty(num_extra, "<f4"))
    return model


def read_model_header(file: BinaryIO, path: str | os.PathLike) -> tuple[Model, int]:
    """A Model without its values, and the number of extra ones; `file` is left at the first value. As read_model."""
    header, config, version = _read_sizes(file, path)
    step, shard, sample = map(int, header[8:11])
    if min(step, shard, sample) < 0:
        raise UserError(f"{path}: step, shard, sample are {step}, {shard}, {sample}; expected none below 0", HINT)
    kind, num_extra, fields = DENSE, 0, ()
    if header[EXTENSION] == EXTENSION_MAGIC:
        extension, kind, num_extra = map(int, header[EXTENSION + 1 : EXTENSION + 4])
        if extension != EXTENSION_VERSION:
            raise UserError(f"{path}: header extension {extension}, this program knows {EXTENSION_VERSION}", HINT)
        if kind not in KINDS:
            raise UserError(f"{path}: kind {kind}, expected {KINDS[0]}..{KINDS[-1]}", HINT)
        if num_extra < 0:
            raise UserError(f"{path}: {num_extra} extra values, expected 0 or more", HINT)
        fields = tuple(map(int, header[EXTENSION + 4 :]))
    itemsize = 4 if version == FLOAT32 else 2
    size = HEADER_BYTES + itemsize * num_parameters(config) + 4 * num_extra
    check_size(file, path, size, "model file", HINT)
    return Model(config, np.zeros(0, np.float32), step, shard, sample, kind, fields, version=version), num_extra


def _read_sizes(file: BinaryIO, path: str | os.PathLike) -> tuple[np.ndarray, GPT2Config, int]:
    """The header of either magic, the sizes in it, checked, and whether the values are FLOAT32 or BFLOAT16."""
    deepseek = int.from_bytes(file.read(4), "little") == DEEPSEEK_MAGIC
    file.seek(0)
    if deepseek:
        header = read_header(file, path, DEEPSEEK_MAGIC, (DEEPSEEK_VERSION,), "model file", HINT)
        config, version = DeepSeekConfig(*map(int, header[2:8]), *map(int, header[11:17])), FLOAT32
    else:
        header = read_header(file, path, MAGIC, (FLOAT32, BFLOAT16), "model file", HINT)
        config, version = GPT2Config(*map(int, header[2:8])), int(header[1])
    check_config(config, path)
    return header, config, version


def read_config(path: str | os.PathLike) -> GPT2Config:
    """The sizes of a model file of either magic. Raises UserError for a wrong magic, version or range."""
    with open_file(path) as file:
        return _read_sizes(file, path)[1]


def check_is_model(path: str | os.PathLike, flag: str) -> None:
    """Raise UserError naming `flag` unless the existing `path` is a model file, which a checkpoint may replace."""
    with open_file(path) as file:
        magic = int.from_bytes(file.read(4), "little")
    if magic not in (MAGIC, DEEPSEEK_MAGIC):
        raise UserError(f"{flag} {path}: exists and is not a model file (magic {magic})", "name another file")


def write_model(path: str | os.PathLike, model: Model) -> None:
    """Write `model` as its version says (FLOAT32 or BFLOAT16), atomically. Raises UserError if the system refuses.

    The class of its config chooses the magic; a DeepSeekConfig's file is float32.
    """
    if model.params.size != num_parameters(model.config):
        raise ValueError(f"{model.params.size} parameters, the sizes ask for {num_parameters(model.config)}")
    header = model_header(model)
    with atomic_write(path) as file:
        file.write(header)
        write_values(file, model.params, model.version)
        file.write(np.ascontiguousarray(model.extra, "<f4").data)


def write_values(file: BinaryIO, values: np.ndarray, version: int) -> None:
    """Append float32 values as the version says."""
    flat = np.ascontiguousarray(values, "<f4").reshape(-1)
    for start in range(0, flat.size, BLOCK):  # converting takes several times the block's memory
        block = flat[start : start + BLOCK]
        file.write((to_bfloat16(block) if version == BFLOAT16 else block).data)


def model_header(model: Model) -> bytes:
    """The header of the model's file; of its values only the number of extra ones counts."""
    if len(model.fields) > MAX_FIELDS:
        raise ValueError(f"{len(model.fields)} header fields, at most {MAX_FIELDS}")
    deepseek = isinstance(model.config, DeepSeekConfig)
    if deepseek and model.version != FLOAT32:
        raise ValueError(f"version {model.version}, a model with MLA or MoE is written in float32 ({FLOAT32})")
    header = np.zeros(HEADER_INTS, "<i4")
    header[:2] = (DEEPSEEK_MAGIC, DEEPSEEK_VERSION) if deepseek else (MAGIC, model.version)
    sizes, own_sizes = astuple(model.config)[:6], astuple(model.config)[6:]
    header[2:8], header[11 : 11 + len(own_sizes)] = sizes, own_sizes
    header[8:11] = model.step, model.shard, model.sample
    header[EXTENSION : EXTENSION + 4] = EXTENSION_MAGIC, EXTENSION_VERSION, model.kind, model.extra.size
    header[EXTENSION + 4 : EXTENSION + 4 + len(model.fields)] = model.fields
    return header.tobytes()
