"""Reference activations and gradients of one batch, as llm.c's train_gpt2.py writes them for its tests (write_state).

    int32 header[256]: 20240327, 2, B, T, 0 ...
    inputs int32 (B,T), targets int32 (B,T), logits float32 (B,T,V), loss float32, gradients float32 (num_parameters)

The gradients are of the mean loss, before any update, tensors in the order of a model file, wte padded to Vp rows.
"""

import os
from dataclasses import dataclass

import numpy as np

from llmc.checkpoint import GPT2Config, num_parameters
from llmc.errors import UserError
from llmc.files import HEADER_BYTES, HEADER_INTS, atomic_write, check_size, open_file, read_array, read_header

MAGIC, VERSION = 20240327, 2
WHAT = "debug state file"
HINT = "give the debug state that belongs to this model: python data/starter_pack.py fetches both for GPT-2 124M"


@dataclass
class DebugState:
    """inputs, targets (B,T) int32; logits (B,T,V) float32; the mean loss; grads, flat float32 like a model's params."""

    inputs: np.ndarray
    targets: np.ndarray
    logits: np.ndarray
    loss: float
    grads: np.ndarray


def read_debug_state(path: str | os.PathLike, config: GPT2Config) -> DebugState:
    """Read the debug state of a model of these sizes.

    Raises UserError for a wrong magic, version, size or token, or sizes that are not this model's.
    """
    with open_file(path) as file:
        header = read_header(file, path, MAGIC, (VERSION,), WHAT, HINT)
        B, T = map(int, header[2:4])
        if B < 1 or not 1 <= T <= config.maxT:
            raise UserError(f"{path}: B, T are {B}, {T}; expected 1 or more, and T up to {config.maxT}", HINT)
        count = num_parameters(config)
        check_size(file, path, HEADER_BYTES + 4 * (2 * B * T + B * T * config.V + 1 + count), WHAT, HINT)
        inputs, targets = (read_array(file, np.empty((B, T), "<i4")) for _ in range(2))
        logits = read_array(file, np.empty((B, T, config.V), "<f4"))
        loss = read_array(file, np.empty(1, "<f4"))
        grads = read_array(file, np.empty(count, "<f4"))
    for name, tokens in (("inputs", inputs), ("targets", targets)):
        if tokens.min() < 0 or tokens.max() >= config.V:
            raise UserError(f"{path}: {name} {tokens.min()}..{tokens.max()}, the model knows 0..{config.V - 1}", HINT)
    return DebugState(inputs, targets, logits, float(loss[0]), grads)


def write_debug_state(path: str | os.PathLike, state: DebugState) -> None:
    """Write `state`, atomically. Raises UserError if the system refuses."""
    header = np.zeros(HEADER_INTS, "<i4")
    header[:2] = MAGIC, VERSION
    header[2:4] = state.inputs.shape
    with atomic_write(path) as file:
        file.write(header.data)
        for tokens in (state.inputs, state.targets):
            file.write(np.ascontiguousarray(tokens, "<i4").data)
        for values in (state.logits, np.float32([state.loss]), state.grads):
            file.write(np.ascontiguousarray(values, "<f4").data)
