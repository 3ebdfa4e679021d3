"""--graph: trainers on the emulated GPU, by CUDA graphs and without, have the same losses and files, bit for bit."""

import re

import pytest
import tiny
from cuda_emulator.runtime import EmulatedRuntime

import kernels
import train_banded
import train_sparse_attn
import train_toroidal
from kernels import cuda
from kernels.cuda.sparse import indexer, sparse_attention
from kernels.graph import Replay
from llmc.checkpoint import Model, write_model
from llmc.errors import UserError
from llmc.init import gpt2_init
from llmc.resume import load_checkpoint

pytestmark = pytest.mark.launches("gpt2", "band", "sparse", "deepseek", "torus")

MEASURED = r"\([\d.]+ ms, \d+ tok/s\)|[\d.]+% of a forward pass|(time|emulator|memory|MiB).*"


@pytest.fixture
def run_trainer(monkeypatch, emulator, folder, capfdbinary):
    """run_trainer(trainer, graph, capability, **options) -> (result, the emulated GPU it ran on)"""

    def run(trainer, graph: str, capability=(7, 0), **options) -> tuple[tiny.Result, EmulatedRuntime]:
        runtime = EmulatedRuntime("fast", capability=capability)
        monkeypatch.setattr(kernels, "open_device", lambda name, tf32, graph, ranks: cuda.device(runtime, graph))
        return tiny.call(capfdbinary, trainer.main, *tiny.options(graph=graph, **options)), runtime

    return run


def check_same(run_trainer, folder, trainer, graph_launches: int, **options) -> None:
    """Eager and by graphs: what is printed but for times, logs, weights, m and v; and how often a graph is launched."""
    runs = []
    for graph in ("0", "1"):
        result, runtime = run_trainer(trainer, graph, checkpoint="c.bin", log="log.txt", **options)
        assert result.code == 0, result.err
        said = re.sub(MEASURED, "", result.out)
        file, state = load_checkpoint(folder / "c.bin")
        kept = [values.tobytes() for values in (file.params, file.extra, state.m, state.v)]
        runs.append((said, (folder / "log.txt").read_text(), *kept, runtime.graph_launches))
        for name in ("c.bin", "log.txt"):
            (folder / name).unlink()
    eager, by_graphs = runs
    assert eager[0].splitlines() == by_graphs[0].splitlines() and eager[1:-1] == by_graphs[1:-1]
    assert "train loss" in eager[0] and eager[1].count("trl:") == options["steps"]
    assert (eager[-1], by_graphs[-1]) == (0, graph_launches)


# everything that changes from step to step
CHANGING = dict(model="model.bin", steps=6, lr=0.003, lr_schedule="cosine", warmup=2, final_lr_frac=0.1, grad_clip=0.5)
CHANGING |= dict(weight_decay=0.1, decay_all=0, val_every=3, val_batches=2, sample_every=3)


@pytest.mark.parametrize(
    "more, launches",
    [
        # all calls but the first: forward 6 in training, 6 in 3 validations, 1 before the checkpoint is written;
        # backward and update 6; 11 tokens of each of 2 samples
        (dict(fc1_bandwidth=24, fc2_bandwidth=24), 12 + 5 + 5 + 21),
        # forward 11 in training, 6 in validations; backward 5 of each of the two micro-steps; update 5; tokens
        (dict(fc1_bandwidth=24, fc2_bandwidth=24, grad_accum=2), 11 + 6 + 5 + 5 + 5 + 21),
        (dict(fc1_bandwidth=24, permute=3, kernel="mask", grad_accum=2), 11 + 6 + 5 + 5 + 5 + 21),
        # from the first update on products skip what is outside the band: before it 2 forwards, then graphs anew
        (dict(fc1_bandwidth=24, mask_init=0, grad_accum=2), 2 + 9 + 4 + 4 + 4 + 4 + 21),
    ],
)
def test_banded(more, launches, run_trainer, folder):
    check_same(run_trainer, folder, train_banded, launches, **CHANGING, **more)


@pytest.mark.parametrize(
    "more, launches", [({}, 12 + 5 + 5), (dict(train="all", recompute=1, grad_accum=2), 11 + 6 + 5 + 5 + 5)]
)
def test_toroidal(more, launches, run_trainer, folder):
    torus = dict(layers="0,1", depth=4, period=5, rope="int", fusion="attention", learn_lambda=1)
    check_same(run_trainer, folder, train_toroidal, launches, **CHANGING, **torus, **more)


SELECTION = dict(top_k=3, indexer_heads=2, indexer_dim=4)


@pytest.mark.parametrize(
    "more, launches",
    [
        # dense: forward 2 in validation, 3 in training; backward, update 2; then 5 in validations, 3 in training; 2, 2
        (dict(indexer_warmup=3, **SELECTION), 4 + 2 + 2 + 7 + 2 + 2),
        (dict(indexer_warmup=3, grad_accum=2, adaptive="prefix", **SELECTION), 1 + 5 + 2 + 2 + 2 + 4 + 5 + 2 + 2 + 2),
        (dict(selector="random", **SELECTION), 12 + 5 + 5),  # a draw a step, from memory
        (dict(selector="oracle", **SELECTION), 12 + 5 + 5),
        (SELECTION | dict(top_k=6, share=2), 12 + 5 + 5),
        (dict(attention="dense"), 12 + 5 + 5),
        (dict(model="deepseek.bin", **SELECTION), 12 + 5 + 5),
    ],
)
def test_sparse(more, launches, run_trainer, folder):
    write_model(folder / "deepseek.bin", Model(tiny.DEEPSEEK, gpt2_init(tiny.DEEPSEEK, 1)))
    check_same(run_trainer, folder, train_sparse_attn, launches, **CHANGING | more)


@pytest.mark.parametrize("launcher, name", [(sparse_attention, "union_mean"), (indexer, "indexer_union_backward")])
def test_sparse_where_64_queries_share_their_keys(launcher, name, run_trainer, folder, monkeypatch):
    """The trial comes before the first graph; lists are made in it."""
    calls, shared = [], getattr(launcher, name)
    monkeypatch.setattr(launcher, "WORTH", 0)
    monkeypatch.setattr(indexer, "FEW", 0)
    monkeypatch.setattr(launcher, name, lambda *args: (calls.append(args), shared(*args)))
    check_same(run_trainer, folder, train_sparse_attn, 12 + 5 + 5, capability=(9, 0), **CHANGING, **SELECTION)
    assert len(calls) > 2 * (1 + 6)  # of both runs: the trial, and the steps of the eager one at least


def test_what_asks_the_host_in_a_step_stays_eager_or_is_refused(run_trainer, folder):
    """The published controller's k comes from the host: auto says so once and goes on, 1 ends."""
    options = SELECTION | dict(model="model.bin", adaptive="upstream", steps=4, val_batches=2, checkpoint="c.bin")
    files = []
    for graph in ("0", "auto"):
        result, runtime = run_trainer(train_sparse_attn, graph, **options)
        assert result.code == 0 and runtime.graph_launches == 0
        files.append((folder / "c.bin").read_bytes())
    assert files[0] == files[1]
    assert result.err == (
        "no CUDA graphs, kernels are launched one by one: copying to the host: not while a graph is captured\n"
    )
    refused, _ = run_trainer(train_sparse_attn, "1", **options)
    tiny.check_refused(refused, "--graph 1: copying to the host", "--graph auto")


def test_a_resumed_run_may_change_to_graphs_or_from_them(run_trainer, folder):
    """3 steps and 3 are 6, whichever are by graphs: the flag is no part of the checkpoint."""
    settings = dict(model="model.bin", fc1_bandwidth=24, grad_accum=2, grad_clip=0.5, lr=0.003, val_every=0)
    resumed = dict.fromkeys(("train_data", "val_data", "batch_size", "seq_len", "sample_tokens", "device"))
    files = []
    for first, then in (("0", ""), ("1", "1"), ("1", "0"), ("0", "1")):
        steps = 3 if then else 6
        assert run_trainer(train_banded, first, **settings, steps=steps, checkpoint="c.bin")[0].code == 0
        if then:
            result, runtime = run_trainer(train_banded, then, **resumed, resume="c.bin", steps=6)
            assert result.code == 0 and (runtime.graph_launches > 0) == (then == "1"), result.err
        file, state = load_checkpoint(folder / "c.bin")
        assert file.step == 6 and "graph" not in state.options
        files.append([values.tobytes() for values in (file.params, state.m, state.v)])
    assert files[0] == files[1] == files[2] == files[3]


# ----------------------------------------------------------------------------------------------------------------------
# the flag, and what it calls


def test_there_are_no_graphs_on_a_cpu(folder, capfdbinary):
    refused = tiny.call(capfdbinary, train_banded.main, *tiny.options(model="model.bin", steps=1, graph=1))
    tiny.check_refused(refused, "--graph 1: there are no CUDA graphs on CPU, NumPy", "--graph auto")
    for graph in ("auto", "0"):
        done = tiny.call(capfdbinary, train_banded.main, *tiny.options(model="model.bin", steps=1, graph=graph))
        assert done.code == 0 and done.err == ""


class Fake:
    """A device that captures or refuses, and what happened on it."""

    def __init__(self, graph: str, refuses: bool = False):
        self.graph, self.refuses, self.events = graph, refuses, []

    def capture(self, work):
        self.events.append("capture")
        if self.refuses:
            raise UserError("no such thing", "a hint")
        work()
        return lambda: self.events.append("launch")

    def work(self, *args):
        self.events.append(args)

    def after(self, calls: int) -> list:
        replay = Replay(self)
        for _ in range(calls):
            replay(self.work, 1, True)
        return self.events


def test_the_second_call_captures_and_later_ones_launch():
    for graph in ("auto", "1"):
        assert Fake(graph).after(4) == [(1, True), "capture", (1, True), "launch", "launch", "launch"]
    assert Fake("0").after(3) == [(1, True)] * 3


def test_other_arguments_are_another_graph():
    device = Fake("1")
    replay = Replay(device)
    for args in ((1,), (2,), (1,), (2,), (2,)):
        replay(device.work, *args)
    assert device.events == [(1,), (2,), "capture", (1,), "launch", "capture", (2,), "launch", "launch"]


def test_a_refused_capture_is_told_once_or_is_an_error(capsys):
    device = Fake("auto", refuses=True)
    assert device.after(3) == [(1, True), "capture", (1, True), (1, True)]
    assert capsys.readouterr().err == "no CUDA graphs, kernels are launched one by one: no such thing\n"
    with pytest.raises(UserError, match="--graph 1: no such thing") as error:
        Fake("1", refuses=True).after(3)
    assert error.value.hint == "--graph auto"
