"""What the README says: its commands parse, its make targets exist, its densities are the kernels'."""

import re
import shlex
from pathlib import Path

import pytest

import generate
import train_banded
from data import create_model
from kernels import cpu

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PARSERS = {
    "train_banded.py": lambda argv: train_banded.arguments().parse(argv),
    "generate.py": lambda argv: generate.arguments().parse(argv),
    "data/create_model.py": create_model.parse_arguments,
}


@pytest.mark.parametrize("script", PARSERS)
def test_commands_parse(script):
    """Every command of the README that calls the script has flags and values that it takes."""
    commands = re.findall(rf"python {re.escape(script)}([^`\n]*)", README)
    assert commands
    for command in commands:
        if "--help" not in command:
            PARSERS[script](shlex.split(command, comments=True))


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z_]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"`?\bmake ([a-z_]+)", README))
    assert {"train_banded", "test", "lint", "bench", "diff"} <= named & targets
    assert named - targets <= {"uses"}


def test_density_table():
    table = README[README.index("| C | w = ") :].partition("\n\n")[0].splitlines()
    header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in table)
    widths = [int(cell.removeprefix("w = ")) for cell in header[1:]]
    assert len(widths) == 5 and len(rows) == 4
    for C, *densities in rows:
        for width, density in zip(widths, densities):
            kept = cpu.band_count(4 * int(C), int(C), width) / (4 * int(C) ** 2)
            assert density == f"{100 * kept:.1f}%"
