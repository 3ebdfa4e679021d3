"""llm.c's starter pack: OpenAI's GPT-2 124M, a debug state to test against, and the tokenizer file.

    python data/starter_pack.py

Fetches gpt2_124M.bin (0.5 GB), gpt2_124M_debug_state.bin (0.5 GB) and gpt2_tokenizer.bin into the current folder,
where llm.c's programs and the trainers look for them. Their sizes must be llm.c's, their SHA-256 what the hub announces
(no digest is published elsewhere), and each is read once as the trainers read it.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))  # so that it runs from any folder
if __name__ == "__main__":
    from llmc import startup

    startup.begin()

from pathlib import Path

from data.corpus import make_folder, typed
from data.download import download
from llmc.checkpoint import read_model
from llmc.cli import ArgumentParser
from llmc.debug_state import read_debug_state
from llmc.errors import run
from llmc.tokenizer import Tokenizer

URL = "https://huggingface.co/datasets/karpathy/llmc-starter-pack/resolve/main/"
SIZES = {
    "gpt2_tokenizer.bin": 372_108,
    "gpt2_124M.bin": 497_904_640,  # 1024 + 4 * 124,475,904 parameters
    "gpt2_124M_debug_state.bin": 549_369_860,  # B = 4, T = 64
}


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--out-dir", type=Path, default=Path(), help="folder for the three files")
    args = parser.parse(argv)

    make_folder(args.out_dir)
    for name, size in SIZES.items():
        download(URL + name, args.out_dir / name, size=size, instead="python data/create_model.py (random weights)")
    model = args.out_dir / "gpt2_124M.bin"
    debug_state = args.out_dir / "gpt2_124M_debug_state.bin"
    Tokenizer.read(args.out_dir / "gpt2_tokenizer.bin")
    read_debug_state(debug_state, read_model(model).config)
    print(f"read back all of {', '.join(SIZES)}")
    print(f"next: python tests/check_gpt2.py {typed(model)} {typed(debug_state)}")
    print(f"then: python train_banded.py -e {typed(model)}")


if __name__ == "__main__":
    run(main)
