"""evaluate.py, and --hellaswag 1 in a run: figures of a model that is written out here once more, in plain NumPy."""

import re
import shlex
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import tiny
from tiny import CONFIG, DEEPSEEK, check_refused, done, losses, snapshot, val_losses

import evaluate
import train_banded
import train_sparse_attn
import train_toroidal
from kernels import cpu
from llmc import loop, options
from llmc.checkpoint import MATRICES, Model, read_model, write_model
from llmc.dataloader import write_tokens
from llmc.evalloader import Example, write_examples
from llmc.init import gpt2_init

V, MAXT = CONFIG.V, CONFIG.maxT
TRAINERS = {"banded": train_banded, "sparse": train_sparse_attn, "toroidal": train_toroidal}
RESULT = r"val loss (\S+)\nperplexity (\S+)\ntokens: (\d+) scored in (\d+) windows of (\d+), (\d+) apart\n"


@pytest.fixture
def measure(folder, capfdbinary):
    """measure("-j val.bin", "c.bin") -> Result: evaluate.py, in this process."""

    def run(flags="-j val.bin", model="model.bin"):
        return tiny.call(capfdbinary, evaluate.main, "-e", model, "--device", "cpu", *shlex.split(flags))

    return run


@pytest.fixture
def train(folder, capfdbinary):
    """train("banded", "-n 3", seq_len=8) -> Result: a trainer on the tiny files, in this process."""
    return lambda trainer, flags="", **changed: tiny.call(
        capfdbinary, TRAINERS[trainer].main, *tiny.options(**changed), *shlex.split(flags)
    )


def sharpen(path="model.bin"):
    """Enlarge the matrices, so that a token depends on all before it, and answers differ by more than rounding."""
    model = read_model(path)
    for name, tensor in tiny.views(model).items():
        if name in MATRICES:
            tensor *= 10 if name in ("wte", "wpe", "headw") else 15
    write_model(path, model)


def figures(result):
    """(loss, perplexity, tokens, windows, T, stride) as printed."""
    found = re.search(RESULT, done(result).out)
    return tuple(float(value) for value in found.groups()[:2]) + tuple(int(value) for value in found.groups()[2:])


# ----------------------------------------------------------------------------------------------------------------------
# the model once more


class PlainGPT2:
    """GPT-2 of a file in float64, a token's loss at a time."""

    def __init__(self, path):
        file = read_model(path)
        self.p = {name: tensor.astype(np.float64) for name, tensor in tiny.views(file).items()}
        self.config = file.config
        self.loss = lru_cache(None)(self.loss)

    def norm(self, x, w, b):
        centred = x - x.mean(1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(1, keepdims=True) + 1e-5) * w + b

    def logits(self, context):
        """(V) of the token that follows `context`."""
        p, c, T = self.p, self.config, len(context)
        hs, future = c.C // c.NH, np.triu(np.ones((T, T), bool), 1)
        x = p["wte"][list(context)] + p["wpe"][:T]
        for l in range(c.L):
            qkv = self.norm(x, p["ln1w"][l], p["ln1b"][l]) @ p["qkvw"][l].T + p["qkvb"][l]
            heads = []
            for h in range(c.NH):
                q, k, v = (qkv[:, part * c.C + h * hs :][:, :hs] for part in range(3))
                scores = np.where(future, -np.inf, q @ k.T / np.sqrt(hs))
                weights = np.exp(scores - scores.max(1, keepdims=True))
                heads.append(weights / weights.sum(1, keepdims=True) @ v)
            x = x + np.hstack(heads) @ p["attprojw"][l].T + p["attprojb"][l]
            h = self.norm(x, p["ln2w"][l], p["ln2b"][l]) @ p["fcw"][l].T + p["fcb"][l]
            h = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
            x = x + h @ p["fcprojw"][l].T + p["fcprojb"][l]
        return (self.norm(x, p["lnfw"], p["lnfb"]) @ p["wte"][: c.V].T)[-1]

    def loss(self, context, token):
        """-log p(token | context), both of ints."""
        logits = self.logits(context)
        return float(np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[token])


# ----------------------------------------------------------------------------------------------------------------------
# perplexity


def by_hand(model: PlainGPT2, tokens: list[int], T: int, S: int) -> float:
    """The mean loss of tokens 1 and on. Token i is the first T tokens' if i <= T, else scored in the first window that
    reaches it, the k-th: k S + T >= i."""
    total = 0.0
    for i in range(1, len(tokens)):
        start = S * -(-max(0, i - T) // S)
        total += model.loss(tuple(tokens[start:i]), tokens[i])
    return total / (len(tokens) - 1)


@pytest.mark.parametrize("T, stride", [(8, 8), (8, 3), (8, 1), (32, 32), (32, 30), (16, 5)])
def test_the_loss_is_that_of_each_token_in_its_window(measure, T, stride):
    sharpen()
    tokens = np.random.default_rng(3).integers(0, V, 45).astype(np.uint16)
    write_tokens("some.bin", tokens)
    expected = by_hand(PlainGPT2("model.bin"), tokens.tolist(), T, stride)
    loss, perplexity, count, windows, *sizes = figures(measure(f"-j some.bin -t {T} --stride {stride}"))
    assert (count, sizes) == (44, [T, stride]) and windows == 1 + max(0, -(-(44 - T) // stride))
    assert loss == pytest.approx(expected, abs=2e-5) and expected > np.log(V) + 0.2
    assert perplexity == pytest.approx(np.exp(expected), rel=1e-4)
    assert figures(measure(f"-j some.bin -t {T} --stride {stride} -b 1"))[0] == pytest.approx(loss, abs=2e-6)


def test_strides_differ_in_what_a_token_sees(measure):
    """Without which the test above would show little."""
    sharpen()
    assert len({round(figures(measure(f"-j val.bin -t 8 --stride {S}"))[0], 3) for S in (1, 3, 8)}) == 3


@pytest.mark.parametrize("n", [2, 3, 8, 9, 10, 16, 17, 18])
def test_every_token_but_the_first_is_scored_once(n, tmp_path):
    path = tmp_path / "n.bin"
    write_tokens(path, np.arange(n, dtype=np.uint16))
    for T in (1, 4, 8):
        for stride in range(1, T + 1):
            rows = [*evaluate.windows([path], T, stride, 100)]
            assert len(rows) == evaluate.num_windows(n, T, stride)
            scored = [token for tokens, first in rows for token in tokens[first + 1 :].tolist()]
            assert scored == [*range(1, n)]
            assert all(2 <= len(tokens) <= T + 1 for tokens, _ in rows)


def test_shards_are_texts_of_their_own(measure):
    """Their losses, weighted by their tokens; nothing of one is seen in another."""
    each = [figures(measure(f"-j train_0{i}.bin -t 8")) for i in (0, 1)]
    both = figures(measure("-j 'train_*.bin' -t 8"))
    count = sum(shard[2] for shard in each)
    assert both[2:4] == (count, sum(shard[3] for shard in each))
    assert both[0] == pytest.approx(sum(shard[0] * shard[2] for shard in each) / count, abs=2e-6)


def test_some_batches_alone(measure, folder):
    write_tokens("first.bin", np.fromfile("val.bin", "<u2", offset=1024)[: 2 * 2 * 8 + 1])
    assert figures(measure("-t 8 -b 2 -m 2 -j val.bin")) == figures(measure("-t 8 -b 2 -j first.bin"))
    assert figures(measure("-t 8 -b 2 -m 99 -j val.bin")) == figures(measure("-t 8 -b 2 -j val.bin"))


SMALL = "--indexer-heads 2 --indexer-dim 4"
LEAKS = "WARNING: trained with --{}"
RUNS = {  # of a trainer: its flags, the model's sizes, and what evaluate.py warns of
    "dense": ("banded", "-d 1", CONFIG, None),
    "banded": ("banded", "-1 8 -2 16", CONFIG, None),
    "top-k": ("sparse", f"{SMALL} --top-k 3", CONFIG, None),
    "prefix": ("sparse", f"{SMALL} --adaptive prefix --keep-ratio 0.75", CONFIG, None),
    "random": ("sparse", "--selector random --top-k 3", CONFIG, None),
    "upstream": ("sparse", f"{SMALL} --adaptive upstream", CONFIG, "adaptive upstream"),
    "leak": ("sparse", f"{SMALL} --top-k 5 --legacy-leak 1", CONFIG, "legacy-leak"),
    "mla and moe": ("sparse", f"{SMALL} --top-k 3", DEEPSEEK, None),
    "mla, dense": ("sparse", "--attention dense", replace(DEEPSEEK, F=0, E=0, top=0), None),
    "toroidal": ("toroidal", "--layers 0 --depth 2 --train all", CONFIG, None),
    "toroidal upstream": ("toroidal", "--layers 0 --depth 2 --mode upstream", CONFIG, "mode upstream"),
}


@pytest.mark.parametrize("kind", RUNS)
def test_it_is_the_loss_that_the_trainer_validated(train, measure, kind):
    """The last one of a run, of each batch once, on data that fills its batches: here every token but the first."""
    trainer, flags, config, warning = RUNS[kind]
    write_model("model.bin", Model(config, gpt2_init(config, 1)))
    sharpen()
    out = done(train(trainer, f"{flags} -n 2 -m 0 -s 0 -c c.bin -l 1e-2")).out
    before, after = val_losses(out)
    result = measure(f"-j val.bin -b {tiny.B} -t {tiny.T}", "c.bin")
    loss, perplexity, count, *_ = figures(result)
    assert loss == pytest.approx(after, abs=2e-6) and abs(before - after) > 1e-3 and count == 48
    assert perplexity == pytest.approx(np.exp(after), rel=1e-5)
    assert re.findall(r"^(WARNING: .*):", result.out, re.M) == ([LEAKS.format(warning)] if warning else [])
    assert measure(f"-j val.bin -b {tiny.B} -t {tiny.T}", "c.bin").out == result.out


def test_what_is_printed(measure, monkeypatch, folder):
    result = measure("-j val.bin -t 8")
    head = f"=== GPT-2 Evaluation ===\nModel: model.bin\nData: val.bin\nDevice: {cpu.describe()}\n---\n"
    assert done(result).out.startswith(head + "allocated 0 MiB for activations\nval loss ")
    monkeypatch.setattr(evaluate, "default_data", lambda V, split: f"{split}.bin" if V == 256 else None)
    assert figures(measure(""))[2:] == (48, 2, 32, 32)  # the model's positions


# ----------------------------------------------------------------------------------------------------------------------
# questions


def questions(count=9, seed=5) -> list[Example]:
    rng = np.random.default_rng(seed)
    draw = lambda: rng.integers(1, V, rng.integers(1, 12)).astype(np.uint16)  # noqa: E731
    return [Example(draw(), [draw() for _ in range(4)], 0) for _ in range(count)]


def answers(model: PlainGPT2, examples: list[Example]) -> list[int]:
    """What the model takes for right, from the mean loss of each completion behind its context."""
    chosen = []
    for example in examples:
        means = []
        for completion in example.completions:
            tokens, n = (*example.context.tolist(), *completion.tolist()), len(example.context)
            means.append(np.mean([model.loss(tokens[:i], tokens[i]) for i in range(n, len(tokens))]))
        ranked = sorted(means)
        assert ranked[1] - ranked[0] > 1e-3  # no answer is a matter of rounding
        chosen.append(int(np.argmin(means)))
    return chosen


@pytest.fixture
def nine(folder):
    """eval.bin: nine questions, of which model.bin, sharpened, answers six right."""
    sharpen()
    examples = questions()
    chosen = answers(PlainGPT2("model.bin"), examples)
    assert len(set(chosen)) > 2
    for i, example in enumerate(examples):
        example.label = chosen[i] if i % 3 else (chosen[i] + 1) % 4
    write_examples("eval.bin", examples)
    return examples


@pytest.mark.parametrize("flags", ["", "-b 11", "-b 40", "-t 32", "-t 25 -b 8"])
def test_answers_are_those_of_the_model_by_hand(nine, measure, flags):
    out = done(measure(f"-j eval.bin {flags}")).out
    assert "HellaSwag: 6/9 = 0.666667\n95% interval (Wilson): 0.354202 to 0.879416; by chance 0.250000\n" in out


def test_progress_is_told_as_llmc_does(nine, measure):
    write_examples("eval.bin", [*nine, *nine, *nine])
    out = done(measure("-j eval.bin")).out.replace("allocated 0 MiB for activations\n", "")
    progress = "".join(f"evaluating HellaSwag: {i}/27\r" for i in (0, 10, 20))
    assert f"{progress}HellaSwag: 18/27 = 0.666667\n" in out
    assert "HellaSwag: 2/4 = 0.500000\n" in done(measure("-j eval.bin -b 8 -m 2")).out


@pytest.mark.parametrize(
    "correct, count, low, high",  # Newcombe 1998, table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_intervals_are_the_published_ones(correct, count, low, high):
    assert evaluate.wilson(correct, count) == pytest.approx((low, high), abs=5e-5)
    assert all(0 <= end <= 1 for n in range(1, 300) for k in (0, n) for end in evaluate.wilson(k, n))
    assert evaluate.wilson(count - correct, count) == pytest.approx((1 - high, 1 - low), abs=5e-5)


@pytest.fixture
def forty(folder, monkeypatch):
    """eval.bin, forty questions, is HellaSwag for the trainers; long.bin: tokens for batches of 4 x 24."""
    examples = questions(40)
    for i, example in enumerate(examples):
        example.label = i % 4
    write_examples("eval.bin", examples)
    monkeypatch.setattr(loop, "hellaswag_file", lambda: "eval.bin")
    write_tokens("long.bin", np.random.default_rng(1).integers(0, V, 300).astype(np.uint16))
    return dict(train_data="long.bin", val_data="long.bin", batch_size=4, seq_len=24, sample_every=0)


@pytest.mark.parametrize("kind", ["banded", "top-k", "mla and moe", "toroidal"])
def test_a_run_answers_as_its_checkpoint_does(train, measure, forty, kind):
    """At each validation but the one in front of the first step, as train_gpt2.cu; logged; and a resumed run, too."""
    trainer, flags, config, _ = RUNS[kind]
    write_model("model.bin", Model(config, gpt2_init(config, 1)))
    sharpen()
    out = done(train(trainer, f"{flags} -n 3 -v 2 -l 1e-2 --hellaswag 1 -c c.bin -o log.txt", **forty)).out
    found = re.findall(
        r"val loss \S+\n(?:evaluating HellaSwag: (?:0|10|20|30)/40\r){4}(HellaSwag: (\d+)/40 = \S+)\n", out
    )
    assert len(found) == 2 and len(val_losses(out)) == 3
    assert 0 < int(found[1][1]) < 40
    assert f"\r{found[1][0]}\n" in done(measure("-j eval.bin", "c.bin")).out
    logged = re.findall(r"^s:(\d) eval:(\S+)$", Path("log.txt").read_text(), re.M)
    assert logged == [(step, f"{int(right) / 40:.4f}") for step, (_, right) in zip("23", found)]
    from_file = dict.fromkeys(("train_data", "val_data", "batch_size", "seq_len"))
    again = done(train(trainer, "--resume c.bin -n 4 -v 1", **from_file)).out  # validates at 3 and 4
    assert again.count("HellaSwag: ") - again.count("evaluating HellaSwag: ") == 2


def test_it_changes_nothing_else(train, forty):
    """The same losses and the same bits with --hellaswag 1 and without."""
    runs = [done(train("banded", f"-n 3 -v 1 --hellaswag {on} -c c{on}.bin", **forty)).out for on in (0, 1)]
    assert losses(runs[0]) == losses(runs[1]) and val_losses(runs[0]) == val_losses(runs[1])
    assert Path("c0.bin").read_bytes() == Path("c1.bin").read_bytes() and "HellaSwag" not in runs[0]
    out = done(train("banded", "-n 0 --hellaswag 1", **forty)).out
    assert out.count("\rHellaSwag: ") == 1  # a run that only validates


# ----------------------------------------------------------------------------------------------------------------------
# what is refused


@pytest.mark.parametrize(
    "flags, words",
    [
        ("-b 0", ["-b/--batch-size", "'0'"]),
        ("-t 33", ["-t 33: model.bin has 32 positions"]),
        ("-t 8 --stride 9", ["--stride 9: a window has 8 tokens"]),
        ("--stride 0", ["--stride", "'0'"]),
        ("-m -1", ["-m/--val-batches", "'-1'"]),
        ("-j eval.bin --stride 2", ["--stride 2: eval.bin holds questions"]),
        ("-p x", ["-p: unknown flag"]),
    ],
)
def test_wrong_usage_exits_2(nine, measure, flags, words):
    check_refused(measure(f"-j val.bin {flags}"), *words, code=2)


def test_bad_files_are_named(nine, measure, folder):
    write_tokens("empty.bin", np.zeros(1, np.uint16))
    write_tokens("gpt2.bin", np.array([5, 6, 300, 7], np.uint16))
    model = read_model("model.bin")
    model.params[-100:] = np.nan
    write_model("nan.bin", model)
    tiny.make_folder(folder / "short", tiny.resized(maxT=16))
    tiny.make_folder(folder / "few", tiny.resized(V=200, Vp=256))
    before = snapshot(folder)
    check_refused(measure("-j none.bin"), "none.bin: no such token data")
    check_refused(measure("-j ."), "reading .: Is a directory")
    check_refused(measure("-j model.bin"), "model.bin: not a token data file")
    check_refused(measure("-j empty.bin"), "empty.bin: 1 tokens, none of which follows another")
    check_refused(measure("-j gpt2.bin"), "gpt2.bin: token 2 is 300, the model knows 0..255")
    check_refused(measure("-j '*.bin'"), "not a token data file")
    check_refused(measure(model="none.bin"), "reading none.bin")
    check_refused(measure(model="nan.bin"), "nan.bin: the mean loss on val.bin is nan")
    check_refused(measure("-j eval.bin", "nan.bin"), "eval.bin: the model's losses on an example are nan")
    check_refused(measure("-j eval.bin -b 3"), "-b 3: a question of eval.bin takes 4 rows")
    check_refused(measure("-j eval.bin -t 10"), "positions, a row has 10")
    check_refused(measure("-j eval.bin", "short/model.bin"), "short/model.bin has 16 positions", code=2)
    check_refused(measure("-j eval.bin", "few/model.bin"), "the model knows 0..199")
    assert snapshot(folder) == before


def test_a_run_that_cannot_answer_is_refused_at_its_start(train, forty, folder):
    before = snapshot(folder)
    check_refused(train("banded", "-n 3 --hellaswag 1 -c c.bin", **forty | dict(batch_size=3)), "-b 3: a question")
    check_refused(train("banded", "-n 3 --hellaswag 1 -c c.bin", **forty | dict(seq_len=16)), "a row has 16")
    assert snapshot(folder) == before


def test_hellaswag_is_looked_for_where_its_script_writes_it(train, folder, monkeypatch):
    """In the clone's data folder, whatever the current one."""
    monkeypatch.setattr(options, "ROOT", folder / "clone")
    refused = train("banded", "-n 1 --hellaswag 1")
    check_refused(
        refused, "--hellaswag 1: there is no clone/data/hellaswag/hellaswag_val.bin", "python data/hellaswag.py"
    )
    (folder / "clone/data/hellaswag").mkdir(parents=True)
    write_examples("clone/data/hellaswag/hellaswag_val.bin", questions(2))
    data = dict(train_data="train_01.bin", val_data="train_01.bin", batch_size=4, seq_len=11)
    check_refused(train("banded", "-n 1 --hellaswag 1", **data), "clone/data/hellaswag/hellaswag_val.bin: example ")
