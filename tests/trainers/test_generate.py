"""generate.py: the same tokens with a cache and without, sampling, text that is always UTF-8, and bad input."""

import io
import itertools
import os
import pty
import re
import shlex
import signal
import subprocess
import time
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
from tiny import CONFIG, check_refused, done, snapshot

import generate
import train_banded
from llmc.checkpoint import BANDED, MATRICES, SPARSE_ATTENTION, Model, read_model, write_model
from llmc.sampler import Sampler
from llmc.tokenizer import Tokenizer, byte_tokenizer

SCRIPT = "generate.py"
MAXT, V = CONFIG.maxT, CONFIG.V
PROMPT = "The quality of mercy"


def sharpen(path):
    """Enlarge the matrices of a fresh model, so that its next token depends strongly on all the text before."""
    model = read_model(path)
    tensors = tiny.views(model)
    for name in tensors.keys() & set(MATRICES):
        tensors[name] *= 10 if name in ("wte", "wpe") else 20
    write_model(path, model)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tiny.make_folder(tmp_path / "run"))
    sharpen("model.bin")
    return tmp_path / "run"


@pytest.fixture
def write(folder, capfdbinary):
    """write("-n 5 -s 1") -> Result: generate.py on the tiny model, in this process."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def run(flags="", model="model.bin"):
        return tiny.call(capfdbinary, generate.main, "-e", model, "--device", "cpu", *shlex.split(flags))

    yield run
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def model(folder):
    """The tiny model; its `calls` are the (tokens, start) and its `logits` the results of every extend."""
    model, _ = generate.open_model("model.bin", "cpu")
    extend, model.calls, model.logits = model.extend, [], []

    def recorded(tokens, start):
        model.calls.append((tokens.tolist(), start))
        logits = extend(tokens, start)
        model.logits.append(logits.copy())
        return logits

    model.extend = recorded
    return model


def text(result):
    return re.fullmatch(r".*\nGenerating:\n(.*)\n---\n", result.out, re.S)[1]


def cut(tokens, positions):
    """What stderr says of a prompt that is too long."""
    counts = f"end-of-text and the prompt are {tokens} tokens, the model has positions for {positions}"
    return f"{counts}: it sees the last of them\n"


def chooser(seed=1, temperature=1.0, top_k=0, top_p=1.0):
    sampler = Sampler(seed)
    return lambda logits: generate.draw(logits, sampler, temperature, top_k, top_p)


def tokens_of(model, prompt, count, cache=True, **settings):
    return list(generate.generate(model, list(prompt), count, chooser(**settings), cache))


# ----------------------------------------------------------------------------------------------------------------------
# the cache


def test_extend_gives_the_logits_of_the_whole_forward(model):
    """One by one, in parts of any size, and all at once."""
    tokens = np.random.default_rng(1).integers(0, V, MAXT).astype(np.int32)
    model.B, model.T = 1, MAXT
    model.forward(tokens.reshape(1, -1))
    expected = model.acts.logits[:, :V].copy()
    assert np.abs(expected).max() > 1
    for parts in ([1] * MAXT, [MAXT], [5, 1, 1, 20, 5], [31, 1]):
        start = 0
        for n in parts:
            logits = model.extend(tokens[start : start + n], start)
            start += n
            assert np.allclose(logits, expected[start - 1], rtol=1e-4, atol=1e-4)


def test_an_early_token_changes_late_logits(model):
    """Without which the tests of the cache would show nothing."""
    tokens = np.arange(MAXT, dtype=np.int32)
    one = model.extend(tokens, 0).copy()
    tokens[0] += 1
    assert np.abs(model.extend(tokens, 0) - one).max() > 0.1


@pytest.mark.parametrize("prompt", [[0], list(PROMPT.encode()), list(range(3 * MAXT))], ids=["none", "short", "long"])
@pytest.mark.parametrize("seed", [1, 2, 1337])
def test_with_and_without_cache_the_same_tokens_far_past_max_seq_len(model, prompt, seed):
    settings = dict(count=4 * MAXT, seed=seed)
    cached = tokens_of(model, prompt, **settings)
    rows = sum(len(tokens) for tokens, _ in model.calls)
    model.calls.clear()
    assert tokens_of(model, prompt, cache=False, **settings) == cached
    assert len(cached) == 4 * MAXT and len(set(cached)) > 20
    assert sum(len(tokens) for tokens, _ in model.calls) > 8 * rows


def test_a_token_costs_one_row(model):
    """The prompt at once, then row after row; past max_seq_len the newer half is run again, once in maxT / 2 tokens."""
    tokens = [0, *b"mercy"]
    new = tokens_of(model, tokens, 3 * MAXT)
    assert model.calls[0] == (tokens, 0)
    assert model.calls[1 : MAXT - 5] == [([new[i]], 6 + i) for i in range(MAXT - 6)]
    whole = tokens + new
    rerun = [(i, call) for i, call in enumerate(model.calls) if call[1] == 0 and i > 0]
    assert [i for i, _ in rerun] == [MAXT - 5 + i * (MAXT // 2 + 1) for i in range(len(rerun))] and len(rerun) > 3
    for i, (seen, _) in rerun:
        assert seen == whole[len(tokens) + i - MAXT // 2 : len(tokens) + i]
    assert all(len(seen) == 1 or start == 0 for seen, start in model.calls)


def test_a_long_prompt_is_seen_from_its_end(model):
    prompt = list(range(100))
    tokens_of(model, prompt, 2)
    assert model.calls[0] == (prompt[-MAXT:], 0)
    assert len(model.calls[1][0]) == MAXT // 2


def test_a_model_of_one_position(folder, write):
    tiny.make_folder(folder / "one", tiny.resized(maxT=1))
    result = write("-n 9 -s 1 -p ab --temperature 0 --ignore-eot 1", model="one/model.bin")
    assert (result.code, result.err) == (0, cut(3, 1)) and len(text(result).encode()) >= 11


# ----------------------------------------------------------------------------------------------------------------------
# sampling


def test_temperature_0_takes_the_likeliest(model):
    tokens = tokens_of(model, [0], 40, temperature=0)
    assert tokens == [int(logits.argmax()) for logits in model.logits]
    for settings in (dict(top_k=1), dict(top_p=0.0), dict(temperature=1e-9), dict(temperature=0, top_k=5, seed=9)):
        assert tokens_of(model, [0], 40, **settings) == tokens


def test_top_k_and_top_p_draw_among_the_likeliest(model):
    def ranks(**settings):
        model.logits.clear()
        tokens = tokens_of(model, [0], 60, **settings)
        return [int((logits > logits[token]).sum()) for token, logits in zip(tokens, model.logits, strict=True)]

    assert max(ranks()) > 8 >= 4 >= max(ranks(top_k=5)) > 1
    assert tokens_of(model, [0], 60, top_k=V) == tokens_of(model, [0], 60) == tokens_of(model, [0], 60, top_k=10**6)
    for token_rank, logits in zip(ranks(top_p=0.6), model.logits, strict=True):
        likelihood = np.exp(logits - logits.max(), dtype=np.float64)
        ranked = np.sort(likelihood / likelihood.sum())[::-1]
        assert ranked[:token_rank].sum() < 0.6  # without it, the nucleus would be too small


def test_draw_follows_the_probabilities():
    """Logits of p = 1/2, 1/3, 1/6; at temperature 1/2 p^2 counts: 9/14, 4/14, 1/14."""
    logits = np.log(np.array([3, 2, 1], np.float32) / 6)

    def drawn(coin, **settings):
        sampler = SimpleNamespace(random_f64=lambda: coin)
        return generate.draw(logits, sampler, **(dict(temperature=1.0, top_k=0, top_p=1.0) | settings))

    assert [drawn(coin) for coin in (0, 0.499, 0.501, 0.833, 0.834, 1.0)] == [0, 0, 1, 1, 2, 2]
    assert [drawn(coin, temperature=0.5) for coin in (0.642, 0.643, 0.928, 0.929)] == [0, 1, 1, 2]
    assert [drawn(coin, top_k=2) for coin in (0.599, 0.601, 1.0)] == [0, 1, 1]
    assert [drawn(coin, top_p=0.7) for coin in (0.599, 0.601, 1.0)] == [0, 1, 1]
    assert [drawn(coin, top_p=0.4) for coin in (0, 1.0)] == [0, 0]


def test_a_seed_gives_one_text(write):
    one, other = text(done(write("-n 50 -s 7"))), text(done(write("-n 50 -s 8")))
    assert text(done(write("-n 50 -s 7"))) == one != other
    assert text(done(write("-n 50 -s 7 --cache 0"))) == one


def test_seed_0_is_the_clock_and_is_printed(write):
    by_clock = done(write("-n 50"))
    seed = re.search(r"^Seed: (\d+)$", by_clock.out, re.M)[1]
    assert int(seed) > 10**18
    assert text(done(write(f"-n 50 -s {seed}"))) == text(by_clock)


# ----------------------------------------------------------------------------------------------------------------------
# text


def test_what_is_printed(write):
    result = done(write(f"-n 5 -s 3 -p '{PROMPT}' --temperature 0"))
    head = "=== GPT-2 Inference ===\nModel: model.bin\nTokens: 5\nSeed: 3\n---\nModel loaded: 12224 parameters\n"
    assert result.out.startswith(head + f"Vocab: 256, MaxSeq: 32, Channels: 16\n---\nGenerating:\n{PROMPT}")
    assert result.out.endswith("\n---\n")


def test_the_prompt_counts(write, model):
    """The model sees end-of-text and the prompt's bytes; what follows is their likeliest continuation."""
    continuation = bytes(tokens_of(model, [0, *PROMPT.encode()], 8, temperature=0))
    shown = text(done(write(f"-n 8 -p '{PROMPT}' --temperature 0")))
    assert shown == PROMPT + continuation.decode(errors="replace")
    assert bytes(tokens_of(model, [0], 8, temperature=0)) != continuation


@pytest.mark.parametrize(
    "prompt", ["-x", "-n", "--seed", "a=b", "--prompt=x", " ", "100%", "\\n", "naïve €😀", "a@b", "x" * 31]
)
def test_any_prompt_is_printed_as_it_is(write, prompt):
    assert text(done(write(f"-n 2 -s 1 -p {shlex.quote(prompt)}"))).startswith(prompt)


def test_a_prompt_that_is_cut_is_told(write, model):
    """The prompt is printed whole, and its end is what text goes on from."""
    result = write(f"-n 8 -p '{'x' * 500}{PROMPT}' --temperature 0")
    assert (result.code, result.err) == (0, cut(501 + len(PROMPT), MAXT))
    seen = [*b"x" * 500, *PROMPT.encode()][-MAXT:]
    continuation = bytes(tokens_of(model, seen, 8, temperature=0))
    assert text(result) == "x" * 500 + PROMPT + continuation.decode(errors="replace")
    assert write(f"-n 1 -p '{'x' * MAXT}'").err == cut(MAXT + 1, MAXT)
    done(write(f"-n 1 -p '{'x' * (MAXT - 1)}'"))


@pytest.mark.parametrize(
    "data, prompt",
    [(b"", ""), (b"one\n", "one"), (b"one\n\n", "one\n"), (b"two\r\nlines", "two\r\nlines"), ("€😀".encode(), "€😀")],
)
def test_a_prompt_from_a_file_or_standard_input(folder, write, monkeypatch, data, prompt):
    (folder / "my prompt.txt").write_bytes(data)
    expected = text(done(write(f"-n 9 -s 2 -p {shlex.quote(prompt)}")))
    assert expected.startswith(prompt)
    assert text(done(write("-n 9 -s 2 -p '@my prompt.txt'"))) == expected
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert text(done(write("-n 9 -s 2 -p -"))) == expected


def test_standard_input_that_was_closed_is_empty(write, monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    assert text(done(write("-n 9 -s 2 -p -"))) == text(done(write("-n 9 -s 2")))
    monkeypatch.setattr("sys.stdin", None)
    assert all_texts(write("-n 9 -i 1")) == {}


def test_prompts_that_are_no_text(folder, write, monkeypatch):
    (folder / "latin1.txt").write_bytes("naïve".encode("latin1"))
    check_refused(write("-p @latin1.txt"), "-p @latin1.txt: byte 2 is 0xef, which is not UTF-8")
    check_refused(write("-p @none.txt"), "reading none.txt: No such file")
    check_refused(write("-p @"), "reading : No such file")
    check_refused(write("-p @."), "reading .: Is a directory")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"ab\xff")))
    check_refused(write("-p -"), "-p -: byte 2 is 0xff")


def test_a_prompt_is_encoded_by_byte_pairs(folder, write, monkeypatch):
    tokens = [*byte_tokenizer().tokens, b"<|endoftext|>", b"he", b"ll", b"llo", b"hello"]
    tiny.make_folder(folder / "bpe", tiny.resized(V=len(tokens)))
    Tokenizer(tokens, 256).write("bpe/tokenizer.bin")
    seen = []
    extend = train_banded.GPT2.extend
    monkeypatch.setattr(
        train_banded.GPT2, "extend", lambda self, new, start: (seen.append(new.tolist()), extend(self, new, start))[1]
    )
    done(write("-n 2 -s 1 -p 'hello hell'", model="bpe/model.bin"))
    assert seen[0] == [256, 260, 32, 257, 258]
    done(write("-n 2 -s 1 -p '<|endoftext|>'", model="bpe/model.bin"))
    assert seen[2] == [256, *b"<|endoftext|>"]  # text never becomes the end of text


class Stdout:
    """Standard output that keeps what every write brought."""

    def __init__(self):
        self.buffer = self
        self.pieces = []

    def write(self, piece):
        self.pieces.append(bytes(piece))

    def flush(self):
        pass


def test_characters_are_printed_whole(monkeypatch):
    """Tokens that split characters, tokens that are no characters, and an end within one."""
    monkeypatch.setattr("sys.stdout", out := Stdout())
    wanted = "né€😀"
    generate.print_text(iter([*wanted.encode(), 0xFF, ord("a"), 0xC3, ord("b"), *"😀".encode()[:2]]), byte_tokenizer())
    assert b"".join(out.pieces).decode() == wanted + "\ufffda\ufffdb\ufffd"
    for piece in out.pieces:
        piece.decode()  # every single write is valid UTF-8
    assert [piece.decode() for piece in out.pieces if piece][:4] == list(wanted)


def printed(monkeypatch, text, stop):
    """What print_text prints of a text that comes byte by byte, and the same after each of them."""
    monkeypatch.setattr("sys.stdout", out := Stdout())
    generate.print_text(iter(text.encode()), byte_tokenizer(), stop)
    return b"".join(out.pieces).decode(), list(itertools.accumulate(piece.decode() for piece in out.pieces))


def test_a_text_ends_before_the_stop_word(monkeypatch):
    """What begins like the word waits until it is clear that it is not the word; a text that ends there has it."""
    assert printed(monkeypatch, "one. two", ". ")[0] == "one"
    assert printed(monkeypatch, "aaab", "aab")[0] == "a"
    assert printed(monkeypatch, "n€w €", "€")[0] == "n"
    assert printed(monkeypatch, "one two", "three")[0] == printed(monkeypatch, "one two", "")[0] == "one two"
    assert printed(monkeypatch, "one two thr", "three")[0] == "one two thr"
    whole, growing = printed(monkeypatch, "the th thrown", "three")
    assert whole == "the th thrown"
    assert growing[:7] == ["", "", "the", "the ", "the ", "the ", "the th "]


def test_a_text_ends_at_end_of_text(write):
    """NUL with bytes; before, it was printed, and the text went on."""
    flags = "-n 400 -s 4 --temperature 3 -p mercy"
    on = text(done(write(f"{flags} --ignore-eot 1")))
    assert len(on.encode()) > 405 and 20 < on.index("\0") < 400
    assert text(done(write(flags))) == on.partition("\0")[0]
    word = on[30:33]
    assert on.index(word) < on.index("\0") and text(done(write(f"{flags} --stop '{word}'"))) == on.partition(word)[0]


def test_the_prompt_may_have_the_stop_word(write):
    on = text(done(write("-n 20 -s 1 -p mercy --stop mercy")))
    assert on == text(done(write("-n 20 -s 1 -p mercy"))) and len(on) > 6


def test_random_bytes_become_valid_utf_8(write):
    shown = text(done(write("-n 200 -s 5 --temperature 3")))  # decoded strictly
    assert "\ufffd" in shown and len(shown) > 100


def test_text_comes_token_by_token(folder):
    os.rename("model.bin", "checkpoint.bin")  # the default name
    process = tiny.start(SCRIPT, ["-n", 10**7, "-s", 1, "--ignore-eot", 1], folder)
    out = b""
    while len(out) < 2000:  # of ten million tokens
        piece = os.read(process.stdout.fileno(), 1000)
        assert piece, process.communicate()
        out += piece
    process.send_signal(signal.SIGINT)
    rest, err = process.communicate(timeout=tiny.TIMEOUT)
    assert (process.returncode, err) == (130, b"\ninterrupted\n")
    (out + rest).decode()


def test_without_a_tokenizer_token_ids_are_printed(write, model):
    os.unlink("byte_tokenizer.bin")
    result = done(write("-n 6 -s 1"))
    assert "WARNING: no tokenizer file for a vocabulary of 256 beside model.bin" in result.out
    assert list(map(int, text(result).split())) == tokens_of(model, [V - 1], 6)
    for flags in ("-p hello", "-i 1", "--stop x"):
        check_refused(write(f"-n 6 {flags}"), f"{flags[: flags.index(' ')]}: no tokenizer", "model.bin", "--tokenizer")


def test_a_tokenizer_beside_the_model_or_by_name(folder, write):
    one = text(done(write("-n 30 -s 1")))
    os.mkdir("elsewhere")
    for name in ("model.bin", "byte_tokenizer.bin"):
        os.rename(name, f"elsewhere/{name}")
    assert text(done(write("-n 30 -s 1", model="elsewhere/model.bin"))) == one
    os.rename("elsewhere/byte_tokenizer.bin", "any name.bin")
    assert text(done(write("-n 30 -s 1 --tokenizer 'any name.bin'", model="elsewhere/model.bin"))) == one


# ----------------------------------------------------------------------------------------------------------------------
# several texts


def all_texts(result):
    """{seed, None for the first: text} as printed."""
    found = re.findall(r"^Generating(?:, seed (\d+))?:\n(.*?)\n---\n", done(result).out, re.M | re.S)
    return {int(seed) if seed else None: shown for seed, shown in found}


def test_each_sample_has_a_seed_of_its_own(write):
    three = all_texts(write("-n 40 -s 7 -p 'The ' --samples 3"))
    assert len(three) == len(set(three.values())) == 3
    assert [*all_texts(write("-n 40 -s 7 -p 'The ' --samples 2")).items()] == [*three.items()][:2]
    assert text(done(write("-n 40 -s 7 -p 'The '"))) == three.pop(None)
    for seed, shown in three.items():
        assert text(done(write(f"-n 40 -s {seed} -p 'The '"))) == shown
    assert not three.keys() & all_texts(write("-n 40 -s 8 -p 'The ' --samples 3")).keys()


def test_prompts_of_a_loop(write, monkeypatch):
    """A line each, and of each as many texts as asked for; the first is that of -p."""

    def loop(lines, flags=""):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines)))
        return all_texts(write(f"-n 30 -s 1 -i 1 {flags}"))

    assert loop(b"") == {}
    two = loop("The quality\n€ of".encode())  # the last line may lack its end
    assert next(iter(two.values())) == text(done(write("-n 30 -s 1 -p 'The quality'")))
    (_, seed), other = [*two.keys()], [*two.values()][1]
    assert other.startswith("€ of") and other == text(done(write(f"-n 30 -s {seed} -p '€ of'")))
    four = loop(b"The quality\n\n", "--samples 2")
    assert next(iter(four.values())) == next(iter(two.values())) and [*four.keys()][1] == seed
    assert [shown.startswith("The quality") for shown in four.values()] == [True, True, False, False]


def test_a_bad_prompt_does_not_end_the_loop(folder, write, monkeypatch):
    """A tokenizer of letters lacks other characters."""
    Tokenizer([bytes([byte]) for byte in b"\nabcdefghijklmnopqrstuvwxyz "], 0).write("tokenizer.bin")
    tiny.make_folder(folder / "letters", tiny.resized(V=28))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"one\nTWO\nthree\n")))
    result = write("-n 5 -s 1 -i 1", model="letters/model.bin")
    assert result.code == 0 and result.err.count("error: ") == result.err.count("---> HINT: ") == 1
    assert "tokenizer.bin: the text has the byte 0x4f" in result.err
    assert re.findall(r"^Generating.*\n(one|three)", result.out, re.M) == ["one", "three"]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"one\n\xff\n"), encoding="utf-8"))
    check_refused(write("-n 5 -i 1", model="letters/model.bin"), "-i: a prompt is no text")
    check_refused(write("-i 1 -p one"), "-i 1 with -p one", code=2)


def read_until(stream: int, ending: bytes) -> bytes:
    out = b""
    while not out.endswith(ending):
        piece = os.read(stream, 1)
        assert piece, out
        out += piece
    return out


LONG = ["-e", "model.bin", "-n", 10**7, "-s", 1, "-i", 1, "--ignore-eot", 1, "--device", "cpu"]
ENDING = b"ending this text; press Ctrl-C again to stop at once\n"


def test_ctrl_c_ends_a_text_and_the_loop_goes_on(folder):
    process = tiny.start(SCRIPT, LONG, folder, stdin=subprocess.PIPE)
    for prompt, heading in ((b"one", b"Generating:\none"), (b"two", b":\ntwo")):
        process.stdin.write(prompt + b"\n")
        process.stdin.flush()
        read_until(process.stdout.fileno(), heading)
        process.send_signal(signal.SIGINT)
        read_until(process.stdout.fileno(), b"\n---\n")
    out, err = process.communicate(timeout=tiny.TIMEOUT)  # the end of its input
    assert (process.returncode, out, err) == (0, b"", 2 * ENDING)


@pytest.mark.parametrize("number, code, said", [(signal.SIGTERM, 143, b"stop at once\n"), (signal.SIGINT, 130, b"")])
def test_what_ends_the_loop(folder, number, code, said):
    """SIGTERM in a text, Ctrl-C between two."""
    process = tiny.start(SCRIPT, LONG, folder, stdin=subprocess.PIPE)
    process.stdin.write(b"one\n")
    process.stdin.flush()
    read_until(process.stdout.fileno(), b"Generating:\none")
    if number == signal.SIGINT:
        process.send_signal(signal.SIGINT)
        read_until(process.stdout.fileno(), b"\n---\n")
        time.sleep(0.2)  # it waits for a prompt by now
    process.send_signal(number)
    err = process.communicate(timeout=tiny.TIMEOUT)[1]
    assert process.returncode == code
    assert err.endswith(said or b"\ninterrupted\n")


def test_the_loop_on_a_terminal(folder):
    """It shows a mark where it waits for a prompt, and Ctrl-D ends it."""
    ours, theirs = pty.openpty()
    process = tiny.start(SCRIPT, ["-e", "model.bin", "-n", 3, "-s", 1, "-i", 1], folder, stdin=theirs, stdout=theirs)
    os.close(theirs)
    read_until(ours, b"---\r\n> ")
    os.write(ours, b"mercy\n")
    assert b"Generating:\r\nmercy" in read_until(ours, b"---\r\n> ")
    os.write(ours, b"\4")
    assert process.wait(tiny.TIMEOUT) == 0
    os.close(ours)


# ----------------------------------------------------------------------------------------------------------------------
# how long it took


def test_stats_count_the_tokens_that_were_run(write):
    line = r"prefill: (\d+) tokens in (\d+\.\d{3}) ms, (\d+\.\d) tok/s; decode: (\d+) tokens, (\d+\.\d) tok/s\n"
    plain, timed = (done(write(f"-n 9 -s 3 -p mercy --stats {on}")).out for on in (0, 1))
    assert "tok/s" not in plain and timed.startswith(plain)
    prompt, ms, rate, after, decode = re.fullmatch(line, timed.removeprefix(plain)).groups()
    assert (prompt, after) == ("6", "8") and float(decode) > 0
    assert float(rate) == pytest.approx(6000 / float(ms), rel=0.01)
    assert re.search(line, write(f"-n 1 -p '{'x' * 99}' --stats 1").out)[1] == str(MAXT)
    assert len(re.findall(line, write("-n 4 --stats 1 --samples 3").out)) == 3


def test_times_apart(monkeypatch):
    clock = iter([10.0, 12.0, 13.0, 15.5])  # the beginning, then each token
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    timed = generate.Timed([7, 8, 9])
    assert [*timed] == [7, 8, 9]
    assert (timed.count, timed.prefill, timed.decode) == (3, 2.0, 3.5)
    assert timed.described(4) == "prefill: 4 tokens in 2000.000 ms, 2.0 tok/s; decode: 2 tokens, 0.6 tok/s"


# ----------------------------------------------------------------------------------------------------------------------
# kinds of files, and what is refused


def test_banded_and_bfloat16_files(write):
    model = read_model("model.bin")
    dense = done(write("-n 30 -s 1"))
    write_model("banded.bin", Model(CONFIG, model.params, kind=BANDED, fields=(8, 16)))
    banded = done(write("-n 30 -s 1", model="banded.bin"))
    banner = "=== GPT-2 Inference (Banded Sparsity Checkpoint) ===\nModel: banded.bin\n"
    assert banded.out.startswith(banner) and "\nFC1 bandwidth: 8, FC2 bandwidth: 16 (0 is dense)\n" in banded.out
    assert text(banded) == text(dense)  # the weights are as the file has them
    write_model("bf16.bin", Model(CONFIG, model.params, version=5))
    rounded = read_model("bf16.bin").params
    write_model("rounded.bin", Model(CONFIG, rounded))
    assert text(done(write("-n 30 -s 1", model="bf16.bin"))) == text(done(write("-n 30 -s 1", model="rounded.bin")))
    assert np.abs(rounded - model.params).max() > 0


@pytest.mark.parametrize(
    "flags, words",
    [
        ("-n 0", ["-n/--tokens", "'0'"]),
        ("-n ten", ["-n/--tokens", "'ten'"]),
        ("-n", ["-n: its value is missing"]),
        ("-s -1", ["-s/--seed", "'-1'"]),
        (f"-s {2**64}", ["-s/--seed", str(2**64)]),
        ("--top-p 1.01", ["--top-p", "'1.01'"]),
        ("--top-k -1", ["--top-k", "'-1'"]),
        ("--temperature nan", ["--temperature", "'nan'"]),
        ("--cache 2", ["--cache", "'2'"]),
        ("--samples 0", ["--samples", "'0'"]),
        ("--ignore-eot yes", ["--ignore-eot", "'yes'"]),
        ("--stats 2", ["--stats", "'2'"]),
        ("-i 2", ["-i/--interactive", "'2'"]),
        ("-p --", ["-p: -- is no value"]),
        ("--prompt=--", ["--prompt: -- is no value"]),
        ("-t 1", ["-t: unknown flag"]),
        ("--top-q 1", ["--top-q: unknown flag", "--top-"]),
        ("hello", ["hello: expected a flag"]),
    ],
)
def test_wrong_usage_exits_2(write, flags, words):
    check_refused(write(flags), *words, code=2)


def test_bad_files_are_named(folder, write):
    model = read_model("model.bin")
    write_model("sparse.bin", Model(CONFIG, model.params, kind=SPARSE_ATTENTION))
    model.params[np.random.default_rng(1).integers(0, model.params.size, 3000)] = np.nan
    write_model("nan.bin", model)
    tiny.make_folder(folder / "other", tiny.resized(V=200))
    (folder / "other" / "byte_tokenizer.bin").rename(folder / "other" / "tokenizer.bin")
    with open("short.bin", "wb") as file:
        file.write((folder / "model.bin").read_bytes()[:-4])
    before = snapshot(folder)
    check_refused(write(model="none.bin"), "reading none.bin: No such file")
    check_refused(write(model="."), "reading .: Is a directory")
    check_refused(write(model="train_00.bin"), "train_00.bin: not a model file")
    check_refused(write(model="short.bin"), "short.bin: model file is truncated")
    check_refused(write(model="sparse.bin"), "sparse.bin: layout")
    check_refused(write(model="nan.bin"), "nan.bin: its logits are not finite")
    check_refused(write(model="other/model.bin"), "tokenizer.bin: 256 tokens", "a vocabulary of 200")
    check_refused(write("--tokenizer none.bin"), "reading none.bin")
    check_refused(write("--tokenizer model.bin"), "model.bin: not a tokenizer file")
    check_refused(write("-p \udcff"), "no valid Unicode")
    assert snapshot(folder) == before


def test_cuda_on_a_machine_without(write, monkeypatch):
    monkeypatch.setattr("kernels.driver.LIBRARY", "no such library")
    hints = ('pip install "cupy-cuda12x[ctk]"', "--device cpu")
    check_refused(write("-n 3 --device cuda"), "--device cuda: no NVIDIA driver", *hints)


def test_a_reader_that_stops_reading(folder):
    words = shlex.join(tiny.command(SCRIPT, "-e", "model.bin", "-n", 10**7, "--ignore-eot", 1))
    result = subprocess.run(
        ["bash", "-c", words + " | head -c 600; exit ${PIPESTATUS[0]}"],
        cwd=folder,
        env=tiny.one_thread(),
        capture_output=True,
        timeout=tiny.TIMEOUT,
    )
    assert (result.returncode, result.stderr, len(result.stdout)) == (141, b"", 600)
