"""data/text.py: text, .jsonl and nanoGPT's tokens, and what is wrong with them; the commands it prints; the mark."""

import contextlib
import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import generate
import train_banded
from data import create_model, text
from llmc.checkpoint import GPT2Config, Model, write_model
from llmc.dataloader import count_tokens, write_tokens
from llmc.errors import UserError
from llmc.files import HEADER_BYTES
from llmc.init import gpt2_init
from llmc.tokenizer import ENDOFTEXT, MARK, Tokenizer, byte_tokenizer, gpt2_tokenizer

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPT = str(ROOT / "data" / "text.py")
GPT2 = gpt2_tokenizer()
VERSE = "The quality of mercy is not strain'd,\nIt droppeth as\n\nthe gentle rain  from heaven: éç – 雨。\n\n"
BOOK = "".join(f"{i}. {VERSE}" for i in range(60))


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


def make(*words) -> tuple[list[int], list[int]]:
    """Tokens of both splits, of all shards, that data/text.py makes in the folder out."""
    text.main([*map(str, words), "-o", "out", "--force"])
    return tuple(
        [token for path in sorted(Path("out").glob(f"{split}_*.bin")) for token in tokens_of(path)]
        for split in ("train", "val")
    )


def tokens_of(path) -> list[int]:
    """The tokens of a data file whose header and size are right."""
    assert count_tokens(path) == (os.path.getsize(path) - HEADER_BYTES) // 2
    return np.fromfile(path, "<u2", offset=HEADER_BYTES).tolist()


def encoded(tokenizer, *documents) -> list[int]:
    return [token for document in documents for token in (tokenizer.eot, *tokenizer.encode(document))]


def decoded(tokenizer, tokens) -> list[str]:
    """The documents of some tokens."""
    parts = [[]]
    for token in tokens:
        if token == tokenizer.eot:
            parts.append([])
        else:
            parts[-1].append(tokenizer.tokens[token])
    return [b"".join(part).decode() for part in parts[1:]]


def refused(*words) -> UserError:
    """The error of a call, which leaves no data file behind, nor a part of one."""
    with pytest.raises(UserError) as error:
        text.main([*map(str, words), "-o", "out"])
    assert not Path("out").exists() or os.listdir("out") == []
    return error.value


# ----------------------------------------------------------------------------------------------------------------------
# the split


def test_a_book_is_cut_at_a_blank_line():
    """The last tenth of its bytes, from the blank line that comes next; both parts with an EOT, nothing is lost."""
    Path("book.txt").write_text(BOOK)
    train, val = make("book.txt")
    data = BOOK.encode()
    cut = data.index(b"\n\n", len(data) - len(data) // 10) + 2
    assert train == encoded(GPT2, data[:cut].decode()) and val == encoded(GPT2, data[cut:].decode())


@pytest.mark.parametrize("gap", ["\n\n", "\n", " ", ""])
def test_the_next_best_boundary_is_taken(gap):
    """Byte 90 is where a tenth of 100 begins; the cut is behind the gap at 91, or at 90 if there is none."""
    content = ("a" * 91 + gap).ljust(100, "b")
    Path("x.txt").write_text(content)
    train, val = make("x.txt", "--tokenizer", "byte")
    cut = 91 + len(gap) if gap else 90
    assert (decoded(byte_tokenizer(), train), decoded(byte_tokenizer(), val)) == ([content[:cut]], [content[cut:]])


def test_files_are_documents_in_the_order_given():
    for name, letter, size in (("b c.txt", "b", 300), ("a.txt", "a", 300), ("empty.txt", "", 0), ("d.txt", "d", 400)):
        Path(name).write_text(letter * size)
    train, val = make("b c.txt", "a.txt", "empty.txt", "d.txt", "--tokenizer", "byte", "--val", "0.4")
    assert decoded(byte_tokenizer(), train) == ["b" * 300, "a" * 300]
    assert decoded(byte_tokenizer(), val) == ["d" * 400]


def test_too_few_records_to_hold_one_out():
    Path("x.jsonl").write_text('{"text": "a record"}\n' * 9)
    error = refused("x.jsonl")
    assert error.message.startswith("out/val_000.bin: the text gives 0 tokens") and "a larger --val" in error.hint


def test_every_tenth_record_is_held_out():
    records = [f"record {i}\r\nends" for i in range(35)]
    lines = [json.dumps({"id": i, "body": record}) for i, record in enumerate(records)]
    lines[7:7] = ["", json.dumps({"body": ""})]  # neither counts
    Path("a.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines[:20]).encode())
    Path("b.jsonl").write_text("\n".join(lines[20:]))
    train, val = make("a.jsonl", "b.jsonl", "--field", "body")
    assert decoded(GPT2, val) == [records[i] for i in (9, 19, 29)]
    assert decoded(GPT2, train) == [record for i, record in enumerate(records) if i not in (9, 19, 29)]


# ----------------------------------------------------------------------------------------------------------------------
# what a file may hold


PLAIN = BOOK.encode()


@pytest.mark.parametrize("tokenizer", ["gpt2", "byte"])
@pytest.mark.parametrize(
    "name, content",
    [
        ("crlf.txt", PLAIN.replace(b"\n", b"\r\n")),
        ("mac.txt", PLAIN.replace(b"\n", b"\r")),
        ("bom.txt", b"\xef\xbb\xbf" + PLAIN),
        ("a name with spaces [1].txt", PLAIN),
        ("crlf bom.txt", b"\xef\xbb\xbf" + PLAIN.replace(b"\n", b"\r\n")),
    ],
)
def test_the_same_text_gives_the_same_documents(tokenizer, name, content):
    Path("plain.txt").write_bytes(PLAIN)
    Path(name).write_bytes(content)
    a, b = make("plain.txt", "--tokenizer", tokenizer), make(name, "--tokenizer", tokenizer)
    of = {"gpt2": GPT2, "byte": byte_tokenizer()}[tokenizer]
    assert "".join(decoded(of, a[0] + a[1])) == "".join(decoded(of, b[0] + b[1])) == BOOK
    assert len(a[1]) > 0.04 * len(a[0]) and abs(len(a[1]) - len(b[1])) < 150  # CRLF moves the tenth by a verse


def test_a_text_that_spells_the_token_out_gets_ordinary_ones():
    Path("x.txt").write_text(f"one{ENDOFTEXT}two " * 100)
    train, val = make("x.txt")
    assert train.count(GPT2.eot) == val.count(GPT2.eot) == 1


@pytest.mark.parametrize("read", [1, 7, 1 << 20])
@pytest.mark.parametrize(
    "content, byte, found",
    [
        (PLAIN[:3000] + b"\xff" + PLAIN[3000:], 3000, "0xff, which is no UTF-8: invalid start byte"),
        (PLAIN[:-60] + b"caf\xe9 noir" + PLAIN[-60:], len(PLAIN) - 57, "0xe9, which is no UTF-8: invalid continuation"),
        (b"\xef\xbb\xbf" + PLAIN + b"\xe2\x82", 3 + len(PLAIN), "0xe2, which is no UTF-8: unexpected end of data"),
        (b"ab\xed\xa0\x80", 2, "0xed, which is no UTF-8: invalid continuation byte"),
    ],
)
def test_invalid_utf8_is_told_with_its_byte(monkeypatch, content, byte, found, read):
    monkeypatch.setattr(text, "READ", read)
    Path("my book.txt").write_bytes(content)
    error = refused("my book.txt")
    assert error.message.startswith(f"my book.txt: byte {byte} is {found}")
    assert error.hint == "if it is WINDOWS-1252: iconv -f WINDOWS-1252 -t UTF-8 'my book.txt' > 'my book_utf8.txt'"


def test_utf16_is_recognised():
    Path("x.txt").write_bytes(BOOK.encode("utf-16"))
    assert "iconv -f UTF-16 -t UTF-8 x.txt > x_utf8.txt" in refused("x.txt").hint


def test_a_zero_byte():
    """To GPT-2 it is a token like others; in bytes it ends a document, so a text may not have it."""
    Path("x.txt").write_bytes(b"some words " * 50 + b"\0" + b" and more" * 50)
    train, val = make("x.txt")
    assert (train + val).count(188) == 1 and GPT2.tokens[188] == b"\0"
    assert decoded(GPT2, train)[0].startswith("some words ")
    os.rename("out", "kept")
    error = refused("x.txt", "--tokenizer", "byte")
    assert error.message == "x.txt: byte 550 is 0x00, for which the tokenizer has no token"
    assert error.hint == "take it out (tr -d '\\000'), or --tokenizer gpt2, which knows all bytes"


def test_a_byte_that_a_tokenizer_of_characters_lacks():
    """Told with its place in the file, be it a return that would become the line's end, which is not known either."""
    Tokenizer([b"a", b"b", b"\n", b"<end>"], 3).write("abn.bin")
    Tokenizer([b"a", b"b", b"<end>"], 2).write("ab.bin")
    Path("x.txt").write_bytes(b"\xef\xbb\xbf" + b"ab\r\n" * 50)
    train, val = make("x.txt", "--tokenizer", "abn.bin")
    assert train + val == [3, *[0, 1, 2] * 46, 3, *[0, 1, 2] * 4]
    os.rename("out", "kept")
    assert refused("x.txt", "--tokenizer", "ab.bin").message.startswith("x.txt: byte 5 is 0x0d")
    Path("x.txt").write_bytes(b"abab" * 50 + b"c")
    assert refused("x.txt", "--tokenizer", "abn.bin").message.startswith("x.txt: byte 200 is 0x63")


def test_nothing_but_empty_files(capsys):
    for name in ("a.txt", "b.jsonl"):
        Path(name).write_text("")
    assert refused("a.txt", "b.jsonl").message.endswith(
        "train_000.bin: the text gives 0 tokens, a data file needs 2 or more"
    )
    assert "a.txt: empty, left out\nb.jsonl: empty, left out\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line, found",
    [
        (b'{"text": "x"', "line 3 at byte 30: expected an object with a text 'text' (JSONDecodeError"),
        (b'{"body": 1, "id": 2}', "line 3 at byte 30: no field 'text', found 'body', 'id'"),
        (b"{}", "line 3 at byte 30: no field 'text', found none"),
        (b'{"text": 5}', "line 3 at byte 30: expected an object with a text 'text' (AttributeError"),
        (b'["text"]', "line 3 at byte 30: expected an object with a text 'text' (TypeError"),
        (b"[" * 100_000, "line 3 at byte 30: expected an object with a text 'text' (RecursionError"),
        (b'{"text": "\xff"}', "byte 40 is 0xff, which is no UTF-8"),
        (b'{"text": "\\ud800"}', "line 3 at byte 30: half a surrogate pair"),
        (b'{"text": "' + b"x" * 5000 + b'"}', "line 3 at byte 30: longer than 4096 bytes"),
    ],
)
def test_a_bad_record_is_told_with_line_and_byte(monkeypatch, line, found):
    monkeypatch.setattr(text, "MAX_LINE", 4096 if b"xxx" in line else 1 << 20)
    Path("x.jsonl").write_bytes(b'{"text": "aa"}\n' * 2 + line + b"\n")
    assert refused("x.jsonl").message.startswith(f"x.jsonl: {found}")


def test_a_record_that_the_tokenizer_cannot_encode():
    Path("x.jsonl").write_text('{"text": "aa"}\n{"text": "a\\u0000b"}\n')
    error = refused("x.jsonl", "--tokenizer", "byte")
    assert error.message == "x.jsonl: line 2 at byte 15: has the byte 0x00, for which the tokenizer has no token"


def test_files_that_are_none(tmp_path):
    os.mkfifo("pipe")
    Path("folder").mkdir()
    for name, found in (("missing.txt", "No such file"), ("folder", "Is a directory")):
        assert found in refused(name).message
    assert refused("/dev/null").message == "/dev/null: not an ordinary file"
    assert refused("pipe").message == "pipe: not an ordinary file"


# ----------------------------------------------------------------------------------------------------------------------
# pieces, workers, memory

LONG = (BOOK + " " * 300 + "\n\n\t x" + "y" * 3000 + "1234567890" * 200 + "雨" * 2000 + "\u3000" * 40 + BOOK) * 3


@pytest.mark.parametrize("piece, read", [(500, 100), (4000, 333), (7000, 1 << 20)])
def test_pieces_give_the_tokens_of_the_whole(monkeypatch, piece, read):
    """Words are at most 7000 characters long here; with pieces of 7000 and more no token changes."""
    monkeypatch.setattr(text, "PIECE", piece)
    monkeypatch.setattr(text, "READ", read)
    Path("x.txt").write_text(LONG)
    train, val = make("x.txt")
    whole = "".join(decoded(GPT2, train)), "".join(decoded(GPT2, val))
    assert "".join(whole) == LONG  # wherever it is cut
    equal = train == encoded(GPT2, whole[0]) and val == encoded(GPT2, whole[1])
    assert equal == (piece == 7000)


def test_the_same_bytes_for_any_number_of_workers(monkeypatch):
    monkeypatch.setattr(text, "PIECE", 700)
    Path("x.txt").write_text(LONG)
    Path("y.jsonl").write_text("".join(json.dumps({"text": f"{i} {VERSE * (i % 9)}"}) + "\n" for i in range(80)))
    found = {}
    for workers in (1, 2, 5):
        make("x.txt", "y.jsonl", "--workers", workers)
        found[workers] = [Path("out", name).read_bytes() for name in sorted(os.listdir("out"))]
    assert len(found[1]) == 3 and found[1] == found[2] == found[5]


@pytest.mark.parametrize("read", [1, 2, 3, 5])
def test_characters_and_line_ends_may_be_cut_by_a_read(monkeypatch, read):
    monkeypatch.setattr(text, "READ", read)
    Path("x.txt").write_bytes("é\r\n雨\r\r\n😀 a\r\n".encode() * 20)
    train, val = make("x.txt", "--tokenizer", "byte")
    assert "".join(decoded(byte_tokenizer(), train + val)) == "é\n雨\n\n😀 a\n" * 20


MEASURE = """
import resource, runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def peak_megabytes(*words) -> int:
    """Of data/text.py on some file, with bytes for tokens."""
    command = [sys.executable, "-c", MEASURE, SCRIPT, *words, "--tokenizer", "byte", "--workers", "2", "-o"]
    done = subprocess.run([*command, f"out_{words[0]}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(re.search(r"peak (\d+)", done.stdout)[1])


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in another unit")
def test_memory_does_not_grow_with_the_file():
    """100 MB in one line without a blank, and with blanks; what is held is the same as for a thousandth of it."""
    Path("small.txt").write_text("a quick brown fox " * 5000)
    Path("line.txt").write_text("x" * 100_000_000)
    Path("words.txt").write_text("a quick brown fox " * 5_500_000)
    small = peak_megabytes("small.txt")
    for name in ("line.txt", "words.txt"):
        assert peak_megabytes(name) < small + 60
        shards = [*Path(f"out_{name}").glob("*.bin")]
        assert sum(map(count_tokens, shards)) == 2 + os.path.getsize(name)


# ----------------------------------------------------------------------------------------------------------------------
# shards


@pytest.mark.parametrize("size, counts", [(1000, [1000]), (1999, [1000, 999]), (2099, [1000, 1099])])
@pytest.mark.parametrize("at_once", [1, 130, 5000])
def test_shards_are_full_and_the_last_is_not_too_short(monkeypatch, size, counts, at_once):
    """What would be too few tokens for a shard of their own, below 100 here, stays with the last."""
    monkeypatch.setattr(text, "SHARD", 1000)
    monkeypatch.setattr(text, "LEAST", 100)
    tokens = np.arange(size, dtype=np.uint16)
    Path("out").mkdir()
    parts = [("train", tokens[i : i + at_once]) for i in range(0, size, at_once)] + [("val", tokens[:7])]
    shards = text.write_shards(Path("out"), parts, "gpt2", GPT2)
    assert shards["train"].counts == counts == [count_tokens(path) for path in shards["train"].paths]
    assert [token for path in shards["train"].paths for token in tokens_of(path)] == tokens.tolist()
    assert tokens_of("out/val_000.bin") == list(range(7))


def test_what_is_there_is_kept_without_force(monkeypatch, capsys):
    """With --force older shards go, too, or a pattern would mix two texts."""
    monkeypatch.setattr(text, "SHARD", 1000)
    monkeypatch.setattr(text, "LEAST", 10)
    Path("x.txt").write_text("a" * 5000)
    make("x.txt", "--tokenizer", "byte")
    Path("out", "my.bin").write_text("not ours")
    assert "-i 'out/train_*.bin' -j out/val_000.bin" in capsys.readouterr().out
    before = {path: path.read_bytes() for path in Path("out").iterdir()}
    assert len(before) == 8
    with pytest.raises(UserError, match=r"out/train_000\.bin: exists already"):
        text.main(["x.txt", "-o", "out"])
    Path("bad.txt").write_bytes(b"\xff" * 100)
    with pytest.raises(UserError, match="no UTF-8"):
        text.main(["bad.txt", "-o", "out", "--force"])
    assert {path: path.read_bytes() for path in Path("out").iterdir()} == before
    Path("x.txt").write_text("a" * 500)
    make("x.txt", "--tokenizer", "byte")
    assert sorted(os.listdir("out")) == ["my.bin", MARK, "train_000.bin", "val_000.bin"]


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_in_the_middle_nothing_is_left(number, code):
    Path("x.txt").write_text(BOOK * 4000)
    listen = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731
    process = subprocess.Popen([sys.executable, SCRIPT, "x.txt", "-o", "out"], preexec_fn=listen)
    while not (Path("out").exists() and sum(path.stat().st_size for path in Path("out").glob(".train*")) > 10_000):
        assert process.poll() is None
    process.send_signal(number)
    assert process.wait(timeout=30) == code and os.listdir("out") == []


# ----------------------------------------------------------------------------------------------------------------------
# nanoGPT's files


def test_nanogpt_files_keep_their_split():
    train, val = np.arange(5000, dtype="<u2"), np.arange(300, dtype="<u2")[::-1]
    train.tofile("train.bin")
    val.tofile("val.bin")
    assert make("val.bin", "train.bin", "--nanogpt") == (train.tolist(), val.tolist())
    assert make("train.bin", "--nanogpt") == (list(range(4500)), list(range(4500, 5000)))


@pytest.mark.parametrize(
    "content, found",
    [
        (b"abc", "3 bytes, expected tokens of two bytes each"),
        (np.full(9, 300, "<u2").tobytes(), "token 0 at byte 0 is 300, the tokenizer has 0..255"),
        (b"\1\0" * 2000 + b"\0\1", "token 2000 at byte 4000 is 256, the tokenizer has 0..255"),
    ],
)
def test_a_file_that_is_not_nanogpts(monkeypatch, content, found):
    monkeypatch.setattr(text, "READ", 512)
    Path("t.bin").write_bytes(content)
    assert refused("t.bin", "--nanogpt", "--tokenizer", "byte").message == f"t.bin: {found}"


def test_tokens_taken_for_text():
    Path("train.bin").write_bytes(b"\1\xff" * 100)
    assert refused("train.bin").hint == "--nanogpt, if it holds the tokens that nanoGPT's prepare.py wrote"


def test_a_file_with_a_header_is_no_nanogpt_file():
    write_tokens("t.bin", np.zeros(100, np.uint16))
    error = refused("t.bin", "--nanogpt")
    assert error.message == "t.bin: has llm.c's header (magic 20240520)" and error.hint.endswith("-i t.bin")


# ----------------------------------------------------------------------------------------------------------------------
# the commands it prints, the mark, and the trainers' warning


def printed_commands(out: str) -> list[list[str]]:
    lines = [line.partition(": ")[2] for line in out.splitlines() if line.startswith(("next: ", "then: "))]
    return [shlex.split(line)[1:] for line in lines]


CHARS = Tokenizer([bytes([byte]) for byte in sorted(set(BOOK.encode()))] + [b"<end>"], 0)


@pytest.mark.parametrize("tokenizer", ["byte", "gpt2", "chars.bin"])
@pytest.mark.parametrize("size", [40, 3000, 60_000])
def test_printed_commands_work_as_they_are(tokenizer, size, monkeypatch, capsys):
    """In a folder with a space in its name, on a text of any length; only -n is lowered."""
    Path("my data").mkdir()
    Tokenizer(CHARS.tokens, CHARS.vocab_size - 1).write("chars.bin")
    Path("my data/x.txt").write_text((BOOK * 20)[:size])
    text.main(["my data/x.txt", "-o", "my data/out", "--tokenizer", tokenizer])
    (create, *sizes), (train, *flags) = printed_commands(capsys.readouterr().out)
    assert (create, train) == ("data/create_model.py", "train_banded.py") and "-n" in flags
    monkeypatch.setattr(create_model, "default_data", lambda V, split: __file__)
    create_model.main(sizes)
    assert train_banded.main([*flags, "-n", "1", "-m", "1", "-c", "c.bin", "-g", "4"]) == 0
    out = capsys.readouterr().out
    assert "generating:" in out and "WARNING" not in out and "val loss" in out
    text.main(["my data/x.txt", "-o", "my data/out", "--tokenizer", tokenizer, "--force"])
    assert printed_commands(capsys.readouterr().out) == [["train_banded.py", *flags]]  # the model is there
    if size == 40:
        named = ["--tokenizer", "chars.bin"] if tokenizer == "chars.bin" else []
        assert generate.main(["-e", "c.bin", "-n", "5", *named]) == 0


def test_a_model_of_that_name_for_another_vocabulary_is_left_alone(capsys):
    Path("x.txt").write_text(BOOK)
    config = GPT2Config(maxT=16, V=100, L=1, NH=1, C=8, Vp=128)
    write_model("out_byte.bin", Model(config, gpt2_init(config, 1)))
    Path("out_byte_2.bin").write_text("no model")
    make("x.txt", "--tokenizer", "byte")
    assert printed_commands(capsys.readouterr().out)[0][-1] == "out_byte_3.bin"


def run_on_bytes(capsys, *flags) -> str:
    """stdout of a step of a model of 256 tokens on out/."""
    config = GPT2Config(maxT=16, V=256, L=1, NH=1, C=8, Vp=256)
    write_model("model.bin", Model(config, gpt2_init(config, 1)))
    words = ["-i", "out/train_000.bin", "-j", "out/val_000.bin", "-n", "1", "-b", "1", "-s", "0", "--device", "cpu"]
    assert train_banded.main(["-e", "model.bin", *words, *flags]) == 0
    return capsys.readouterr().out


def test_data_of_another_tokenizer_earn_a_warning(capsys):
    Path("x.txt").write_text(BOOK.encode("ascii", "ignore").decode())
    make("x.txt", "--tokenizer", "byte")
    mark = json.loads(Path("out", MARK).read_text())
    assert mark == {"name": "byte", "vocab_size": 256, "eot": 0, "sha256": byte_tokenizer().sha256}
    assert "made with the tokenizer" not in run_on_bytes(capsys)  # with and without a file of its own
    os.rename("byte_tokenizer.bin", "elsewhere.bin")
    assert "made with the tokenizer" not in run_on_bytes(capsys)
    os.rename("elsewhere.bin", "byte_tokenizer.bin")

    other = Tokenizer([*byte_tokenizer().tokens[1:], b"\0"], 255)
    other.write("other.bin")
    out = run_on_bytes(capsys, "--tokenizer", "other.bin")
    assert "WARNING: the data in out were made with the tokenizer byte, 256 tokens\n" in out
    assert "goes with another (other.bin, 256 tokens)" in out and out.count("were made with") == 1

    Path("out", MARK).write_text('{"name": "mine"}')
    with pytest.raises(UserError, match=r"tokenized_by\.json: expected name, vocab_size and sha256"):
        run_on_bytes(capsys)


def test_without_a_tokenizer_vocabularies_are_compared(capsys):
    CHARS.write("chars.bin")
    Path("x.txt").write_text(VERSE.replace("\n", "") * 50)
    with contextlib.suppress(UserError):
        make("x.txt", "--tokenizer", "chars.bin")
    assert "WARNING: the data in out were made with the tokenizer chars.bin" in run_on_bytes(capsys)


def test_the_digest_is_that_of_the_file():
    GPT2.write("gpt2.bin")
    assert hashlib.sha256(Path("gpt2.bin").read_bytes()).hexdigest() == GPT2.sha256 == Tokenizer.read("gpt2.bin").sha256


@pytest.mark.parametrize("value", ["0", "1", "-0.1", "x", "nan"])
def test_val_is_a_part(value):
    assert refused("x.txt", "--val", value).exit_code == 2


def test_a_vocabulary_too_large_for_uint16():
    Tokenizer([b"x"] * 70_000, 0).write("large.bin")
    Path("x.txt").write_text("x" * 100)
    assert (
        "70000 tokens, a token data file holds ids below 65536" in refused("x.txt", "--tokenizer", "large.bin").message
    )
