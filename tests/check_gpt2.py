"""Our logits, loss and gradients against a debug state, printed as llm.c's test_gpt2.c prints them.

    python tests/check_gpt2.py gpt2_124M.bin gpt2_124M_debug_state.bin

Last line `overall okay: 1` and exit status 0 if logits are within 1e-4 and each of the 16 gradients within 1e-5 of the
file's, and for OpenAI's 124M model also the losses of ten updates within 1e-2 of llm.c's (else 0, and status 1).
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))  # so that it runs from any folder
if __name__ == "__main__":
    from llmc import startup

    startup.begin()

import time

import numpy as np

from kernels import cpu
from llmc.checkpoint import named_views, read_model, tensor_shapes
from llmc.debug_state import read_debug_state
from llmc.errors import UserError, run
from train_banded import GPT2

LOGITS_TOL, LOSS_TOL, GRADIENT_TOL = 1e-4, 1e-4, 1e-5
# test_gpt2.c's ten losses of gpt2_124M.bin on its debug state: lr 1e-4, betas 0.9 and 0.999, weight decay 0.01
LOSSES_124M = (5.270007, 4.059707, 3.375123, 2.800783, 2.315382, 1.849029, 1.394656, 0.999147, 0.624080, 0.376511)


def check_tensor(ours: np.ndarray, reference: np.ndarray, label: str) -> bool:
    """Five pairs and the largest difference of one gradient."""
    print(label)
    difference = np.abs(ours - reference)
    for a, b, apart in list(zip(ours.flat, reference.flat, difference.flat))[:5]:
        print(f"{'OK' if apart <= GRADIENT_TOL else 'NOT OK'} {a:f} {b:f}")
    okay = bool(difference.max() <= GRADIENT_TOL)
    print(f"{'TENSOR OK' if okay else 'TENSOR NOT OK'}, maxdiff = {difference.max():e}")
    return okay


def check_training(model: GPT2, inputs: np.ndarray, targets: np.ndarray) -> bool:
    """Ten updates on the one batch, against llm.c's losses."""
    okay = True
    for step, expected in enumerate(LOSSES_124M):
        started = time.perf_counter()
        model.forward(inputs, targets)
        loss = model.mean_loss()
        model.backward()
        elapsed = time.perf_counter() - started
        model.update(step + 1, lr=1e-4, weight_decay=0.01)
        step_okay = abs(loss - expected) < 1e-2
        okay &= step_okay
        print(f"step {step}: loss {loss:f} (took {elapsed * 1000:f} ms) OK = {int(step_okay)}")
    return okay


def main() -> int:
    if len(sys.argv) != 3:
        raise UserError("two arguments expected", "python tests/check_gpt2.py MODEL DEBUG_STATE", 2)
    file = read_model(sys.argv[1])
    config = file.config
    state = read_debug_state(sys.argv[2], config)
    B, T = state.inputs.shape
    print(f"[State]\nbatch_size: {B}\nseq_len: {T}")
    model = GPT2(cpu, config, file.params, B, T)

    model.forward(state.inputs)
    logits = model.acts.logits[:, : config.V].reshape(state.logits.shape)
    for ours, reference in zip(logits.flat[:10], state.logits.flat[:10]):
        print(f"{reference:f}, {ours:f}")
    difference = np.abs(logits - state.logits).max()
    okay = bool(difference <= LOGITS_TOL)
    print(f"{'' if okay else 'NOT '}OK (LOGITS), max_diff = {difference:e}")

    model.forward(state.inputs, state.targets)
    loss = model.mean_loss()
    loss_okay = abs(loss - state.loss) <= LOSS_TOL
    print(f"{'LOSS OK' if loss_okay else 'LOSS MISMATCH'}: {loss:f} {state.loss:f}")
    model.backward()
    shapes = tensor_shapes(config)
    ours, reference = named_views(model.grads_flat, shapes), named_views(state.grads, shapes)
    checks = [check_tensor(ours[name][: config.V], reference[name][: config.V], f"d{name}") for name in ("wte",)]
    checks += [check_tensor(ours[name], reference[name], f"d{name}") for name in shapes if name != "wte"]
    okay = okay and loss_okay and all(checks)
    if (config.L, config.C) == (12, 768) and abs(state.loss - LOSSES_124M[0]) < 1e-2:
        okay = check_training(model, state.inputs, state.targets) and okay
    print(f"overall okay: {int(okay)}")
    return 0 if okay else 1


if __name__ == "__main__":
    run(main)
