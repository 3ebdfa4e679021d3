"""A training checkpoint: the model file and, beside it, the optimizer state of the very same weights.

The state is written first, the model last, and only then are older states removed. So a kill at any moment leaves a
model file together with its state: the previous pair until the model is renamed into place, the new one from then on.
"""

import os
import re
import zlib
from pathlib import Path

import numpy as np

from llmc.checkpoint import Model, read_model, write_model
from llmc.errors import UserError, explain_os_error
from llmc.state import TrainState, read_state, write_state


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


def save_checkpoint(path: str | os.PathLike, model: Model, state: TrainState) -> None:
    """Write `model` to `path` and `state` beside it, then remove the states of earlier saves under this name.

    m and v of the state belong to the parameters and then, if there are any, to the extra values: one length in all.
    """
    if state.m.size != model.params.size + model.extra.size:
        raise ValueError(f"{state.m.size} values of m, the model has {model.params.size} and {model.extra.size} extra")
    path = Path(path)
    current = state_path(path, model, state.rank)
    write_state(current, state)
    write_model(path, model)
    ours = re.compile(re.escape(base_name(path)) + rf"_state_\d{{8}}_{state.rank:05d}_[0-9a-f]{{8}}\.bin")
    for other in path.parent.iterdir():
        if ours.fullmatch(other.name) and other.name != current.name:
            try:
                other.unlink(missing_ok=True)
            except OSError as error:
                raise explain_os_error(error, other, "removing") from None


def load_checkpoint(path: str | os.PathLike, rank: int = 0) -> tuple[Model, TrainState]:
    """The model file `path` and its state. Raises UserError if there is no state for these very weights."""
    model = read_model(path)
    beside = state_path(path, model, rank)
    if not beside.exists():
        raise UserError(
            f"{path}: no optimizer state beside it, expected {beside.name}",
            f"start anew from its weights: give -e {path} in place of --resume",
        )
    state = read_state(beside, model.params.size + model.extra.size)
    if state.step != model.step:
        raise UserError(f"{beside}: of step {state.step}, the model file says {model.step}", "save again with -c")
    return model, state
