"""What a training loop does besides training: validate, sample, check, save.

A model here is anything with forward(inputs, targets), mean_loss() and extend(tokens, start) -> logits (V).
"""

import math
import os
import sys
from argparse import Namespace

import numpy as np

from llmc.checkpoint import Model
from llmc.dataloader import DataLoader
from llmc.errors import UserError
from llmc.options import command, saved_options
from llmc.resume import save_checkpoint
from llmc.sampler import Sampler, sample_logits
from llmc.state import TrainState
from llmc.tokenizer import Tokenizer


def evaluate(model, loader: DataLoader, batches: int) -> float:
    """Mean loss over the first `batches` of the validation data."""
    loader.reset()
    total = 0.0
    for _ in range(batches):
        model.forward(*loader.next_batch())
        total += model.mean_loss()
    return total / batches


def check_finite(name: str, loss: float, step: int, path: str) -> None:
    """Raise UserError for a loss of NaN or infinity: nothing that follows may overwrite a good checkpoint."""
    if not math.isfinite(loss):
        message = f"{name} loss {loss} at step {step} of the run from {path}: it cannot go on, earlier saves stay"
        raise UserError(message, "lower -l, limit gradients by --grad-clip 1, or start from another model file")


def print_sample(model, tokenizer: Tokenizer | None, start: int, sampler: Sampler, count: int) -> None:
    """Print `count` - 1 tokens drawn from the model after the token `start`, as train_gpt2_fp32.cu does."""
    print("generating:\n---", flush=True)
    token = start
    for t in range(1, count):
        logits = model.extend(np.array([token], np.int32), t - 1)
        token = sample_logits(logits, sampler.random_f32())
        sys.stdout.buffer.write(tokenizer.printable(token) if tokenizer else b"%d " % token)
        sys.stdout.buffer.flush()
    print("\n---", flush=True)


def save(args: Namespace, file: Model, m: np.ndarray, v: np.ndarray, loader: DataLoader, sampler: Sampler) -> None:
    """Write the checkpoint `file` to -c, and what the run goes on from: m, v, data position, sampler and options.

    Sets the loader's position in `file`.
    """
    file.shard, file.sample = loader.shard, loader.sample
    options = saved_options(args)
    state = TrainState(file.step, sampler.state, file.shard, file.sample, m, v, loader.state(), options)
    print(f"saving checkpoint to {args.checkpoint}", flush=True)
    save_checkpoint(args.checkpoint, file, state)
    megabytes = os.path.getsize(args.checkpoint) / 2**20
    print(f"checkpoint saved ({file.params.size} parameters, {megabytes:.2f} MB)", flush=True)


def print_stopped(script: str, args: Namespace, step: int, start: int) -> None:
    """The last line of a run from step `start` that a signal ended after `step`: what was saved, how to go on."""
    how = "nothing was saved" if args.checkpoint else "no -c: nothing was saved"
    if args.checkpoint and (step > start or args.checkpoint == args.resume):
        how = f"go on with: {command(script, '--resume', args.checkpoint)}"
    print(f"stopped after {step} steps; {how}")


def print_finished(args: Namespace, device, steps: int, seconds: float) -> None:
    """The last lines of a run of `steps` steps in so many seconds."""
    print(f"total average iteration time: {seconds / max(1, steps) * 1000:f} ms")
    print(f"device: {device.describe()}")
    if args.checkpoint and steps:
        print(f"text from it: {command('generate.py', '-e', args.checkpoint)}")
