"""Text of your own as training data: text files, .jsonl with a text in each line, or tokens that nanoGPT made.

    python data/text.py book.txt more/*.txt                     # data/mine/train_000.bin and val_000.bin, GPT-2 tokens
    python data/text.py book.txt --tokenizer byte -o data/book  # 256 tokens, for small fast models
    python data/text.py posts.jsonl --field body --val 0.05
    python data/text.py --nanogpt openwebtext/train.bin openwebtext/val.bin

Text is UTF-8. A byte order mark is dropped, lines end in \\n whatever they ended in. A document is a text file, or the
field of a line of a .jsonl file; an EOT stands before each. Held out for validation are the last --val of all bytes of
the text files, from the next blank line on (else line, else word), and every tenth record (1 / --val) of .jsonl.

Files are read piece by piece, and threads encode the pieces: the same shards for any --workers, and the memory does not
depend on the size of a file. A text is cut before the blank that leads a word, where GPT-2's pattern cuts it anyway;
only a word of more than a million characters is cut within.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))  # so that it runs from any folder
if __name__ == "__main__":
    from llmc import startup

    startup.begin()

import argparse
import codecs
import contextlib
import functools
import glob
import io
import itertools
import json
import re
import shlex
import signal
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from data.corpus import (
    TOKENIZERS,
    blamed_on,
    check_enough,
    in_order,
    make_folder,
    print_commands,
    shown,
    text_tokens,
    typed,
    write_tokenizer,
)
from llmc.checkpoint import read_config
from llmc.cli import ArgumentParser, below_one, positive_int
from llmc.dataloader import MAGIC, token_header
from llmc.errors import UserError, run
from llmc.files import HEADER_BYTES, atomic_write, open_file
from llmc.tokenizer import BLANKS, Tokenizer, write_mark

FOLDER = Path(__file__).resolve().parent / "mine"
PIECE = 1 << 20  # characters that a thread encodes at once, and the longest word that is not cut
READ = 1 << 20  # bytes that are read at once
MAX_LINE = 1 << 28  # bytes of a line of .jsonl, which is read as a whole
GAP = 1 << 16  # bytes at most between the place where --val asks for a cut and the cut
SHARD = 100_000_000  # tokens, as llm.c's FineWeb shards have
LEAST = 1 << 20  # tokens of a shard that is not the first: a batch must fit in
MAX_VOCABULARY = 1 << 16  # tokens are uint16 in the data files
SHARDS = re.compile(r"(train|val)_\d{3,}\.bin")
STEPS = 400  # that the printed command trains, if an epoch has fewer

BLANK = BLANKS.pattern.removesuffix("+")
WORD_START = re.compile(rf"(?s).+(?={BLANK}(?!{BLANK}).)")  # up to the last blank that something else follows


class Part(NamedTuple):
    """Some text of one document: `split` is "train" or "val", `starts` says that the document begins here."""

    split: str
    path: str
    starts: bool
    text: str


# ----------------------------------------------------------------------------------------------------------------------
# reading


def text_parts(path: str, cut: int | None, gap: int, missing: set[int], read: Callable[[int], None]) -> Iterator[Part]:
    """A text file; validation begins, as a document of its own, at the first boundary in the `gap` bytes from `cut` on.

    cut: a byte, 0 if the file is for validation, None if not. missing: bytes that the tokenizer cannot encode.
    read: is told the bytes read. Raises UserError with file and byte for what is no UTF-8, and for a missing byte.
    """
    split, starts = "val" if cut == 0 else "train", True
    for at, text in decoded(path, cut, gap, missing, read):
        if cut is not None and at >= cut and split == "train":
            end = boundary(text)
            if text[:end]:
                yield Part(split, path, starts, text[:end])
            split, starts, text = "val", True, text[end:]
        if text:
            yield Part(split, path, starts, text)
            starts = False


def decoded(
    path: str, cut: int | None, gap: int, missing: set[int], read: Callable[[int], None]
) -> Iterator[tuple[int, str]]:
    """(byte, text from there on) of a text file, one of them from `cut` to `cut` + `gap`; \\r\\n and \\r become \\n."""
    missing = missing if 10 in missing else missing - {13}  # \r becomes \n
    unknown = re.compile(b"[%s]" % re.escape(bytes(sorted(missing)))) if missing else None
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8")(), translate=True)
    with open_file(path) as file:
        first = file.peek(4)[:4]
        at = file.seek(3 if first.startswith(codecs.BOM_UTF8) else 0)
        data = None
        while data != b"":
            data = file.read(gap if at == cut else cut - at if cut and at < cut < at + READ else READ)
            if unknown and (found := unknown.search(data)):
                raise unencodable(path, at + found.start(), data[found.start()])
            try:
                yield at, decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:  # its object ends where `data` does
                place = at + len(data) - len(error.object) + error.start
                raise no_utf8(path, place, error, first) from None
            at += len(data)
            read(len(data))


def boundary(text: str) -> int:
    """Where `text` may be cut in two documents: behind a blank line, else a line, else a word, else at once."""
    ends = (text.find(gap) + len(gap) for gap in ("\n\n", "\n", " ") if gap in text)
    return next(ends, 0)


def record_parts(
    path: str, field: str, val: float, numbers: Iterator[int], missing: set[int], read: Callable[[int], None]
) -> Iterator[Part]:
    """The text in `field` of each line of a .jsonl file; lines and texts that are empty are left out.

    numbers: counts the records of all files. Raises UserError with file, line and byte for what is no such record.
    """
    with open_file(path) as file:
        at = file.seek(3 if file.peek(3).startswith(codecs.BOM_UTF8) else 0)
        for number in itertools.count(1):
            line = file.readline(MAX_LINE)
            if not line:
                break
            place = f"{path}: line {number} at byte {at}"
            if len(line) == MAX_LINE:
                raise UserError(f"{place}: longer than {MAX_LINE} bytes", "a .jsonl has a record in each line")
            if not line.isspace() and (text := record_text(line, place, path, at, field, missing)):
                i = next(numbers)
                yield Part("val" if int((i + 1) * val) > int(i * val) else "train", path, True, text)
            at += len(line)
            read(len(line))


def record_text(line: bytes, place: str, path: str, at: int, field: str, missing: set[int]) -> str:
    """The text in `field` of one line."""
    hint = "a line is an object like " + json.dumps({field: "Once upon a time"}) + "; --field names another field"
    try:
        record = json.loads(line.decode())
        text = record[field]
        unknown = missing & set(text.encode())
    except UnicodeDecodeError as error:
        raise no_utf8(path, at + error.start, error, b"") from None
    except UnicodeEncodeError:
        raise UserError(
            f"{place}: half a surrogate pair, which is no Unicode", "write the file again, as UTF-8"
        ) from None
    except KeyError:
        raise UserError(f"{place}: no field {field!r}, found {', '.join(map(repr, record)) or 'none'}", hint) from None
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        found = f"{type(error).__name__}: {error}"
        raise UserError(f"{place}: expected an object with a text {field!r} ({found})", hint) from None
    if unknown:
        raise unencodable(place, None, min(unknown))
    return text


def no_utf8(path: str, place: int, error: UnicodeDecodeError, first: bytes) -> UserError:
    """What tells of a byte that is no UTF-8; first: how the file begins."""
    was = "UTF-16" if first.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "WINDOWS-1252"
    root, ending = os.path.splitext(path)
    hint = f"if it is {was}: iconv -f {was} -t UTF-8 {shlex.quote(path)} > {shlex.quote(root + '_utf8' + ending)}"
    if ending == ".bin":
        hint = "--nanogpt, if it holds the tokens that nanoGPT's prepare.py wrote"
    found = f"byte {place} is {error.object[error.start]:#04x}, which is no UTF-8: {error.reason}"
    return UserError(f"{path}: {found}", hint)


def unencodable(path: str, place: int | None, byte: int) -> UserError:
    """What tells of a byte that the tokenizer does not know."""
    where = f"{path}: has the byte {byte:#04x}" if place is None else f"{path}: byte {place} is {byte:#04x}"
    hint = f"take it out (tr -d '\\{byte:03o}'), or --tokenizer gpt2, which knows all bytes"
    return UserError(f"{where}, for which the tokenizer has no token", hint)


def all_parts(paths: list[str], args: argparse.Namespace, missing: set[int], read: Callable[[int], None]):
    """The parts of all files in their order. Says which files are empty."""
    sizes = {path: file_size(path) for path in paths}
    texts = sum(size for path, size in sizes.items() if not path.endswith(".jsonl"))
    held_out = int(args.val * texts)
    before, numbers = 0, itertools.count()
    for path, size in sizes.items():
        if not size:
            print(f"{path}: empty, left out", file=sys.stderr)
        elif path.endswith(".jsonl"):
            yield from record_parts(path, args.field, args.val, numbers, missing, read)
        else:
            cut = max(0, texts - held_out - before)
            gap = max(1, min(GAP, held_out // 2))
            yield from text_parts(path, cut if cut < size else None, gap, missing, read)
            before += size


def file_size(path: str) -> int:
    """Bytes of an ordinary file. Raises UserError if it is none."""
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        raise UserError(f"{path}: not an ordinary file", "write what it gives into one, and name that")
    with open_file(path) as file:
        return os.fstat(file.fileno()).st_size


# ----------------------------------------------------------------------------------------------------------------------
# text to tokens


def cut_parts(parts: Iterable[Part]) -> Iterator[Part]:
    """The same text in parts of PIECE characters at most, which give the tokens of the whole: see WORD_START."""
    rest = None
    for part in parts:
        if rest and part.starts:
            yield rest
            rest = None
        rest = part if rest is None else rest._replace(text=rest.text + part.text)
        text, at = rest.text, 0
        while len(text) - at > PIECE:
            word = WORD_START.match(text, at, at + PIECE + 1)
            end = word.end() if word else at + PIECE
            yield rest._replace(text=text[at:end])
            rest, at = rest._replace(starts=False), end
        rest = rest._replace(text=text[at:])
    if rest:
        yield rest


def batched(parts: Iterable[Part]) -> Iterator[list[Part]]:
    """Consecutive parts of one split, about PIECE characters in all: work for a thread."""
    piles, sizes = {"train": [], "val": []}, {"train": 0, "val": 0}
    for part in parts:
        piles[part.split].append(part)
        sizes[part.split] += len(part.text)
        if sizes[part.split] >= PIECE:
            yield piles[part.split]
            piles[part.split], sizes[part.split] = [], 0
    yield from filter(None, piles.values())


def encode(tokenizer: Tokenizer, batch: list[Part]) -> tuple[str, np.ndarray]:
    """The split and the uint16 tokens of a batch, an EOT before each document. Raises UserError whatever goes wrong."""
    eot, tokens = np.array([tokenizer.eot], np.uint16), []
    for part in batch:
        with blamed_on(f"{part.path}: encoding", "--workers 1 takes the least memory"):
            tokens += [eot, text_tokens(tokenizer, part.text)] if part.starts else [text_tokens(tokenizer, part.text)]
    return batch[0].split, np.concatenate(tokens)


def nanogpt_tokens(
    paths: list[str], val: float, vocab_size: int, read: Callable[[int], None]
) -> Iterator[tuple[str, np.ndarray]]:
    """Tokens of files of headerless uint16, as nanoGPT writes them, each with its split.

    Files called val... are for validation; without one the last `val` of all tokens are. Raises UserError for a file of
    another format, and a token that is not below `vocab_size`.
    """
    sizes = {path: file_size(path) for path in paths}
    own_split = any(os.path.basename(path).startswith("val") for path in paths)
    total, position = sum(sizes.values()) // 2, 0
    for path, size in sizes.items():
        hint = "name the files that nanoGPT's prepare.py wrote, train.bin and val.bin"
        if size % 2:
            raise UserError(f"{path}: {size} bytes, expected tokens of two bytes each", hint)
        with open_file(path) as file:
            if size >= HEADER_BYTES and int.from_bytes(file.peek(4)[:4], "little") == MAGIC:
                raise UserError(
                    f"{path}: has llm.c's header (magic {MAGIC})", f"it is ready for a trainer: -i {typed(Path(path))}"
                )
            for at in range(0, size // 2, READ // 2):
                tokens = np.frombuffer(file.read(READ), "<u2")
                if tokens.max(initial=0) >= vocab_size:
                    first = int(np.argmax(tokens >= vocab_size))
                    found = f"token {at + first} at byte {2 * (at + first)} is {tokens[first]}"
                    raise UserError(
                        f"{path}: {found}, the tokenizer has 0..{vocab_size - 1}", "name the right one by --tokenizer"
                    )
                train = total - int(val * total) - position  # of these tokens
                if own_split:
                    train = 0 if os.path.basename(path).startswith("val") else tokens.size
                for split, values in (("train", tokens[: max(0, train)]), ("val", tokens[max(0, train) :])):
                    if values.size:
                        yield split, values
                position += tokens.size
                read(2 * tokens.size)


# ----------------------------------------------------------------------------------------------------------------------
# writing


class Shards:
    """The files of one split, SPLIT_000.bin and on, SHARD tokens in each; the last has up to LEAST more.

    stack: its end puts all files in place at once, as atomic_write does.
    """

    def __init__(self, stack: contextlib.ExitStack, folder: Path, split: str):
        self._stack, self._folder, self._split = stack, folder, split
        self._files, self.counts, self.paths = [], [], []
        self._over = np.empty(0, np.uint16)  # too few for a shard of their own
        self._begin()

    def _begin(self) -> None:
        self.paths.append(self._folder / f"{self._split}_{len(self.paths):03d}.bin")
        self._files.append(self._stack.enter_context(atomic_write(self.paths[-1])))
        self._files[-1].write(bytes(HEADER_BYTES))
        self.counts.append(0)

    def add(self, tokens: np.ndarray) -> None:
        tokens = np.concatenate([self._over, tokens])
        while tokens.size and (self.counts[-1] < SHARD or tokens.size >= LEAST):
            if self.counts[-1] == SHARD:
                self._begin()
            part = tokens[: SHARD - self.counts[-1]]
            self._write(part)
            tokens = tokens[part.size :]
        self._over = tokens

    def _write(self, tokens: np.ndarray) -> None:
        self._files[-1].write(tokens.astype("<u2", copy=False).data)
        self.counts[-1] += tokens.size

    def end(self) -> None:
        """Write what is left, and the headers. Raises UserError if there is too little for any training."""
        self._write(self._over)
        for path, file, count in zip(self.paths, self._files, self.counts):
            check_enough(path, count, "take a longer text, or a larger --val: nothing was written")
            file.seek(0)
            file.write(token_header(count))

    @property
    def pattern(self) -> str:
        """All files, as -i and -j take them and a shell leaves them."""
        if len(self.paths) == 1:
            return typed(self.paths[0])
        return shlex.quote(f"{glob.escape(str(shown(self._folder)))}/{self._split}_*.bin")


def old_shards(folder: Path) -> list[Path]:
    """What an earlier call left in `folder`."""
    return [path for path in sorted(folder.glob("*.bin")) if SHARDS.fullmatch(path.name)]


def write_shards(folder: Path, encoded: Iterable[tuple[str, np.ndarray]], name: str, tokenizer: Tokenizer) -> dict:
    """Write {"train": Shards, "val": Shards}, and beside them which tokenizer made them; older ones go."""
    with contextlib.ExitStack() as stack:
        shards = {split: Shards(stack, folder, split) for split in ("train", "val")}
        for split, tokens in encoded:
            shards[split].add(tokens)
        for each in shards.values():
            each.end()
        write_mark(folder, name, tokenizer)
    written = {path for each in shards.values() for path in each.paths}
    for path in set(old_shards(folder)) - written:
        path.unlink()
    return shards


# ----------------------------------------------------------------------------------------------------------------------
# what to type next


def print_next(args: argparse.Namespace, folder: Path, shards: dict[str, Shards], tokenizer: Tokenizer) -> None:
    """The commands that make a model for the tokenizer and train it: they work as they are, for short texts, too."""
    known = args.tokenizer in TOKENIZERS
    label = args.tokenizer if known else Path(args.tokenizer).stem
    model = free_name(f"{folder.resolve().name}_{label}", tokenizer.vocab_size)
    vocab = {"gpt2": "", "byte": "--vocab byte "}.get(args.tokenizer, f"--vocab {tokenizer.vocab_size} ")
    B, T = 4, min(1024, read_config(model).maxT) if model.exists() else 256  # the trainers' defaults
    shortest = min(min(each.counts) for each in shards.values()) - 1
    flags = [f"-i {shards['train'].pattern} -j {shards['val'].pattern}"]
    if shortest < B:
        B, T = 1, shortest
        flags += ["-b 1"]
    if shortest < B * T or B == 1:
        T = shortest // B
        flags += [f"-t {T}"]
    if sum(count // (B * T) for count in shards["train"].counts) < STEPS:
        flags += [f"-n {STEPS}"]
    if not known:
        flags += [f"--tokenizer {typed(Path(args.tokenizer))}"]
    print_commands(model, vocab, " ".join(flags))


def free_name(stem: str, V: int) -> Path:
    """stem.bin, or with a number behind the stem, where there is no file or a model of V tokens."""
    for number in itertools.count(1):
        path = Path(f"{stem}.bin" if number == 1 else f"{stem}_{number}.bin")
        with contextlib.suppress(UserError):
            if not path.exists() or read_config(path).V == V:
                return path


# ----------------------------------------------------------------------------------------------------------------------


def val_fraction(text: str) -> float:
    """A number between 0 and 1."""
    value = below_one(text)
    if value == 0:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a number above 0 and below 1: a run needs both")
    return value


def open_named_tokenizer(name: str) -> Tokenizer:
    """ "gpt2", "byte" or the tokenizer file of that name. Raises UserError if its tokens are too many for uint16."""
    tokenizer = TOKENIZERS[name]() if name in TOKENIZERS else Tokenizer.read(name)
    if tokenizer.vocab_size > MAX_VOCABULARY:
        found = f"{name}: {tokenizer.vocab_size} tokens, a token data file holds ids below {MAX_VOCABULARY}"
        raise UserError(f"--tokenizer {found}", "take a smaller one")
    if not tokenizer.has_only_bytes:
        tokenizer.encoding  # noqa: B018  made once, before threads ask for it
    return tokenizer


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("files", nargs="+", metavar="FILE", help="text files, .jsonl files, or with --nanogpt token files")
    add("-o", "--out-dir", type=Path, default=FOLDER, help="folder for the data files")
    add("--force", action="store_true", help="replace the data files that are there")
    add("--tokenizer", default="gpt2", help="gpt2, byte, or a tokenizer file")
    add("--val", type=val_fraction, default=0.1, help="part of the text that is held out for validation")
    add("--field", default="text", help="field of a .jsonl record that holds the text")
    add("--nanogpt", action="store_true", help="FILEs hold tokens, uint16 without a header; val.bin is held out")
    add("--workers", type=positive_int, default=os.cpu_count() or 1, help="threads that encode, 20 MB of memory each")
    args = parser.parse(argv)

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwind, and leave no temporary file
    tokenizer = open_named_tokenizer(args.tokenizer)
    if (old := old_shards(args.out_dir)) and not args.force:
        raise UserError(f"{old[0]}: exists already", "--force replaces it, -o FOLDER writes into another")
    paths = list(dict.fromkeys(args.files))
    total = sum(map(file_size, paths))
    make_folder(args.out_dir)
    with tqdm(total=total, unit="B", unit_scale=True, disable=None) as bar:
        if args.nanogpt:
            encoded = nanogpt_tokens(paths, args.val, tokenizer.vocab_size, bar.update)
        else:
            parts = all_parts(paths, args, tokenizer.missing, bar.update)
            encoded = in_order(functools.partial(encode, tokenizer), batched(cut_parts(parts)), args.workers)
        with contextlib.closing(encoded):
            shards = write_shards(args.out_dir, encoded, args.tokenizer, tokenizer)
    for each in shards.values():
        for path, count in zip(each.paths, each.counts):
            print(f"wrote {shown(path)}: {count:,} tokens")
    if args.tokenizer in TOKENIZERS:
        write_tokenizer(args.tokenizer, Path())
    print_next(args, args.out_dir, shards, tokenizer)


if __name__ == "__main__":
    run(main)
