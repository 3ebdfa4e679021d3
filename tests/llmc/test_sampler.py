"""llmc/sampler.py against llm.c's figures, and against plain loops that follow the C code step by step."""

import numpy as np
import pytest

from llmc.sampler import Sampler, filter_top_k_top_p, sample_logits, sample_probabilities, softmax


def test_trainer_coins():
    sampler = Sampler()
    assert [sampler.random_u32() for _ in range(4)] == [989205090, 818269915, 1335155955, 3876892996]
    assert sampler.state == 3115803837778227132
    sampler = Sampler(1337)
    coins = [np.float32(sampler.random_f32()) for _ in range(4)]
    assert coins == [np.float32(coin) for coin in (0.230317235, 0.19051826, 0.310865164, 0.902659476)]


def test_generator_coins():
    sampler = Sampler(42)
    coins = [np.float32(sampler.random_f64()) for _ in range(4)]
    assert coins == [np.float32(coin) for coin in (0.33908525, 0.78225583, 0.79013705, 0.94404262)]


def test_state_goes_on_where_it_was():
    sampler = Sampler(5)
    sampler.random_u32()
    copy = Sampler(sampler.state)
    assert [sampler.random_u32() for _ in range(3)] == [copy.random_u32() for _ in range(3)]


@pytest.mark.parametrize("seed", [0, 1 << 64])
def test_seed_0_is_refused(seed):
    with pytest.raises(ValueError, match="seed 0"):
        Sampler(seed)


def loop_probabilities(probabilities, coin):
    total = np.float32(0)
    for i, probability in enumerate(probabilities):
        total = np.float32(total + probability)
        if np.float32(coin) < total:
            return i
    return len(probabilities) - 1


def loop_logits(logits, coin):
    norm = 0.0
    for weight in np.exp(logits):
        norm += float(weight)
    return loop_probabilities(np.exp(logits), np.float32(coin * norm))


def test_sampling_follows_the_loops():
    rng, sampler = np.random.default_rng(0), Sampler()
    for _ in range(100):
        logits = rng.normal(scale=3, size=300).astype(np.float32)
        probabilities = softmax(logits).astype(np.float32)
        coin = sampler.random_f32()
        assert sample_probabilities(probabilities, coin) == loop_probabilities(probabilities, coin)
        assert sample_logits(logits, coin) == loop_logits(logits, coin)


def test_sums_are_as_precise_as_in_c():
    """2.4e7 + 1 is 2.4e7 in float32: the double norm counts 20000 tokens that the float32 running sum never reaches."""
    logits = np.zeros(20_001, np.float32)
    logits[0] = 17
    for coin, expected in ((0.9990, 0), (0.9995, 20_000)):
        assert sample_logits(logits, coin) == loop_logits(logits, coin) == expected


def test_coin_on_a_border_belongs_to_the_next():
    probabilities = np.float32([0.25, 0, 0.25, 0.5, 0])
    coins = {0.0: 0, 0.2499: 0, 0.25: 2, 0.4999: 2, 0.5: 3, 0.9999: 3}
    assert {coin: sample_probabilities(probabilities, coin) for coin in coins} == coins


def test_coin_beyond_the_sum_draws_no_impossible_token():
    assert sample_probabilities(np.float64([0.5, 0.4999999, 0]), 1.0) == 1
    assert sample_probabilities(np.float32([0.5, 0.3, 0.1]), 0.95) == 2  # train_gpt2.c: V - 1


@pytest.mark.parametrize("value", [200.0, -200.0, np.nan])
def test_logits_beyond_exp_stay_in_range(value):
    logits = np.full(10, value, np.float32)
    assert 0 <= sample_logits(logits, 0.5) <= 9
    if not np.isnan(value):
        assert sample_logits(logits, 0.5) == 9  # no partial sum exceeds the coin


def test_softmax():
    logits = np.float32([1, 2, 3])
    expected = np.exp([1.0, 2.0, 3.0]) / np.exp([1.0, 2.0, 3.0]).sum()
    assert softmax(logits).dtype == np.float64
    assert softmax(logits) == pytest.approx(expected, abs=1e-15)
    assert softmax(logits, 0.5) == pytest.approx(np.exp([2.0, 4, 6]) / np.exp([2.0, 4, 6]).sum(), abs=1e-15)
    assert softmax(logits * 1e4, 1e-6).tolist() == [0, 0, 1]


def test_top_k():
    probabilities = np.float64([0.1, 0.4, 0.2, 0.3])
    assert filter_top_k_top_p(probabilities, 1).tolist() == [0, 1, 0, 0]
    assert filter_top_k_top_p(probabilities, 2) == pytest.approx([0, 4 / 7, 0, 3 / 7])
    for top_k in (0, 4, 9):
        assert filter_top_k_top_p(probabilities, top_k) == pytest.approx(probabilities, abs=1e-15)


def test_ties_keep_the_lowest_index():
    probabilities = np.full(4, 0.25)
    assert filter_top_k_top_p(probabilities, 3) == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0])
    assert filter_top_k_top_p(probabilities, 0, 0.5) == pytest.approx([0.5, 0.5, 0, 0])
    assert filter_top_k_top_p(np.float64([0.2, 0.2, 0.4, 0.2]), 2) == pytest.approx([1 / 3, 0, 2 / 3, 0])


def test_top_p_is_the_smallest_set_that_reaches_p():
    probabilities = np.float64([0.125, 0.5, 0.25, 0.125])
    kept = {p: np.count_nonzero(filter_top_k_top_p(probabilities, 0, p)) for p in (1e-9, 0.5, 0.51, 0.75, 0.76, 0.9, 1)}
    assert kept == {1e-9: 1, 0.5: 1, 0.51: 2, 0.75: 2, 0.76: 3, 0.9: 4, 1: 4}


def test_top_p_counts_what_top_k_left():
    # of {0.5, 0.25} the first is 2/3
    assert filter_top_k_top_p(np.float64([0.125, 0.5, 0.25, 0.125]), 2, 0.6).tolist() == [0, 1, 0, 0]


def test_filter_agrees_with_a_sort():
    rng = np.random.default_rng(2)
    for top_k, top_p in ((5, 0.7), (0, 0.3), (50, 0.99)):
        probabilities = softmax(rng.integers(0, 5, size=100).astype(np.float32))
        order = sorted(range(100), key=lambda i, p=probabilities: (-p[i], i))[: top_k or None]
        whole, total, kept = probabilities[order].sum(), 0.0, []
        for i in order:
            kept.append(i)
            total += probabilities[i]
            if total >= top_p * whole:
                break
        expected = np.zeros(100)
        expected[kept] = probabilities[kept] / total
        assert filter_top_k_top_p(probabilities, top_k, top_p) == pytest.approx(expected, abs=1e-15)
