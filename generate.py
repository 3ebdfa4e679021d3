"""Text from any checkpoint that a trainer wrote, or from llm.c's gpt2_124M.bin.

    python generate.py -e checkpoint.bin -p "ROMEO:" -n 200
    python generate.py -e gpt2_124M.bin -p "The band of" --temperature 0.8 --top-k 50 -s 42

Sizes, kind and bands come from the file; the prompt is encoded with the tokenizer file beside it. Keys and values are
kept, so a token costs one row of a forward pass however long the text before it is. Where the model's positions end,
the older half of the text is forgotten and the newer half run again.
"""

if __name__ == "__main__":
    from llmc import startup

    startup.begin()

import codecs
import sys
import time
import warnings
from collections.abc import Callable, Iterator

import kernels  # before NumPy, see its docstring  # isort: skip
import numpy as np

import train_banded
import train_sparse_attn
import train_toroidal
from llmc import cli
from llmc.checkpoint import BANDED, SPARSE_ATTENTION, TOROIDAL, DeepSeekConfig, read_model
from llmc.errors import UserError, run
from llmc.sampler import Sampler, filter_top_k_top_p, sample_probabilities, softmax
from llmc.tokenizer import Tokenizer, end_of_text, open_tokenizer
from systems.sparsity import Sparsity, description, read_sparsity
from systems.torus import read_torus

EPILOG = """examples:
  python generate.py -e checkpoint.bin -n 100
  python generate.py -e checkpoint.bin -p "To be, or" --temperature 0.7 --top-p 0.9 -s 1

--temperature 0 always takes the likeliest token."""


def arguments() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(description=(__doc__ or "").partition("\n")[0], epilog=EPILOG)
    add = parser.add_argument
    add("-e", "--checkpoint", default="checkpoint.bin", help="model file")
    add("-n", "--tokens", type=cli.positive_int, default=256, help="tokens to generate")
    add("-p", "--prompt", default="", help="text to go on from")
    add("-s", "--seed", type=cli.seed, default=0, help="of the sampler, 0: from the clock")
    add("--temperature", type=cli.natural_float, default=1.0, help="divides the logits, 0: greedy")
    add("--top-k", type=cli.natural, default=0, help="draw among the k likeliest tokens only, 0: among all")
    add("--top-p", type=cli.fraction, default=1.0, help="draw among the likeliest that make up this much probability")
    add("--cache", type=cli.flag01, default=True, help="0: run the whole text again for every token")
    add("--tokenizer", help="tokenizer file (default: the model's, here or beside it)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto (the GPU if one works), cpu or cuda")
    add("--tf32", type=cli.flag01, default=False, help="1: the GPU's matrix products may round their operands to TF32")
    add("--graph", choices=("auto", "0", "1"), default="auto", help="CUDA graphs: auto (where they work), 0 or 1")
    return parser


def draw(logits: np.ndarray, sampler: Sampler, temperature: float, top_k: int, top_p: float) -> int:
    """One token from logits (V)."""
    if temperature == 0:
        return int(logits.argmax())
    probabilities = softmax(logits, temperature)
    if top_k or top_p < 1:
        probabilities = filter_top_k_top_p(probabilities, top_k, top_p)
    return sample_probabilities(probabilities, sampler.random_f64())


def generate(model, tokens: list[int], count: int, choose: Callable, cache: bool = True) -> Iterator[int]:
    """Yield `count` tokens after `tokens`, each chosen from the logits by `choose`; the model sees at most maxT."""
    maxT = model.config.maxT
    text, done = tokens[-maxT:], 0  # what the model sees, and how much of it has been run
    for _ in range(count):
        start = done if cache else 0
        token = choose(model.extend(np.array(text[start:], np.int32), start))
        yield token
        done = len(text)
        text = [*text, token]
        if len(text) > maxT:
            text, done = text[-max(1, maxT // 2) :], 0


def open_model(path: str, device_name: str, tf32: bool = False, graph: str = "auto"):
    """The model of a checkpoint on a device, the GPT2 of the trainer that knows its kind, and its file."""
    file = read_model(path)
    sparse = file.kind == SPARSE_ATTENTION or isinstance(file.config, DeepSeekConfig)
    how = read_sparsity(file, path) if sparse else read_torus(file, path) if file.kind == TOROIDAL else None
    device = kernels.open_device(device_name, tf32, graph)
    if how is None:
        return train_banded.GPT2(device, file.config, file.params, B=1, T=1), file
    trainer = train_sparse_attn if sparse else train_toroidal
    return trainer.GPT2(device, file.config, how, np.concatenate([file.params, file.extra]), B=1, T=1), file


def print_attention(s: Sparsity):
    """What the model attends to, and what its training had and text from it cannot have."""
    print(f"Attention: {description(s)}")
    if s.leak:
        print("WARNING: trained with --legacy-leak, on future keys; here queries attend to earlier ones alone")
    if s.adaptive == "upstream":
        print("WARNING: trained with --adaptive upstream, k from future tokens; here k comes from those so far")


def print_text(tokens: Iterator[int], tokenizer: Tokenizer | None):
    """Print tokens as they come: whole UTF-8 characters, what is no UTF-8 as U+FFFD; ids without a tokenizer."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    out = sys.stdout.buffer
    for token in tokens:
        piece = decoder.decode(tokenizer.decode(token)) if tokenizer else f"{token} "
        out.write(piece.encode())
        out.flush()
    out.write(decoder.decode(b"", final=True).encode())


def main(argv: list[str] | None = None) -> int:
    warnings.simplefilter("ignore", RuntimeWarning)  # of NumPy, for weights that overflow: reported below, once
    args = arguments().parse(argv)
    model, file = open_model(args.checkpoint, args.device, args.tf32, args.graph)
    config = file.config
    tokenizer = open_tokenizer(args.tokenizer, args.checkpoint, config.V)
    if args.prompt and tokenizer is None:
        raise UserError(f"-p: no tokenizer file to encode the prompt for {args.checkpoint}", "name one by --tokenizer")
    tokens = [end_of_text(tokenizer, config.V), *(tokenizer.encode(args.prompt) if args.prompt else [])]
    seed = args.seed or time.time_ns()
    banner = "GPT-2 Inference (Banded Sparsity Checkpoint)" if file.kind == BANDED else "GPT-2 Inference"
    print(f"=== {banner} ===\nModel: {args.checkpoint}\nTokens: {args.tokens}\nSeed: {seed}")
    if file.kind == BANDED:
        print(f"FC1 bandwidth: {file.fields[0]}, FC2 bandwidth: {file.fields[1]} (0 is dense)")
    if file.kind == SPARSE_ATTENTION:
        print_attention(model.sparsity)
    if file.kind == TOROIDAL:
        torus = model.torus
        print(f"Attention: toroidal in layers {', '.join(map(str, torus.layers))}, depth {torus.depth}")
        if not torus.causal:
            print("WARNING: --mode upstream: its ring is as long as the text, so all of it runs again for each token")
    print(f"---\nModel loaded: {file.params.size} parameters")
    print(f"Vocab: {config.V}, MaxSeq: {config.maxT}, Channels: {config.C}\n---\nGenerating:", flush=True)
    sys.stdout.buffer.write(args.prompt.encode())
    sampler = Sampler(seed)

    def choose(logits: np.ndarray) -> int:
        if not np.isfinite(logits).all():
            raise UserError(f"{args.checkpoint}: its logits are not finite", "take a model whose training did not fail")
        return draw(logits, sampler, args.temperature, args.top_k, args.top_p)

    print_text(generate(model, tokens, args.tokens, choose, args.cache), tokenizer)
    print("\n---")
    return 0


if __name__ == "__main__":
    run(main)
