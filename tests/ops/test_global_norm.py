"""The norm of all gradients."""

import numpy as np
import pytest
from check_op import check_twin, nan, rounded

from kernels import cpu


def test_global_norm():
    grads, norm = np.random.default_rng(9).standard_normal(300_000, np.float32), np.zeros(1, "f")
    cpu.global_norm(norm, grads)
    assert abs(norm[0] / np.linalg.norm(grads.astype(np.float64)) - 1) < 1e-6
    cpu.global_norm(norm, np.array([3.0, 4.0], "f"))
    assert norm[0] == 5.0


# ----------------------------------------------------------------------------------------------------------------------
# on CUDA: the emulator, and a GPU if there is one


@pytest.mark.parametrize("n, offset", [(1, 0), (5000, 0), (263_000, 0), (1001, 1)])
def test_global_norm_on_cuda(runtime, n, offset):
    check_twin(runtime, "global_norm", nan(1), rounded(n), offset=offset)
