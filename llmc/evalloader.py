"""Questions with four answers, such as HellaSwag's: llm.c's eval files, and EvalLoader of its dataloader.h.

    int32 header[256]: 20240522, 1, number of examples, bytes of the longest one, 0 ...
    then each example, uint16: 65535, its bytes, its index, its label, number of completions (4),
        length of the context, its tokens, and four times: length of the completion, its tokens

An example takes four rows of a batch: the context and one completion each. A completion's score is the mean loss of its
tokens, the completion with the lowest score is the model's answer, and the label says which would be right.
"""

import os
from dataclasses import dataclass

import numpy as np

from llmc.errors import UserError
from llmc.files import HEADER_BYTES, HEADER_INTS, atomic_write, open_file, read_array, read_header

MAGIC, VERSION = 20240522, 1
START = 65535  # in front of an example
COMPLETIONS = 4
MAX_EXAMPLES = MAX_BYTES = 65535  # the index and the size of an example are uint16
FIELDS = 5  # uint16 in front of an example's tokens
WHAT = "file of questions"
HINT = "python data/hellaswag.py writes a good one"


@dataclass
class Example:
    """context (n), completions 4 x (n_c), uint16 tokens, each with one or more; label: the right completion."""

    context: np.ndarray
    completions: list[np.ndarray]
    label: int

    @property
    def longest(self) -> int:
        """Tokens of the longest of its rows."""
        return len(self.context) + max(map(len, self.completions))


def write_examples(path: str | os.PathLike, examples: list[Example]) -> None:
    """Write an eval file, atomically, as write_evalfile of llm.c's data_common.py does.

    Raises UserError for an example, or a number of examples, that the format cannot hold.
    """
    records = [_record(index, example, path) for index, example in enumerate(examples)]
    if not 1 <= len(records) <= MAX_EXAMPLES:
        raise UserError(f"{path}: {len(records)} examples, a {WHAT} holds 1..{MAX_EXAMPLES}", "write several files")
    header = np.zeros(HEADER_INTS, "<i4")
    header[:4] = MAGIC, VERSION, len(records), max(record.nbytes for record in records)
    with atomic_write(path) as file:
        file.write(header.data)
        file.writelines(record.data for record in records)


def _record(index: int, example: Example, path: str | os.PathLike) -> np.ndarray:
    """An example as the file has it."""
    lists = [example.context, *example.completions]
    nbytes = 2 * (FIELDS + sum(1 + len(tokens) for tokens in lists))
    if nbytes > MAX_BYTES or min(map(len, lists)) == 0 or len(lists) != 1 + COMPLETIONS:
        sizes = ", ".join(str(len(tokens)) for tokens in lists)
        expected = f"a context and {COMPLETIONS} completions, none empty, in {MAX_BYTES} bytes"
        raise UserError(f"{path}: example {index} has {sizes} tokens, expected {expected}", "leave it out")
    parts = [[START, nbytes, index, example.label, COMPLETIONS]]
    for tokens in lists:
        parts += [[len(tokens)], tokens]
    return np.concatenate(parts).astype("<u2")


def is_eval_file(path: str | os.PathLike) -> bool:
    """Whether a file begins as an eval file does."""
    with open_file(path) as file:
        return int.from_bytes(file.read(4), "little") == MAGIC


def read_examples(path: str | os.PathLike, vocab_size: int | None = None) -> list[Example]:
    """All examples of an eval file.

    Raises UserError for a header, size, index, label or length that cannot be, or (given vocab_size) a token beyond it.
    """
    with open_file(path) as file:
        header = read_header(file, path, MAGIC, (VERSION,), WHAT, HINT)
        count, longest = int(header[2]), int(header[3])
        if not 1 <= count <= MAX_EXAMPLES:
            raise UserError(f"{path}: {count} examples, expected 1..{MAX_EXAMPLES}", HINT)
        size = os.fstat(file.fileno()).st_size - HEADER_BYTES
        if size % 2 or size > count * MAX_BYTES:
            raise UserError(f"{path}: {size} bytes cannot be {count} examples of at most {MAX_BYTES}, in uint16", HINT)
        stream = read_array(file, np.empty(size // 2, "<u2"))
    examples, at, found = [], 0, 0
    for index in range(count):
        example, words = _example(stream[at:], index, f"{path}: example {index} at byte {HEADER_BYTES + 2 * at}")
        for tokens in (example.context, *example.completions):
            if vocab_size is not None and tokens.max() >= vocab_size:
                message = f"{path}: example {index} has token {tokens.max()}, the model knows 0..{vocab_size - 1}"
                raise UserError(message, "take a model with GPT-2's vocabulary, for which the file was made")
        examples.append(example)
        at, found = at + words, max(found, 2 * words)
    if at < stream.size:
        end = HEADER_BYTES + 2 * at
        raise UserError(f"{path}: {WHAT} is too long: its {count} examples end at byte {end}", HINT)
    if found != longest:
        raise UserError(f"{path}: its longest example has {found} bytes, its header says {longest}", HINT)
    return examples


def _example(stream: np.ndarray, index: int, where: str) -> tuple[Example, int]:
    """The example at the beginning of `stream`, and how many uint16 it takes. Errors begin with `where`."""
    if stream.size < FIELDS:
        raise UserError(f"{where}: {WHAT} is truncated", HINT)
    start, nbytes, number, label, completions = stream[:FIELDS].tolist()
    for what, value, expected in (("start", start, START), ("index", number, index)):
        if value != expected:
            raise UserError(f"{where}: {what} {value}, expected {expected}", HINT)
    if completions != COMPLETIONS or label >= COMPLETIONS:
        found = f"label {label} of {completions} completions"
        raise UserError(f"{where}: {found}, expected 0..{COMPLETIONS - 1} of {COMPLETIONS}", HINT)
    if nbytes % 2 or nbytes > 2 * stream.size:
        raise UserError(f"{where}: {nbytes} bytes, expected an even number, at most {2 * stream.size}", HINT)
    record, at, lists = stream[: nbytes // 2], FIELDS, []
    for _ in range(1 + COMPLETIONS):
        length = int(record[at]) if at < record.size else 0
        lists.append(record[at + 1 : at + 1 + length])
        at += 1 + length
        if length == 0 or at > record.size:
            what = "context" if len(lists) == 1 else f"completion {len(lists) - 2}"
            raise UserError(f"{where}: {what} of {length} tokens in an example of {nbytes} bytes", HINT)
    if at < record.size:
        raise UserError(f"{where}: {nbytes} bytes, its tokens end after {2 * at}", HINT)
    return Example(lists[0], lists[1:], label), at


class EvalLoader:
    """Batches of an eval file: B // 4 examples of four rows each; rows beyond those are not used.

    T: positions of a row, of which the longest example must leave one free, as in llm.c; None: as many as that takes.
    most: examples at most, the first ones; 0: all. Of nproc processes each takes every nproc-th.
    Raises UserError for a damaged file, a token beyond vocab_size, or too few rows or positions.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        B: int,
        T: int | None = None,
        vocab_size: int | None = None,
        most: int = 0,
        rank: int = 0,
        nproc: int = 1,
    ):
        self.path, self.examples = path, read_examples(path, vocab_size)[: most or None]
        if B < COMPLETIONS:
            raise UserError(f"-b {B}: a question of {path} takes {COMPLETIONS} rows", f"-b {COMPLETIONS} or more")
        longest, index = max((example.longest, -index) for index, example in enumerate(self.examples))
        needed = longest + 1
        self.T = needed if T is None else T
        if needed > self.T:
            found = f"example {-index} takes {needed} positions, a row has {self.T}"
            raise UserError(f"{path}: {found}", f"-t {needed}, if the model has as many")
        self.batch_examples = B // COMPLETIONS
        self.num_examples = len(self.examples)  # of all ranks
        self.examples = self.examples[rank::nproc]
        self.num_batches = -(-len(self.examples) // self.batch_examples)
        self._inputs = np.zeros((B, self.T), np.int32)
        self._targets = np.zeros((B, self.T), np.int32)
        self.reset()

    def reset(self) -> None:
        """Back to the first example."""
        self._next, self._batch = 0, []

    def next_batch(self) -> tuple[np.ndarray, np.ndarray]:
        """inputs, targets (B,T) int32, which the next call overwrites; the last batch may have rows that do not count.

        What stands behind a row's end is of no meaning: what comes before does not see it.
        """
        self._batch = self.examples[self._next : self._next + self.batch_examples]
        self._next += len(self._batch)
        for i, example in enumerate(self._batch):
            for row, completion in enumerate(example.completions, COMPLETIONS * i):
                tokens = np.concatenate([example.context, completion])
                self._inputs[row, : len(tokens)] = tokens
                self._targets[row, : len(tokens) - 1] = tokens[1:]
        return self._inputs, self._targets

    def count_correct(self, losses: np.ndarray) -> int:
        """How many questions of the batch are answered right, by the losses (B*T) float32 of all its positions.

        Raises UserError for a loss that is not finite.
        """
        losses = losses.reshape(self._inputs.shape)
        correct = 0
        for i, example in enumerate(self._batch):
            first = len(example.context) - 1  # its last token predicts the completion's first
            scores = [
                mean_in_order(losses[row, first : first + len(completion)])
                for row, completion in enumerate(example.completions, COMPLETIONS * i)
            ]
            if not np.isfinite(scores).all():
                found = f"the model's losses on an example are {', '.join(map(str, scores))}"
                raise UserError(f"{self.path}: {found}", "take a model whose training did not fail")
            correct += int(np.argmin(scores)) == example.label  # of equal scores the first
        return correct


def mean_in_order(losses: np.ndarray) -> np.float32:
    """The mean of losses (n) float32 as C's loop has it: added one by one, in float32."""
    return np.cumsum(losses, dtype=np.float32)[-1] / np.float32(len(losses))
