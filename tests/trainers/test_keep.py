"""--keep and --keep-best: pairs that resume, as many as asked for, and nothing removed that is another's."""

import json
import os
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import tiny
from tiny import assert_same_run, check_refused, done, snapshot, val_losses

import train_banded
import train_sparse_attn
import train_toroidal
from llmc.checkpoint import read_model
from llmc.resume import load_checkpoint
from llmc.state import write_state

TRAINERS = {"banded": train_banded, "sparse": train_sparse_attn, "toroidal": train_toroidal}
MORE = {"toroidal": "--train all", "sparse": "--top-k 3", "banded": "-w 16"}
RISING = "-l 0.05 -v 2 -s 0 --shuffle 0"  # losses that go up and down


@pytest.fixture
def call(folder, capfdbinary):
    """call("-n 3 -c c.bin", "sparse") -> Result: a trainer on the tiny files, in this process, --overwrite left out."""

    def run(flags="", trainer="banded", **changed):
        argv = [*tiny.options(**{"overwrite": None} | changed), *shlex.split(flags)]
        return tiny.call(capfdbinary, TRAINERS[trainer].main, *argv)

    return run


def copies(base: str) -> list[str]:
    """The model files that are kept beside base.bin."""
    return sorted(str(path) for path in Path().glob(f"{base}_*.bin") if "_state_" not in path.name)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_the_last_saves_stay_and_are_what_a_run_of_so_many_steps_saves(call, trainer):
    flags = f"{MORE[trainer]} -s 0 -v 0"
    out = done(call(f"-n 9 -k 2 --keep 2 -c c.bin {flags}", trainer)).out
    assert copies("c") == ["c_00000008.bin", "c_00000009.bin"]
    assert re.findall("^kept as (.*)$", out, re.M) == [f"c_{step:08d}.bin" for step in (2, 4, 6, 8, 9)]
    assert re.findall("^removed (.*), --keep 2$", out, re.M) == [f"c_{step:08d}.bin" for step in (2, 4, 6)]
    assert len(list(Path().glob("c_*state_*.bin"))) == 3  # of the two and of c.bin
    done(call(f"-n 8 -c eight.bin {flags}", trainer))
    assert_same_run("c_00000008.bin", "eight.bin")
    assert_same_run("c_00000009.bin", "c.bin")


@pytest.mark.parametrize("trainer", TRAINERS)
def test_the_best_is_that_of_the_lowest_validation(call, trainer):
    flags = f"{MORE[trainer]} {RISING}"
    out = done(call(f"-n 30 --keep-best 1 -c c.bin {flags}", trainer)).out
    found = val_losses(out)[1:]  # but step 0's, whose model is the -e file
    best = 2 * (1 + int(np.argmin(found)))
    assert 2 < best < 30 and sorted(found) != found[::-1]
    model, state = load_checkpoint("c_best.bin")
    assert model.step == best and state.extra["kept"]["best"] == pytest.approx(min(found), abs=1e-6)
    assert copies("c") == ["c_best.bin"] and len(list(Path().glob("c_best_state_*.bin"))) == 1
    done(call(f"-n {best} -c short.bin {flags}", trainer))
    assert_same_run("c_best.bin", "short.bin")


@pytest.mark.parametrize("stop", [3, 8, 13])
def test_a_resumed_run_keeps_what_one_never_stopped_keeps(call, stop):
    flags = f"{RISING} -k 4 --keep 2 --keep-best 1"
    done(call(f"-n 20 -c whole.bin {flags}"))
    done(call(f"-n {stop} -c part.bin {flags}"))
    done(call("--resume part.bin -n 20"))
    # the first part's last step was saved under its number; by then it is among those removed
    assert [name.removeprefix("part") for name in copies("part")] == [name[5:] for name in copies("whole")]
    for whole, part in zip(copies("whole"), copies("part")):
        assert_same_run(whole, part)


def test_killed_at_any_moment_the_copies_load_and_the_next_run_clears_up(folder):
    argv = [
        *tiny.options(steps=100000, val_every=2, sample_every=0),
        *shlex.split("-k 1 --keep 3 --keep-best 1 -c c.bin"),
    ]
    process = tiny.start("train_banded.py", argv, folder)
    for _ in range(6):
        tiny.wait_for(process, b"removed")
    process.kill()
    process.communicate()
    for name in copies("c"):
        load_checkpoint(name)
    assert 3 <= len(copies("c")) <= 5  # a fourth if it was not yet removed, and the best
    steps = read_model("c.bin").step + 4
    done(tiny.run_script("train_banded.py", ["--resume", "c.bin", "-n", steps], folder))
    numbered = [name for name in copies("c") if "best" not in name]
    assert numbered == [f"c_{step:08d}.bin" for step in (steps - 2, steps - 1, steps)]
    states = len(list(Path().glob("*_state_*.bin")))
    assert states == len(copies("c")) + 1


def test_what_another_run_wrote_is_not_taken_nor_removed(call, folder):
    Path("c_00000007.bin").write_bytes(b"mine")
    Path("c_best.bin").write_bytes(b"mine, too")
    before = snapshot(folder)
    check_refused(call("-n 9 -k 2 --keep 1 -c c.bin"), "--keep 1: c_00000007.bin exists already", code=2)
    check_refused(call("-n 9 --keep-best 1 -c c.bin"), "--keep-best 1: c_best.bin exists already", code=2)
    assert snapshot(folder) == before
    done(call("-n 9 -k 2 --keep 1 -v 2 --keep-best 1 -c c.bin --overwrite 1"))
    assert Path("c_00000007.bin").read_bytes() == b"mine"  # its number did not come up
    assert copies("c") == ["c_00000007.bin", "c_00000009.bin", "c_best.bin"] and read_model("c_best.bin").step


def test_a_copy_that_is_read_only_stays(call):
    done(call("-n 2 -k 1 --keep 2 -c c.bin -s 0"))
    os.chmod("c_00000001.bin", 0o444)
    done(call("--resume c.bin -n 6"))
    assert copies("c") == ["c_00000001.bin", "c_00000005.bin", "c_00000006.bin"]


def test_without_links_they_are_copies(call, monkeypatch):
    def refuse(*names):
        raise PermissionError(1, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    done(call("-n 4 -k 2 --keep 2 -c c.bin -s 0"))
    assert_same_run("c_00000004.bin", "c.bin")
    assert not os.path.samefile("c_00000004.bin", "c.bin") and load_checkpoint("c_00000002.bin")[1].step == 2


def test_going_on_from_a_copy_takes_names_of_its_own(call, folder):
    done(call(f"-n 8 -k 4 --keep 2 -c c.bin -o log.txt --log-json log.json {RISING}"))
    before = snapshot(folder)
    check_refused(call("--resume c_00000004.bin"), "c.bin kept it", "-c NAME", code=2)
    check_refused(call("--resume c_00000004.bin -c new.bin"), "a copy of c.bin, whose log is log.txt", code=2)
    check_refused(call("--resume c_00000004.bin -c new.bin -o new.txt"), "whose log is log.json", code=2)
    assert snapshot(folder) == before
    done(call("--resume c_00000004.bin -c new.bin -o new.txt --log-json new.json"))
    assert_same_run("new.bin", "c.bin")
    after = snapshot(folder)
    assert before.items() <= after.items()
    assert copies("new") == ["new_00000008.bin"]


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--keep 2 -k 1", ["--keep 2", "without -c"]),
        ("--keep-best 1", ["--keep-best 1", "without -c"]),
        ("--keep 2 -c c.bin", ["--keep 2", "without -k"]),
        ("--keep-best 1 -v 0 -c c.bin", ["--keep-best 1", "without -v"]),
        ("--keep -1 -c c.bin", ["--keep", "'-1'"]),
    ],
)
def test_flags_that_could_do_nothing_are_refused(call, folder, flags, words):
    before = snapshot(folder)
    check_refused(call(f"-n 3 {flags}"), *words, code=2)
    assert snapshot(folder) == before


@pytest.mark.parametrize("kept", [3, {"steps": 3}, {"steps": [-1]}, {"steps": ["1"]}, {"best": "low"}])
def test_a_state_with_other_copies_is_refused(call, kept):
    done(call("-n 2 -k 1 --keep 1 -c c.bin -s 0"))
    (path,) = Path().glob("c_state_*.bin")
    state = load_checkpoint("c.bin")[1]
    state.extra["kept"] = kept
    path.unlink()  # its second name stays as it is
    write_state(path, state)
    check_refused(call("--resume c.bin -n 3"), "c.bin", f"kept is {kept!r}")


# ----------------------------------------------------------------------------------------------------------------------
# --log-json


@pytest.mark.parametrize("trainer", TRAINERS)
def test_json_lines_say_what_is_printed_and_join(call, trainer):
    flags = f"{MORE[trainer]} -v 2 -s 0 --grad-clip 1"
    out = done(call(f"-n 6 -o whole.txt --log-json whole.json {flags}", trainer)).out
    lines = [json.loads(line) for line in Path("whole.json").read_text().splitlines()]
    steps = [line for line in lines if "train_loss" in line]
    assert [line["step"] for line in steps] == list(range(6))
    assert {line["step"] + 1: round(line["train_loss"], 6) for line in steps} == tiny.losses(out)
    assert [round(line["val_loss"], 6) for line in lines if "val_loss" in line] == val_losses(out)
    printed = re.findall(r"^lr (\S+), gradient norm (\S+)$", out, re.M)
    assert [(f"{line['lr']:.2e}", f"{line['gradient_norm']:.4f}") for line in steps] == printed
    rates = re.findall(r"\((\S+) ms, (\d+) tok/s\)", out)
    assert [(f"{line['ms']:.6f}", str(int(line["tokens_per_second"]))) for line in steps] == rates
    if trainer == "sparse":
        assert {"kl", "recall", "mass"} <= {name for line in lines for name in line}

    done(call(f"-n 3 -c part.bin -k 2 -o part.txt --log-json part.json {flags}", trainer))
    done(call("--resume part.bin -n 6", trainer))
    times = r', "ms": [^}]*?(?=, "gradient|})'
    joined, whole = (re.sub(times, "", Path(name).read_text()) for name in ("part.json", "whole.json"))
    assert [line for line in joined.splitlines() if '"step": 3, "val' not in line] == whole.splitlines()


def test_json_is_checked_like_the_log(call, folder):
    Path("j.json").write_text('{"step": 1, "train_loss": 3.0}\n')
    before = snapshot(folder)
    check_refused(call("-n 2 --log-json j.json"), "--log-json j.json: exists already", code=2)
    check_refused(call("-n 2 -o model.bin"), "-o model.bin", code=2)
    check_refused(call("-n 2 -o l.txt --log-json l.txt"), "--log-json l.txt: is the file of -o, too", code=2)
    assert snapshot(folder) == before
    done(call("-n 2 -c c.bin --log-json j.json --overwrite 1"))
    with open("j.json", "a") as file:
        file.write('{"step": 2, "trai')  # a killed run's
    done(call("--resume c.bin -n 3"))
    assert [json.loads(line)["step"] for line in open("j.json")] == [0, 0, 1, 2, 3]
    Path("j.json").write_text("step 1\n")
    check_refused(call("--resume c.bin -n 5"), "--log-json j.json: line 1 is b'step 1", '{"step": STEP')
