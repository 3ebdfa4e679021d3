"""train_banded.py and generate.py on the emulated GPU: llm.c's losses, the CPU's logits, the same bits every time."""

import dataclasses
import re

import golden_run
import numpy as np
import pytest
import tiny
from cuda_emulator.runtime import EmulatedRuntime
from test_golden import losses

import evaluate
import generate
import kernels
import train_banded
from kernels import cpu, cuda
from kernels.cuda.gpt2 import matmul_tensor
from llmc.checkpoint import GPT2Config, read_model
from llmc.evalloader import Example, write_examples
from llmc.init import gpt2_init
from systems.band import Band

pytestmark = pytest.mark.launches("gpt2", "band")


@pytest.fixture
def on_emulator(monkeypatch, emulator):
    """A function that makes an emulated GPU the device of scripts; keyword arguments are EmulatedRuntime's."""

    def use(**options) -> EmulatedRuntime:
        runtime = EmulatedRuntime(**options)
        monkeypatch.setattr(kernels, "open_device", lambda *arguments, **options: cuda.device(runtime))
        return runtime

    return use


@pytest.mark.parametrize(
    "name, capability, steps",
    [
        *(pytest.param(name, (7, 0), 41, id=name) for name in golden_run.RUNS),
        pytest.param("dense", (9, 0), 10, id="dense-3xtf32"),  # attention on tensor cores, whose emulation is slow
        pytest.param("dense", (9, 0), 41, id="dense-3xtf32-all", marks=pytest.mark.slow),
    ],
)
def test_run_matches_the_c_reference(name, capability, steps, on_emulator, tmp_path, monkeypatch, capsys):
    """41 training and 5 validation losses within 5e-5, parameters after 41 updates within 1e-4; of 10 the losses."""
    on_emulator(mode="fast", capability=capability)
    golden_run.write_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    flags = [*golden_run.RUNS[name], "-n", str(steps), "-c", "final.bin"]
    assert train_banded.main([*golden_run.WORKLOAD, *flags]) == 0
    ours, reference = capsys.readouterr().out, (golden_run.GOLDEN / f"{name}.log").read_text()
    assert "CUDA emulator" in ours
    for kind, count, whole in (("train", steps, 41), ("val", steps // 10 + 1, 5)):
        difference = np.abs(losses(ours, kind)[:count] - losses(reference, kind)[:count]).max()
        print(f"{name}: {kind} losses within {difference:.1e}")
        assert losses(reference, kind).size == whole and losses(ours, kind).size >= count and difference <= 5e-5
    params = read_model("final.bin").params
    assert steps < 41 or np.abs(params[:: golden_run.STRIDE] - golden_run.load()[name]).max() <= 1e-4


@pytest.mark.parametrize("tf32, loss_tol, param_tol", [(False, 2e-6, 1e-6), (True, 1e-4, 1e-5)])
def test_steps_on_tensor_cores_are_the_cpus(tf32, loss_tol, param_tol, monkeypatch):
    """Three updates of a banded model: all products of ours in 3xTF32, no cuBLAS; in TF32 the bands, and cuBLAS."""
    monkeypatch.setattr(matmul_tensor, "FASTER_THAN_CUBLAS", {(9, 0)})
    monkeypatch.setattr(matmul_tensor, "MULTIPROCESSORS", 1)
    config, (B, T) = GPT2Config(maxT=16, V=120, L=2, NH=2, C=64, Vp=128), (2, 16)
    runtime = EmulatedRuntime(mode="fast", capability=(9, 0), tf32=tf32)
    launched, launch = set(), runtime.launch
    monkeypatch.setattr(runtime, "launch", lambda name, *args: (launched.add(name), launch(name, *args)))
    if not tf32:
        monkeypatch.setattr(runtime, "gemm", None)
    tokens = np.random.default_rng(5).integers(0, config.V, (2, B, T)).astype(np.int32)
    losses, params = [], []
    for device in (cpu, cuda.device(runtime)):
        model = train_banded.GPT2(device, config, gpt2_init(config, 3), B, T, Band(32, 24))
        model.mask_weights()
        for t in (1, 2, 3):
            model.forward(*tokens)
            model.backward()
            losses.append(model.mean_loss())
            model.update(t, 1e-3)
        params.append(device.to_host(model.params_flat))
    reference, ours = np.reshape(losses, (2, 3))
    print(f"losses within {np.abs(ours - reference).max():.1e}, parameters {np.abs(params[1] - params[0]).mean():.1e}")
    assert np.abs(ours - reference).max() <= loss_tol and reference[2] < reference[0] - 0.1
    assert np.abs(params[1] - params[0]).mean() <= param_tol
    word = "tf32" if tf32 else "3xtf32"
    assert {f"band_matmul_{product}_{word}_kernel" for product in ("forward", "dinp", "dweight")} <= launched
    assert ("matmul_forward_3xtf32_kernel" in launched) != tf32 and f"attention_forward_{word}_64_kernel" in launched


BANDED = dict(model="model.bin", fc1_bandwidth=24, fc2_bandwidth=24, permute=3, grad_clip=0.5)


def test_thread_schedule_changes_no_bit(on_emulator, folder, capsys):
    """Five steps of a banded run, clipped and accumulated, under three orders of threads and blocks."""
    options = tiny.options(**BANDED, steps=5, grad_accum=2, val_every=0, sample_every=0, checkpoint="c.bin")
    files = []
    for schedule in ("ascending", "descending", "random"):
        on_emulator(mode="fast", schedule=schedule, seed=7)
        assert train_banded.main(options) == 0
        files.append((folder / "c.bin").read_bytes())
    assert files[0] == files[1] == files[2]
    assert files[0] != (folder / "model.bin").read_bytes()


@pytest.mark.parametrize("mask_init", [0, 1])
def test_a_step_has_no_race_and_no_stray_access(mask_init, on_emulator, folder, capsys):
    on_emulator(mode="check")
    options = tiny.options(**BANDED, steps=2, mask_init=mask_init, val_every=1, val_batches=1, sample_every=2)
    assert train_banded.main(options) == 0
    assert "step    2/2: train loss" in capsys.readouterr().out


def test_generate_gives_the_logits_of_the_cpu(on_emulator):
    """Prompt, then token by token with the cache of keys and values."""
    config, tokens = tiny.CONFIG, np.arange(12, dtype=np.int32)
    runtime = on_emulator(mode="fast")
    models = [train_banded.GPT2(device, config, gpt2_init(config, 3), 1, 1) for device in (cpu, cuda.device(runtime))]
    for start, stop in ((0, 9), (9, 10), (10, 12)):
        reference, ours = (model.extend(tokens[start:stop], start) for model in models)
        assert np.abs(ours - reference).max() <= 1e-5 * np.abs(reference).max()


def test_a_decoded_token_takes_few_launches(on_emulator):
    """Ten a layer and three, with biases added in the products of one row; eleven in a model of more than 512
    positions; then one, a graph, with the same logits."""
    tokens = np.arange(5, dtype=np.int32)
    for maxT, count in ((512, 10), (520, 11)):
        config = dataclasses.replace(tiny.CONFIG, maxT=maxT)
        runtime = on_emulator(mode="fast")
        eager, by_graphs = (
            train_banded.GPT2(cuda.device(runtime, graph), config, gpt2_init(config, 3), 1, 1) for graph in ("0", "1")
        )
        expected = [eager.extend(tokens[t : t + 1], t) for t in range(5)]
        launched, launch = [], runtime.launch
        runtime.launch = lambda kernel, *rest: (launched.append(kernel), launch(kernel, *rest))  # noqa: B023
        for t in range(5):
            launched.clear()
            assert by_graphs.extend(tokens[t : t + 1], t).tobytes() == expected[t].tobytes()
            assert runtime.graph_launches == t  # none, then the captured one, and on
            if t < 2:
                assert len(launched) == count * config.L + 3
                assert launched.count("matmul_row_kernel") == 4 * config.L + 1
        assert launched == []


def test_generate_runs_on_the_device(on_emulator, folder, capsys):
    on_emulator(mode="fast")
    assert generate.main(["-e", "model.bin", "-n", "4", "-s", "3"]) == 0
    assert capsys.readouterr().out


def test_evaluate_gives_the_figures_of_the_cpu(on_emulator, folder, capsys):
    """Perplexity over sliding windows, and the answers to four questions, of two at a time."""
    tokens = np.random.default_rng(2).integers(0, 256, (4, 5, 4)).astype(np.uint16)
    write_examples("eval.bin", [Example(part[0], list(part[1:]), 1) for part in tokens])
    commands = [["-j", "val.bin", "-t", "8", "--stride", "4", "-m", "3"], ["-j", "eval.bin", "-b", "8"]]

    def told(more):
        for command in commands:
            assert evaluate.main(["-e", "model.bin", *command, *more]) is None
        out = capsys.readouterr().out
        return float(re.search(r"^val loss (\S+)", out, re.M)[1]), re.search(r"HellaSwag: (\d)/4 =", out)[1]

    expected_loss, right = told(["--device", "cpu"])
    on_emulator(mode="fast")
    loss, right_on_gpu = told([])
    assert abs(loss - expected_loss) < 2e-6 and right == right_on_gpu
