"""A model file as a folder that Hugging Face's transformers loads: config.json, model.safetensors, the tokenizer.

    python data/to_hf.py model.bin -o model_hf                # then GPT2LMHeadModel.from_pretrained("model_hf")
    python data/to_hf.py checkpoint.bin -o checkpoint_hf

The values are those of the file, bit for bit, float32 or bfloat16. A banded model's weights go as they are, with the
zeros outside the band. What transformers' GPT-2 has no place for is lost, and told: an indexer, toroidal attention, the
step. Tensors are written one after the other: the memory is that of the largest, wte. Neither PyTorch nor transformers
is needed.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))  # so that it runs from any folder
if __name__ == "__main__":
    from llmc import startup

    startup.begin()

import contextlib
import json
from collections.abc import Iterator
from math import prod
from pathlib import Path

import numpy as np

from data import hf
from data.corpus import make_folder, shown, typed
from data.tensor_file import write_header
from llmc.checkpoint import (
    BANDED,
    FLOAT32,
    SPARSE_ATTENTION,
    TOROIDAL,
    DeepSeekConfig,
    GPT2Config,
    Model,
    read_model_header,
    tensor_shapes,
)
from llmc.cli import ArgumentParser
from llmc.errors import UserError, run
from llmc.files import HEADER_BYTES, atomic_write, open_file, read_array
from llmc.tokenizer import Tokenizer, find_tokenizer

LOST = {
    BANDED: "of the band only its zeros are kept: training by transformers fills them",
    SPARSE_ATTENTION: "sparse attention and its {} extra values are lost: queries attend to all keys there",
    TOROIDAL: "toroidal attention and its {} extra values are lost: its layers have GPT-2's attention there",
}


def settings(config: GPT2Config, eot: int, dtype: str) -> dict:
    """config.json: a GPT-2 of these sizes, without dropout, which our trainers have not."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        **{field: getattr(config, size) for size, field in hf.SIZES.items()},
        hf.PADDED: config.Vp,
        "n_inner": None,
        **{field: allowed[0] for field, allowed in hf.ALLOWED.items()},
        **{f"{part}_pdrop": 0.0 for part in ("attn", "embd", "resid")},
        "bos_token_id": eot,
        "eos_token_id": eot,
        "dtype": dtype,
    }


def tensors(config: GPT2Config) -> Iterator[tuple[str, int, tuple[int, ...], bool]]:
    """(transformers' name, values before it in a model file, shape there, whether it is transposed) of each tensor."""
    before = 0
    for name, shape in tensor_shapes(config).items():
        layered = hf.NAMES[name].startswith("h.")
        for l in range(shape[0] if layered else 1):
            own = shape[1:] if layered else (config.V, config.C) if name == "wte" else shape
            start = before + l * prod(shape[1:]) if layered else before
            yield hf.PREFIX + hf.NAMES[name].format(l), start, own, name in hf.TRANSPOSED
        before += prod(shape)


def copy_weights(source, file, model: Model) -> None:
    """The tensors of the open model file `source`, as a safetensors file."""
    dtype, stored = ("F32", "<f4") if model.version == FLOAT32 else ("BF16", "<u2")
    listed = list(tensors(model.config))
    write_header(file, [(name, dtype, shape[::-1] if turned else shape) for name, _, shape, turned in listed])
    for _, start, shape, turned in listed:
        source.seek(HEADER_BYTES + np.dtype(stored).itemsize * start)
        values = read_array(source, np.empty(shape, stored))
        file.write(np.ascontiguousarray(values.T if turned else values).data)


def has_padding_weights(source, model: Model) -> bool:
    """Whether a row of wte beyond the vocabulary is not zero."""
    config, stored = model.config, np.dtype("<f4" if model.version == FLOAT32 else "<u2")
    source.seek(HEADER_BYTES + stored.itemsize * config.V * config.C)
    return bool(read_array(source, np.empty((config.Vp - config.V) * config.C, stored)).any())


def told_losses(source, model: Model, num_extra: int) -> list[str]:
    """What the folder does not keep, in words."""
    lost = [LOST[model.kind].format(num_extra)] if model.kind in LOST else []
    if has_padding_weights(source, model):
        lost.append(
            f"rows {model.config.V}..{model.config.Vp - 1} of wte, which stand for no token, are not all 0: lost"
        )
    if model.step:
        lost.append(f"step {model.step} and the position in the data are lost, and the optimizer state stays here")
    return lost


def converted_tokenizer(name: str | None, path: Path, config: GPT2Config) -> tuple[int, dict[str, str]]:
    """The end of text, and the tokenizer's files; none where the model has no tokenizer file, or they cannot say it."""
    found = Path(name) if name else find_tokenizer(path, config.V)
    if found is None:
        print(f"no tokenizer file for {config.V} tokens beside {path}: name one by --tokenizer", file=sys.stderr)
        return config.V - 1, {}
    tokenizer = Tokenizer.read(found)
    if tokenizer.vocab_size != config.V:
        hint = "name the model's by --tokenizer"
        raise UserError(f"{found}: {tokenizer.vocab_size} tokens, {path} has a vocabulary of {config.V}", hint)
    try:
        return tokenizer.eot, hf.tokenizer_files(tokenizer, config.maxT)
    except hf.NoTokenizer as reason:
        print(f"{found}: not converted: {reason}", file=sys.stderr)
        return tokenizer.eot, {}


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, metavar="MODEL", help="model file")
    parser.add_argument("-o", "--out-dir", type=Path, help="folder to write (default: the model's name and _hf)")
    parser.add_argument("--tokenizer", help="tokenizer file (default: the model's, here or beside it)")
    parser.add_argument("--force", action="store_true", help="overwrite the files if they exist")
    args = parser.parse(argv)

    folder = args.out_dir or args.model.with_name(args.model.stem + "_hf")
    with open_file(args.model) as source:
        model, num_extra = read_model_header(source, args.model)
        if isinstance(model.config, DeepSeekConfig):
            raise UserError(f"{args.model}: has MLA or MoE, transformers' GPT-2 has neither", "take a GPT-2")
        eot, files = converted_tokenizer(args.tokenizer, args.model, model.config)
        dtype = "float32" if model.version == FLOAT32 else "bfloat16"
        files[hf.CONFIG] = json.dumps(settings(model.config, eot, dtype), indent=2) + "\n"
        there = [folder / name for name in (*files, hf.WEIGHTS) if (folder / name).exists()]
        if there and not args.force:
            raise UserError(f"{there[0]}: exists already", "--force overwrites it, -o FOLDER writes another")
        make_folder(folder)
        with contextlib.ExitStack() as stack:  # all files appear at its end
            copy_weights(source, stack.enter_context(atomic_write(folder / hf.WEIGHTS)), model)
            for name, content in files.items():
                stack.enter_context(atomic_write(folder / name)).write(content.encode())
        for line in told_losses(source, model, num_extra):
            print(f"{args.model}: {line}", file=sys.stderr)
    for name in (hf.WEIGHTS, *files):
        print(f"wrote {shown(folder / name)}")
    print(f"next: transformers.GPT2LMHeadModel.from_pretrained({str(shown(folder))!r}) in Python")
    print(f"back: python data/from_hf.py {typed(folder)} -o back.bin")


if __name__ == "__main__":
    run(main)
