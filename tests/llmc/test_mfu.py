"""--mfu: llm.c's formula, worked out by hand, and the line that it adds."""

import re

import pytest
import tiny
from tiny import done

import train_banded
import train_sparse_attn
import train_toroidal
from kernels.cuda.runtime import roofline
from llmc import mfu
from llmc.checkpoint import DeepSeekConfig, GPT2Config, num_parameters

H100 = "NVIDIA H100 80GB HBM3"


def test_flops_of_gpt2():
    """124M: 38,633,472 of wte, 786,432 of wpe, 12 layers of 7,087,872, 1,536 of the last layernorm."""
    config = GPT2Config()
    assert num_parameters(config) == 38_633_472 + 786_432 + 12 * 7_087_872 + 1_536 == 124_475_904
    # 6 * 124,475,904 = 746,855,424; 6 * 12 * 768 * 1024 = 56,623,104
    assert mfu.flops_per_token(config, 1024) == 746_855_424 + 56_623_104 == 803_478_528
    assert mfu.flops_per_token(config, 64) == 746_855_424 + 3_538_944


def test_experts_count_as_they_are_taken():
    """2 of 8 experts of 2*48*32 weights in 3 layers: six idle ones, 55,296 parameters, do not count."""
    config = DeepSeekConfig(maxT=64, V=256, L=3, NH=2, C=32, Vp=256, F=48, E=8, top=2)
    assert mfu.flops_per_token(config, 64) == 6 * (num_parameters(config) - 55_296) + 6 * 3 * 32 * 64


@pytest.mark.parametrize(
    "tf32, milliseconds, line",
    [
        # 4096 tokens of 803,478,528: 3.29105 TFLOP; in 32.2 ms 102.21 TFLOP/s of 494.7, in 84.4 ms 38.99 of 67
        (True, 32.2, "20.7% TF32 MFU"),
        (False, 84.4, "58.2% float32 MFU"),
    ],
)
def test_line_of_the_h100(tf32, milliseconds, line):
    assert mfu.described(H100, tf32, GPT2Config(), 4096, 1024, milliseconds / 1000) == line


@pytest.mark.parametrize("card", ["CPU", "NVIDIA H100", "NVIDIA GeForce RTX 5090"])
def test_unknown_card(card):
    assert mfu.described(card, False, GPT2Config(), 4096, 1024, 0.1) == f"MFU unknown for {card}"


def test_no_tf32_before_ampere():
    assert mfu.mfu("Tesla T4", True, GPT2Config(), 4096, 1024, 1.0) is None
    # 3.29105 TFLOP a second of 8.1
    assert mfu.mfu("Tesla T4", False, GPT2Config(), 4096, 1024, 1.0) == pytest.approx(0.40630, abs=1e-5)


def test_card_is_cut_from_what_a_device_says():
    assert mfu.card_name(f"{H100}, 532 of 81079 MiB used") == H100


def test_promises_are_those_of_the_roofline():
    names = {"A100": "NVIDIA A100-SXM4-80GB", "H100": H100, "RTX 4090": "NVIDIA GeForce RTX 4090"}
    assert {short: (mfu.CARDS[name].float32, mfu.CARDS[name].tf32) for short, name in names.items()} == {
        short: (teraflops, tensor) for short, (_, teraflops, tensor) in roofline.GPUS.items()
    }


def test_promises_are_near_llm_c_s():
    """mfu.h: TF32 of the generation's base card, scaled by tensor cores and boost clock in MHz."""
    hopper, ampere = (378.0, 456, 1620), (156.0, 432, 1410)
    for card, (teraflops, cores, clock), own_cores, own_clock in (
        (H100, hopper, 528, 1830),
        ("NVIDIA H100 PCIe", hopper, 456, 1620),
        ("NVIDIA A100-SXM4-80GB", ampere, 432, 1410),
    ):
        theirs = teraflops * own_cores / cores * own_clock / clock
        assert mfu.CARDS[card].tf32 == pytest.approx(theirs, rel=0.01)


TRAINERS = [(train_banded, "-w 16"), (train_sparse_attn, "-k 4"), (train_toroidal, "--layers 0 --train all")]


@pytest.mark.parametrize("trainer, flags", TRAINERS, ids=[trainer.__name__ for trainer, _ in TRAINERS])
def test_the_flag_adds_lines_and_changes_none(folder, capfdbinary, trainer, flags):
    argv = [*tiny.options(), *flags.split(), *["-n", "3", "-m", "1", "-s", "0", "-v", "0", "--grad-clip", "1"]]
    plain = done(tiny.call(capfdbinary, trainer.main, *argv)).out
    with_mfu = done(tiny.call(capfdbinary, trainer.main, *argv, "--mfu", 1)).out
    lines = with_mfu.splitlines()
    places = [i for i, line in enumerate(lines) if line == "MFU unknown for CPU"]
    assert len(places) == 3 and "MFU" not in plain
    assert all(re.match(r"step +\d/3: train loss", lines[i - 1]) for i in places)

    def steady(text):
        text = re.sub(r"memory.*|activations: .*|selection: .*", "", tiny.without_times(text))
        return text.splitlines()

    assert steady("\n".join(line for line in lines if "MFU" not in line)) == steady(plain)


def test_the_card_is_the_device_s(folder, capfdbinary, monkeypatch):
    monkeypatch.setattr(train_banded.kernels.cpu, "describe", lambda: f"{H100}, 532 of 81079 MiB used")
    monkeypatch.setitem(mfu.CARDS, H100, mfu.Promise(0.01, 0))  # in proportion to the model
    argv = [*tiny.options(), *["-n", "2", "-m", "1", "-s", "0", "-v", "0", "--mfu", "1", "--grad-accum", "3"]]
    out = done(tiny.call(capfdbinary, train_banded.main, *argv)).out
    steps = re.findall(r"\(([\d.]+) ms, .*\n(.*)", out)
    assert len(steps) == 2
    for milliseconds, line in steps:
        flops = mfu.flops_per_token(tiny.CONFIG, tiny.T) * 3 * tiny.B * tiny.T
        expected = 100 * flops / (float(milliseconds) / 1000) / 0.01e12
        found = float(line.removesuffix("% float32 MFU"))
        assert found == pytest.approx(expected, abs=0.051) and found > 0.1
