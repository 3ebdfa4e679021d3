"""MLA's products for each head on tensor cores: the emulator as a GPU that has them, and a GPU if any."""

import pytest
from check_op import TOL_TENSOR, check_twin, nan, rounded

from kernels import cuda

SIZES = [  # n, NH, hs, R, kv_rank, start, offset
    (9, 1, 2, 2, 1, 0, 0), (70, 2, 12, 4, 68, 3, 0), (9, 3, 13, 4, 7, 40, 0), (66, 2, 20, 8, 36, 0, 1),
    (10, 2, 72, 8, 130, 900, 0), (64, 3, 10, 4, 6, 0, 0),
]  # fmt: skip


@pytest.mark.parametrize("n, NH, hs, R, kv_rank, start, offset", SIZES)
def test_absorb_and_expand(tensor_cores, n, NH, hs, R, kv_rank, start, offset):
    """Heads without a plain dimension, sizes that are no multiples of four, tiles that are not full."""
    q, kvbw, olat = rounded(n, NH * hs), rounded(NH * (2 * hs - R), kv_rank), rounded(n, NH, kv_rank)
    options = dict(offset=offset, tol=TOL_TENSOR[tensor_cores.tf32])
    check_twin(tensor_cores, "mla_absorb", nan(n, NH, kv_rank + R), q, kvbw, NH, R, start, **options)
    check_twin(tensor_cores, "mla_expand", nan(n, NH * hs), olat, kvbw, NH, R, **options)


@pytest.mark.parametrize("n, tensor", [(1, False), (8, False), (9, True), (200, True)])
def test_few_queries_share_a_read_of_the_weight_without_tensor_cores(tensor_cores, n, tensor, monkeypatch):
    launched, launch = [], tensor_cores.launch
    monkeypatch.setattr(
        tensor_cores, "launch", lambda name, *rest, **more: (launched.append(name), launch(name, *rest, **more))
    )
    device, C, kv_rank = cuda.device(tensor_cores), 12, 4
    q, weight, qlat, olat = (tensor_cores.zeros(shape) for shape in ((n, C), (20, kv_rank), (n, 2, 8), (n, 2, kv_rank)))
    device.mla_absorb(qlat, q, weight, 2, 4)
    device.mla_expand(q, olat, weight, 2, 4)
    kind = ("tf32_" if tensor_cores.tf32 else "3xtf32_") if tensor else ""
    assert launched == [f"mla_absorb_{kind}kernel", f"mla_expand_{kind}kernel"]
