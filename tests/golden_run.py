"""The input files of the golden runs, and how train_banded.py is called to repeat them.

python tests/golden_run.py FOLDER    writes model, shards and tokenizer, repeats the three runs there and compares
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))  # so that it runs from any folder
if __name__ == "__main__":
    from llmc import startup

    startup.begin()

import subprocess
import zlib
from pathlib import Path

import numpy as np

from llmc.checkpoint import (
    MATRICES,
    GPT2Config,
    Model,
    named_views,
    num_parameters,
    tensor_shapes,
    write_model,
)
from llmc.dataloader import write_tokens
from llmc.errors import UserError, run
from llmc.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(__file__).parent / "golden"
CONFIG = GPT2Config(maxT=64, V=510, L=2, NH=4, C=64, Vp=512)
INITIAL_CRC = 0xD01A896C  # of the bytes of the parameters
STRIDE = 13  # which parameters, logits and gradients golden.npz keeps
FILES = ["-e", "model.bin", "-i", "train_*.bin", "-j", "val_0000.bin"]
SIZES = ["-t", "32", "-b", "4", "-n", "41", "-l", "3e-4", "-v", "10", "-m", "5", "-s", "0"]
WORKLOAD = [*FILES, *SIZES, "--device", "cpu"]
RUNS = {
    "dense": ["-d", "1"],
    "fc1_w64_maskinit": ["-w", "64"],
    "both_96_64_nomaskinit": ["-1", "96", "-2", "64", "--mask-init", "0"],
}


def load() -> dict[str, np.ndarray]:
    """The arrays of golden.npz by name."""
    with np.load(GOLDEN / "golden.npz") as arrays:
        return dict(arrays)


def initial_params() -> np.ndarray:
    """The parameters of the file that the C reference was given, which NumPy's default_rng drew, seed 11.

    Raises UserError if this NumPy draws others, as it may: then the runs have nothing to be compared with.
    """
    params = np.zeros(num_parameters(CONFIG), np.float32)
    generator = np.random.default_rng(11)
    for name, tensor in named_views(params, tensor_shapes(CONFIG)).items():
        if name in MATRICES:
            generator.standard_normal(dtype=np.float32, out=tensor)
            tensor *= np.float32(0.02 / np.sqrt(2 * CONFIG.L) if name in ("attprojw", "fcprojw") else 0.02)
        elif name in ("ln1w", "ln2w", "lnfw"):
            tensor[...] = 1
        if name == "wte":
            tensor[CONFIG.V :] = 0
    if (crc := zlib.crc32(params)) != INITIAL_CRC:
        found = f"NumPy {np.__version__} draws parameters of CRC-32 {crc:#x}, expected {INITIAL_CRC:#x}"
        raise UserError(f"the golden runs' model: {found}", "pip install numpy==2.4.6")
    return params


def write_inputs(folder: Path) -> None:
    """Write the runs' model.bin, shards and tokenizer.bin."""
    write_model(folder / "model.bin", Model(CONFIG, initial_params()))
    for name in ("train_0000", "train_0001", "val_0000"):
        write_tokens(folder / f"{name}.bin", load()[name])
    words = [bytes([byte]) for byte in range(256)] + [b" w%d" % i for i in range(256, 509)]
    Tokenizer([*words, b"<|endoftext|>"], eot=509).write(folder / "tokenizer.bin")


def main() -> int:
    if len(sys.argv) != 2:
        raise UserError("one argument expected: the folder to write to", "python tests/golden_run.py FOLDER", 2)
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    write_inputs(folder)
    status = 0
    for name, band in RUNS.items():
        print(f"== {name}", flush=True)
        command = [
            sys.executable,
            str(ROOT / "train_banded.py"),
            *WORKLOAD,
            *band,
            "-c",
            f"{name}.bin",
            "--overwrite",
            "1",
        ]
        with open(folder / f"{name}.txt", "w") as capture:
            subprocess.run(command, cwd=folder, stdout=capture, check=True)
        diff = [sys.executable, "-m", "llmc.diff", folder / f"{name}.txt", GOLDEN / f"{name}.log", "--tol", "2e-5"]
        status |= subprocess.run(diff, cwd=ROOT).returncode
    return status


if __name__ == "__main__":
    run(main)
