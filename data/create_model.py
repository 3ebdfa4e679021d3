"""Write a GPT-2 with random weights (llm.c's gpt2_d12.bin and the like), or one with MLA and MoE, without PyTorch.

    python data/create_model.py                             # model.bin: tiny, 7,265,024 parameters
    python data/create_model.py --preset d12 -o d12.bin     # the sizes of GPT-2 124M
    python data/create_model.py --preset small -T 1024      # a preset with one size changed
    python data/create_model.py --vocab byte -o byte.bin    # 256 tokens: small and fast, no BPE
    python data/create_model.py --mla 1 --experts 4         # latent attention and experts in place of GPT-2's
    python data/create_model.py --preset dsa --vocab 1000 -o dsa.bin     # 10,008,552 parameters

The weights are those of llmc.init.gpt2_init for the seed. A vocabulary of V tokens is padded to a multiple of 128, with
--mla or --experts of 8. The preset dsa has the sizes of the published sparse-attention model, without its indexers. The
tokenizer file that goes with the vocabulary is written beside the model, unless it is there already.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))  # so that it runs from any folder
if __name__ == "__main__":
    from llmc import startup

    startup.begin()

import argparse
from pathlib import Path

from data.corpus import shown, typed, write_tokenizer
from llmc.checkpoint import (
    BFLOAT16,
    FLOAT32,
    DeepSeekConfig,
    GPT2Config,
    Model,
    check_config,
    num_parameters,
    write_model,
)
from llmc.cli import ArgumentParser, flag01, integer, natural, positive_int, seed
from llmc.errors import UserError, run
from llmc.init import gpt2_init
from llmc.options import default_data
from llmc.tokenizer import BYTE_VOCAB, GPT2_VOCAB

PRESETS = {
    "tiny": GPT2Config(C=128, L=4, NH=4, maxT=256),
    "small": GPT2Config(C=512, L=8, NH=8, maxT=512),
    "d12": GPT2Config(C=768, L=12, NH=12),  # d12..d48 are OpenAI's four, by their number of layers
    "d24": GPT2Config(C=1024, L=24, NH=16),
    "d36": GPT2Config(C=1280, L=36, NH=20),
    "d48": GPT2Config(C=1600, L=48, NH=25),
    "dsa": DeepSeekConfig(C=256, L=4, NH=8, maxT=2048, F=1024, E=4, top=2, q_rank=64, kv_rank=64, R=16),
}
SIZES = ("maxT", "L", "NH", "C")  # that a flag may replace in a preset
PUBLISHED = PRESETS["dsa"]  # whose MLA and MoE are the defaults of their flags
FLAGS = {"q_rank": "--q-rank", "kv_rank": "--kv-rank", "R": "--rope-dim"}
FLAGS |= {"E": "--experts", "top": "--top-experts", "F": "--expert-width"}
FLAGS_HINT = "R is --rope-dim, of the C / NH channels of a head; E is --experts, top --top-experts, F --expert-width"
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
    add = parser.add_argument_group("DeepSeek's parts").add_argument
    add("--mla", type=flag01, help="1: multi-head latent attention (default: the preset's)")
    add("--q-rank", type=positive_int, help="latent channels of the queries (default: 64)")
    add("--kv-rank", type=positive_int, help="latent channels of keys and values (default: 64)")
    add("--rope-dim", dest="R", metavar="R", type=positive_int, help="rotary channels of a head (default: 16)")
    add("--experts", dest="E", metavar="E", type=natural, help="experts, 0: GPT-2's MLP (default: the preset's)")
    add("--top-experts", dest="top", metavar="K", type=positive_int, help="experts of a token (default: 2)")
    add("--expert-width", dest="F", metavar="F", type=positive_int, help="hidden units of an expert (default: 4 C)")
    return parser.parse(argv)


def deepseek_sizes(args: argparse.Namespace, preset: GPT2Config, C: int) -> dict[str, int]:
    """What a DeepSeekConfig of C channels has besides a GPT-2's sizes, {} if there is neither MLA nor MoE.

    Raises UserError for a flag of a part that is not there.
    """
    mla = isinstance(preset, DeepSeekConfig) if args.mla is None else args.mla
    experts = getattr(preset, "E", 0) if args.E is None else args.E
    parts = (("--mla 1", mla, ("q_rank", "kv_rank", "R")), ("--experts N", experts, ("top", "F")))
    for part, there, names in parts:
        for name in names:
            if getattr(args, name) is not None and not there:
                raise UserError(f"{FLAGS[name]} without {part}", f"add {part}, or leave {FLAGS[name]} out", 2)
    sizes = {name: getattr(args, name) or getattr(PUBLISHED, name) for name in parts[0][2]} if mla else {}
    if experts:
        sizes |= {"E": experts, "top": args.top or min(PUBLISHED.top, experts), "F": args.F or 4 * C}
    return sizes


def model_config(args: argparse.Namespace) -> GPT2Config:
    """The preset with the sizes of the command line. Raises UserError if they make no model."""
    preset = PRESETS[args.preset]
    sizes = {name: getattr(args, name) or getattr(preset, name) for name in SIZES}
    deepseek = deepseek_sizes(args, preset, sizes["C"])
    padding = 8 if deepseek else 128
    sizes |= {"V": args.vocab, "Vp": -(-args.vocab // padding) * padding}
    config = DeepSeekConfig(**sizes, **deepseek) if deepseek else GPT2Config(**sizes)
    try:
        check_config(config, "-C -L -H -T", FLAGS_HINT if deepseek else "choose other sizes, or a preset")
    except UserError as error:
        error.exit_code = 2
        raise
    if deepseek and args.dtype != "float32":
        raise UserError(f"--dtype {args.dtype}: a model with MLA or MoE is stored in float32", "leave --dtype out", 2)
    return config


def write_matching_tokenizer(name: str, folder: Path) -> None:
    """The tokenizer file of a named vocabulary; the model trains without it, so its absence is only a warning."""
    try:
        write_tokenizer(name, folder)
    except UserError as error:
        print(f"warning: no {name}_tokenizer.bin: {error.message}\n---> HINT: {error.hint}", file=sys.stderr)


def next_lines(config: GPT2Config, name: str | None, path: Path) -> list[str]:
    """What to type next, as lines "next: ..." and "then: ...".

    The trainers find the data of a named vocabulary; if they are not made yet, their script comes first. There are none
    for any other vocabulary, and a command would fail: there it says so in words.
    """
    script = "train_sparse_attn.py" if isinstance(config, DeepSeekConfig) else "train_banded.py"
    if name is None:
        ids = f"no data script makes tokens 0..{config.V - 1}: write your own"
        return [f"next: {ids}, then name them by -i and -j to {script} -e {typed(path)}"]
    commands = [f"python {script} -e {typed(path)}"]
    if not all(os.path.exists(default_data(config.V, split)) for split in ("train", "val")):
        commands.insert(0, "python data/shakespeare.py" + (" --tokenizer byte" if name == "byte" else ""))
    return [f"{label}: {command}" for label, command in zip(("next", "then"), commands)]


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
        **{flag[2:].replace("-", "_"): getattr(config, size, 0) for size, flag in FLAGS.items()},
        "num_parameters": f"{num_parameters(config):,}",
        "file size": f"{os.path.getsize(args.output):,} bytes",
    }
    for row, value in rows.items():
        if value:
            print(f"{row:<18} {value}")
    name = {size: name for name, size in VOCABULARIES.items()}.get(config.V)
    if name:
        write_matching_tokenizer(name, args.output.parent)
    print("\n".join(next_lines(config, name, args.output)))


if __name__ == "__main__":
    run(main)
