"""train_banded.py resumed, stopped and killed: what comes out equals a run never stopped, to the bit."""

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from tiny import assert_same_run, check_refused, done, losses, snapshot, table, texts, without_times

import train_banded
from llmc.checkpoint import read_model, write_model
from llmc.interrupt import Interrupt
from llmc.logger import LINE
from llmc.resume import load_checkpoint

SCRIPT = "train_banded.py"

# an epoch is 7 samples, the shuffled shards hold 4 and 3: 20 steps see three epochs, and any stop leaves both
# boundaries ahead
EVENTS = "-v 3 -s 4"


@pytest.fixture
def train(folder, capfdbinary):
    """train("-w 8 -n 3", grad_accum=2) -> Result: the trainer on the tiny files, in this process."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # tests may run with Ctrl-C ignored

    def run(flags="", **changed):
        return tiny.call(capfdbinary, train_banded.main, *tiny.options(**changed), *shlex.split(flags))

    yield run
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def send_signal_at(monkeypatch):
    """send_signal_at(step): the process gets a signal in the midst of that 0-based step."""
    learning_rate = train_banded.learning_rate

    def at(chosen, number=signal.SIGINT):
        def then_signal(schedule, step, **settings):
            if step == chosen:
                os.kill(os.getpid(), number)
            return learning_rate(schedule, step, **settings)

        monkeypatch.setattr(train_banded, "learning_rate", then_signal)

    return at


@pytest.mark.parametrize("stop", [4, 7, 10])
@pytest.mark.parametrize(
    "flags",
    ["-w 16", "-1 8 -2 24 --mask-init 0 --shuffle 0", "-d 1 --grad-accum 2 --weight-decay 0.1", "--overfit-batch 1"],
    ids=["FC1", "both", "accumulated", "overfitted"],
)
def test_a_resumed_run_equals_one_never_stopped(train, flags, stop):
    whole = done(train(f"{flags} {EVENTS} -n 20 -c whole.bin -o whole.txt"))
    first = done(train(f"{flags} {EVENTS} -n {stop} -c part.bin -o part.txt"))
    second = done(train("--resume part.bin -n 20"))
    assert_same_run("whole.bin", "part.bin")
    assert Path("whole.txt").read_bytes() == Path("part.txt").read_bytes()
    assert losses(first.out) | losses(second.out) == losses(whole.out) and len(losses(whole.out)) == 20
    sampled = texts(whole.out)  # at 4, 8, 12, 16 and 20
    assert len(sampled) == 5 and all(sampled)
    assert texts(second.out) == sampled[(stop - 1) // 4 :]
    if stop % 4 == 0:
        assert texts(first.out) == sampled[: stop // 4]
    assert f"Resuming from step {stop} (shard " in second.out


def test_the_runs_above_cross_shards_and_epochs(train):
    """The position after 4, 7, 10 and 20 steps: what the test above relies on."""
    positions = []
    for steps in (4, 7, 10, 20):
        done(train(f"--shuffle 0 -n {steps} -c c.bin"))
        state = load_checkpoint("c.bin")[1]
        positions.append((state.shard, state.sample))
    assert positions == [(0, 4), (1, 3), (0, 3), (1, 2)]


@pytest.mark.parametrize("step", [0, 3, 12, 18])
def test_ctrl_c_at_any_step_then_resumed_equals_a_run_never_stopped(train, send_signal_at, step):
    flags = f"-w 16 {EVENTS} -n 20 --lr-schedule cosine --warmup 5 --final-lr-frac 0.1"
    done(train(f"{flags} -c whole.bin -o whole.txt"))
    send_signal_at(step)
    stopped = train(f"{flags} -c part.bin -o part.txt")
    assert stopped.code == 130
    assert stopped.err == "finishing this step; press Ctrl-C again to stop at once\n"
    assert re.search(rf"^stopped after {step + 1} steps; go on with: python .*--resume part.bin$", stopped.out, re.M)
    assert load_checkpoint("part.bin")[1].step == step + 1
    send_signal_at(None)
    done(train("--resume part.bin"))
    assert_same_run("whole.bin", "part.bin")
    assert Path("whole.txt").read_bytes() == Path("part.txt").read_bytes()


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_in_the_last_step_lets_the_run_end(train, send_signal_at, number, code):
    done(train(f"{EVENTS} -n 6 -c whole.bin -o whole.txt"))
    send_signal_at(5, number)
    result = train(f"{EVENTS} -n 6 -c part.bin -o part.txt")
    assert result.code == code and "stopped after" not in result.out and "total average" in result.out
    assert_same_run("whole.bin", "part.bin")
    assert Path("whole.txt").read_bytes() == Path("part.txt").read_bytes()


def test_sigterm_saves_as_well(train, send_signal_at):
    send_signal_at(2, signal.SIGTERM)
    result = train("-n 9 -c c.bin")
    assert result.code == 143 and "stopped after 3 steps; go on with: " in result.out
    assert load_checkpoint("c.bin")[1].step == 3


def test_stopped_without_c_says_that_nothing_was_saved(train, folder, send_signal_at):
    before = snapshot(folder)
    send_signal_at(2)
    result = train("-n 9")
    assert result.code == 130 and "stopped after 3 steps; no -c: nothing was saved\n" in result.out
    assert snapshot(folder) == before


def test_stopped_before_the_first_step_leaves_an_older_checkpoint(train, folder, monkeypatch):
    class Stopped(Interrupt):
        def __enter__(self):
            self.signal = signal.SIGINT
            return self

    done(train("-n 2 -c c.bin"))
    before = snapshot(folder)
    monkeypatch.setattr(train_banded, "Interrupt", Stopped)
    result = train("-n 9 -c c.bin")
    assert result.code == 130 and "stopped after 0 steps; nothing was saved\n" in result.out
    result = train("--resume c.bin -n 9")
    assert result.code == 130 and re.search("stopped after 2 steps; go on with: .* --resume c.bin\n", result.out)
    assert snapshot(folder) == before


def test_the_printed_commands_work_as_typed(tmp_path):
    """Names with spaces, quotes and glob characters, and the scripts called from another folder."""
    folder = tiny.make_folder(tmp_path / "it's a [run] *")
    (folder / "model.bin").rename(folder / "my model.bin")
    flags = tiny.options(model="my model.bin", checkpoint="what's [this]*.bin", log="a log.txt", steps=100000)
    process = tiny.start(SCRIPT, flags, folder)
    tiny.wait_for(process, b"step    2/")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=tiny.TIMEOUT)
    assert (process.returncode, err) == (130, b"finishing this step; press Ctrl-C again to stop at once\n")
    steps, command = re.search(rb"stopped after (\d+) steps; go on with: (.*)\n$", out).groups()

    def typed(command, *more):
        words = shlex.split(command.decode())
        assert words[0] == "python"
        return subprocess.run(
            [sys.executable, *words[1:], *more], cwd=folder, env=tiny.one_thread(), capture_output=True, check=True
        ).stdout

    out = typed(command, "-n", str(int(steps) + 3))
    assert b"Resuming from step %s (" % steps in out and b"/%d: train loss" % (int(steps) + 3) in out
    out = typed(re.search(rb"text from it: (.*)\n$", out)[1], "-n", "4")
    assert b"Model: what's [this]*.bin\n" in out
    log = (folder / "a log.txt").read_bytes().splitlines(keepends=True)
    assert all(map(LINE.fullmatch, log)) and log[-1].startswith(b"s:%d tel:" % (int(steps) + 3))


def test_a_second_ctrl_c_stops_at_once(folder):
    before = snapshot(folder)
    process = tiny.start(SCRIPT, [*tiny.options(grad_accum=10**6, steps=1), "-c", "c.bin"], folder)
    tiny.wait_for(process, b"val loss")
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline() == b"finishing this step; press Ctrl-C again to stop at once\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(tiny.TIMEOUT) == -signal.SIGINT  # of a step that would take an hour
    process.communicate()
    assert {name: content for name, content in snapshot(folder).items() if name != ".c.lock"} == before
    done(tiny.run_script(SCRIPT, [*tiny.options(steps=1), "-c", "c.bin"], folder))  # it locks nothing any more
    assert not (folder / ".c.lock").exists()


@pytest.mark.parametrize("saves", [1, 4])
def test_killed_and_resumed_from_the_last_save(folder, saves):
    flags = ["-w", "16", *EVENTS.split(), "-o"]
    process = tiny.start(SCRIPT, [*tiny.options(steps=100000), *flags, "part.txt", "-k", "3", "-c", "part.bin"], folder)
    for _ in range(saves):
        tiny.wait_for(process, b"checkpoint saved")
    process.kill()
    process.communicate()
    steps = load_checkpoint("part.bin")[1].step + 9
    done(tiny.run_script(SCRIPT, ["--resume", "part.bin", "-n", steps], folder))
    done(tiny.run_script(SCRIPT, [*tiny.options(steps=steps), *flags, "whole.txt", "-c", "whole.bin"], folder))
    assert_same_run("whole.bin", "part.bin")
    assert Path("whole.txt").read_bytes() == Path("part.txt").read_bytes()


def test_a_resumed_run_has_the_settings_of_the_first_and_those_typed(train):
    done(train("-w 16 -l 0.002 --beta2 0.9 -v 2 -s 0 -n 2 -c c.bin -o log.txt"))
    rows = table(done(train("--resume c.bin -n 4 -l 0.001")).out)
    assert rows["learning rate"] == "0.001000" and rows["max_steps"] == "4"
    assert (rows["val_loss_every"], rows["sample_every"], rows["genT"]) == ("2", "0", "12")
    assert (rows["model path"], rows["checkpoint path"], rows["output log file"]) == ("c.bin", "c.bin", "log.txt")
    assert load_checkpoint("c.bin")[1].options["beta2"] == 0.9


def test_resume_into_another_checkpoint_leaves_the_first(train, folder):
    done(train("-n 3 -c first.bin"))
    before = snapshot(folder)
    done(train("--resume first.bin -c second.bin -n 5"))
    after = snapshot(folder)
    assert {name: after[name] for name in before} == before
    assert load_checkpoint("second.bin")[1].step == 5


def test_checkpoints_side_by_side_keep_their_states(train):
    """Only .bin is a suffix: lr_0.1 and lr_0.3 are two runs."""
    names = ("lr_0.1", "lr_0.3", "lr_0", "lr.bin", "lr_0.bin.bin")
    for i, name in enumerate(names, 1):
        done(train(f"-n 2 -l {i / 1000} -c {name}"))
    for name in names:
        assert load_checkpoint(name)[1].step == 2


@pytest.mark.parametrize(
    "flags, code, words",
    [
        ("--resume c.bin", 1, ["-n 2: c.bin is at step 2 already"]),
        ("--resume c.bin -n 5 -e model.bin", 2, ["--resume given together with -e"]),
        ("--resume c.bin -n 5 -w 8", 2, ["--resume keeps the bands", "-e c.bin"]),
        ("--resume c.bin -n 5 -d 1", 2, ["--resume keeps the bands"]),
        ("--resume c.bin -n 5 -2 8", 2, ["--resume keeps the bands"]),
        ("--resume model.bin -n 5", 1, ["model.bin: no optimizer state beside it", "-e model.bin"]),
        ("--resume none.bin -n 5", 1, ["reading none.bin: No such file"]),
        ("--resume c.bin -n 5 -b 1", 1, ["resume with the same -i, -b and -t"]),
        ("--resume c.bin -n 5 --shuffle 0", 1, ["shuffled", "--shuffle"]),
        ("--resume c.bin -n 5 -i train_00.bin", 1, ["there are 1", "same -i"]),
        ("--resume c.bin -n 5 -o c.bin", 2, ["-o c.bin: is the file of -c, too"]),
    ],
)
def test_what_cannot_be_resumed(train, folder, flags, code, words):
    done(train("-w 16 -n 2 -c c.bin"))
    before = snapshot(folder)
    check_refused(train(flags, train_data=None, val_data=None, batch_size=None), *words, code=code)
    assert snapshot(folder) == before


def test_a_model_file_exchanged_under_its_state_is_not_resumed(train):
    done(train("-n 2 -c c.bin"))
    model = read_model("c.bin")
    model.params[7] += 1
    write_model("c.bin", model)
    check_refused(train("--resume c.bin -n 4"), "c.bin: no optimizer state beside it")


def test_the_same_command_twice_gives_the_same_bytes(tmp_path):
    runs = []
    for name in ("one", "two"):
        folder = tiny.make_folder(tmp_path / name)
        flags = [*tiny.options(steps=9), *shlex.split(f"-w 16 {EVENTS} -c c.bin -o log.txt -k 2")]
        result = done(tiny.run_script(SCRIPT, flags, folder))
        runs.append((snapshot(folder), without_times(result.out)))
    assert runs[0] == runs[1]
