"""benchmarks/predicted.py: doc/gpu.md shows today's tables, and their arithmetic is that of the measured parts."""

import predicted
import pytest

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
