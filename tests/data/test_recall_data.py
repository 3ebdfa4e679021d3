"""Tagged recall: every rule of its windows, and that a loader with -t T never splits one (data/recall.py)."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data import create_model, recall
from data.recall import Recall
from llmc.checkpoint import GPT2Config
from llmc.dataloader import DataLoader, count_tokens
from llmc.errors import UserError
from llmc.files import HEADER_BYTES

ROOT = Path(__file__).resolve().parent.parent.parent
K, T, QUERY, FILLER, V = 32, 128, 256, 288, 296  # of the default task
WINDOWS = 300


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def rng(*seed):
    return np.random.RandomState(seed)


def rows(path):
    """The tokens of a file as windows (n,T), and the one that is left over."""
    tokens = np.fromfile(path, "<u2", offset=HEADER_BYTES)
    return tokens[:-1].reshape(-1, T), tokens[-1]


def is_hard(window):
    return (window >= FILLER).any()


def values_of(items):
    """{key: value} of item ids, which must be items of distinct keys."""
    assert items.max() < QUERY
    values = dict(zip((items // 8).tolist(), (items % 8).tolist()))
    assert len(values) == len(items)
    return values


def answers(pairs, values):
    """The keys queried in [query, item, query, item ...]; each item must be the key's, with its value in `values`."""
    keys = pairs[::2] - QUERY
    assert keys.min() >= 0 and keys.max() < K
    expected = [8 * key + values[key] for key in keys.tolist()]
    assert pairs[1::2].tolist() == expected[: len(pairs) // 2]
    return keys


def check_hard(window):
    """The three parts; the distance of every query from its source."""
    items, fillers, pairs = window[:32], window[32:64], window[64:]
    values = values_of(items)
    assert sorted(values) == list(range(K))
    assert fillers.min() >= FILLER and fillers.max() < V
    keys = answers(pairs.astype(int), values)
    assert sorted(keys.tolist()) == list(range(K))
    source = {int(item) // 8: position for position, item in enumerate(items)}
    return [64 + 2 * i - source[int(key)] for i, key in enumerate(keys)]


def check_easy(window):
    """D items, then rounds over the same D keys; returns D and the keys of all rounds."""
    D = int((window >= QUERY).argmax())
    values = values_of(window[:D])
    keys = answers(window[D:].astype(int), values).tolist()
    for start in range(0, len(keys), D):
        one_round = keys[start : start + D]
        assert len(set(one_round)) == len(one_round) and set(one_round) <= set(values)
    return D, keys


def test_ids():
    task = Recall()
    assert (task.K, task.T, task.first_query, task.first_filler, task.V) == (K, T, QUERY, FILLER, V)


def test_hard_windows():
    task, generator = Recall(), rng(1)
    windows = np.stack([task.hard_window(generator) for _ in range(WINDOWS)])
    assert windows.shape == (WINDOWS, T)
    lags = np.array([check_hard(window) for window in windows])
    assert lags.min() >= 33 and lags.max() <= 126  # always beyond two layers' reach of the last 16: 30
    assert lags.min() <= 35 and lags.max() >= 124
    # orders, values and fillers are uniform: within five standard errors
    firsts = np.bincount(windows[:, 0] // 8, minlength=K)
    assert abs(firsts - WINDOWS / K).max() < 5 * (WINDOWS / K) ** 0.5
    for ids in (windows[:, :32] % 8, windows[:, 32:64] - FILLER):
        shares = np.bincount(ids.ravel().astype(int), minlength=8) / ids.size
        assert abs(shares - 1 / 8).max() < 5 * (7 / 64 / ids.size) ** 0.5
    assert np.mean(windows[:, 0] // 8 == windows[:, 64] - QUERY) < 0.1  # the second order is another


def test_easy_windows():
    task, generator = Recall(), rng(2)
    counts = np.zeros(17, int)
    same_order = []
    for _ in range(WINDOWS):
        window = task.easy_window(generator)
        assert window.shape == (T,)
        D, keys = check_easy(window)
        counts[D] += 1
        if D == 4:
            same_order.append(keys[:4] == keys[4:8])
    assert counts.sum() == counts[[4, 8, 16]].sum() == WINDOWS
    assert abs(counts[[4, 8, 16]] - WINDOWS / 3).max() < 5 * (WINDOWS * 2 / 9) ** 0.5
    assert np.mean(same_order) < 0.2  # every round has an order of its own: 1 of 24 by chance


def test_training_windows_are_hard_with_probability_one_half():
    tokens = Recall().tokens(rng(3), WINDOWS, 0.5)
    assert tokens.dtype == np.uint16 and tokens.size == WINDOWS * T + 1
    windows = tokens[:-1].reshape(WINDOWS, T)
    hard = [is_hard(window) for window in windows]
    for window, its_hard in zip(windows, hard):
        (check_hard if its_hard else check_easy)(window)
    assert abs(sum(hard) - WINDOWS / 2) < 5 * (WINDOWS / 4) ** 0.5
    assert tokens[-1] < QUERY  # as any window begins


def test_files(capsys):
    recall.main(["-o", "made", "--train-windows", "40", "--val-windows", "12"])
    (train, _), (val, last) = rows("made/recall_train.bin"), rows("made/recall_val.bin")
    assert (len(train), len(val)) == (40, 12)
    assert all(map(is_hard, val)) and not all(map(is_hard, train)) and any(map(is_hard, train))
    for window in val:
        check_hard(window)
    assert last < QUERY
    assert not (train[:, None] == val).all(axis=2).any()
    out = capsys.readouterr().out
    assert out == (
        "wrote made/recall_train.bin: 5,121 tokens\nwrote made/recall_val.bin: 1,537 tokens\n"
        "next: python data/create_model.py --vocab 296 -C 64 -L 2 -H 4 -T 128 -o recall.bin\n"
        "then: python train_sparse_attn.py --attention dense -e recall.bin -i made/recall_train.bin "
        "-j made/recall_val.bin -b 32 -t 128 -l 3e-3\n"
    )
    words = out.splitlines()[2].split()[3:]
    assert create_model.model_config(create_model.parse_arguments(words)) == GPT2Config(128, V, 2, 4, 64, 384)


def test_default_files_are_600_batches_of_32(monkeypatch):
    written = []
    monkeypatch.setattr(Recall, "tokens", lambda task, rng, windows, share: np.full(windows * task.T + 1, share * 2))
    monkeypatch.setattr(recall, "write_corpus", lambda *words: written.extend(words) or (Path("a"), Path("b")))
    recall.main([])
    folder, name, train, val = written
    assert (folder, name) == (ROOT / "data" / "recall", "recall")
    assert ((train.size - 1) // (32 * T), (val.size - 1) // T) == (600, 256)
    assert (train[0], val[0]) == (1, 2)  # half of the windows hard, all of them


def test_a_seed_gives_the_same_bytes_everywhere():
    argv = ["--train-windows", "30", "--val-windows", "9"]
    for folder, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        recall.main(["-o", folder, "--seed", seed, *argv])
    one, again, other = (Path(folder, "recall_train.bin").read_bytes() for folder in "abc")
    assert one == again != other
    assert hashlib.sha256(one).hexdigest() == "6f58f68b1c4ed6702b99dca9f033455e4357a536ce860127856ad8c18e1fe818"
    val = Path("a/recall_val.bin").read_bytes()
    assert hashlib.sha256(val).hexdigest() == "4c0a077662451d09fbe5fcba1a8ab456e1610ea6be6cf1c37c5c0157fe9deab5"


def test_more_training_windows_begin_with_the_same_and_leave_validation_as_it_is():
    recall.main(["-o", "a", "--train-windows", "5", "--val-windows", "3"])
    recall.main(["-o", "b", "--train-windows", "9", "--val-windows", "3"])
    assert np.array_equal(rows("a/recall_train.bin")[0], rows("b/recall_train.bin")[0][:5])
    assert Path("a/recall_val.bin").read_bytes() == Path("b/recall_val.bin").read_bytes()


@pytest.mark.parametrize("B", [1, 3, 8])
def test_rows_of_a_batch_are_whole_windows(B):
    """Shuffled, over several epochs; targets are the window one further, its last one the next window's first."""
    recall.main(["-o", "made", "--train-windows", "24", "--val-windows", "1"])
    windows, last = rows("made/recall_train.bin")
    place = {window.tobytes(): i for i, window in enumerate(windows.astype(np.int32))}
    following = np.append(windows[1:, 0], last)
    with DataLoader("made/recall_train.bin", B, T, vocab_size=V, shuffle=True) as loader:
        assert loader.num_batches == 24 // B
        for _ in range(2):
            seen = []
            for _ in range(24 // B):
                inputs, targets = loader.next_batch()
                for row, target in zip(inputs, targets):
                    seen.append(place[row.tobytes()])
                    assert np.array_equal(target[:-1], row[1:]) and target[-1] == following[seen[-1]]
            assert sorted(seen) == list(range(24))


def test_other_sizes():
    """Longer windows have more fillers; fewer keys fewer ids."""
    task = Recall(K=8, T=61)
    assert (task.first_query, task.first_filler, task.V) == (64, 72, 80)
    window = task.hard_window(rng(4))
    assert window.size == 61 and (window >= 72).sum() == 61 - 24 and (window >= 72)[8:45].all()
    for i in range(45, 61, 2):
        source = np.flatnonzero(window[:8] // 8 == window[i] - 64)
        assert window[source] == window[i + 1]
    assert {int((task.easy_window(rng(i)) >= 64).argmax()) for i in range(30)} == {1, 2, 4}
    recall.main(["-o", "made", "--keys", "8", "--window", "61", "--train-windows", "6", "--val-windows", "2"])
    assert count_tokens("made/recall_train.bin") == 6 * 61 + 1


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--keys", "12"], "--keys 12: expected a multiple of 8 up to 7280"),
        (["--keys", "7288"], "--keys 7288"),
        (["--window", "95"], "--window 95: expected at least 96, 3 for each key"),
        (["--train-windows", "16777216"], "--train-windows 16777216: over 2^31 tokens"),
        (["--val-windows", "16777216"], "--val-windows 16777216: over 2^31 tokens"),
        (["--val-windows", "0"], "--val-windows: '0'"),
        (["--seed", "-1"], "--seed: '-1'"),
    ],
)
def test_bad_flags(flags, message):
    with pytest.raises(UserError) as refused:
        recall.main([*flags, "-o", "made"])
    assert message in refused.value.message and refused.value.hint
    assert refused.value.exit_code == 2
    assert os.listdir() == []


def test_runs_as_a_script_from_any_folder():
    argv = ["-o", "made", "--train-windows", "2", "--val-windows", "1"]
    command = [sys.executable, str(ROOT / "data" / "recall.py"), *argv]
    assert "then: python train_sparse_attn.py" in subprocess.run(command, capture_output=True, text=True).stdout
