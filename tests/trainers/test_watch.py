"""The bar on a terminal, and updates that -sl and -sg skip."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest
import tiny
from tiny import assert_same_run, check_refused, done, losses, without_times

import train_banded
import train_sparse_attn
import train_toroidal
from llmc.checkpoint import read_model
from llmc.outlier import WINDOW, OutlierDetector
from llmc.progress import Progress, Smoothed
from llmc.resume import load_checkpoint
from llmc.state import write_state

TRAINERS = {"banded": train_banded, "sparse": train_sparse_attn, "toroidal": train_toroidal}
MORE = {"toroidal": "--train all", "sparse": "--top-k 3", "banded": "-w 16"}


@pytest.fixture
def call(folder, capfdbinary):
    """call("-n 3", "sparse") -> Result: a trainer on the tiny files, in this process."""

    def run(flags="", trainer="banded", **changed):
        return tiny.call(capfdbinary, TRAINERS[trainer].main, *tiny.options(**changed), *shlex.split(flags))

    return run


# ----------------------------------------------------------------------------------------------------------------------
# z-scores


def test_a_z_score_is_that_of_the_last_128_values():
    values = np.random.default_rng(1).normal(3, 0.5, 400)
    detector = OutlierDetector()
    found = [detector.update(x) for x in values]
    assert np.isnan(found[:WINDOW]).all() and len(found) == 400
    for i in range(WINDOW, 400):
        window = values[i + 1 - WINDOW : i + 1]
        assert found[i] == pytest.approx((values[i] - window.mean()) / window.std(), rel=1e-9)


def test_equal_values_are_no_outliers():
    detector = OutlierDetector()
    assert np.isnan([detector.update(0.5) for _ in range(WINDOW)]).all()
    assert {detector.update(0.5) for _ in range(300)} == {0.0}


def test_a_detector_goes_on_to_the_bit():
    values = np.random.default_rng(2).normal(3, 0.5, 500).tolist()
    whole, part = OutlierDetector(), OutlierDetector()
    for x in values[:333]:
        whole.update(x), part.update(x)
    part = OutlierDetector(part.saved())
    assert [whole.update(x) for x in values[333:]] == [part.update(x) for x in values[333:]]


@pytest.mark.parametrize("saved", [3, [], [1.0], [1.0, 1.0, "x"], [1.0, float("nan")], [0.0] * (WINDOW + 3)])
def test_what_is_no_window_is_refused(saved):
    with pytest.raises(ValueError, match="expected two sums"):
        OutlierDetector(saved)


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("flag, what", [("-sl", "loss"), ("-sg", "grad")])
def test_an_update_is_skipped_where_its_z_score_is_too_high(call, trainer, flag, what):
    flags = f"{MORE[trainer]} {flag} 0.5 -v 0 -s 0 --shuffle 0 -l 1e-6"  # losses differ by their data alone
    out = done(call(f"-n 150 -c c.bin {flags}", trainer)).out
    found = re.findall(rf"^{what} (\S+) \((\S+)z\)$(?:\nskipping update due to {what} z-score of (\S+)$)?", out, re.M)
    assert len(found) == 150
    values, scores = [float(x) for x, _, _ in found], [float(z) for _, z, _ in found]
    if what == "loss":
        assert np.abs(np.array(values) - list(losses(out).values())).max() < 1e-4
    assert np.isnan(scores[:128]).all()
    for i in range(128, 150):
        window = np.array(values[i - 127 : i + 1])  # printed with 4 digits
        assert scores[i] == pytest.approx((values[i] - window.mean()) / window.std(), abs=0.02)
    skipped = [i for i, (_, z, told) in enumerate(found) if told]
    assert skipped == [i for i, z in enumerate(scores) if z > 0.5] and 2 < len(skipped) < 20
    for _, z, told in found:
        assert not told or f"{float(told):+.2f}" == z

    last = skipped[-1]
    done(call(f"-n {last} -c before.bin {flags}", trainer))
    done(call(f"-n {last + 1} -c after.bin {flags}", trainer))
    (before, old), (after, new) = load_checkpoint("before.bin"), load_checkpoint("after.bin")
    assert np.array_equal(before.params, after.params) and np.array_equal(old.m, new.m) and new.step == old.step + 1

    done(call("--resume before.bin -n 150", trainer))  # its window is part of the state
    assert_same_run("before.bin", "c.bin")


def test_without_the_flags_nothing_is_measured_or_kept(call):
    out = done(call("-n 3 -c c.bin")).out
    assert "z)" not in out and not load_checkpoint("c.bin")[1].extra


def test_the_indexers_warm_up_counts_for_nothing(call):
    """There the model does not learn; the jump that follows must not look like a spike."""
    out = done(call("-n 6 --indexer-warmup 4 --top-k 3 -sl 3 -sg 3 -v 0 -s 0", "sparse")).out
    assert len(re.findall(r"^loss .*z\), grad .*\(\+nanz\)$", out, re.M)) == 2


def test_a_state_with_another_window_is_refused(call):
    done(call("-n 2 -sl 3 -c c.bin"))
    (path,) = Path().glob("c_state_*.bin")
    state = load_checkpoint("c.bin")[1]
    state.extra["losses"] = [1.0]
    write_state(path, state)
    check_refused(call("--resume c.bin -n 3"), "c.bin: losses: [1.0]")


@pytest.mark.parametrize("flag", ["-sl", "-sg", "--skip-loss-z", "--skip-grad-z"])
def test_a_limit_is_a_number(call, flag):
    check_refused(call(f"{flag} -1"), flag[-2:], "'-1'", code=2)
    check_refused(call(f"{flag} x"), "'x'", code=2)


# ----------------------------------------------------------------------------------------------------------------------
# the bar


def test_a_smoothed_value_forgets_and_has_no_bias():
    mean = Smoothed()
    assert mean.add(3.0) == pytest.approx(3.0)
    assert mean.add(1.0) == pytest.approx((0.95 * 3 + 1) / 1.95)
    for _ in range(500):
        last = mean.add(7.0)
    assert last == pytest.approx(7.0, abs=1e-9)


def test_a_bar_leaves_stdout_as_it_is(call):
    flags = "-n 6 -v 3 -s 3 -k 3 -c c.bin"
    done(call(flags))  # c.bin is there for both
    plain, barred = done(call(f"{flags} --progress 0")), call(f"{flags} --progress 1")
    assert without_times(plain.out) == without_times(barred.out)
    told = re.findall(r"(\d+)%\|[^|]*\| (\d)/6, \S+ left, loss (\S+), ([\d,]+) tok/s, (\d+) MiB", barred.err)
    assert [int(step) for _, step, *_ in told] == [1, 2, 3, 4, 5]
    mean = Smoothed()
    smooth = [f"{mean.add(loss):.4f}" for loss in losses(barred.out).values()]
    assert [loss for _, _, loss, _, _ in told] == smooth[:5]
    assert all(10 < int(memory) < 4000 for *_, memory in told)


def screen(captured: str) -> list[str]:
    """The lines that a terminal shows after these bytes: a carriage return goes to the start of the line."""
    lines, row, column = [""], 0, 0
    for char in captured:
        if char == "\n":
            lines.append("")
            row, column = row + 1, 0
        elif char == "\r":
            column = 0
        else:
            lines[row] = lines[row][:column].ljust(column) + char + lines[row][column + 1 :]
            column += 1
    return [line.rstrip() for line in lines]


@pytest.mark.parametrize("trainer", TRAINERS)
def test_on_a_terminal_the_bar_is_gone_where_a_line_is_printed(folder, trainer):
    pty = pytest.importorskip("pty")
    import fcntl
    import struct
    import termios

    argv = [*tiny.options(), *shlex.split(f"{MORE[trainer]} -n 7 -v 3 -s 3 -k 2 -c c.bin --keep 1")]
    script = f"train_{trainer}{'_attn' if trainer == 'sparse' else ''}.py"
    done(tiny.run_script(script, argv, folder))  # what it leaves is there for both
    plain = done(tiny.run_script(script, argv, folder)).out
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 132, 0, 0))
    process = subprocess.Popen(
        tiny.command(script, *argv), cwd=folder, env=tiny.one_thread(), stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    captured = b""
    while True:
        try:
            captured += os.read(ours, 1 << 16)
        except OSError:  # the end, on Linux
            break
    os.close(ours)
    assert process.wait(tiny.TIMEOUT) == 0
    text = captured.decode(errors="replace")
    assert " left, loss " in text
    assert comparable("\n".join(screen(text))) == comparable(plain)


def comparable(out: str) -> list[str]:
    """The lines but what is measured, times and memory."""
    out = re.sub(r"grew by -?\d+|^memory: \d+|forward pass.*|: [\d.]+% of a", "", without_times(out), flags=re.M)
    return [line.rstrip() for line in out.splitlines() if line.strip()]


def test_auto_is_a_bar_for_two_terminals_alone(monkeypatch):
    for out, err, wanted in ((True, True, True), (True, False, False), (False, True, False)):
        monkeypatch.setattr("sys.stdout.isatty", lambda out=out: out, raising=False)
        monkeypatch.setattr("sys.stderr.isatty", lambda err=err: err, raising=False)
        assert Progress("auto", 0, 3, lambda: 0).wanted == wanted
        assert Progress("1", 0, 3, lambda: 0).wanted and not Progress("0", 0, 3, lambda: 0).wanted


def test_a_resumed_bar_starts_where_the_run_does(call):
    done(call("-n 4 -c c.bin"))
    err = call("--resume c.bin -n 9 --progress 1").err
    assert re.findall(r"\| (\d)/9, \S+ left, loss", err) == ["5", "6", "7", "8"]
    assert read_model("c.bin").step == 9
