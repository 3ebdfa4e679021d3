"""Softmax, cross-entropy and its gradient in one pass."""

import numpy as np
import pytest
from check_op import check_gradients, check_twin, nan, place, rounded

from kernels import cpu, cuda

SIZES = [  # N, V, Vp
    (1, 3, 3), (6, 11, 16), (40, 50257, 50304), (1, 1, 4), (3, 5, 8), (2, 510, 512), (2, 3001, 3001), (4, 1000, 1003),
]  # fmt: skip


@pytest.mark.parametrize("N, V, Vp", SIZES)
def test_fused_classifier(N, V, Vp):
    targets, dloss = np.random.default_rng(7).integers(0, V, N), 1 / N
    grads = {}

    def forward(logits):
        losses, work = np.empty(N, logits.dtype), logits.copy()
        cpu.fused_classifier(losses, work, targets, V, dloss)
        grads[logits.dtype.char] = work
        return (losses,)

    def backward(dout, saved, logits):
        forward(logits)
        return dict(logits=grads[logits.dtype.char] / dloss * dout[:, None])

    check_gradients(forward, backward, logits=(N, Vp))
    assert not grads["f"][:, V:].any()
    assert abs(grads["d"].sum()) < 1e-12  # each row of softmax - onehot sums to 0


def test_fused_classifier_of_equal_logits_is_log_V():
    losses, logits = np.empty(2), np.full((2, 64), 1000.0)
    cpu.fused_classifier(losses, logits, np.array([0, 49]), 50, 1.0)
    assert np.abs(losses - np.log(50)).max() < 1e-12
    assert np.abs(logits[1, [0, 49, 50]] - [0.02, 0.02 - 1, 0]).max() < 1e-15


# ----------------------------------------------------------------------------------------------------------------------
# on CUDA: the emulator, and a GPU if there is one


@pytest.mark.parametrize("N, V, Vp", SIZES)
def test_fused_classifier_on_cuda(runtime, N, V, Vp):
    logits, targets = 5 * rounded(N, Vp), np.random.default_rng(1).integers(0, V, N).astype(np.int32)
    logits[:, V:] = np.inf  # padding may hold anything
    check_twin(runtime, "fused_classifier", nan(N), logits, targets, V, 1 / N)


def test_fused_classifier_of_large_logits_and_a_target_outside(runtime):
    logits = np.array([[1e4, 0, -1e4, 0], [-1e30, -1e30, 1e30, 0], [0, 0, 0, 0]])
    targets = np.array([0, 2, 3], np.int32)
    ours = [place(runtime, array, 0) for array in (nan(3), logits, targets)]
    cuda.device(runtime).fused_classifier(*ours, 3, 1.0)
    losses, gradient = (runtime.to_host(array) for array in ours[:2])
    assert losses[:2].tolist() == [0, 0] and np.isnan(losses[2])
    assert not gradient[:2].any()
