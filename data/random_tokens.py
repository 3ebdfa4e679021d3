"""Uniform random tokens: data from which nothing can be learnt. A loss below ln V on them has seen its own targets.

    python data/random_tokens.py --vocab 64                 # 200,000 tokens to train on, 20,000 held out

Experiments 00007 and 3 were published with such data. Training and validation tokens are draws of their own.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))  # so that it runs from any folder
if __name__ == "__main__":
    from llmc import startup

    startup.begin()

from pathlib import Path

import numpy as np

from data.corpus import typed, write_corpus
from llmc.cli import ArgumentParser, integer, positive_int, seed
from llmc.errors import run

FOLDER = Path(__file__).resolve().parent / "random_tokens"


def vocabulary(text: str) -> int:
    """A whole number in 2..65536: ids are uint16."""
    return integer(text, 2, 1 << 16)


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("-o", "--out-dir", type=Path, default=FOLDER, help="folder for the data files")
    add("--vocab", type=vocabulary, default=64, help="token ids, 0 to this less 1")
    add("--tokens", type=positive_int, default=200_000, help="tokens to train on; a tenth of as many are held out")
    add("--seed", type=seed, default=42, help="seed of the tokens")
    args = parser.parse(argv)
    rng = np.random.RandomState([args.seed & 0xFFFFFFFF, args.seed >> 32])  # whose stream NumPy keeps (NEP 19)
    train, val = (rng.randint(args.vocab, size=n).astype(np.uint16) for n in (args.tokens, args.tokens // 10))
    train_path, val_path = write_corpus(args.out_dir, "random", train, val)
    print(f"next: python data/create_model.py --vocab {args.vocab} -o random.bin")
    print(f"then: python train_banded.py -e random.bin -i {typed(train_path)} -j {typed(val_path)}")


if __name__ == "__main__":
    run(main)
