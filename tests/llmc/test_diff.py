"""python -m llmc.diff: captures of every trainer, logs, model files and state files, in any pairing."""

import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc import diff
from llmc.checkpoint import BANDED, BFLOAT16, DeepSeekConfig, GPT2Config, Model, num_parameters, write_model
from llmc.dataloader import ShuffleState
from llmc.errors import UserError
from llmc.files import EXTENSION, HEADER_BYTES
from llmc.logger import Logger
from llmc.state import TrainState, write_state

ROOT = Path(__file__).parent.parent.parent
CONFIG = GPT2Config(maxT=8, V=13, L=2, NH=2, C=8, Vp=16)

TABLE = (
    "+-----------------------+----------------------------------------------------+\n"
    "| Parameter             | Value                                              |\n"
    "+-----------------------+----------------------------------------------------+\n"
)
SAMPLE = "generating:\n---\nstep 3: train loss 0.000001\nval loss 0.5\n---\ns:3 trl:0.1\x1b[0m\r\n\n---\n"


def train_loss(step):
    return 6.25 - step / 37


def val_loss(step):
    return 6.5 - step / 41


def capture(steps=range(21), style="fp32", every=10, change=None, sample=SAMPLE, final=False):
    """What a trainer prints; change: {step: train loss}."""
    total = steps[-1] + 1
    lines = ["[GPT-2]\nmax_seq_len: 64\n"] if style == "c" else [TABLE]
    for step in steps:
        loss = (change or {}).get(step, train_loss(step))
        if step % every == 0:
            lines.append(f"val loss {val_loss(step):f}\n")
            lines.append(sample if step else "")
        lines.append(
            {
                "c": f"step {step}: train loss {loss:f} (took 12.345678 ms)\n",
                "fp32": f"step {step + 1:4d}/{total}: train loss {loss:f} (70.123456 ms, 3657 tok/s)\n",
                "cu": f"step {step + 1:4d}/{total} | loss {loss:7.6f} (+nanz)| norm 5.1234 (+nanz)| lr 3e-04\n",
            }[style]
        )
    if final:
        lines.append(f"val loss {val_loss(total):f}\n{sample}total average iteration time: 70.000000 ms\n")
    return "".join(lines)


def expected(steps=range(21), every=10):
    losses = {(step, "train"): round(train_loss(step), 6) for step in steps}
    return losses | {(step, "val"): round(val_loss(step), 6) for step in steps if step % every == 0}


def write_log(path, steps=range(21)):
    log = Logger(path)
    for step in steps:
        if step % 10 == 0:
            log.val(step, val_loss(step))
        log.train(step, train_loss(step))
    log.close()
    return path


def compare(tmp_path, capsys, a, b, tol=None):
    """Exit status and stdout of a comparison of two texts or files."""
    paths = []
    for name, content in (("a", a), ("b", b)):
        path = content
        if isinstance(content, str):
            path = tmp_path / f"{name}.txt"
            path.write_bytes(content.encode("latin-1"))
        paths.append(diff.open_input(str(path)))
    kind = {"text": diff.compare_losses, "model file": diff.compare_models, "state file": diff.compare_states}
    same = kind[paths[0].what](*paths, tol)
    return same, capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# what is read from a text


@pytest.mark.parametrize("style", ["c", "fp32", "cu"])
def test_each_trainers_steps(style):
    assert diff.parse_losses(capture(style=style)).values == expected()


def test_golden_style_without_times():
    text = re.sub(r" \(took.*\)", "", capture(style="c"))
    assert diff.parse_losses(text).values == expected()


def test_final_validation_belongs_to_all_updates_done():
    values = diff.parse_losses(capture(range(15), final=True)).values
    assert values == expected(range(15)) | {(15, "val"): round(val_loss(15), 6)}


def test_resumed_run_starts_at_its_step():
    assert diff.parse_losses(capture(range(10, 21))).values == expected(range(10, 21))
    # nothing left to train: only the line that says so tells the step
    text = TABLE + "Resuming from step 40 (shard 0, sample 3)\nval loss 5.250000\n"
    assert diff.parse_losses(text).values == {(40, "val"): 5.25}


@pytest.mark.parametrize("final", [False, True])
def test_of_two_captures_in_a_row_the_last_counts(final):
    first = capture(range(14), change={11: 9.0, 3: 8.0}, final=final)
    values = diff.parse_losses(first + capture(range(10, 21))).values
    wanted = expected() | {(3, "train"): 8.0}
    assert values == (wanted | {(14, "val"): round(val_loss(14), 6)} if final else wanted)


def test_a_run_killed_while_sampling_swallows_nothing_of_the_next():
    first = capture(range(10)) + "val loss 1.000000\ngenerating:\n---\nonce upon a ti"
    assert diff.parse_losses(first + "\n" + capture(range(10, 21))).values == expected()


def test_progress_bars_colours_and_bytes_that_are_no_utf8():
    text = capture(sample="generating:\n---\n\xff\xfe\x80\x00\n---\n").replace("\n", "\r\n")
    text = text.replace("step ", "\x1b[2K 50%|##   | 1/2\r100%|#####| 2/2\r\x1b[1mstep ").replace(
        "val", "\x1b]0;x\x07val"
    )
    decoded = text.encode("latin-1").decode("utf-8", "replace")
    assert diff.parse_losses(decoded).values == expected()


@given(st.text(alphabet="-s:tep 0123/lovar\n\r\x1b[generating", max_size=60))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_sampled_text_is_never_read(sample):
    if not any(line in sample for line in ("| Parameter", "[GPT-2]")):
        assert diff.parse_losses(capture(sample=f"generating:\n---\n{sample}\n---\n")).values == expected()


@pytest.mark.parametrize("line", ["s:4 trl:4.5000", "s:4 trl:4.5000 lr:0.000300 norm:1.23", "s:4 trl:4.500000"])
def test_log_lines_of_every_trainer(line):
    losses = diff.parse_losses(f"s:0 eval:0.2501\ns:4 tel:4.7500\n{line}\ns:4 evl:9.0 avt:9.0 gap:0\n")
    assert losses.values == {(0, "HellaSwag"): 0.2501, (4, "val"): 4.75, (4, "train"): 4.5}
    assert losses.rounded


def test_printed_losses_win_over_a_log_in_the_same_text():
    losses = diff.parse_losses("s:0 trl:4.1235\nstep    1/9: train loss 4.123456 (1 ms, 1 tok/s)\n")
    assert losses.values == {(0, "train"): 4.123456} and not losses.rounded


@pytest.mark.parametrize("text", ["nan", "-nan", "-nan(ind)", "NaN"])
def test_nan_in_any_spelling(text):
    assert math.isnan(diff.parse_losses(f"step 0: train loss {text}\n").values[0, "train"])


# ---------------------------------------------------------------------------------------------------------------------
# comparing losses


@pytest.mark.parametrize("style_a", ["c", "fp32", "cu"])
@pytest.mark.parametrize("style_b", ["c", "fp32", "cu"])
def test_any_pairing_of_captures(tmp_path, capsys, style_a, style_b):
    same, out = compare(tmp_path, capsys, capture(style=style_a), capture(style=style_b))
    assert same and out.endswith("24 losses compared, largest difference 0.0e+00: val, step 0\nthe same within 2e-05\n")
    same, out = compare(tmp_path, capsys, capture(style=style_a), capture(style=style_b, change={7: 6.1}))
    assert not same
    assert re.search(r"^ *train +7 +6\.060811 +6\.100000 +3\.9e-02 \*$", out, re.MULTILINE)
    assert out.endswith("largest difference 3.9e-02: train, step 7\nDIFFERENT: 1 of 24 losses past 2e-05\n")


def test_tolerance_is_of_the_printed_decimals(tmp_path, capsys):
    a, b = "step 0: train loss 5.000000\n", "step 0: train loss 5.000020\n"
    assert compare(tmp_path, capsys, a, b)[0]  # 2e-5 exactly, though not in float64
    assert not compare(tmp_path, capsys, a, b, 1.9e-5)[0]
    assert not compare(tmp_path, capsys, a, b, 0.0)[0]
    assert compare(tmp_path, capsys, a, a, 0.0)[0]


def test_logs_and_captures(tmp_path, capsys):
    log = write_log(tmp_path / "log.txt")
    same, out = compare(tmp_path, capsys, capture(), log)
    assert same and "24 losses compared" in out and out.endswith("the same within 0.0001\n")
    assert compare(tmp_path, capsys, log, log, 0.0)[0]
    other = "s:3 trl:6.1690\n"  # 6.1689 in the log: one in the last decimal passes, two do not
    assert compare(tmp_path, capsys, log, other)[0]
    assert not compare(tmp_path, capsys, log, "s:3 trl:6.1691\n")[0]


def test_steps_of_one_file_only_are_counted(tmp_path, capsys):
    same, out = compare(tmp_path, capsys, capture(range(10, 21)), capture(range(15)))
    assert same
    assert (
        "only in A: 6 train (steps 15..20), 1 val (step 20)\nonly in B: 10 train (steps 0..9), 1 val (step 0)\n" in out
    )
    assert "6 losses compared" in out


@pytest.mark.parametrize("a, b", [("nan", "nan"), ("nan", "5.0"), ("inf", "inf")])
def test_nan_is_a_difference(tmp_path, capsys, a, b):
    same, out = compare(tmp_path, capsys, f"step 0: train loss {a}\n", f"step 0: train loss {b}\n", 1e30)
    assert not same and "inf *" in out


def test_long_runs_show_the_largest_differences(tmp_path, capsys):
    changed = {step: train_loss(step) + 1e-3 * step for step in range(200)}
    same, out = compare(tmp_path, capsys, capture(range(200)), capture(range(200), change=changed))
    rows = re.findall(r"^ *train +(\d+)", out, re.MULTILINE)
    assert not same and list(map(int, rows)) == list(range(150, 200))
    assert "... and 149 differences no larger than these\n" in out


# ---------------------------------------------------------------------------------------------------------------------
# model and state files


def model(**changes):
    params = np.random.default_rng(1).normal(size=num_parameters(CONFIG)).astype(np.float32)
    return Model(**dict(config=CONFIG, params=params) | changes)


def saved_model(path, change=(), **changes):
    one = model(**changes)
    for index, value in change:
        one.params[index] = value
    write_model(path, one)
    return path


def test_models(tmp_path, capsys):
    a = saved_model(tmp_path / "a.bin")
    assert compare(tmp_path, capsys, a, saved_model(tmp_path / "b.bin"), 0.0)[0]
    at = 16 * 8 + 3 * 8 + 5  # wpe[3,5]
    value = model().params[at]
    same, out = compare(tmp_path, capsys, a, saved_model(tmp_path / "b.bin", [(at, value + np.float32(0.25))]))
    assert not same
    assert re.search(rf"^ +wpe +{value:.6g} .* 2\.5e-01 \* +3\.9e-03 +\[3,5\]$", out, re.MULTILINE)  # mean: 0.25 / 64
    assert len(re.findall(r" 0\.0e\+00 ", out)) >= 15
    assert out.endswith("largest difference 2.5e-01: wpe[3,5]\nDIFFERENT: 1 of 16 arrays past 0.0001\n")
    assert compare(tmp_path, capsys, a, tmp_path / "b.bin", 0.3)[0]
    assert not compare(tmp_path, capsys, a, saved_model(tmp_path / "n.bin", [(at, np.nan)]), 1e30)[0]


def test_models_by_value_whatever_their_precision(tmp_path, capsys):
    a, b = saved_model(tmp_path / "a.bin"), saved_model(tmp_path / "b.bin", version=BFLOAT16)
    same, out = compare(tmp_path, capsys, a, b, 0.02)
    assert same and re.search(r"version +3 +5\n", out) and "not counted: version" in out
    assert not compare(tmp_path, capsys, a, b)[0]


def test_header_fields_count_only_where_both_files_state_them(tmp_path, capsys):
    a, b = saved_model(tmp_path / "a.bin"), saved_model(tmp_path / "b.bin", step=41, kind=BANDED, fields=(256, 0))
    same, out = compare(tmp_path, capsys, a, b)
    assert not same and out.endswith("DIFFERENT: step, kind, field 0 unequal\n")
    data = bytearray(a.read_bytes())
    data[4 * EXTENSION : HEADER_BYTES] = bytes(HEADER_BYTES - 4 * EXTENSION)  # as llm.c leaves it
    a.write_bytes(data)
    same, out = compare(tmp_path, capsys, a, b)
    assert same and "not counted: step, kind, field 0\n" in out and re.search(r"step +0 +41\n", out)


def test_models_of_other_sizes(tmp_path, capsys):
    other = GPT2Config(maxT=8, V=13, L=3, NH=2, C=8, Vp=16)
    b = saved_model(tmp_path / "b.bin", config=other, params=np.zeros(num_parameters(other), np.float32))
    same, out = compare(tmp_path, capsys, saved_model(tmp_path / "a.bin"), b)
    assert not same and re.search(r" L +2 +3\n", out) and "different shapes" in out


def test_extra_tensors_are_compared(tmp_path, capsys):
    a = saved_model(tmp_path / "a.bin", extra=np.float32([1, 2, 3]))
    b = saved_model(tmp_path / "b.bin", extra=np.float32([1, 2, 4]))
    same, out = compare(tmp_path, capsys, a, b)
    assert not same and re.search(r"extra +3 +4 +1\.0e\+00 \* +3\.3e-01 +\[2\]", out)


def test_models_with_mla_and_moe(tmp_path, capsys):
    config = DeepSeekConfig(maxT=8, V=13, L=2, NH=2, C=8, Vp=16, F=6, E=3, top=2, q_rank=5, kv_rank=3, R=2)
    params = np.random.default_rng(1).normal(size=num_parameters(config)).astype(np.float32)
    a = saved_model(tmp_path / "a.bin", config=config, params=params.copy())
    assert compare(tmp_path, capsys, a, a, 0.0)[0]
    b = saved_model(tmp_path / "b.bin", [(-1, params[-1] + np.float32(0.5))], config=config, params=params.copy())
    same, out = compare(tmp_path, capsys, a, b)
    assert not same and out.endswith("largest difference 5.0e-01: headb[15]\nDIFFERENT: 1 of 20 arrays past 0.0001\n")
    one = replace(config, top=1)
    same, out = compare(tmp_path, capsys, a, saved_model(tmp_path / "c.bin", config=one, params=params.copy()))
    assert not same and out.endswith("DIFFERENT: top unequal\n")
    gpt2 = saved_model(tmp_path / "gpt2.bin")
    same, out = compare(tmp_path, capsys, a, gpt2)
    assert not same and re.search(r" E +3 +-\n", out) and "different shapes" in out


def train_state(shards=2, samples=7, n=24, **changes):
    rng = np.random.default_rng(5)
    m, v = rng.normal(size=(2, n)).astype(np.float32)
    shuffle = None
    if shards:
        orders = [rng.permutation(k).astype(np.int32) for k in (shards, samples)]
        shuffle = ShuffleState(*orders, rng.integers(0, 2**32, 624, dtype=np.uint32), 17)
    return TrainState(**dict(step=20, rng_state=1337, shard=0, sample=3, m=m, v=v, shuffle=shuffle) | changes)


def saved_state(path, **changes):
    write_state(path, train_state(**changes))
    return path


def test_states(tmp_path, capsys):
    a = saved_state(tmp_path / "a.bin", options={"steps": 20, "log": "é"})
    same, out = compare(tmp_path, capsys, a, saved_state(tmp_path / "b.bin", options={"steps": 40}), 0.0)
    assert same and "not counted: steps, log\n" in out and "48 values compared" in out
    m = train_state().m
    m[11] += 1
    same, out = compare(tmp_path, capsys, a, saved_state(tmp_path / "b.bin", m=m))
    assert not same and out.endswith("largest difference 1.0e+00: m[11]\nDIFFERENT: 1 of 2 arrays past 0.0001\n")


@pytest.mark.parametrize("change", [dict(step=21), dict(rng_state=1), dict(sample=4), dict(shards=0), dict(samples=8)])
def test_states_that_differ_in_a_field(tmp_path, capsys, change):
    same, out = compare(tmp_path, capsys, saved_state(tmp_path / "a.bin"), saved_state(tmp_path / "b.bin", **change))
    assert not same and " unequal\n" in out


@pytest.mark.parametrize("shards, samples, n", [(0, 0, 3), (1, 1, 1), (1, 50, 8), (9, 3, 200), (40, 1000, 30)])
def test_number_of_parameters_of_a_state(tmp_path, monkeypatch, shards, samples, n):
    monkeypatch.setattr(diff, "BLOCK", 64)  # the search takes several blocks
    path = saved_state(tmp_path / "a.bin", shards=shards, samples=samples, n=n, sample=0, options={"x": 1})
    assert diff.num_parameters(diff.open_input(str(path))) == n


@given(st.integers(1, 255), st.sampled_from([-(2**31), -1, 0, 1, 2, 7, 1000, 2**31 - 1]), st.integers(-40, 40))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_damaged_states_are_user_errors(tmp_path_factory, index, value, resize):
    path = saved_state(tmp_path_factory.mktemp("fuzz") / "a.bin")
    data = bytearray(path.read_bytes())
    data[4 * index : 4 * index + 4] = value.to_bytes(4, "little", signed=True)
    path.write_bytes(data[:resize] if resize < 0 else data + bytes(resize))
    source = diff.open_input(str(path))
    try:
        diff.compare_states(source, source, None)
    except UserError as error:
        assert error.hint


# ---------------------------------------------------------------------------------------------------------------------
# the command


def run_diff(*argv):
    command = [sys.executable, "-m", "llmc.diff", *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


def test_command(tmp_path):
    a, b, log = tmp_path / "a.txt", tmp_path / "b.txt", write_log(tmp_path / "log.txt")
    a.write_text(capture())
    b.write_text(capture(style="c", change={3: 6.17}))
    assert run_diff(a, log).returncode == 0
    done = run_diff(a, b)
    assert (done.returncode, done.stderr) == (1, "") and "DIFFERENT: 1 of 24 losses past 2e-05" in done.stdout
    assert run_diff(a, b, "--tol", "0.01").returncode == 0


def test_command_refuses(tmp_path):
    a, early, empty = tmp_path / "a.txt", tmp_path / "early.txt", tmp_path / "empty.txt"
    a.write_text(capture(range(10, 21)))
    early.write_text(capture(range(5)))
    empty.write_bytes(b"")
    weights = saved_model(tmp_path / "model.bin")
    short = tmp_path / "short.bin"
    short.write_bytes(weights.read_bytes()[:-4])
    for argv, code, text in (
        ((a, early), 1, "have no step in common"),
        ((a, empty), 1, "empty.txt: no losses found"),
        ((a, tmp_path / "none.txt"), 1, "none.txt: No such file"),
        ((weights, short), 1, "short.bin: model file is truncated"),
        ((a, weights), 2, "expected two of one sort"),
        ((a,), 2, "required: B"),
        ((a, a, a), 2, "unrecognized arguments"),
        ((a, a, "--tol", "-1"), 2, "--tol: '-1', expected a number, 0 or more"),
        ((a, a, "--tolerance", "1"), 2, "--tolerance: unknown flag"),
    ):
        done = run_diff(*argv)
        assert done.returncode == code and text in done.stderr
        assert done.stderr.startswith("error: ") and "\n---> HINT: " in done.stderr and "Traceback" not in done.stderr
