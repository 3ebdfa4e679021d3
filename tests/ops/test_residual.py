"""The residual sum."""

import pytest
from check_op import check_op, place, relative, rounded

from kernels import cuda


@pytest.mark.parametrize("n, offset", [(1, 0), (4, 0), (1027, 0), (64, 1), (63, 3)])
def test_residual(device, n, offset):
    check_op(device, "residual", dict(out=(n,)), (), offset, inp1=(n,), inp2=(n,))


def test_residual_in_place(runtime):
    inp = rounded(77)
    x, y = place(runtime, inp, 0), place(runtime, inp, 0)
    cuda.device(runtime).residual_forward(y, y, x)
    assert relative(runtime.to_host(y), 2 * inp) == 0
