"""Token data files and the batches drawn from them: llm.c's dataloader.h, and write_datafile of data_common.py.

    int32 header[256]: 20240520, 1, number of tokens, 0 ...
    then the tokens, uint16

A shard of n tokens gives (n-1) // (nproc*B*T) samples. Sample s of rank r is the B*T+1 tokens from
s*nproc*B*T + r*B*T on: inputs are its first B*T, targets its last, so that neighbours share one token.
"""

import glob
import os
from dataclasses import dataclass

import numpy as np

from llmc import rand
from llmc.errors import UserError, explain_os_error
from llmc.files import HEADER_BYTES, HEADER_INTS, atomic_write, check_size, open_file, read_array, read_header

MAGIC, VERSION = 20240520, 1
LLAMA3_MAGIC = 20240801
MAX_TOKENS = (1 << 31) - 1  # the count is an int32
WHAT = "token data file"
HINT = "make data writes a good one, python data/text.py makes one of a text of yours, or with --nanogpt of nanoGPT's"
SAME_FLAGS = "resume with the same -i, -b and -t as the saved run, and the same data"


def write_tokens(path: str | os.PathLike, tokens: np.ndarray) -> None:
    """Write one shard from a uint16 array (n), atomically. Raises UserError for 2^31 tokens or more."""
    if tokens.dtype != np.uint16:
        raise ValueError(f"tokens are {tokens.dtype}, a {WHAT} holds uint16")
    if tokens.size > MAX_TOKENS:
        raise UserError(f"{path}: {tokens.size} tokens, a {WHAT} holds at most {MAX_TOKENS}", "write several shards")
    with atomic_write(path) as file:
        file.write(token_header(tokens.size))
        file.write(np.ascontiguousarray(tokens, "<u2").data)


def token_header(num_tokens: int) -> bytes:
    """The header of a shard of so many tokens."""
    header = np.zeros(HEADER_INTS, "<i4")
    header[:3] = MAGIC, VERSION, num_tokens
    return header.tobytes()


def count_tokens(path: str | os.PathLike) -> int:
    """The number of tokens of one shard. Raises UserError unless header and size are as they should be."""
    with open_file(path) as file:
        return _check_header(file, path)


def _check_header(file, path: str | os.PathLike) -> int:
    if int.from_bytes(file.read(4), "little") == LLAMA3_MAGIC:
        raise UserError(f"{path}: a Llama-3 {WHAT} (magic {LLAMA3_MAGIC}, uint32 tokens), expected GPT-2's", HINT)
    file.seek(0)
    header = read_header(file, path, MAGIC, (VERSION,), WHAT, HINT)
    num_tokens = int(header[2])
    if num_tokens < 0:
        raise UserError(f"{path}: {num_tokens} tokens, expected 0..{MAX_TOKENS}", HINT)
    check_size(file, path, HEADER_BYTES + 2 * num_tokens, WHAT, HINT)
    return num_tokens


@dataclass
class ShuffleState:
    """All that the order of batches still to come depends on: both permutations, and the Mersenne Twister.

    shard_indices, intra_shard_indices int32 (n); mt_key uint32 (624); mt_pos, how many words of the key are used up.
    """

    shard_indices: np.ndarray
    intra_shard_indices: np.ndarray
    mt_key: np.ndarray
    mt_pos: int


def find_shards(pattern: str) -> list[str]:
    """Every file that matches `pattern`, in byte order of their names. Raises UserError if there is none."""
    paths = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern), key=os.fsencode)
    if not paths:
        raise UserError(
            f"{pattern}: no such token data", "make data, or give a pattern in quotes: 'data/*_train_*.bin'"
        )
    return paths


def check_vocabulary(tokens: np.ndarray, vocab_size: int, path: str | os.PathLike, first: int) -> None:
    """Raise UserError if one of `tokens`, which begin at token `first` of a shard, is not below vocab_size."""
    if tokens.max() >= vocab_size:
        at = int(np.argmax(tokens >= vocab_size))
        raise UserError(
            f"{path}: token {first + at} is {tokens[at]}, the model knows 0..{vocab_size - 1}",
            "the data was made with another tokenizer: make it again for this model, or take a model made for it",
        )


class DataLoader:
    """Batches of every file that matches `pattern`, in byte order of their names; shuffled, a new order every epoch.

    The rank's part of each sample of nproc*B*T tokens. seed + rank seeds the shuffle's MT19937 (llm.c: 42 + rank).
    Raises UserError if nothing matches, a shard is damaged or too short, or (given vocab_size) a token is out of range.
    """

    def __init__(
        self,
        pattern: str,
        B: int,
        T: int,
        *,
        vocab_size: int | None = None,
        rank: int = 0,
        nproc: int = 1,
        shuffle: bool = False,
        seed: int = 42,
    ):
        self.B, self.T, self.rank, self.nproc = B, T, rank, nproc
        self.vocab_size, self.shuffle = vocab_size, shuffle
        self.paths = find_shards(pattern)
        counts = [self._count_enough_tokens(path) for path in self.paths]
        self.num_tokens = sum(counts)
        # llm.c's count takes all shards for one, and may be above what there is: the loader wraps round
        self.num_batches = self.num_tokens // self._sample_tokens
        self.epoch_batches = sum((count - 1) // self._sample_tokens for count in counts)

        # one buffer serves both: targets are inputs shifted by one
        self._raw = np.empty(B * T + 1, "<u2")
        self._tokens = np.empty(B * T + 1, np.int32)
        self._inputs = self._tokens[:-1].reshape(B, T)
        self._targets = self._tokens[1:].reshape(B, T)

        self._file = None
        self._shard_indices = np.arange(len(self.paths), dtype=np.int32)
        self._intra_shard_indices = np.empty(0, np.int32)
        self._mt = rand.mersenne(seed + rank)
        self.reset()

    def __enter__(self) -> "DataLoader":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Close the open shard."""
        if self._file:
            self._file.close()
            self._file = None

    def next_batch(self) -> tuple[np.ndarray, np.ndarray]:
        """inputs, targets (B,T) int32: overlapping views of one buffer, which the next call overwrites."""
        if self.sample >= self._shard_samples:
            self._advance()
        self._read_batch()
        self.sample += 1
        return self._inputs, self._targets

    def reset(self) -> None:
        """Back to the first sample; when shuffled, of a new order that continues the random stream."""
        if self.shuffle:
            rand.shuffle(self._shard_indices, self._mt)
        self._open_shard(0)
        self._permute_samples()

    def resume(self, shard: int, sample: int) -> None:
        """Go on from the position that `shard` and `sample` named, in the order as it is now: draws nothing."""
        if not 0 <= shard < len(self.paths):
            raise UserError(f"saved position is in shard {shard}, there are {len(self.paths)}", SAME_FLAGS)
        self._open_shard(shard)
        if not 0 <= sample <= self._shard_samples:
            raise UserError(
                f"{self.path}: saved position is sample {sample}, there are {self._shard_samples}",
                SAME_FLAGS,
            )
        ordered = self._intra_shard_indices.size
        if self.shuffle and ordered != self._shard_samples:
            raise UserError(
                f"{self.path}: saved order is of {ordered} samples, there are {self._shard_samples}", SAME_FLAGS
            )
        self.sample = sample

    def state(self) -> ShuffleState | None:
        """A copy of what `restore` needs besides `shard` and `sample`; None if not shuffled."""
        if not self.shuffle:
            return None
        mt = self._mt.state["state"]
        return ShuffleState(
            self._shard_indices.copy(), self._intra_shard_indices.copy(), mt["key"].copy(), int(mt["pos"])
        )

    def restore(self, shard: int, sample: int, shuffle_state: ShuffleState | None) -> None:
        """Continue exactly where the loader was that gave `shard`, `sample` and `state()`.

        Raises UserError if those do not fit these files, B, T or shuffle.
        """
        if self.shuffle != (shuffle_state is not None):
            was, now = ("unshuffled", "shuffled") if self.shuffle else ("shuffled", "unshuffled")
            raise UserError(f"the saved run took its data {was}, this one {now}", "resume with the same --shuffle")
        if shuffle_state is not None:
            self._set_shuffle_state(shuffle_state)
        self.resume(shard, sample)

    @property
    def path(self) -> str:
        """The file of the current shard."""
        return self.paths[self._shard_indices[self.shard]]

    @property
    def _sample_tokens(self) -> int:
        return self.nproc * self.B * self.T

    def _count_enough_tokens(self, path: str) -> int:
        num_tokens, needed = count_tokens(path), self._sample_tokens + 1
        if num_tokens < needed:
            sizes = f"B = {self.B}, T = {self.T}" + (f" in {self.nproc} processes" if self.nproc > 1 else "")
            hint = f"lower -b or -t: B*T may be at most {(num_tokens - 1) // self.nproc}"
            if num_tokens < 2:
                hint = "it holds no text: make it again (make data), or leave it out of the pattern"
            raise UserError(f"{path}: {num_tokens} tokens, {sizes} needs at least {needed}", hint)
        return num_tokens

    def _set_shuffle_state(self, state: ShuffleState) -> None:
        if state.shard_indices.size != len(self.paths):
            raise UserError(
                f"the saved order is of {state.shard_indices.size} shards, there are {len(self.paths)}",
                SAME_FLAGS,
            )
        self._shard_indices = state.shard_indices.copy()
        self._intra_shard_indices = state.intra_shard_indices.copy()
        self._mt.state = {"bit_generator": "MT19937", "state": {"key": state.mt_key, "pos": state.mt_pos}}

    def _advance(self) -> None:
        if self.shard == len(self.paths) - 1:
            self.reset()
        else:
            self._open_shard(self.shard + 1)
            self._permute_samples()

    def _open_shard(self, shard: int) -> None:
        self.close()
        self.shard, self.sample = shard, 0
        try:
            self._file = open(self.path, "rb")
            num_tokens = _check_header(self._file, self.path)
        except OSError as error:
            raise explain_os_error(error, self.path, "reading") from None
        self._shard_samples = (num_tokens - 1) // self._sample_tokens

    def _permute_samples(self) -> None:
        if self.shuffle:
            self._intra_shard_indices = np.arange(self._shard_samples, dtype=np.int32)
            rand.shuffle(self._intra_shard_indices, self._mt)

    def _read_batch(self) -> None:
        sample = int(self._intra_shard_indices[self.sample]) if self.shuffle else self.sample
        first = sample * self._sample_tokens + self.rank * self.B * self.T
        try:
            self._file.seek(HEADER_BYTES + 2 * first)
            read_array(self._file, self._raw)
        except OSError as error:
            raise explain_os_error(error, self.path, "reading") from None
        if self.vocab_size is not None:
            check_vocabulary(self._raw, self.vocab_size, self.path, first)
        self._tokens[:] = self._raw
