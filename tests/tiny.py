"""A GPT-2 small enough to train in milliseconds, its data, and ways to run a script on them."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from llmc import lock, resume
from llmc.checkpoint import DeepSeekConfig, GPT2Config, Model, named_views, tensor_shapes, write_model
from llmc.dataloader import write_tokens
from llmc.errors import run
from llmc.init import gpt2_init
from llmc.resume import load_checkpoint
from llmc.tokenizer import byte_tokenizer

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT = 60
NUMBER = r"-?[0-9]+\.[0-9]{6}"  # %f
CONFIG = GPT2Config(maxT=32, V=256, L=2, NH=2, C=16, Vp=320)  # with padding rows, which must stay zero
DEEPSEEK = DeepSeekConfig(maxT=32, V=256, L=2, NH=2, C=16, Vp=256, F=24, E=3, top=2, q_rank=8, kv_rank=12, R=4)
B, T = 2, 8

VERSE = b"""The quality of mercy is not strain'd,
It droppeth as the gentle rain from heaven
Upon the place beneath: it is twice blest;
It blesseth him that gives and him that takes.
"""
TRAIN_SAMPLES = (4, 3)  # of B*T tokens, in each shard: an epoch is 7 steps
VAL_SAMPLES = 3


def make_folder(folder: Path, config: GPT2Config = CONFIG, seed: int = 1) -> Path:
    """model.bin, train_00.bin and train_01.bin, val.bin and the tokenizer, in `folder`, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    write_model(folder / "model.bin", Model(config, gpt2_init(config, seed)))
    text = np.resize(np.frombuffer(VERSE, np.uint8), 4000).astype(np.uint16) % min(config.V, 256)
    for i, samples in enumerate(TRAIN_SAMPLES):
        write_tokens(folder / f"train_{i:02d}.bin", text[1000 * i :][: samples * B * T + 1])
    write_tokens(folder / "val.bin", text[3000:][: VAL_SAMPLES * B * T + 1])
    byte_tokenizer().write(folder / "byte_tokenizer.bin")
    return folder


def options(**changed) -> list[str]:
    """A training command line on make_folder's files; `changed` by long name, "_" for "-", None drops an option."""
    settings = dict(
        train_data="train_*.bin",
        val_data="val.bin",
        batch_size=B,
        seq_len=T,
        sample_tokens=12,
        device="cpu",
        overwrite=1,  # one folder serves many runs; test_outputs.py is about what is refused without
    )
    settings |= changed
    flags = [(f"--{name.replace('_', '-')}", str(value)) for name, value in settings.items() if value is not None]
    return [word for flag in flags for word in flag]


@dataclass
class Result:
    code: int
    out: str
    err: str


def call(capture, main, *argv) -> Result:
    """What `main(argv)` does as a command, in this process; `capture` is pytest's capfdbinary."""
    capture.readouterr()
    try:
        run(lambda: main([str(word) for word in argv]))
    except SystemExit as end:
        lock.release_all()  # as the end of the process does
        resume._ours.clear()
        captured = capture.readouterr()
        return Result(end.code, captured.out.decode(), captured.err.decode())
    raise AssertionError("run did not exit")


def command(script: str, *argv) -> list[str]:
    """The words of a command line that runs a script of the repository."""
    return [sys.executable, str(ROOT / script), *map(str, argv)]


def start(script: str, argv: Sequence, folder: Path, **popen) -> subprocess.Popen:
    """Start a script in `folder`; Ctrl-C works in it even where the tests run with it ignored."""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE) | popen
    listen = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731
    return subprocess.Popen(command(script, *argv), cwd=folder, env=one_thread(), preexec_fn=listen, **pipes)


def wait_for(process: subprocess.Popen, beginning: bytes) -> None:
    """Read the standard output of `process` up to a line with this beginning, or fail at its end."""
    for line in process.stdout:
        if line.startswith(beginning):
            return
    raise AssertionError(f"no line {beginning!r}: {process.communicate()[1]!r}")


def one_thread() -> dict[str, str]:
    """The environment, with BLAS kept to one thread: faster for small matrices on a busy machine."""
    return os.environ | {"OPENBLAS_NUM_THREADS": "1"}


def run_script(script: str, argv: Sequence, folder: Path) -> Result:
    """Run a script in `folder` to its end."""
    process = start(script, argv, folder)
    out, err = process.communicate(timeout=TIMEOUT)
    return Result(process.returncode, out.decode(errors="replace"), err.decode())


def check_refused(result: Result, *words: str, code: int = 1) -> None:
    """The command ended with `code`, one error on stderr that has all `words`, and a hint; no traceback."""
    assert result.code == code, result
    assert result.err.count("error: ") == 1 and result.err.count("---> HINT: ") == 1, result.err
    assert "Traceback" not in result.err and "Warning" not in result.err, result.err
    for word in words:
        assert word in result.err, f"{word!r} is not in {result.err!r}"


def views(model: Model) -> dict[str, np.ndarray]:
    """The tensors of a model by name."""
    return named_views(model.params, tensor_shapes(model.config))


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file of a folder with its bytes: what a command that fails must leave as it was."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def resized(**sizes) -> GPT2Config:
    """The tiny sizes with some replaced."""
    return replace(CONFIG, **sizes)


def done(result: Result) -> Result:
    """The command ended well and said nothing on stderr."""
    assert result.code == 0 and result.err == "", result
    return result


def losses(out: str) -> dict[int, float]:
    """{1-based step: train loss} as a trainer printed them."""
    return {int(step): float(loss) for step, loss in re.findall(rf"^step +(\d+)/\d+: train loss ({NUMBER})", out, re.M)}


def val_losses(out: str) -> list[float]:
    return [float(loss) for loss in re.findall(rf"^val loss ({NUMBER})$", out, re.M)]


def texts(out: str) -> list[str]:
    """The samples that a trainer printed."""
    return re.findall(r"^generating:\n---\n(.*?)\n---$", out, re.M | re.S)


def table(out: str) -> dict[str, str]:
    """The rows of the parameter table."""
    return {label.strip(): value.strip() for label, value in re.findall(r"^\| (.{21}) \| (.*) \|$", out, re.M)}


def without_times(out: str) -> str:
    return re.sub(r"\([0-9.]+ ms, \d+ tok/s\)|[0-9.]+ ms$", "", out, flags=re.M)


def assert_same_run(one: str, other: str) -> None:
    """Two checkpoints agree in the model file's bytes, and in all that the state holds but the settings."""
    assert Path(one).read_bytes() == Path(other).read_bytes()
    (_, a), (_, b) = load_checkpoint(one), load_checkpoint(other)
    assert a.m.tobytes() == b.m.tobytes() and a.v.tobytes() == b.v.tobytes()
    assert (a.step, a.rng_state, a.shard, a.sample) == (b.step, b.rng_state, b.shard, b.sample)
    assert (a.shuffle is None) == (b.shuffle is None)
    if a.shuffle:
        for name in ("shard_indices", "intra_shard_indices", "mt_key"):
            assert np.array_equal(getattr(a.shuffle, name), getattr(b.shuffle, name))
        assert a.shuffle.mt_pos == b.shuffle.mt_pos
