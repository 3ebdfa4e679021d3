"""The norm of all gradients."""

import numpy as np
import pytest
from check_op import check_twin, rounded

from kernels import cpu


def test_global_norm():
    grads = np.random.default_rng(9).standard_normal(300_000, np.float32)
    assert abs(cpu.global_norm(grads) / np.linalg.norm(grads.astype(np.float64)) - 1) < 1e-6
    assert cpu.global_norm(np.array([3.0, 4.0], "f")) == 5.0


# ----------------------------------------------------------------------------------------------------------------------
# on CUDA: the emulator, and a GPU if there is one


@pytest.mark.parametrize("n, offset", [(1, 0), (5000, 0), (263_000, 0), (1001, 1)])
def test_global_norm_on_cuda(runtime, n, offset):
    check_twin(runtime, "global_norm", rounded(n), offset=offset)
