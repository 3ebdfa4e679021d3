"""Token and position embeddings."""

import numpy as np
import pytest
from check_op import check_op, check_twin, nan, rounded

from kernels import cpu, cuda


@pytest.mark.parametrize("B, T, C, V, offset", [
    (1, 1, 4, 5, 0), (3, 5, 8, 6, 0), (2, 33, 12, 50, 0), (1, 1, 1, 3, 0), (2, 33, 12, 50, 1), (2, 70, 7, 5, 0),
    (1, 3, 1100, 4, 0),
])  # fmt: skip
def test_encoder(device, B, T, C, V, offset):
    tokens = np.random.default_rng(1).integers(0, V, (B, T)).astype(np.int32)  # repeats: B*T > V in some cases
    outs, adds = dict(out=(B * T, C)), ("dwte", "dwpe")
    check_op(device, "encoder", outs, adds, offset, inp=tokens, wte=(V, C), wpe=(T + 2, C))


def test_encoder_refuses_tokens_outside_the_embedding():
    out, wte, wpe = np.zeros((2, 4)), np.zeros((5, 4)), np.zeros((2, 4))
    for tokens in ([[0, 5]], [[-1, 0]]):
        with pytest.raises(IndexError, match=r"rows 0\.\.4"):
            cpu.encoder_forward(out, np.array(tokens, np.int32), wte, wpe)


# ----------------------------------------------------------------------------------------------------------------------
# on CUDA: the emulator, and a GPU if there is one


@pytest.mark.parametrize("B, T, C, V, start", [(3, 5, 8, 6, 2), (2, 70, 7, 5, 1)])
def test_encoder_of_later_positions(runtime, B, T, C, V, start):
    tokens = np.random.default_rng(1).integers(0, V, (B, T)).astype(np.int32)
    check_twin(runtime, "encoder_forward", nan(B * T, C), tokens, rounded(V, C), rounded(T + 2, C), start)


def test_encoder_gives_nan_for_tokens_outside_the_embedding(runtime):
    device = cuda.device(runtime)
    tokens, out = runtime.to_device(np.array([[0, 5, 4, -1]], np.int32)), runtime.zeros((4, 8))
    wte, wpe = runtime.to_device(np.ones((5, 8), np.float32)), runtime.zeros((4, 8))
    device.encoder_forward(out, tokens, wte, wpe)
    assert np.isnan(runtime.to_host(out)).all(axis=1).tolist() == [False, True, False, True]
    device.encoder_backward(wte, wpe, runtime.to_device(np.ones((4, 8), np.float32)), tokens)
    assert runtime.to_host(wte)[:, 0].tolist() == [2, 1, 1, 1, 2]
