"""Tokens on their way to experts, for the tests of the mixture's ops."""

import numpy as np
from check_op import nan, rounded

from kernels import cpu
from kernels.cpu.deepseek.expert_plan import expert_rows


def router(logits, top):
    """probs, gates, experts"""
    (N, E), dtype = logits.shape, logits.dtype
    probs, gates, experts = (
        np.full((N, E), np.nan, dtype),
        np.full((N, top), np.nan, dtype),
        np.full((N, top), 99, np.int32),
    )
    cpu.router_forward(probs, gates, experts, logits)
    return probs, gates, experts


def plan(experts, E):
    """slot, source, tile_expert, load"""
    rows, tile = expert_rows(*experts.shape, E)
    slot, source = np.full(experts.shape, 99, np.int32), np.full(rows, 99, np.int32)
    tile_expert, load = np.full(rows // tile, 99, np.int32), np.full(E, 99, np.int32)
    cpu.expert_plan(slot, source, tile_expert, load, experts)
    return slot, source, tile_expert, load


def whole(*shape) -> np.ndarray:
    """Integers that an op has to overwrite."""
    return np.full(shape, 99, np.int32)


def routed(N, E, top, seed=0):
    """probs, gates, experts of random logits, float64"""
    probs, gates, experts = nan(N, E), nan(N, top), whole(N, top)
    cpu.router_forward(probs, gates, experts, rounded(N, E, seed=seed))
    return probs.astype(np.float32).astype(np.float64), gates.astype(np.float32).astype(np.float64), experts


def planned(experts, E):
    """slot, source, tile_expert, load"""
    rows, tile = expert_rows(*experts.shape, E)
    outs = whole(*experts.shape), whole(rows), whole(rows // tile), whole(E)
    cpu.expert_plan(*outs, experts)
    return outs
