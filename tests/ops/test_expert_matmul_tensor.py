"""Products of experts on tensor cores: the emulator as a GPU that has them, in TF32 and 3xTF32, and a GPU if any."""

import numpy as np
import pytest
from check_op import TOL_TENSOR, check_twin, nan, place, rounded
from routing import planned, routed

from kernels import cuda


@pytest.mark.parametrize("N, E, top, C, OC, offset", [
    (1, 1, 1, 1, 1, 0), (1, 4, 2, 5, 3, 0), (9, 4, 2, 12, 20, 0), (70, 3, 2, 33, 66, 0), (66, 5, 1, 68, 36, 1),
    (64, 4, 2, 64, 16, 0), (5, 9, 2, 8, 8, 0),
])  # fmt: skip
def test_products(tensor_cores, N, E, top, C, OC, offset):
    """As test_expert_matmul.py's: some experts without tokens, and tiles without an expert."""
    _, _, experts = routed(N, E, top)
    _, source, tile_expert, _ = planned(experts, E)
    inp, weight = rounded(len(source), C), rounded(E, OC, C, seed=1)
    dout = rounded(len(source), OC, seed=2)
    inp[source < 0] = dout[source < 0] = 0
    options = dict(offset=offset, tol=TOL_TENSOR[tensor_cores.tf32])
    check_twin(tensor_cores, "expert_matmul_forward", nan(len(source), OC), inp, weight, tile_expert, **options)
    for beta in (0, 1):
        dweight = rounded(E, OC, C, seed=3) if beta else nan(E, OC, C)
        args = dweight, dout, inp, weight, tile_expert, beta
        check_twin(tensor_cores, "expert_matmul_backward", nan(len(source), C), *args, **options)
    check_twin(tensor_cores, "expert_matmul_backward", None, nan(E, OC, C), dout, inp, weight, tile_expert, **options)


def test_a_row_has_the_same_bits_in_every_place(tensor_cores):
    """Whatever the others of its tile hold."""
    C, OC, tile = 40, 24, 64
    row, weight, tile_expert = rounded(C), rounded(1, OC, C), np.zeros(1, np.int32)
    found = []
    for at in (0, 7, 8, 25, 63):
        inp = rounded(tile, C, seed=at)
        inp[at] = row
        out = place(tensor_cores, nan(tile, OC), 0)
        given = (place(tensor_cores, array, 0) for array in (inp, weight, tile_expert))
        cuda.device(tensor_cores).expert_matmul_forward(out, *given)
        found.append(tensor_cores.to_host(out)[at].tobytes())
    assert len(set(found)) == 1
