"""HellaSwag's validation questions (Zellers et al. 2019), as llm.c has them (dev/data/hellaswag.py).

    python data/hellaswag.py

Downloads 12 MB: 10,042 questions, each a context and four endings, of which one is how the story went on. Tokens are
GPT-2's, an ending's begin with a blank, and nothing stands before the context. A model that knows nothing answers one
in four right.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))  # so that it runs from any folder
if __name__ == "__main__":
    from llmc import startup

    startup.begin()

import json
from pathlib import Path

import numpy as np

from data.corpus import make_folder, shown, typed
from data.download import download
from llmc.cli import ArgumentParser
from llmc.errors import UserError, run
from llmc.evalloader import COMPLETIONS, Example, write_examples
from llmc.files import open_file
from llmc.tokenizer import encode_ordinary, gpt2_encoding

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"
FOLDER = Path(__file__).resolve().parent / "hellaswag"


def read_questions(path: Path) -> list[tuple[str, list[str], int]]:
    """(context, endings, label) of each line of a .jsonl file. Raises UserError for a line that has not these."""
    with open_file(path) as file:
        lines = file.read().splitlines()
    questions = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            context, endings, label = record["ctx"], record["endings"], record["label"]
            if not all(isinstance(text, str) and text for text in (context, *endings)):
                raise ValueError("a text is empty or none")
            if len(endings) != COMPLETIONS or label not in range(COMPLETIONS):
                raise ValueError(f"label {label!r} of {len(endings)} endings")
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            found = f"{type(error).__name__}: {error}"
            expected = f'"ctx", {COMPLETIONS} "endings" and a "label" from 0'
            raise UserError(
                f"{path}: line {number}: expected {expected} ({found})", f"delete {path}, run again"
            ) from None
        questions.append((context, endings, label))
    return questions


def examples(questions: list[tuple[str, list[str], int]]) -> list[Example]:
    """Their GPT-2 tokens."""
    encoding = gpt2_encoding()

    def tokens(text: str) -> np.ndarray:
        return np.array(encode_ordinary(encoding, text), np.uint16)

    return [
        Example(tokens(ctx), [tokens(" " + ending) for ending in endings], label) for ctx, endings, label in questions
    ]


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--out-dir", type=Path, default=FOLDER, help="folder for the download and the eval file")
    args = parser.parse(argv)

    make_folder(args.out_dir)
    questions_path, path = args.out_dir / "hellaswag_val.jsonl", args.out_dir / "hellaswag_val.bin"
    download(URL, questions_path, sha256=SHA256, instead="python evaluate.py, for perplexity")
    found = examples(read_questions(questions_path))
    write_examples(path, found)
    longest = max(example.longest for example in found)
    print(f"wrote {shown(path)}: {len(found):,} questions, the longest row has {longest} tokens")
    print(f"next: python evaluate.py -e checkpoint.bin -j {typed(path)}")


if __name__ == "__main__":
    run(main)
