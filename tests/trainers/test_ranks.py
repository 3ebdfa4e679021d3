"""Several processes that train one model: the losses of one process, the same weights in all, and no hang."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import tiny
from tiny import Result, check_refused, losses, snapshot, texts, val_losses

from llmc import ranks
from llmc.checkpoint import Model, read_model, write_model
from llmc.dataloader import write_tokens
from llmc.errors import UserError
from llmc.evalloader import COMPLETIONS, EvalLoader, Example, write_examples
from llmc.init import gpt2_init
from llmc.ranks import ALIGN, ALONE, Ranks, launched, open_ranks, part_of
from llmc.resume import load_checkpoint

SCRIPT = Path(__file__).parent / "run_ranks.py"
MPIEXEC = shutil.which("mpiexec", path=str(Path(sys.executable).parent)) or shutil.which("mpiexec")
try:
    import mpi4py  # noqa: F401

    MISSING = None if MPIEXEC else "no mpiexec here: pip install -r requirements-mpi.txt"
except ImportError:
    MISSING = "no mpi4py here: pip install -r requirements-mpi.txt"
needs_mpi = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


def slow(*arguments):
    """A case for `make test_slow`: each start of MPI takes a second."""
    return pytest.param(*arguments, marks=pytest.mark.slow)


SMALL = "--indexer-heads 2 --indexer-dim 4"
RUNS = [
    ("train_banded.py", "-w 16 --grad-clip 1"),
    slow("train_banded.py", "-1 8 -2 24 --weight-decay 0.1"),
    ("train_sparse_attn.py", f"{SMALL} --top-k 3 --indexer-warmup 4"),
    slow("train_sparse_attn.py", f"{SMALL} --top-k 6 --adaptive prefix --indexer-warmup 4 --answers-after 97:122"),
    ("train_toroidal.py", "--layers 0 --learn-lambda 1"),
    slow("train_toroidal.py", "--layers 0,1 --train all --fusion attention"),
]


def start(count: int, trainer: str, flags: str, folder: Path, fault: str = "", **changed) -> subprocess.Popen:
    """Start `count` ranks of a trainer on the tiny files."""
    argv = [*tiny.options(**changed), *shlex.split(flags)]
    words = [MPIEXEC, "-n", str(count), sys.executable, str(SCRIPT), trainer, *argv]
    env = tiny.one_thread() | ({"RANK_FAULT": fault} if fault else {})
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    listen = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731
    return subprocess.Popen(words, cwd=folder, env=env, preexec_fn=listen, start_new_session=True, **pipes)


def run(count: int, trainer: str, flags: str, folder: Path, fault: str = "", **changed) -> Result:
    process = start(count, trainer, flags, folder, fault, **changed)
    out, err = process.communicate(timeout=tiny.TIMEOUT)
    return Result(process.returncode, out.decode(errors="replace"), err.decode())


def done(result: Result, count: int) -> Result:
    """The ranks ended well, without a word on stderr, and with the same weights."""
    assert result.code == 0 and result.err == "", result
    assert f"weights of {count} ranks: 1 kind\n" in result.out, result.out
    return result


# ----------------------------------------------------------------------------------------------------------------------
# the same numbers


@needs_mpi
@pytest.mark.parametrize("trainer, flags", RUNS)
def test_ranks_are_the_micro_steps_of_one(trainer, flags, folder):
    """1 rank of 4 micro-steps, 2 of 2, 4 of 1: losses within 1e-5 over 20 steps, weights within 1e-5."""
    train_data = tiny.VERSE * 40
    write_tokens(folder / "long.bin", np.frombuffer(train_data, np.uint8).astype(np.uint16))
    flags = f"{flags} -n 20 -v 5 -s 10 --shuffle 0 -l 1e-3"
    found = []
    for count in (1, 2, 4):
        own = dict(grad_accum=4 // count, val_batches=4 // count, train_data="long.bin", val_data="long.bin")
        result = done(run(count, trainer, f"{flags} -c {count}.bin", folder, **own), count)
        found.append((result.out, read_model(f"{count}.bin")))
        assert len(list(folder.glob(f"{count}_state_*.bin"))) == count
    out, model = found[0]
    assert len(losses(out)) == 20
    for other, weights in found[1:]:
        assert list(losses(other)) == list(losses(out)) and len(texts(other)) == 2
        assert max(abs(losses(other)[step] - loss) for step, loss in losses(out).items()) <= 1e-5
        assert np.abs(np.subtract(val_losses(other), val_losses(out))).max() <= 1e-5
        assert np.abs(weights.params - model.params).max() <= 1e-5


@needs_mpi
def test_what_a_selection_has_is_measured_over_all_ranks(folder):
    """Before the first step, on the first batch of each: the rows of one rank's batch that is as large as both."""
    flags = f"{SMALL} --top-k 3 -n 0 -m 1 --answers-after 97:122"
    measured = []
    for count in (1, 2):
        out = done(run(count, "train_sparse_attn.py", flags, folder, batch_size=4 // count), count).out
        measured.append([float(x) for x in re.findall(r"(?:KL|recall@k|mass@k|kept|accuracy) ([\d.]+)", out)])
    assert len(measured[0]) == 2 * 4 + 1 and np.allclose(*measured, rtol=0, atol=1.01e-4)


@needs_mpi
def test_experts_of_two_ranks_learn_like_two_micro_steps(folder):
    write_model("model.bin", Model(tiny.DEEPSEEK, gpt2_init(tiny.DEEPSEEK, 1)))
    write_tokens("long.bin", np.resize(np.frombuffer(tiny.VERSE, np.uint8), 4000).astype(np.uint16))
    flags = f"{SMALL} --top-k 3 -n 6 -v 3 -s 0 --shuffle 0 -i long.bin -j long.bin"
    one = done(run(1, "train_sparse_attn.py", f"{flags} --grad-accum 2 -m 2", folder), 1).out
    two = done(run(2, "train_sparse_attn.py", f"{flags} -m 1", folder), 2).out
    assert max(abs(losses(two)[step] - loss) for step, loss in losses(one).items()) <= 1e-5


@needs_mpi
@pytest.mark.parametrize("trainer, flags", [RUNS[0], RUNS[2], slow(*RUNS[4])])
def test_resumed_ranks_equal_ranks_never_stopped(trainer, flags, folder):
    """Shuffled: each rank has an order of its own, in a state of its own."""
    flags = f"{flags} -v 3 -s 4 -sl 3 -sg 3"
    done(run(2, trainer, f"{flags} -n 9 -c whole.bin -o whole.txt --log-json whole.json", folder), 2)
    done(run(2, trainer, f"{flags} -n 4 -c part.bin -o part.txt --keep 2 -k 2", folder), 2)
    done(run(2, trainer, "--resume part.bin -n 9", folder), 2)
    assert Path("whole.bin").read_bytes() == Path("part.bin").read_bytes()
    assert Path("whole.txt").read_bytes() == Path("part.txt").read_bytes()
    orders = []
    for rank in range(2):
        (_, a), (_, b) = (load_checkpoint(name, rank, 2) for name in ("whole.bin", "part.bin"))
        assert (a.m.tobytes(), a.v.tobytes(), a.shard, a.sample) == (b.m.tobytes(), b.v.tobytes(), b.shard, b.sample)
        assert a.shuffle.mt_key.tobytes() == b.shuffle.mt_key.tobytes()
        orders.append(a.shuffle.mt_key.tobytes())
        assert load_checkpoint("part_00000008.bin", rank, 2)[1].step == 8
    assert orders[0] != orders[1]
    names = sorted(path.name for path in folder.glob("part_*.bin") if "state" not in path.name)
    assert names == ["part_00000008.bin", "part_00000009.bin"]
    assert len(list(folder.glob("part*_state_*.bin"))) == 2 * 3


@needs_mpi
def test_another_number_of_ranks_is_refused(folder):
    done(run(2, "train_banded.py", "-n 2 -c c.bin", folder), 2)
    before = snapshot(folder)
    for count in (1, 3):
        result = run(count, "train_banded.py", "--resume c.bin -n 4", folder)
        assert f"of 2 processes, expected {count}\n---> HINT: mpiexec -n 2 before the command" in result.err
        assert result.err.count("error: ") == 1 and result.code == 1
    assert snapshot(folder) == before


@needs_mpi
def test_one_rank_prints_what_one_process_does(folder):
    alone = tiny.run_script("train_banded.py", [*tiny.options(), *["-n", "3", "-v", "2", "-s", "2"]], folder).out
    out = done(run(1, "train_banded.py", "-n 3 -v 2 -s 2", folder), 1).out
    assert tiny.without_times(out).replace("weights of 1 ranks: 1 kind\n", "") == tiny.without_times(alone)
    two = done(run(2, "train_banded.py", "-n 3 -v 2 -s 2", folder), 2).out
    shown = [line for line in two.splitlines() if not line.startswith(("step", "val", "device", "total"))]
    assert "| num_processes         | 2                                                  |" in shown
    assert len(two.splitlines()) == len(alone.splitlines()) + 2


def test_questions_are_shared_out(folder):
    generator = np.random.default_rng(4)
    lists = lambda n: [generator.integers(0, 256, 3) for _ in range(n)]  # noqa: E731
    examples = [Example(generator.integers(0, 256, 4), lists(COMPLETIONS), i % 4) for i in range(11)]
    write_examples("q.bin", examples)
    loaders = [EvalLoader("q.bin", 4, 16, 256, rank=rank, nproc=3) for rank in range(3)]
    assert [loader.num_batches for loader in loaders] == [4, 4, 3]
    assert [loader.num_examples for loader in loaders] == [11, 11, 11]
    together = [example.label for loader in loaders for example in loader.examples]
    assert sorted(together) == sorted(example.label for example in examples)


# ----------------------------------------------------------------------------------------------------------------------
# --zero 1


@needs_mpi
@pytest.mark.parametrize(
    "count, trainer, flags",
    [
        (2, "train_banded.py", "-w 16 --mask-init 0 --grad-clip 0.5 -sg 3"),
        slow(3, "train_banded.py", "-1 8 -2 24 --weight-decay 0.1 --decay-all 0"),
        slow(2, "train_sparse_attn.py", f"{SMALL} --top-k 3 --indexer-warmup 3 --grad-clip 0.5 --weight-decay 0.1"),
        (3, "train_toroidal.py", "--layers 0,1 --train all --learn-lambda 1"),
    ],
)
def test_zero_is_the_same_training_with_a_part_of_the_moments(count, trainer, flags, folder):
    """Losses and weights within 1e-6 of ZeRO 0 over 8 steps; each rank saves its part of m and v, and resumes it."""
    write_tokens("long.bin", np.resize(np.frombuffer(tiny.VERSE, np.uint8), 4000).astype(np.uint16))
    flags = f"{flags} -v 4 -s 0 -l 1e-3 -i long.bin -j long.bin"
    for zero in (0, 1):
        result = done(run(count, trainer, f"{flags} -n 8 --zero {zero} -c {zero}.bin", folder), count)
        if zero == 0:
            whole = result.out
    assert max(abs(losses(result.out)[step] - loss) for step, loss in losses(whole).items()) <= 1e-6
    assert np.abs(read_model("1.bin").params - read_model("0.bin").params).max() <= 1e-6
    assert np.abs(np.subtract(val_losses(result.out), val_losses(whole))).max() <= 1e-6
    (_, of_all), parts = load_checkpoint("0.bin", 0, count), []
    for rank in range(count):
        state = load_checkpoint("1.bin", rank, count)[1]
        part = part_of(of_all.m.size, rank, count)
        assert state.m.size == state.v.size == part.stop - part.start
        parts.append((state.m, state.v))
    for moments, pieces in zip((of_all.m, of_all.v), zip(*parts)):
        assert np.abs(np.concatenate(pieces) - moments).max() <= 1e-6
    done(run(count, trainer, f"{flags} -n 4 --zero 1 -c part.bin", folder), count)
    data = dict(train_data="long.bin", val_data="long.bin")
    done(run(count, trainer, "--resume part.bin -n 8", folder, **data), count)
    assert Path("part.bin").read_bytes() == Path("1.bin").read_bytes()
    refused = run(count, trainer, "--resume part.bin -n 9 --zero 0", folder, **data)
    assert refused.code == 2 and "--zero 0: part.bin was saved with --zero 1" in refused.err


def test_parts_cover_all_in_whole_rows():
    for size in (0, 1, 255, 256, 257, 1000, 124_439_808):
        for count in (1, 2, 3, 8, 64):
            parts = [part_of(size, rank, count) for rank in range(count)]
            assert parts[0].start == 0 and parts[-1].stop == size
            assert all(a.stop == b.start for a, b in pairwise(parts))
            assert all(part.start % ALIGN == 0 or part.start == size for part in parts)
    assert part_of(124_439_808, 1, 8) == slice(15_555_072, 31_110_144)


def test_a_replaced_layer_alone_has_no_zero(folder):
    argv = [*tiny.options(), "--zero", "1"]
    check_refused(tiny.run_script("train_toroidal.py", argv, folder), "--zero 1 with --train replaced", code=2)


# ----------------------------------------------------------------------------------------------------------------------
# --total-batch


@needs_mpi
def test_the_total_batch_gives_the_micro_steps(folder):
    write_tokens("long.bin", np.resize(np.frombuffer(tiny.VERSE, np.uint8), 4000).astype(np.uint16))
    flags = "-n 4 -s 0 --shuffle 0 -i long.bin -j long.bin"
    one = done(run(1, "train_banded.py", f"{flags} --total-batch {4 * tiny.B * tiny.T}", folder), 1).out
    two = done(run(2, "train_banded.py", f"{flags} --total-batch {4 * tiny.B * tiny.T} -m 10", folder), 2).out
    four = done(run(1, "train_banded.py", f"{flags} --grad-accum 4", folder), 1).out
    assert losses(one) == losses(four)
    assert max(abs(losses(two)[step] - loss) for step, loss in losses(one).items()) <= 1e-5


def test_a_total_batch_that_does_not_divide_is_refused(folder):
    result = tiny.run_script("train_banded.py", [*tiny.options(), "--total-batch", "40"], folder)
    check_refused(result, "--total-batch 40: B*T is 16 in 1 processes", code=2)
    result = tiny.run_script(
        "train_banded.py", [*tiny.options(), *["--total-batch", "32", "--grad-accum", "2"]], folder
    )
    check_refused(result, "--grad-accum given together with --total-batch", code=2)
    for flags, batches in (("--total-batch 32 -n 1 -c c.bin", 2), ("--resume c.bin -n 2", 2)):
        tiny.run_script("train_banded.py", [*tiny.options(), *flags.split()], folder)
        assert load_checkpoint("c.bin")[1].options["grad_accum"] == batches
    tiny.run_script(
        "train_banded.py", [*tiny.options(), *["--resume", "c.bin", "--grad-accum", "3", "-n", "3"]], folder
    )
    assert load_checkpoint("c.bin")[1].options["grad_accum"] == 3


# ----------------------------------------------------------------------------------------------------------------------
# what goes wrong


@needs_mpi
@pytest.mark.parametrize(
    "rank, kind",
    [(0, "kill"), (1, "kill"), (1, "error"), (0, "bug")]
    + [slow(rank, kind) for rank, kind in ((0, "error"), (1, "bug"), (0, "memory"), (1, "memory"))],
)
def test_a_rank_that_dies_ends_the_job_with_a_whole_checkpoint(rank, kind, folder):
    began = time.monotonic()
    result = run(2, "train_banded.py", "-n 1000000 -v 0 -s 0 -k 3 -c c.bin", folder, fault=f"{rank} 7 {kind}")
    assert time.monotonic() - began < 30
    assert result.code not in (0, None)
    whose = "rank 1: " if rank else ""
    if kind != "kill":
        told = {"error": "error: train.bin: gone bad", "memory": "error: out of memory: no room"}
        told["bug"] = "ZeroDivisionError: integer division or modulo by zero"
        assert result.err.count(f"{whose}{told[kind]}\n") == 1, result.err
        assert len(re.findall(r"error: |Error: ", result.err)) == 1
    for each in range(2):
        assert load_checkpoint("c.bin", each, 2)[1].step == 6


@needs_mpi
def test_an_error_that_all_ranks_have_is_told_once(folder):
    before = snapshot(folder)
    for flags, code in (("-e none.bin", 1), ("-w x", 2), ("-t 100", 2)):
        result = run(2, "train_banded.py", flags, folder)
        assert result.code == code and result.err.count("error: ") == 1 and "Traceback" not in result.err, result
        assert result.err.count("---> HINT: ") == 1
    assert snapshot(folder) == before


@needs_mpi
def test_ctrl_c_on_mpiexec_saves_once(folder):
    process = start(2, "train_banded.py", "-n 1000000 -v 0 -s 0 -c c.bin", folder)
    tiny.wait_for(process, b"step    3/")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=tiny.TIMEOUT)
    assert process.returncode == 130
    assert out.count(b"saving checkpoint to c.bin\n") == 1 and err.count(b"finishing this step") == 1
    steps = int(re.search(rb"stopped after (\d+) steps; go on with: mpiexec -n 2 python \S+ --resume c.bin\n", out)[1])
    for rank in range(2):
        assert load_checkpoint("c.bin", rank, 2)[1].step == steps
    done(run(2, "train_banded.py", f"--resume c.bin -n {steps + 2}", folder), 2)


@needs_mpi
def test_a_straggler_is_named(folder):
    out = done(run(3, "train_banded.py", "-n 4 -b 1 -s 0 --ranks-timing 1", folder, fault="1 0 slow"), 3).out
    found = re.findall(r"^ranks worked (\S+), (\S+), (\S+) ms; the slowest is (\d)$", out, re.M)
    assert len(found) == 4
    for *times, slowest in found[1:]:
        first, second, third = map(float, times)
        assert slowest == "1" and second >= 400 and max(first, third) < second - 200


def test_what_a_launcher_says(monkeypatch):
    for name in ranks.COUNTS:
        monkeypatch.delenv(name, raising=False)
    assert launched() == 1 and open_ranks().size == 1
    for name in ranks.COUNTS:
        monkeypatch.setenv(name, "3")
        assert launched() == 3
        monkeypatch.setenv(name, "x")
        assert launched() == 1


@needs_mpi
def test_a_launcher_of_another_mpi_is_told(folder):
    """Two processes, neither of which MPI tells of the other."""
    argv = [*tiny.options(), "-n", "1"]
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PMI", "MPI"))} | {
        "WORLD_SIZE": "2"
    }
    command = tiny.command("train_banded.py", *argv)
    result = subprocess.run(command, cwd=folder, env=env, capture_output=True, timeout=tiny.TIMEOUT, text=True)
    found = Result(result.returncode, result.stdout, result.stderr)
    check_refused(found, "the launcher started 2 processes, MPI finds 1", "mpiexec")


def test_without_mpi4py_it_says_what_is_missing(monkeypatch):
    monkeypatch.setenv("PMI_SIZE", "2")
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(UserError, match="one of 2 processes, and mpi4py does not work here") as error:
        open_ranks()
    assert "requirements-mpi.txt" in error.value.hint


def test_alone_every_exchange_gives_what_it_got():
    values = np.arange(5, dtype=np.float32)
    ALONE.add_up(values), ALONE.broadcast(values), ALONE.meet()
    assert values.tolist() == [0, 1, 2, 3, 4] and ALONE.mean(0.1) == 0.1 and ALONE.gather("x") == ["x"]
    assert (Ranks().rank, Ranks().size) == (0, 1)
