"""Products of activations and weights."""

import numpy as np
import pytest
from check_op import check_op, relative

from kernels import cpu


@pytest.mark.parametrize("N, C, OC", [(1, 1, 3), (1, 36, 70), (1, 771, 5), (5, 12, 20), (64, 48, 600), (300, 10, 130)])
def test_matmul(device, N, C, OC):
    for beta, adds in ((0, ("dbias",)), (1, ("dbias", "dweight"))):
        check_op(device, "matmul", dict(out=(N, OC)), adds, inp=(N, C), weight=(OC, C), bias=(OC,), beta=beta)
    check_op(device, "matmul", dict(out=(N, OC)), inp=(N, C), weight=(OC, C), bias=None)


def test_matmul_beta_adds_to_the_gradient():
    rng = np.random.default_rng(2)
    inp, weight, dout = (rng.standard_normal(shape) for shape in ((9, 16), (300, 16), (9, 300)))
    dinp, once, twice = np.empty_like(inp), np.empty_like(weight), np.empty_like(weight)
    cpu.matmul_backward(dinp, once, None, dout, inp, weight)
    cpu.matmul_backward(dinp, twice, None, dout, inp, weight)
    cpu.matmul_backward(dinp, twice, None, dout, inp, weight, beta=1)
    assert relative(twice, 2 * once) < 1e-15
    assert relative(once, dout.T @ inp) < 1e-15
