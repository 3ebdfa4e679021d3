"""TinyStories (Eldan and Li 2023), tokenised as llm.c has it (dev/data/tinystories.py).

    python data/tinystories.py                    # 1.5 GB to download, 10 GB of disk
    python data/tinystories.py --download-only    # tokenise later

Shard 0 of 50 is the validation data (19,043,638 GPT-2 tokens), the others are the training data (925,653,391). Within
a shard the stories are shuffled by Python's random with seed 1337 + the shard's place in its split, and an EOT stands
before each. The validation file is llm.c's byte for byte; llm.c appends training shards in the order in which its
processes finish, so its training file differs from run to run: here it is always in the order of the shards.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))  # so that it runs from any folder
if __name__ == "__main__":
    from llmc import startup

    startup.begin()

import contextlib
import json
import multiprocessing
import random
import shutil
import signal
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.corpus import blamed_on, check_enough, make_folder, print_next_commands, shown, typed, write_tokenizer
from data.download import download, require_space
from llmc.cli import ArgumentParser, positive_int
from llmc.dataloader import MAX_TOKENS, token_header
from llmc.errors import UserError, explain_os_error, run
from llmc.files import HEADER_BYTES, atomic_write
from llmc.interrupt import SIGNALS
from llmc.tokenizer import encode_ordinary, gpt2_encoding

URL = "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main/TinyStories_all_data.tar.gz"
DISK_BYTES = 10_000_000_000  # archive 1.5 GB, JSON about 6 GB, tokens 1.9 GB
SEED = 1337
FOLDER = Path(__file__).resolve().parent / "tinystories"
held: list[int] = []  # signals that came while a worker was started
FEWER = "run again with --workers 1: each takes 0.5 GB of memory"


def fetch_shards(folder: Path) -> list[Path]:
    """The JSON shards in order of their names, downloaded and unpacked into `folder` unless they are there."""
    unpacked = folder / "TinyStories_all_data"
    if not unpacked.exists():
        archive = folder / "TinyStories_all_data.tar.gz"
        have = sum(path.stat().st_size for path in folder.glob("TinyStories_all_data.tar.gz*"))
        require_space(folder, DISK_BYTES - have)
        download(URL, archive, instead="make data (Shakespeare's plays)")
        unpack(archive, unpacked)
    shards = sorted(unpacked.glob("*.json"))
    if len(shards) < 2:
        raise UserError(
            f"{unpacked}: {len(shards)} JSON shards, expected 2 or more, the first for validation",
            f"delete {unpacked} and its archive, and run again",
        )
    return shards


def unpack(archive: Path, folder: Path) -> None:
    """The JSON files of a .tar.gz into `folder`, which appears only when all of them are there."""
    print(f"unpacking {shown(archive)}")
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    make_folder(part)
    try:
        with tarfile.open(archive, "r|gz") as tar:
            for member in tar:
                if member.isfile() and member.name.endswith(".json"):
                    with open(part / Path(member.name).name, "wb") as file:  # the name alone cannot leave the folder
                        shutil.copyfileobj(tar.extractfile(member), file)
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise UserError(f"{archive}: a broken archive: {error}", "delete it and run again") from None
    except OSError as error:
        raise explain_os_error(error, part, "unpacking into") from None
    part.rename(folder)


def read_stories(path: Path) -> list[str]:
    """The stories of one shard, an empty one among them as well.

    Raises UserError unless it is a JSON list of objects that hold a "story", and one of these is more than blanks.
    """
    try:
        stories = [record["story"].strip() for record in json.loads(path.read_bytes())]
    except OSError as error:
        raise explain_os_error(error, path, "reading") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        found = f"{type(error).__name__}: {error}"
        hint = f"delete {path.parent} and run again"
        raise UserError(f'{path}: expected a JSON list of records with a text "story" ({found})', hint) from None
    if not any(stories):
        found = f"{len(stories)} stories, all blank" if stories else "no stories"
        raise UserError(f"{path}: {found}", f"delete {path.parent} and run again")
    return stories


def shard_tokens(path: Path, place: int) -> np.ndarray:
    """uint16 tokens of one shard: its stories in shuffled order, an EOT before each. place: its index in the split."""
    stories = read_stories(path)
    random.Random(SEED + place).shuffle(stories)
    encoding = gpt2_encoding()
    eot = encoding.eot_token
    return np.concatenate([np.array([eot, *encode_ordinary(encoding, story)], np.uint16) for story in stories])


def stopping_signals() -> list[int]:
    """SIGINT and SIGTERM, without one that the caller ignores (nohup, a shell's background job)."""
    return [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Let SIGINT and SIGTERM wait till the block ends: no worker is started that the parent does not know of.

    Not by pthread_sigmask: another thread, BLAS has some, would take the signal, and the main thread sleep on.
    """
    before = {number: signal.signal(number, lambda number, _: held.append(number)) for number in stopping_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
        while held:
            signal.raise_signal(held.pop())


def end_silently() -> None:
    """Let SIGINT and SIGTERM end a worker at once and without a word: the parent reports."""
    for number in stopping_signals():
        signal.signal(number, signal.SIG_DFL)


def work(receiver: Connection, sender: Connection, path: Path, place: int) -> None:
    """A worker process: send the tokens of one shard, or the UserError that names it; to nobody if the parent died."""
    end_silently()
    receiver.close()  # held open here, too, it would make the worker wait for a parent that died
    with contextlib.suppress(OSError):
        try:
            with blamed_on(str(path), FEWER):
                sender.send(shard_tokens(path, place))
        except UserError as error:
            sender.send(error)


def start_worker(path: Path, place: int) -> tuple[Connection, BaseProcess]:
    """A process that works on one shard, and the end of a pipe that gives its tokens."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.Process(target=work, args=(receiver, sender, path, place), daemon=True)
    process.start()
    sender.close()  # then the worker's is the only one, and the pipe ends with it
    return receiver, process


def tokens_from(receiver: Connection, process: BaseProcess, path: Path) -> np.ndarray:
    """What a worker sends. Raises the UserError that it sends instead, or one that says how it died."""
    try:
        with receiver:
            sent = receiver.recv()
    except (EOFError, OSError):  # the end of the pipe, before a message or in the middle
        process.join()
        code = process.exitcode
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        why = "probably for want of memory: " if code == -9 else ""
        raise UserError(f"{path}: the process that tokenised it {how}", why + FEWER) from None
    except MemoryError:
        raise UserError(f"{path}: out of memory", FEWER) from None
    process.join()
    if isinstance(sent, UserError):
        raise sent
    return sent


def tokenised(shards: list[Path], workers: int) -> Iterator[np.ndarray]:
    """shard_tokens of each shard, in order. Shards in memory: one a worker, and as many waiting for their turn.

    A process for each shard, `workers` at a time. Raises UserError naming the shard that one failed or died at. No
    process is left when the generator ends or is closed.
    """
    running: dict[Connection, tuple[BaseProcess, int]] = {}
    finished: dict[int, np.ndarray] = {}
    started = 0
    try:
        for place in range(len(shards)):
            while place not in finished:
                while len(running) < workers and started < min(len(shards), place + 2 * workers):
                    with signals_held():
                        receiver, process = start_worker(shards[started], started)
                        running[receiver] = process, started
                    started += 1
                for receiver in wait(list(running)):
                    process, of = running[receiver]
                    finished[of] = tokens_from(receiver, process, shards[of])
                    del running[receiver]
            yield finished.pop(place)
    finally:
        for process, _ in running.values():
            process.kill()  # a process that was just forked forgets a SIGTERM, and there is nothing to tidy up in it
        for process, _ in running.values():
            process.join()


def write_split(path: Path, parts: Iterable[np.ndarray]) -> None:
    """One token data file from consecutive parts; the count goes into the header at the end. Atomic."""
    num_tokens = 0
    with atomic_write(path) as file:
        file.write(bytes(HEADER_BYTES))
        for tokens in parts:
            file.write(tokens.astype("<u2", copy=False).data)
            num_tokens += tokens.size
        check_enough(path, num_tokens)
        if num_tokens > MAX_TOKENS:
            raise UserError(f"{path}: {num_tokens} tokens, a data file holds at most {MAX_TOKENS}", "leave shards out")
        file.seek(0)
        file.write(token_header(num_tokens))
    print(f"wrote {shown(path)}: {num_tokens:,} tokens")


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--out-dir", type=Path, default=FOLDER, help="folder for the download and the data files")
    parser.add_argument("--download-only", action="store_true", help="download and unpack, do not tokenise")
    cores = os.cpu_count() or 1
    parser.add_argument(
        "--workers", type=positive_int, default=cores, help="processes that tokenise, 0.5 GB of memory each"
    )
    args = parser.parse(argv)

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwind, or the workers would outlive this process
    make_folder(args.out_dir)
    shards = fetch_shards(args.out_dir)
    print(f"{len(shards)} shards in {shown(shards[0].parent)}")
    if args.download_only:
        folder = "" if args.out_dir == FOLDER else f" -o {typed(args.out_dir)}"
        print(f"next: python data/tinystories.py{folder}")
        return
    paths = {split: args.out_dir / f"TinyStories_{split}.bin" for split in ("train", "val")}
    for split, members in (("val", shards[:1]), ("train", shards[1:])):
        with contextlib.closing(tokenised(members, args.workers)) as parts:
            bar = tqdm(parts, desc=split, total=len(members), unit="shard", disable=None)
            write_split(paths[split], bar)
    write_tokenizer("gpt2", Path())
    print_next_commands("gpt2", paths["train"], paths["val"])


if __name__ == "__main__":
    run(main)
