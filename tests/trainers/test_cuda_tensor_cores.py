"""Whole steps of the three trainers on an emulated GPU with tensor cores: no race, no stray access, CPU losses."""

import importlib

import numpy as np
import pytest
import tiny
from test_cuda_training import on_emulator  # noqa: F401  a fixture
from test_golden import losses

pytestmark = pytest.mark.launches("gpt2", "band", "sparse", "torus")

RUNS = {
    "train_banded": dict(fc1_bandwidth=24, fc2_bandwidth=24),
    "train_sparse_attn": dict(attention="dense"),  # lists of keys have kernels of their own
    "train_toroidal": dict(layers=0, depth=2),  # layer 1 is GPT-2's
}


@pytest.mark.parametrize("tf32", [False, True], ids=["3xtf32", "tf32"])
@pytest.mark.parametrize("trainer", RUNS)
def test_steps_in_mode_check(trainer, tf32, on_emulator, folder, capsys):  # noqa: F811
    """The emulator's products round nothing: TF32 is attention's alone. The last loss has seen three large updates."""
    main = importlib.import_module(trainer).main
    options = tiny.options(
        **RUNS[trainer], batch_size=1, seq_len=20, steps=3, lr=0.01, val_every=1, val_batches=1, sample_every=0
    )
    assert main([*options, "--device", "cpu"]) == 0
    reference = capsys.readouterr().out
    runtime = on_emulator(mode="check", capability=(9, 0), tf32=tf32)
    launched, launch = set(), runtime.launch
    runtime.launch = lambda kernel, *rest: (launched.add(kernel), launch(kernel, *rest))
    assert main(options) == 0
    ours, kind = capsys.readouterr(), "tf32" if tf32 else "3xtf32"
    assert ours.err == "" and "CUDA emulator" in ours.out
    tensor = {f"attention_{part}_{kind}_64_kernel" for part in ("forward", "dq", "dkdv")}
    assert {name for name in launched if name.startswith("attention_")} - {"attention_delta_kernel"} == tensor
    for kind in ("train", "val"):
        difference = np.abs(losses(ours.out, kind) - losses(reference, kind)).max()
        print(f"{kind} losses within {difference:.1e}")
        assert losses(reference, kind).size >= 2 and difference <= 1e-5
