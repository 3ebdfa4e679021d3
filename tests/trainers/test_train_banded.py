"""train_banded.py as its users meet it: what it computes, prints and refuses, mistyped and on a full disk."""

import errno
import os
import re
import shlex
import subprocess
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import tiny
from tiny import (
    CONFIG,
    NUMBER,
    B,
    T,
    assert_same_run,
    check_refused,
    done,
    losses,
    snapshot,
    table,
    texts,
    val_losses,
)

import train_banded
from llmc.checkpoint import (
    BANDED,
    DENSE,
    MATRICES,
    DeepSeekConfig,
    Model,
    named_views,
    num_parameters,
    read_model,
    tensor_shapes,
    write_model,
)
from llmc.dataloader import write_tokens
from llmc.resume import load_checkpoint
from llmc.tokenizer import Tokenizer, byte_tokenizer

SCRIPT = "train_banded.py"
L, C = CONFIG.L, CONFIG.C
FULL = 8 * C - 2  # the smallest bandwidth that leaves nothing out
needs_full_device = pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")


@pytest.fixture
def train(folder, capfdbinary):
    """train("-w 8 -n 3", grad_accum=2) -> Result: the trainer on the tiny files, in this process."""
    return lambda flags="", **changed: tiny.call(
        capfdbinary, train_banded.main, *tiny.options(**changed), *shlex.split(flags)
    )


# ----------------------------------------------------------------------------------------------------------------------
# the band


def band(bandwidth):
    """Which of (4C,C) the reference keeps, straight from |j - 4i| <= bandwidth / 2."""
    j, i = np.mgrid[: 4 * C, :C]
    return abs(j - 4 * i) <= bandwidth / 2


def saved(path="c.bin"):
    """The tensors of a checkpoint's parameters, m and v, and its header's kind and bandwidths."""
    model, state = load_checkpoint(path)
    shapes = tensor_shapes(model.config)
    return *(named_views(flat, shapes) for flat in (model.params, state.m, state.v)), model.kind, model.fields[:2]


@pytest.mark.parametrize(
    "flags, fc1, fc2",
    [("-w 16", 16, 0), ("-w 7", 7, 0), ("-1 9 -2 24", 9, 24), ("-2 6", 0, 6), ("-1 20 -2 0", 20, 0), ("-d 1", 0, 0)],
)
@pytest.mark.parametrize("mask_init", [0, 1])
def test_weights_m_and_v_are_zero_outside_the_band_and_only_there(train, flags, fc1, fc2, mask_init):
    done(train(f"{flags} -n 3 -c c.bin -l 0.01 --mask-init {mask_init}"))
    params, m, v, kind, fields = saved()
    assert (kind, fields) == (BANDED if fc1 or fc2 else DENSE, (fc1, fc2))
    fc1_kept = band(fc1) if fc1 else np.ones((4 * C, C), bool)
    fc2_kept = band(fc2).T if fc2 else np.ones((C, 4 * C), bool)
    for name, kept in (("fcw", fc1_kept), ("fcprojw", fc2_kept)):
        for tensors in (params, m, v):
            assert np.array_equal(tensors[name] != 0, np.broadcast_to(kept, tensors[name].shape))
    for name in ("qkvw", "attprojw", "fcb", "fcprojb"):
        assert np.all(m[name][..., 0] != 0)
    assert np.all(params["wte"][CONFIG.V :] == 0)


@pytest.mark.parametrize("flags", ["-w 9", "-1 9 -2 24"])
def test_mask_init_decides_on_the_loss_before_the_first_step(train, flags):
    first = {}
    for mask_init in (0, 1):
        first[mask_init] = val_losses(done(train(f"{flags} --mask-init {mask_init} -n 1")).out)[0]
    dense = val_losses(done(train("-d 1 -n 1")).out)[0]
    model = read_model("model.bin")
    tensors = tiny.views(model)
    tensors["fcw"] *= band(9)
    if "-2" in flags:
        tensors["fcprojw"] *= band(24).T
    write_model("masked.bin", model)
    masked = val_losses(done(train("-d 1 -n 1", model="masked.bin")).out)[0]
    assert first == {0: dense, 1: masked} and dense != masked


@pytest.mark.parametrize("flags", ["-w 9", "-1 9 -2 24 --mask-init 0", "-2 12 --grad-accum 2"])
def test_both_kernels_train_the_same(train, flags):
    """Products of the band alone, or dense ones and masks: losses as close as rounding leaves them, the same zeros."""
    runs, tensors = [], []
    for kernel in ("band", "mask"):
        runs.append(done(train(f"{flags} --kernel {kernel} -n 4 -l 0.01 -c c.bin")).out)
        tensors.append(saved()[0])
    band_losses, mask_losses = (list(tiny.losses(out).values()) for out in runs)
    assert np.allclose(band_losses, mask_losses, rtol=0, atol=2e-6) and len(band_losses) == 4
    for name in ("fcw", "fcprojw"):
        assert np.array_equal(tensors[0][name] == 0, tensors[1][name] == 0)
        assert np.abs(tensors[0][name] - tensors[1][name]).max() < 1e-4
    assert ["dense products, then masks" in out for out in runs] == [False, True]


def test_band_init_scales_each_row_to_its_fan_in(train):
    model = read_model("model.bin")
    tensors = tiny.views(model)
    for name, kept in (("fcw", band(9)), ("fcprojw", band(24).T)):
        fan_in = np.maximum(kept.sum(axis=1, keepdims=True), 1)
        tensors[name] *= kept * np.sqrt(kept.shape[1] / fan_in).astype(np.float32)
    write_model("scaled.bin", model)
    expected = val_losses(done(train("-d 1 -n 1", model="scaled.bin")).out)[0]
    out = done(train("-1 9 -2 24 --band-init fan-in -n 2 -c c.bin")).out
    assert val_losses(out)[0] == expected != val_losses(done(train("-1 9 -2 24 -n 1")).out)[0]
    assert "| Band init             | rows scaled by sqrt(inputs / kept inputs)" in out
    assert read_model("c.bin").fields[:3] == (9, 24, 1)

    done(train("-n 1 -c again.bin", model="c.bin"))  # scaled once is enough, and remembered
    done(train("--resume c.bin -n 3"))
    assert read_model("again.bin").fields[:3] == read_model("c.bin").fields[:3] == (9, 24, 1)
    check_refused(train("-n 1 --band-init fan-in", model="c.bin"), "c.bin", "already", code=2)
    check_refused(train("-w 9 -n 1 --band-init fan-in --mask-init 0"), "--band-init", "--mask-init", code=2)
    check_refused(train("--resume c.bin -n 4 --band-init fan-in"), "--resume", "--band-init", code=2)
    check_refused(train("-d 1 -n 1 --band-init fan-in"), "--band-init", "no band", code=2)


def test_permute_puts_hidden_units_anywhere_along_the_band_of_fc1(train, folder):
    """Unit j keeps the channels of its place in a random order; FC2's band stays. The file is an ordinary GPT-2."""
    draws = np.random.RandomState(5).randint(0, 1 << 32, 4 * C - 1, np.uint64).tolist()  # MT19937's words
    order = list(range(4 * C))
    for i, draw in zip(range(4 * C - 1, 0, -1), draws):  # llm.c random_permutation
        order[i], order[draw % (i + 1)] = order[draw % (i + 1)], order[i]
    fc1 = np.empty((4 * C, C), bool)
    fc1[order] = band(9)  # place p of the band is unit order[p]
    assert not np.array_equal(fc1, band(9))
    model = read_model("model.bin")
    tensors = tiny.views(model)
    tensors["fcw"] *= fc1
    tensors["fcprojw"] *= band(24).T
    write_model("masked.bin", model)
    expected = val_losses(done(train("-d 1 -n 1", model="masked.bin")).out)[0]

    out = done(train("-1 9 -2 24 --permute 5 -n 3 -l 0.01 -s 3 -c c.bin")).out
    assert abs(val_losses(out)[0] - expected) < 2e-6 and "in random order (seed 5)" in out
    params, m, v, _, _ = saved()
    for tensors in (params, m, v):
        for name, kept in (("fcw", fc1), ("fcprojw", band(24).T)):
            assert np.array_equal(tensors[name] != 0, np.broadcast_to(kept, tensors[name].shape))
    assert read_model("c.bin").fields[:4] == (9, 24, 0, 5)
    last = val_losses(out)[-1]
    assert abs(val_losses(done(train("-d 1 -n 1", model="c.bin")).out)[0] - last) < 2e-6
    masked = done(train("-1 9 -2 24 --permute 5 -n 3 -l 0.01 --kernel mask")).out
    assert abs(val_losses(masked)[-1] - last) < 2e-6

    done(train("-1 9 -2 24 --permute 5 -n 2 -l 0.01 -c two.bin"))
    done(train("--resume two.bin -n 3"))
    assert read_model("two.bin").params.tobytes() == read_model("c.bin").params.tobytes()
    check_refused(train("--resume two.bin -n 4 --permute 6"), "--resume", "--permute", code=2)
    check_refused(train("-2 24 -n 1 --permute 6"), "--permute", "FC1 is dense", code=2)


def run_with(train, flags):
    result = done(train(f"{flags} -n 5 -v 2 -c c.bin -o log.txt"))
    return read_model("c.bin").params.tobytes(), Path("log.txt").read_bytes(), result.out


def test_w_is_the_first_band_alone(train):
    assert run_with(train, "-w 12")[:2] == run_with(train, "-1 12 -2 0")[:2] == run_with(train, "-1 12")[:2]


def test_w_0_and_1_keep_the_centres(train):
    zero, one, two = (run_with(train, f"-w {bandwidth}") for bandwidth in (0, 1, 2))
    assert zero[:2] == one[:2] != two[:2]
    connections = f"| FC1 connections       | {L * C} / {L * 4 * C * C} (per layer: {C} / {4 * C * C})              |\n"
    assert connections in zero[2] and connections in one[2]


def test_a_band_that_covers_all_warns_and_is_dense_to_the_bit(train):
    dense, full, nearly = (run_with(train, flags) for flags in ("-d 1", f"-w {FULL}", f"-w {FULL - 1}"))
    warning = f"WARNING: FC1 bandwidth {FULL} covers all of {4 * C} x {C}: FC1 is dense\n"
    assert full[:2] == dense[:2] and warning in full[2] and "density=100.0%" in full[2]
    assert nearly[:2] != dense[:2] and "WARNING" not in nearly[2] + dense[2]
    both = run_with(train, f"-1 {FULL} -2 {FULL}")
    assert both[:2] == dense[:2] and both[2].count("WARNING") == 2


@pytest.mark.parametrize("flags, bands", [("", (9, 24)), ("-w 6", (6, 0)), ("-d 1", (0, 0)), ("-2 4", (0, 4))])
def test_a_banded_file_keeps_its_bands_unless_told_otherwise(train, flags, bands):
    done(train("-1 9 -2 24 -n 1 -c banded.bin"))
    done(train(f"{flags} -n 1 -c c.bin", model="banded.bin"))
    assert read_model("c.bin").fields[:2] == bands


# ----------------------------------------------------------------------------------------------------------------------
# what is printed

RULE = "+-----------------------+----------------------------------------------------+"
OPTIONS = """\
| model path            | model.bin                                          |
| checkpoint path       | NULL                                               |
| checkpoint_every      | 0                                                  |
| train data pattern    | train_*.bin                                        |
| val data pattern      | val.bin                                            |
| output log file       | NULL                                               |
| max_steps             | 1                                                  |
| batch size B          | 2                                                  |
| sequence length T     | 8                                                  |
| learning rate         | 0.000300                                           |
| val_loss_every        | 20                                                 |
| val_max_steps         | 20                                                 |
| sample_every          | 20                                                 |
| genT                  | 12                                                 |"""
SIZES = """\
| max_sequence_length T | 32                                                 |
| vocab_size V          | 256                                                |
| padded_vocab_size Vp  | 320                                                |
| num_layers L          | 2                                                  |
| num_heads NH          | 2                                                  |
| channels C            | 16                                                 |
| num_parameters        | 12224                                              |"""


def row(label, value):
    return f"| {label:<21} | {value:<50} |"


def one_band(mode, bandwidth):
    return [f"| BANDED SPARSITY       | {mode} (bandwidth={bandwidth})                          |"]


def two_bands(fc1, fc2, mode):
    return [row("FC1 bandwidth", fc1), row("FC2 bandwidth", fc2), row("Sparsity mode", mode)]


FC1_16 = [
    "| FC1 banded mask       | bandwidth=16, density=24.8%                       |",
    "| FC1 connections       | 508 / 2048 (per layer: 254 / 1024)              |",
]
FC2_64 = [
    "| FC2 banded mask       | bandwidth=64, density=75.8%                       |",
    "| FC2 connections       | 1552 / 2048 (per layer: 776 / 1024)              |",
]
FC1_DENSE, FC2_DENSE = row("FC1", "DENSE (bandwidth=0)"), row("FC2", "DENSE (bandwidth=0)")
INITIAL, LATER = "initial weights masked", "gradients + post-update only"
# flags: the first rows, and those of the masks
BANDS = {
    "-w 16": (one_band("ENABLED", 16), [*FC1_16, row("FC1 mask applied", INITIAL)]),
    "-w 16 --mask-init 0": (one_band("ENABLED", 16), [*FC1_16, row("FC1 mask mode", LATER)]),
    "-d 1": (one_band("DISABLED", 0), []),
    "-1 16 -2 64": (two_bands(16, 64, "BANDED (FC1 + FC2)"), [*FC1_16, *FC2_64, row("Mask mode", INITIAL)]),
    "-2 64 --mask-init 0": (two_bands(0, 64, "BANDED (FC2 only)"), [FC1_DENSE, *FC2_64, row("Mask mode", LATER)]),
    "-1 16": (two_bands(16, 0, "BANDED (FC1 only)"), [*FC1_16, FC2_DENSE, row("Mask mode", INITIAL)]),
    "-1 0": (two_bands(0, 0, "DENSE (no sparsity)"), [FC1_DENSE, FC2_DENSE]),
}


@pytest.mark.parametrize("flags", BANDS)
def test_the_parameter_table_is_the_references(train, flags):
    assert (np.count_nonzero(band(16)), np.count_nonzero(band(64))) == (254, 776)  # of 1024: 24.8 %, 75.8 %
    lines = done(train(f"{flags} -n 1")).out.split("allocated")[0].splitlines()
    device = next(line for line in lines if line.startswith("| device"))
    first_rows, masks = BANDS[flags]
    expected = [RULE, row("Parameter", "Value"), RULE, *first_rows, *OPTIONS.split("\n"), RULE]
    expected += [device, row("TF32", "disabled"), RULE, *SIZES.split("\n"), RULE, *masks, RULE]
    assert lines == [*expected, row("train_num_batches", 1), row("val_num_batches", 3), RULE]


def test_the_lines_of_a_run_and_their_order(train):
    lines = done(train("-w 16 -n 4 -v 2 -k 3 -s 3 -c c.bin")).out.partition("allocated")[2].splitlines()
    val = rf"val loss {NUMBER}"
    save = ["saving checkpoint to c.bin", r"checkpoint saved \(12224 parameters, 0\.05 MB\)"]
    text = ["generating:", "---", "[ -~]*", "---"]
    step = [rf"step    {i}/4: train loss {NUMBER} \({NUMBER} ms, [0-9]+ tok/s\)" for i in range(5)]
    first_use = ["parameter gradients", "activation gradients", "AdamW optimizer state m", "AdamW optimizer state v"]
    expected = [" 0 MiB for model parameters", "allocated 0 MiB for activations", val]
    expected += [f"allocated 0 MiB for {what}" for what in first_use]
    expected += [step[1], step[2], val, step[3], *save, *text, step[4], val, *save, *text]
    expected += [rf"total average iteration time: {NUMBER} ms", "device: CPU, .*"]
    expected += ["text from it: python .*generate.py -e c.bin"]
    assert len(lines) == len(expected)
    for line, pattern in zip(lines, expected):
        assert re.fullmatch(pattern, line), (line, pattern)


def test_log_counts_train_steps_from_0_and_is_written_as_it_happens(train, monkeypatch):
    seen = []
    learning_rate = train_banded.learning_rate

    def then_look(schedule, step, **settings):
        seen.append(Path("log.txt").read_text())
        return learning_rate(schedule, step, **settings)

    monkeypatch.setattr(train_banded, "learning_rate", then_look)
    Path("log.txt").write_text("s:0 tel:9.0000\ns:7 trl:9.0000\n")  # of an older run
    result = done(train("-n 3 -v 2 -o log.txt"))
    val, loss = val_losses(result.out), losses(result.out)
    assert len(val) == 3 and list(loss) == [1, 2, 3]
    lines = [f"s:0 tel:{val[0]:.4f}\n", f"s:0 trl:{loss[1]:.4f}\n", f"s:1 trl:{loss[2]:.4f}\n"]
    lines += [f"s:2 tel:{val[1]:.4f}\n", f"s:2 trl:{loss[3]:.4f}\n", f"s:3 tel:{val[2]:.4f}\n"]
    assert Path("log.txt").read_text() == "".join(lines)
    assert seen == ["".join(lines[:n]) for n in (1, 2, 4)]


def test_what_is_no_log_and_no_model_is_not_overwritten(train):
    """-o names a model, -c a data file: refused, and both still there to the byte."""
    before = {name: Path(name).read_bytes() for name in ("model.bin", "val.bin")}
    check_refused(train("-n 1 -o val.bin"), "-o val.bin", "line 1", "expected s:STEP")
    check_refused(train("-n 1 -c val.bin"), "-c val.bin", "not a model file")
    assert {name: Path(name).read_bytes() for name in before} == before


@pytest.mark.parametrize("flags", ["--seed 3", "--mask-init 0", "-w 8", "-e model.bin"])
def test_resume_refuses_what_it_has_from_the_checkpoint(train, flags):
    done(train("-n 1 -c checkpoint.bin"))
    check_refused(train(f"--resume checkpoint.bin -n 2 {flags}"), "--resume", code=2)


@pytest.mark.parametrize("value", ["1", "1.5", "-0.1", "nan"])
def test_beta2_is_below_one(train, value):
    check_refused(train(f"-n 1 --beta2 {value}"), "--beta2", value, code=2)


def test_without_a_tokenizer_token_ids_are_printed(train):
    Tokenizer(byte_tokenizer().tokens, CONFIG.V - 1).write("byte_tokenizer.bin")  # starts a text as no tokenizer does
    with_text = texts(done(train("-n 2 -s 1")).out)
    Path("byte_tokenizer.bin").unlink()
    result = done(train("-n 2 -s 1"))
    assert "---\nWARNING: no tokenizer file for a vocabulary of 256 beside model.bin" in result.out
    assert "\n---> HINT: " in result.out
    with_ids = [list(map(int, text.split(" ")[:-1])) for text in texts(result.out)]
    assert [len(ids) for ids in with_ids] == [11, 11]
    assert [b"".join(map(byte_tokenizer().printable, ids)).decode() for ids in with_ids] == with_text


def test_one_epoch_is_the_default_and_zero_turns_events_off(train):
    result = done(train("-n -1 -v 0 -s 0 -m 0"))
    tokens = sum(samples * B * T + 1 for samples in tiny.TRAIN_SAMPLES)
    assert len(losses(result.out)) == tokens // (B * T) == 7
    assert len(val_losses(result.out)) == 2 and texts(result.out) == []
    assert table(result.out)["val_num_batches"] == str(tiny.VAL_SAMPLES)
    assert table(done(train("-n 1 -m 2")).out)["val_num_batches"] == "2"
    check_refused(train("--grad-accum 8"), "--grad-accum 8", "7 batches", "-n")


def test_help_shows_every_flag_with_its_default(train):
    result = done(train("--help"))
    words = " ".join(result.out.split())
    for flag, default in {
        "bandwidth": "256",
        "steps": "-1",
        "beta2": "0.999",
        "mask-init": "1",
        "checkpoint": "none",
    }.items():
        assert re.search(rf"--{flag} [A-Z0-9_]+ [^(]*\(default: {re.escape(default)}\b", words), flag
    assert "\n  python train_banded.py --resume checkpoint.bin " in result.out


# ----------------------------------------------------------------------------------------------------------------------
# what is refused


@pytest.mark.parametrize(
    "flags, words",
    [
        ("-w 8 -1 8", ["-w or -d given together with -1 or -2"]),
        ("-d 0 -2 8", ["-w or -d given together with -1 or -2"]),
        ("-w -1", ["-w/--bandwidth", "'-1'"]),
        ("-1 1.5", ["-1/--fc1-bandwidth", "'1.5'"]),
        ("-d 2", ["-d/--dense", "'2'", "expected 0 or 1"]),
        ("--mask-init yes", ["--mask-init", "'yes'"]),
        ("-n", ["-n: its value is missing"]),
        ("-n 3x", ["-n/--steps", "'3x'"]),
        ("-n ''", ["-n/--steps", "''"]),
        ("-n --", ["-n: -- is no value"]),
        ("-b 0", ["-b/--batch-size", "'0'"]),
        ("-t 0", ["-t/--seq-len", "'0'"]),
        ("-t 33", ["-t 33", "32 positions", "-t 32"]),
        ("-g 33", ["-g 33", "32 positions", "-g 32"]),
        ("-l 0", ["-l/--lr", "'0'"]),
        ("-l nan", ["-l/--lr", "'nan'"]),
        ("-l 1e39", ["-l/--lr", "'1e39'"]),
        ("-v -1", ["-v/--val-every", "'-1'"]),
        ("--warmup 1.5", ["--warmup", "'1.5'"]),
        ("--beta2 1.1", ["--beta2", "'1.1'"]),
        ("--seed 0", ["--seed", "'0'"]),
        ("--lr-schedule cosin", ["--lr-schedule", "cosin"]),
        ("--device gpu", ["--device", "gpu"]),
        ("-x 1", ["-x: unknown flag"]),
        ("-n5", ["-n5: unknown flag", "-n 5"]),
        ("--step 5", ["--step: unknown flag", "--steps"]),
        ("5", ["5: expected a flag"]),
    ],
)
def test_wrong_usage_exits_2_and_writes_nothing(train, folder, flags, words):
    before = snapshot(folder)
    check_refused(train(f"-c c.bin -o log.txt {flags}"), *words, code=2)
    assert snapshot(folder) == before


def header_changed(path, index, value):
    data = bytearray(Path(path).read_bytes())
    data[4 * index : 4 * index + 4] = int(value).to_bytes(4, "little", signed=True)
    Path(path).write_bytes(data)


def cut(path, count):
    Path(path).write_bytes(Path(path).read_bytes()[:-count])


def add_token(path, token):
    tokens = np.frombuffer(Path(path).read_bytes(), "<u2", offset=1024)
    write_tokens(path, np.append(tokens[:-1], np.uint16(token)))


def short_data():
    write_tokens("train_01.bin", np.zeros(B * T, np.uint16))


def negative_band():
    model = read_model("model.bin")
    model.kind, model.fields = BANDED, (16, -4)
    write_model("model.bin", model)


def negative_seed():
    model = read_model("model.bin")
    model.kind, model.fields = BANDED, (16, 4, 0, -5)
    write_model("model.bin", model)


def model_with_experts():
    config = DeepSeekConfig(**asdict(CONFIG), F=8, E=2, top=1)
    write_model("model.bin", Model(config, np.zeros(num_parameters(config), np.float32)))


def small_tokenizer():
    Tokenizer(byte_tokenizer().tokens[:255], 0).write("byte_tokenizer.bin")


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda: Path("model.bin").unlink(), ["reading model.bin", "make model"]),
        (lambda: header_changed("model.bin", 0, 20240520), ["model.bin: not a model file", "20240520", "20240326"]),
        (lambda: header_changed("model.bin", 1, 4), ["model.bin", "version 4", "expected 3 or 5"]),
        (lambda: header_changed("model.bin", 5, 3), ["model.bin", "NH = 3"]),
        (
            lambda: header_changed("model.bin", 130, 3),
            ["model.bin: a GPT-2 with toroidal attention", "python train_toroidal.py -e model.bin"],
        ),
        (lambda: header_changed("model.bin", 130, 9), ["model.bin: kind 9"]),
        (model_with_experts, ["model.bin: a model with MLA or MoE", "python train_sparse_attn.py -e model.bin"]),
        (lambda: cut("model.bin", 1), ["model.bin: model file is truncated"]),
        (lambda: Path("model.bin").write_bytes(b""), ["model.bin", "found 0 bytes"]),
        (negative_band, ["model.bin: FC2 bandwidth is -4, expected 0..2147483647"]),
        (negative_seed, ["model.bin", "is -5, expected 0..2147483647"]),
        (lambda: Path("val.bin").unlink(), ["val.bin: no such token data", "make data"]),
        (lambda: [path.unlink() for path in Path().glob("train_*")], ["train_*.bin: no such token data"]),
        (lambda: header_changed("train_01.bin", 0, 1), ["train_01.bin: not a token data file"]),
        (lambda: header_changed("val.bin", 1, 2), ["val.bin", "version 2"]),
        (lambda: cut("train_00.bin", 2), ["train_00.bin: token data file is truncated"]),
        (short_data, ["train_01.bin: 16 tokens, B = 2, T = 8 needs at least 17", "lower -b or -t"]),
        (lambda: header_changed("byte_tokenizer.bin", 0, 7), ["byte_tokenizer.bin: not a tokenizer file"]),
        (lambda: cut("byte_tokenizer.bin", 1), ["byte_tokenizer.bin"]),
        (small_tokenizer, ["byte_tokenizer.bin: 255 tokens, model.bin has a vocabulary of 256"]),
    ],
)
def test_a_bad_file_is_named_and_nothing_written(train, folder, damage, words):
    damage()
    before = snapshot(folder)
    check_refused(train("-c c.bin -o log.txt -n 3"), *words)
    assert snapshot(folder) == before


@pytest.mark.parametrize("name", ["train_00.bin", "val.bin"])
def test_a_token_beyond_the_vocabulary(train, name):
    done(train("-n 2 -c c.bin"))
    before = Path("c.bin").read_bytes()
    add_token(name, CONFIG.V)
    result = train("-n 20 -c c.bin")
    check_refused(result, f"{name}: token", f"is {CONFIG.V}, the model knows 0..{CONFIG.V - 1}", "another tokenizer")
    assert Path("c.bin").read_bytes() == before and load_checkpoint("c.bin")[1].step == 2


@pytest.mark.parametrize(
    "flags, words",
    [
        ("-c none/c.bin", ["-c", "none", "mkdir -p"]),
        ("-c .", ["-c", "not an ordinary file"]),
        ("-c model.bin/c.bin", ["-c", "model.bin"]),
        ("-o none/log.txt", ["-o none/log.txt", "mkdir -p none"]),
        ("-o .", ["-o .: not an ordinary file"]),
        ("--tokenizer none.bin", ["none.bin"]),
        ("--tokenizer val.bin", ["val.bin: not a tokenizer file"]),
        ("-e model.bin/", ["model.bin/"]),
        ("-i .", ["."]),
        ("-e ''", ["reading"]),
        ("-o ''", ["-o"]),
    ],
)
def test_names_that_cannot_be_read_or_written(train, folder, flags, words):
    before = snapshot(folder)
    check_refused(train(f"-n 3 {flags}"), *words)
    assert snapshot(folder) == before


def test_where_one_may_not_write(train, folder, monkeypatch):
    """As an ordinary user meets it; root, as whom tests may run, may write anywhere."""

    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    before = snapshot(folder)
    monkeypatch.setattr("llmc.logger.open", refuse, raising=False)
    check_refused(train("-n 3 -o log.txt"), "-o log.txt: Permission denied", "ls -l")
    monkeypatch.setattr(os, "access", lambda *_: False)
    check_refused(train("-n 3 -c c.bin"), "-c", "c.bin: its folder may not be written to", "ls -ld")
    assert snapshot(folder) == before


def test_cuda_on_a_machine_without(train, folder, monkeypatch):
    monkeypatch.setattr("kernels.driver.LIBRARY", "no such library")
    before = snapshot(folder)
    result = train("-n 3 -c c.bin --device cuda")
    check_refused(result, "--device cuda: no NVIDIA driver", 'pip install "cupy-cuda12x[ctk]"', "--device cpu")
    assert snapshot(folder) == before


@needs_full_device
@pytest.mark.parametrize("flag", ["-o", "-c"])
def test_a_full_device(train, folder, flag):
    before = snapshot(folder)
    check_refused(train(f"-n 3 {flag} /dev/full"), f"{flag} /dev/full")
    assert snapshot(folder) == before


@pytest.mark.parametrize("failing", [1, 3], ids=["state", "model"])
def test_no_space_left_for_a_save_keeps_the_one_before(train, folder, monkeypatch, failing):
    """The disk is full from the second save's state on, or from its model file on."""
    done(train("-n 20 -c whole.bin -o whole.txt"))
    fsync, calls = os.fsync, []

    def full(number):
        calls.append(number)
        if len(calls) >= 4 + failing:  # a save syncs a file and its folder twice
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(number)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        result = train("-n 20 -k 5 -c c.bin -o log.txt")
    check_refused(result, "c", "No space left", "df -h")
    assert list(losses(result.out))[-1] == 10 and load_checkpoint("c.bin")[1].step == 5
    assert not list(folder.glob(".*")) + list(folder.glob("*.tmp"))
    done(train("--resume c.bin"))
    assert_same_run("whole.bin", "c.bin")
    assert Path("whole.txt").read_bytes() == Path("log.txt").read_bytes()
    assert len(list(folder.glob("c_state_*"))) == 1


@pytest.mark.parametrize("flags", ["-l 1e30 -n 1", "-l 1e30 -n 5", "-l 1e30 -n 5 -v 1"])
def test_a_run_that_diverges_stops_and_keeps_the_older_checkpoint(train, folder, flags):
    done(train("-n 2 -c c.bin"))
    before = snapshot(folder)
    result = train(f"{flags} -c c.bin")
    check_refused(result, "loss nan at step", "lower -l")
    assert snapshot(folder) == before


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_model_of_no_numbers_is_named(train, value):
    model = read_model("model.bin")
    tiny.views(model)["lnfw"][:] = value
    write_model("bad.bin", model)
    check_refused(train("-n 5", model="bad.bin"), "val loss ", "bad.bin")


@needs_full_device
def test_standard_output_may_be_closed_full_or_given_up(folder):
    flags = [*tiny.options(steps=3), "-c", "c.bin"]
    words = shlex.join(tiny.command(SCRIPT, *flags))

    def shell(rest):
        return subprocess.run(
            ["bash", "-c", words + rest], cwd=folder, env=tiny.one_thread(), capture_output=True, text=True
        )

    for rest in (" >&-", " 2>&-", " >&- 2>&-"):
        (folder / "c.bin").unlink(missing_ok=True)
        result = shell(rest)
        assert (result.returncode, result.stderr) == (0, "") and load_checkpoint(folder / "c.bin")[1].step == 3
    result = shell(" >/dev/full")
    check_refused(tiny.Result(result.returncode, "", result.stderr), "writing the output: No space left on device")
    result = shell(" -n 100000 | head -2; exit ${PIPESTATUS[0]}")
    assert (result.returncode, result.stderr, result.stdout.count("\n")) == (141, "", 2)


# ----------------------------------------------------------------------------------------------------------------------
# llm.c's options


def test_overfit_batch_sees_the_first_validation_batch_at_every_step(train):
    result = done(train("--overfit-batch 1 -d 1 -n 40 -l 0.003 -v 1 -m 1 -s 0"))
    val, loss = val_losses(result.out), list(losses(result.out).values())
    assert val[:-1] == loss  # same weights, same tokens
    assert np.all(np.diff(loss) < 0.01) and val[-1] < 0.7 * val[0]


def test_grad_accum_of_two_halves_is_a_batch_twice_as_large(train, folder):
    text = np.resize(np.frombuffer(tiny.VERSE, np.uint8), 12 * B * T + 1).astype(np.uint16)
    write_tokens("one.bin", text)
    runs = []
    for flags in ("-b 2 --grad-accum 2", "-b 4"):
        done_run = done(train(f"-w 16 --shuffle 0 -n 9 {flags} -c c.bin -l 0.001", train_data="one.bin"))
        runs.append((np.array(list(losses(done_run.out).values())), load_checkpoint("c.bin")[1]))
    assert np.abs(runs[0][0] - runs[1][0]).max() < 1e-5
    for name in ("m", "v"):
        one, other = getattr(runs[0][1], name), getattr(runs[1][1], name)
        assert np.linalg.norm(one - other) < 1e-4 * np.linalg.norm(other)


def test_learning_rate_schedule_and_warmup(train):
    flags = "--lr-schedule cosine --warmup 3 --final-lr-frac 0.1 -l 0.001 -n 7 --grad-clip 1e9"
    rates = re.findall(r"^lr (\S+), gradient norm [0-9.]+$", done(train(flags)).out, re.M)
    decayed = [1e-4 + (1 + np.cos(np.pi * i / 4)) / 2 * 9e-4 for i in range(4)]
    assert rates == [f"{rate:.2e}" for rate in (1e-3 / 3, 2e-3 / 3, 1e-3, *decayed)]


def one_step(train, flags):
    """Parameters, m and v after one update with learning rate 0.01, and what was printed."""
    result = done(train(f"-d 1 -n 1 -l 0.01 -c c.bin {flags}"))
    params, m, v, *_ = saved()
    return params, m, v, result.out


@pytest.mark.parametrize("decay_all", [0, 1])
def test_weight_decay_takes_its_part_of_the_weights(train, decay_all):
    """w -= lr * decay * w, of the matrices or of all."""
    before = tiny.views(read_model("model.bin"))
    plain, decayed = one_step(train, "")[0], one_step(train, f"--weight-decay 0.5 --decay-all {decay_all}")[0]
    for name, weights in before.items():
        if decay_all or name in MATRICES:
            assert np.allclose(plain[name] - decayed[name], 0.01 * 0.5 * weights, rtol=0, atol=3e-7), name
        else:
            assert plain[name].tobytes() == decayed[name].tobytes(), name
    assert np.all(before["ln1w"] == 1) and np.all(before["wpe"] != 0)  # so that decay shows


def test_grad_clip_scales_the_gradients(train):
    """After one update m = 0.1 g and v = 0.001 g^2."""
    _, m, v, plain = one_step(train, "")
    flat = np.concatenate([tensor.ravel() for tensor in m.values()]).astype(np.float64)
    norm = np.linalg.norm(flat) / 0.1
    for clip in (0.25 * norm, 4 * norm):
        _, clipped_m, clipped_v, out = one_step(train, f"--grad-clip {clip}")
        assert abs(float(re.search(r"^lr 1.00e-02, gradient norm ([0-9.]+)$", out, re.M)[1]) - norm) < 1e-4
        scale = min(1, clip / norm)
        for name in m:
            assert np.allclose(clipped_m[name], scale * m[name], rtol=1e-5, atol=1e-12)
            assert np.allclose(clipped_v[name], scale**2 * v[name], rtol=1e-5, atol=1e-20)
    assert "gradient norm" not in plain


def test_beta2_weighs_the_new_square(train):
    _, m, v, _ = one_step(train, "--beta2 0.9")
    for name in m:
        assert np.allclose(v[name], 0.1 * (m[name] / 0.1) ** 2, rtol=1e-4, atol=1e-20)


def test_seed_changes_the_order_and_the_samples(train):
    runs = {}
    for flags in ("", "--seed 42", "--seed 1337", "--seed 7"):
        result = done(train(f"-n 7 -s 7 {flags}"))
        runs[flags] = list(losses(result.out).values()), texts(result.out)
    default = runs[""]
    assert runs["--seed 42"][0] == default[0] and runs["--seed 42"][1] != default[1]  # llm.c's shuffle, other samples
    assert runs["--seed 1337"][0] != default[0] and runs["--seed 7"] != runs["--seed 1337"]


def test_shuffle_0_reads_the_shards_as_they_are(train):
    result = done(train("-d 1 --shuffle 0 -n 1 -m 1", val_data="train_00.bin"))
    assert val_losses(result.out)[0] == losses(result.out)[1]
    shuffled = done(train("-d 1 -n 1 -m 1", val_data="train_00.bin"))
    assert val_losses(shuffled.out)[0] != losses(shuffled.out)[1]


def test_llm_c_reads_what_is_saved(train):
    """Header ints 0..7 and the size of the file, which is all that the C program looks at."""
    done(train("-w 16 -n 3 -c c.bin"))
    header = np.fromfile("c.bin", "<i4", 256)
    assert header[:8].tolist() == [20240326, 3, 32, 256, 2, 2, 16, 320]
    assert header[8:11].tolist() == [3, *(getattr(load_checkpoint("c.bin")[1], name) for name in ("shard", "sample"))]
    assert os.path.getsize("c.bin") == 1024 + 4 * 12224


def test_bfloat16_models_train_and_are_saved_as_float32(train):
    model = read_model("model.bin")
    write_model("bf16.bin", Model(CONFIG, model.params, version=5))
    result = done(train("-n 1 -c c.bin", model="bf16.bin"))
    assert read_model("c.bin").version == 3
    assert abs(val_losses(result.out)[0] - val_losses(done(train("-n 1")).out)[0]) < 1e-3
