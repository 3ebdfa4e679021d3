"""Products of all experts in one launch."""

import numpy as np
import pytest
from check_op import check_twin, nan, rounded
from routing import planned, routed

from kernels.cpu.deepseek.expert_matmul import alike_rows


@pytest.mark.parametrize("C, OC", [(256, 1024), (33, 129), (64, 64)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_alike_rows(C, OC, dtype):
    """Among as many rows as the trial finds, a row has the same bits in every place, whatever the others hold."""
    step, rng = alike_rows(64, C, OC, np.dtype(dtype)), np.random.default_rng(1)
    weight, row = rng.standard_normal((OC, C)).astype(dtype), rng.standard_normal(C).astype(dtype)
    results = []
    for place in range(step):
        rows = rng.standard_normal((step, C)).astype(dtype)
        rows[place] = row
        results.append((weight @ rows.T)[:, place].copy())
    assert all(np.array_equal(result, results[0]) for result in results)


# ----------------------------------------------------------------------------------------------------------------------
# on CUDA: the emulator, and a GPU if there is one


@pytest.mark.parametrize("N, E, top, C, OC, offset", [
    (1, 1, 1, 1, 1, 0), (1, 4, 2, 5, 3, 0), (9, 4, 2, 12, 20, 0), (70, 3, 2, 33, 130, 0), (66, 5, 1, 132, 36, 1),
    (64, 4, 2, 64, 128, 0), (5, 9, 2, 8, 8, 0),
])  # fmt: skip
def test_expert_matmul(runtime, N, E, top, C, OC, offset):
    """All experts in one launch, some without tokens (5 tokens, 9 experts), and tiles without an expert."""
    _, _, experts = routed(N, E, top)
    _, source, tile_expert, _ = planned(experts, E)
    inp, weight = rounded(len(source), C), rounded(E, OC, C, seed=1)
    dout = rounded(len(source), OC, seed=2)
    inp[source < 0] = dout[source < 0] = 0
    check_twin(runtime, "expert_matmul_forward", nan(len(source), OC), inp, weight, tile_expert, offset=offset)
    for beta in (0, 1):
        dweight = rounded(E, OC, C, seed=3) if beta else nan(E, OC, C)
        args = dweight, dout, inp, weight, tile_expert, beta
        check_twin(runtime, "expert_matmul_backward", nan(len(source), C), *args, offset=offset)
    check_twin(runtime, "expert_matmul_backward", None, nan(E, OC, C), dout, inp, weight, tile_expert, offset=offset)
