"""Run experiments: each run of a protocol that is not on file yet, then the tables and figures of its README.

    make experiments                                          # all five, preset cpu, two runs at a time
    make experiment NAME=00009 PRESET=smoke                   # one of them, a minute
    python experiments/run.py 00009 --seeds 1 --only fc2      # the runs of seed 1 with fc2 in their name
    python experiments/run.py all --no-runs                   # tables and figures anew, from results/

experiments/NAME/protocol.py says which runs there are: PRESETS, runs(seed, p), report(runs) and draw(runs, folder). A
run is a trainer as one types it, in a process of its own; what it printed becomes results/PRESET/RUN.SEED.json. It is
on file as long as its commands, the code that it imports and its data stay what they were: a sweep that was killed goes
on where it stopped. Seeds come one after another, so that a part of a sweep is a whole table of fewer seeds.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))  # so that it runs from any folder
if __name__ == "__main__":
    from llmc import startup

    startup.begin()

import re
from pathlib import Path

from experiments.sweep import ROOT, Sweep, clock, perform_all
from llmc.cli import ArgumentParser, positive_int
from llmc.errors import UserError, run
from llmc.files import atomic_write

FOLDER = Path(__file__).resolve().parent
NAMES = ("00007", "00009", "adaptive", "optimal_sparsity", "toroidal")
PRESETS = ("smoke", "cpu", "gpu", "paper")
BEGIN, END = "<!-- results: {} -->\n", "<!-- end of the results -->\n"
FRONT = ("00009", "toroidal")  # whose headline(runs), of preset cpu, README.md shows, with the figure


def block(sweep: Sweep) -> str:
    """What the README shows of a preset: its tables, and on what the runs were made."""
    runs = sweep.complete()
    if not runs:
        return f"Not run yet: `make experiment NAME={sweep.name} PRESET={sweep.preset}`.\n"
    picture = f"![experiment {sweep.name}, preset {sweep.preset}]({sweep.preset}.png)"
    return f"{sweep.protocol.report(runs)}\n{picture}\n\n{origin(runs)}"


def front(sweep: Sweep) -> str:
    """What README.md shows of an experiment: a short table, and its figure."""
    runs = sweep.complete()
    if not runs:
        return f"Not run yet: `make experiment NAME={sweep.name}`.\n"
    seeds = len({each["seed"] for each in runs})
    picture = f"![experiment {sweep.name}](experiments/{sweep.name}/{sweep.preset}.png)"
    intervals = ", intervals of 95 % over seeds" if seeds > 1 else ": one seed shows what there is to ask, not more"
    made = f"{seeds} seed{'s' * (seeds > 1)}, {len(runs)} runs, preset {sweep.preset}{intervals}"
    return f"{sweep.protocol.headline(runs)}\n{picture}\n\n{made} ([all of it](experiments/{sweep.name}/README.md)).\n"


def origin(runs: list[dict]) -> str:
    """Where results come from: device, preset, seeds, time, data, code."""

    def all_of(what: str) -> str:
        return ", ".join(dict.fromkeys(what.format(**each) for each in runs))

    seconds = sum(each["measured"]["seconds"] for each in runs)
    data = {name: sha for each in runs for name, sha in each["data"].items()}
    return (
        f"{len(runs)} runs, preset {runs[0]['preset']}, seeds {all_of('{seed}')}; {all_of('{device}')}; "
        f"{all_of('{versions[processor]}, {versions[blas]}')}; {clock(seconds)} of run time in all. "
        f"Data (sha256): {', '.join(f'{name} {sha[:12]}' for name, sha in data.items())}. Code: {all_of('{code}')}.\n"
    )


def write_block(page: Path, preset: str, text: str) -> None:
    """Put `text` between the preset's markers of a page, if there is one and it has them."""
    if not page.exists():
        return
    before, begin, rest = page.read_text().partition(BEGIN.format(preset))
    if begin:
        with atomic_write(page) as file:
            file.write(f"{before}{begin}{text}{END}{rest.partition(END)[2]}".encode())


def main(argv: list[str] | None = None) -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=(*NAMES, "all"), help="the experiment, or all of them")
    parser.add_argument("--preset", choices=PRESETS, default="cpu", help="sizes: " + ", ".join(PRESETS))
    parser.add_argument("--seeds", help="seeds, as in 1,2 (default: the preset's)")
    parser.add_argument("--only", default="", help="part of the names of the runs to make (default: all)")
    parser.add_argument("--jobs", type=positive_int, help="runs at a time (default: the preset's)")
    parser.add_argument(
        "--folder", type=Path, help="where NAME/results lies (default: experiments; smoke: build/smoke)"
    )
    parser.add_argument("--no-runs", action="store_true", help="tables and figures only, from what is on file")
    args = parser.parse(argv)
    if args.seeds and not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", args.seeds):
        raise UserError(f"--seeds {args.seeds}: expected numbers, as in 1,2", exit_code=2)
    folder = args.folder or (ROOT / "build" / "smoke" if args.preset == "smoke" else FOLDER)
    sweeps = [Sweep(name, args.preset, folder / name) for name in (NAMES if args.name == "all" else [args.name])]
    if not args.no_runs:
        todo = []
        for sweep in sweeps:
            seeds = [int(seed) for seed in args.seeds.split(",")] if args.seeds else list(sweep.sizes.seeds)
            todo += [(seeds.index(each.seed), sweep, each) for each in sweep.pending(seeds, args.only)]
        todo.sort(key=lambda item: item[0])  # the first seed of every experiment first
        jobs = args.jobs or sweeps[0].sizes.jobs
        print(f"{len(todo)} runs to make, {jobs} at a time", flush=True)
        perform_all([(sweep, each) for _, sweep, each in todo], jobs)
    for sweep in sweeps:
        text = block(sweep)
        print(text, end="")
        write_block(sweep.folder / "README.md", args.preset, text)
        if sweep.name in FRONT and args.preset == "cpu" and sweep.folder.parent == FOLDER:
            write_block(ROOT / "README.md", f"{sweep.name} cpu", front(sweep))
        if runs := sweep.complete():
            sweep.protocol.draw(runs, sweep.folder)
    return 0


if __name__ == "__main__":
    run(main)
