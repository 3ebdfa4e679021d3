"""train_toroidal.py as its users meet it: GPT-2 as a special case, files, resumed runs, what learns, and errors."""

import json
import os
import re
import shlex
import signal
import struct
from dataclasses import replace
from math import exp, prod
from pathlib import Path

import numpy as np
import pytest
import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import CONFIG, DEEPSEEK, assert_same_run, check_refused, done, losses, snapshot, table, texts, val_losses

import generate
import train_banded
import train_sparse_attn
import train_toroidal
from kernels import cpu
from llmc import diff
from llmc.checkpoint import (
    BANDED,
    DENSE,
    MATRICES,
    SPARSE_ATTENTION,
    TOROIDAL,
    Model,
    named_views,
    num_parameters,
    read_model,
    tensor_shapes,
    write_model,
)
from llmc.dataloader import write_tokens
from llmc.errors import UserError
from llmc.init import gpt2_init
from llmc.resume import load_checkpoint, state_path
from llmc.state import write_state
from systems.torus import ATTENTION, FUSIONS, MODES, ROPES, Torus, extra_shapes, parse_layers, read_torus

PARAMETERS = num_parameters(CONFIG)
FIELD = 132  # header int of the first field
GPT2 = "--depth 1 --lambda 0 --rope none --fusion identity"
EVENTS = "-v 3 -s 4"


@pytest.fixture
def call(folder, capfdbinary):
    """call(main, "-n 3", ...) -> Result: a script's main in this process."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # tests may run with Ctrl-C ignored
    yield lambda main, flags, *argv: tiny.call(capfdbinary, main, *argv, *shlex.split(flags))
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def train(call):
    """train("--depth 2 -n 3", grad_accum=2) -> Result: the trainer on the tiny files."""
    return lambda flags="", **changed: call(train_toroidal.main, flags, *tiny.options(**changed))


@pytest.fixture
def write(call):
    """write("-n 5", "c.bin") -> Result: generate.py, greedy."""
    flags = "--device cpu --temperature 0 -s 1 --ignore-eot 1"
    return lambda more, model="c.bin": call(generate.main, f"{flags} {more}", "-e", model)


@pytest.fixture
def updates(monkeypatch):
    """A list of the steps whose learning rate has been asked for; updates.then(step) is called each time."""

    class Updates(list):
        then = staticmethod(lambda step: None)

    updates, learning_rate = Updates(), train_toroidal.learning_rate

    def recorded(schedule, step, **settings):
        updates.append(step)
        updates.then(step)
        return learning_rate(schedule, step, **settings)

    monkeypatch.setattr(train_toroidal, "learning_rate", recorded)
    return updates


def by_name(model: Model, flat=None) -> dict[str, np.ndarray]:
    """The tensors of a toroidal file's parameters, or of m or v, by name, those behind GPT-2's 16 too."""
    flat = np.concatenate([model.params, model.extra]) if flat is None else flat
    shapes = tensor_shapes(model.config)
    if model.kind == TOROIDAL:
        shapes |= extra_shapes(model.config, read_torus(model, ""))
    assert flat.size == sum(map(prod, shapes.values()))
    return named_views(flat, shapes)


def perplexities(out):
    return [float(value) for value in re.findall(r"^perplexity (\S+)$", out, re.M)]


# ----------------------------------------------------------------------------------------------------------------------
# GPT-2 as a special case


@pytest.mark.parametrize("flags", ["", "--train all --grad-accum 2", "--init random --layers last:1 --recompute 1"])
def test_depth_one_without_distance_is_the_control_is_gpt2(train, flags):
    """The same losses, samples and 16 tensors to the bit, whichever weights learn and wherever they start."""
    flags = f"--layers 0,1 -n 5 -v 2 -s 2 -l 0.01 -c c.bin {flags}"
    runs = []
    for arm in (GPT2, "--control 1 --depth 4 --rope int", f"--control 1 {GPT2}"):
        out = done(train(f"{flags} {arm}")).out
        model = read_model("c.bin")
        runs.append((losses(out), val_losses(out), perplexities(out), texts(out), model.params.tobytes()))
        assert model.kind == (DENSE if "control" in arm else TOROIDAL)
        assert ("| control               | their attention stays GPT-2's" in out) == ("control" in arm)
    assert runs[0] == runs[1] == runs[2] and len(runs[0][0]) == 5 and runs[0][3][0] != ""
    assert len(set(runs[0][0].values())) == 5


def test_other_geometry_is_not_gpt2(train):
    """Without which the test above would show nothing. Distance and depth only have effect on weights that differ."""
    sharpen("model.bin")
    runs = {flags: val_losses(done(train(f"--layers 0 -n 1 {flags}")).out)[0] for flags in (
        GPT2, "", "--lambda 0 --depth 2", "--depth 1 --lambda 1", "--depth 1 --lambda 4 --period 4",
        "--depth 1 --lambda 4 --period 4 --window 1", "--depth 4 --lambda 4", "--depth 4 --lambda 4 --wrap-depth 1",
        "--rope int", "--rope upstream", "--rope orth", "--fusion mean", "--fusion low_rank", "--fusion attention",
        "--mode upstream", "--init random", f"{GPT2} --layers 1 --init random",
    )}  # fmt: skip
    assert len(set(runs.values())) == len(runs), runs


def test_a_baseline_is_measured_and_nothing_written(train, call, folder):
    """--layers none -n 0: the loss of the unmodified model, as the banded trainer has it."""
    before = snapshot(folder)
    out = done(train("--layers none -n 0 -c c.bin")).out
    reference = done(call(train_banded.main, "-d 1 -n 1", *tiny.options())).out
    assert val_losses(out) == val_losses(reference)[:1] and not losses(out)
    assert table(out)["toroidal layers"] == "none" and table(out)["trained parameters"] == "0 (replaced)"
    assert snapshot(folder) == before
    assert val_losses(done(train("--layers none --train all -n 0")).out) == val_losses(out)
    assert val_losses(done(train(f"--layers 0,1 {GPT2} -n 0 -c c.bin")).out) == val_losses(out)
    assert snapshot(folder) == before


def test_diff_aligns_it_with_the_banded_trainer(train, call):
    """All of --layers none --train all against -d 1: the same numbers at the same steps; layer 0 replaced is apart."""
    runs = {
        "banded.txt": (train_banded.main, "-d 1"),
        "none.txt": (train_toroidal.main, "--layers none --train all"),
        "torus.txt": (train_toroidal.main, "--layers 0 --train all --init random"),
    }
    for name, (main, flags) in runs.items():
        out = done(call(main, f"{flags} -n 7 -v 3 -s 2 -l 0.01 -o {name[:-4]}.log", *tiny.options())).out
        Path(name).write_text(out)
    banded, none, torus, banded_log, none_log = map(diff.open_input, (*runs, "banded.log", "none.log"))
    steps = {(step, "val") for step in (0, 3, 6, 7)} | {(step, "train") for step in range(7)}
    assert diff.read_losses(none).values.keys() == steps
    assert diff.compare_losses(banded, none, 0.0) and diff.compare_losses(banded_log, none_log, 0.0)
    assert not diff.compare_losses(banded, torus, None)


def test_recompute_tells_what_it_saves(train, folder, monkeypatch):
    """Rows of the residual stream remain, and one layer's activations: at this size a third."""
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")  # one process, which sees all of it
    tiny.make_folder(folder, tiny.resized(L=6, C=32, V=256, Vp=256, maxT=256))
    write_tokens("train.bin", np.zeros(4 * 256 + 1, np.uint16))
    sizes = dict(batch_size=4, seq_len=256, train_data="train.bin", val_data="train.bin")
    keeping = done(train("--layers 0,3 -n 1", **sizes)).out
    again = done(train("--layers 0,3 -n 1 --recompute 1", **sizes)).out
    full = int(re.search(r"^activations: (\d+) MiB predicted, memory grew by -?\d+ MiB$", keeping, re.M)[1])
    found = re.search(r"^activations: (\d+) MiB predicted \((\d+) without --recompute\), memory grew by", again, re.M)
    assert int(found[2]) == full and int(found[1]) < full
    done(train("--layers 0,3 -n 1 -c c.bin", **sizes))
    resumed = done(train("--resume c.bin -n 2", **sizes)).out  # validates after its step, so nothing has been run yet
    assert re.search(rf"^activations: {full} MiB predicted$", resumed, re.M)
    # a token in a layer: ln1, atty, residual2, ln2 of C, qkv of 3C, fch and its gelu of 4C, 4 values of the norms, lse;
    # residual3 of all 6 layers, encoded and lnf, logits, mean, rstd and loss
    N, C = 4 * 256, 32
    layer = N * (4 * C + 3 * C + 8 * C + 4)
    lse, torus = N * 2, N * (C + 2 * 2)
    rest = N * (8 * C + 256 + 3)
    assert full == 4 * (6 * layer + 4 * lse + 2 * torus + rest) >> 20
    assert int(found[1]) == 4 * (layer + torus + rest) >> 20


# ----------------------------------------------------------------------------------------------------------------------
# what learns


@pytest.mark.parametrize("layers", ["0", "last:1", "0,2", "first:3"])
@pytest.mark.parametrize("control", [0, 1])
def test_frozen_parameters_keep_every_bit(train, folder, layers, control):
    """All 16 tensors, layer by layer, against the file that the run began with; m and v of what is frozen are 0."""
    config = tiny.resized(L=3)
    tiny.make_folder(folder, config)
    done(train(f"--layers {layers} --control {control} -n 3 -l 0.01 --weight-decay 0.1 -c c.bin -s 2"))
    (model, state), replaced = load_checkpoint("c.bin"), parse_layers(layers, 3)
    before, after, m, v = tiny.views(read_model("model.bin")), *(by_name(model, f) for f in (None, state.m, state.v))
    for name, tensor in before.items():
        for l in range(3 if tensor.ndim > 1 and name not in ("wte", "wpe") else 1):
            learns = name in ATTENTION and l in replaced
            assert (after[name][l] != tensor[l]).any() == learns, (name, l)
            assert m[name][l].any() == v[name][l].any() == learns, (name, l)
    extra = after.keys() - before.keys()
    assert extra == (set() if control else {"lams", "lamd", "fuse1", "fuse2"})
    for name in extra:  # lambda is fixed unless it is told to learn; the factors move
        assert (m[name].any(), (after[name] == 1).all()) == ((False, True) if name[:3] == "lam" else (True, False))


def test_learnt_lambda_moves_by_head(train):
    done(train("--layers 1 --learn-lambda 1 --lambda 2 -n 4 -l 0.01 -c c.bin"))
    model, state = load_checkpoint("c.bin")
    tensors, m = by_name(model), by_name(model, state.m)
    for name in ("lams", "lamd"):
        values = tensors[name][0]
        assert values.shape == (2,) and (values != 2).all() and (np.abs(values - 2) < 0.05).all() and m[name].all()
    assert len(set(m["lams"][0].tolist())) == 2


def test_train_all_trains_all(train):
    done(train("--layers 0 --train all -n 3 -l 0.01 -c c.bin"))
    (model, state), before = load_checkpoint("c.bin"), tiny.views(read_model("model.bin"))
    for name, tensor in by_name(model, state.m).items():
        moved = name not in before or (by_name(model)[name] != before[name]).any()
        assert moved and tensor.any() == (name not in ("lams", "lamd")), name


def test_random_attention_is_drawn_for_the_replaced_layers_alone(train):
    """By GPT-2's initialisation of --seed; the same in the control arm."""
    files = []
    for flags in ("--seed 3", "--seed 3 --control 1", "--seed 4"):
        done(train(f"--layers 1 --init random -n 1 -l 1e-60 -c c.bin {flags}"))
        files.append(tiny.views(read_model("c.bin")))
    drawn, before = (named_views(flat, tensor_shapes(CONFIG)) for flat in (gpt2_init(CONFIG, 3), gpt2_init(CONFIG, 1)))
    for name, tensor in files[0].items():
        for l, values in enumerate(tensor):
            source = drawn if name in ATTENTION and l == 1 else before
            assert values.tobytes() == source[name][l].tobytes() == files[1][name][l].tobytes(), (name, l)
    assert files[2]["qkvw"][1].tobytes() != drawn["qkvw"][1].tobytes()


# ----------------------------------------------------------------------------------------------------------------------
# files

GEOMETRIES = {  # flags and what a file keeps of them
    "": Torus((0,), period=8),
    f"{GPT2} --layers 0,1": Torus((0, 1), depth=1, lam=0.0, fusion="identity", period=8),
    "--layers last:1 --depth 4 --period 5 --window 2 --wrap-depth 1 --lambda 0.1 --learn-lambda 1 --fusion mean": Torus(
        (1,), depth=4, period=5, window=2, wrap_depth=True, lam=float(np.float32(0.1)), learn_lambda=True, fusion="mean"
    ),
    "--depth 8 --fusion low_rank --fusion-rank 3 -t 16": Torus((0,), depth=8, fusion="low_rank", rank=3, period=16),
    "--depth 8 --fusion low_rank": Torus((0,), depth=8, fusion="low_rank", rank=2, period=8),
    "--depth 2 --fusion attention --rope orth": Torus((0,), fusion="attention", rope="orth", period=8),
    "--rope int --mode upstream --window 0": Torus((0,), rope="int", mode="upstream", window=0, period=8),
}


@pytest.mark.parametrize("flags", GEOMETRIES)
def test_llm_c_reads_what_is_saved(train, flags):
    """Header ints 0..7 and the 16 tensors, all that the C program looks at; then our fields, and the extra values."""
    done(train(f"{flags} -n 2 -c c.bin"))
    header, model, torus = np.fromfile("c.bin", "<i4", 256), read_model("c.bin"), GEOMETRIES[flags]
    n, D, r = len(torus.layers), torus.depth, torus.rank
    factors = {"low_rank": D * r, "low_rank_residual": D * r, "attention": D * D}.get(torus.fusion, 0)
    count = n * (2 * 2 + 2 * factors)
    assert header[:9].tolist() == [20240326, 3, 32, 256, 2, 2, 16, 320, 2]
    assert header[128:FIELD].tolist() == [20261121, 1, TOROIDAL, count]
    names = (MODES.index(torus.mode), D, torus.period, ROPES.index(torus.rope), FUSIONS.index(torus.fusion))
    (lam,) = struct.unpack("<i", struct.pack("<f", torus.lam))
    numbers = (1, *names, r, torus.window, torus.wrap_depth, torus.learn_lambda, lam, n, *torus.layers)
    assert header[FIELD : FIELD + 12 + n].tolist() == list(numbers) and not header[FIELD + 12 + n :].any()
    assert os.path.getsize("c.bin") == 1024 + 4 * (PARAMETERS + count)
    assert np.fromfile("c.bin", "<f4", PARAMETERS, offset=1024).tobytes() == model.params.tobytes()
    assert read_torus(model, "c.bin") == torus


def test_a_header_with_all_the_layers_it_has_room_for(train, write, folder):
    """100 of them; with 101 layers a model has too many, of which none may be replaced."""
    tiny.make_folder(folder, tiny.resized(L=100, C=2, NH=1, maxT=8, V=256, Vp=256))
    done(train("--layers first:100 -n 1 -b 1 -g 4 -c c.bin"))
    assert read_torus(read_model("c.bin"), "c.bin").layers == tuple(range(100))
    done(write("-n 2"))
    tiny.make_folder(folder, tiny.resized(L=101, C=2, NH=1, maxT=8, V=256, Vp=256))
    check_refused(train("--layers 0 -n 1 -b 1 -g 4"), "model.bin: 101 layers", "room for 100")


def test_a_toroidal_file_keeps_its_layers_and_values(train):
    """-e: a new run, with other weights learning, goes on with the same attention."""
    done(train("--layers 1 --depth 4 --lambda 0.5 --fusion attention --period 5 -n 2 -l 0.01 -c first.bin"))
    done(train("-n 1 -l 1e-60 -t 16 -b 1 --train all -c c.bin", model="first.bin"))
    first, again = read_model("first.bin"), read_model("c.bin")
    assert read_torus(again, "") == read_torus(first, "") == Torus((1,), "causal", 4, 5, "none", "attention", lam=0.5)
    assert again.extra.tobytes() == first.extra.tobytes() and again.params.tobytes() == first.params.tobytes()
    out = done(train("-n 1", model="first.bin")).out
    assert (table(out)["toroidal layers"], table(out)["period"]) == ("1", "5")
    assert table(out)["lambda"] == "0.5, fixed, depth does not wrap"


def test_the_published_ring_is_as_long_as_the_rows(train):
    done(train("--mode upstream --rope int -n 1 -c c.bin"))
    done(train("-n 1 -t 16 -b 1 -c d.bin", model="c.bin"))
    assert read_torus(read_model("d.bin"), "").period == 16


def test_bfloat16_files(train):
    done(train("--depth 4 --learn-lambda 1 -n 2 -l 0.01 -c c.bin"))
    model = read_model("c.bin")
    write_model("bf16.bin", replace(model, version=5))
    rounded = read_model("bf16.bin")
    write_model("rounded.bin", replace(rounded, version=3))
    assert rounded.extra.tobytes() == model.extra.tobytes() and rounded.params.tobytes() != model.params.tobytes()
    outs = [done(train("-n 2", model=f"{name}.bin")).out for name in ("bf16", "rounded")]
    assert losses(outs[0]) == losses(outs[1]) and val_losses(outs[0]) == val_losses(outs[1])


def sharpen(path="c.bin"):
    """Enlarge all matrices, so that what a query attends to decides on the next token."""
    model = read_model(path)
    for name, tensor in by_name(model).items():
        if name in MATRICES:
            tiny.views(model)[name][...] = tensor * (10 if name in ("wte", "wpe") else 20)
    write_model(path, model)


def text(result):
    return re.fullmatch(r".*\nGenerating:\n(.*)\n---\n", done(result).out, re.S)[1]


@pytest.mark.parametrize("flags", [
    *(f"--depth {D} --rope {rope} --lambda 4" for D in (1, 2, 4) for rope in ("none", "int")),
    "--depth 2 --fusion low_rank --window 2 --wrap-depth 1 --period 7", "--layers 0,1 --depth 4 --fusion attention",
    "--depth 2 --rope orth --period 100 --fusion mean", "--layers 1 --rope upstream --period 3",
])  # fmt: skip
def test_generate_gives_the_same_text_with_a_cache_and_without(train, write, flags):
    """Far beyond the ring of 8, and past the 32 positions, where the older half of the text is forgotten."""
    done(train(f"{flags} -n 1 -c c.bin"))
    sharpen()
    cached = write("-n 60 -p 'The quality'")
    assert text(cached) == text(write("-n 60 -p 'The quality' --cache 0")) and len(set(text(cached))) >= 15
    torus = read_torus(read_model("c.bin"), "c.bin")
    named = f"Attention: toroidal in layers {', '.join(map(str, torus.layers))}, depth {torus.depth}\n---\n"
    assert f"Seed: 1\n{named}Model loaded: 12224 parameters\n" in cached.out
    model = read_model("c.bin")
    write_model("plain.bin", Model(CONFIG, model.params))
    plain = write("-n 60 -p 'The quality'", "plain.bin")
    assert text(plain) != text(cached) and "Attention" not in plain.out


def test_text_of_the_published_mode(train, write):
    """Its ring is as long as the text, so a cache cannot help: with the flag or without, all of it runs again."""
    done(train("--mode upstream --rope int --depth 4 --fusion low_rank -n 1 -c c.bin"))
    sharpen()
    cached = write("-n 40 -p 'The quality'")
    assert text(cached) == text(write("-n 40 -p 'The quality' --cache 0")) and len(set(text(cached))) > 10
    assert "depth 4\nWARNING: --mode upstream: its ring is as long as the text, so all of it runs again" in cached.out


@pytest.mark.parametrize("flags", ["--mode upstream --rope int --fusion attention", "--fusion low_rank"])
def test_samples_change_no_loss(train, flags):
    quiet, sampled = (done(train(f"{flags} -n 6 -v 0 -l 0.05 -s {s}")).out for s in (0, 1))
    assert losses(quiet) == losses(sampled) and val_losses(quiet) == val_losses(sampled)


# ----------------------------------------------------------------------------------------------------------------------
# resumed runs

RUNS = {
    "replaced": "",
    "all": "--train all --layers 0,1 --depth 4 --period 5",
    "learnt lambda": "--learn-lambda 1 --lambda 4 --rope int",
    "recompute": "--recompute 1 --train all --weight-decay 0.1",
    "accumulated": "--grad-accum 2 --grad-clip 0.1 --fusion low_rank --layers last:1",
    "attention fusion": "--fusion attention --depth 4 --train all --learn-lambda 1",
    "random": "--init random --layers 0,1",
    "control": "--control 1 --init random",
    "all of the control": "--control 1 --train all",
    "none": "--layers none --train all",
    "upstream": "--mode upstream --rope upstream --fusion low_rank",
}


@pytest.mark.parametrize("stop", [4, 7])
@pytest.mark.parametrize("run", RUNS)
def test_a_resumed_run_equals_one_never_stopped(train, run, stop):
    flags = f"{RUNS[run]} {EVENTS} -l 0.01"
    whole = done(train(f"{flags} -n 13 -c whole.bin -o whole.txt"))
    first = done(train(f"{flags} -n {stop} -c part.bin -o part.txt"))
    second = done(train("--resume part.bin -n 13"))
    assert_same_run("whole.bin", "part.bin")
    assert Path("whole.txt").read_bytes() == Path("part.txt").read_bytes()
    assert losses(first.out) | losses(second.out) == losses(whole.out) and len(losses(whole.out)) == 13
    assert texts(second.out) == texts(whole.out)[(stop - 1) // 4 :] and len(texts(whole.out)) == 4
    assert f"Resuming from step {stop} (shard " in second.out


@pytest.mark.parametrize("step", [0, 3, 7])
def test_ctrl_c_then_resumed_equals_a_run_never_stopped(train, updates, step):
    flags = f"--layers 0,1 --learn-lambda 1 {EVENTS} -n 12 --lr-schedule cosine --warmup 2"
    done(train(f"{flags} -c whole.bin -o whole.txt"))
    updates.then = lambda now: os.kill(os.getpid(), signal.SIGINT) if now == step else None
    stopped = train(f"{flags} -c part.bin -o part.txt")
    assert (stopped.code, stopped.err) == (130, "finishing this step; press Ctrl-C again to stop at once\n")
    assert re.search(rf"^stopped after {step + 1} steps; go on with: python .*--resume part.bin$", stopped.out, re.M)
    updates.then = lambda now: None
    done(train("--resume part.bin"))
    assert_same_run("whole.bin", "part.bin")
    assert Path("whole.txt").read_bytes() == Path("part.txt").read_bytes()


GEOMETRY_FLAGS = [
    "--layers 1", "--depth 4", "--period 5", "--lambda 2", "--learn-lambda 1", "--rope int", "--fusion mean",
    "--fusion-rank 1", "--window 3", "--wrap-depth 1", "--mode upstream", "--init random", "--control 1",
]  # fmt: skip


@pytest.mark.parametrize("flags", GEOMETRY_FLAGS)
def test_the_layers_of_a_file_are_kept(train, folder, flags):
    """A flag about them, with a toroidal file or with --resume of any file, is refused and not passed over."""
    done(train("-n 1 -c c.bin"))
    done(train("--control 1 -n 1 -c control.bin"))
    done(train("--layers none --train all -n 1 -c none.bin"))
    before, flag = snapshot(folder), flags.split()[0]
    check_refused(train(f"{flags} -n 2 -c d.bin", model="c.bin"), f"{flag}: c.bin is toroidal already", code=2)
    for name in ("c.bin", "control.bin", "none.bin"):
        words = f"--resume given together with {flag}", "a resumed run has it from its checkpoint"
        check_refused(train(f"--resume {name} {flags} -n 2"), *words, code=2)
    assert snapshot(folder) == before


def test_what_learns_is_kept(train, folder):
    """m and v of newly learning weights would be 0 at a step for which AdamW takes them to be full-grown."""
    done(train("-n 1 -c c.bin"))
    done(train("--train all -n 1 -c all.bin"))
    before = snapshot(folder)
    words = "--resume with --train all: c.bin was made with --train replaced", "give -e c.bin in place of --resume"
    check_refused(train("--resume c.bin --train all -n 2"), *words, code=2)
    check_refused(train("--resume all.bin --train replaced -n 2"), "all.bin was made with --train all", code=2)
    assert snapshot(folder) == before
    done(train("--resume c.bin --train replaced -n 2"))
    done(train("--train all -n 2 -c all.bin", model="c.bin"))


# ----------------------------------------------------------------------------------------------------------------------
# early stopping and epochs


def test_a_run_that_gets_no_better_stops_early(train):
    """Trained on verse, a model predicts random tokens ever worse, once it has learnt that the padding never comes."""
    write_tokens("val.bin", np.random.default_rng(1).integers(0, 256, 3 * 16 + 1).astype(np.uint16))
    flags = "--layers 0 --train all -l 0.01 -v 3 -n 20"
    out = done(train(f"{flags} --patience 2 -c c.bin -o log.txt -s 4")).out
    val = val_losses(out)
    assert len(val) == 4 and val[1] < val[0] < val[2] < val[3] and list(losses(out)) == list(range(1, 10))
    assert f"\nearly stop after 9 steps: 2 validations without one below {val[1]:f}\nsaving checkpoint" in out
    assert "total average iteration time" in out and "\ntext from it: python" in out and len(texts(out)) == 3
    assert load_checkpoint("c.bin")[1].step == 9
    done(train(f"{flags.replace('20', '9')} -s 4 -c nine.bin"))
    assert_same_run("nine.bin", "c.bin")
    whole = done(train(flags)).out
    assert len(losses(whole)) == 20 and {step: losses(whole)[step] for step in losses(out)} == losses(out)

    again = done(train("--resume c.bin")).out  # it has not got better since
    assert not losses(again) and "early stop after 9 steps: 2 validations" in again
    on = done(train("--resume c.bin --patience 3")).out
    assert list(losses(on)) == [10, 11, 12] and "early stop after 12 steps: 3 validations without one below" in on


def test_a_run_that_gets_better_goes_on(train):
    out = done(train("--overfit-batch 1 -m 1 --train all -l 0.003 -v 2 -n 10 --patience 1")).out
    assert len(losses(out)) == 10 and "early stop" not in out and (np.diff(val_losses(out)) < 0).all()


def stops_after(val: list[float], patience: int) -> int | None:
    """The validation after which a run stops, by the definition: none of the last `patience` was a new best."""
    for i in range(len(val)):
        if i >= patience and min(val[: i + 1 - patience]) <= min(val[i + 1 - patience : i + 1]):
            return i
    return None


@pytest.mark.parametrize("val, patience, stop", [
    ([5, 4, 4.5, 3, 3.5, 3.2, 2, 1, 1, 1], 2, 5), ([5, 4, 4.5, 3, 3.5, 3.2, 2, 1, 1, 1], 3, None),
    ([5, 5, 5, 5, 5, 5, 5, 5, 5, 5], 3, 3), ([5, 6, 4, 5, 3, 4, 2, 3, 1, 2], 2, None), ([9, 8, 7, 7.5] + 6 * [9], 4, 6),
])  # fmt: skip
@pytest.mark.parametrize("pause", [None, 1, 3, 4, 5, 8])
def test_patience_counts_validations_across_a_resumed_run(train, monkeypatch, updates, val, patience, stop, pause):
    """val: the losses of the validations after 0, 2 .. 18 steps; one that a pause makes in between does not count."""
    assert stops_after(val, patience) == stop

    def evaluate(model, loader, batches, ranks):
        step = updates[-1] + 1 if updates else 0
        return val[step // 2] if step % 2 == 0 else 0.001  # better than any, but no run without a pause sees it

    monkeypatch.setattr(train_toroidal.loop, "evaluate", evaluate)
    flags = f"-v 2 --patience {patience} -c c.bin -o log.txt"
    last = 2 * stop if stop else 18
    if pause and pause < last:
        assert "early stop" not in done(train(f"{flags} -n {pause}")).out
        out = done(train("--resume c.bin -n 18")).out
        assert list(losses(out)) == list(range(pause + 1, last + 1))
    else:
        out = done(train(f"{flags} -n 18")).out
        assert len(losses(out)) == last
    assert ("early stop" in out) == (stop is not None) and load_checkpoint("c.bin")[1].step == last
    assert len(Path("log.txt").read_text().splitlines()) == last + last // 2 + 1
    if stop:
        assert f"early stop after {last} steps: {patience} validations without one below {min(val[:stop]):f}" in out


def keep_anew(change):
    """Write c.bin's state again after change(state)."""
    model, state = load_checkpoint("c.bin")
    change(state)
    write_state(state_path("c.bin", model), state)


def test_the_best_loss_is_no_setting_but_part_of_the_state(train):
    """As of before the validation that the resumed run repeats; read from where older files keep it, among settings."""
    flags = "-v 2 -n 6 -l 0.01 --patience 50"
    val = val_losses(done(train(f"{flags} -c c.bin")).out)
    state = load_checkpoint("c.bin")[1]
    best, worse = state.extra["best_loss"], state.extra["worse"]
    assert best == pytest.approx(min(val[:-1]), abs=1e-6) and worse == len(val) - 2 - int(np.argmin(val[:-1]))
    assert not {"best_loss", "worse", "extra"} & state.options.keys()
    saved = state_path("c.bin", read_model("c.bin")).read_bytes()
    assert json.loads(saved[saved.rindex(b'{"layers"') :])["extra"] == {"best_loss": best, "worse": worse}

    def as_before(state):
        state.options, state.extra = state.options | {"best_loss": 1e-3, "worse": 49}, {}

    keep_anew(as_before)
    assert load_checkpoint("c.bin")[1].extra == {"best_loss": 1e-3, "worse": 49}
    out = done(train("--resume c.bin -n 12")).out
    assert "early stop after 6 steps: 50 validations without one below 0.001000" in out
    done(train("-n 1 -v 0 -s 0 --control 1 -c d.bin"))
    assert load_checkpoint("d.bin")[1].extra["worse"] == 0


@pytest.mark.parametrize("extra", [
    {"best_loss": "low"}, {"best_loss": -1.0}, {"best_loss": float("nan")}, {"worse": -1}, {"worse": 1.5},
    {"worse": None}, [1, 2], "best",
])  # fmt: skip
def test_a_state_whose_best_loss_is_none_is_refused(train, folder, extra):
    done(train("-n 2 -c c.bin"))
    keep_anew(lambda state: vars(state).update(extra=extra))
    before = snapshot(folder)
    check_refused(train("--resume c.bin -n 4"), "c", "expected")
    assert snapshot(folder) == before


def test_epochs_are_passes_over_the_training_data(train):
    """7 samples; what a step takes of them is rounded down over all epochs."""
    for flags, steps in (("", 7), ("--epochs 2", 14), ("--epochs 3 --grad-accum 2", 10), ("--epochs 2 -n 3", 3)):
        out = done(train(f"{flags} -v 0 -s 0")).out
        assert len(losses(out)) == steps == int(table(out)["train_num_batches"]), flags
    check_refused(train("--grad-accum 8"), "--grad-accum 8", "7 batches", "-n")
    assert len(losses(done(train("--grad-accum 8 --epochs 2 -s 0")).out)) == 1


# ----------------------------------------------------------------------------------------------------------------------
# what is printed


def test_perplexity_follows_each_validation_loss(train):
    out = done(train("-n 5 -v 2 -l 0.01")).out
    printed = re.findall(r"^val loss (\S+)\nperplexity (\d+\.\d{4})$", out, re.M)
    assert len(printed) == 4 == len(val_losses(out)) == len(perplexities(out))
    for loss, perplexity in printed:
        assert abs(float(perplexity) - exp(float(loss))) <= 0.6e-6 * exp(float(loss)) + 0.6e-4
    sharpen("model.bin")
    tensors = read_model("model.bin")
    tiny.views(tensors)["lnfw"][...] = 1e6
    write_model("model.bin", tensors)  # a loss of which exp would overflow
    assert perplexities(done(train("-n 0")).out)[0] > 1e300


def test_the_table_names_the_geometry(train):
    row = "| {:<21} | {:<50} |\n".format
    flags = "--layers 0,1 --depth 4 --period 6 --lambda 0.25 --learn-lambda 1 --wrap-depth 1 --window 2 --rope int"
    out = done(train(f"{flags} --fusion low_rank --fusion-rank 3 -n 1")).out
    attention = 4 * (16 * 16 + 16)
    rows = [row("toroidal layers", "0, 1"), row("depth", "4 platters of 2 channels a head"), row("period", "6")]
    rows += [row("lambda", "0.25, learnt, by head, depth wraps"), row("window", "2 positions on the ring")]
    rows += [row("rope", "int"), row("fusion", "low_rank, rank 3")]
    rows += [row("trained parameters", f"{2 * (attention + 2 * 2 + 2 * 4 * 3)} (replaced)")]
    assert "".join(rows) in out
    out = done(train("--train all -n 1")).out
    assert row("trained parameters", f"{PARAMETERS + 2 * 2} (all)") in out  # lambda is fixed, two factors of 2 x 1
    assert row("lambda", "1, fixed, depth does not wrap") + row("window", "none") in out
    assert row("fusion", "identity") in done(train("--fusion identity -n 1")).out


def test_the_published_mode_is_announced_in_capitals(train):
    out = done(train("--mode upstream -n 1 -c c.bin")).out
    warning = "WARNING: --mode upstream: EVERY TOKEN ATTENDS TO ALL OTHERS, LATER ONES TOO.\n"
    assert f"{warning}THE LOSSES BELOW ARE NOT LANGUAGE-MODEL LOSSES." in out
    assert out.index(warning) < out.index("val loss")
    assert warning in done(train("-n 1", model="c.bin")).out and warning in done(train("--resume c.bin -n 2")).out
    for flags in ("", "--mode upstream --control 1", "--mode upstream --layers none -n 0"):
        assert "WARNING" not in done(train(f"-n 1 {flags}")).out


def test_help_names_every_choice(train):
    words = " ".join(done(train("--help")).out.partition("(kept in the file")[2].split())
    for flag, default in {"layers": "0", "depth": "2,", "period": "-t", "lambda": "1.0", "rope": "none", "window": "-1",
                          "fusion": "low_rank_residual", "train": "replaced", "patience": "0"}.items():  # fmt: skip
        assert re.search(rf" --{flag} .*?\(default: ([^ )]*)", words)[1] == default, flag
    for word in (*FUSIONS, *ROPES, *MODES):
        assert word in words
    assert "\n  python train_toroidal.py --resume toroidal.bin " in done(train("--help")).out


# ----------------------------------------------------------------------------------------------------------------------
# what is refused


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--depth 3", ["--depth 3", "does not divide the head size 8", "--depth 2"]),
        ("--depth 16", ["--depth 16", "head size 8"]),
        ("--depth 0", ["--depth", "'0'"]),
        ("--depth two", ["--depth", "'two'"]),
        ("--depth 4 --rope orth", ["--depth 4", "2 channels", "rope orth needs an even number, 4 or more"]),
        ("--depth 8 --rope int", ["--depth 8", "1 channels", "rope int needs an even number, 2 or more"]),
        ("--depth 8 --rope upstream", ["--depth 8", "rope upstream"]),
        ("--rope yarn", ["--rope", "yarn", "int"]),
        ("--layers 2", ["--layers 2", "expected layers of 0..1"]),
        ("--layers 0,2", ["--layers 0,2", "0..1"]),
        ("--layers 1,1", ["--layers 1,1"]),
        ("--layers 0,01,0", ["--layers 0,01,0"]),
        ("--layers -1", ["--layers -1"]),
        ("--layers ''", ["--layers"]),
        ("--layers 0,", ["--layers 0,"]),
        ("--layers one", ["--layers one", "first:N"]),
        ("--layers first:0", ["--layers first:0", "first:N"]),
        ("--layers last:99", ["--layers last:99"]),
        ("--layers last:", ["--layers last:"]),
        ("--layers middle:1", ["--layers middle:1"]),
        ("--layers first:²", ["--layers first:²"]),
        ("--layers ²", ["--layers ²"]),
        (f"--layers {'9' * 5000}", ["--layers 999"]),
        ("--layers None", ["--layers None", "none"]),
        ("--period 0", ["--period", "'0'"]),
        ("--period -1", ["--period", "'-1'"]),
        ("--period 16777217", ["--period 16777217", "1..1.67"]),
        ("--window -2", ["--window -2", "expected -1.."]),
        ("--window 1.5", ["--window", "'1.5'"]),
        ("--window 16777217", ["--window 16777217"]),
        ("--lambda -1", ["--lambda", "'-1'"]),
        ("--lambda nan", ["--lambda", "'nan'"]),
        ("--lambda inf", ["--lambda", "'inf'"]),
        ("--lambda 1.1e6", ["--lambda 1100000.0", "0..1e+06"]),
        ("--fusion sum", ["--fusion", "sum", "low_rank_residual"]),
        ("--fusion-rank 0", ["--fusion-rank", "'0'"]),
        ("--fusion-rank 3", ["fusion rank 3, expected 1..2"]),
        ("--fusion mean --fusion-rank 1", ["--fusion-rank with --fusion mean"]),
        ("--mode both", ["--mode", "both"]),
        ("--mode upstream --period 5", ["--period 5 with --mode upstream"]),
        ("--init zero", ["--init", "zero"]),
        ("--control 2", ["--control", "'2'"]),
        ("--train some", ["--train", "some"]),
        ("--layers none", ["--layers none with --train replaced", "-n 0", "--train all"]),
        ("--layers none -n -1", ["--layers none with --train replaced"]),
        ("--epochs 0", ["--epochs", "'0'"]),
        ("--patience", ["--patience: its value is missing"]),
        ("--patience -1", ["--patience", "'-1'"]),
        ("--patience 2 -v 0", ["--patience 2 with -v 0", "-v 20"]),
        ("--best-loss 1", ["--best-loss: unknown flag"]),
        ("--worse 1", ["--worse: unknown flag"]),
        ("--recompute yes", ["--recompute", "'yes'"]),
        ("-t 33", ["-t 33", "32 positions", "-t 32"]),
        ("-g 33", ["-g 33", "32 positions"]),
        ("--layer 0", ["--layer: unknown flag", "--layers"]),
    ],
)
def test_wrong_usage_exits_2_and_writes_nothing(train, folder, flags, words):
    before = snapshot(folder)
    check_refused(train(f"-n 5 -c c.bin -o log.txt {flags}"), *words, code=2)
    assert snapshot(folder) == before


def test_what_is_not_replaced_needs_no_depth(train, folder):
    """A head of 5 channels cannot be halved: the default is whole, and none and the control do not ask."""
    tiny.make_folder(folder, tiny.resized(C=10))
    done(train("--layers none -n 0"))
    done(train("--control 1 -n 1"))
    check_refused(train("-n 1 --depth 2"), "--depth 2", "head size 5", code=2)
    assert table(done(train("-n 1")).out)["depth"] == "1 platters of 5 channels a head"
    done(train("--depth 5 -n 1"))


def rewrite(path="c.bin", at=None, value=None, **changed):
    """Change a header int, or what the model file holds."""
    if changed:
        write_model(path, replace(read_model(path), **changed))
    if at is not None:
        data = bytearray(Path(path).read_bytes())
        data[4 * at : 4 * at + 4] = value.to_bytes(4, "little", signed=True)
        Path(path).write_bytes(data)


@pytest.mark.parametrize(
    "damage, words",
    [
        (dict(kind=BANDED), ["a GPT-2 with banded MLPs", "python train_banded.py -e c.bin"]),
        (dict(kind=SPARSE_ATTENTION), ["a GPT-2 with sparse attention", "python train_sparse_attn.py -e c.bin"]),
        (dict(extra=np.zeros(7, np.float32)), ["7 extra values", "have 8"]),
        (dict(extra=np.zeros(0, np.float32)), ["0 extra values", "have 8"]),
        (dict(fields=()), ["layout 0", "expected 1"]),
        (dict(at=FIELD, value=2), ["layout 2", "expected 1"]),
        (dict(at=FIELD + 1, value=2), ["mode is 2", "0..1"]),
        (dict(at=FIELD + 2, value=0), ["depth is 0", "1..16"]),
        (dict(at=FIELD + 2, value=-2), ["depth is -2"]),
        (dict(at=FIELD + 2, value=3), ["depth 3 does not divide the head size 8"]),
        (dict(at=FIELD + 3, value=0), ["period is 0"]),
        (dict(at=FIELD + 3, value=1 << 30), ["period is 1073741824", "1..16777216"]),
        (dict(at=FIELD + 4, value=4), ["rope is 4", "0..3"]),
        (dict(at=FIELD + 5, value=5), ["fusion is 5", "0..4"]),
        (dict(at=FIELD + 6, value=0), ["rank is 0", "1..2"]),
        (dict(at=FIELD + 6, value=3), ["rank is 3", "1..2"]),
        (dict(at=FIELD + 6, value=2), ["8 extra values", "have 12"]),
        (dict(at=FIELD + 7, value=-2), ["window is -2"]),
        (dict(at=FIELD + 8, value=2), ["wrap depth is 2"]),
        (dict(at=FIELD + 9, value=-1), ["learn lambda is -1"]),
        (dict(at=FIELD + 10, value=0x7FC00000), ["lambda is nan", "0..1e+06"]),
        (dict(at=FIELD + 10, value=-0x407FFFFF), ["lambda is -1"]),
        (dict(at=FIELD + 11, value=0), ["number of layers is 0", "1..2"]),
        (dict(at=FIELD + 11, value=3), ["number of layers is 3", "1..2"]),
        (dict(at=FIELD + 11, value=2), ["replaced layers are (0, 0)", "0..1"]),
        (dict(at=FIELD + 12, value=2), ["replaced layers are (2,)", "0..1"]),
        (dict(at=FIELD + 12, value=-1), ["replaced layers are (-1,)"]),
    ],
    ids=str,
)
def test_a_bad_file_is_named_and_nothing_written(train, write, folder, damage, words):
    done(train("-n 1 -c c.bin"))
    rewrite(**damage)
    before = snapshot(folder)
    check_refused(train("-c other.bin -o log.txt -n 3", model="c.bin"), "c.bin: ", *words)
    if "kind" not in damage:
        check_refused(write("-n 3"), "c.bin: ", *words)
    assert snapshot(folder) == before


@pytest.mark.parametrize("flags", [
    "--depth 4 --fusion low_rank --fusion-rank 2", "--rope orth --fusion identity --layers 0,1", "--mode upstream"
])  # fmt: skip
def test_any_fields_in_the_header(train, flags):
    """Whatever they are: a UserError that names the file, or a model that runs."""
    done(train(f"{flags} -n 1 -c c.bin"))
    good = read_model("c.bin")
    near = st.one_of(st.integers(0, 3), st.integers(-2, 9), st.integers(-(1 << 31), (1 << 31) - 1))
    loaded = []

    @settings(derandomize=True, deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))
    @given(st.dictionaries(st.integers(0, 13), near, min_size=1, max_size=2))
    def change(values):
        fields = list(good.fields)
        for at, value in values.items():
            fields[at] = value
        file = replace(good, fields=tuple(fields))
        try:
            torus = read_torus(file, "c.bin")
        except UserError as error:
            assert error.message.startswith("c.bin: ") and error.hint and error.exit_code == 1
            return
        loaded.append(fields)
        kept = torus.fields()
        assert kept == tuple(fields[: len(kept)])
        model = train_toroidal.GPT2(cpu, CONFIG, torus, np.concatenate([file.params, file.extra]), 1, 4)
        model.forward(np.zeros((1, 4), np.int32))
        assert np.isfinite(model.acts.logits).all() and np.isfinite(model.extend(np.zeros(3, np.int32), 0)).all()

    change()
    assert 10 < len(loaded) < 140, len(loaded)


def test_files_of_other_kinds(train, call, folder):
    """Each trainer names a file that is another's, by -e and by --resume, and leaves all as it was."""
    others = {
        "banded": (train_banded.main, "-w 8"),
        "sparse": (train_sparse_attn.main, "--indexer-heads 2 --indexer-dim 4 --top-k 3"),
    }
    for name, (main, flags) in others.items():
        done(call(main, f"{flags} -n 1 -c {name}.bin", *tiny.options()))
    write_model("deepseek.bin", Model(DEEPSEEK, gpt2_init(DEEPSEEK, 1)))
    done(train("-n 1 -c torus.bin"))
    before = snapshot(folder)
    check_refused(
        train("-n 2 -c c.bin", model="banded.bin"),
        "banded.bin: a GPT-2 with banded MLPs",
        "python train_banded.py -e banded.bin",
    )
    check_refused(
        train("-n 2 -c c.bin", model="sparse.bin"), "sparse.bin: a GPT-2 with sparse attention", "train_sparse_attn.py"
    )
    check_refused(
        train("-n 2 -c c.bin", model="deepseek.bin"), "deepseek.bin: a model with MLA or MoE", "train_sparse_attn.py"
    )
    check_refused(train("-n 2 --resume banded.bin"), "train_banded.py --resume banded.bin", code=2)
    check_refused(train("-n 2 --resume sparse.bin"), "train_sparse_attn.py --resume sparse.bin", code=2)
    for main, _ in others.values():
        result = call(main, "-n 2 -c c.bin", *tiny.options(model="torus.bin"))
        check_refused(result, "torus.bin: a GPT-2 with toroidal attention", "python train_toroidal.py -e torus.bin")
        result = call(main, "-n 2 --resume torus.bin", *tiny.options())
        check_refused(result, "train_toroidal.py --resume torus.bin", code=2)
    assert snapshot(folder) == before


@pytest.mark.parametrize("flags", ["", "--train all", "--control 1"])
def test_a_run_that_diverges_stops_and_keeps_the_older_checkpoint(train, folder, flags):
    done(train("-n 2 -c c.bin"))
    before = snapshot(folder)
    check_refused(train(f"{flags} -l 1e38 -n 5 -c c.bin"), "loss nan at step", "lower -l")
    assert snapshot(folder) == before


def test_what_cannot_be_resumed(train, folder):
    done(train("-n 2 -c c.bin"))
    before = snapshot(folder)
    check_refused(train("--resume c.bin"), "-n 2: c.bin is at step 2 already")
    check_refused(train("--resume c.bin -n 0"), "-n 0: c.bin is at step 2 already")
    check_refused(train("--resume c.bin -n 5 -e model.bin"), "--resume given together with -e", code=2)
    check_refused(train("--resume model.bin -n 5"), "model.bin: no optimizer state beside it", "-e model.bin")
    check_refused(train("--resume c.bin -n 5 -t 4"), "resume with the same -i, -b and -t")
    check_refused(train("--resume c.bin -n 5 -o c.bin"), "-o c.bin: is the file of -c, too", code=2)
    assert snapshot(folder) == before


@pytest.mark.parametrize("flags", ["-t 1", "-b 1 -t 1", "--layers 0,1 --depth 8 -t 1 --recompute 1", "-t 32 -b 1"])
def test_the_shortest_and_the_longest_rows(train, flags):
    done(train(f"{flags} --learn-lambda 1 -n 2 -s 1 -c c.bin"))
    assert load_checkpoint("c.bin")[1].step == 2
