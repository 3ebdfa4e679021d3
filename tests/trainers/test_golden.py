"""Our runs against the C reference's: losses, final parameters, file layout; logits and gradients against PyTorch's."""

import re
import subprocess
import sys
from pathlib import Path

import golden_run
import numpy as np
import pytest

import train_banded
import train_sparse_attn
import train_toroidal
from kernels import cpu
from llmc.checkpoint import named_views, num_parameters, tensor_shapes
from llmc.debug_state import DebugState, write_debug_state

ROOT = Path(__file__).parent.parent.parent


def losses(text: str, kind: str) -> np.ndarray:
    return np.array([float(loss) for loss in re.findall(rf"{kind} loss (\S+)", text)])


RUNS = [(train_banded, name, flags) for name, flags in golden_run.RUNS.items()]
RUNS += [(train_sparse_attn, "dense", ["--attention", "dense"])]
RUNS += [(train_toroidal, "dense", ["--layers", "none", "--train", "all"])]
GPT2 = ["--depth", "1", "--lambda", "0", "--rope", "none", "--fusion", "identity"]
RUNS += [(train_toroidal, "dense", ["--layers", "0,1", "--train", "all", *GPT2])]


@pytest.mark.parametrize("trainer, name, flags", RUNS, ids=[f"{run[0].__name__}-{run[1]}" for run in RUNS])
def test_run_matches_the_c_reference(trainer, name, flags, tmp_path, monkeypatch, capsys):
    """All 41 training and 5 validation losses within 2e-5, parameters after 41 updates within 1e-4."""
    golden_run.write_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert trainer.main([*golden_run.WORKLOAD, *flags, "-c", "final.bin"]) == 0
    ours, reference = capsys.readouterr().out, (golden_run.GOLDEN / f"{name}.log").read_text()
    for kind, count, more in (("train", 41, 0), ("val", 5, 1)):  # ours validates at the end too
        assert losses(reference, kind).size == count and losses(ours, kind).size == count + more
        difference = np.abs(losses(ours, kind)[:count] - losses(reference, kind)).max()
        print(f"{name}: {kind} losses within {difference:.1e}")
        assert difference <= 2e-5

    # as llm.c's gpt2_build_from_checkpoint reads it: eight ints, then the 16 tensors; then lambda of toroidal layers
    data = (tmp_path / "final.bin").read_bytes()
    config = golden_run.CONFIG
    assert np.frombuffer(data, "<i4", 8).tolist() == [20240326, 3, 64, 510, 2, 4, 64, 512]
    extra = 2 * 2 * config.NH if "--depth" in flags else 0
    assert len(data) - 4 * extra == 1024 + 4 * num_parameters(config) == 548_864
    params = np.frombuffer(data, "<f4", num_parameters(config), offset=1024)
    difference = np.abs(params[:: golden_run.STRIDE] - golden_run.load()[name]).max()
    print(f"{name}: parameters within {difference:.1e}")
    assert difference <= 1e-4


def test_logits_and_gradients_match_pytorch(capsys):
    """Logits within 1e-4, each of the 16 gradients within 1e-5."""
    golden, config = golden_run.load(), golden_run.CONFIG
    inputs, targets = golden["inputs"].astype(np.int32), golden["targets"].astype(np.int32)
    model = train_banded.GPT2(cpu, config, golden_run.initial_params(), *inputs.shape)
    model.forward(inputs)
    logits = model.acts.logits[:, : config.V].ravel()[:: golden_run.STRIDE]
    assert np.abs(logits - golden["logits"]).max() <= 1e-4
    model.forward(inputs, targets)
    assert abs(model.mean_loss() - golden["loss"]) <= 2e-5
    model.backward()
    ours = named_views(model.grads_flat, tensor_shapes(config))
    sampled = np.full(num_parameters(config), np.nan, np.float32)
    sampled[:: golden_run.STRIDE] = golden["grads"]
    for name, reference in named_views(sampled, tensor_shapes(config)).items():
        known = ~np.isnan(reference)
        assert known.any() and np.abs(ours[name] - reference)[known].max() <= 1e-5, name


def check_gpt2(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "tests" / "check_gpt2.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_check_gpt2_prints_as_llmc_does(tmp_path):
    """All well with the gradients of our own float64 run; one wrong value in one tensor is found and named."""
    golden, config = golden_run.load(), golden_run.CONFIG
    golden_run.write_inputs(tmp_path)
    inputs, targets = golden["inputs"].astype(np.int32), golden["targets"].astype(np.int32)
    model = train_banded.GPT2(cpu, config, golden_run.initial_params(), *inputs.shape)
    model.forward(inputs)
    logits = model.acts.logits[:, : config.V].reshape(*inputs.shape, -1).copy()
    model.forward(inputs, targets)
    loss = model.mean_loss()
    model.backward()
    state = DebugState(inputs, targets, logits, loss, model.grads_flat)
    write_debug_state(tmp_path / "good.bin", state)
    good = check_gpt2(tmp_path / "model.bin", tmp_path / "good.bin")
    lines = good.stdout.splitlines()
    assert good.returncode == 0 and lines[-1] == "overall okay: 1", good.stdout + good.stderr
    assert [line for line in lines if line.startswith("d")] == [
        *(
            [
                "dwte",
                "dwpe",
                "dln1w",
                "dln1b",
                "dqkvw",
                "dqkvb",
                "dattprojw",
                "dattprojb",
                "dln2w",
                "dln2b",
                "dfcw",
                "dfcb",
                "dfcprojw",
                "dfcprojb",
            ]
        ),
        *("dlnfw", "dlnfb"),
    ]
    assert sum(line.startswith("TENSOR OK, maxdiff = ") for line in lines) == 16
    assert any(line.startswith("OK (LOGITS), max_diff = ") for line in lines)
    assert any(line.startswith("LOSS OK: ") for line in lines)

    named_views(state.grads, tensor_shapes(config))["fcw"][1, 3, 5] += 1e-3
    write_debug_state(tmp_path / "bad.bin", state)
    bad = check_gpt2(tmp_path / "model.bin", tmp_path / "bad.bin")
    lines = bad.stdout.splitlines()
    assert bad.returncode == 1 and lines[-1] == "overall okay: 0"
    verdict, difference = lines[lines.index("dfcw") + 6].split(", maxdiff = ")
    assert verdict == "TENSOR NOT OK" and abs(float(difference) - 1e-3) < 1e-8

    missing = check_gpt2(tmp_path / "model.bin", tmp_path / "none.bin")
    assert missing.returncode == 1 and "none.bin" in missing.stderr and "Traceback" not in missing.stderr
