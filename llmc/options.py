"""The options that every trainer has, their checks, and their rows in the parameter table.

Single letters are train_gpt2_fp32.cu's and the banded trainers'; what those lack has a long name only.
"""

import glob
import os
import shlex
import sys
from argparse import Namespace
from pathlib import Path

from llmc import table
from llmc.checkpoint import GPT2Config, Model, num_parameters, read_model, trainer_of
from llmc.cli import (
    ArgumentParser,
    any_int,
    below_one,
    flag01,
    fraction,
    natural,
    natural_float,
    positive_float,
    positive_int,
)
from llmc.errors import UserError
from llmc.keep import kept_names
from llmc.outputs import check_outputs
from llmc.ranks import Ranks
from llmc.resume import is_llmc_pair, load_checkpoint
from llmc.schedulers import SCHEDULES
from llmc.state import TrainState
from llmc.tokenizer import BYTE_VOCAB

ROOT = Path(__file__).resolve().parent.parent
NOT_SAVED = (
    "model",
    "checkpoint",
    "resume",
    "overwrite",
    "graph",
    "progress",
)  # the command line of a resumed run says these
PATTERNS = ("train_data", "val_data")
LOGS = ("log", "log_json")
FILES = (*PATTERNS, *LOGS, "tokenizer")
CLONE = "{clone}"  # stands for the folder of this program in the names that a checkpoint keeps
SAMPLE_TOKENS = 64  # at most, where -g is not typed


def add_options(parser: ArgumentParser) -> None:
    """Add the options of all trainers to `parser`."""
    add = parser.add_argument_group("files").add_argument
    add("-e", "--model", default="model.bin", help="model file to start from")
    add("-c", "--checkpoint", help="where to save model and optimizer state (default: none, nothing is saved)")
    add("-k", "--checkpoint-every", type=natural, default=0, help="steps between saves, 0: at the end and at Ctrl-C")
    add("--keep", type=natural, default=0, help="keep the last N saves under their steps, too: run_00000100.bin")
    add("--keep-best", type=flag01, default=False, help="1: save at each lowest validation loss, kept as run_best.bin")
    add("-i", "--train-data", help="pattern of the training shards (default: TinyStories if there, else Shakespeare)")
    add("-j", "--val-data", help="pattern of the validation shards (default: as for -i)")
    add("-o", "--log", help="log file of s:STEP tel:LOSS and s:STEP trl:LOSS lines")
    add("--log-json", metavar="FILE", help='log of {"step": N, "train_loss": ...} lines with all digits, lr, ms')
    add("--overwrite", type=flag01, default=False, help="1: -c and the logs may replace files of another run")
    add("--tokenizer", help="tokenizer file for the samples (default: the model's, here or beside it)")
    add("--resume", metavar="CHECKPOINT", help="go on from this checkpoint with its settings; flags typed win")
    add = parser.add_argument_group("workload").add_argument
    add("-n", "--steps", type=any_int, default=-1, help="optimizer steps in all, 0: only validate, -1: one epoch")
    add("-b", "--batch-size", type=positive_int, default=4, help="rows B of a batch")
    add("-t", "--seq-len", type=positive_int, help="tokens T of a row (default: the model's maximum, at most 1024)")
    add("--grad-accum", type=positive_int, default=1, help="batches in a step, of each process under mpiexec")
    add("--total-batch", type=natural, default=0, help="tokens of a step in all, which gives --grad-accum; 0: not")
    add("--recompute", type=flag01, default=False, help="1: keep one layer's activations, run the others again")
    add("--shuffle", type=flag01, default=True, help="1: shuffle shards and samples, as llm.c does")
    add("--seed", type=positive_int, help="of shuffle and sampler (default: llm.c's 42 and 1337)")
    add("--overfit-batch", type=flag01, default=False, help="1: every step on the first validation data")
    add("--zero", type=flag01, default=False, help="1: each process of mpiexec has its part of AdamW's m and v")
    add("--ranks-timing", type=flag01, default=False, help="1: a line behind each step, how long each process worked")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto (the GPU if one works), cpu or cuda")
    add("--tf32", type=flag01, default=False, help="1: the GPU's matrix products may round their operands to TF32")
    add("--graph", choices=("auto", "0", "1"), default="auto", help="CUDA graphs: auto (where they work), 0 or 1")
    add("--progress", choices=("auto", "0", "1"), default="auto", help="a bar: auto (on a terminal), 0 or 1")
    add("--mfu", type=flag01, default=False, help="1: a line behind each step, how much of the GPU's promise it used")
    add = parser.add_argument_group("optimization").add_argument
    add("-l", "--lr", type=positive_float, default=3e-4, help="learning rate")
    add("--lr-schedule", choices=SCHEDULES, default="constant", help=", ".join(SCHEDULES) + "; as in train_gpt2.cu")
    add("--warmup", type=natural, default=0, help="steps of linear warm-up; constant has none")
    add("--final-lr-frac", type=fraction, default=1.0, help="learning rate at the end, in parts of -l")
    add("--weight-decay", type=natural_float, default=0.0, help="decoupled")
    add("--decay-all", type=flag01, default=True, help="1: every tensor decays (train_gpt2.c), 0: matrices (.cu)")
    add("--beta2", type=below_one, default=0.999, help="of AdamW; beta1 is 0.9, eps 1e-8")
    add("--grad-clip", type=natural_float, default=0.0, help="largest gradient norm, 0: no limit")
    add("-sl", "--skip-loss-z", type=natural_float, default=0.0, help="no update at a loss z-score above it, 0: off")
    add("-sg", "--skip-grad-z", type=natural_float, default=0.0, help="the same of the gradient norm's, of 128 steps")
    add = parser.add_argument_group("evaluation").add_argument
    add("-v", "--val-every", type=natural, default=20, help="steps between validations, 0: first and last step")
    add(
        "-m",
        "--val-batches",
        type=any_int,
        default=20,
        help="batches of a validation, at most llm.c's count tokens / (B*T), which may take some twice; 0: each once",
    )
    add("--hellaswag", type=flag01, default=False, help="1: also answer HellaSwag's questions, but at step 0")
    add("-s", "--sample-every", type=natural, default=20, help="steps between samples, 0: no samples")
    add("-g", "--sample-tokens", type=natural, help="positions of a sample (default: the model's maximum, at most 64)")


def parse_options(
    parser: ArgumentParser, argv: list[str] | None, trainer: str, ranks: Ranks
) -> tuple[Namespace, set[str], Model, TrainState | None]:
    """-> settings, names of the flags typed, the Model to start from, and its TrainState if --resume was given.

    trainer: the name of the script. ranks: the first looks at what will be written. A resumed run takes its settings
    from the checkpoint where none is typed. Fills in the defaults that depend on the model. Raises UserError for what
    cannot work, before anything is written.
    """
    args, state, typed = parser.parse(argv), None, parser.explicit(argv)
    if args.resume:
        for name, flag in (("model", "-e"), ("seed", "--seed")):
            if name in typed:
                raise UserError(f"--resume given together with {flag}", "a resumed run has it from its checkpoint", 2)
        model, state = load_checkpoint(args.resume, ranks.rank, ranks.size)
        check_trainer(args.resume, model, state, trainer)
        args = parser.parse(argv, saved=resumed_settings(args.resume, state, typed))
    else:
        model = read_model(args.model)
    ranks.zero = args.zero
    ranks.overlaps &= not args.ranks_timing  # else a rank's time has others' in it
    ranks.broadcast(model.params), ranks.broadcast(model.extra)  # however their files differ
    maxT = model.config.maxT
    args.seq_len = args.seq_len or min(1024, maxT)
    if args.sample_tokens is None:
        args.sample_tokens = min(SAMPLE_TOKENS, maxT)
    for flag, value in (("-t", args.seq_len), ("-g", args.sample_tokens if args.sample_every else 0)):
        if value > maxT:
            raise UserError(f"{flag} {value}: {args.model} has {maxT} positions", f"{flag} {maxT}", 2)
    args.trainer = trainer
    args.train_data = args.train_data or default_data(model.config.V, "train")
    args.val_data = args.val_data or default_data(model.config.V, "val")
    if state and state.zero != args.zero:
        hint = f"--zero {state.zero}, or start anew from its weights: -e {args.resume} in place of --resume"
        raise UserError(f"--zero {int(args.zero)}: {args.resume} was saved with --zero {state.zero}", hint, 2)
    if {"grad_accum", "total_batch"} <= typed:
        raise UserError("--grad-accum given together with --total-batch", "--total-batch gives the other, or 0", 2)
    if "grad_accum" in typed:
        args.total_batch = 0  # of the run that goes on
    if args.total_batch:
        args.grad_accum = micro_steps(args, ranks.size)
    if ranks.rank == 0:
        check_outputs(args, typed)
    return args, typed, model, state


def micro_steps(args: Namespace, size: int) -> int:
    """How many micro-steps of `size` ranks make up --total-batch tokens. Raises UserError if none do."""
    tokens = args.batch_size * args.seq_len * size
    if args.total_batch % tokens:
        found = f"--total-batch {args.total_batch}: B*T is {args.batch_size * args.seq_len} in {size} processes"
        raise UserError(f"{found}, {tokens} tokens do not divide it", f"--total-batch {tokens}, or other -b or -t", 2)
    return args.total_batch // tokens


def check_trainer(path: str, model: Model, state: TrainState, trainer: str) -> None:
    """Raise UserError, naming the trainer to use, if another one than `trainer` wrote the checkpoint `path`."""
    wrote = state.options.get("trainer")
    if wrote is None:  # saved before the name was: each trainer had a setting of its own
        own = {"fc1_bandwidth": "train_banded.py", "selector": "train_sparse_attn.py", "layers": "train_toroidal.py"}
        wrote = next((script for name, script in own.items() if name in state.options), trainer)
    wrote = trainer_of(model) or wrote
    if wrote != trainer:
        raise UserError(f"--resume {path}: {wrote} wrote it, not {trainer}", command(str(wrote), "--resume", path), 2)


def resumed_settings(path: str, state: TrainState, typed: set[str]) -> dict:
    """The settings by which the checkpoint `path` goes on, its files found from whatever folder it is typed in.

    Raises UserError for a copy of a checkpoint that would write into the log of the run it was copied from, or, one
    that --keep or --keep-best made, under a name that this run gives to others.
    """
    if is_llmc_pair(path, state):
        print(f"{path}: llm.c's pair, without settings: what is not typed is the default; nothing is saved without -c")
        return {"model": path, "checkpoint": None, "shuffle": state.shuffle is not None}
    saved = dict(state.options)
    origin = saved.pop("checkpoint", None)
    if saved.pop("trainer", None):  # before the name was saved, files were relative to the folder of the first run
        saved |= {name: found_file(saved[name], path, name in PATTERNS) for name in FILES if saved.get(name)}
    if origin:
        check_copy(path, os.path.normpath(os.path.join(os.path.dirname(path), origin)), saved, typed)
    return saved | {"model": path, "checkpoint": path}


def check_copy(path: str, origin: str, saved: dict, typed: set[str]) -> None:
    """Raise UserError if `path` is a copy of the checkpoint `origin` and would write what is that one's."""
    if os.path.realpath(path) == os.path.realpath(origin):  # not samefile: --keep makes links
        return
    if kept_names(origin).fullmatch(os.path.basename(path)) and "checkpoint" not in typed:
        message = f"--resume {path}: {os.path.basename(origin)} kept it, and may replace or remove it"
        raise UserError(message, "name the checkpoint of this run: -c NAME", 2)
    for name, flag in zip(LOGS, ("-o", "--log-json")):
        if saved.get(name) and name not in typed and os.path.exists(origin):
            found = f"a copy of {origin}, whose log is {saved[name]}"
            raise UserError(f"--resume {path}: {found}", f"name a log of this run's own: {flag} NAME", 2)


def kept_file(path: str, checkpoint: str, is_pattern: bool) -> str:
    """The name under which a checkpoint keeps a file, or a pattern of files, so that it is found from any folder.

    Below our data folder: from CLONE on; below the checkpoint's folder: relative to that, so that a copy of the folder
    has its own; else absolute.
    """
    escape = glob.escape if is_pattern and not os.path.exists(path) else str
    whole = path if os.path.isabs(path) else os.path.join(escape(os.getcwd()), path)
    below = os.path.relpath(whole, escape(str(ROOT)))
    if below.startswith("data" + os.sep):
        return f"{CLONE}/{below}"
    below = os.path.relpath(whole, escape(os.path.dirname(os.path.abspath(checkpoint))))
    return os.path.normpath(whole) if below.startswith(os.pardir) else below


def found_file(kept: str, checkpoint: str, is_pattern: bool) -> str:
    """The path, from the current folder, of what `kept_file` kept."""
    folder, name = os.path.dirname(checkpoint), kept
    if kept.startswith(f"{CLONE}/"):
        folder, name = os.path.relpath(ROOT), kept.removeprefix(f"{CLONE}/")
    if is_pattern and not os.path.exists(os.path.join(folder, name)):
        folder = glob.escape(folder)
    return os.path.normpath(os.path.join(folder, name))  # an absolute name stays


def default_data(V: int, split: str) -> str:
    """The "train" or "val" tokens that there are for a vocabulary of V, as a path from the current folder."""
    data = Path(os.path.relpath(ROOT / "data"))
    tinystories = data / "tinystories" / f"TinyStories_{split}.bin"
    if V != BYTE_VOCAB and tinystories.exists():
        return str(tinystories)
    return str(data / "shakespeare" / f"shakespeare_{'byte_' if V == BYTE_VOCAB else ''}{split}.bin")


def hellaswag_file() -> str:
    """What data/hellaswag.py writes, as a path from the current folder. Raises UserError if it is not there."""
    path = str(Path(os.path.relpath(ROOT / "data")) / "hellaswag" / "hellaswag_val.bin")
    if not os.path.exists(path):
        raise UserError(f"--hellaswag 1: there is no {path}", "python data/hellaswag.py fetches it")
    return path


def command(script: str, flag: str, path: str, ranks: int = 1) -> str:
    """What to type, in the current folder, to run `script` beside the one that runs now on the file `path`."""
    start = ["mpiexec", "-n", str(ranks)] if ranks > 1 else []
    return shlex.join([*start, "python", os.path.join(os.path.dirname(sys.argv[0]), script), flag, path])


def saved_options(args: Namespace) -> dict:
    """The settings that a checkpoint keeps for the run that resumes it."""
    saved = {name: value for name, value in vars(args).items() if name not in NOT_SAVED}
    for name in FILES:
        if saved[name] is not None:
            saved[name] = kept_file(saved[name], args.checkpoint, name in PATTERNS)
    # a copy must not take a log for its own; below the checkpoint's folder it has one, if that was copied with it
    elsewhere = any(saved[name] and os.path.isabs(saved[name]) for name in LOGS)
    saved["checkpoint"] = os.path.abspath(args.checkpoint) if elsewhere else os.path.basename(args.checkpoint)
    return saved


def print_options(args: Namespace) -> None:
    """The rows of the options that the C trainers have too."""
    table.row("model path", args.model)
    table.row("checkpoint path", args.checkpoint)
    table.row("checkpoint_every", args.checkpoint_every, "%d")
    table.row("train data pattern", args.train_data)
    table.row("val data pattern", args.val_data)
    table.row("output log file", args.log)
    table.row("max_steps", args.steps, "%d")
    table.row("batch size B", args.batch_size, "%d")
    table.row("sequence length T", args.seq_len, "%d")
    table.row("learning rate", args.lr, "%f")
    table.row("val_loss_every", args.val_every, "%d")
    table.row("val_max_steps", args.val_batches, "%d")
    table.row("sample_every", args.sample_every, "%d")
    table.row("genT", args.sample_tokens, "%d")
    table.rule()


def print_model(device: str, tf32: bool, config: GPT2Config) -> None:
    """The rows of the device, of whether its products are in TF32, and of the model's sizes."""
    table.row("device", device)
    table.row("TF32", "enabled" if tf32 else "disabled")
    table.rule()
    table.row("max_sequence_length T", config.maxT, "%d")
    table.row("vocab_size V", config.V, "%d")
    table.row("padded_vocab_size Vp", config.Vp, "%d")
    table.row("num_layers L", config.L, "%d")
    table.row("num_heads NH", config.NH, "%d")
    table.row("channels C", config.C, "%d")
    table.row("num_parameters", num_parameters(config), "%d")
    table.rule()


def print_workload(steps: int, val_batches: int, ranks: Ranks) -> None:
    """The last rows of the table."""
    if ranks.size > 1:
        table.row("num_processes", ranks.size, "%d")
    table.row("train_num_batches", steps, "%d")
    table.row("val_num_batches", val_batches, "%d")
    table.rule()
