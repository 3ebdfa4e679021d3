"""Checkpoints of every kind, written by the trainers of commit 17a5284, are still resumed: golden/checkpoints.npz.

Each is a pair after 5 steps on train.bin, resumed here for 3 more; the losses are those that the same commit printed.
"""

import shlex
from pathlib import Path

import numpy as np
import pytest
import tiny
from tiny import check_refused, done, losses, val_losses

import train_banded
import train_sparse_attn
import train_toroidal
from llmc.checkpoint import MAGIC, named_views, read_model, tensor_shapes, write_model
from llmc.resume import load_checkpoint, state_path

FILES = Path(__file__).parent.parent / "golden" / "checkpoints.npz"
TRAINERS = {trainer.__name__: trainer.main for trainer in (train_banded, train_sparse_attn, train_toroidal)}
RUNS = {  # checkpoint: its trainer, the training losses of steps 6 to 8, the validation losses after 6 and 8
    "dense": ("train_banded", [3.304883, 3.318861, 3.219752], [3.264035, 3.214292]),
    "banded": ("train_banded", [3.315574, 3.332973, 3.247971], [3.294134, 3.241276]),
    "permuted": ("train_banded", [3.300045, 3.326765, 3.222331], [3.268782, 3.214078]),
    "sparse": ("train_sparse_attn", [3.333966, 3.284973, 3.363919], [3.311766, 3.2407]),
    "recency": ("train_sparse_attn", [3.306453, 3.324313, 3.215673], [3.262236, 3.210756]),
    "deepseek": ("train_sparse_attn", [3.247068, 3.232411, 3.150255], [3.184358, 3.099885]),
    "toroidal": ("train_toroidal", [3.403161, 3.389886, 3.399292], [3.380823, 3.378329]),
    "control": ("train_toroidal", [3.401856, 3.383837, 3.397286], [3.37729, 3.375592]),
}


@pytest.fixture
def files(tmp_path, monkeypatch):
    """The folder, as it was written."""
    monkeypatch.chdir(tmp_path)
    with np.load(FILES) as arrays:
        for name, content in arrays.items():
            Path(name).write_bytes(content.tobytes())


def call(capture, trainer: str, flags: str) -> tiny.Result:
    return tiny.call(capture, TRAINERS[trainer], *shlex.split(flags))


@pytest.mark.parametrize("name", RUNS)
def test_goes_on_as_it_did(files, capfdbinary, name):
    trainer, train, val = RUNS[name]
    out = done(call(capfdbinary, trainer, f"--resume {name}.bin -n 8")).out
    assert losses(out) == pytest.approx(dict(zip((6, 7, 8), train)), abs=2e-6)
    assert val_losses(out) == pytest.approx(val, abs=2e-6)
    assert load_checkpoint(f"{name}.bin")[1].step == 8


@pytest.mark.parametrize("name", RUNS)
def test_another_trainer_names_the_right_one(files, capfdbinary, name):
    own = RUNS[name][0]
    for trainer in TRAINERS:
        if trainer != own:
            result = call(capfdbinary, trainer, f"--resume {name}.bin -n 8")
            check_refused(result, f"--resume {name}.bin", f"{own}.py --resume {name}.bin", code=2)


def test_weights_outside_the_band_are_refused_with_their_number(files, capfdbinary):
    """As they would be if NumPy drew another order from an old file's seed: nothing is dropped in silence."""
    model = read_model("permuted.bin")
    assert model.fields[:5] == (12, 20, 0, 7, 0)
    inside = np.count_nonzero(named_views(model.params, tensor_shapes(model.config))["fcw"])
    model.fields = (12, 20, 0, 8, 0)
    write_model("permuted.bin", model)
    before = tiny.snapshot(Path())
    result = call(capfdbinary, "train_banded", "--resume permuted.bin -n 8")
    check_refused(result, "permuted.bin: ", "weights of fcw that are not 0 lie outside its band of 12")
    assert 0 < int(result.err.split(" weights of")[0].split()[-1]) < inside
    assert tiny.snapshot(Path()) == before


def test_a_permuted_run_of_today_does_not_hang_on_numpy(files, capfdbinary):
    """--permute's order: llm.c's random_permutation on MT19937, seed 7, worked out by the algorithm of rand.h."""
    done(
        call(
            capfdbinary,
            "train_banded",
            "-e dense.bin -i train.bin -j val.bin -t 8 -b 2 -n 1 -s 0 -1 2 --permute 7 -c c.bin",
        )
    )
    model = read_model("c.bin")
    assert model.fields[:5] == (2, 0, 0, 7, 1)
    order = list(range(32))
    for i, draw in zip(range(31, 0, -1), np.random.RandomState(7).randint(0, 1 << 32, 31, np.uint64).tolist()):
        order[i], order[draw % (i + 1)] = order[draw % (i + 1)], order[i]
    weight = named_views(model.params, tensor_shapes(model.config))["fcw"][0]
    places, channels = np.nonzero(weight[order])
    assert (abs(places - 4 * channels) <= 1).all() and len(places) == 23  # 3 a channel, but 2 for the first


def test_llmc_own_pair_is_resumed(files, capfdbinary):
    """model_00000005.bin, state_00000005_00000.bin as train_gpt2.cu writes them: no step, no settings, no checksum."""
    model = read_model("dense.bin")
    header = np.zeros(256, "<i4")
    header[:8] = np.frombuffer(Path("dense.bin").read_bytes()[:32], "<i4")
    assert header[0] == MAGIC
    Path("model_00000005.bin").write_bytes(header.tobytes() + model.params.tobytes())
    state = state_path("dense.bin", model).read_bytes()
    header = np.frombuffer(state[:1024], "<i4").copy()
    header[128:] = 0
    Path("state_00000005_00000.bin").write_bytes(header.tobytes() + state[1024 : state.rindex(b"{")])
    before = tiny.snapshot(Path())
    flags = "--resume model_00000005.bin -n 8 -i train.bin -j val.bin -b 2 -t 8 -v 0 -m 2 -s 0"
    flags += " -l 0.01 --weight-decay 0.1 --decay-all 0 --beta2 0.95 --grad-clip 0.5"
    out = done(call(capfdbinary, "train_banded", flags)).out
    assert losses(out) == pytest.approx(dict(zip((6, 7, 8), RUNS["dense"][1])), abs=2e-6)
    assert "llm.c's pair" in out and "Resuming from step 5" in out
    assert tiny.snapshot(Path()) == before  # without -c nothing is saved, least of all over llm.c's files
    done(call(capfdbinary, "train_banded", f"{flags} -c own.bin"))
    after = tiny.snapshot(Path())
    assert {name: after[name] for name in before} == before
    assert load_checkpoint("own.bin")[1].step == 8
    # a state of several processes holds a part each
    header[2] = 4
    Path("state_00000005_00000.bin").write_bytes(header.tobytes() + state[1024 : state.rindex(b"{")])
    check_refused(call(capfdbinary, "train_banded", flags), "state_00000005_00000.bin: of 4 processes, expected 1")
