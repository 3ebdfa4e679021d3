"""The table of kernels/cuda/README.md: it is today's, lists every kernel, and its sizes are GPT-2 124M's."""

import numpy as np

from kernels.cpu.band.band_mask import band_mask
from kernels.cuda.runtime import roofline
from llmc.checkpoint import GPT2Config, num_parameters

SIZES = roofline.sizes(B=4, T=1024)


def test_the_readme_shows_the_table_of_these_kernels():
    text = roofline.README.read_text()
    assert text == roofline.with_table(text), "run: make roofline"
    assert roofline.kernels_without_row() == set()


def test_sizes():
    assert SIZES["P"] == num_parameters(GPT2Config()) == 124_475_904
    weight = np.ones((1, 4 * 768, 768), np.float32)
    band_mask(weight, 256)
    assert SIZES["K"] == np.count_nonzero(weight)
    # 64 hidden units are 16 channels: their bands cover 16 + 64 channels, fewer at the two ends
    assert 0.97 * 80 * 4 * 768 < SIZES["A1"] < 80 * 4 * 768


def test_bounds():
    """AdamW moves 28 bytes a parameter: 3485 MB, 1.71 ms at 2039 GB/s; the forward attention is bound by arithmetic."""
    rows = {line.split(" | ")[0][2:]: line.split(" | ") for line in roofline.table(SIZES).splitlines() if " | " in line}
    assert rows["adamw"][5] == "3485.33" and rows["adamw"][7] == "1709.3 m"
    assert rows["attention_forward_3xtf32_64"][7] == f"{3 * 2 * 4096 * 768 * 1025 / 156e6:.1f} c"
    assert rows["attention_forward_64"][7] == f"{2 * 4096 * 768 * 1025 / 19.5e6:.1f} c"
