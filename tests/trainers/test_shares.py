"""A batch in shares, side by side: the same loss and gradients as in one piece, the same bits every time."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import test_model
import test_sparse_model
import test_torus_model
import tiny
from check_op import relative

import train_banded
import train_sparse_attn
import train_toroidal
from kernels import cpu
from kernels import shares as of_batches
from kernels.cpu import blocks
from kernels.shares import PARAMETERS, VALUES, Shares, share_rows
from llmc.errors import UserError
from systems.selection import measure
from systems.sparsity import Sparsity
from systems.torus import Torus

INDEXER = dict(indexer="lightning", heads=3, width=4)
TOP_K, RANDOM = Sparsity((3, 4), **INDEXER, rotated=2), Sparsity((3, 4), selector="random")
MODELS = {
    "banded": lambda B, T, **options: test_model.tiny_model(B, T, 16, 12, **options),
    "sparse": partial(test_sparse_model.tiny_model, test_sparse_model.GPT2, TOP_K),
    "random": partial(test_sparse_model.tiny_model, test_sparse_model.GPT2, RANDOM),
    "mla": partial(test_sparse_model.tiny_model, test_sparse_model.MLA, TOP_K),
    "torus": partial(test_torus_model.tiny_model, Torus(layers=(0,), depth=2, period=5)),
}
SPARSE = ("sparse", "random", "mla")


@pytest.fixture(autouse=True)
def three_cores(monkeypatch):
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "3")
    monkeypatch.setattr(blocks, "usable_cores", lambda: 3)


def shares(kind: str, rows: list[int], dtype=np.float64) -> Shares:
    """Each draws the same parameters."""
    device = test_model.IN_FLOAT64 if dtype == np.float64 else cpu
    if kind in SPARSE and dtype == np.float64:
        device = test_sparse_model.IN_FLOAT64  # whose lists are int32
    return Shares(device, rows, lambda device, B: MODELS[kind](B=B, T=5, dtype=dtype, device=device))


def step(batch: Shares, kind: str, micro_steps: int = 2, dense=False) -> tuple[list[float], np.ndarray]:
    """(losses, gradients) of an update over so many micro-steps"""
    losses = []
    stages, phase = ((True, kind != "random"), dict(dense=dense)) if kind in SPARSE else ((), {})
    for micro_step in range(micro_steps):
        inputs, targets = test_model.batch(batch.B, 5, seed=micro_step)
        batch.forward(inputs, targets, micro_steps, **phase)
        accumulated = dict(grad_accum=micro_steps) if kind in SPARSE else {}
        batch.backward(micro_step == 0, *stages, **phase, **accumulated)
        losses.append(batch.mean_loss())
        if kind in SPARSE and kind != "random":
            losses.append(batch.mean("mean_kl"))
    return losses, batch.models[0].grads_flat.copy()


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_shares_give_what_the_whole_batch_gives(kind, dense):
    """Uneven ones too, over two micro-steps, twice over: in float64 within its rounding."""
    whole, parts = shares(kind, [5]), shares(kind, [1, 2, 2])
    for _ in range(2):
        (losses, grads), (losses3, grads3) = step(whole, kind, dense=dense), step(parts, kind, dense=dense)
        assert relative(np.array(losses3), np.array(losses)) < 1e-13
        assert np.abs(grads).max() > 1e-3 and relative(grads3, grads) < 1e-12


@pytest.mark.parametrize("kind", MODELS)
def test_losses_of_all_rows_are_in_their_order(kind):
    whole, parts = shares(kind, [5]), shares(kind, [1, 2, 2])
    for each in (whole, parts):
        each.forward(*test_model.batch(5, 5))
    assert whole.losses().shape == (25,) and np.ptp(whole.losses()) > 0.01
    assert relative(parts.losses(), whole.losses()) < 1e-13
    assert whole.losses().mean() == pytest.approx(parts.mean_loss(), rel=1e-13)


@pytest.mark.parametrize("kind", MODELS)
def test_shares_give_the_same_bits_every_time(kind):
    found = {step(shares(kind, [2, 1, 2], np.float32), kind)[1].tobytes() for _ in range(5)}
    assert len(found) == 1


def test_what_a_selection_has_of_dense_attention_is_measured_over_all_shares():
    inputs, _ = test_model.batch(5, 5)
    (kl, found, _), (kl3, found3, _) = (measure(shares("sparse", rows), inputs, False) for rows in ([5], [1, 2, 2]))
    assert np.allclose(kl, kl3, rtol=1e-13)
    assert [(a.rows, a.kept, a.queries) for a in found] == [(a.rows, a.kept, a.queries) for a in found3]
    for name in ("recall", "mean_mass"):
        assert [getattr(a, name) for a in found] == pytest.approx([getattr(a, name) for a in found3], rel=1e-12)


def test_rows_are_shared_out_where_it_pays(monkeypatch):
    """As evenly as can be, never an empty share; one where shares are small, gradients many, or there is one core."""
    C = VALUES // 64  # a row of 64 tokens is just enough
    assert share_rows(cpu, 5, 64, C, 1000) == [1, 2, 2] and share_rows(cpu, 2, 64, C, 1000) == [1, 1]
    assert share_rows(cpu, 1, 64, C, 1000) == [1]
    assert share_rows(cpu, 3, 63, C, 1000) == [3]
    assert share_rows(cpu, 3, 64, C, 64 * PARAMETERS) == [1, 1, 1]
    assert share_rows(cpu, 3, 64, C, 64 * PARAMETERS + 1) == [3]
    monkeypatch.setattr(blocks, "_blas", None)
    assert share_rows(cpu, 5, 64, C, 1000) == [5], "products of a BLAS that is not OpenBLAS would take all cores each"


@pytest.mark.parametrize("row", [0, 3])
def test_an_error_in_a_share_is_raised_and_the_next_step_is_right(row):
    """In this process, and in another one."""
    parts, (inputs, targets) = shares("banded", [2, 2]), test_model.batch(4, 5)
    inputs[row, 0] = 99
    with pytest.raises(IndexError, match=r"token ids \d\.\.99"):
        parts.forward(inputs, targets)
    whole = shares("banded", [4])
    assert relative(step(parts, "banded")[1], step(whole, "banded")[1]) < 1e-12


def pid_of_share(shares: Shares, k: int) -> int:
    return os.getpid()


def runs(pid: int) -> bool:
    """Whether there is such a process, and it has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(pid: int) -> bool:
    """Whether a process has ended, waiting for it up to five seconds."""
    for _ in range(100):
        if not runs(pid):
            return True
        time.sleep(0.05)
    return False


def test_processes_end_with_their_batch():
    parts = shares("banded", [1, 1, 1])
    own, *others = parts.each(*3 * [pid_of_share])
    assert own == os.getpid() and len({own, *others}) == 3
    del parts
    assert all(map(gone, others))


def test_a_share_that_was_killed_is_an_error_in_words():
    parts = shares("banded", [1, 1, 1])
    os.kill(parts.each(*3 * [pid_of_share])[1], signal.SIGKILL)
    with pytest.raises(UserError, match="a process that had a share of the batch has ended") as error:
        step(parts, "banded")
    assert "OPENBLAS_NUM_THREADS=1" in error.value.hint


def cannot_be_sent(shares: Shares, k: int):
    return (lambda: k) if k else None


def test_a_share_whose_answer_cannot_be_sent_ends_and_nothing_else(tmp_path):
    """It must not come back from the fork, and run what the first process runs."""
    own, came_back, error = os.getpid(), tmp_path / "came back", None
    parts = shares("banded", [1, 1])
    try:
        _, other = parts.each(*2 * [pid_of_share])
        parts.each(*2 * [cannot_be_sent])
    except Exception as raised:
        error = raised
    if os.getpid() != own:
        came_back.touch()
        os._exit(0)
    assert isinstance(error, UserError) and "has ended" in error.message
    assert gone(other) and not came_back.exists()


def test_a_signal_to_all_processes_leaves_the_others_at_work():
    """Ctrl-C reaches the whole group: the first process saves, for which it needs the others."""
    parts = shares("banded", [1, 1])
    _, other = parts.each(*2 * [pid_of_share])
    before = step(parts, "banded")[1]
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(other, number)
    assert step(parts, "banded")[1].tobytes() == before.tobytes()


def test_processes_end_with_a_run_that_is_killed(tmp_path):
    """kill -9 leaves nothing behind."""
    tiny.make_folder(tmp_path / "run")
    script = """
import sys, train_banded
from kernels import shares
from test_shares import pid_of_share
each = shares.Shares.each
def told(self, *commands):
    print("pids", *each(self, *len(self.models) * [pid_of_share]), flush=True)
    return each(self, *commands)
shares.VALUES, shares.Shares.each, shares.num_threads = 0, told, lambda: 2
train_banded.main(sys.argv[1:])
"""
    command = [sys.executable, "-c", script, *tiny.options(steps=10**6)]
    paths = os.pathsep.join(map(str, (tiny.ROOT, tiny.ROOT / "tests", tiny.ROOT / "tests" / "trainers")))
    env = os.environ | {"PYTHONPATH": paths}
    process = subprocess.Popen(command, cwd=tmp_path / "run", env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    line = next(line for line in process.stdout if line.startswith(b"pids"))
    own, other = map(int, line.split()[1:])
    assert own == process.pid and runs(other)
    process.kill()
    process.communicate()
    assert gone(other)


@pytest.mark.parametrize("trainer", [train_banded, train_sparse_attn, train_toroidal])
def test_a_run_in_shares_prints_the_losses_of_one_thread(folder, trainer, capfdbinary, monkeypatch):
    """Within float32's rounding; memory is told once, as the sum of the shares'."""
    argv = [*tiny.options(steps=4, batch_size=3, grad_accum=1), "-e", "model.bin", "-c", "c.bin"]
    monkeypatch.setattr(of_batches, "VALUES", 0)
    runs = []
    for threads in ("1", "3"):
        monkeypatch.setenv("OPENBLAS_NUM_THREADS", threads)
        runs.append(tiny.done(tiny.call(capfdbinary, trainer.main, *argv)).out)
    one, three = (tiny.losses(out) | dict(enumerate(tiny.val_losses(out), 100)) for out in runs)
    assert len(one) >= 6 and one == pytest.approx(three, abs=2e-6)
    told = [[line for line in out.splitlines() if line.startswith("allocated")] for out in runs]
    assert [line.split(" for ")[1] for line in told[0]] == [line.split(" for ")[1] for line in told[1]]
