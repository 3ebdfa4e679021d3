"""llmc/dataloader.py against llm.c's figures and against a loader written the long way round."""

import os

import numpy as np
import pytest

from llmc.dataloader import DataLoader, count_tokens, write_tokens
from llmc.errors import UserError

B, T = 2, 4


def write_shards(folder, *sizes):
    """Shards whose tokens count on through all of them, so that a token tells where it was read; their pattern."""
    first = 0
    for i, size in enumerate(sizes):
        write_tokens(folder / f"train_{i:02d}.bin", np.arange(first, first + size, dtype=np.uint16))
        first += size
    return str(folder / "train_*.bin")


def mersenne_twister(seed):
    """MT19937 word by word, after Matsumoto and Nishimura 1998."""
    state = [seed]
    for i in range(1, 624):
        state.append((1812433253 * (state[-1] ^ state[-1] >> 30) + i) & 0xFFFFFFFF)
    while True:
        for i in range(624):
            word = state[i] & 0x80000000 | state[(i + 1) % 624] & 0x7FFFFFFF
            state[i] = state[(i + 397) % 624] ^ word >> 1 ^ (0x9908B0DF if word & 1 else 0)
        for word in state:
            word ^= word >> 11
            word ^= word << 7 & 0x9D2C5680
            word ^= word << 15 & 0xEFC60000
            yield word ^ word >> 18


def permute(indices, draws):
    for i in range(len(indices) - 1, 0, -1):
        j = next(draws) % (i + 1)
        indices[i], indices[j] = indices[j], indices[i]


def expected_batches(shards, rank, nproc, shuffle, seed, epochs):
    """All batches of some epochs: (inputs, targets) as flat lists."""
    draws = mersenne_twister(seed + rank)
    order = list(range(len(shards)))
    for _ in range(epochs):
        if shuffle:
            permute(order, draws)
        for index in order:
            tokens = shards[index]
            samples = list(range((len(tokens) - 1) // (nproc * B * T)))
            if shuffle:
                permute(samples, draws)
            for sample in samples:
                start = (sample * nproc + rank) * B * T
                yield tokens[start : start + B * T], tokens[start + 1 : start + B * T + 1]


def flat(batch):
    return [part.ravel().tolist() for part in batch]


def test_mersenne_stream():
    """Both this file's generator and NumPy's, seeded as the loader seeds it."""
    expected = [1608637542, 3421126067, 4083286876, 787846414, 3143890026]
    draws = mersenne_twister(42)
    assert [next(draws) for _ in range(5)] == expected
    generator = np.random.MT19937()
    generator.state = np.random.RandomState(42).get_state(legacy=False)
    assert generator.random_raw(5).tolist() == expected


@pytest.mark.parametrize(
    "sizes, seed, expected",
    [
        ([10 * B * T + 1], 42, [1, 3, 9, 7, 6, 0, 8, 4, 5, 2]),
        ([10 * B * T + 1], 1337, [1, 0, 6, 7, 3, 9, 2, 8, 4, 5]),
        ([10 * B * T + 1] * 2, 42, [3, 2, 1, 8, 0, 5, 4, 6, 9, 7]),
    ],
)
def test_llmc_permutations(tmp_path, sizes, seed, expected):
    with DataLoader(write_shards(tmp_path, *sizes), B, T, shuffle=True, seed=seed) as loader:
        assert loader.state().intra_shard_indices.tolist() == expected
        if len(sizes) == 2:
            assert loader.state().shard_indices.tolist() == [1, 0]
        first = (len(sizes) - 1) * sizes[0]  # with two shards the second comes first
        assert [(int(loader.next_batch()[0][0, 0]) - first) // (B * T) for _ in range(10)] == expected


@pytest.mark.parametrize("sizes", [(157, 100), (160, 96)])  # (160, 96): a whole number of samples, but one token short
@pytest.mark.parametrize("rank, nproc", [(0, 1), (0, 2), (1, 2), (2, 3)])
@pytest.mark.parametrize("shuffle, seed", [(False, 42), (True, 42), (True, 7)])
def test_two_epochs_of_two_shards(tmp_path, sizes, rank, nproc, shuffle, seed):
    shards = [list(range(sizes[0])), list(range(sizes[0], sum(sizes)))]
    batches = list(expected_batches(shards, rank, nproc, shuffle, seed, epochs=2))
    with DataLoader(write_shards(tmp_path, *sizes), B, T, rank=rank, nproc=nproc, shuffle=shuffle, seed=seed) as loader:
        assert (loader.num_tokens, loader.num_batches) == (sum(sizes), sum(sizes) // (nproc * B * T))
        assert len(batches) == 2 * sum((size - 1) // (nproc * B * T) for size in sizes)
        for inputs, targets in batches:
            assert flat(loader.next_batch()) == [inputs, targets]


def test_order_of_a_large_shard(tmp_path):
    """More samples than the loader permutes at a time."""
    expected = list(range(140_000))
    permute(expected, mersenne_twister(42))
    path = tmp_path / "large.bin"
    write_tokens(path, np.zeros(140_001, np.uint16))
    with DataLoader(str(path), 1, 1, shuffle=True) as loader:
        assert loader.state().intra_shard_indices.tolist() == expected


def test_neighbours_share_one_token(tmp_path):
    with DataLoader(write_shards(tmp_path, 2 * B * T + 1), B, T) as loader:
        first = flat(loader.next_batch())
        second = flat(loader.next_batch())
    assert first[1][-1] == second[0][0] == B * T
    assert second[1][-1] == 2 * B * T  # the shard's last token is only ever a target


def test_batches_are_views_of_one_buffer(tmp_path):
    with DataLoader(write_shards(tmp_path, 100), B, T) as loader:
        inputs, targets = loader.next_batch()
        assert inputs.shape == targets.shape == (B, T)
        assert inputs.dtype == targets.dtype == np.int32
        assert inputs.flags.c_contiguous and targets.flags.c_contiguous
        again, _ = loader.next_batch()
        assert again is inputs
        assert inputs[0, 0] == B * T


def test_position_counts_as_in_c(tmp_path):
    """The sample index stands past the end of a shard until the next batch is asked for."""
    with DataLoader(write_shards(tmp_path, 2 * B * T + 1, B * T + 1), B, T) as loader:
        positions = []
        for _ in range(5):
            loader.next_batch()
            positions.append((loader.shard, loader.sample))
    assert positions == [(0, 1), (0, 2), (1, 1), (0, 1), (0, 2)]


def test_reset_draws_on(tmp_path):
    pattern = write_shards(tmp_path, 20 * B * T + 1)
    with DataLoader(pattern, B, T, shuffle=True) as loader, DataLoader(pattern, B, T) as plain:
        first = loader.state().intra_shard_indices
        loader.next_batch()
        loader.reset()
        assert loader.sample == 0
        assert loader.state().intra_shard_indices.tolist() != first.tolist()
        batch = flat(plain.next_batch())
        plain.next_batch()
        plain.reset()
        assert flat(plain.next_batch()) == batch


def test_shards_in_byte_order(tmp_path):
    names = ["b.bin", "a.bin", "é.bin", "Z.bin", "a10.bin", "a2.bin"]
    for i, name in enumerate(names):
        write_tokens(tmp_path / name, np.full(B * T + 1, i, np.uint16))
    with DataLoader(str(tmp_path / "*.bin"), B, T) as loader:
        assert [os.path.basename(path) for path in loader.paths] == [
            "Z.bin",
            "a.bin",
            "a10.bin",
            "a2.bin",
            "b.bin",
            "é.bin",
        ]
        assert [int(loader.next_batch()[0][0, 0]) for _ in names] == [3, 1, 4, 5, 0, 2]


def test_resume(tmp_path):
    pattern = write_shards(tmp_path, 157, 100)
    with DataLoader(pattern, B, T) as loader, DataLoader(pattern, B, T) as resumed:
        for _ in range(60):
            resumed.resume(loader.shard, loader.sample)
            assert flat(resumed.next_batch()) == flat(loader.next_batch())


@pytest.mark.parametrize("done", [0, 1, 18, 19, 20, 31, 32, 45, 700])
def test_restore_is_exact(tmp_path, done):
    """In the midst of a shard, at its end, at the end of an epoch; through another epoch and a half."""
    pattern = write_shards(tmp_path, 157, 100)
    with DataLoader(pattern, B, T, shuffle=True) as loader, DataLoader(pattern, B, T, shuffle=True, seed=3) as other:
        for _ in range(done):
            loader.next_batch()
        other.next_batch()
        other.restore(loader.shard, loader.sample, loader.state())
        for _ in range(50):
            assert flat(other.next_batch()) == flat(loader.next_batch())
        assert np.array_equal(other.state().mt_key, loader.state().mt_key)


def test_restore_does_not_share_the_state(tmp_path):
    pattern = write_shards(tmp_path, 100)
    with DataLoader(pattern, B, T, shuffle=True) as loader:
        state = loader.state()
        kept = state.intra_shard_indices.copy()
        loader.restore(0, 0, state)
        for _ in range(30):
            loader.next_batch()
        assert np.array_equal(state.intra_shard_indices, kept)


def test_restore_that_does_not_fit(tmp_path):
    pattern = write_shards(tmp_path, 157, 100)
    with DataLoader(pattern, B, T, shuffle=True) as loader:
        state = loader.state()
        with pytest.raises(UserError, match="saved run took its data unshuffled, this one shuffled"):
            loader.restore(0, 0, None)
        with pytest.raises(UserError, match="shard 2, there are 2"):
            loader.restore(2, 0, state)
        with pytest.raises(UserError, match=r"sample 99, there are"):
            loader.restore(0, 99, state)
    with DataLoader(pattern, B, T) as loader:
        with pytest.raises(UserError, match="saved run took its data shuffled, this one unshuffled"):
            loader.restore(0, 0, state)
        with pytest.raises(UserError, match="sample -1"):
            loader.resume(0, -1)
    with (
        DataLoader(pattern, B, T + 1, shuffle=True) as loader,
        pytest.raises(UserError, match=r"saved order is of \d+ samples, there are") as error,
    ):
        loader.restore(0, 0, state)
    assert "-b" in error.value.hint
    with (
        DataLoader(str(tmp_path / "train_00.bin"), B, T, shuffle=True) as loader,
        pytest.raises(UserError, match="order is of 2 shards, there are 1"),
    ):
        loader.restore(0, 0, state)


def test_large_shard_is_read_at_the_right_place(tmp_path):
    """Byte offsets past 2^31 (a sparse file)."""
    path, num_tokens = tmp_path / "large.bin", (1 << 30) + 1025
    write_tokens(path, np.zeros(0, np.uint16))
    data = bytearray(path.read_bytes())
    data[8:12] = num_tokens.to_bytes(4, "little")
    path.write_bytes(data)
    os.truncate(path, 1024 + 2 * num_tokens)
    with open(path, "r+b") as file:
        file.seek(1024 + 2 * (1 << 30))
        file.write(np.arange(1025, dtype="<u2").tobytes())
    with DataLoader(str(path), 1, 1024) as loader:
        loader.resume(0, (1 << 20))
        assert flat(loader.next_batch()) == [list(range(1024)), list(range(1, 1025))]


def test_write_tokens(tmp_path):
    path = tmp_path / "data.bin"
    write_tokens(path, np.uint16([1, 2, 65535]))
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, 3
    assert path.read_bytes() == header.tobytes() + b"\x01\0\x02\0\xff\xff"
    assert count_tokens(path) == 3
    write_tokens(path, np.arange(10, dtype=np.uint16)[::2])
    assert path.read_bytes()[1024:] == np.arange(0, 10, 2, dtype="<u2").tobytes()


def test_write_tokens_refuses(tmp_path):
    path = tmp_path / "data.bin"
    with pytest.raises(ValueError, match="int64"):
        write_tokens(path, np.arange(3))
    with pytest.raises(UserError, match=r"2147483648 tokens, .* at most 2147483647"):
        write_tokens(path, np.broadcast_to(np.uint16(0), 1 << 31))
    assert not path.exists()


@pytest.mark.parametrize(
    "index, value, found",
    [
        (0, 20240326, "magic 20240326, expected 20240520"),
        (0, 20240801, "Llama-3"),
        (1, 7, "version 7, expected 1"),
        (2, 101, "truncated: 1224 bytes, its header asks for 1226"),
        (2, 99, "too long"),
        (2, -1, "-1 tokens"),
    ],
)
def test_bad_shard(tmp_path, index, value, found):
    pattern = write_shards(tmp_path, 100, 100)
    path = tmp_path / "train_01.bin"
    data = bytearray(path.read_bytes())
    data[4 * index : 4 * index + 4] = value.to_bytes(4, "little", signed=True)
    path.write_bytes(data)
    for read in (lambda: DataLoader(pattern, B, T), lambda: count_tokens(path)):
        with pytest.raises(UserError, match=found) as error:
            read()
        assert "train_01.bin" in error.value.message
        assert error.value.hint


def test_cut_header(tmp_path):
    for size in (0, 3, 1023):
        path = tmp_path / "short.bin"
        path.write_bytes(b"x" * size)
        with pytest.raises(UserError, match=f"found {size} bytes"):
            count_tokens(path)


def test_empty_pattern(tmp_path):
    with pytest.raises(UserError, match="no such token data") as error:
        DataLoader(str(tmp_path / "*.bin"), B, T)
    assert "make data" in error.value.hint


def test_short_shard(tmp_path):
    """Every shard needs nproc*B*T + 1 tokens: one fewer is refused, the exact number gives one batch."""
    pattern = write_shards(tmp_path, 3 * B * T, 100)
    with pytest.raises(
        UserError, match=r"train_00\.bin: 24 tokens, B = 2, T = 4 in 3 processes needs at least 25"
    ) as error:
        DataLoader(pattern, B, T, nproc=3)
    assert error.value.hint == "lower -b or -t: B*T may be at most 7"
    pattern = write_shards(tmp_path, 3 * B * T + 1, 100)
    with DataLoader(pattern, B, T, nproc=3, rank=2) as loader:
        assert flat(loader.next_batch()) == [list(range(16, 24)), list(range(17, 25))]


@pytest.mark.parametrize("where", [0, 9, 16])
def test_token_out_of_range(tmp_path, where):
    tokens = np.zeros(17, np.uint16)
    tokens[where] = 256
    path = tmp_path / "data.bin"
    write_tokens(path, tokens)
    with DataLoader(str(path), B, T, vocab_size=257) as loader:
        for _ in range(2):
            loader.next_batch()
    with (
        DataLoader(str(path), B, T, vocab_size=256) as loader,
        pytest.raises(UserError, match=rf"data\.bin: token {where} is 256, the model knows 0\.\.255") as error,
    ):
        for _ in range(2):
            loader.next_batch()
    assert "another tokenizer" in error.value.hint


def test_shard_that_goes_bad_during_the_run(tmp_path):
    pattern = write_shards(tmp_path, B * T + 1, B * T + 1)
    with DataLoader(pattern, B, T) as loader:
        loader.next_batch()
        (tmp_path / "train_01.bin").unlink()
        with pytest.raises(UserError, match=r"train_01\.bin: No such file"):
            loader.next_batch()
    path = tmp_path / "large.bin"
    write_tokens(path, np.zeros(200_000, np.uint16))  # more than Python reads ahead
    with DataLoader(str(path), 1, 1024) as loader:
        loader.next_batch()
        os.truncate(path, 1030)
        with pytest.raises(UserError, match=r"large\.bin: shorter than its header says"):
            for _ in range(194):
                loader.next_batch()
