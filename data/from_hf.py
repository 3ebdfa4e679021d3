"""A GPT-2 of Hugging Face's transformers as a model file, with its tokenizer.

    python data/from_hf.py gpt2 -o gpt2.bin                  # the folder gpt2/: config.json, model.safetensors ...
    python data/from_hf.py gpt2/model.safetensors -o gpt2_bf16.bin --dtype bfloat16

Weights are float32, float16 or bfloat16, in one file or in several with an index, of GPT2LMHeadModel or GPT2Model. What
is not a GPT-2 of our shape is refused, with the field of config.json or the tensor that is not. The tokenizer
(vocab.json and merges.txt, or tokenizer.json) becomes a tokenizer file beside the model. Tensors are read one after the
other: the memory is that of the largest, wte. Neither PyTorch nor transformers is needed.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))  # so that it runs from any folder
if __name__ == "__main__":
    from llmc import startup

    startup.begin()

import dataclasses
import re
from math import prod
from pathlib import Path

import numpy as np

from data import hf
from data.corpus import shown, typed
from data.tensor_file import FLOATS, Tensor, read_tensors
from llmc.checkpoint import (
    BFLOAT16,
    FLOAT32,
    GPT2Config,
    Model,
    model_header,
    num_parameters,
    tensor_shapes,
    write_values,
)
from llmc.cli import ArgumentParser
from llmc.errors import UserError, run
from llmc.files import atomic_write
from llmc.tokenizer import Tokenizer, tokenizer_name

VERSIONS = {"float32": FLOAT32, "bfloat16": BFLOAT16}
BUFFER = re.compile(r"h\.\d+\.attn\.(?:bias|masked_bias)")  # the causal mask, which older versions saved
HEAD = "lm_head.weight"
HINT = "only GPT-2 (GPT2LMHeadModel or GPT2Model) can be converted"


def open_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a folder, an index or a single file, by name without prefix, the causal masks left out."""
    if path.is_dir():
        found = [path / name for name in (hf.INDEX, hf.WEIGHTS) if (path / name).exists()]
        found += sorted(path.glob("*.safetensors"))[:1]
        if not found:
            pickled = "; pytorch_model.bin is a pickle: load it in transformers and save_pretrained"
            hint = "download model.safetensors" + (pickled if (path / "pytorch_model.bin").exists() else "")
            raise UserError(f"{path}: holds no {hf.WEIGHTS} and no {hf.INDEX}", hint)
        path = found[0]
    if path.name.endswith(".json"):
        tensors = read_index(path)
    else:
        tensors = read_tensors(path)
    names = {name: name.removeprefix(hf.PREFIX) for name in tensors}
    return {names[name]: tensor for name, tensor in tensors.items() if not BUFFER.fullmatch(names[name])}


def read_index(path: Path) -> dict[str, Tensor]:
    """The tensors of all files that an index lists. Raises UserError for a file that lacks one."""
    listed = hf.read_json(path).get("weight_map")
    hint = "download it again"
    if not isinstance(listed, dict) or not all(
        isinstance(name, str) and name == Path(name).name and name.endswith(".safetensors") for name in listed.values()
    ):
        raise UserError(f"{path}: weight_map is no object that gives each tensor a .safetensors file beside it", hint)
    tensors = {}
    for file in sorted(set(listed.values())):
        there = read_tensors(path.parent / file)
        wanted = [name for name, of in listed.items() if of == file]
        if missing := [name for name in wanted if name not in there]:
            raise UserError(f"{path.parent / file}: lacks {missing[0]}, which {path.name} says is in it", hint)
        tensors |= {name: there[name] for name in wanted}
    return tensors


def check_tensors(path: Path, tensors: dict[str, Tensor], config: GPT2Config) -> None:
    """Raise UserError unless the tensors are a GPT-2's of these sizes, its head tied to wte."""
    expected = {}
    for name, shape in tensor_shapes(dataclasses.replace(config, Vp=config.V)).items():
        own = shape[1:] if hf.NAMES[name].startswith("h.") else shape
        for l in range(config.L):
            expected[hf.NAMES[name].format(l)] = own[::-1] if name in hf.TRANSPOSED else own
    for name, shape in expected.items():
        if name not in tensors:
            raise UserError(f"{path}: holds no {name}, a GPT-2 of {config.L} layers has one", HINT)
        found = tensors[name]
        if found.shape != shape:
            raise UserError(f"{found.path}: {name} is {found.shape}, {hf.CONFIG} asks for {shape}", HINT)
        if found.dtype not in FLOATS:
            raise UserError(f"{found.path}: {name} is {found.dtype}, expected {', '.join(FLOATS)}", HINT)
    if others := [name for name in tensors if name not in expected and name != HEAD]:
        raise UserError(f"{path}: holds {others[0]}, which a GPT-2 has not ({len(others)} such tensors)", HINT)
    if head := tensors.get(HEAD):
        wte = tensors[hf.NAMES["wte"]]
        if (head.dtype, head.shape) != (wte.dtype, wte.shape) or not np.array_equal(head.read(), wte.read()):
            raise UserError(f"{head.path}: {HEAD} is not wte.weight: an output head of its own", HINT)


def without_padding(tensors: dict[str, Tensor], config: GPT2Config, tokenizer: Tokenizer | None) -> GPT2Config:
    """The sizes, if wte has zero rows beyond the tokenizer's tokens with these for padding."""
    V = tokenizer.vocab_size if tokenizer else config.V
    if V < config.V and not tensors[hf.NAMES["wte"]].read()[V:].any():
        return dataclasses.replace(config, V=V, Vp=hf.padded(config.V))
    return config


def copy_weights(file, tensors: dict[str, Tensor], config: GPT2Config, version: int) -> None:
    """The values of a model file, tensor by tensor, in llm.c's order."""
    for name, shape in tensor_shapes(config).items():
        layered, size = hf.NAMES[name].startswith("h."), 0
        for l in range(shape[0] if layered else 1):
            values = tensors[hf.NAMES[name].format(l)].read()
            write_values(file, values.T if name in hf.TRANSPOSED else values, version)
            size += values.size
        write_values(file, np.zeros(prod(shape) - size, np.float32), version)  # the padding, of wte alone


def open_tokenizer(folder: Path, settings: dict) -> Tokenizer | None:
    """The tokenizer in the folder, None, with a line that says why, if there is none for our files."""
    try:
        return hf.read_tokenizer(folder, settings)
    except hf.NoTokenizer as reason:
        print(f"{folder}: no tokenizer file is made: {reason}", file=sys.stderr)
        return None


def write_tokenizer(tokenizer: Tokenizer, config: GPT2Config, beside: Path, force: bool) -> None:
    """The tokenizer file beside the model, unless it does not fit, or another is there."""
    path = beside.parent / tokenizer_name(config.V)
    if tokenizer.vocab_size != config.V:
        why = f"it has {tokenizer.vocab_size} tokens, the model {config.V}"
    elif path.exists() and not force and Tokenizer.read(path) != tokenizer:
        why = f"{path} is another one's: --force overwrites it"
    else:
        tokenizer.write(path)
        print(f"wrote {shown(path)}: {tokenizer.vocab_size} tokens, {tokenizer.eot} ends a text")
        return
    print(f"no tokenizer file is made: {why}", file=sys.stderr)


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, metavar="SOURCE", help="folder, .safetensors file or its index")
    parser.add_argument("-o", "--output", type=Path, default=Path("model.bin"), help="model file to write")
    parser.add_argument("--force", action="store_true", help="overwrite the model file if it exists")
    parser.add_argument("--dtype", choices=VERSIONS, default="float32", help="how the file stores the weights")
    args = parser.parse(argv)

    if args.output.exists() and not args.force:
        raise UserError(f"{args.output}: exists already", "--force overwrites it, -o NAME.bin writes another")
    folder = args.source if args.source.is_dir() else args.source.parent
    config, settings = hf.read_sizes(folder / hf.CONFIG)
    tensors = open_weights(args.source)
    check_tensors(args.source, tensors, config)
    tokenizer = open_tokenizer(folder, settings)
    config = without_padding(tensors, config, tokenizer)
    version = VERSIONS[args.dtype]
    with atomic_write(args.output) as file:
        file.write(model_header(Model(config, np.zeros(0, np.float32), version=version)))
        copy_weights(file, tensors, config, version)
    print(f"wrote {shown(args.output)}: GPT-2, L={config.L} NH={config.NH} C={config.C} T={config.maxT} V={config.V}")
    print(f"{num_parameters(config):,} parameters, {args.dtype}, {os.path.getsize(args.output):,} bytes")
    if tokenizer:
        write_tokenizer(tokenizer, config, args.output, args.force)
    print(f"next: python generate.py -e {typed(args.output)}")


if __name__ == "__main__":
    run(main)
