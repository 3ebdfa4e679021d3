"""train_toroidal.py and generate.py on the emulated GPU: the CPU's losses and logits, no race, the same bits."""

from dataclasses import replace

import numpy as np
import pytest
import tiny
from cuda_emulator.runtime import EmulatedRuntime
from test_cuda_training import on_emulator  # noqa: F401  a fixture
from test_golden import losses
from test_torus_model import BASE, TINY, batch, tiny_model, trained_grads

import generate
import train_toroidal
from kernels import cuda
from llmc.checkpoint import named_views
from systems.torus import ATTENTION, Torus

pytestmark = pytest.mark.launches("gpt2", "torus")

TOL = 2e-5  # of float32 on two devices, relative to the largest value


@pytest.fixture(scope="module")
def checking(emulator) -> EmulatedRuntime:
    return EmulatedRuntime("check")


CASES = {
    "low_rank_residual": (BASE, {}),
    "low_rank, rank 3, rope int": (replace(BASE, depth=4, fusion="low_rank", rank=3, rope="int"), {}),
    "attention, replaced": (replace(BASE, depth=4, fusion="attention", layers=(1,)), dict(learns=(1,))),
    "mean, rope upstream, recompute": (replace(BASE, fusion="mean", rope="upstream"), dict(recompute=True)),
    "identity, D 1, fixed lambda": (replace(BASE, depth=1, fusion="identity", learn_lambda=False, layers=(0,)), {}),
    "published": (replace(BASE, mode="upstream", period=9, fusion="low_rank", rope="orth"), {}),
    "window, D 8, replaced": (replace(BASE, depth=8, window=1, wrap_depth=True), dict(learns=(0, 1))),
    "control": (Torus(), dict(learns=(0,))),
}


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_the_cpus(case, checking):
    """Loss and every gradient of two micro-steps, in mode check: no race, no access out of bounds."""
    torus, options = CASES[case]
    (inputs, targets), results = batch(2, 9), []
    reference = tiny_model(torus, 2, 9, **options)
    params = reference.params_flat.astype(np.float32)
    ours = train_toroidal.GPT2(cuda.device(checking), TINY, torus, params, 2, 9, **options)
    for model in (reference, ours):
        for micro_step in range(2):
            model.forward(inputs[:, ::-1].copy() if micro_step else inputs, targets, grad_accum=2)
            loss = model.mean_loss()
            model.backward(first=micro_step == 0)
        results.append((loss, trained_grads(model)))
    (loss, wanted), (found_loss, found) = results
    wanted = {name: grad for name, grad in wanted.items() if grad.any()}
    errors = {name: np.abs(found[name] - grad).max() / np.abs(grad).max() for name, grad in wanted.items()}
    print(f"{case}: loss {abs(found_loss - loss):.1e}, gradients {max(errors.values()):.1e}")
    learnt = {"qkvw", "attprojb"} | ({"lams"} if torus.learn_lambda else set())
    assert learnt <= errors.keys() and abs(found_loss - loss) <= TOL * loss
    assert max(errors.values()) <= TOL, errors


def test_what_does_not_learn_keeps_every_bit(checking):
    torus, (inputs, targets) = replace(BASE, layers=(1,), depth=4, fusion="low_rank"), batch(2, 9)
    model = tiny_model(torus, 2, 9, np.float32)
    ours = train_toroidal.GPT2(cuda.device(checking), TINY, torus, model.params_flat, 2, 9, (1,))
    ours.forward(inputs, targets)
    ours.backward()
    ours.update(1, 1e-2, weight_decay=0.1, grad_clip=0.5)
    before, after = (named_views(flat, ours.shapes) for flat in (model.params_flat, ours.ops.to_host(ours.params_flat)))
    for name, tensor in before.items():
        changed = [(after[name][l] != tensor[l]).any() for l in range(len(tensor))]
        learns = {*ATTENTION, "lams", "lamd", "fuse1", "fuse2"}
        assert changed[-1:] == [name in learns] and not any(changed[:-1]), name


@pytest.mark.parametrize("case", ["low_rank, rank 3, rope int", "window, D 8, replaced", "published"])
def test_extend_gives_the_logits_of_the_cpu(case, checking):
    """In parts, past the ring of 5."""
    torus, inputs = CASES[case][0], batch(1, 12)[0][0]
    reference = tiny_model(torus, 1, 12)
    ours = train_toroidal.GPT2(cuda.device(checking), TINY, torus, reference.params_flat.astype(np.float32), 1, 12)
    for start, stop in ((0, 7), (7, 8), (8, 12)):
        expected, found = (model.extend(inputs[start:stop], start) for model in (reference, ours))
        assert np.abs(found - expected).max() <= TOL * np.abs(expected).max()


@pytest.mark.parametrize("case", ["low_rank, rank 3, rope int", "window, D 8, replaced"])
def test_model_is_causal_bit_for_bit(case, checking):
    torus, inputs = CASES[case][0], batch(2, 12)[0]
    params = tiny_model(torus, 2, 12, np.float32).params_flat
    ours = train_toroidal.GPT2(cuda.device(checking), TINY, torus, params, 2, 12)
    ours.forward(inputs)
    before = ours.ops.to_host(ours.acts.logits).reshape(2, 12, -1)
    for s in (1, 6, 11):
        changed = inputs.copy()
        changed[:, s:] = (changed[:, s:] + 1) % TINY.V
        ours.forward(changed)
        after = ours.ops.to_host(ours.acts.logits).reshape(2, 12, -1)
        assert after[:, :s].tobytes() == before[:, :s].tobytes() and (after[:, s] != before[:, s]).any()


TORUS_RUN = dict(model="model.bin", layers="0,1", depth=4, period=5, rope="int", fusion="attention", learn_lambda=1)


@pytest.mark.parametrize("more", [{}, dict(train="all", recompute=1, grad_accum=2, grad_clip=0.5)])
def test_a_run_has_the_losses_of_the_cpu(more, on_emulator, folder, capsys):  # noqa: F811
    """From the command line, samples included, losses within 5e-5; three thread schedules give the same file."""
    settings = dict(steps=4, lr=0.003, val_every=2, sample_every=2, checkpoint="c.bin", device=None)
    options = tiny.options(**TORUS_RUN, **settings, **more)
    assert train_toroidal.main([*options, "--device", "cpu"]) == 0
    reference, files = capsys.readouterr().out, []
    for schedule in ("ascending", "descending", "random"):
        on_emulator(mode="fast", schedule=schedule, seed=3)
        assert train_toroidal.main(options) == 0
        files.append((folder / "c.bin").read_bytes())
        ours = capsys.readouterr().out
        assert "CUDA emulator" in ours
        for kind, count in (("train", 4), ("val", 3)):
            assert losses(reference, kind).size == count
            assert np.abs(losses(ours, kind) - losses(reference, kind)).max() <= 5e-5
    assert files[0] == files[1] == files[2]
    on_emulator(mode="check")
    assert train_toroidal.main([*options, "--sample-every", "0", "--steps", "1", "--val-batches", "1"]) == 0
    assert generate.main(["-e", "c.bin", "-n", "3", "-s", "3"]) == 0
