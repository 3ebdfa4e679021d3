"""benchmarks/scaling.py and scaling_model.py: formulas by hand, a table of made-up runs, and the page shows both."""

from argparse import Namespace

import pytest
import scaling
import scaling_model

from kernels import cpu
from llmc.errors import UserError
from train_banded import GPT2

RATES = scaling_model.arguments().parse([])
SMALL, LARGE = scaling_model.MODELS.values()  # 124M, 1558M
P = 124_475_904
PRINTED = """| num_processes         | 2                                                  |
val loss 10.9
step    1/4: train loss 10.900000 (5000.000000 ms, 204 tok/s)
step    2/4: train loss 10.800000 (3000.000000 ms, 341 tok/s)
step    3/4: train loss 10.700000 (2000.500000 ms, 511 tok/s)
step    4/4: train loss 10.600000 (2100.000000 ms, 487 tok/s)
total average iteration time: 3025.125000 ms
"""
FOUND = {
    "B": 4,
    "T": 128,
    "values": P,
    "ms": {"1": [[2000.0, 2100.0], [2200.0, 1900.0]]},
    "sums": {"2": [300.0, 320.0]},
}
FOUND["apart"] = {"2": [2000.0, 2200.0]}
FOUND["ms"]["2"] = [[2400.0, 2300.0], [2500.0, 2600.0]]


# ----------------------------------------------------------------------------------------------------------------------
# formulas


def test_a_sum_is_bytes_over_the_slower_link_and_hops():
    """8 GPUs: 7/4 of the bytes at 370 GB/s, 8.4 + 14 x 3.4 us a call; 8 nodes: 63/32, and 6 x 9.6 us more."""
    S = 1 << 26  # one call
    assert scaling_model.all_reduce([S], 1, RATES) == 0
    assert scaling_model.all_reduce([S], 8, RATES) == pytest.approx(7 / 4 * S / 370e9 + 56e-6)
    assert scaling_model.all_reduce([S], 64, RATES) == pytest.approx(63 / 32 * S / 370e9 + 113.6e-6)
    assert scaling_model.all_reduce([S + 1], 8, RATES) == pytest.approx(7 / 4 * S / 370e9 + 112e-6)
    assert scaling_model.all_reduce([S - 9, 9], 8, RATES) == pytest.approx(7 / 4 * S / 370e9 + 112e-6)
    slow = scaling_model.arguments().parse(["--network", "5"])
    assert scaling_model.all_reduce([S], 64, slow) == pytest.approx(63 / 32 * S / 40e9 + 113.6e-6)
    assert scaling_model.all_reduce([S], 2, slow) == pytest.approx(S / 370e9 + 15.2e-6)


def test_the_bytes_of_gradients():
    assert scaling_model.size(SMALL) == 4 * P
    beside, behind = scaling_model.pieces(SMALL)
    assert sum(beside) == 4 * 12 * 12 * 768**2 and len(beside) == 48
    assert behind == [4 * 768 * n for n in (50304 + 1024 + 24, 36, 36, 48, 14)]
    assert scaling_model.size(LARGE) == 4 * (1600 * (50304 + 1024 + 2) + 48 * (12 * 1600**2 + 13 * 1600))


def test_a_step_grows_with_its_flop():
    """124M at B=4 is what was measured; of 1558M a token has (6 N + 6 L C T) of it."""
    assert scaling_model.compute(SMALL, 4, RATES) == pytest.approx(0.0322)
    assert scaling_model.compute(SMALL, 1, RATES) == pytest.approx(0.0322 / 4)
    N = scaling_model.size(LARGE) // 4
    times = (6 * N + 6 * 48 * 1600 * 1024) / (6 * P + 6 * 12 * 768 * 1024)
    assert scaling_model.compute(LARGE, 4, RATES) == pytest.approx(0.0322 * times)


def test_what_overlap_hides():
    """All but what exceeds two thirds of the step, and never the embedding's; of zero 1 the second half stays."""
    beside, behind = scaling_model.pieces(SMALL)
    whole, last = (scaling_model.all_reduce(parts, 64, RATES) for parts in ([4 * P], behind))
    step = 0.0322
    assert whole < 2 / 3 * step
    assert scaling_model.waiting(SMALL, 4, 64, RATES, False) == whole
    assert scaling_model.waiting(SMALL, 4, 64, RATES, True) == last
    assert scaling_model.waiting(SMALL, 4, 64, RATES, True, 1) == pytest.approx((last + whole) / 2)
    assert scaling_model.efficiency(SMALL, 4, 64, RATES) == pytest.approx(step / (step + whole))
    slow = Namespace(**vars(RATES) | {"network": 1.0})
    left = scaling_model.all_reduce(beside, 64, slow) + scaling_model.all_reduce(behind, 64, slow)
    assert scaling_model.waiting(SMALL, 4, 64, slow, True) == pytest.approx(left - 2 / 3 * step) and left > 0.07


def test_where_it_ends():
    """By the batch: 2^19 tokens are 128 GPUs of 4 rows; by time: the last power of 2 above 0.8."""
    for B in (4, 8, 16):
        assert scaling_model.end_of("124M", B, RATES, False) == (512 // B, "batch")
        assert scaling_model.end_of("1558M", B, RATES, False) == (1024 // B, "batch")
    for name, config in scaling_model.MODELS.items():
        for B, overlap in ((1, False), (1, True) if name == "124M" else (2, False)):  # as the page says
            R, by = scaling_model.end_of(name, B, RATES, overlap)
            pair = [scaling_model.efficiency(config, B, count, RATES, overlap) for count in (R, 2 * R)]
            assert by == "time" and pair[0] >= 0.8 > pair[1]


def test_activations_are_those_of_the_trainer():
    """16 C floats a layer and token, and the logits, are within 1.5 % of what train_banded.py allocates."""
    for recompute in (False, True):
        model = object.__new__(GPT2)  # without its weights
        model.ops, model.config, model.B, model.T = cpu, SMALL, 4, scaling_model.T
        counted = scaling_model.memory(SMALL, 4, 1, 0, recompute) - scaling_model.memory(SMALL, 0, 1, 0, recompute)
        assert counted == pytest.approx(model.activation_bytes(recompute), rel=0.015)


def test_zero_divides_the_moments():
    assert scaling_model.memory(SMALL, 0, 8, 0) == 16 * P
    assert scaling_model.memory(SMALL, 0, 8, 1) == 8 * P + P
    assert scaling_model.rows_that_fit(LARGE, 8, 1) > scaling_model.rows_that_fit(LARGE, 8, 0) > 1


# ----------------------------------------------------------------------------------------------------------------------
# the measurement


def test_step_times_leave_the_first_out():
    assert scaling.step_times(PRINTED) == [2000.5, 2100.0]
    with pytest.raises(UserError, match="fewer than 3 steps"):
        scaling.step_times(PRINTED.partition("step    3/4")[0])


def test_the_table_of_made_up_runs():
    """Medians 2050, 2450 and apart 2100 ms, 2 x 2050 / (2050 + 310) predicted; 310 ms for the bytes once each way."""
    results = {"machine": "a machine", "cores": 2, "sizes": {"124M": FOUND}}
    one, two = scaling.table(results).splitlines()[2:]
    assert one == "| 124M, B=4 T=128 | 1 | 2050 | 250 | 1.00 |  |  |  |  |"
    assert two == "| 124M, B=4 T=128 | 2 | 2450 | 418 | 1.67 (1.61 .. 1.74) | 1.95 | 1.74 | 310.0 | 1.6 |"
    assert "Two ranks of 124M with one thread each, B=4 T=128 a rank, do 1.67 times the" in scaling.answer(results)
    assert scaling.block(results).startswith("\na machine.\n\n| model,") and scaling.block(results).endswith("1.7.\n\n")
    assert scaling.answer({"sizes": {"tiny": FOUND}}) == "" and "make bench_scaling" in scaling.block(None)


def test_more_ranks_than_cores_are_told():
    """Four on two cores: each rank's 2050 ms become 4100, and a sum of 400 comes on top."""
    found = FOUND | {"sums": {"4": [400.0]}, "apart": {"4": [4100.0]}, "ms": {"1": FOUND["ms"]["1"], "4": [[5000.0]]}}
    results = {"machine": "a machine", "cores": 2, "sizes": {"124M": found | {"ms": found["ms"] | {"2": [[2450.0]]}}}}
    assert scaling.answer(results).endswith("4 ranks had 2 cores: what they show is what more ranks than cores cost.\n")
    four = scaling.rows("124M", found, 2)[1].split(" | ")
    assert four[4:8] == ["1.64 (1.64 .. 1.64)", "2.00", "1.82", "400.0"]
    assert scaling.rows("124M", found, 4)[1].split(" | ")[6] == "3.35"  # 4 x 2050 / 2450


def test_numbers_of_ranks():
    assert scaling.counts_of("1,2,4") == [1, 2, 4]
    for wrong in ("2,1", "1,1", "1,x", "", "1,0"):
        with pytest.raises(UserError, match="--ranks"):
            scaling.counts_of(wrong)


# ----------------------------------------------------------------------------------------------------------------------
# the page


def test_the_page_shows_what_the_scripts_print():
    page = scaling_model.PAGE.read_text()
    assert page == scaling_model.with_block(page, scaling_model.BEGIN, scaling_model.text(RATES)), (
        "run: python benchmarks/scaling_model.py"
    )
    assert page == scaling_model.with_block(page, scaling.BEGIN, scaling.block(scaling.saved())), (
        "run: python benchmarks/scaling.py --no-runs"
    )


def test_other_rates_are_printed_only(capsys):
    before = scaling_model.PAGE.read_bytes()
    assert scaling_model.main(["--bucket", "256"]) == 0
    assert "GB, 256 MiB a call at most. A node" in " ".join(capsys.readouterr().out.split())
    assert scaling_model.PAGE.read_bytes() == before


def test_a_full_measurement_is_kept_and_written(monkeypatch, tmp_path):
    """And --no-runs writes the same page from what was kept; a part of it writes nothing."""
    before, page = scaling.PAGE.read_text(), tmp_path / "scaling.md"
    page.write_text(before)
    for name, value in (("PAGE", page), ("RESULTS", tmp_path / "scaling.json"), ("measure", lambda *_: FOUND)):
        monkeypatch.setattr(scaling, name, value)
    for part in ("--sizes tiny", "--ranks 1,2", "--steps 3"):
        assert scaling.main(part.split()) == 0 and page.read_text() == before and scaling.saved() is None
    assert scaling.main([]) == 0
    written = page.read_text()
    assert scaling.saved()["sizes"] == {"tiny": FOUND, "124M": FOUND} and "do 1.67 times" in " ".join(written.split())
    page.write_text(before)
    assert scaling.main(["--no-runs"]) == 0 and page.read_text() == written
