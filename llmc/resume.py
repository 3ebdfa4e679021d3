"""A training checkpoint: the model file and, beside it, the optimizer state of the very same weights.

The state is written first, the model last, and only then are older states removed. So a kill at any moment leaves a
model file together with its state: the previous pair until the model is renamed into place, the new one from then on.
Nothing that is not finite is ever written: the pair of before stays.

llm.c's own pair, model_00000100.bin and state_00000100_00000.bin as train_gpt2.cu writes them, can be resumed, too.
"""

import os
import re
import zlib
from pathlib import Path

import numpy as np

from llmc.checkpoint import Model, named_views, read_model, tensor_shapes, write_model
from llmc.errors import UserError, explain_os_error
from llmc.files import is_read_only
from llmc.ranks import ALONE, Ranks, part_of
from llmc.state import TrainState, read_state, write_state

LLMC_MODEL = re.compile(r"model_(\d{8})\.bin")
BLOCK = 1 << 22  # values tested for finiteness at a time

_ours: set[Path] = set()  # states that this process wrote, or resumed from


def state_path(path: str | os.PathLike, model: Model, rank: int = 0) -> Path:
    """The optimizer state that belongs to the checkpoint `path` holding `model`.

    checkpoint.bin -> checkpoint_state_00000020_00000_1c291ca3.bin: llm.c's state_%08d_%05d with the CRC-32 of the
    parameters and extra values, so that a state can never be taken for that of other weights, however a save was cut
    short.
    """
    path, crc = Path(path), 0
    for values in (model.params, model.extra):
        crc = zlib.crc32(np.ascontiguousarray(values, "<f4").data, crc)
    return path.with_name(f"{base_name(path)}_state_{model.step:08d}_{rank:05d}_{crc:08x}.bin")


def base_name(path: Path) -> str:
    """The name without .bin; any other suffix belongs to it, or the states of lr_0.1 and lr_0.3 would be one run's."""
    return path.name.removesuffix(".bin")


def other_spelling(path: str | os.PathLike) -> Path:
    """The one other name whose states are called as those of `path`: run.bin for run, run for run.bin."""
    path = Path(path)
    return path.with_name(base_name(path) if path.name.endswith(".bin") else f"{path.name}.bin")


def not_finite(values: np.ndarray) -> int | None:
    """The index of the first value of a flat array that is NaN or infinite, None if there is none."""
    for start in range(0, values.size, BLOCK):
        finite = np.isfinite(values[start : start + BLOCK])
        if not finite.all():
            return start + int(np.argmin(finite))
    return None


def check_finite_state(path: str | os.PathLike, model: Model, state: TrainState) -> None:
    """Raise UserError, naming the tensor, if a weight, an extra value, m or v is NaN or infinite."""
    own, first = model.params.size, 0
    if state.zero:
        first = part_of(own + model.extra.size, state.rank, state.num_processes).start
    parts = (("weight", model.params, 0), ("weight", model.extra, own), ("m", state.m, first), ("v", state.v, first))
    for what, values, offset in parts:
        if (at := not_finite(values)) is None:
            continue
        ends = np.cumsum([view.size for view in named_views(model.params, tensor_shapes(model.config)).values()])
        tensor = [*tensor_shapes(model.config), "the extra tensors"][int(np.searchsorted(ends, at + offset, "right"))]
        stays = f"{path} of before stays as it is" if os.path.exists(path) else "nothing is saved"
        raise UserError(
            f"{path}: not written, after {model.step} steps a {what} of {tensor} is {values[at]}; {stays}",
            "go on from the last good save with a lower -l, or limit gradients by --grad-clip 1",
        )


def save_checkpoint(path: str | os.PathLike, model: Model, state: TrainState, ranks: Ranks = ALONE) -> list[Path]:
    """Write `model` to `path` and `state` beside it, then remove the states of earlier saves under this name.

    Of several ranks each writes its own state, and then the first one the model.

    m and v of the state belong to the parameters and then, if there are any, to the extra values: one length in all, of
    which a rank with ZeRO has its part.
    Returns those removed that this process had neither written nor resumed from. Raises UserError, with nothing
    touched, for values that are not finite, and for what the system refuses.
    """
    whole = model.params.size + model.extra.size
    part = ranks.part(whole)
    if state.m.size != part.stop - part.start:
        raise ValueError(f"{state.m.size} values of m, the model has {model.params.size} and {model.extra.size} extra")
    check_finite_state(path, model, state)
    path = Path(os.path.realpath(path))
    current = state_path(path, model, state.rank)
    write_state(current, state)
    _ours.add(current)
    ranks.meet()
    if ranks.rank == 0:
        write_model(path, model)
    ranks.meet()
    return remove_states(path, current, state.rank)


def remove_states(path: Path, current: Path | None = None, rank: int = 0) -> list[Path]:
    """Remove the states of `path` but the current one, and what a killed save left of its temporary files.

    Read-only ones stay. Returns those that this process had neither written nor resumed from. Raises UserError if the
    system refuses.
    """
    base = re.escape(base_name(path))
    state = rf"{base}_state_\d{{8}}_{rank:05d}_[0-9a-f]{{8}}\.bin"
    ours = re.compile(rf"{state}|\.(?:{state}|{re.escape(path.name)})\.\d+\.tmp")
    removed = []
    for other in path.parent.iterdir():
        if ours.fullmatch(other.name) and other != current:
            try:
                if is_read_only(other):
                    continue
                other.unlink()
            except FileNotFoundError:
                continue
            except OSError as error:
                raise explain_os_error(error, other, "removing") from None
            if other not in _ours and not other.name.endswith(".tmp"):
                removed.append(other)
    return removed


def load_checkpoint(path: str | os.PathLike, rank: int = 0, nproc: int = 1) -> tuple[Model, TrainState]:
    """The model file `path` and its state. Raises UserError if there is no state for these very weights, or if another
    number of processes than `nproc` trained them: their position in the data counts batches of all.

    Of llm.c's pair, whose model file has no step, the step is that in the names.
    """
    model = read_model(path)
    real = Path(os.path.realpath(path))
    beside = state_path(real, model, rank)
    if not beside.exists() and state_path(path, model, rank).exists():
        beside = state_path(path, model, rank)  # saved through a link, before states stood beside the file itself
    if not beside.exists() and (step := llmc_step(real)) is not None:
        beside, model.step = real.with_name(f"state_{step:08d}_{rank:05d}.bin"), step
    if not beside.exists():
        raise UserError(
            f"{path}: no optimizer state beside it, expected {beside.name}",
            f"start anew from its weights: give -e {path} in place of --resume",
        )
    state = read_state(beside, model.params.size + model.extra.size)
    if state.step != model.step:
        raise UserError(f"{beside}: of step {state.step}, the model file says {model.step}", "save again with -c")
    if state.num_processes != nproc:
        hint = f"mpiexec -n {state.num_processes} before the command, or -e {path} in place of --resume"
        raise UserError(f"{beside}: of {state.num_processes} processes, expected {nproc}", hint)
    _ours.add(beside)
    return model, state


def llmc_step(path: Path) -> int | None:
    """100 for model_00000100.bin, as train_gpt2.cu names its checkpoints; None for any other name."""
    match = LLMC_MODEL.fullmatch(path.name)
    return int(match[1]) if match else None


def is_llmc_pair(path: str | os.PathLike, state: TrainState) -> bool:
    """Whether load_checkpoint took the pair that train_gpt2.cu wrote: its state has no settings of ours."""
    return llmc_step(Path(os.path.realpath(path))) is not None and not state.options
