"""train_sparse_attn.py as its users meet it: stages, files, resumed runs, what it prints and refuses, and leaks."""

import os
import re
import shlex
import signal
import struct
from dataclasses import replace
from math import log
from pathlib import Path

import numpy as np
import pytest
import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import CONFIG, DEEPSEEK, assert_same_run, check_refused, done, losses, snapshot, texts, val_losses

import generate
import train_sparse_attn
from kernels import cpu
from llmc.checkpoint import (
    BANDED,
    DENSE,
    MATRICES,
    SPARSE_ATTENTION,
    TOROIDAL,
    DeepSeekConfig,
    GPT2Config,
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
from llmc.resume import load_checkpoint
from systems.sparsity import SELECTORS, Sparsity, description, extra_init, extra_shapes, read_sparsity

PARAMETERS = num_parameters(CONFIG)
SMALL = "--indexer-heads 2 --indexer-dim 4"  # an indexer as tiny as the model
LIGHTNING = 2 * (8 * 16 + 4 * 16 + 4 + 4 + 2 * 16)  # its values: queries, keys, their norm, head weights; two layers
FIELD = 132  # header int of the first field


@pytest.fixture
def train(folder, capfdbinary):
    """train("--top-k 3 -n 3", grad_accum=2) -> Result: the trainer on the tiny files, in this process."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # tests may run with Ctrl-C ignored

    def run(flags="", **changed):
        return tiny.call(capfdbinary, train_sparse_attn.main, *tiny.options(**changed), *shlex.split(flags))

    yield run
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def write(folder, capfdbinary):
    """write("-n 5", "c.bin") -> Result: generate.py, greedy, in this process."""

    def run(flags, model="c.bin"):
        argv = [
            "-e",
            model,
            "--device",
            "cpu",
            "--temperature",
            "0",
            "-s",
            "1",
            "--ignore-eot",
            "1",
            *shlex.split(flags),
        ]
        return tiny.call(capfdbinary, generate.main, *argv)

    return run


def saved(path="c.bin"):
    """The tensors of a sparse checkpoint by name, the indexer's too: of its parameters, m and v; and its Sparsity."""
    model, state = load_checkpoint(path)
    sparsity = read_sparsity(model, path)
    shapes = tensor_shapes(model.config) | extra_shapes(model.config, sparsity)
    params = np.concatenate([model.params, model.extra])
    return *(named_views(flat, shapes) for flat in (params, state.m, state.v)), sparsity


def extras(sparsity: Sparsity, config=CONFIG, seed=1337) -> np.ndarray:
    """What a run from a plain file draws for the tensors behind the model's."""
    return extra_init(Model(config, np.zeros(0, np.float32)), sparsity, "", seed)


# ----------------------------------------------------------------------------------------------------------------------
# the stages


def test_warmup_moves_the_indexer_alone_then_both_learn(train):
    before = gpt2_init(CONFIG, 1)
    done(train(f"{SMALL} --top-k 3 --indexer-warmup 4 -n 4 -c c.bin"))
    model, state = load_checkpoint("c.bin")
    drawn = extras(read_sparsity(model, "c.bin"))
    assert model.params.tobytes() == before.tobytes()
    assert not state.m[:PARAMETERS].any() and not state.v[:PARAMETERS].any()
    assert model.extra.size == drawn.size == LIGHTNING and np.abs(model.extra - drawn).max() > 4e-3

    done(train(f"{SMALL} --top-k 3 --indexer-warmup 4 -n 6 -c c.bin"))
    later, state = load_checkpoint("c.bin")
    assert (later.params != before)[: CONFIG.V * 16].any() and state.m[:PARAMETERS].any()
    assert np.abs(later.extra - model.extra).max() > 1e-3

    done(train(f"{SMALL} --top-k 3 --train-indexer 0 -n 3 -c c.bin"))
    model, state = load_checkpoint("c.bin")
    assert model.extra.tobytes() == drawn.tobytes() and not state.m[PARAMETERS:].any()
    assert (model.params != before).any()


@pytest.mark.parametrize("warmup, rate", [(0, 3e-4), (1, 7e-4)])
def test_the_indexer_has_learning_rates_of_its_own(train, warmup, rate):
    """Of AdamW's first update, which is the learning rate wherever there is a gradient."""
    flags = f"{SMALL} --top-k 3 -l 1e-4 --indexer-lr 7e-4 --indexer-lr-sparse 3e-4 --indexer-warmup {warmup}"
    out = done(train(f"{flags} -n 1 -c c.bin --grad-clip 9")).out
    model = read_model("c.bin")
    moved = np.abs(model.extra - extras(read_sparsity(model, "c.bin")))
    assert abs(np.quantile(moved, 0.9) / rate - 1) < 1e-2
    assert abs(np.abs(model.params - gpt2_init(CONFIG, 1)).max() - 1e-4 * (not warmup)) < 1e-6
    assert ("lr 1.00e-04, gradient norm" in out) == (not warmup)


def test_the_controller_learns_in_the_warmup_alone(train):
    flags = f"{SMALL} --adaptive prefix --indexer-warmup 3"
    tensors = []
    for steps in (3, 6):
        done(train(f"{flags} -n {steps} -c c.bin"))
        tensors.append(saved()[0])
    drawn = named_views(extras(saved()[3]), extra_shapes(CONFIG, saved()[3]))
    for name in ("ctlw1", "ctlb1", "ctlw2", "ctlb2"):
        assert tensors[0][name].tobytes() == tensors[1][name].tobytes() != drawn[name].tobytes(), name
    assert tensors[0]["idxqw"].tobytes() != tensors[1]["idxqw"].tobytes()


def test_dense_attention_in_the_warmup_sparse_after_it(train):
    """The losses of the warm-up are one number where all steps see one batch, and dense attention's."""
    out = done(train(f"{SMALL} --top-k 2 --overfit-batch 1 --indexer-warmup 3 -n 5 -v 1 -m 1")).out
    dense = val_losses(done(train("--attention dense --overfit-batch 1 -n 1 -m 1")).out)[0]
    val, loss = val_losses(out), list(losses(out).values())
    assert val[:3] == loss[:3] == [dense] * 3
    assert val[3] == loss[3] != dense and loss[4] != loss[3]
    assert "indexer warmed up: from step 4 attention is sparse and both learn\n" in out


def test_keeping_all_keys_is_the_dense_run(train):
    dense = done(train("--attention dense -n 4 -v 2")).out
    sparse = done(train(f"--keep-ratio 1 -n 4 -v 2 {SMALL}")).out
    assert np.abs(np.subtract(val_losses(dense), val_losses(sparse))).max() < 2e-6
    assert np.abs(np.subtract(list(losses(dense).values()), list(losses(sparse).values()))).max() < 2e-6
    few = done(train(f"--top-k 1 -n 4 -v 2 {SMALL}")).out
    assert np.abs(np.subtract(val_losses(dense), val_losses(few))).max() > 2e-6


def test_the_random_selector_draws_anew_at_every_step_and_the_same_at_every_validation(train):
    """One batch, weights that do not move: what is left of a step is its draw."""
    flags = "--selector random --top-k 2 --overfit-batch 1 -l 1e-30 -n 5 -v 1 -m 1"
    out = done(train(flags)).out
    assert len(set(losses(out).values())) == 5 and len(set(val_losses(out))) == 1
    assert val_losses(done(train(f"{flags} --seed 3")).out)[0] != val_losses(out)[0]


@pytest.mark.parametrize("flags", ["--grad-accum 2", "--weight-decay 0.1 --decay-all 0 --beta2 0.9 --grad-clip 0.1"])
def test_all_trainers_options_work(train, flags):
    out = done(train(f"{SMALL} --top-k 3 -n 3 -c c.bin {flags}")).out
    assert len(losses(out)) == 3 and ("gradient norm" in out) == ("clip" in flags)


# ----------------------------------------------------------------------------------------------------------------------
# files


def test_llm_c_reads_what_is_saved(train):
    """Header ints 0..7 and the 16 tensors, all that the C program looks at; then our fields, and the extra values."""
    done(train(f"{SMALL} --layer-keep 0.25,0.5 --sink 1 --force-self 0 --seed 9 --indexer-rope 2 -n 2 -c c.bin"))
    header, model = np.fromfile("c.bin", "<i4", 256), read_model("c.bin")
    assert header[:8].tolist() == [20240326, 3, 32, 256, 2, 2, 16, 320] and header[8] == 2
    assert header[128:FIELD].tolist() == [20261121, 1, SPARSE_ATTENTION, LIGHTNING]
    # not 0.95 itself, which a float32 does not hold: a resumed run would go on with another number
    assert load_checkpoint("c.bin")[1].options["coverage"] == read_sparsity(model, "c.bin").coverage != 0.95
    (coverage,) = struct.unpack("<i", struct.pack("<f", 0.95))
    # layout, attention, selector, indexer, heads, width, rotated, self, sink, adaptive, leak, coverage, seed, share, k
    assert header[FIELD : FIELD + 16].tolist() == [2, 1, 0, 1, 2, 4, 2, 0, 1, 0, 0, coverage, 9, 1, 2, 4]
    assert os.path.getsize("c.bin") == 1024 + 4 * (PARAMETERS + LIGHTNING)
    assert np.fromfile("c.bin", "<f4", PARAMETERS, offset=1024).tobytes() == model.params.tobytes()

    done(train("--attention dense -n 2 -c c.bin"))
    header = np.fromfile("c.bin", "<i4", 256)
    assert header[128:FIELD].tolist() == [20261121, 1, DENSE, 0] and not header[FIELD:].any()
    assert os.path.getsize("c.bin") == 1024 + 4 * PARAMETERS


KINDS = {  # of a checkpoint: flags, and how generate.py names it
    "top-k": (f"{SMALL} --top-k 3", "sparse, indexer, k = 3"),
    "by layer": (f"{SMALL} --layer-keep 0.5,0.25 --force-self 0 --sink 1", "sparse, indexer, k = 4, 2"),
    "top-p": (f"{SMALL} --selector top-p --coverage 0.6", "sparse, top-p, k = 8"),
    "prefix": (f"{SMALL} --adaptive prefix --keep-ratio 0.75", "sparse, indexer, adaptive prefix, k = 6"),
    "recency": ("--selector recency --top-k 3", "sparse, recency, k = 3"),
    "random": ("--selector random --top-k 3", "sparse, random, k = 3"),
    "oracle": ("--selector oracle --top-k 3", "sparse, oracle, k = 3"),
    "upstream indexer": (f"{SMALL} --indexer upstream --top-k 3", "sparse, indexer, k = 3"),
    "upstream": (f"{SMALL} --adaptive upstream", "sparse, indexer, adaptive upstream, k = 8"),
    "leak": (f"{SMALL} --top-k 5 --legacy-leak 1", "sparse, indexer, k = 5"),
    "share": (f"{SMALL} --top-k 6 --share 2", "sparse, indexer, shared by 2, k = 6"),
    "share, oracle": ("--selector oracle --top-k 9 --share 3 --sink 1", "sparse, oracle, shared by 3, k = 9"),
}
WARNINGS = {"upstream": "WARNING: trained with --adaptive upstream", "leak": "WARNING: trained with --legacy-leak"}
MODELS = {
    "gpt2": CONFIG,
    "mla": replace(DEEPSEEK, F=0, E=0, top=0),
    "moe": replace(DEEPSEEK, q_rank=0, kv_rank=0, R=0),
    "mla+moe": DEEPSEEK,
}


def sharpen(path="c.bin"):
    """Enlarge all matrices, so that what a query attends to decides on the next token."""
    model = read_model(path)
    sparsity = read_sparsity(model, path)
    for views in (tiny.views(model), named_views(model.extra, extra_shapes(model.config, sparsity))):
        for name, tensor in views.items():
            if name in MATRICES:
                tensor *= 10 if name in ("wte", "wpe", "headw") else 20
            elif name in ("idxqw", "idxkw", "idxww"):
                tensor *= 20
    write_model(path, model)
    return model


def text(result):
    return re.fullmatch(r".*\nGenerating:\n(.*)\n---\n", done(result).out, re.S)[1]


@pytest.mark.parametrize(
    "model, kind", [("gpt2", kind) for kind in KINDS] + [(model, "top-k") for model in MODELS if model != "gpt2"]
)
def test_generate_gives_the_same_text_with_a_cache_and_without(train, write, model, kind):
    write_model("model.bin", Model(MODELS[model], gpt2_init(MODELS[model], 1)))
    flags, named = KINDS[kind]
    done(train(f"{flags} -n 1 -c c.bin"))
    file = sharpen()
    cached = write("-n 24 -p 'The quality'")  # past the 32 positions
    assert text(cached) == text(write("-n 24 -p 'The quality' --cache 0")) and len(text(cached)) > 24
    assert f"Seed: 1\nAttention: {named}\n" in cached.out
    assert re.findall("WARNING: .*(?=,)", cached.out) == ([WARNINGS[kind]] if kind in WARNINGS else [])

    file.fields = (file.fields[0], 0, *file.fields[2:])
    write_model("dense.bin", file)
    dense = write("-n 24 -p 'The quality'", "dense.bin")
    assert "\nAttention: dense\n" in dense.out and text(dense) != text(cached)


@pytest.mark.parametrize("model", ["mla", "moe", "mla+moe"])
def test_generate_knows_dense_models_of_deepseeks_kind(train, write, model):
    write_model("model.bin", Model(MODELS[model], gpt2_init(MODELS[model], 1)))
    done(train("--attention dense -n 1 -c c.bin"))
    assert read_model("c.bin").kind == DENSE and "Attention" not in write("-n 1").out
    sharpen()
    assert text(write("-n 40")) == text(write("-n 40 --cache 0"))


def test_a_decoder_never_sees_what_comes_after(train):
    """Of a model trained with leaks or with k from the whole sequence, too: the prompt at once or token by token."""
    for kind in ("leak", "upstream"):
        done(train(f"{KINDS[kind][0]} -n 1 -c c.bin"))
        sharpen()
        tokens = np.random.default_rng(1).integers(0, 256, 16).astype(np.int32)
        at_once, one_by_one = (generate.open_model("c.bin", "cpu")[0] for _ in range(2))
        expected = [one_by_one.extend(tokens[t : t + 1], t).copy() for t in range(16)]
        assert np.abs(at_once.extend(tokens, 0) - expected[15]).max() < 1e-3 * np.abs(expected[15]).max(), kind


def test_description():
    assert description(Sparsity((8, 8))) == "sparse, indexer, k = 8"
    assert description(Sparsity((8, 4, 8), adaptive="prefix")) == "sparse, indexer, adaptive prefix, k = 8, 4, 8"
    assert description(Sparsity((8,), attention="dense", adaptive="prefix")) == "dense"


# ----------------------------------------------------------------------------------------------------------------------
# resumed runs

EVENTS = "-v 3 -s 4"
RUNS = {
    "lightning": ("gpt2", f"{SMALL} --top-k 3 --indexer-warmup 5"),
    "upstream indexer": ("gpt2", f"{SMALL} --indexer upstream --top-k 3 --indexer-warmup 5 --train-indexer 1"),
    "top-p": ("gpt2", f"{SMALL} --selector top-p --coverage 0.7 --indexer-warmup 5"),
    "prefix": ("gpt2", f"{SMALL} --adaptive prefix --indexer-warmup 5"),
    "upstream": ("gpt2", f"{SMALL} --adaptive upstream"),
    "random": ("gpt2", "--selector random --top-k 2"),  # its draws depend on the step
    "share": ("gpt2", f"{SMALL} --top-k 6 --share 2 --indexer-warmup 5"),
    "leak": ("gpt2", f"{SMALL} --top-k 3 --legacy-leak 1"),
    "accumulated": ("gpt2", f"{SMALL} --top-k 3 --indexer-warmup 5 --grad-accum 2 --weight-decay 0.1"),
    "mla+moe": ("mla+moe", f"{SMALL} --top-k 3 --indexer-warmup 5 --grad-clip 0.5"),
    "dense mla+moe": ("mla+moe", "--attention dense --balance 0.1"),
}


@pytest.mark.parametrize("stop", [4, 5, 8])  # in the warm-up, with a sample due; at its end; after it
@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_equals_one_never_stopped(train, name, stop):
    model, flags = RUNS[name]
    write_model("model.bin", Model(MODELS[model], gpt2_init(MODELS[model], 1)))
    whole = done(train(f"{flags} {EVENTS} -n 12 -l 0.003 -c whole.bin -o whole.txt"))
    first = done(train(f"{flags} {EVENTS} -n {stop} -l 0.003 -c part.bin -o part.txt"))
    second = done(train("--resume part.bin -n 12"))
    assert_same_run("whole.bin", "part.bin")
    log_lines = Path("whole.txt").read_text()
    assert Path("part.txt").read_text() == log_lines
    assert ("kl:" in log_lines) == ("indexer" in flags and "leak" not in flags)
    assert losses(first.out) | losses(second.out) == losses(whole.out) and len(losses(whole.out)) == 12
    sampled = texts(whole.out)  # at 4, 8 and 12
    assert len(sampled) == 3 and texts(second.out) == sampled[(stop - 1) // 4 :]
    assert f"Resuming from step {stop} (shard " in second.out


@pytest.fixture
def send_signal_at(monkeypatch):
    """send_signal_at(step): the process gets a signal in the midst of that 0-based step."""
    check_finite = train_sparse_attn.loop.check_finite

    def at(chosen):
        def then_signal(name, loss, step, path):
            if (name, step - 1) == ("train", chosen):
                os.kill(os.getpid(), signal.SIGINT)
            check_finite(name, loss, step, path)

        monkeypatch.setattr(train_sparse_attn.loop, "check_finite", then_signal)

    return at


@pytest.mark.parametrize("step", [0, 2, 4, 7])
def test_ctrl_c_in_either_stage_then_resumed_equals_a_run_never_stopped(train, send_signal_at, step):
    flags = f"{SMALL} --adaptive prefix --indexer-warmup 5 {EVENTS} -n 12 --lr-schedule cosine --warmup 2"
    done(train(f"{flags} -c whole.bin -o whole.txt"))
    send_signal_at(step)
    stopped = train(f"{flags} -c part.bin -o part.txt")
    assert (stopped.code, stopped.err) == (130, "finishing this step; press Ctrl-C again to stop at once\n")
    assert re.search(rf"^stopped after {step + 1} steps; go on with: python .*--resume part.bin$", stopped.out, re.M)
    send_signal_at(None)
    resumed = done(train("--resume part.bin"))
    assert ("indexer warmed up" in resumed.out) == (step < 5)
    assert_same_run("whole.bin", "part.bin")
    assert Path("whole.txt").read_bytes() == Path("part.txt").read_bytes()


@pytest.mark.parametrize(
    "flag",
    [
        "--top-k 2",
        "--attention dense",
        "--coverage 0.5",
        "--indexer-dim 8",
        "--indexer-warmup 9",
        "--sink 1",
        "--share 2",
    ],
)
@pytest.mark.parametrize("first", [f"{SMALL} --top-k 3", "--attention dense"])
def test_resume_keeps_the_attention(train, folder, first, flag):
    done(train(f"{first} -n 1 -c c.bin"))
    before = snapshot(folder)
    check_refused(train(f"--resume c.bin -n 2 {flag}"), "--resume", flag.split()[0], "-e c.bin", code=2)
    assert snapshot(folder) == before


# ----------------------------------------------------------------------------------------------------------------------
# from a sparse file


def test_a_sparse_file_keeps_its_indexer_and_attention_unless_told_otherwise(train):
    done(train(f"{SMALL} --top-k 3 --sink 1 -n 2 -c first.bin"))
    file = read_model("first.bin")
    first = read_sparsity(file, "first.bin")
    changes = {
        "": {},
        "--top-k 5": dict(k=(5, 5)),
        "--keep-ratio 0.5": dict(k=(4, 4)),
        "--selector recency --sink 0": dict(selector="recency", sink=False),
        "--selector top-p": dict(selector="top-p", k=(8, 8)),  # k is only its limit, T
        "--legacy-leak 1": dict(leak=True),
        "--share 2 --top-k 6": dict(share=2, k=(6, 6)),
        "--indexer-dim 4 --force-self 0": dict(force_self=False),
    }
    for flags, changed in changes.items():
        done(train(f"{flags} --train-indexer 0 -n 1 -c c.bin", model="first.bin"))
        again = read_model("c.bin")
        assert read_sparsity(again, "c.bin") == replace(first, **changed), flags
        assert again.extra.tobytes() == file.extra.tobytes() and again.params.tobytes() != file.params.tobytes()


def test_dense_attention_keeps_the_indexer_in_the_file(train):
    done(train(f"{SMALL} --top-k 3 -n 2 -c first.bin"))
    file = read_model("first.bin")
    out = done(train("--attention dense -n 2 -c c.bin -v 1", model="first.bin")).out
    again = read_model("c.bin")
    assert again.extra.tobytes() == file.extra.tobytes() and "recall" not in out
    assert read_sparsity(again, "c.bin") == replace(read_sparsity(file, "first.bin"), attention="dense")
    write_model("plain.bin", Model(CONFIG, file.params))
    assert val_losses(out) == val_losses(done(train("--attention dense -n 2 -v 1", model="plain.bin")).out)
    done(train("--resume c.bin -n 3"))
    sparse = done(train("--attention sparse -n 1 -c d.bin", model="c.bin")).out
    assert read_sparsity(read_model("d.bin"), "d.bin").attention == "sparse" and "recall@k" in sparse


def test_a_new_controller_is_drawn_beside_the_indexer_of_the_file(train):
    done(train(f"{SMALL} --top-k 3 -n 2 -c first.bin"))
    done(train("--adaptive prefix --train-indexer 0 -n 1 -c c.bin", model="first.bin"))
    old, (new, _, _, sparsity) = saved("first.bin")[0], saved()
    drawn = named_views(extras(sparsity), extra_shapes(CONFIG, sparsity))
    for name in drawn:
        assert new[name].tobytes() == (drawn if name.startswith("ctl") else old)[name].tobytes(), name
    done(train("--adaptive none --train-indexer 0 -n 1 -c d.bin", model="c.bin"))
    assert read_model("d.bin").extra.tobytes() == read_model("first.bin").extra.tobytes()


def test_a_new_indexer_is_drawn_from_seed(train):
    drawn = {}
    for seed in ("", "--seed 1337", "--seed 3"):
        done(train(f"{SMALL} --train-indexer 0 -n 1 -c c.bin {seed}"))
        drawn[seed] = read_model("c.bin").extra.tobytes()
    sparsity = read_sparsity(read_model("c.bin"), "c.bin")
    assert drawn[""] == drawn["--seed 1337"] == extras(sparsity).tobytes() != drawn["--seed 3"]
    assert drawn["--seed 3"] == extras(sparsity, seed=3).tobytes() and sparsity.seed == 3


def test_a_file_without_an_indexer_gets_one_when_it_needs_it(train):
    write_model("model.bin", Model(DEEPSEEK, gpt2_init(DEEPSEEK, 1)))
    done(train("--selector recency --top-k 3 -n 1 -c first.bin"))
    assert read_model("first.bin").extra.size == 0
    done(train(f"{SMALL} --selector indexer -n 1 -c c.bin", model="first.bin"))
    sparsity = read_sparsity(read_model("c.bin"), "c.bin")
    # rotated as the model's own keys, and its queries come from the model's latent, 8 wide
    assert (sparsity.k, sparsity.heads, sparsity.width, sparsity.rotated) == ((3, 3), 2, 4, 4)
    assert extra_shapes(DEEPSEEK, sparsity)["idxqw"] == (2, 8, 8)


@pytest.mark.parametrize(
    "flags, rotated", [("", 4), ("--indexer-rope 0", 0), ("--indexer-dim 3", 2), ("--indexer upstream", 0)]
)
def test_rotated_dims_of_the_indexer(train, flags, rotated):
    """The model's R = 4, as far as the indexer has room for them; the published one has none."""
    write_model("model.bin", Model(DEEPSEEK, gpt2_init(DEEPSEEK, 1)))
    done(train(f"{SMALL} {flags} -n 1 -c c.bin"))
    assert read_sparsity(read_model("c.bin"), "c.bin").rotated == rotated


# ----------------------------------------------------------------------------------------------------------------------
# what is refused


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--top-k 0", ["--top-k", "'0'"]),
        ("--top-k 33", ["--top-k 33", "32 positions", "--top-k 32"]),
        ("--keep-ratio 0", ["--keep-ratio", "'0'", "above 0"]),
        ("--keep-ratio 1.5", ["--keep-ratio", "'1.5'"]),
        ("--keep-ratio nan", ["--keep-ratio", "'nan'"]),
        ("--top-k 3 --keep-ratio 0.5", ["--keep-ratio given with --top-k"]),
        ("--layer-keep 1,0.5 --keep-ratio 0.5", ["--keep-ratio given with --layer-keep"]),
        ("--layer-keep 1,1 --top-k 3", ["--layer-keep given with --top-k"]),
        ("--layer-keep 1,1,1,1", ["--layer-keep 1,1,1,1", "4 shares", "expected 2"]),
        ("--layer-keep 1", ["--layer-keep 1", "1 shares"]),
        ("--layer-keep one,two", ["--layer-keep one,two", "'one'"]),
        ("--layer-keep ''", ["--layer-keep", "''"]),
        ("--layer-keep nan,1", ["--layer-keep nan,1", "above 0"]),
        ("--layer-keep 0,1", ["--layer-keep 0,1", "above 0"]),
        ("--coverage 0", ["--coverage", "'0'"]),
        ("--coverage 1e-60", ["--coverage", "'1e-60'"]),
        ("--selector best", ["--selector", "best"]),
        ("--force-self 2", ["--force-self", "'2'"]),
        ("--mla 1", ["--mla 1", "model.bin is a plain GPT-2", "--preset dsa"]),
        ("--experts 4", ["--experts 4", "model.bin is a plain GPT-2"]),
        ("--top-experts 2", ["--top-experts 2", "model.bin is a plain GPT-2"]),
        ("--indexer-dim 6 --indexer-rope 3", ["--indexer-rope 3", "even"]),
        ("--indexer-dim 6 --indexer-rope 8", ["--indexer-rope 8", "up to 6", "--indexer-dim 6"]),
        ("--indexer upstream --indexer-rope 2", ["--indexer-rope 2", "up to 0", "--indexer upstream"]),
        ("--indexer-dim 1025", ["--indexer-dim 1025", "at most 1024"]),
        ("--indexer-heads 257", ["--indexer-heads 257", "at most 256"]),
        ("--adaptive prefix --selector recency", ["--adaptive prefix", "--selector recency"]),
        ("--adaptive upstream --selector random", ["--adaptive upstream", "--selector random"]),
        ("--adaptive prefix --selector top-p", ["--adaptive prefix", "--selector top-p"]),
        ("--legacy-leak 1 --adaptive prefix", ["--legacy-leak", "--adaptive prefix"]),
        ("--legacy-leak 1 --selector top-p", ["--legacy-leak", "--selector top-p"]),
        ("--share 0", ["--share", "'0'"]),
        ("--share 4 --top-k 7", ["--share 4 with k = 7", "two tiles of 4", "--top-k 8 or more"]),
        ("--share 4 --top-k 8 --sink 1", ["--share 4 with k = 8", "and the first key", "--top-k 9 or more"]),
        ("--share 2 --layer-keep 1,0.25", ["--share 2 with k = 2", "--top-k 4 or more"]),
        ("--share 2 --selector top-p", ["--share with --selector top-p", "--share 1"]),
        ("--share 2 --adaptive prefix", ["--share with --adaptive prefix", "--share 1"]),
        ("--share 2 --adaptive upstream", ["--share with --adaptive upstream", "--share 1"]),
        ("--share 2 --legacy-leak 1 --top-k 4", ["--share with --legacy-leak", "--share 1"]),
        ("--attention dense --share 2", ["--share with --attention dense"]),
        ("--attention dense --indexer-warmup 2", ["--indexer-warmup with --attention dense", "--attention sparse"]),
        ("--attention dense --adaptive prefix", ["--adaptive with --attention dense"]),
        ("--attention dense --top-k 3", ["--top-k with --attention dense"]),
        ("--attention dense --legacy-leak 1", ["--legacy-leak with --attention dense"]),
        ("--indexer-warmup 2 --selector recency", ["--indexer-warmup with --selector recency"]),
        ("--indexer-warmup 2 --selector oracle", ["--indexer-warmup with --selector oracle"]),
        ("--indexer-warmup 2 --legacy-leak 1", ["--indexer-warmup with --legacy-leak"]),
        ("--indexer-warmup 2 --train-indexer 0", ["--indexer-warmup with --train-indexer 0"]),
        ("-t 33", ["-t 33", "32 positions"]),
        ("--answers-after 5", ["--answers-after", "'5'", "FIRST:END"]),
        ("--answers-after 9:5", ["--answers-after", "'9:5'"]),
        ("--answers-after a:b", ["--answers-after", "'a:b'"]),
        ("--answers-after ²:³", ["--answers-after", "²:³"]),
    ],
)
def test_wrong_usage_exits_2_and_writes_nothing(train, folder, flags, words):
    before = snapshot(folder)
    check_refused(train(f"-n 3 -c c.bin -o log.txt {flags}"), *words, code=2)
    assert snapshot(folder) == before


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--mla 0", ["--mla 0", "model.bin is a DeepSeek-style model"]),
        ("--experts 0", ["--experts 0", "model.bin is a DeepSeek-style model with experts 3"]),
        ("--experts 4", ["--experts 4", "experts 3"]),
        ("--top-experts 1", ["--top-experts 1", "top experts 2"]),
    ],
)
def test_the_architecture_is_the_files(train, folder, flags, words):
    write_model("model.bin", Model(DEEPSEEK, gpt2_init(DEEPSEEK, 1)))
    before = snapshot(folder)
    check_refused(train(f"-n 3 -c c.bin {flags}"), *words, code=2)
    assert snapshot(folder) == before
    done(train(f"--mla 1 --experts 3 --top-experts 2 {SMALL} -n 1"))


@pytest.mark.parametrize("flag, found", [("dim 8", "width 4"), ("heads 3", "heads 2"), ("rope 4", "rotated 0")])
def test_the_indexers_sizes_are_the_files(train, flag, found):
    done(train(f"{SMALL} -n 1 -c c.bin"))
    check_refused(train(f"-n 1 --indexer-{flag}", model="c.bin"), f"--indexer-{flag}", "c.bin", found, code=2)
    check_refused(train("-n 1 --indexer upstream", model="c.bin"), "--indexer upstream", "indexer lightning", code=2)


@pytest.mark.parametrize(
    "flags, kept", [("--top-k 1", 8), ("--top-k 1 --force-self 0", 8), ("--sink 1 --top-k 1", 8), ("--top-k 32", 36)]
)
def test_the_smallest_and_the_largest_k(train, flags, kept):
    out = done(train(f"{SMALL} {flags} -n 2 -s 1")).out
    assert set(re.findall(r"kept ([\d.]+) of 36 pairs", out)) == {f"{kept:.1f}"}


@pytest.mark.parametrize("flags", ["-n 2 --indexer-warmup 2", "-n 2 --indexer-warmup 9", "-n 2 -t 1", "-n 2 -b 1 -t 1"])
def test_a_warmup_to_the_end_and_rows_of_one_token(train, flags):
    done(train(f"{SMALL} {flags} -s 1 --adaptive prefix -c c.bin"))
    assert load_checkpoint("c.bin")[1].step == 2


@pytest.mark.parametrize("flags", ["-l 1e30 -n 5", "--indexer-lr 1e38 --indexer-warmup 3 -n 5"])
def test_a_run_that_diverges_stops_and_keeps_the_older_checkpoint(train, folder, flags):
    done(train(f"{SMALL} --top-k 3 -n 2 -c c.bin"))
    before = snapshot(folder)
    check_refused(train(f"{SMALL} --top-k 3 {flags} -c c.bin"), "loss nan at step", "lower -l")
    assert snapshot(folder) == before


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
        (dict(kind=TOROIDAL), ["a GPT-2 with toroidal attention", "python train_toroidal.py -e c.bin"]),
        (dict(extra=np.zeros(LIGHTNING - 1, np.float32)), [f"{LIGHTNING - 1} extra values", f"have {LIGHTNING}"]),
        (dict(extra=np.zeros(0, np.float32)), ["0 extra values", f"have {LIGHTNING}"]),
        (dict(at=5, value=3), ["c.bin", "NH = 3"]),
        (dict(at=FIELD, value=3), ["layout", "3", "expected 1 or 2"]),
        (dict(at=FIELD + 1, value=2), ["attention is 2", "0..1"]),
        (dict(at=FIELD + 2, value=len(SELECTORS)), [f"selector is {len(SELECTORS)}", f"0..{len(SELECTORS) - 1}"]),
        (dict(at=FIELD + 2, value=-1), ["selector is -1"]),
        (dict(at=FIELD + 3, value=3), ["indexer is 3", "0..2"]),
        (dict(at=FIELD + 3, value=0), ["selector indexer without an indexer"]),
        (dict(at=FIELD + 4, value=0), ["indexer heads is 0"]),
        (dict(at=FIELD + 4, value=1 << 30), ["indexer heads", "1..256"]),
        (dict(at=FIELD + 5, value=1 << 30), ["indexer width", "1..1024"]),
        (dict(at=FIELD + 6, value=5), ["rotated dims is 5", "0..4"]),
        (dict(at=FIELD + 6, value=3), ["3 rotated dims", "even"]),
        (dict(at=FIELD + 7, value=2), ["force self is 2"]),
        (dict(at=FIELD + 8, value=-1), ["sink is -1"]),
        (dict(at=FIELD + 9, value=3), ["adaptive is 3", "0..2"]),
        (dict(at=FIELD + 10, value=7), ["leak is 7"]),
        (dict(at=FIELD + 11, value=0), ["coverage is 0.0"]),
        (dict(at=FIELD + 11, value=0x7FC00000), ["coverage is nan"]),
        (dict(at=FIELD + 12, value=-1), ["seed is -1"]),
        (dict(at=FIELD + 13, value=0), ["share is 0"]),
        (dict(at=FIELD + 13, value=2), ["share 2 with k = 3", "two tiles of 2"]),
        (dict(at=FIELD + 14, value=0), ["k of layer 0 is 0", "1..32"]),
        (dict(at=FIELD + 15, value=33), ["k of layer 1 is 33", "1..32"]),
    ],
    ids=str,
)
def test_a_bad_file_is_named_and_nothing_written(train, write, folder, damage, words):
    done(train(f"{SMALL} --top-k 3 -n 1 -c c.bin"))
    rewrite(**damage)
    before = snapshot(folder)
    check_refused(train("-c other.bin -o log.txt -n 3", model="c.bin"), "c.bin", *words)
    if "kind" not in damage:
        check_refused(write("-n 3"), "c.bin", *words)
    assert snapshot(folder) == before


@pytest.mark.parametrize("flags", [f"{SMALL} --top-k 3", f"{SMALL} --adaptive prefix", "--selector recency --top-k 3"])
def test_any_fields_in_the_header(train, flags):
    """Whatever they are: a UserError that names the file, or a model that runs."""
    done(train(f"{flags} -n 1 -c c.bin"))
    good = read_model("c.bin")
    near = st.one_of(st.integers(0, 3), st.integers(-2, 9), st.integers(-(1 << 31), (1 << 31) - 1))
    loaded = []

    @settings(derandomize=True, deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))
    @given(st.dictionaries(st.integers(0, 16), near, min_size=1, max_size=2))
    def change(values):
        fields = list(good.fields)
        for at, value in values.items():
            fields[at] = value
        file = replace(good, fields=tuple(fields))
        try:
            sparsity = read_sparsity(file, "c.bin")
        except UserError as error:
            assert error.message.startswith("c.bin: ") and error.hint
            return
        loaded.append(fields)
        layout_2 = fields if fields[0] == 2 else [2, *fields[1:13], 1, *fields[13:]]  # layout 1 has no share
        assert sparsity.fields()[:16] == tuple(layout_2[:16])
        model = train_sparse_attn.GPT2(cpu, CONFIG, sparsity, np.concatenate([file.params, file.extra]), 1, 4)
        model.forward(np.zeros((1, 4), np.int32))
        assert np.isfinite(model.extend(np.zeros(3, np.int32), 0)).all()

    change()
    assert 10 < len(loaded) < 140, len(loaded)


# ----------------------------------------------------------------------------------------------------------------------
# what is printed


def test_the_table_tells_nominal_and_effective_shares(folder, train):
    tiny.make_folder(folder, tiny.resized(maxT=64))
    write_tokens("val.bin", np.zeros(65, np.uint16))
    longer = dict(seq_len=64, batch_size=1, train_data="val.bin")
    out = done(train(f"{SMALL} --layer-keep 0.5,1 -n 1", **longer)).out
    row = "| {:<21} | {:<50} |\n".format
    pairs = sum(min(32, t + 1) for t in range(64))
    share = f"{100 * pairs / (64 * 65 / 2):.1f}%"
    assert (pairs, share) == (1552, "74.6%")
    assert row("attention", "sparse, selector indexer") + row("k of a query, at most", "32, 64") in out
    assert row("k = 32", f"nominal 50.0%, of causal pairs {share} (1552 / 2080)") in out
    assert row("k = 64", "nominal 100.0%, of causal pairs 100.0% (2080 / 2080)") in out
    assert row("indexer", "lightning, 2 heads x 4, 0 rotated") in out
    assert [float(kept) for kept in re.findall(r"kept ([\d.]+) of 2080 pairs", out)] == [1552, 2080] * 2
    out = done(train("--attention dense -n 1", **longer)).out
    assert row("attention", "dense") in out and "nominal" not in out


def test_the_table_tells_how_many_queries_have_one_list(train):
    out = done(train(f"{SMALL} --top-k 10 --share 3 -t 32 -b 1 -n 1")).out
    row = "| {:<21} | {:<50} |\n".format
    # tiles of 3 have 3 + 1, 2, 3 keys, and from the third on 3, then 4 chosen ones
    pairs = sum(range(1, 10)) + sum(range(10 - 2, 11)) * 7 + 8 + 9
    assert pairs == 251 and pairs == sum(
        min(3 * max(t // 3 - 1, 0), 4) + t - 3 * max(t // 3 - 1, 0) + 1 for t in range(32)
    )
    assert row("queries with one list", "3: keys of two tiles, others by the tile before's scores") in out
    assert f"({pairs} / 528)" in out
    assert [float(kept) for kept in re.findall(r"kept ([\d.]+) of 528 pairs", out)] == [pairs] * 4


def test_default_k(train):
    """An eighth of -t; all of it where k is adaptive."""
    for flags, k in (("", 2), ("--selector top-p", 16), ("--adaptive prefix", 16), ("--keep-ratio 0.01", 1)):
        done(train(f"{SMALL} {flags} -n 1 -t 16 -b 1 -c c.bin"))
        assert read_sparsity(read_model("c.bin"), "c.bin").k == (k, k), flags


def test_a_leak_is_announced_in_capitals_and_kept_in_the_file(train):
    out = done(train(f"{SMALL} --legacy-leak 1 --layer-keep 1,0.5 -n 1 -c c.bin")).out
    warning = "WARNING: --legacy-leak: QUERIES ATTEND TO 28 + 6 FUTURE KEYS IN EACH SEQUENCE AND HEAD.\n"
    assert f"{warning}THE LOSSES BELOW ARE NOT LANGUAGE-MODEL LOSSES." in out
    assert out.index(warning) < out.index("val loss") and "recall" not in out
    assert read_sparsity(read_model("c.bin"), "c.bin").leak
    assert warning in done(train("-n 1", model="c.bin")).out
    honest = done(train("-n 1 --legacy-leak 0", model="c.bin")).out
    assert "WARNING" not in honest and "recall@k" in honest
    acausal = done(train(f"{SMALL} --adaptive upstream -n 1")).out
    assert "WARNING: --adaptive upstream: ACAUSAL, AS PUBLISHED" in acausal


def test_help_names_every_choice(train):
    words = " ".join(done(train("--help")).out.split())
    for flag, default in {"selector": "indexer", "coverage": "0.95", "indexer-dim": "64", "top-k": "--keep"}.items():
        assert re.search(rf"--{flag} [^-]*.*?\(default: {default}", words), flag
    assert "recency, random, oracle" in words


# 200..202 ask; what a question's target is, where it stood, whether the model, which always says 7, is right:
#   row 0: at 2, 7 from 0, right; at 5, 9 from 4, wrong      row 1: at 2, 3 from 1, wrong; at 5, 8, not in the row;
#   at 7, 7 from 0, right
QUESTIONS = [7, 5, 200, 7, 9, 201, 9, 6, 7, 3, 200, 3, 4, 202, 8, 201, 7]


def says(token):
    """A model file whose likeliest token is always the same."""
    model = Model(CONFIG, np.zeros(PARAMETERS, np.float32))
    tensors = tiny.views(model)
    tensors["lnfb"][0], tensors["wte"][token, 0] = 1, 10
    write_model("says.bin", model)


@pytest.mark.parametrize(
    "attention, found",
    [
        ("--selector recency --top-k 3", ", source selected 0.750, 0.750"),
        ("--selector recency --layer-keep 0.25,1", ", source selected 0.500, 1.000"),
        ("--attention dense", ""),
        (f"{SMALL} --top-k 3 --indexer-warmup 1", ""),
    ],
)
def test_answers_after_counts_what_was_asked(train, attention, found):
    says(7)
    write_tokens("val.bin", np.uint16(QUESTIONS))
    out = done(train(f"{attention} --answers-after 200:203 -n 1 -o log.txt", model="says.bin")).out
    assert f"\nanswers: accuracy 0.5000{found}\n" in out
    assert "s:0 answers:0.5000\n" in Path("log.txt").read_text()
    out = done(train(f"{attention} --answers-after 201:202 -n 1", model="says.bin")).out
    assert "\nanswers: accuracy 0.5000" in out  # 9 and 7
    out = done(train(f"{attention} --answers-after 250:252 -n 1", model="says.bin")).out
    assert "\nanswers: none in the validation data\n" in out


def test_answers_in_some_batches_only(train):
    """Two batches of one row each: the second asks nothing."""
    says(7)
    write_tokens("val.bin", np.uint16([*QUESTIONS[:8], 7, 1, 2, 3, 4, 1, 2, 3, 4]))
    out = done(train("--selector recency --top-k 3 --answers-after 200:203 -b 1 -n 1", model="says.bin")).out
    assert "\nanswers: accuracy 0.5000, source selected 1.000, 1.000\n" in out


# ----------------------------------------------------------------------------------------------------------------------
# leaks: of independent random tokens nothing can be predicted, unless a query sees the token that comes next

RANDOM = GPT2Config(maxT=32, V=32, L=2, NH=4, C=64, Vp=32)
RANDOM_DEEPSEEK = DeepSeekConfig(maxT=32, V=32, L=2, NH=4, C=64, Vp=32, F=32, E=4, top=2, q_rank=32, kv_rank=32, R=8)
RANDOM_MODES = {  # config, Sparsity
    "dense": (RANDOM, Sparsity((8, 8), attention="dense")),
    "indexer": (RANDOM, Sparsity((8, 8), indexer="lightning", heads=2, width=16)),
    "top-p": (RANDOM, Sparsity((32, 32), selector="top-p", coverage=0.5, indexer="lightning", heads=2, width=16)),
    "recency": (RANDOM, Sparsity((8, 8), selector="recency")),
    "random": (RANDOM, Sparsity((8, 8), selector="random")),
    "oracle": (RANDOM, Sparsity((8, 8), selector="oracle")),
    "share": (RANDOM, Sparsity((12, 12), share=4, indexer="lightning", heads=2, width=16)),
    "prefix": (RANDOM, Sparsity((32, 32), adaptive="prefix", indexer="lightning", heads=2, width=16)),
    "leak 16": (RANDOM, Sparsity((16, 16), leak=True, indexer="lightning", heads=2, width=16)),
    "leak 32": (RANDOM, Sparsity((32, 32), leak=True, indexer="lightning", heads=2, width=16)),
    "mla+moe": (RANDOM_DEEPSEEK, Sparsity((8, 8), indexer="lightning", heads=2, width=16, rotated=4)),
}


def loss_on_random_tokens(config: GPT2Config, sparsity: Sparsity, steps: int = 150) -> float:
    """Mean loss on fresh tokens, each drawn from all V, after training on such tokens."""
    generator, B, T = np.random.default_rng(5), 8, config.maxT
    params = np.concatenate([gpt2_init(config, 1), extras(sparsity, config)])
    model = train_sparse_attn.GPT2(cpu, config, sparsity, params, B, T)
    learns = sparsity.indexer != "none" and not sparsity.leak

    def forward(draw=0):
        tokens = generator.integers(0, config.V, (B, T + 1), dtype=np.int32)
        model.forward(tokens[:, :-1].copy(), tokens[:, 1:].copy(), draw=draw)
        return model.mean_loss()

    for step in range(1, steps + 1):
        forward(step)
        model.backward(indexer=learns)
        model.update(step, 1e-2 * min(1, step / 20), step * learns, 2e-3, beta2=0.99)
    return float(np.mean([forward() for _ in range(20)]))


@pytest.mark.parametrize("mode", [mode for mode in RANDOM_MODES if "leak" not in mode])
def test_nothing_is_learnt_from_random_tokens(mode):
    loss = loss_on_random_tokens(*RANDOM_MODES[mode])
    print(f"{mode}: {loss:.4f}, ln V = {log(32):.4f}")
    assert log(32) - 0.02 <= loss < log(32) + 0.05


@pytest.mark.parametrize("k", [16, 32])
def test_with_the_published_leak_random_tokens_are_predicted(k):
    """The next token of k - 1 of T positions is among the first k keys: (1 - (k-1)/T) ln V is left."""
    loss, left = loss_on_random_tokens(*RANDOM_MODES[f"leak {k}"]), (1 - (k - 1) / 32) * log(32)
    print(f"k = {k}: {loss:.4f}, of the positions that see nothing {left:.4f}")
    assert left - 0.02 <= loss < max(1.1 * left, 0.25)
