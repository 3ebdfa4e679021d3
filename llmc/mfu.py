"""Model FLOPs utilization as llm.c prints it (llmc/mfu.h and gpt2_estimate_mfu of train_gpt2.cu).

    MFU = (6 N + 6 L C T) * tokens / seconds / promised

N parameters: a multiplication and an addition in forward, twice as many in backward. Attention adds 6 L C T a token,
half of what all T keys would cost, as causal attention skips the others. It is GPT-2's count whatever a run leaves out:
with bands or few keys the same model in less time has a higher MFU. Of experts only those count that a token takes.

Promised is what the card's maker does: float32 outside tensor cores, or TF32 without NVIDIA's 2:4 sparsity (most data
sheets give it with that, which doubles it). llm.c scales TF32 figures by cores and clock, for A100 and H100 within 1%
of these, and takes them for float32 as well.
"""

from typing import NamedTuple

from llmc.checkpoint import DeepSeekConfig, GPT2Config, num_parameters


class Promise(NamedTuple):
    """TFLOP/s of dense products at the boost clock; 0 where there is no such mode."""

    float32: float
    tf32: float


# NVIDIA's data sheets of these cards; for GeForce the architecture papers on Ampere GA102 and Ada; TF32 of the H100
# from the Hopper architecture paper, which gives it dense. Names as the driver spells them
V100, V100_PCIE = Promise(15.7, 0), Promise(14.0, 0)
A100, H100, H100_PCIE = Promise(19.5, 156.0), Promise(67.0, 494.7), Promise(51.2, 378.0)
CARDS = {
    "Tesla V100-SXM2-16GB": V100,
    "Tesla V100-SXM2-32GB": V100,
    "Tesla V100-PCIE-16GB": V100_PCIE,
    "Tesla V100-PCIE-32GB": V100_PCIE,
    "Tesla T4": Promise(8.1, 0),
    "NVIDIA A10": Promise(31.2, 62.5),
    "NVIDIA A30": Promise(10.3, 82.0),
    "NVIDIA A40": Promise(37.4, 74.8),
    "NVIDIA A100-SXM4-40GB": A100,
    "NVIDIA A100-SXM4-80GB": A100,
    "NVIDIA A100-PCIE-40GB": A100,
    "NVIDIA A100 80GB PCIe": A100,
    "NVIDIA L4": Promise(30.3, 60.0),
    "NVIDIA L40S": Promise(91.6, 183.0),
    "NVIDIA H100 80GB HBM3": H100,
    "NVIDIA H100 PCIe": H100_PCIE,
    "NVIDIA H200": H100,
    "NVIDIA RTX A6000": Promise(38.7, 77.4),
    "NVIDIA RTX 6000 Ada Generation": Promise(91.1, 182.1),
    "NVIDIA GeForce RTX 3080": Promise(29.8, 29.8),
    "NVIDIA GeForce RTX 3090": Promise(35.6, 35.6),
    "NVIDIA GeForce RTX 4080": Promise(48.7, 48.7),
    "NVIDIA GeForce RTX 4090": Promise(82.6, 82.6),
}


def card_name(described: str) -> str:
    """The card, or CPU, in what Device.describe() says: its words up to the first comma."""
    return described.partition(",")[0]


def promised(card: str, tf32: bool) -> float:
    """The FLOP/s that a card is said to do, 0 if it is unknown."""
    known = CARDS.get(card, Promise(0, 0))
    return 1e12 * (known.tf32 if tf32 else known.float32)


def flops_per_token(config: GPT2Config, T: int) -> int:
    """Of forward and backward, in rows of T tokens."""
    N = num_parameters(config)
    if isinstance(config, DeepSeekConfig):
        N -= (config.E - config.top) * config.L * 2 * config.F * config.C  # experts that a token does not take
    return 6 * N + 6 * config.L * config.C * T


def mfu(card: str, tf32: bool, config: GPT2Config, tokens: int, T: int, seconds: float) -> float | None:
    """The part of the card's promise that a step of so many tokens in so many seconds used; None if it is unknown."""
    peak = promised(card, tf32)
    return flops_per_token(config, T) * tokens / seconds / peak if peak else None


def described(card: str, tf32: bool, config: GPT2Config, tokens: int, T: int, seconds: float) -> str:
    """The line behind a step's: "20.7% TF32 MFU"."""
    part = mfu(card, tf32, config, tokens, T, seconds)
    return f"MFU unknown for {card}" if part is None else f"{100 * part:.1f}% {'TF32' if tf32 else 'float32'} MFU"
