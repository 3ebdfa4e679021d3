"""llmc/schedulers.py: hand-computed points, the edges, and float32 arithmetic."""

import itertools
import math

import numpy as np
import pytest

from llmc.schedulers import SCHEDULES, learning_rate


def rates(schedule, *steps, lr=1.0, warmup=0, total=10, final_frac=0.1):
    return [learning_rate(schedule, step, lr=lr, warmup=warmup, steps=total, final_frac=final_frac) for step in steps]


def test_names():
    assert SCHEDULES == ("cosine", "linear", "constant", "wsd")
    with pytest.raises(ValueError, match="'poly', expected one of cosine, linear, constant, wsd"):
        rates("poly", 0)


@pytest.mark.parametrize(
    "schedule, expected",
    [
        ("cosine", [1, 0.1 + 0.45 * (1 + math.cos(0.2 * math.pi)), 0.55, 0.1]),
        ("linear", [1, 0.82, 0.55, 0.1]),
        ("constant", [1, 1, 1, 1]),
        ("wsd", [1, 1, 1, 0.1]),
    ],
)
def test_hand_computed(schedule, expected):
    assert rates(schedule, 0, 2, 5, 10) == pytest.approx(expected, abs=1e-7)


def test_wsd_decays_over_the_last_fifth():
    assert rates("wsd", 80, 85, 90, 99, total=100) == pytest.approx(
        [1, 0.1 + 0.9 * 0.5, 0.1 + 0.9 * (1 - math.sqrt(0.5)), 0.1 + 0.9 * (1 - math.sqrt(0.95))], abs=1e-6
    )


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_warmup(schedule):
    assert rates(schedule, 0, 1, 3, 4, warmup=4) == pytest.approx([0.25, 0.5, 1, 1], abs=1e-7)


def test_constant_ignores_warmup():
    assert rates("constant", 0, 3, warmup=4) == [1, 1]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup, total", [(0, 0), (5, 5), (9, 5), (0, 1), (1, 1)])
def test_edges_do_not_divide_by_zero(schedule, warmup, total):
    values = rates(schedule, *range(12), warmup=warmup, total=total)
    assert all(0 < value <= 1 for value in values)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_stays_at_the_end(schedule):
    assert rates(schedule, 10, 11, 1000) == pytest.approx([0.1] * 3, abs=1e-7)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_falls_monotonically(schedule):
    values = rates(schedule, *range(20, 200), warmup=20, total=200, final_frac=0)
    assert all(a >= b for a, b in itertools.pairwise(values))
    assert values[0] == 1


def test_arithmetic_is_float32():
    """3e-4 has no exact binary form: a float64 result would differ in the ninth digit."""
    for schedule in SCHEDULES:
        for value in rates(schedule, *range(0, 100, 7), lr=3e-4, warmup=10, total=100):
            assert value == float(np.float32(value))
    lr, seven = np.float32(3e-4), np.float32(7)
    assert rates("linear", 6, lr=3e-4, warmup=10) == [float(lr * seven / np.float32(10))]
    assert rates("constant", 0, lr=3e-4) == [float(lr)]
