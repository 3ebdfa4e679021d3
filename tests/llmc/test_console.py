"""The table, the -o log and the command line."""

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from llmc import cli, table
from llmc.errors import UserError
from llmc.logger import Logger

ROOT = Path(__file__).parent.parent.parent

# ---------------------------------------------------------------------------------------------------------------------
# table


def test_table_is_the_c_trainers(capsys):
    table.heading()
    table.row("output log file", None)
    table.row("batch size B", 4, "%d")
    table.row("learning rate", 3e-4, "%f")
    table.row("learning rate", np.float32(3e-4), "%e")
    table.rule()
    assert capsys.readouterr().out == (
        "+-----------------------+----------------------------------------------------+\n"
        "| Parameter             | Value                                              |\n"
        "+-----------------------+----------------------------------------------------+\n"
        "| output log file       | NULL                                               |\n"
        "| batch size B          | 4                                                  |\n"
        "| learning rate         | 0.000300                                           |\n"
        "| learning rate         | 3.000000e-04                                       |\n"
        "+-----------------------+----------------------------------------------------+\n"
    )


def test_table_prints_a_long_value_whole(capsys):
    table.row("train data pattern", "d" * 60)
    assert capsys.readouterr().out == "| train data pattern    | " + "d" * 60 + " |\n"


# ---------------------------------------------------------------------------------------------------------------------
# log


def write_steps(log, start, end):
    for step in range(start, end):
        if step % 5 == 0:
            log.val(step, 5 - step / 7)
        log.train(step, np.float32(5 - step / 9))


def test_log_lines(tmp_path):
    log = Logger(tmp_path / "log.txt")
    log.val(0, 10.82496)
    log.train(0, np.float32(10.5))
    log.train(12, float("nan"))
    assert (tmp_path / "log.txt").read_bytes() == b"s:0 tel:10.8250\ns:0 trl:10.5000\ns:12 trl:nan\n"  # no close needed


def test_log_without_path_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    log = Logger(None, start=3)
    log.val(0, 1.0)
    log.train(0, 1.0)
    log.close()
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr() == ("", "")


def test_new_log_empties_the_file(tmp_path):
    path = tmp_path / "log.txt"
    path.write_text("s:0 tel:1.0000\n")
    Logger(path).close()
    assert path.read_bytes() == b""


@pytest.mark.parametrize("torn", [b"", b"s:14", b"s:13 tr", b"s:13 trl:4.2"])
def test_resumed_log_equals_an_uninterrupted_one(tmp_path, torn):
    whole, joined = tmp_path / "whole.txt", tmp_path / "joined.txt"
    log = Logger(whole)
    write_steps(log, 0, 20)
    log.close()
    log = Logger(joined)
    write_steps(log, 0, 13)  # killed here; its last checkpoint was at 10
    log.close()
    with open(joined, "ab") as file:
        file.write(torn)
    if torn == b"s:14":  # not even a step with its space: who knows what it was
        with pytest.raises(UserError, match="line 17 is"):
            Logger(joined, start=10)
        return
    log = Logger(joined, start=10)
    write_steps(log, 10, 20)
    log.close()
    assert joined.read_bytes() == whole.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["joined.txt", "whole.txt"]


def test_resumed_log_may_be_new_and_may_be_a_link(tmp_path):
    Logger(tmp_path / "new.txt", start=10).close()
    assert (tmp_path / "new.txt").read_bytes() == b""
    (tmp_path / "real.txt").write_text("s:9 trl:1.0000\ns:10 trl:1.0000\n")
    (tmp_path / "link.txt").symlink_to(tmp_path / "real.txt")
    Logger(tmp_path / "link.txt", start=10).close()
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "real.txt").read_bytes() == b"s:9 trl:1.0000\n"


@pytest.mark.parametrize(
    "text", ["step 1: train loss 3\n", "s:1 trl:3.0000\n\n", "s:x trl:3.0\n", "s:3 trl:2.0", "\xff\n"]
)
def test_resume_refuses_what_is_no_log_and_leaves_it(tmp_path, text):
    path = tmp_path / "log.txt"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=r"^-o .*log\.txt: line \d is .*expected s:STEP tel:LOSS") as error:
        Logger(path, start=5)
    assert error.value.hint
    assert path.read_text(encoding="latin-1") == text


def test_unwritable_log_is_refused_at_the_start(tmp_path):
    with pytest.raises(UserError, match=r"writing -o .*No such file") as error:
        Logger(tmp_path / "none" / "log.txt")
    assert error.value.hint == f"make its folder first: mkdir -p {tmp_path / 'none'}"
    with pytest.raises(UserError, match=r"writing -o .*directory"):
        Logger(tmp_path)
    with pytest.raises(UserError, match=r"writing -o .*directory"):
        Logger(tmp_path, start=3)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_full_disk_is_a_user_error():
    log = Logger("/dev/full")
    with pytest.raises(UserError, match="writing -o /dev/full: No space left") as error:
        log.train(0, 1.0)
    assert "df -h" in error.value.hint
    log.close()


# ---------------------------------------------------------------------------------------------------------------------
# command line


def make_parser():
    parser = cli.ArgumentParser(prog="python train.py", description="Train.\n\n    as  written", epilog="run:\n    it")
    group = parser.add_argument_group("work")
    group.add_argument("-n", "--steps", type=cli.any_int, default=-1, help="steps; -1 = one epoch")
    group.add_argument("-1", "--fc1", type=cli.natural, default=0, help="bandwidth of FC1; 0 = dense, 100%%")
    group.add_argument("-l", "--learning-rate", type=cli.positive_float, default=3e-4, help="rate")
    group.add_argument("-c", "--checkpoint", help="file")
    group.add_argument("--shuffle", type=cli.flag01, default=True, help="0 or 1")
    group.add_argument("--schedule", choices=("cosine", "linear"), default="cosine", help="shape")
    group.add_argument("--resume", help="file")
    return parser


@pytest.mark.parametrize(
    "argv, expected",
    [
        ("-n -1", {"steps": -1}),
        ("-n -1 -1 256", {"steps": -1, "fc1": 256}),
        ("-1 256 -n 5", {"steps": 5, "fc1": 256}),
        ("--steps -1", {"steps": -1}),
        ("--steps=-1", {"steps": -1}),
        ("-n 3 --steps 4 -n 5", {"steps": 5}),
        ("-c -n -n 2", {"checkpoint": "-n", "steps": 2}),
        ("-c --help", {"checkpoint": "--help"}),
        ("-c a=b", {"checkpoint": "a=b"}),
        ("--checkpoint=a=b", {"checkpoint": "a=b"}),
        ("--shuffle 0 -l 1e-3", {"shuffle": False, "learning_rate": 1e-3}),
        ("", {}),
    ],
)
def test_values_that_parse(argv, expected):
    defaults = dict(steps=-1, fc1=0, learning_rate=3e-4, checkpoint=None, shuffle=True, schedule="cosine", resume=None)
    parser = make_parser()
    assert vars(parser.parse(argv.split())) == defaults | expected
    assert parser.explicit(argv.split()) == expected.keys()


def test_values_may_hold_spaces_or_nothing():
    assert make_parser().parse(["-c", "--a b c"]).checkpoint == "--a b c"
    assert make_parser().parse(["-c", ""]).checkpoint == ""


@pytest.mark.parametrize(
    "argv, message, hint",
    [
        ("-n 1.5", "-n/--steps: '1.5', expected a whole number", "python train.py --help"),
        ("-1 -2", "-1/--fc1: '-2', expected a whole number in 0..2147483647", "python train.py --help"),
        ("-l nan", "-l/--learning-rate: 'nan', expected a number above 0", "python train.py --help"),
        ("--shuffle yes", "--shuffle: 'yes', expected 0 or 1", "python train.py --help"),
        ("--schedule square", "--schedule: invalid choice: 'square'", "python train.py --help"),
        ("-n", "-n: its value is missing", "python train.py --help"),
        ("-n 5 --steps", "--steps: its value is missing", "python train.py --help"),
        ("--step 5", "--step: unknown flag", "did you mean --steps?"),  # no abbreviation
        ("--learning_rate 5", "--learning_rate: unknown flag", "did you mean --learning-rate?"),
        ("--shufle=1", "--shufle=1: unknown flag", "did you mean --shuffle?"),
        ("-steps 5", "-steps: unknown flag", "did you mean --steps?"),
        ("-N 5", "-N: unknown flag", "did you mean -n?"),
        ("-x 5", "-x: unknown flag", "python train.py --help"),
        ("-n5", "-n5: unknown flag", "put a space between flag and value: -n 5"),
        ("-n=5", "-n=5: unknown flag", "put a space between flag and value: -n 5"),
        ("-- 5", "--: unknown flag", None),
        ("model.bin", "model.bin: expected a flag", "python train.py --help"),
        ("-n 5 6", "6: expected a flag; flags and values come in pairs", "python train.py --help"),
    ],
)
def test_usage_errors(argv, message, hint):
    with pytest.raises(UserError) as error:
        make_parser().parse(argv.split())
    assert error.value.message.startswith(message)
    assert error.value.hint.startswith(hint or "")
    assert error.value.exit_code == 2


def test_saved_settings_stand_in_for_defaults_and_typed_ones_win():
    saved = {"steps": 2000, "fc1": 256, "shuffle": False, "learning_rate": 1e-5, "checkpoint": None}
    args = make_parser().parse(["--resume", "x.bin", "-1", "64", "-l", "0.0003"], saved)
    assert (args.steps, args.fc1, args.shuffle, args.learning_rate) == (2000, 64, False, 3e-4)
    assert (args.checkpoint, args.schedule, args.resume) == (None, "cosine", "x.bin")


def test_saved_settings_survive_what_a_typed_default_would_hide():
    assert make_parser().parse(["-n", "-1"], {"steps": 2000}).steps == -1  # typed, though equal to the default


@pytest.mark.parametrize(
    "saved",
    [
        {"steps": 1.5},
        {"steps": "many"},
        {"steps": None},
        {"fc1": -1},
        {"fc1": [1]},
        {"schedule": "square"},
        {"learning_rate": float("nan")},
        {"shuffle": 2},
        {"checkpoint": {}},
        {"other": 1},
    ],
)
def test_saved_settings_are_checked(saved):
    (name,) = saved
    with pytest.raises(UserError, match=f"saved setting {name}: ") as error:
        make_parser().parse([], saved)
    assert error.value.hint


@pytest.mark.parametrize(
    "read, good, bad",
    [
        (cli.positive_int, {"1": 1, "+7": 7, "2147483647": 2**31 - 1}, ["0", "-1", "2147483648", "1_0", " 1", "٣", ""]),
        (cli.natural, {"0": 0, "007": 7}, ["-1", "0x1", "1e3", "9" * 5000]),
        (cli.any_int, {"-1": -1, "0": 0}, ["-2147483648", "1.0", "-"]),
        (cli.seed, {"0": 0, "18446744073709551615": 2**64 - 1}, ["-1", "18446744073709551616"]),
        (cli.positive_float, {"1e-5": 1e-5, "2": 2.0}, ["0", "-1", "nan", "inf", "1e39", "x", ""]),
        (cli.natural_float, {"0": 0.0, "256": 256.0}, ["-1e-9", "nan", "-inf"]),
        (cli.fraction, {"0": 0.0, "1": 1.0, ".5": 0.5}, ["1.0001", "-0.1", "nan"]),
        (cli.flag01, {"0": False, "1": True}, ["2", "true", ""]),
    ],
)
def test_types(read, good, bad):
    assert {text: read(text) for text in good} == good
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match="expected"):
            read(text)


def test_help_shows_defaults_groups_and_examples_as_written():
    parser = make_parser()
    text = parser.format_help()
    assert text == parser.format_help()
    words = " ".join(text.split())
    assert "usage: python train.py" in words and "work:" in text
    assert "steps; -1 = one epoch (default: -1)" in words and "100% (default: 0)" in words
    assert "rate (default: 0.0003)" in words and "0 or 1 (default: 1)" in words and "file (default: none)" in words
    assert "\n    as  written\n" in text and "\nrun:\n    it\n" in text


SCRIPT = """
from llmc import cli, errors
def main():
    parser = cli.ArgumentParser()
    parser.add_argument("-n", "--steps", type=cli.positive_int, default=20, help="steps")
    print(parser.parse().steps)
errors.run(main)
"""


@pytest.mark.parametrize(
    "argv, code, out, err",
    [
        (["-n", "3"], 0, "3\n", ""),
        (["-n", "0"], 2, "", "error: -n/--steps: '0', expected a whole number in 1..2147483647\n"),
        (["--stps", "1"], 2, "", "error: --stps: unknown flag\n---> HINT: did you mean --steps? python train_x.py"),
    ],
)
def test_exit_codes(tmp_path, argv, code, out, err):
    script = tmp_path / "train_x.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, script, *argv], capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)}, check=False
    )
    assert (done.returncode, done.stdout) == (code, out)
    assert done.stderr.startswith(err) and "Traceback" not in done.stderr
    assert not err or "---> HINT: " in done.stderr
