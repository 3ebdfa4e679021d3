"""Several ranks with an emulated GPU each: the step of one with as many micro-steps, in order, and no hang."""

import fake_nccl
import numpy as np
import pytest
import tiny
from fake_nccl import Threads
from test_ranks import done, needs_mpi, run
from tiny import losses

import kernels
import train_banded
from kernels import cpu
from kernels.cuda.runtime import nccl
from kernels.driver import NoDevice, NoDriver, Place, why_none
from llmc.checkpoint import read_model
from llmc.dataloader import write_tokens
from llmc.errors import UserError
from llmc.init import gpt2_init
from llmc.ranks import ALONE, Ranks, part_of
from systems.band import Band

pytestmark = pytest.mark.launches("gpt2", "band")

MICRO_STEPS, STEPS = 4, 4


@pytest.fixture
def gpus(monkeypatch):
    """gpus(visible, missing): as fake_nccl.install, for this test, behind which comes what comes at a process's end."""
    at_exit = []
    monkeypatch.setattr(nccl.atexit, "register", at_exit.append)

    def install(**settings):
        fake_nccl.install(monkeypatch.setattr, **settings)

    yield install
    for abort in at_exit:
        abort()


def train(ranks: Ranks, graph: str = "1", zero: bool = False) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Gradients of the last step, and weights, of a rank's share of the micro-steps of a step; its GPU's events."""
    ranks.zero = zero
    device = kernels.open_device("cuda", graph=graph, ranks=ranks)
    B, T, band = tiny.B, tiny.T, Band(24, 16)
    model = train_banded.GPT2(device, tiny.CONFIG, gpt2_init(tiny.CONFIG, 3), B, T, band, ranks=ranks)
    model.mask_weights()
    batches = np.random.default_rng(5).integers(0, tiny.CONFIG.V, (STEPS, MICRO_STEPS, 2, B, T)).astype(np.int32)
    for step, micro_steps in enumerate(batches):
        own = micro_steps[ranks.rank :: ranks.size]  # as the data loader deals them out
        for k, batch in enumerate(own):
            model.forward(*batch, len(own) * ranks.size)
            model.backward(first=k == 0, last=k == len(own) - 1)
        device.all_reduce(model.grads_flat, ranks)
        if step < STEPS - 1:
            model.update(step + 1, 1e-3, grad_clip=0.5)
    return device.to_host(model.grads_flat), device.to_host(model.params_flat), fake_nccl.current.gpu.events


@pytest.mark.parametrize("count, graph", [(2, "1"), (2, "0"), (4, "1")])
def test_ranks_are_the_micro_steps_of_one(count, graph, gpus):
    gpus(visible=4)
    grads, params, _ = train(ALONE)
    found = Threads(count).run(lambda ranks: train(ranks, graph))
    for other in found:
        assert np.abs(other[0] - grads).max() <= 1e-6 < np.abs(grads).max() / 100
        assert np.abs(other[1] - params).max() <= 1e-6
    assert len({(other[0].tobytes(), other[1].tobytes()) for other in found}) == 1


@pytest.mark.parametrize("count, graph", [(2, "1"), (3, "0")])
def test_parts_of_the_update_are_the_whole(count, graph, gpus, monkeypatch):
    """ZeRO: each rank has the sum of its part alone, and yet all have the same weights."""
    monkeypatch.setattr(nccl, "BUCKET", 5000)
    gpus(visible=3)
    found = Threads(count).run(lambda ranks: train(ranks, graph, True))
    whole = Threads(count).run(lambda ranks: train(ranks, graph))
    assert len({other[1].tobytes() for other in found}) == 1
    assert np.abs(found[0][1] - whole[0][1]).max() <= 1e-6
    for rank, (grads, _, _) in enumerate(found):
        part = part_of(grads.size, rank, count)
        assert np.abs(grads[part] - whole[0][0][part]).max() <= 1e-6
        others = np.delete(np.arange(grads.size), np.arange(grads.size)[part])
        assert np.abs(grads[others] - whole[0][0][others]).max() > 1e-3  # only its own gradients, which nobody reads


def test_sums_are_between_backward_and_update(gpus, monkeypatch):
    """By graphs and without; on one stream, in every step: a layer's behind its backward, beside the layers below."""
    gpus()
    size, L = gpt2_init(tiny.CONFIG, 3).size, tiny.CONFIG.L
    matrices = 12 * L * tiny.CONFIG.C**2

    def run(ranks):
        ranks.overlaps = overlaps
        events = train(ranks)[2]
        return events, fake_nccl.current.communicator.calls

    for overlaps in (True, False):
        for events, calls in Threads(2).run(run):
            events = events[events.index("join") + 1 :]  # behind the trial at the opening
            groups = "".join("." if call else "|" for call in calls[2:]).split("|")
            assert sum(call[0] for call in calls[2:] if call) == STEPS * size
            assert {call[1] for call in calls if call} == {2}
            # with the vectors of layers between, the rest: in front of qkvw, attprojw, fcw, fcprojw and behind
            assert groups == STEPS * ([4 * "."] * L + [5 * "."] if overlaps else ["."]) + [""]
            if overlaps:
                assert sum(call[0] for call in calls[-6:-1]) == size - matrices
            joins = [i for i, event in enumerate(events) if event == "join"]
            sums = [i for i, event in enumerate(events) if event == "sum"]
            assert len(joins) == STEPS
            assert {events[join + 1] for join in joins[:-1]} == {"sum_of_squares_kernel"}
            before = [events[i - 1] for i in sums if events[i - 1] != "sum"]
            of_layers = ["column_sum_kernel"] * L if overlaps else []
            assert before == STEPS * [*of_layers, "encoder_backward_wpe_kernel"]


def test_a_sum_that_begins_too_early_is_wrong(gpus, monkeypatch):
    """What the stand-in is for: its sums are as late as may be, so they have what is written behind their beginning."""
    gpus()
    expected = train(ALONE)[0]
    begin = nccl.Communicator.begin

    def early(self, array, views, ranks):
        begin(self, array, views, ranks)
        views[-1].fill(7)

    monkeypatch.setattr(nccl.Communicator, "begin", early)
    for grads, _, _ in Threads(2).run(train):
        assert np.abs(grads - expected).max() > 1


# ----------------------------------------------------------------------------------------------------------------------
# whole trainers, as processes

SMALL = "--indexer-heads 2 --indexer-dim 4"
RUNS = [
    ("train_banded.py", "-w 16 --grad-clip 1 --skip-grad-z 3"),
    ("train_banded.py", "-w 16 --grad-clip 1 --zero 1"),
    ("train_sparse_attn.py", f"{SMALL} --top-k 3 --indexer-warmup 2"),
    ("train_toroidal.py", "--layers 0,1 --train all --fusion attention"),
]


@needs_mpi
@pytest.mark.launches("gpt2", "band", "sparse", "torus")
@pytest.mark.parametrize("trainer, flags", RUNS)
def test_trainers_on_two_gpus_are_one(trainer, flags, folder, monkeypatch):
    """By graphs, with validations and a checkpoint: losses and weights within 1e-5 of one rank's, the same in both."""
    monkeypatch.setenv("RANK_GPUS", "2")
    write_tokens(folder / "long.bin", np.resize(np.frombuffer(tiny.VERSE, np.uint8), 4000).astype(np.uint16))
    flags = f"{flags} --device cuda --graph 1 -n 4 -v 2 -s 4 --shuffle 0 -l 1e-3 -i long.bin -j long.bin"
    found = []
    for count in (1, 2):
        own = dict(grad_accum=4 // count, val_batches=4 // count, train_data=None, val_data=None)
        result = done(run(count, trainer, f"{flags} -c {count}.bin", folder, **own), count)
        found.append((losses(result.out), read_model(f"{count}.bin").params))
        assert "CUDA emulator" in result.out
    (one, weights), (two, others) = found
    assert len(one) == 4 and max(abs(two[step] - loss) for step, loss in one.items()) <= 1e-5
    assert np.abs(others - weights).max() <= 1e-5


# ----------------------------------------------------------------------------------------------------------------------
# what goes wrong: the same in all ranks, before NCCL is asked


def opened(count: int, name: str = "cuda") -> list:
    return Threads(count).run(lambda ranks: kernels.open_device(name, ranks=ranks))


def check_all_refused(count: int, message: str, hint: str) -> None:
    errors = opened(count)
    assert [type(error) for error in errors] == [UserError] * count, errors
    assert {(error.message, error.hint) for error in errors} == {(f"--device cuda: {message}", hint)}


@pytest.mark.parametrize("count, visible", [(2, 1), (3, 2)])
def test_more_ranks_than_gpus(count, visible, gpus, capfd):
    gpus(visible=visible)
    last = count - 1
    shared = f"ranks 0 and {last} have the same GPU, 0000:3b:00 of here, of {visible} visible"
    check_all_refused(count, shared, f"one process a GPU: mpiexec -n {visible}, or --device cpu")
    assert opened(count, "auto") == [cpu] * count
    assert capfd.readouterr().err.count(f"running on the CPU: {shared}; --device cuda says what helps") == count


def test_a_rank_without_a_gpu(gpus, capfd):
    gpus(missing=lambda local_rank: "the GPU: cudaErrorNoDevice: none" if local_rank else "")
    check_all_refused(2, "rank 1 of 2: the GPU: cudaErrorNoDevice: none", NoDevice("").hint)
    assert opened(2, "auto") == [cpu, cpu]
    assert "running on the CPU: rank 1 of 2: the GPU" in capfd.readouterr().err


def test_a_rank_without_nccl(gpus, monkeypatch):
    gpus()

    def fail():
        if fake_nccl.current.ranks.rank == 1:
            raise NoDevice("CuPy finds no NCCL", nccl.HINT)
        return fake_nccl

    monkeypatch.setattr(nccl, "import_nccl", fail)
    check_all_refused(2, "rank 1 of 2: CuPy finds no NCCL", nccl.HINT)
    assert "pip install" in nccl.HINT


def test_ranks_without_a_driver_are_silent(gpus, monkeypatch, capfd):
    def fail():
        raise NoDriver("no NVIDIA driver")

    monkeypatch.setattr("kernels.driver.check_driver", fail)
    assert opened(2, "auto") == [cpu, cpu] and capfd.readouterr().err == ""
    check_all_refused(2, "no NVIDIA driver", NoDevice("").hint)


def test_what_a_machine_lacks_is_told_after_what_is_wrong():
    place = Place("here", "0000:3b:00", 2)
    assert why_none([place]) is None and why_none([place, Place("there", "0000:3b:00", 1)]) is None
    assert str(why_none([NoDriver("no NVIDIA driver"), NoDevice("broken")])) == "broken"
    assert str(why_none([place, NoDriver("no NVIDIA driver")])) == "rank 1 of 2: no NVIDIA driver"
    one = why_none([place, Place("here", "0000:3b:00", 1)])  # however many each sees
    assert str(one) == "ranks 0 and 1 have the same GPU, 0000:3b:00 of here, of 1 visible"


@pytest.mark.parametrize(
    "name, message",
    [("get_unique_id", "NCCL, making an id: NCCL_ERROR"), ("NcclCommunicator", "NCCL, connecting the GPUs of 2 proc")],
)
def test_what_nccl_refuses_is_an_error_of_all(name, message, gpus, monkeypatch):
    gpus()

    def fail(*_):
        raise fake_nccl.NcclError("NCCL_ERROR_SYSTEM_ERROR: unhandled system error")

    monkeypatch.setattr(fake_nccl, name, fail)
    for device in ("cuda", "auto"):  # no way back to the CPU from here, where one rank may be alone
        errors = opened(2, device)
        assert all(isinstance(error, UserError) and error.message.startswith(message) for error in errors), errors
        assert all("NCCL_DEBUG=WARN" in error.hint and "--device cpu" in error.hint for error in errors)


def test_a_sum_that_is_wrong_is_found_at_once(gpus, monkeypatch):
    gpus()
    monkeypatch.setattr(fake_nccl.NcclCommunicator, "allReduce", lambda *_: None)
    first, second = opened(2)
    assert first.message == r"NCCL, adding up: NCCL computed [1.0, 1.0, 1.0], expected 3.0"
    assert second.message == r"NCCL, adding up: NCCL computed [2.0, 2.0, 2.0], expected 3.0"


@needs_mpi
@pytest.mark.parametrize("fault", ["1 2 error", "1 2 kill"])
def test_a_rank_that_dies_ends_the_others(fault, folder, monkeypatch):
    monkeypatch.setenv("RANK_GPUS", "2")
    result = run(2, "train_banded.py", "--device cuda -n 1000 -v 0 -s 0", folder, fault=fault)
    assert result.code not in (0, None), result


@needs_mpi
def test_processes_that_share_a_gpu_are_told_once(folder, monkeypatch):
    monkeypatch.setenv("RANK_GPUS", "1")
    result = run(2, "train_banded.py", "--device cuda -n 2", folder)
    assert (
        result.code == 1
        and result.err.count("error: ") == 1
        and result.err.startswith(
            "error: --device cuda: ranks 0 and 1 have the same GPU, 0000:3b:00 of here, of 1 visible\n"
            "---> HINT: one process a GPU: mpiexec -n 1, or --device cpu\n"
        )
    )
