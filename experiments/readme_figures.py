"""The runs that README.md and doc/ show: repeats them and writes what they print between the pages' markers.

    make figures                                       # all of them
    python experiments/readme_figures.py --only bytes  # one of train_banded, bytes, train_sparse_attn, train_toroidal

The picture of make train_sparse_attn is drawn anew, too, which needs matplotlib: pip install -r requirements-plot.txt

The commands are not written here: they are those of the Makefile's recipes and of README's own code block. Each run
has a folder in build/readme with models of its own. What a command printed is kept there and taken again as long as
neither the command nor the code changes, so that a broken run goes on where it stopped. OPENBLAS_CORETYPE and
OPENBLAS_L2_SIZE are unset, OPENBLAS_NUM_THREADS is 2: all three change the last digits of losses, and after hundreds of
steps the first ones as well.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))  # so that it runs from any folder
if __name__ == "__main__":
    from llmc import startup

    startup.begin()

import hashlib
import re
import shutil
import subprocess
from pathlib import Path

from benchmarks.turns import OVERRIDES
from llmc.cli import ArgumentParser
from llmc.errors import UserError, run
from llmc.files import atomic_write
from llmc.plot import draw, read_log

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "experiments" / "indexer_warmup.png"
README, FOLDER = ROOT / "README.md", ROOT / "build" / "readme"
CODE = ("train_*.py", "data/*.py", "llmc/*.py", "systems/**/*.py", "kernels/*.py", "kernels/cpu/**/*.py")
PAGES = {  # of a run's figures
    "train_banded": README,
    "bytes": README,
    "train_sparse_attn": ROOT / "doc" / "sparse_attention.md",
    "train_toroidal": ROOT / "doc" / "toroidal.md",
}
END = "<!-- end of the figures -->\n"
PYTHON = re.compile(r"(?:\S*/)?python3? (?=(?:data/|train_)\w+\.py)")
LAYERS = [r"layer \d+: "] * 4 + ["indexer and selection"]
RUNS = {  # name: {script's turn: the lines that its page shows, each the next that begins so; "last": the last of them}
    "train_banded": {
        0: [
            *(r"\| FC1 banded mask", r"\| FC1 connections", "val loss", "step +1/", "val loss", r"step +(\d+)/\1:"),
            *("val loss", "saving", "checkpoint saved", "generating:", "---", "", "", "device:", "text from it:"),
        ]
    },
    "bytes": {0: ["val loss", r"step +(\d+)/\1:", "val loss", "device:"]},
    "train_sparse_attn": {
        1: [
            *(r"\| attention", r"\| k = ", "val loss", *LAYERS, "indexer warmed up", "val loss", *LAYERS),
            *("last val loss", *LAYERS),
        ]
    },
    "train_toroidal": {
        1: [r"\| toroidal layers", r"\| depth", "val loss", "perplexity", "last val loss", "perplexity"],
        2: [r"\| control", "val loss", "perplexity", "last val loss", "perplexity"],
    },
}


def commands(name: str) -> list[str]:
    """What the run `name` types, without the installing: a make target's recipes, or README's block on bytes."""
    if name == "bytes":
        blocks = re.findall(r"```bash\n(.*?)```", PAGES[name].read_text(), re.DOTALL)
        lines = next(block for block in blocks if "-e byte.bin" in block)
    else:
        recipes = ["make", "--no-print-directory", "-n", "-B", name]
        lines = subprocess.run(recipes, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [PYTHON.sub("", line) for line in lines.splitlines() if PYTHON.match(line)]


def begin(name: str) -> str:
    """The marker in front of the figures of `name`."""
    return f"<!-- figures: {'the commands above' if name == 'bytes' else f'make {name}'} -->\n"


def typed(command: str) -> str:
    """`command` for bash, on README's data and device whatever else there is, and over files of an earlier run."""
    script, _, flags = command.partition(" ")
    if script.startswith("train_"):
        data = ROOT / "data" / "shakespeare" / f"shakespeare_{'byte_' if '-e byte.bin' in flags else ''}"
        flags = f"--device cpu --overwrite 1 -i '{data}train.bin' -j '{data}val.bin' {flags}"
    elif script == "data/create_model.py":
        flags += " --force"
    return f"set -o pipefail; '{sys.executable}' '{ROOT / script}' {flags}"


def code() -> str:
    """A digest of all that a run on the CPU executes."""
    digest = hashlib.sha256()
    for folder in CODE:
        for path in sorted(ROOT.glob(folder)):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def fresh(folder: Path) -> None:
    """Empty the folder of a run unless today's code filled it: what an earlier run left changes what is printed."""
    stamp, today = folder / "code.txt", code()
    if not stamp.exists() or stamp.read_text() != today:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        stamp.write_text(today)


def output(path: Path, command: str) -> list[str]:
    """The lines that `command` prints in the folder of `path`, from `path` if it holds them."""
    first = f"{command}\n"
    if not (path.exists() and path.read_text().startswith(first)):
        print(f"{path.parent.name}: {command}", flush=True)
        environment = {name: value for name, value in os.environ.items() if name not in OVERRIDES}
        environment["OPENBLAS_NUM_THREADS"] = "2"
        done = subprocess.run(["bash", "-c", typed(command)], cwd=path.parent, capture_output=True, env=environment)
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip()
            raise UserError(f"{command}: exit status {done.returncode}: {said}")
        with atomic_write(path) as file:
            file.write(first.encode() + done.stdout.replace(f"{ROOT}/".encode(), b""))
    return path.read_text(errors="replace").split("\n")[1:]


def excerpt(lines: list[str], patterns: list[str]) -> list[str]:
    """The lines that `patterns` ask for, one after another, and "..." where lines between them are left out."""
    shown, at = [], 0
    for pattern in patterns:
        wanted = pattern.removeprefix("last ")
        found = [here for here in range(at, len(lines)) if re.match(wanted, lines[here])]
        if not found:
            raise UserError(f"no line like {pattern!r} after {shown[-1:]}", "has the output changed? mend RUNS")
        here = found[-1] if wanted != pattern else found[0]
        shown += ["..."] * (bool(shown) and here > at) + [lines[here].rstrip()[:120]]
        at = here + 1
    return shown


def block(name: str) -> str:
    """Repeat the run `name`; what its page shows of it."""
    folder, trained = FOLDER / name, []
    fresh(folder)
    for number, command in enumerate(dict.fromkeys(commands(name))):
        lines = output(folder / f"{number}.txt", command)
        if command.startswith("train_"):
            trained.append(lines)
    parts = ["\n".join(excerpt(trained[turn], patterns)) for turn, patterns in RUNS[name].items()]
    return "```\n" + "\n...\n".join(parts) + "\n```\n"


def main(argv: list[str] | None = None) -> int:
    parser = ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", choices=RUNS, help="the run to repeat (default: all)")
    args = parser.parse(argv)
    names = [args.only] if args.only else [*RUNS]
    for name in names:
        text = block(name)
        page = PAGES[name]
        before, _, rest = page.read_text().partition(begin(name))
        if END not in rest:
            lines = f"{begin(name).strip()} and {END.strip()}"
            raise UserError(f"{page}: no lines {lines}", "put them where the figures go")
        with atomic_write(page) as file:
            file.write(f"{before}{begin(name)}{text}{END}{rest.partition(END)[2]}".encode())
        print(f"{begin(name)}{text}{END}", end="")
    if "train_sparse_attn" in names:
        log = FOLDER / "train_sparse_attn" / "log_sparse.txt"
        draw({"sparse": read_log(str(log))}, PICTURE, mark=100)
    return 0


if __name__ == "__main__":
    run(main)
