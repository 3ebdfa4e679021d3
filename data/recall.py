"""Tagged recall: made-up windows in which every answer stands far back, a test of what a sparse attention keeps.

    python data/recall.py                                          # 19,200 training windows, 600 steps of 32
    python data/recall.py --train-windows 33600 --seed 7           # for longer runs
    python data/recall.py --window 512 -o data/recall_512          # answers up to 510 tokens back

One token holds a key and its value, so a single attention hop answers a query (associative recall, Arora et al. 2023,
without the hop from key to value). With K keys (32), 8 values and 8 fillers the ids are

    0 .. 8K-1        item 8a + b: key a holds value b
    8K .. 9K-1       query 8K + a for the value of key a
    9K .. 9K+7       fillers

A hard window of T tokens holds K items, each key once in random order with a random value, then T - 3K fillers, then
every key again in another random order as a query followed by its item, the answer: T - 3K + 1 .. T - 2 back from the
query, 33 .. 126 at T = 128. An easy window has D = K/8, K/4 or K/2 items and no fillers: queries and answers in rounds,
each over the D keys in a new random order, to the end. Validation windows are hard, training windows hard or easy with
equal probability: on hard ones alone even dense attention stays at chance for many hundreds of steps.

Each window starts at a multiple of T, so a run must read the files with -t T (128). A position is scored if its input
is a query. Its target is the answer then: chance is 1/8. The loss over all positions of hard windows tells, too: 3.29
for a model that has learnt which ids come where, 2.77 if it also answers all queries, a little less if it keeps account
of the keys that are still to come (K = 32, T = 128).
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))  # so that it runs from any folder
if __name__ == "__main__":
    from llmc import startup

    startup.begin()

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.corpus import typed, write_corpus
from llmc.cli import ArgumentParser, positive_int, seed
from llmc.dataloader import MAX_TOKENS
from llmc.errors import UserError, run

VALUES = FILLERS = 8
MAX_KEYS = 7280  # ids are uint16
FOLDER = Path(__file__).resolve().parent / "recall"


@dataclass(frozen=True)
class Recall:
    """The task's sizes: K keys, windows of T tokens."""

    K: int = 32
    T: int = 128

    @property
    def first_query(self) -> int:
        """The query ids are first_query .. first_filler - 1."""
        return VALUES * self.K

    @property
    def first_filler(self) -> int:
        return self.first_query + self.K

    @property
    def V(self) -> int:
        """The number of ids."""
        return self.first_filler + FILLERS

    def hard_window(self, rng: np.random.RandomState) -> np.ndarray:
        """T ids: items, fillers, all queries with their answers."""
        keys, items = self._items(rng, self.K)
        fillers = rng.randint(self.first_filler, self.V, self.T - 3 * self.K)
        return np.concatenate([items[keys], fillers, self._round(rng, keys, items)])

    def easy_window(self, rng: np.random.RandomState) -> np.ndarray:
        """T ids: D items, then rounds of queries with their answers."""
        D = self.K // (2, 4, 8)[rng.randint(3)]
        keys, items = self._items(rng, D)
        rounds = [self._round(rng, keys, items) for _ in range(-(-(self.T - D) // (2 * D)))]
        return np.concatenate([items[keys], *rounds])[: self.T]

    def _items(self, rng: np.random.RandomState, D: int) -> tuple[np.ndarray, np.ndarray]:
        """D keys (D) in random order, and the item of every key (K)."""
        return rng.permutation(self.K)[:D], VALUES * np.arange(self.K) + rng.randint(VALUES, size=self.K)

    def _round(self, rng: np.random.RandomState, keys: np.ndarray, items: np.ndarray) -> np.ndarray:
        """Query, item, query, item ... of `keys` in a new random order."""
        order = rng.permutation(keys)
        return np.stack([self.first_query + order, items[order]], axis=1).ravel()

    def tokens(self, rng: np.random.RandomState, windows: int, hard_share: float) -> np.ndarray:
        """uint16 (windows*T + 1): windows one after the other, and the first token of one more as the last target."""
        out = np.empty((windows + 1, self.T), np.uint16)
        for window in out:
            window[:] = self.hard_window(rng) if rng.random_sample() < hard_share else self.easy_window(rng)
        return out.ravel()[: windows * self.T + 1]


def parse_arguments(argv: list[str] | None = None):
    """The command line. Raises UserError naming the flag, with exit code 2."""
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("-o", "--out-dir", type=Path, default=FOLDER, help="folder for the data files")
    add("--seed", type=seed, default=1, help="seed of the random windows")
    add("--train-windows", type=positive_int, default=600 * 32, help="windows to train on, half of them easy")
    add("--val-windows", type=positive_int, default=256, help="held-out windows, all hard")
    add("--window", type=positive_int, default=128, help="tokens T of a window, at least 3 for each key")
    add("--keys", type=positive_int, default=32, help="keys K, a multiple of 8")
    args = parser.parse(argv)
    if args.keys % 8 or args.keys > MAX_KEYS:
        raise UserError(f"--keys {args.keys}: expected a multiple of 8 up to {MAX_KEYS}", "--keys 32", 2)
    if args.window < 3 * args.keys:
        least = 3 * args.keys
        raise UserError(f"--window {args.window}: expected at least {least}, 3 for each key", f"--window {least}", 2)
    for flag, windows in (("--train-windows", args.train_windows), ("--val-windows", args.val_windows)):
        if windows >= MAX_TOKENS // args.window:
            raise UserError(f"{flag} {windows}: over 2^31 tokens, the most that a file holds", "give fewer windows", 2)
    return args


def stream(seed: int, split: int) -> np.random.RandomState:
    """Random numbers that NumPy promises to keep (NEP 19), others for each split."""
    return np.random.RandomState([seed & 0xFFFFFFFF, seed >> 32, split])


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    task = Recall(args.keys, args.window)
    train, val = (
        task.tokens(stream(args.seed, split), windows, hard_share)
        for split, windows, hard_share in ((0, args.train_windows, 0.5), (1, args.val_windows, 1.0))
    )
    train_path, val_path = write_corpus(args.out_dir, "recall", train, val)
    data = f"-i {typed(train_path)} -j {typed(val_path)}"
    print(f"next: python data/create_model.py --vocab {task.V} -C 64 -L 2 -H 4 -T {task.T} -o recall.bin")
    print(f"then: python train_sparse_attn.py --attention dense -e recall.bin {data} -b 32 -t {task.T} -l 3e-3")


if __name__ == "__main__":
    run(main)
