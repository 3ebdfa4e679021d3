"""kernels/cuda/runtime/tensor_cores.py: kernels for tensor cores are taken where they pass their trial.

On the emulator, by mma.cuh's fallbacks, and on a GPU if any: there this is what a run does before it relies on them.
"""

import numpy as np
import pytest
from availability import emulate, open_gpu, skip_off_linux
from check_op import nan, place, relative, rounded
from cuda_emulator.runtime import EmulatedRuntime

from kernels import cpu, cuda
from kernels.cuda.deepseek.latent_attention import latent_trial
from kernels.cuda.gpt2.attention import attention_trial
from kernels.cuda.runtime import source
from kernels.cuda.runtime.runtime import CudaError
from kernels.cuda.runtime.tensor_cores import MOST, product_trial, takes_tensor_cores, worth_it
from kernels.cuda.sparse import sparse_attention
from kernels.cuda.sparse.sparse_attention import union_trial

pytestmark = pytest.mark.launches("gpt2", "band", "sparse", "deepseek")


def emulated(tf32=False, **options) -> EmulatedRuntime:
    """A runtime that lists the kernels it launched."""
    skip_off_linux()
    runtime = EmulatedRuntime(capability=options.pop("capability", (9, 0)), tf32=tf32, **options)
    runtime.launched, launch = [], runtime.launch

    def launch_and_tell(kernel, *rest):
        runtime.launched.append(kernel)
        launch(kernel, *rest)

    runtime.launch = launch_and_tell
    return runtime


def attention(runtime, hs=16, T=20, NH=2) -> float:
    """Forward and backward; the largest error, relative to a tensor's largest value."""
    C = NH * hs
    qkv, dout = rounded(1, T, 3 * C), rounded(T, C)
    shapes = (T, C), (1, NH, T), (1, T, 3 * C)
    out, lse, dqkv = expected = [np.empty(shape) for shape in shapes]
    cpu.attention_forward(out, lse, qkv, NH)
    cpu.attention_backward(dqkv, dout, qkv, out, lse, NH)
    out, lse, dqkv = found = [place(runtime, nan(*shape), 0) for shape in shapes]
    qkv, dout, device = place(runtime, qkv, 0), place(runtime, dout, 0), cuda.device(runtime)
    device.attention_forward(out, lse, qkv, NH)
    device.attention_backward(dqkv, dout, qkv, out, lse, NH)
    return max(relative(runtime.to_host(ours), theirs) for ours, theirs in zip(found, expected))


OF_ATTENTION = "attention_forward_{0}_kernel", "attention_dq_{0}_kernel", "attention_dkdv_{0}_kernel"
FOR_CUDA_CORES = [name.format(64) for name in (OF_ATTENTION[0], "attention_delta_kernel", *OF_ATTENTION[:0:-1])]


@pytest.mark.parametrize(
    "capability, tf32, kind",
    [
        ((7, 5), True, None), ((7, 5), False, None), ((8, 6), False, None), ((12, 0), False, None),
        ((8, 6), True, "tf32"), ((12, 0), True, "tf32"), ((8, 0), False, "3xtf32"), ((9, 0), False, "3xtf32"),
    ],
)  # fmt: skip
def test_who_takes_them(capability, tf32, kind, capfd):
    """TF32 wherever there is TF32, 3xTF32 where tensor cores are fast; after one trial, which says nothing."""
    runtime = emulated(tf32, capability=capability)
    assert attention(runtime) <= (1.5e-3 if tf32 else 5e-6)
    tensor = [name.format(f"{kind}_64") for name in OF_ATTENTION]
    assert runtime.launched == (2 * tensor if kind else FOR_CUDA_CORES)
    runtime.launched.clear()
    attention(runtime)
    assert runtime.launched == (tensor if kind else FOR_CUDA_CORES)
    assert capfd.readouterr().err == ""


def test_each_kind_of_head_has_its_trial():
    """Rows of whole packs and others, padded to 64 and to 128, are copied and added up by other code."""
    runtime, heads = emulated(), (16, 64, 5, 40, 7, 72, 65)
    trials = []
    for hs in heads:
        runtime.launched.clear()
        attention(runtime, hs, T=10, NH=1)
        trials.append(len(runtime.launched) == 6)
    assert trials == [True, False, True, False, False, True, True]


def planted(folder, name: str, *changes: tuple[str, str]):
    """A folder with a copy of a .cu file that computes something else."""
    text = next(kernel.path for kernel in source.kernels().values() if kernel.path.name == name).read_text()
    for right, wrong in changes:
        assert right in text
        text = text.replace(right, wrong)
    (folder / name).write_text(text)
    return source.FOLDER, folder


@pytest.mark.parametrize(
    "right, wrong, result",
    [
        ("stage = 2 * TILE - stage;", "stage = 0;", "out"),  # the next tile overwrites this one
        ("factor[2] = {scale, scale};", "factor[2] = {scale, 1.0f};", "dqkv"),  # dq of every second row
    ],
)
def test_attention_that_is_wrong_is_not_used(right, wrong, result, tmp_path, capfd):
    """Said once, and the numbers are right."""
    runtime = emulated(folders=planted(tmp_path, "attention_tensor.cu", (right, wrong)))
    for _ in range(2):
        assert attention(runtime) <= 1e-6
    assert runtime.launched[3:] == 2 * FOR_CUDA_CORES
    said = capfd.readouterr().err
    assert said.startswith(f"tensor cores of CUDA emulator (fast) are not used, attention's {result} is off by ")
    assert said.endswith("expected at most 2e-05: its work is done without them, slower\n") and said.count("\n") == 1


def banded(runtime, N=70, C=36, bandwidth=9) -> float:
    """Three products of FC1; the largest error, relative to a tensor's largest value."""
    inp, weight, bias, dout = rounded(N, C), rounded(4 * C, C), rounded(4 * C), rounded(N, 4 * C)
    cpu.band_mask(weight[None], bandwidth)
    given, zeros = (inp, weight, bias, dout), [np.zeros(shape) for shape in ((N, 4 * C), (N, C), (4 * C, C))]
    results = []
    for device, put, get in (
        (cpu, np.copy, np.asarray),
        (cuda.device(runtime), lambda x: place(runtime, x, 0), runtime.to_host),
    ):
        inp, weight, bias, dout = map(put, given)
        out, dinp, dweight = found = [put(array) for array in zeros]
        device.band_matmul_forward(out, inp, weight, bias, bandwidth)
        device.band_matmul_backward(dinp, dweight, bias, dout, inp, weight, bandwidth)
        results.append([get(array) for array in found])
    return max(relative(ours, right) for right, ours in zip(*results))


@pytest.mark.parametrize("tf32", [False, True])
def test_bands_have_a_trial_of_their_own(tf32, tmp_path, capfd):
    """Passed, and the kernels are taken; with a part that sums from the first token on, said once and not taken."""
    kind, most = ("tf32", 1.5e-3) if tf32 else ("3xtf32", 5e-6)
    runtime = emulated(tf32)
    assert banded(runtime) <= most and runtime.launched[-3:-1] == [
        f"band_matmul_dinp_{kind}_kernel", f"band_matmul_dweight_{kind}_kernel",
    ]  # fmt: skip
    assert capfd.readouterr().err == ""
    wrong = "const int first = blockIdx.z * rows", "const int first = 0 * rows"
    runtime = emulated(tf32, folders=planted(tmp_path, "band_matmul_tensor.cu", wrong))
    for _ in range(2):
        runtime.launched.clear()
        assert banded(runtime) <= most
    assert not [kernel for kernel in runtime.launched if kind in kernel]
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and "are not used, FC1's dweight is off by" in said


@pytest.mark.parametrize(
    "name, right, wrong, result",
    [
        ("indexer_tensor.cu", "asked++, column = 0;", "asked++;", "scores"),  # the next head begins too far on
        ("indexer_tensor.cu", "stage = TILE - stage;", "", "gradients"),
        ("indexer_union.cu", "before += __popc(chosen[query][word].keys);", "", "gathered scores"),
        ("indexer_union.cu", "chosen[half].before += __popc(chosen[half].keys);", "", "gathered gradients"),
    ],
)
def test_an_indexer_that_is_wrong_is_not_used(name, right, wrong, result, tmp_path, capfd):
    """Said once; its scores come from CUDA cores."""
    runtime, T = emulated(folders=planted(tmp_path, name, (right, wrong))), 20
    given = rounded(1, T, 8), rounded(1, T, 4), rounded(1, T, 2)
    past, expected = np.tri(T, dtype=bool), np.empty((1, T, T))
    cpu.indexer_scores_forward(expected, *given, 0.5, 0)
    for _ in range(2):
        runtime.launched.clear()
        scores, *on_gpu = (place(runtime, x, 0) for x in (nan(1, T, T), *given))
        cuda.device(runtime).indexer_scores_forward(scores, *on_gpu, 0.5, 0)
        assert runtime.launched[-1] == "indexer_scores_forward_kernel"
        assert relative(runtime.to_host(scores)[:, past], expected[:, past]) <= 1e-6
    assert len(runtime.launched) == 1
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and f"are not used, the indexer's {result} is off by" in said


@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("D", [20, 19, 132])
def test_latents_have_a_trial_of_their_own(D, tf32, tmp_path, capfd):
    """Passed, and its kernel is taken; with a list that begins a tile late, said once and not taken."""
    right, wrong = "ahead = row_of_lane(first + 2 * KEYS);", "ahead = row_of_lane(first + 3 * KEYS);"
    qlat, latent, expected = rounded(2, 3, D), rounded(80, D), np.empty((2, 3, D - 4))
    cpu.latent_attention_forward(expected, qlat, latent, None, None, 0.3, 78)
    names = []
    for folders in ((source.FOLDER,), planted(tmp_path, "latent_attention_tensor.cu", (right, wrong))):
        runtime = emulated(tf32, folders=folders)
        for _ in range(2):
            out = place(runtime, nan(2, 3, D - 4), 0)
            given = place(runtime, qlat, 0), place(runtime, latent, 0)
            cuda.device(runtime).latent_attention_forward(out, *given, None, None, 0.3, 78)
            assert relative(runtime.to_host(out), expected) <= (1.5e-3 if tf32 else 5e-6)
        names += runtime.launched[-1:]
    wide = "wide_" if D > 128 else ""
    assert names == [f"latent_attention_{wide}{'tf32' if tf32 else '3xtf32'}_kernel", "latent_attention_kernel"]
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and "are not used, attention to latents by position is off by" in said


def every_third_key(T, K, start) -> tuple[np.ndarray, np.ndarray]:
    """index (1,T-start,K), count (1,T-start): back from the query."""
    index, count = np.full((1, T - start, K), -1, np.int32), np.empty((1, T - start), np.int32)
    for t in range(start, T):
        keys = np.arange(t, -1, -3)[:K][::-1]
        index[0, t - start, : len(keys)], count[0, t - start] = keys, len(keys)
    return index, count


def selected(runtime, start=0, hs=16, T=70, NH=2, K=9) -> float:
    """Forward of the last queries, and of all with backward and mean; the largest error, relative to a tensor's."""
    C, device, errors = NH * hs, cuda.device(runtime), []
    qkv, dout = rounded(1, T, 3 * C), rounded(T, C)
    for first in {start, 0}:
        shapes = (T - first, C), (1, NH, T - first), (1, T, 3 * C), (1, T, K)
        given = qkv, dout, *(nan(*shape) for shape in shapes), *every_third_key(T, K, first)
        results = []
        for on, put in ((cpu, np.asarray), (device, lambda array: place(runtime, array, 0))):
            x, dy, out, lse, dqkv, mean, *chosen = map(put, given)
            on.sparse_attention_forward(out, lse, x, *chosen, NH, first)
            results.append([out, lse])
            if first == 0:
                on.sparse_attention_backward(dqkv, dy, x, out, lse, *chosen, NH)
                on.sparse_attention_mean(mean, x, lse, *chosen, NH)
                results[-1] += [dqkv, mean]
        errors += [relative(runtime.to_host(ours), right) for right, ours in zip(*results)]
    return max(errors)


OF_LISTS = ["selected_bits_kernel", "union_keys_kernel"]
OF_QUERIES = [
    "sparse_attention_forward_64_kernel", "attention_delta_kernel", "sparse_attention_dq_64_kernel",
    "inverse_count_kernel", "inverse_sum_kernel", "inverse_place_kernel", "sparse_attention_dkdv_64_kernel",
    "sparse_attention_mean_kernel",
]  # fmt: skip


def of_tiles(kind: str) -> list[str]:
    """What forward, backward and mean launch where 64 queries share their keys."""
    by_key = ["key_classes_kernel", "key_order_kernel", "union_queries_kernel"]
    return [
        *OF_LISTS, f"union_forward_{kind}_64_kernel", *OF_LISTS, f"union_dq_{kind}_64_kernel", *by_key,
        f"union_dkdv_{kind}_64_kernel", *OF_LISTS, f"union_mean_{kind}_kernel",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "capability, tf32, kind",
    [((7, 5), True, None), ((8, 6), False, None), ((8, 6), True, "tf32"), ((9, 0), False, "3xtf32")],
)
def test_selected_keys_are_shared_where_there_is_enough_to_do(capability, tf32, kind, monkeypatch, capfd):
    """Pairs times channels decide, of the queries there are: those that decode go one by one."""
    monkeypatch.setattr(sparse_attention, "WORTH", 70 * 9 * 32)
    runtime = emulated(tf32, capability=capability)
    for trials in (1, 0):
        runtime.launched.clear()
        assert selected(runtime) <= (1.5e-3 if tf32 else 5e-6)
        assert runtime.launched == ((trials + 1) * of_tiles(kind) if kind else OF_QUERIES)
    runtime.launched.clear()
    assert selected(runtime, start=1) <= (1.5e-3 if tf32 else 5e-6)
    assert runtime.launched.count("sparse_attention_forward_64_kernel") == (1 if kind else 2)
    runtime.launched.clear()
    selected(runtime, K=8)
    assert runtime.launched == OF_QUERIES and capfd.readouterr().err == ""


def test_lists_that_are_wrong_are_not_used(monkeypatch, tmp_path, capfd):
    """Said once, and the numbers are right."""
    monkeypatch.setattr(sparse_attention, "WORTH", 0)
    wrong = "i < pairs", "i < pairs - 1"  # the last key of a tile's last query
    runtime = emulated(folders=planted(tmp_path, "union_lists.cu", wrong))
    for _ in range(2):
        assert selected(runtime) <= 1e-6
    assert runtime.launched == of_tiles("3xtf32") + 2 * OF_QUERIES
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and "are not used, sparse attention's out is off by" in said


def test_a_kernel_that_cannot_be_launched_is_not_used(capfd):
    runtime = emulated()
    launch = runtime.launch

    def refuse(kernel, *rest):
        if "tf32" in kernel:
            raise CudaError(f"{kernel}: too many resources requested for launch", "a smaller one")
        launch(kernel, *rest)

    runtime.launch = refuse
    assert attention(runtime) <= 1e-6 and runtime.launched == FOR_CUDA_CORES
    assert "not used, attention_forward_3xtf32_64_kernel: too many resources" in capfd.readouterr().err


@pytest.fixture(params=["check", pytest.param("gpu", marks=pytest.mark.gpu)])
def kind(request):
    return request.param


@pytest.mark.parametrize("tf32", [False, True], ids=["3xtf32", "tf32"])
@pytest.mark.parametrize(
    "trial, sizes",
    [
        (product_trial, ()),
        *((trial, (hs,)) for trial in (attention_trial, union_trial) for hs in (64, 63, 128, 127)),
        *((latent_trial, (D,)) for D in (128, 127, 576, 575)),
    ],
)
def test_the_trials_are_passed(kind, trial, sizes, tf32):
    """With the errors of products whose operands were rounded, or were not: every kernel for tensor cores there is."""
    if kind == "gpu":
        runtime = open_gpu(tf32)
        if not worth_it(runtime):
            pytest.skip(f"{runtime.name} has no tensor cores that are worth it")
    else:
        runtime = emulated(tf32, mode=kind)
    errors = [relative(found, expected) for _, found, expected in trial(runtime, *sizes)]
    print(errors)
    assert (MOST[False] < max(errors) <= 1.5e-3) if tf32 else max(errors) <= 5e-6
    assert takes_tensor_cores(runtime, trial, *sizes)


@pytest.mark.parametrize(
    "right, wrong",
    [
        ("multiply<true>", "multiply<false>"),  # TF32 in place of 3xTF32, of which only the last digits tell
        ("stages[(k / 8 + 1) % 2]", "stages[k / 8 % 2]"),
        ("column < K", "true"),  # what is not wanted is read: the row behind, and behind the last one
    ],
)
def test_products_that_are_wrong_are_not_used(right, wrong, tmp_path, capfd):
    runtime = emulated(folders=planted(tmp_path, "tensor_cores.cu", (right, wrong)))
    assert not takes_tensor_cores(runtime) and not takes_tensor_cores(runtime)
    assert capfd.readouterr().err.count("a product is off by") == 1


def test_older_gpus_try_nothing():
    runtime = emulate("fast")
    assert not worth_it(runtime) and not takes_tensor_cores(runtime)
