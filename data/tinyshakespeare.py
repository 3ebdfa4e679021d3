"""karpathy's tiny-shakespeare, tokenised as llm.c has it (dev/data/tinyshakespeare.py).

    python data/tinyshakespeare.py

Downloads 1,115,394 bytes of text, takes what blank lines separate (mostly speeches) for documents, with an EOT before
each, and makes the first 32,768 GPT-2 tokens the validation data, the other 305,260 the training data.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))  # so that it runs from any folder
if __name__ == "__main__":
    from llmc import startup

    startup.begin()

from pathlib import Path

from data.corpus import gpt2_tokens, make_folder, print_next_commands, write_corpus, write_tokenizer
from data.download import download
from llmc.cli import ArgumentParser
from llmc.errors import UserError, run

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SIZE = 1_115_394
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
VAL_TOKENS = 32_768
TRAIN_TOKENS = 305_260
FOLDER = Path(__file__).resolve().parent / "tinyshakespeare"


def sections(text: str) -> list[str]:
    """The text after each blank line; every section but the last keeps the two newlines that end it."""
    *ended, last = text.split("\n\n")
    return [*(section + "\n\n" for section in ended), last]


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--out-dir", type=Path, default=FOLDER, help="folder for the text and the data files")
    args = parser.parse(argv)

    make_folder(args.out_dir)
    text_path = args.out_dir / "tiny_shakespeare.txt"
    download(URL, text_path, size=SIZE, sha256=SHA256, instead="python data/shakespeare.py (37 plays)")
    tokens = gpt2_tokens(sections(text_path.read_text(encoding="utf-8")))
    if tokens.size != VAL_TOKENS + TRAIN_TOKENS:
        raise UserError(
            f"{text_path}: {tokens.size:,} GPT-2 tokens, llm.c has {VAL_TOKENS + TRAIN_TOKENS:,}",
            "the tokenizer differs: pip install --upgrade tiktoken",
        )
    paths = write_corpus(args.out_dir, "tiny_shakespeare", train=tokens[VAL_TOKENS:], val=tokens[:VAL_TOKENS])
    write_tokenizer("gpt2", Path())
    print_next_commands("gpt2", *paths)


if __name__ == "__main__":
    run(main)
