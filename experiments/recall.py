"""Tagged recall (data/recall.py): does the indexer find the one key that matters?

    make recall                                      # seven arms, two seeds; the table goes into doc/ and README.md
    python experiments/recall.py --seeds 3,4,5       # more seeds; finished runs in build/recall are kept
    python experiments/recall.py --arm 'one list'    # this arm alone; the others keep what experiments/recall.json has
    python experiments/recall.py --no-runs           # the tables anew, from experiments/recall.json

For each seed a dense model of 0.13M parameters learns the task (600 steps). From its weights every arm goes on for 300
steps with T = 128 and, but for dense, k = 16 keys a query; the indexers' arms first warm their indexer up (150 steps).
An answer stands 33 to 126 tokens back: a window of the last 16 keys, in two layers, cannot reach it. Queries with one
list have the last 9 to 16 keys and 4 that the 8 queries before chose: 1,984 pairs, where the other arms keep 1,928.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))  # so that it runs from any folder
if __name__ == "__main__":
    from llmc import startup

    startup.begin()

import json
import re
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from kernels.cpu.blocks import num_threads
from llmc.cli import ArgumentParser
from llmc.errors import UserError, run
from llmc.files import atomic_write

ROOT = Path(__file__).resolve().parent.parent
README, PAGE = ROOT / "README.md", ROOT / "doc" / "sparse_attention.md"
RESULTS = ROOT / "experiments" / "recall.json"
BEGIN, END = "<!-- table: make recall -->\n", "<!-- end of the table -->\n"
T, K = 128, 16
MODEL = "--vocab 296 -C 64 -L 2 -H 4 -T 128"
COMMON = f"-b 32 -t {T} --weight-decay 0.1 --decay-all 0 --beta2 0.95 --grad-clip 1 --warmup 50 -m 8 -s 0"
COMMON += " --answers-after 256:288 --device cpu"
LEARN = "--attention dense -n 600 -l 3e-3 --lr-schedule linear -v 100"
GO_ON = "-l 1e-3 --lr-schedule cosine --final-lr-frac 0.1 -v 150"
INDEXER = "--indexer-dim 16 --indexer-lr-sparse 2e-3"
SPARSE = f"--top-k {K} {INDEXER}"
ARMS = {  # name in the table: flags
    "dense": "--attention dense -n 300",
    "oracle (dense attention's own top k)": f"{SPARSE} --selector oracle -n 300",
    "**indexer**, KL, warm-up 150": f"{SPARSE} --indexer-warmup 150 -n 450",
    "random": f"{SPARSE} --selector random -n 300",
    "indexer, untrained": f"{SPARSE} --train-indexer 0 -n 300",
    "recency (last 16)": f"{SPARSE} --selector recency -n 300",
    "indexer, one list for 8 queries": f"--top-k 20 --share 8 {INDEXER} --indexer-warmup 150 -n 450",
}
ANSWERS = re.compile(r"answers: accuracy ([\d.]+)(?:, source selected ([\d., ]+))?")
LAYER = re.compile(r"layer \d+: (?:KL ([\d.]+), )?recall@k ([\d.]+), mass@k ([\d.]+), kept ([\d.]+) of (\d+) pairs")


def command(script: str, flags: str) -> list[str]:
    return [sys.executable, str(ROOT / script), *flags.split()]


def output(folder: Path, name: str, flags: str) -> str:
    """What train_sparse_attn.py prints, from the last time if it came to its end with the same flags."""
    path = folder / f"{name}.txt"
    first = f"{flags}\n"
    if path.exists() and path.read_text().startswith(first):
        return path.read_text()
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}  # seeds run beside each other
    began = time.perf_counter()
    done = subprocess.run(command("train_sparse_attn.py", flags), capture_output=True, text=True, env=environment)
    if done.returncode:
        raise UserError(f"{name}: train_sparse_attn.py {flags} failed: {done.stderr.strip()}")
    minutes = (time.perf_counter() - began) / 60
    print(f"{name}: {ANSWERS.findall(done.stdout)[-1][0]} of the answers, {minutes:.1f} minutes", flush=True)
    with atomic_write(path) as file:
        file.write(f"{first}{done.stdout}minutes {minutes:.3f}\n".encode())
    return path.read_text()


def figures(text: str) -> dict:
    """The last validation of a run, and how accurate it was right at its start."""
    *_, (accuracy, found) = ANSWERS.findall(text)
    layers = LAYER.findall(text)[-2:]
    return {
        "before": float(ANSWERS.findall(text)[0][0]),
        "accuracy": float(accuracy),
        "source_selected": [float(share) for share in found.split(",")] if found else [],
        "kl": [float(layer[0]) for layer in layers if layer[0]],
        "recall": [float(layer[1]) for layer in layers],
        "mass": [float(layer[2]) for layer in layers],
        "kept_pairs": float(layers[0][3]) if layers else T * (T + 1) / 2,
        "causal_pairs": T * (T + 1) // 2,
        "minutes": float(re.findall(r"minutes ([\d.]+)", text)[-1]),
    }


def arms_of(seed: int, folder: Path, only: str = "") -> dict:
    """The arms of a seed that have `only` in their names: {arm: figures}, and how the dense model learnt.

    Raises UserError if it has not learnt the task.
    """
    data = f"-i {folder / 'recall_train.bin'} -j {folder / 'recall_val.bin'} --seed {seed}"
    model, dense = folder / f"model_{seed}.bin", folder / f"dense_{seed}.bin"
    subprocess.run(
        command("data/create_model.py", f"{MODEL} --seed {seed} -o {model} --force"),
        check=True,
        stdout=subprocess.DEVNULL,
    )
    learnt = figures(output(folder, f"learn_{seed}", f"-e {model} {data} {COMMON} {LEARN} -c {dense} --overwrite 1"))
    if learnt["accuracy"] < 0.95:
        raise UserError(f"seed {seed}: dense attention has {learnt['accuracy']} of the answers", "take another seed")
    found = {"learn": learnt}
    for number, (arm, flags) in enumerate(ARMS.items()):
        if only in arm:
            found[arm] = figures(output(folder, f"arm{number}_{seed}", f"-e {dense} {data} {COMMON} {GO_ON} {flags}"))
    return found


def table(results: dict) -> str:
    """The Markdown table: means over seeds, each seed's in brackets."""

    def mean(values, digits=3):
        return f"{sum(values) / len(values):.{digits}f}"

    seeds = list(results)
    lines = [
        "| arm | kept pairs | answers right | source among the keys, layer 0 / 1 | KL | recall@k |",
        "|---|---|---|---|---|---|",
    ]
    for arm in ARMS:
        rows = [results[seed][arm] for seed in seeds]
        kept, full = rows[0]["kept_pairs"], rows[0]["causal_pairs"]
        each = ", ".join(f"{row['accuracy']:.3f}" for row in rows)
        cells = [arm, f"{kept:,.0f} ({100 * kept / full:.1f}%)", f"{mean([row['accuracy'] for row in rows])} ({each})"]
        found = rows[0]["source_selected"]
        shares = [mean([row["source_selected"][layer] for row in rows], 2) for layer in range(len(found))]
        cells.append(" / ".join(shares) or "all")
        learns = rows[0]["kl"] and "untrained" not in arm
        cells.append(mean([sum(row["kl"]) for row in rows]) if learns else "")
        cells.append(
            " / ".join(mean([row["recall"][layer] for row in rows], 2) for layer in range(2))
            if rows[0]["recall"]
            else ""
        )
        lines.append(f"| {' | '.join(cells)} |")
    minutes = sum(row["minutes"] for seed in seeds for row in results[seed].values())
    lines.append(f"\nSeeds {', '.join(map(str, seeds))}; {minutes:.0f} minutes of one core in all.")
    return "\n".join(lines) + "\n"


def short_table(results: dict) -> str:
    """README's: each arm's share of right answers, the mean over seeds, the best first."""
    lines = ["| keys chosen by | answers right |", "|---|---:|"]
    shares = {arm: sum(found[arm]["accuracy"] for found in results.values()) / len(results) for arm in ARMS}
    lines += [f"| {arm} | {shares[arm]:.3f} |" for arm in sorted(ARMS, key=shares.get, reverse=True)]
    return "\n".join(lines) + "\n"


def write_tables(results: dict) -> int:
    """Print the table, and put it and README's between the markers of their pages, where there are any."""
    print(table(results), end="")
    for page, text in ((PAGE, table(results)), (README, short_table(results))):
        before, begin, rest = page.read_text().partition(BEGIN)
        if begin:
            with atomic_write(page) as file:
                file.write(f"{before}{BEGIN}{text}{END}{rest.partition(END)[2]}".encode())
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", default="3,4", help="seeds, each from its own random model")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "recall", help="where runs are kept")
    parser.add_argument("--arm", default="", help="run those that have this in their names, keep the others' results")
    parser.add_argument("--no-runs", action="store_true", help="write the tables anew from experiments/recall.json")
    args = parser.parse(argv)
    if args.no_runs:
        return write_tables(json.loads(RESULTS.read_text()))
    if not re.fullmatch(r"\d+(,\d+)*", args.seeds):
        raise UserError(f"--seeds {args.seeds}: expected numbers, as in 3,4", exit_code=2)
    if not any(args.arm in arm for arm in ARMS):
        raise UserError(f"--arm {args.arm}: in no arm's name", f"arms: {'; '.join(ARMS)}", 2)
    seeds = [int(seed) for seed in args.seeds.split(",")]
    args.folder.mkdir(parents=True, exist_ok=True)
    if not (args.folder / "recall_train.bin").exists():
        subprocess.run(command("data/recall.py", f"-o {args.folder}"), check=True)
    with ThreadPoolExecutor(max(1, num_threads())) as pool:
        results = dict(zip(map(str, seeds), pool.map(lambda seed: arms_of(seed, args.folder, args.arm), seeds)))
    if args.arm:
        results = {seed: found | results.get(seed, {}) for seed, found in json.loads(RESULTS.read_text()).items()}
    with atomic_write(RESULTS) as file:
        file.write((json.dumps(results, indent=1) + "\n").encode())
    return write_tables(results)


if __name__ == "__main__":
    run(main)
