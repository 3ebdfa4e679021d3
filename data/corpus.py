"""What the text corpora share: documents -> tokens, with an EOT before each -> llm.c data files and tokenizer file."""

import contextlib
import shlex
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from llmc.dataloader import write_tokens
from llmc.errors import UserError
from llmc.tokenizer import Tokenizer, byte_tokenizer, encode_ordinary, gpt2_encoding, gpt2_tokenizer

TOKENIZERS = {"gpt2": gpt2_tokenizer, "byte": byte_tokenizer}
THREADS = 8  # that encode documents
LEAST_TOKENS = 2  # an input and its target


def gpt2_tokens(documents: Sequence[str]) -> np.ndarray:
    """uint16 GPT-2 tokens of all documents, each preceded by <|endoftext|> (50256), as llm.c's data scripts do.

    A text that spells <|endoftext|> out gets ordinary tokens. Threads share the work. Whatever stops them is raised as
    a UserError that says at which document.
    """
    encoding = gpt2_encoding()

    def tokens(numbered: tuple[int, str]) -> np.ndarray:
        number, document = numbered
        with blamed_on(f"document {number} of {len(documents)}", "take it out of the text, or shorten it"):
            return np.array([encoding.eot_token, *encode_ordinary(encoding, document)], np.uint16)

    parts = in_order(tokens, enumerate(documents, 1), THREADS)
    return np.concatenate([np.empty(0, np.uint16), *parts])


def in_order(work: Callable, items: Iterable, workers: int) -> Iterator:
    """work(item) of each item, in the order of the items, by so many threads; two items a thread are held at a time.

    tiktoken leaves the interpreter to others while it encodes.
    """
    waiting = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) == 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:  # after Ctrl-C the items that have their turn are finished, no others
            pool.shutdown(cancel_futures=True)


def text_tokens(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """uint16 tokens of `text`, for each byte of which there is a token; without an EOT."""
    if tokenizer.has_only_bytes:
        return tokenizer.byte_ids[np.frombuffer(text.encode(), np.uint8)].astype(np.uint16)
    return np.array(encode_ordinary(tokenizer.encoding, text), np.uint16)


@contextlib.contextmanager
def blamed_on(what: str, hint: str) -> Iterator[None]:
    """Whatever the block raises, but what ends the program, leaves it as a UserError that begins with `what`.

    For workers: of an exception of any kind there remains one message, and one that can be sent to another process.
    A panic in Rust code is a BaseException, which cannot.
    """
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except MemoryError as error:
        raise UserError(f"{what}: out of memory {error}".rstrip(), hint) from None
    except BaseException as error:
        raise UserError(f"{what}: {type(error).__name__}: {error}", hint) from None


def byte_tokens(documents: Sequence[str]) -> np.ndarray:
    """uint16 UTF-8 bytes of all documents, each preceded by the byte tokenizer's EOT, 0."""
    text = b"".join(b"\0" + document.encode() for document in documents)
    return np.frombuffer(text, np.uint8).astype(np.uint16)


def make_folder(folder: Path) -> None:
    """Make `folder` and those above it. Raises UserError if the system refuses."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"making folder {folder}: {error.strerror}", "name another folder with -o") from None


def shown(path: Path) -> Path:
    """`path` as a user would type it: relative to the current folder if it lies below."""
    path = path.resolve()
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def typed(path: Path) -> str:
    """`shown` for a command line: quoted where a shell needs that."""
    return shlex.quote(str(shown(path)))


def write_corpus(folder: Path, name: str, train: np.ndarray, val: np.ndarray) -> tuple[Path, Path]:
    """Write name_train.bin and name_val.bin into `folder`, print their sizes, return their paths.

    Raises UserError before anything is written if one would hold too little for any training.
    """
    make_folder(folder)
    paths = []
    for split, tokens in (("train", train), ("val", val)):
        check_enough(folder / f"{name}_{split}.bin", tokens.size)
    for split, tokens in (("train", train), ("val", val)):
        path = folder / f"{name}_{split}.bin"
        write_tokens(path, tokens)
        print(f"wrote {shown(path)}: {tokens.size:,} tokens")
        paths.append(path)
    return tuple(paths)


def check_enough(path: Path, num_tokens: int, hint: str = "take a longer text: the file was not written") -> None:
    """Raise UserError if the data file `path` would hold too few tokens for a batch of one row of one token."""
    if num_tokens < LEAST_TOKENS:
        raise UserError(f"{path}: the text gives {num_tokens} tokens, a data file needs {LEAST_TOKENS} or more", hint)


def write_tokenizer(name: str, folder: Path) -> None:
    """Write gpt2_tokenizer.bin or byte_tokenizer.bin into `folder` unless it is there already."""
    path = folder / f"{name}_tokenizer.bin"
    if not path.exists():
        TOKENIZERS[name]().write(path)
        print(f"wrote {shown(path)}")


def print_next_commands(tokenizer: str, train: Path, val: Path) -> None:
    """What to type after preparing data: a model for its vocabulary, unless there is one, and the training run."""
    model, vocab = {"gpt2": ("model.bin", ""), "byte": ("byte.bin", "--vocab byte ")}[tokenizer]
    print_commands(Path(model), vocab, f"-i {typed(train)} -j {typed(val)}")


def print_commands(model: Path, vocab: str, run: str) -> None:
    """The same with flags: `vocab` of data/create_model.py, which is left out if there is the model, `run` of a run."""
    commands = [f"python train_banded.py -e {typed(model)} {run}"]
    if not model.exists():
        commands.insert(0, f"python data/create_model.py {vocab}-o {typed(model)}")
    for label, command in zip(("next", "then"), commands):
        print(f"{label}: {command}")
