"""benchmarks/predicted.py: doc/gpu.md shows today's tables, and their arithmetic is that of the measured parts."""

import predicted
import pytest
import sparse_cost

from kernels.cuda.runtime.roofline import sizes


def test_the_page_shows_the_tables_of_these_kernels():
    page = predicted.PAGE.read_text()
    assert page == predicted.with_tables(page), "run: make roofline"


def test_steps():
    """32.2 - 13.0 of attention + 12 x 255 us - 0.3 of sums; bands 12 x (1385 - 297) us less; a graph 0.82 less."""
    assert predicted.predicted_step("TF32", "dense") == pytest.approx((21.96, 21.96, 21.14))
    assert predicted.predicted_step("TF32", "banded") == pytest.approx((30.86, 17.804, 16.984))
    assert predicted.predicted_step("float32", "banded") == pytest.approx((65.98, 54.604, 53.784))


def test_bounds():
    """The forward of B=1 T=16384: 2 NC(T + 1) FLOP at 494.7 TFLOP/s, a third of it in 3xTF32; 67 on CUDA cores."""
    flop, names = 2e-6 * 16384 * 768 * 16385, sizes(1, 16384)
    for tensor, teraflops in (("_tf32", 494.7), ("_3xtf32", 494.7 / 3), ("", 67)):
        assert predicted.bound("forward", tensor, names) == pytest.approx(flop / teraflops)
    assert predicted.bound("forward", "_tf32", sizes(4, 1024)) == pytest.approx(4e-3 * 4096 * (4 * 768 + 12) / 3350)


def test_decoded_tokens():
    """Weights of 149 us, 2 us a launch; 1000 keys are 16 tiles in one block, 2 tiles in each of 8."""
    weights = 4 * 124_475_904 / 3350e3
    assert predicted.decoded_token(1000, False, False) == (159, pytest.approx(weights + 2 * 159 + 12 * 16))
    assert predicted.decoded_token(1000, True, True) == (135, pytest.approx(weights + 2 * 135 + 12 * 2))
    assert predicted.decoded_token(512, True, True) == (135, pytest.approx(weights + 2 * 135 + 12 * 2))
    assert predicted.decoded_token(512, False, True) == (123, pytest.approx(weights + 2 * 123 + 12 * 8))


def test_cost_of_sparse_kernels():
    """2 u N C (T + 1) FLOP at 140 T / (T + 900) TFLOP/s, and a launch; bytes where they take longer."""
    rates, proof = sparse_cost.arguments().parse([]), sparse_cost.PROOFS[0]
    flop = 2 * 0.43 * 4096 * 768 * 4097
    expected = flop / (140e6 * 4096 / 4996) + 4
    assert sparse_cost.microseconds("union_forward_tf32_64", proof, rates) == pytest.approx(expected)
    twice = sparse_cost.arguments().parse(["--tflops", "280", "--launch", "1", "--l2", "99"])
    assert sparse_cost.microseconds("union_forward_tf32_64", proof, twice) == pytest.approx((expected - 4) / 2 + 1)
    read = 4 * (4096 * 4096 / 2 + 4096 * 256 + 2 * 4096) / 2.8e6  # a row of scores, to memory at least
    written = 4 * (4096 * 4096 / 2 + 4096 * 256 + 2 * 4096) / 5.5e6
    assert sparse_cost.microseconds("select_topk", proof, rates) == pytest.approx(max(read, written) + 4)


def test_the_model_is_near_what_proofs_took():
    """Within a third from 100 us on, where a launch is no large part."""
    rates = sparse_cost.arguments().parse([])
    for proof in sparse_cost.PROOFS:
        for part in ("forward", "dq", "dkdv"):
            took = getattr(proof, part)
            model = sparse_cost.microseconds(f"union_{part}_tf32_64", proof, rates)
            assert took < 100 or model == pytest.approx(took, rel=1 / 3), (proof, part)


def test_steps_of_sparse_attention():
    """All else is 25.6 - 16.07 ms at T = 4096; no attention at all would leave 0.74 of the dense step."""
    rates, proof = sparse_cost.arguments().parse([]), sparse_cost.PROOFS[0]
    dense, sparse = sparse_cost.step(proof, rates)
    parts = sparse_cost.layer(proof, rates)
    assert dense == pytest.approx(9.532 + 4 * 0.839)
    assert sparse - 9.532 == pytest.approx(0.004 * (parts["forward"] + parts["backward"] + parts["learning"]))
    assert sparse_cost.without_attention(4096) == pytest.approx(9.532 / dense)
