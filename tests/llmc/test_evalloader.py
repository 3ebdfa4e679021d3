"""Eval files byte by byte, what is refused of them, and scores as llm.c's loops have them."""

import struct

import numpy as np
import pytest

from llmc.errors import UserError
from llmc.evalloader import COMPLETIONS, EvalLoader, Example, mean_in_order, read_examples, write_examples


def words(*values: int) -> np.ndarray:
    return np.array(values, np.uint16)


def random_examples(count: int, seed: int = 1, V: int = 50) -> list[Example]:
    rng = np.random.default_rng(seed)
    draw = lambda most: rng.integers(0, V, rng.integers(1, most)).astype(np.uint16)  # noqa: E731
    return [Example(draw(6), [draw(5) for _ in range(COMPLETIONS)], int(rng.integers(0, 4))) for _ in range(count)]


def refused(*expected: str):
    return pytest.raises(UserError, match="(?s)" + ".*".join(map(str, expected)))


# ----------------------------------------------------------------------------------------------------------------------
# the file


TWO = [
    Example(words(5, 6), [words(7), words(8, 9), words(10), words(11, 12, 13)], 3),
    Example(words(1), [words(2), words(3), words(4), words(5)], 0),
]


def good() -> list[int]:
    """The int32 and uint16 of a file with TWO, as the format's description has them."""
    first = [65535, 38, 0, 3, 4, 2, 5, 6, 1, 7, 2, 8, 9, 1, 10, 3, 11, 12, 13]
    second = [65535, 30, 1, 0, 4, 1, 1, 1, 2, 1, 3, 1, 4, 1, 5]
    return [20240522, 1, 2, 38, *[0] * 252], first + second


def write_raw(header: list[int], stream: list[int]) -> None:
    with open("eval.bin", "wb") as file:
        file.write(struct.pack("<256i", *header) + struct.pack(f"<{len(stream)}H", *stream))


def flat(examples: list[Example]) -> list:
    return [
        (example.context.tolist(), [tokens.tolist() for tokens in example.completions], example.label)
        for example in examples
    ]


@pytest.fixture(autouse=True)
def in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_the_bytes_of_a_file():
    write_raw(*good())
    expected = open("eval.bin", "rb").read()
    assert flat(read_examples("eval.bin", 14)) == flat(TWO)
    write_examples("eval.bin", TWO)
    assert open("eval.bin", "rb").read() == expected
    assert [example.longest for example in TWO] == [5, 2]


def test_what_is_written_is_read():
    examples = random_examples(300)
    write_examples("eval.bin", examples)
    assert flat(read_examples("eval.bin")) == flat(examples)


@pytest.mark.parametrize(
    "place, value, expected",
    [
        (0, 20240520, "not a file of questions: magic 20240520, expected 20240522"),
        (1, 2, "version 2, expected 1"),
        (2, 0, "0 examples, expected 1..65535"),
        (2, 65536, "65536 examples, expected 1..65535"),
        (2, -1, "-1 examples"),
        (2, 1, "too long: its 1 examples end at byte 1062"),
        (2, 3, "example 2 at byte 1092: file of questions is truncated"),
        (3, 36, "its longest example has 38 bytes, its header says 36"),
    ],
)
def test_bad_header(place, value, expected):
    header, stream = good()
    header[place] = value
    write_raw(header, stream)
    with refused("eval.bin: ", expected) as raised:
        read_examples("eval.bin")
    assert raised.value.hint == "python data/hellaswag.py writes a good one"


SECOND = 19  # where the second example begins


@pytest.mark.parametrize(
    "place, value, expected",
    [
        (SECOND, 65534, "example 1 at byte 1062: start 65534, expected 65535"),
        (SECOND + 1, 31, "31 bytes, expected an even number, at most 30"),
        (SECOND + 1, 32, "32 bytes, expected an even number, at most 30"),
        (SECOND + 1, 28, "completion 3 of 1 tokens in an example of 28 bytes"),
        (SECOND + 1, 10, "context of 0 tokens in an example of 10 bytes"),
        (SECOND + 1, 0, "context of 0 tokens in an example of 0 bytes"),
        (1, 40, "example 0 at byte 1024: 40 bytes, its tokens end after 38"),
        (SECOND + 2, 0, "index 0, expected 1"),
        (SECOND + 3, 4, "label 4 of 4 completions, expected 0..3 of 4"),
        (SECOND + 4, 3, "label 0 of 3 completions"),
        (SECOND + 5, 0, "context of 0 tokens"),
        (SECOND + 5, 65535, "context of 65535 tokens in an example of 30 bytes"),
        (SECOND + 7, 0, "completion 0 of 0 tokens"),
        (SECOND + 13, 2, "completion 3 of 2 tokens"),
        (SECOND + 8, 14, "example 1 has token 14, the model knows 0..13"),
        (6, 65535, "example 0 has token 65535"),
    ],
)
def test_bad_example(place, value, expected):
    header, stream = good()
    stream[place] = value
    write_raw(header, stream)
    with refused("eval.bin: ", expected):
        read_examples("eval.bin", 14)


def test_bad_size():
    header, stream = good()
    write_raw(header, stream)
    data = open("eval.bin", "rb").read()
    for size, expected in ((0, "1024 bytes of header"), (1024, "truncated"), (len(data) - 1, "in uint16")):
        open("eval.bin", "wb").write(data[:size])
        with refused("eval.bin: ", expected):
            read_examples("eval.bin")
    for size in range(1024, len(data)):
        open("eval.bin", "wb").write(data[:size])
        with refused("eval.bin: "):
            read_examples("eval.bin")


def test_what_the_format_cannot_hold():
    bad = [
        Example(words(*[1] * 33000), TWO[0].completions, 0),  # 66,000 bytes and more
        Example(words(), TWO[0].completions, 0),
        Example(words(1), [words(1)] * 3, 0),
        Example(words(1), [words(1), words(1), words(), words(1)], 0),
    ]
    for example in bad:
        with refused("eval.bin: example 1 has "):
            write_examples("eval.bin", [TWO[0], example])
    with refused("0 examples"):
        write_examples("eval.bin", [])


# ----------------------------------------------------------------------------------------------------------------------
# batches and scores, beside llm.c's loops


def by_llmc(examples: list[Example], B: int, T: int, losses_of) -> int:
    """What evalloader_next_batch and evalloader_stat_losses count, loop for loop; losses_of -> (B*T)."""
    inputs, targets = np.zeros((B, T), np.int32), np.zeros((B, T), np.int32)
    correct, fit = 0, B // 4
    for start in range(0, len(examples), fit):
        mask, labels = np.zeros((B, T), np.int8), [0] * fit
        for i, example in enumerate(examples[start : start + fit]):
            labels[i] = example.label
            for c, completion in enumerate(example.completions):
                row, n = 4 * i + c, len(example.context)
                for t, token in enumerate(example.context):
                    inputs[row, t] = token
                for t, token in enumerate(completion):
                    inputs[row, n + t] = token
                    targets[row, n + t - 1] = token
                    mask[row, n + t - 1] = 1
        losses = losses_of(inputs, targets).reshape(B, T)
        for i in range(fit):
            least, best, active = np.float32(0), -1, False
            for c in range(4):
                total, count = np.float32(0), 0
                for t in range(T):
                    if mask[4 * i + c, t] == 1:
                        active, total, count = True, np.float32(total + losses[4 * i + c, t]), count + 1
                average = np.float32(total / np.float32(count)) if count else total
                if c == 0 or average < least:
                    least, best = average, c
            correct += active and best == labels[i]
    return correct


@pytest.mark.parametrize("B, T", [(4, 10), (4, 17), (7, 10), (8, 12), (44, 10)])
def test_counts_are_those_of_llmc(B, T):
    """A loss here is made of all tokens up to its own, so that a row that is not as llm.c's shows; 0.25 makes ties."""
    examples = random_examples(23)

    def losses_of(inputs, targets):
        seen = np.cumsum(inputs * np.arange(1, T + 1), axis=1)
        return ((seen * 7 + targets * 13) % 5 * 0.25).astype(np.float32).ravel()

    write_examples("eval.bin", examples)
    loader = EvalLoader("eval.bin", B, T, 50)
    assert loader.num_batches == -(-23 // (B // 4)) and loader.num_examples == 23
    for _ in range(2):  # a second time after reset
        loader.reset()
        found = sum(loader.count_correct(losses_of(*loader.next_batch())) for _ in range(loader.num_batches))
        assert found == by_llmc(examples, B, T, losses_of)
    assert 2 < found < 15


def test_the_mean_is_added_up_in_float32():
    """1e8 swallows a 1 in float32, and in no other order."""
    losses = np.array([1e8, 1, 1, 1, 1], np.float32)
    assert mean_in_order(losses) == np.float32(2e7) and mean_in_order(losses[::-1]) == np.float32(100000004 / 5)
    losses = np.random.default_rng(0).random(1000).astype(np.float32)
    total = np.float32(0)
    for loss in losses:
        total = np.float32(total + loss)
    assert mean_in_order(losses).tobytes() == np.float32(total / np.float32(1000)).tobytes()


def test_the_length_does_not_count():
    """Mean, not sum: a long completion of small losses wins; and of equal means the first does."""
    write_examples("eval.bin", [Example(words(1), [words(2), words(3), words(4, 4, 4, 4), words(5)], 2)])
    loader = EvalLoader("eval.bin", 4)
    loader.next_batch()
    losses = np.full((4, loader.T), 100, np.float32)  # what stands elsewhere does not count
    losses[:, 0], losses[2, :4] = [3, 2, 0, 2], 1
    assert loader.count_correct(losses.ravel()) == 1
    loader.examples[0].label = 1
    losses[2, :4] = 2
    assert loader.count_correct(losses.ravel()) == 1
    losses[3, 0] = np.nan
    with refused("eval.bin: the model's losses on an example are 3.0, 2.0, 2.0, nan"):
        loader.count_correct(losses.ravel())


def test_only_the_first_examples():
    write_examples("eval.bin", random_examples(9))
    loader = EvalLoader("eval.bin", 4, most=2)
    assert (loader.num_examples, loader.num_batches) == (2, 2)


def test_rows_and_positions_must_do():
    write_examples("eval.bin", TWO)
    assert EvalLoader("eval.bin", 4).T == EvalLoader("eval.bin", 4, 6).T == 6
    with refused("example 0 takes 6 positions, a row has 5"):
        EvalLoader("eval.bin", 4, 5)
    with refused("-b 3: a question of eval.bin takes 4 rows"):
        EvalLoader("eval.bin", 3, 6)
