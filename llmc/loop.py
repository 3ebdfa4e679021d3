"""What a training loop does besides training: validate, sample, check, save.

A model here is anything with forward(inputs, targets), mean_loss(), losses() -> (B*T), all on the host, and
extend(tokens, start) -> logits (V). If it has several phases, the phase is a further argument, which is passed on.
"""

import math
import os
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from llmc.checkpoint import GPT2Config, Model
from llmc.dataloader import DataLoader
from llmc.errors import UserError
from llmc.evalloader import EvalLoader
from llmc.interrupt import Interrupt
from llmc.keep import Kept, add_copies, open_kept
from llmc.logger import Logger
from llmc.mfu import card_name, described
from llmc.options import command, hellaswag_file, saved_options
from llmc.outlier import OutlierDetector
from llmc.progress import Progress
from llmc.ranks import ALONE, Ranks
from llmc.resume import save_checkpoint
from llmc.sampler import Sampler, sample_logits
from llmc.state import TrainState
from llmc.tokenizer import Tokenizer, check_marks, end_of_text, open_tokenizer


@dataclass
class Run:
    """What a run does besides its model: data, text sampler, the step it starts at, steps in all, validation batches.

    ranks: the processes that train together. start_token: what starts a sampled text; tokenizer: None where no file was
    found, then samples are token ids; eval_loader: HellaSwag's questions, None without --hellaswag 1. kept: copies of
    its checkpoints. losses, norms: the last ones, for -sl and -sg. val: step and loss of the last validation. log,
    progress: from `watch` on.
    """

    ranks: Ranks
    train_loader: DataLoader
    val_loader: DataLoader
    eval_loader: EvalLoader | None
    tokenizer: Tokenizer | None
    start_token: int
    sampler: Sampler
    start: int
    steps: int
    val_batches: int
    kept: Kept
    losses: OutlierDetector
    norms: OutlierDetector
    val: tuple[int, float] | None = None
    log: Logger = field(default_factory=lambda: Logger(None))
    progress: Progress | None = None

    @contextmanager
    def watch(self, args: Namespace, memory: Callable[[], int]) -> Iterator[None]:
        """Open the logs, and the bar on a terminal, while the block runs; memory: tells the bytes in use."""
        first = self.ranks.rank == 0
        self.log = Logger(args.log, self.start, args.log_json) if first else Logger(None)
        with Progress(args.progress if first else "0", self.start, self.steps, memory) as self.progress:
            yield
        self.log.close()

    def stops(self, interrupt: Interrupt) -> bool:
        """Whether a signal has come, to whichever rank; then all of them have it."""
        found = max(self.ranks.gather(interrupt.signal or 0))
        if found:  # one that came to this rank since it was asked waits for the next step
            interrupt.signal = found
        return found > 0

    def improved(self, step: int) -> bool:
        """Whether the validation at `step` had a lower loss than the best copy has."""
        return self.val is not None and self.val[0] == step and self.kept.improves(self.val[1])

    def memory(self) -> dict:
        """What a state file keeps of the copies, and of losses and norms where they count."""
        windows = {"losses": self.losses, "norms": self.norms}
        return self.kept.saved() | {name: window.saved() for name, window in windows.items() if window.values}


def open_run(args: Namespace, config: GPT2Config, state: TrainState | None, ranks: Ranks, epochs: int = 1) -> Run:
    """The run's data, text and counts, at the position of `state`; of several ranks, this one's part.

    -n 0 or more: so many steps; below: `epochs` epochs of the training data, each batch once. -m 0 or less: each batch
    of the validation data once; more: as llm.c counts, tokens / (B*T), which may be more than there are, and then the
    first are taken again. One batch to overfit is the first of the validation data, as in train_gpt2.cu.
    Raises UserError if the files cannot be used or nothing is left to do.
    """
    tokenizer = open_tokenizer(args.tokenizer, args.model, config.V)
    sampler = Sampler(args.seed or 1337)
    B, T, V = args.batch_size, args.seq_len, config.V
    train_data, shuffle = (args.val_data, False) if args.overfit_batch else (args.train_data, args.shuffle)
    part = dict(rank=ranks.rank, nproc=ranks.size)
    train_loader = DataLoader(train_data, B, T, vocab_size=V, shuffle=shuffle, seed=args.seed or 42, **part)
    val_loader = DataLoader(args.val_data, B, T, vocab_size=V, **part)
    check_marks([*train_loader.paths, *val_loader.paths], tokenizer, args.model, V)
    eval_loader = EvalLoader(hellaswag_file(), B, T, V, **part) if args.hellaswag else None
    start = state.step if state else 0
    steps = args.steps if args.steps >= 0 else epochs * train_loader.epoch_batches // args.grad_accum
    if args.steps < 0 and steps == 0:
        found = f"{train_data} has {train_loader.epoch_batches} batches, fewer than one step takes"
        raise UserError(f"--grad-accum {args.grad_accum}: {found}", "lower --grad-accum, or name the steps by -n")
    if start > steps or start == steps > 0:
        hint = "-n is the number of steps in all, give a larger one"
        raise UserError(f"-n {steps}: {args.model} is at step {start} already", hint)
    if state:
        train_loader.restore(state.shard, state.sample, state.shuffle)
        sampler.state = state.rng_state
    counted = min(args.val_batches, val_loader.num_batches)
    val_batches = counted if counted > 0 else val_loader.epoch_batches
    return Run(
        ranks,
        train_loader,
        val_loader,
        eval_loader,
        tokenizer,
        end_of_text(tokenizer, V),
        sampler,
        start,
        steps,
        val_batches,
        open_kept(args, state, ranks.rank == 0),
        open_window(args, state, "losses"),
        open_window(args, state, "norms"),
    )


def open_window(args: Namespace, state: TrainState | None, name: str) -> OutlierDetector:
    """The last losses or norms of the run that goes on. Raises UserError for a state where they are something else."""
    try:
        return OutlierDetector(state.extra.get(name) if state else None)
    except ValueError as error:
        raise UserError(f"{args.resume}: {name}: {error}", f"start anew from its weights: -e {args.resume}") from None


def best_so_far(args: Namespace, state: TrainState | None) -> tuple[float | None, int]:
    """The lowest validation loss of the run that goes on, and its validations since: None, 0 for a new run.

    Raises UserError for a state file in which they are no such numbers.
    """
    extra = state.extra if state else {}
    best, worse = extra.get("best_loss"), extra.get("worse", 0)
    if not isinstance(worse, int) or worse < 0 or not isinstance(best, float | int | None) or not (best or 0) >= 0:
        found = f"{worse!r} validations since the best loss {best!r}, expected numbers, 0 or more"
        raise UserError(f"{args.resume}: {found}", f"start anew from its weights: -e {args.resume}")
    return best, worse


def evaluate(model, loader: DataLoader, batches: int, ranks: Ranks = ALONE, **phase) -> float:
    """Mean loss over the first `batches` of each rank's validation data; phase: further arguments of model.forward."""
    loader.reset()
    total = 0.0
    for _ in range(batches):
        model.forward(*loader.next_batch(), **phase)
        total += model.mean_loss()
    return ranks.mean(total / batches)


def validate(model, run: Run, step: int, args: Namespace, **phase) -> float:
    """The validation loss at `step`, printed and logged. Raises UserError if it is not finite.

    With --hellaswag 1 also that accuracy, though not in front of the first step.
    """
    loss = evaluate(model, run.val_loader, run.val_batches, run.ranks, **phase)
    check_finite("val", loss, step, args)
    print(f"val loss {loss:f}", flush=True)
    run.val = step, loss
    run.log.val(step, loss)
    if run.eval_loader and (step > 0 or run.steps == 0):
        correct = hellaswag(model, run.eval_loader, run.ranks, **phase)
        run.log.add("eval", step, correct / run.eval_loader.num_examples)
    return loss


def hellaswag(model, loader: EvalLoader, ranks: Ranks = ALONE, **phase) -> int:
    """How many questions the model answers right, printed as train_gpt2.cu does. phase: as for evaluate."""
    loader.reset()
    correct = 0
    for i in range(loader.num_batches):
        if i % 10 == 0:
            print(f"evaluating HellaSwag: {i}/{loader.num_batches}\r", end="", flush=True)
        model.forward(*loader.next_batch(), **phase)
        correct += loader.count_correct(model.losses())
    correct = int(ranks.total(correct))
    print(f"HellaSwag: {correct}/{loader.num_examples} = {correct / loader.num_examples:f}", flush=True)
    return correct


def check_finite(name: str, loss: float, step: int, args: Namespace) -> None:
    """Raise UserError for a loss of NaN or infinity, before the weights that gave it could be saved."""
    if not math.isfinite(loss):
        saved = args.checkpoint and os.path.exists(args.checkpoint)
        stays = f"{args.checkpoint} stays as it is" if saved else "nothing was saved"
        message = f"{name} loss {loss} at step {step} of the run from {args.model}: it cannot go on; {stays}"
        raise UserError(message, "lower -l, limit gradients by --grad-clip 1, or start from another model file")


def print_sample(model, run: Run, count: int, **phase) -> None:
    """Print `count` - 1 tokens drawn from the model after the start token, as train_gpt2_fp32.cu does.

    Only rank 0 does. phase: further arguments of model.extend.
    """
    if run.ranks.rank:
        return
    print("generating:\n---", flush=True)
    token = run.start_token
    for t in range(1, count):
        logits = model.extend(np.array([token], np.int32), t - 1, **phase)
        token = sample_logits(logits, run.sampler.random_f32())
        sys.stdout.buffer.write(run.tokenizer.printable(token) if run.tokenizer else b"%d " % token)
        sys.stdout.buffer.flush()
    print("\n---", flush=True)


def due(every: int, step: int) -> bool:
    """Whether something that happens every so many steps, 0: never, happens at `step`."""
    return every > 0 and step % every == 0


def saves(args: Namespace, run: Run, step: int, last_step: bool) -> bool:
    """Whether the checkpoint is due after `step` updates: by -k, at the end, or as the best one so far."""
    wanted = last_step or due(args.checkpoint_every, step) or (args.keep_best and run.improved(step))
    return bool(args.checkpoint) and step > run.start and wanted


def save(
    args: Namespace, model, file: Model, m: np.ndarray, v: np.ndarray, run: Run, extra: dict | None = None, **phase
) -> None:
    """Write the checkpoint `file` to -c, and what the run goes on from: m, v, data position, sampler and options.

    Then the copies of --keep and --keep-best. extra: what else the trainer goes on from. Sets the loader's position in
    `file`. Raises UserError, and the checkpoint of before stays, if a value to be written is not finite, or the loss of
    these weights, of which no step has told yet, on the first validation batch.
    """
    check_finite("val", evaluate(model, run.val_loader, 1, run.ranks, **phase), file.step, args)
    loader = run.train_loader
    file.shard, file.sample = loader.shard, loader.sample
    best = args.keep_best and run.improved(file.step)
    if best:
        run.kept.best = run.val[1]
    if args.keep and file.step not in run.kept.steps:
        run.kept.steps.append(file.step)
    options, extra = saved_options(args), (extra or {}) | run.memory()
    order, rank, size = loader.state(), run.ranks.rank, run.ranks.size
    state = TrainState(
        file.step,
        run.sampler.state,
        file.shard,
        file.sample,
        m,
        v,
        order,
        options,
        rank,
        size,
        extra,
        int(run.ranks.zero),
    )
    print(f"saving checkpoint to {args.checkpoint}", flush=True)
    for dropped in save_checkpoint(args.checkpoint, file, state, run.ranks):
        print(f"dropped {dropped.name}, which an earlier run left")
    megabytes = os.path.getsize(args.checkpoint) / 2**20
    print(f"checkpoint saved ({file.params.size} parameters, {megabytes:.2f} MB)", flush=True)
    add_copies(args.checkpoint, file, run.kept, args.keep, best, run.ranks)


def begin_step(args: Namespace, run: Run) -> float:
    """What a step starts with: the first batch again under --overfit-batch, the bar; returns the time."""
    if args.overfit_batch:
        run.train_loader.reset()
    run.progress.show()
    return time.perf_counter()


def spiked(args: Namespace, run: Run, loss: float, gradient_norm: Callable[[], float]) -> bool:
    """Whether -sl or -sg skip this update, for a loss or a gradient norm far above the last 128, as train_gpt2.cu does.

    Prints the z-scores (NaN until there are 128) and why an update is skipped; without the flags nothing.
    """
    values = []
    for what, limit, window, value in (
        ("loss", args.skip_loss_z, run.losses, lambda: loss),
        ("grad", args.skip_grad_z, run.norms, gradient_norm),
    ):
        if limit:
            x = value()
            values.append((what, limit, x, window.update(x)))
    if values:
        run.progress.clear()
        print(", ".join(f"{what} {x:.4f} ({z:+.2f}z)" for what, _, x, z in values), flush=True)
    for what, limit, _, z in values:
        if z > limit:  # NaN is not
            print(f"skipping update due to {what} z-score of {z:f}", flush=True)
            return True
    return False


def wait_for_all(args: Namespace, device, run: Run, started: float) -> None:
    """With --ranks-timing 1 a line how long each rank worked on the step that began at `started`; then they meet."""
    if args.ranks_timing and run.ranks.size > 1:
        device.synchronize()
        times = run.ranks.gather(1000 * (time.perf_counter() - started))
        slowest = max(range(len(times)), key=times.__getitem__)
        run.progress.clear()
        told = ", ".join(f"{milliseconds:.1f}" for milliseconds in times)
        print(f"ranks worked {told} ms; the slowest is {slowest}", flush=True)


def print_step(
    args: Namespace, device, config: GPT2Config, run: Run, step: int, loss: float, started: float, lr, norm
) -> float:
    """The lines and the log's of the 0-based `step`, begun at `started`, once it is done; returns its seconds.

    With --mfu 1 one line behind it, and one where a gradient has a norm.
    """
    device.synchronize()
    seconds = time.perf_counter() - started
    tokens, T = args.batch_size * args.seq_len * args.grad_accum * run.ranks.size, args.seq_len
    rate = tokens / seconds
    run.progress.clear()
    told = f"step {step + 1:4d}/{run.steps}: train loss {loss:f}"
    print(f"{told} ({seconds * 1000:f} ms, {int(rate)} tok/s)", flush=True)
    if args.mfu:
        print(described(card_name(device.describe()), device.tf32, config, tokens, T, seconds), flush=True)
    if norm is not None:
        print(f"lr {lr:.2e}, gradient norm {norm:.4f}", flush=True)
    figures = {"lr": lr, "ms": 1000 * seconds, "tokens_per_second": rate}
    run.log.train(step, loss, **figures, **({} if norm is None else {"gradient_norm": norm}))
    run.progress.count(loss, rate)
    return seconds


def print_memory(models: list, measured: int) -> None:
    """What is expected of forward passes, with --recompute also without; and what they took, if any has been run.

    models: of all shares, each with activation_bytes(recompute); of several the others are in other processes.
    measured: bytes that came into use since before the first pass.
    """
    recompute, ran = models[0].recompute, models[0].acts is not None and len(models) == 1
    predicted, without = (sum(model.activation_bytes(way) for model in models) >> 20 for way in (recompute, False))
    saved = f" ({without} without --recompute)" if recompute else ""
    grew = f", memory grew by {measured >> 20} MiB" if ran else ""
    print(f"activations: {predicted} MiB predicted{saved}{grew}")


def print_end(args: Namespace, device, run: Run, step: int, finished: bool, seconds: float) -> None:
    """The last lines of a run that ended at `step`, so many seconds of steps; or what a signal left of it."""
    start = run.start
    if not finished:
        how = "nothing was saved" if args.checkpoint else "no -c: nothing was saved"
        if args.checkpoint and (step > start or args.checkpoint == args.resume):
            how = f"go on with: {command(args.trainer, '--resume', args.checkpoint, run.ranks.size)}"
        print(f"stopped after {step} steps; {how}")
        return
    print(f"total average iteration time: {seconds / max(1, step - start) * 1000:f} ms")
    print(f"device: {device.describe()}")
    if args.checkpoint and step > start:
        print(f"text from it: {command('generate.py', '-e', args.checkpoint)}")
