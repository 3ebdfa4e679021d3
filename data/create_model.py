"""Write a GPT-2 with random weights (llm.c's gpt2_d12.bin and the like), without PyTorch.

    python data/create_model.py                             # model.bin: tiny, 7,265,024 parameters
    python data/create_model.py --preset d12 -o d12.bin     # the sizes of GPT-2 124M
    python data/create_model.py --preset small -T 1024      # a preset with one size changed
    python data/create_model.py --vocab byte -o byte.bin    # 256 tokens: small and fast, no BPE

The weights are those of llmc.init.gpt2_init for the seed. A vocabulary of V tokens is padded to a multiple of 128. The
tokenizer file that goes with the vocabulary is written beside the model, unless it is there already.
"""

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it runs from any folder

from data.corpus import shown, write_tokenizer
from llmc.checkpoint import BFLOAT16, FLOAT32, GPT2Config, Model, check_config, num_parameters, write_model
from llmc.cli import ArgumentParser, integer, positive_int, seed
from llmc.errors import UserError, run
from llmc.init import gpt2_init
from llmc.tokenizer import BYTE_VOCAB, GPT2_VOCAB

PRESETS = {
    "tiny": GPT2Config(C=128, L=4, NH=4, maxT=256),
    "small": GPT2Config(C=512, L=8, NH=8, maxT=512),
    "d12": GPT2Config(C=768, L=12, NH=12),  # d12..d48 are OpenAI's four, by their number of layers
    "d24": GPT2Config(C=1024, L=24, NH=16),
    "d36": GPT2Config(C=1280, L=36, NH=20),
    "d48": GPT2Config(C=1600, L=48, NH=25),
}
VOCABULARIES = {"gpt2": GPT2_VOCAB, "byte": BYTE_VOCAB}
MAX_VOCABULARY = 1 << 16  # tokens are uint16 in the data files
VERSIONS = {"float32": FLOAT32, "bfloat16": BFLOAT16}


def vocabulary(text: str) -> int:
    """--vocab: "gpt2", "byte" or a number -> V"""
    if text in VOCABULARIES:
        return VOCABULARIES[text]
    try:
        return integer(text, 1, MAX_VOCABULARY)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}, gpt2 or byte") from None


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line. Raises UserError naming the flag, with exit code 2."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, default=Path("model.bin"), help="model file to write")
    parser.add_argument("--force", action="store_true", help="overwrite the model file if it exists")
    parser.add_argument("--seed", type=seed, default=42, help="seed of the random weights")
    parser.add_argument("--dtype", choices=VERSIONS, default="float32", help="how the file stores the weights")
    parser.add_argument("--vocab", type=vocabulary, default="gpt2", help="gpt2, byte, or a number of tokens")
    sizes = parser.add_argument_group("sizes", "a preset, of which -C, -L, -H and -T each replace one size")
    sizes.add_argument("--preset", choices=PRESETS, default="tiny", help="sizes to start from")
    for flag, name, dest, what in (
        ("-C", "--channels", "C", "channels"),
        ("-L", "--layers", "L", "layers"),
        ("-H", "--heads", "NH", "attention heads"),
        ("-T", "--max-seq-len", "maxT", "positions"),
    ):
        what += " (default: the preset's)"
        sizes.add_argument(flag, name, dest=dest, metavar=flag[1], type=positive_int, help=what)
    return parser.parse(argv)


def model_config(args: argparse.Namespace) -> GPT2Config:
    """The preset with the sizes of the command line. Raises UserError if they make no GPT-2."""
    given = {name: getattr(args, name) for name in ("maxT", "L", "NH", "C") if getattr(args, name) is not None}
    config = replace(PRESETS[args.preset], V=args.vocab, Vp=-(-args.vocab // 128) * 128, **given)
    try:
        check_config(config, "-C -L -H -T", "choose other sizes, or a preset")
    except UserError as error:
        error.exit_code = 2
        raise
    return config


def write_matching_tokenizer(name: str, folder: Path) -> None:
    """The tokenizer file of a named vocabulary; the model trains without it, so its absence is only a warning."""
    try:
        write_tokenizer(name, folder)
    except UserError as error:
        print(f"warning: no {name}_tokenizer.bin: {error.message}\n---> HINT: {error.hint}", file=sys.stderr)


def training_command(name: str | None, path: Path) -> str:
    """What to type next; the named vocabularies find their data by themselves."""
    data = "" if name else " -i TRAIN.bin -j VAL.bin"
    return f"python train_banded.py -e {shown(path)}{data}"


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    config = model_config(args)
    if args.output.exists() and not args.force:
        raise UserError(f"{args.output}: exists already", "--force overwrites it, -o NAME.bin writes another")
    write_model(args.output, Model(config, gpt2_init(config, args.seed), version=VERSIONS[args.dtype]))
    rows = {
        "model file": f"{shown(args.output)} ({args.dtype}, seed {args.seed})",
        "max_seq_len": config.maxT,
        "vocab_size": config.V,
        "padded_vocab_size": config.Vp,
        "num_layers": config.L,
        "num_heads": config.NH,
        "channels": config.C,
        "num_parameters": f"{num_parameters(config):,}",
        "file size": f"{os.path.getsize(args.output):,} bytes",
    }
    for row, value in rows.items():
        print(f"{row:<18} {value}")
    name = {size: name for name, size in VOCABULARIES.items()}.get(config.V)
    if name:
        write_matching_tokenizer(name, args.output.parent)
    print(f"next: {training_command(name, args.output)}")


if __name__ == "__main__":
    run(main)
