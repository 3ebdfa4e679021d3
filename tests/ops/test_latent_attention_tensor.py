"""Attention over latents on tensor cores: the emulator as a GPU that has them, in TF32 and 3xTF32, and a GPU if any."""

import numpy as np
import pytest
from check_op import ROUNDED, TOL_TENSOR, check_twin, nan, place, relative, rounded
from selected_keys import lists_of

from kernels import cpu, cuda
from kernels.cuda.deepseek import latent_attention
from kernels.cuda.deepseek.latent_attention_tensor import tensor_size
from kernels.cuda.runtime.tensor_cores import worth_it

SIZES = [  # n, NH, kv_rank, R, start, K, offset
    (1, 1, 1, 2, 0, 1, 0), (5, 3, 7, 4, 0, 3, 0), (3, 17, 16, 4, 30, 12, 0), (34, 8, 64, 16, 0, 34, 0),
    (2, 5, 20, 4, 260, 140, 1), (1, 128, 33, 2, 70, 65, 0), (1, 12, 320, 8, 40, 33, 0), (1, 16, 512, 64, 150, 129, 0),
    (2, 3, 95, 33, 9, 10, 0),
]  # fmt: skip


@pytest.fixture(autouse=True)
def untried(monkeypatch):
    """The launcher takes kernels for tensor cores without a trial."""
    monkeypatch.setattr(latent_attention, "takes_tensor_cores", lambda cuda, *_: worth_it(cuda))


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("n, NH, kv_rank, R, start, K, offset", SIZES)
def test_latent_attention(tensor_cores, n, NH, kv_rank, R, start, K, offset, listed):
    """1 to 128 heads, in groups of 16 at most; tiles that a part's keys fill or not; lists of one key and of all."""
    S = start + n
    qlat, latent = rounded(n, NH, kv_rank + R), rounded(S + 2, kv_rank + R)
    latent[S:] = np.nan  # no query has come so far
    index, count = (x[:, start:] for x in lists_of(S, K)) if listed else (None, None)
    args = nan(n, NH, kv_rank), qlat, latent, index, count, (kv_rank + R) ** -0.5, start
    check_twin(tensor_cores, "latent_attention_forward", *args, offset=offset, tol=TOL_TENSOR[tensor_cores.tf32])


def attended(runtime, qlat, latent, kv_rank, lists=(None, None), start=0) -> np.ndarray:
    ours = [place(runtime, each, 0) for each in (nan(*qlat.shape[:2], kv_rank), qlat, latent)]
    lists = [None if each is None else place(runtime, each, 0) for each in lists]
    cuda.device(runtime).latent_attention_forward(*ours, *lists, 0.3, start)
    return runtime.to_host(ours[0])


def test_a_list_of_which_all_but_the_first_part_is_empty(tensor_cores):
    index, count = np.full((1, 1, 300), -1, np.int32), np.full((1, 1), 3, np.int32)
    index[0, 0, :3] = 2, 5, 700
    args = nan(1, 2, 8), rounded(1, 2, 12), rounded(900, 12), index, count, 0.3, 899
    check_twin(tensor_cores, "latent_attention_forward", *args, tol=TOL_TENSOR[tensor_cores.tf32])


@pytest.mark.parametrize("n, start, cut", [(40, 0, 17), (3, 300, 1)])
def test_causal_bit_for_bit(tensor_cores, n, start, cut):
    """With one part of the keys and with several; what comes after may even be NaN, and who sees a NaN is NaN."""
    qlat, latent = rounded(n, 2, 44), rounded(start + n, 44)
    before = attended(tensor_cores, qlat, latent, 40, start=start)
    latent[start + cut :] = np.nan
    after = attended(tensor_cores, qlat, latent, 40, start=start)
    assert np.isfinite(before).all() and np.isnan(after[cut:]).all()
    assert before[:cut].tobytes() == after[:cut].tobytes()


def test_a_list_of_all_keys_gives_the_same_bits_as_none(tensor_cores):
    T = 35
    index = np.where(np.tri(T, dtype=bool), np.arange(T), -1).astype(np.int32)[None]
    qlat, latent = rounded(T, 3, 20), rounded(T, 20)
    listed = attended(tensor_cores, qlat, latent, 16, (index, np.arange(1, T + 1, dtype=np.int32)[None]))
    assert listed.tobytes() == attended(tensor_cores, qlat, latent, 16).tobytes()


def test_three_schedules_give_the_same_bits(open_tensor_cores):
    """Two groups of heads, three parts of the keys."""
    qlat, latent = rounded(2, 20, 100), rounded(270, 100)
    runtimes = (open_tensor_cores(False, schedule) for schedule in ("ascending", "descending", "random"))
    found = {attended(runtime, qlat, latent, 96, start=268).tobytes() for runtime in runtimes}
    assert len(found) == 1


def test_tf32_rounds_and_3xtf32_does_not(open_tensor_cores):
    qlat, latent = rounded(4, 16, 80), rounded(150, 80)
    expected = np.empty((4, 16, 64))
    cpu.latent_attention_forward(expected, qlat, latent, None, None, 0.3, 146)
    errors = {
        tf32: relative(attended(open_tensor_cores(tf32), qlat, latent, 64, start=146), expected) for tf32 in (0, 1)
    }
    assert errors[0] <= TOL_TENSOR[False] and ROUNDED <= errors[1] <= TOL_TENSOR[True]


def test_large_scores(tensor_cores):
    latent = rounded(70, 10)
    out = attended(tensor_cores, 300 * rounded(70, 2, 10), latent, 8)
    assert np.isfinite(out).all() and np.abs(out).max() <= np.abs(latent).max() * 1.001  # a mean of latents


@pytest.mark.parametrize("kv_rank, R, size", [
    (1, 2, 128), (64, 16, 128), (96, 32, 128), (128, 2, 576), (512, 64, 576), (512, 66, None), (516, 4, None),
])  # fmt: skip
def test_what_a_size_holds(kv_rank, R, size):
    """What none holds is left to the kernels for CUDA cores, up to their own limit."""
    assert tensor_size(kv_rank, kv_rank + R) == size
