"""Text from any checkpoint that a trainer wrote, or from llm.c's gpt2_124M.bin.

    python generate.py -e checkpoint.bin -p "ROMEO:" -n 200
    python generate.py -e gpt2_124M.bin -p "The band of" --temperature 0.8 --top-k 50 -s 42
    python generate.py -e checkpoint.bin -i 1                  # prompts as you type them, a line each

Sizes, kind and bands come from the file; the prompt is encoded with the tokenizer file beside it. Keys and values are
kept, so a token costs one row of a forward pass however long the text before it is. Where the model's positions end,
the older half of the text is forgotten and the newer half run again.
"""

if __name__ == "__main__":
    from llmc import startup

    startup.begin()

import itertools
import signal
import sys
import time
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from types import SimpleNamespace

import kernels  # before NumPy, see its docstring  # isort: skip
import numpy as np

import train_banded
import train_sparse_attn
import train_toroidal
from llmc import cli
from llmc.checkpoint import BANDED, SPARSE_ATTENTION, TOROIDAL, DeepSeekConfig, Model, read_model
from llmc.errors import UserError, run, tell
from llmc.interrupt import Interrupt
from llmc.sampler import Sampler, filter_top_k_top_p, sample_probabilities, softmax
from llmc.text import print_text, read_prompt, typed_prompts
from llmc.tokenizer import end_of_text, open_tokenizer
from systems.sparsity import description, read_sparsity
from systems.torus import read_torus

EPILOG = """examples:
  python generate.py -e checkpoint.bin -n 100
  python generate.py -e checkpoint.bin -p "To be, or" --temperature 0.7 --top-p 0.9 -s 1
  python generate.py -e checkpoint.bin -p @prompt.txt --samples 3 --stop "Exit"

A text ends at end-of-text, at -n tokens or before the word of --stop. -p @FILE takes the prompt from a file, -p - from
standard input, both without a newline at the end. --temperature 0 always takes the likeliest token."""

NO_SIGNAL = SimpleNamespace(signal=None)  # without -i 1 Ctrl-C ends the program


def arguments() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(description=(__doc__ or "").partition("\n")[0], epilog=EPILOG)
    add = parser.add_argument
    add("-e", "--checkpoint", default="checkpoint.bin", help="model file")
    add("-n", "--tokens", type=cli.positive_int, default=256, help="tokens to generate, at most")
    add("-p", "--prompt", default="", help="text to go on from, @FILE or - for standard input")
    add("-i", "--interactive", type=cli.flag01, default=False, help="1: read prompts, one a line, until the input ends")
    add("-s", "--seed", type=cli.seed, default=0, help="of the sampler, 0: from the clock")
    add("--samples", type=cli.positive_int, default=1, help="texts from a prompt, each with a seed of its own")
    add("--stop", default="", metavar="WORD", help="end a text before this word")
    add("--ignore-eot", type=cli.flag01, default=False, help="1: do not end a text at end-of-text")
    add("--temperature", type=cli.natural_float, default=1.0, help="divides the logits, 0: greedy")
    add("--top-k", type=cli.natural, default=0, help="draw among the k likeliest tokens only, 0: among all")
    add("--top-p", type=cli.fraction, default=1.0, help="draw among the likeliest that make up this much probability")
    add("--cache", type=cli.flag01, default=True, help="0: run the whole text again for every token")
    add("--stats", type=cli.flag01, default=False, help="1: tokens a second, of the prompt and of what follows")
    add("--tokenizer", help="tokenizer file (default: the model's, here or beside it)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto (the GPU if one works), cpu or cuda")
    add("--tf32", type=cli.flag01, default=False, help="1: the GPU's matrix products may round their operands to TF32")
    add("--graph", choices=("auto", "0", "1"), default="auto", help="CUDA graphs: auto (where they work), 0 or 1")
    return parser


def open_model(path: str, device_name: str, tf32: bool = False, graph: str = "auto"):
    """The model of a checkpoint on a device, for one text, and its file."""
    file = read_model(path)
    return make_model(file, path, kernels.open_device(device_name, tf32, graph)), file


def make_model(file: Model, path: str, device, B: int = 1, T: int = 1):
    """The GPT2 of the trainer that knows the file's kind, for B rows of T tokens; `path` is for messages."""
    sparse = file.kind == SPARSE_ATTENTION or isinstance(file.config, DeepSeekConfig)
    how = read_sparsity(file, path) if sparse else read_torus(file, path) if file.kind == TOROIDAL else None
    if how is None:
        return train_banded.GPT2(device, file.config, file.params, B, T)
    trainer = train_sparse_attn if sparse else train_toroidal
    return trainer.GPT2(device, file.config, how, np.concatenate([file.params, file.extra]), B, T)


def draw(logits: np.ndarray, sampler: Sampler, temperature: float, top_k: int, top_p: float) -> int:
    """One token from logits (V)."""
    if temperature == 0:
        return int(logits.argmax())
    probabilities = softmax(logits, temperature)
    if top_k or top_p < 1:
        probabilities = filter_top_k_top_p(probabilities, top_k, top_p)
    return sample_probabilities(probabilities, sampler.random_f64())


def seeds(seed: int) -> Iterator[int]:
    """A seed for each text: `seed` itself, then what NumPy's SeedSequence makes of it and the text's number."""
    yield seed
    for number in itertools.count(1):
        yield int(np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0]) or 1  # a Sampler's is not 0


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


class Timed:
    """The same tokens, and how long they took: the first, which runs the prompt, and all that follow it."""

    def __init__(self, tokens: Iterable[int]):
        self.tokens, self.count, self.prefill, self.decode = tokens, 0, 0.0, 0.0

    def __iter__(self) -> Iterator[int]:
        started = time.perf_counter()
        for token in self.tokens:
            seconds = time.perf_counter() - started
            self.prefill = self.prefill or seconds
            self.decode = seconds - self.prefill
            self.count += 1
            yield token

    def described(self, prompt: int) -> str:
        """prompt: how many tokens the first run took in."""
        seconds, after = max(self.prefill, 1e-9), self.count - 1
        first = f"prefill: {prompt} tokens in {1000 * seconds:.3f} ms, {prompt / seconds:.1f} tok/s"
        return f"{first}; decode: {after} tokens, {after / max(self.decode, 1e-9):.1f} tok/s"


def print_model(args: Namespace, model, file: Model, seed: int) -> None:
    """What text comes from: settings and sizes, and what the model's training had and text from it cannot have."""
    banner = "GPT-2 Inference (Banded Sparsity Checkpoint)" if file.kind == BANDED else "GPT-2 Inference"
    print(f"=== {banner} ===\nModel: {args.checkpoint}\nTokens: {args.tokens}\nSeed: {seed}")
    if file.kind == BANDED:
        print(f"FC1 bandwidth: {file.fields[0]}, FC2 bandwidth: {file.fields[1]} (0 is dense)")
    if file.kind == SPARSE_ATTENTION:
        print(f"Attention: {description(model.sparsity)}")
        if model.sparsity.leak:
            print("WARNING: trained with --legacy-leak, on future keys; here queries attend to earlier ones alone")
        if model.sparsity.adaptive == "upstream":
            print("WARNING: trained with --adaptive upstream, k from future tokens; here k comes from those so far")
    if file.kind == TOROIDAL:
        torus = model.torus
        print(f"Attention: toroidal in layers {', '.join(map(str, torus.layers))}, depth {torus.depth}")
        if not torus.causal:
            print("WARNING: --mode upstream: its ring is as long as the text, so all of it runs again for each token")
    print(f"---\nModel loaded: {file.params.size} parameters")
    print(f"Vocab: {file.config.V}, MaxSeq: {file.config.maxT}, Channels: {file.config.C}\n---", flush=True)


def main(argv: list[str] | None = None) -> int:
    warnings.simplefilter("ignore", RuntimeWarning)  # of NumPy, for weights that overflow: reported below, once
    args = arguments().parse(argv)
    cli.refuse(
        [(args.interactive and args.prompt, f"-i 1 with -p {args.prompt}: it reads its own prompts", "-p alone")]
    )
    prompt = read_prompt(args.prompt)
    model, file = open_model(args.checkpoint, args.device, args.tf32, args.graph)
    config = file.config
    tokenizer = open_tokenizer(args.tokenizer, args.checkpoint, config.V)
    for flag, given in (("-p", prompt), ("-i", args.interactive), ("--stop", args.stop)):
        if given and tokenizer is None:
            raise UserError(f"{flag}: no tokenizer file for text of {args.checkpoint}", "name one by --tokenizer")
    eot, seed = end_of_text(tokenizer, config.V), args.seed or time.time_ns()
    end = None if args.ignore_eot else eot
    print_model(args, model, file, seed)

    def write(start: str, tokens: list[int], text_seed: int) -> int | None:
        """One text from a prompt; with -i 1 the number of the signal that ended it, if one did."""
        sampler = Sampler(text_seed)

        def choose(logits: np.ndarray) -> int:
            if not np.isfinite(logits).all():
                message = f"{args.checkpoint}: its logits are not finite"
                raise UserError(message, "take a model whose training did not fail")
            return draw(logits, sampler, args.temperature, args.top_k, args.top_p)

        timed = Timed(generate(model, tokens, args.tokens, choose, args.cache))
        with Interrupt("ending this text") if args.interactive else nullcontext(NO_SIGNAL) as interrupt:
            print("Generating:" if text_seed == seed else f"Generating, seed {text_seed}:", flush=True)
            sys.stdout.buffer.write(start.encode())
            wanted = itertools.takewhile(lambda token: token != end and not interrupt.signal, timed)
            print_text(wanted, tokenizer, args.stop)
        print("\n---")
        if args.stats:
            print(timed.described(min(len(tokens), config.maxT)))
        return interrupt.signal

    text_seeds = seeds(seed)
    for start in typed_prompts() if args.interactive else [prompt]:
        try:
            tokens = [eot, *(tokenizer.encode(start) if start else [])]
        except UserError as error:
            if not args.interactive:
                raise
            tell(error)
            continue
        if len(tokens) > config.maxT:
            counts = f"end-of-text and the prompt are {len(tokens)} tokens, the model has positions for {config.maxT}"
            print(f"{counts}: it sees the last of them", file=sys.stderr)
        for _ in range(args.samples):
            ended_by = write(start, tokens, next(text_seeds))
            if ended_by == signal.SIGTERM:
                return 128 + signal.SIGTERM
            if ended_by:
                break
    return 0


if __name__ == "__main__":
    run(main)
