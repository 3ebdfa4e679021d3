"""train_sparse_attn.py and generate.py on the emulated GPU: the CPU's losses and logits, no race, the same bits."""

from dataclasses import replace

import numpy as np
import pytest
import tiny
from cuda_emulator.runtime import EmulatedRuntime
from test_cuda_training import on_emulator  # noqa: F401  a fixture
from test_golden import losses
from test_sparse_model import CONFIGS, SPARSE, batch, tiny_model

import train_sparse_attn
from kernels import cuda
from kernels.cuda.sparse import indexer, sparse_attention
from systems import selection
from systems.selection import measure_rows

pytestmark = pytest.mark.launches("gpt2", "sparse", "deepseek")

TOL = 2e-5  # of float32 on two devices, relative to the largest value


@pytest.fixture(scope="module")
def checking(emulator) -> EmulatedRuntime:
    return EmulatedRuntime("check")


MODELS = [*(("gpt2", kind) for kind in SPARSE), ("mla", "top-k"), ("moe", "top-k"), ("mla+moe", "prefix"),
          ("mla+moe", "upstream indexer")]  # fmt: skip


@pytest.mark.parametrize("config, kind, warming_up", [
    *((config, kind, False) for config, kind in MODELS),
    *((config, kind, True) for config, kind in MODELS if SPARSE[kind].indexer != "none"),
])  # fmt: skip
def test_gradients_are_the_cpus(config, kind, warming_up, checking):
    """Loss, every gradient and the measured agreement, in mode check: no race, no access out of bounds."""
    check_gradients(config, kind, warming_up, checking)


@pytest.mark.parametrize("kind, warming_up", [("top-k", False), ("top-k", True), ("upstream indexer", False)])
def test_gradients_on_tensor_cores_are_the_cpus(kind, warming_up, monkeypatch):
    """The same with 3xTF32, after trials that say nothing; 64 queries share their keys, however few there are."""
    for launcher in (indexer, sparse_attention):
        monkeypatch.setattr(launcher, "WORTH", 0)
    check_gradients("gpt2", kind, warming_up, EmulatedRuntime("check", capability=(9, 0)))


def check_gradients(config, kind, warming_up, runtime):
    sparsity = SPARSE[kind]
    learns = sparsity.indexer != "none"
    (inputs, targets), results = batch(CONFIGS[config], 2, 9), []
    reference = tiny_model(CONFIGS[config], sparsity, 2, 9)
    params = reference.params_flat.astype(np.float32)
    ours = train_sparse_attn.GPT2(cuda.device(runtime), CONFIGS[config], sparsity, params, 2, 9)
    for model in (reference, ours):
        divergences, agreements, _ = measure_rows(model, inputs, dense=warming_up)
        model.forward(inputs, targets, dense=warming_up)
        loss = model.mean_loss()
        model.backward(model=not warming_up, indexer=learns, dense=warming_up)
        counts = [(each.kept, round(each.overlap, 3)) for each in agreements]
        results.append((loss, divergences, counts, model.ops.to_host(model.grads_flat)))
    (loss, divergences, counts, grads), found = results
    assert abs(found[0] - loss) <= TOL * loss and found[2] == counts
    assert np.allclose(found[1], divergences, rtol=1e-4)
    errors = {}
    for name, wanted in vars(reference.grads).items():
        start = (wanted.__array_interface__["data"][0] - grads.__array_interface__["data"][0]) // 8
        values = found[3][start : start + wanted.size].reshape(wanted.shape)
        if wanted.any():
            errors[name] = np.abs(values - wanted).max() / np.abs(wanted).max()
    print(config, kind, f"loss {abs(found[0] - loss):.1e}, gradients {max(errors.values()):.1e}")
    assert max(errors.values()) <= 1e-4, errors


DECODED = [("gpt2", kind) for kind in ("top-k", "prefix", "oracle", "share")]
DECODED += [("mla+moe", kind) for kind in ("top-k", "share")]


@pytest.mark.parametrize("config, kind", DECODED)
def test_extend_gives_the_logits_of_the_cpu(config, kind, checking):
    config, sparsity = CONFIGS[config], SPARSE[kind]
    reference, inputs = tiny_model(config, sparsity, 1, 12), batch(config, 1, 12)[0][0]
    params = reference.params_flat.astype(np.float32)
    ours = train_sparse_attn.GPT2(cuda.device(checking), config, sparsity, params, 1, 12)
    for start, stop in ((0, 7), (7, 8), (8, 12)):
        expected, found = (model.extend(inputs[start:stop], start) for model in (reference, ours))
        assert np.abs(found - expected).max() <= TOL * np.abs(expected).max()


@pytest.mark.parametrize("memory, blocks", [(1 << 20, 1), (0, 2)])
@pytest.mark.parametrize("capability, kind", [((7, 0), ""), ((9, 0), "_3xtf32")])
def test_a_layer_scores_and_selects_in_two_launches(capability, kind, memory, blocks, emulator, monkeypatch):
    """All queries at once, on tensor cores or not; where GPU_SCORES has no room for them, 128."""
    monkeypatch.setattr(selection, "GPU_SCORES", memory)
    runtime, config, launched = EmulatedRuntime(capability=capability), replace(CONFIGS["gpt2"], maxT=140), []
    model = tiny_model(config, SPARSE["top-k"], 2, 140, np.float32, device=cuda.device(runtime))
    model.forward(batch(config, 2, 140)[0])
    launch = runtime.launch
    monkeypatch.setattr(runtime, "launch", lambda kernel, *rest: (launched.append(kernel), launch(kernel, *rest)))
    model.selection.forward(0, model.layers[0], 0, False)
    assert launched == blocks * [f"indexer_scores_forward{kind}_kernel", "select_topk_kernel"]


@pytest.mark.parametrize("dense", [False, True])
def test_extend_on_tensor_cores_gives_the_logits_of_the_cpu(dense):
    """A prompt, a token, several tokens: lists are taken from latents, of a dense prompt keys are expanded."""
    config, sparsity = replace(CONFIGS["mla"], maxT=24), SPARSE["top-k"]
    runtime = EmulatedRuntime("check", schedule="random", seed=3, capability=(9, 0))
    reference, inputs = tiny_model(config, sparsity, 1, 24), batch(config, 1, 24)[0][0]
    ours = tiny_model(config, sparsity, 1, 24, np.float32, device=cuda.device(runtime))
    launched, launch = set(), runtime.launch
    runtime.launch = lambda kernel, *rest, **more: (launched.add(kernel), launch(kernel, *rest, **more))
    many = {f"{op}_3xtf32_kernel" for op in ("mla_absorb", "mla_expand")}
    for start, stop, products in ((0, 12, set() if dense else many), (12, 13, set()), (13, 24, many)):
        launched.clear()
        expected, found = (model.extend(inputs[start:stop], start, dense) for model in (reference, ours))
        assert np.abs(found - expected).max() <= TOL * np.abs(expected).max()
        assert launched & many == products
        assert ("latent_attention_3xtf32_kernel" in launched) == (not dense or start > 0)


def test_model_is_causal_bit_for_bit(checking):
    model = tiny_model(CONFIGS["mla+moe"], replace(SPARSE["prefix"]), 2, 12, np.float32)
    ours = train_sparse_attn.GPT2(cuda.device(checking), model.config, model.sparsity, model.params_flat, 2, 12)
    inputs = batch(model.config, 2, 12)[0]
    ours.forward(inputs)
    before = ours.ops.to_host(ours.acts.logits).reshape(2, 12, -1)
    for s in (1, 6, 11):
        changed = inputs.copy()
        changed[:, s:] = (changed[:, s:] + 1) % model.config.V
        ours.forward(changed)
        after = ours.ops.to_host(ours.acts.logits).reshape(2, 12, -1)
        assert after[:, :s].tobytes() == before[:, :s].tobytes() and (after[:, s] != before[:, s]).any()


SPARSE_RUN = dict(model="model.bin", top_k=3, indexer_heads=2, indexer_dim=4, indexer_warmup=2, steps=4, sample_every=0)


def test_a_run_has_the_losses_of_the_cpu(on_emulator, folder, capsys):  # noqa: F811
    """Warm-up and sparse stage from the command line, losses within 5e-5; three thread schedules give the same file."""
    options = tiny.options(**SPARSE_RUN, val_every=2, checkpoint="c.bin", device=None)
    assert train_sparse_attn.main([*options, "--device", "cpu"]) == 0
    reference, files = capsys.readouterr().out, []
    for schedule in ("ascending", "descending", "random"):
        on_emulator(mode="fast", schedule=schedule, seed=3)
        assert train_sparse_attn.main(options) == 0
        files.append((folder / "c.bin").read_bytes())
        ours = capsys.readouterr().out
        assert "CUDA emulator" in ours
        for kind, count in (("train", 4), ("val", 3)):
            assert losses(reference, kind).size == count
            assert np.abs(losses(ours, kind) - losses(reference, kind)).max() <= 5e-5
    assert files[0] == files[1] == files[2]
