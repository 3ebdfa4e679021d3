"""generate.py: the same tokens with a cache and without, sampling, text that is always UTF-8, and bad input."""

import os
import re
import shlex
import signal
import subprocess
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
    assert len(text(done(write("-n 9 -s 1 -p ab --temperature 0", model="one/model.bin"))).encode()) >= 11


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
    "prompt", ["-", "-n", "--seed", "a=b", "--prompt=x", " ", "100%", "\\n", "naïve €😀", "x" * 500]
)
def test_any_prompt_is_printed_as_it_is(write, prompt):
    assert text(done(write(f"-n 2 -s 1 -p {shlex.quote(prompt)}"))).startswith(prompt)


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


def test_random_bytes_become_valid_utf_8(write):
    shown = text(done(write("-n 200 -s 5 --temperature 3")))  # decoded strictly
    assert "\ufffd" in shown and len(shown) > 100


def test_text_comes_token_by_token(folder):
    os.rename("model.bin", "checkpoint.bin")  # the default name
    process = tiny.start(SCRIPT, ["-n", 10**7, "-s", 1], folder)
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
    check_refused(write("-n 6 -p hello"), "-p", "model.bin", "--tokenizer")


def test_a_tokenizer_beside_the_model_or_by_name(folder, write):
    one = text(done(write("-n 30 -s 1")))
    os.mkdir("elsewhere")
    for name in ("model.bin", "byte_tokenizer.bin"):
        os.rename(name, f"elsewhere/{name}")
    assert text(done(write("-n 30 -s 1", model="elsewhere/model.bin"))) == one
    os.rename("elsewhere/byte_tokenizer.bin", "any name.bin")
    assert text(done(write("-n 30 -s 1 --tokenizer 'any name.bin'", model="elsewhere/model.bin"))) == one


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
    words = shlex.join(tiny.command(SCRIPT, "-e", "model.bin", "-n", 10**7))
    result = subprocess.run(
        ["bash", "-c", words + " | head -c 600; exit ${PIPESTATUS[0]}"],
        cwd=folder,
        env=tiny.one_thread(),
        capture_output=True,
        timeout=tiny.TIMEOUT,
    )
    assert (result.returncode, result.stderr, len(result.stdout)) == (141, b"", 600)
