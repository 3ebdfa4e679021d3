"""How good a checkpoint is: perplexity over any token file, or accuracy on HellaSwag, of any model a trainer wrote.

    python evaluate.py -e checkpoint.bin                                      # on the trainers' validation data
    python evaluate.py -e checkpoint.bin --stride 64                          # sliding: each token behind many others
    python evaluate.py -e gpt2_124M.bin -j data/hellaswag/hellaswag_val.bin   # as train_gpt2.cu -h 1 scores it

What is measured, the file tells: token data, llm.c's shards, or an eval file of questions with four answers each.

A window is T tokens, and the loss of each is -log p(token | those before it in the window). With stride S windows begin
S tokens apart, and of every window but the first only the last S count: each token of a shard but the first is scored
once, behind at least T - S others. S = T, the default, is what the trainers' validation does, which leaves out what
fills no batch. Perplexity is exp of the mean.
"""

if __name__ == "__main__":
    from llmc import startup

    startup.begin()

import math
import warnings
from collections.abc import Iterable, Iterator
from itertools import islice

import kernels  # before NumPy, see its docstring  # isort: skip
import numpy as np
from tqdm import tqdm

from generate import make_model
from llmc import cli, loop
from llmc.checkpoint import SPARSE_ATTENTION, TOROIDAL, Model, read_model
from llmc.dataloader import check_vocabulary, count_tokens, find_shards
from llmc.errors import UserError, run
from llmc.evalloader import COMPLETIONS, EvalLoader, is_eval_file
from llmc.files import HEADER_BYTES, open_file, read_array
from llmc.options import default_data

EPILOG = """examples:
  python evaluate.py -e checkpoint.bin
  python evaluate.py -e checkpoint.bin -t 128 --stride 32 -m 100

A loss is in nats a token: losses of models with different tokenizers do not compare."""
Z = 1.959964  # of 95 %, two-sided


def arguments() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(description=(__doc__ or "").partition("\n")[0], epilog=EPILOG)
    add = parser.add_argument
    add("-e", "--checkpoint", default="checkpoint.bin", help="model file")
    add("-j", "--val-data", help="pattern of token data, or an eval file (default: what the trainers validate on)")
    add("-b", "--batch-size", type=cli.positive_int, default=4, help="rows B of a batch; a question takes 4")
    add(
        "-t",
        "--seq-len",
        type=cli.positive_int,
        help="tokens T of a row (default: the model's maximum, at most 1024; what questions need)",
    )
    add("--stride", type=cli.positive_int, help="tokens from a window to the next (default: T)")
    add("-m", "--val-batches", type=cli.natural, default=0, help="batches to take, 0: all there are")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto (the GPU if one works), cpu or cuda")
    add("--tf32", type=cli.flag01, default=False, help="1: the GPU's matrix products may round their operands to TF32")
    add("--graph", choices=("auto", "0", "1"), default="auto", help="CUDA graphs: auto (where they work), 0 or 1")
    return parser


# ----------------------------------------------------------------------------------------------------------------------
# perplexity


def num_windows(num_tokens: int, T: int, stride: int) -> int:
    """How many windows score all `num_tokens` of a shard but the first."""
    return 1 + max(0, -(-(num_tokens - 1 - T) // stride))


def windows(paths: list[str], T: int, stride: int, vocab_size: int) -> Iterator[tuple[np.ndarray, int]]:
    """(tokens, first) of each window: up to T + 1 tokens, of which the last, after `first` + 1 others, are scored.

    Raises UserError for a damaged shard, or a token beyond vocab_size when it comes.
    """
    for path in paths:
        num_tokens = count_tokens(path)
        if num_tokens < 2:
            raise UserError(f"{path}: {num_tokens} tokens, none of which follows another", "leave it out of -j")
        with open_file(path) as file:
            for number in range(num_windows(num_tokens, T, stride)):
                start = number * stride
                file.seek(HEADER_BYTES + 2 * start)
                tokens = read_array(file, np.empty(min(T + 1, num_tokens - start), "<u2"))
                check_vocabulary(tokens, vocab_size, path, start)
                yield tokens, T - stride if number else 0


def total_loss(model, rows: Iterable[tuple[np.ndarray, int]]) -> tuple[float, int]:
    """The sum of the losses of all tokens that windows score, and how many those are. A loss may be NaN.

    What stands behind a row's end is of no meaning: what comes before does not see it.
    """
    inputs, targets = (np.zeros((model.B, model.T), np.int32) for _ in range(2))
    rows, total, count = iter(rows), 0.0, 0
    while batch := list(islice(rows, model.B)):
        for row, (tokens, _) in enumerate(batch):
            inputs[row, : len(tokens) - 1], targets[row, : len(tokens) - 1] = tokens[:-1], tokens[1:]
        model.forward(inputs, targets)
        losses = model.losses().reshape(inputs.shape)
        for row, (tokens, first) in enumerate(batch):
            total += float(losses[row, first : len(tokens) - 1].sum(dtype=np.float64))
            count += len(tokens) - 1 - first
    return total, count


# ----------------------------------------------------------------------------------------------------------------------
# questions


def wilson(correct: int, count: int) -> tuple[float, float]:
    """The 95 % interval of the probability behind `correct` of `count` (Wilson 1927): the p that differ from
    correct / count by at most Z standard errors sqrt(p (1 - p) / count)."""
    middle, spread = correct + Z * Z / 2, Z * math.sqrt(correct * (count - correct) / count + Z * Z / 4)
    return max(0.0, (middle - spread) / (count + Z * Z)), min(1.0, (middle + spread) / (count + Z * Z))


# ----------------------------------------------------------------------------------------------------------------------
# the command


def print_leaks(model, file: Model) -> None:
    """Warn where a query is not limited to what came before it: then the figures are no language model's."""
    if file.kind == SPARSE_ATTENTION and model.sparsity.leak:
        print("WARNING: trained with --legacy-leak: queries attend to future keys, here as well")
    if file.kind == SPARSE_ATTENTION and model.sparsity.adaptive == "upstream":
        print("WARNING: trained with --adaptive upstream: k comes from a whole batch, here as well")
    if file.kind == TOROIDAL and not model.torus.causal:
        print("WARNING: trained with --mode upstream: queries attend to future keys, here as well")


def main(argv: list[str] | None = None) -> None:
    warnings.simplefilter("ignore", RuntimeWarning)  # of NumPy, for weights that overflow: reported below, once
    args = arguments().parse(argv)
    file = read_model(args.checkpoint)
    V, maxT, B = file.config.V, file.config.maxT, args.batch_size
    data = args.val_data or default_data(V, "val")
    paths = find_shards(data)
    questions = len(paths) == 1 and is_eval_file(paths[0])
    if questions:
        cli.refuse([(args.stride, f"--stride {args.stride}: {data} holds questions, not windows", "leave it out")])
        loader = EvalLoader(paths[0], B, args.seq_len, V, args.val_batches * (B // COMPLETIONS))
    T = loader.T if questions else args.seq_len or min(1024, maxT)
    stride = args.stride or T
    cli.refuse(
        [
            (maxT < T, f"-t {T}: {args.checkpoint} has {maxT} positions", f"-t {maxT}, or a model with more"),
            (stride > T, f"--stride {stride}: a window has {T} tokens, and some would be in none", f"--stride {T}"),
        ]
    )
    device = kernels.open_device(args.device, args.tf32, args.graph)
    model = make_model(file, args.checkpoint, device, B, T)
    print(f"=== GPT-2 Evaluation ===\nModel: {args.checkpoint}\nData: {data}\nDevice: {device.describe()}")
    print_leaks(model, file)
    print("---", flush=True)
    if questions:
        low, high = wilson(loop.hellaswag(model, loader), loader.num_examples)
        print(f"95% interval (Wilson): {low:f} to {high:f}; by chance {1 / COMPLETIONS:f}")
        return
    total = sum(num_windows(count_tokens(path), T, stride) for path in paths)
    total = min(total, args.val_batches * B or total)
    rows = tqdm(islice(windows(paths, T, stride, V), total), total=total, unit="window", disable=None)
    loss, count = total_loss(model, rows)
    loss /= count
    if not math.isfinite(loss):
        found = f"{args.checkpoint}: the mean loss on {data} is {loss}"
        raise UserError(found, "take a model whose training did not fail")
    print(f"val loss {loss:f}\nperplexity {math.exp(min(loss, 700)):.4f}")
    print(f"tokens: {count} scored in {total} windows of {T}, {stride} apart")


if __name__ == "__main__":
    run(main)
