"""--recompute 1: the same bits, in the memory that it says."""

import re
import shlex
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import test_sparse_model
import test_torus_model
import tiny
from cuda_emulator.runtime import EmulatedRuntime
from test_sparse_model import CONFIGS, SPARSE, batch
from tiny import assert_same_run, done, losses

import train_banded
import train_sparse_attn
import train_toroidal
from kernels import cpu, cuda
from llmc.checkpoint import GPT2Config, Model, num_parameters, write_model
from llmc.dataloader import write_tokens
from llmc.init import gpt2_init
from systems.band import Band
from systems.selection import measure_rows

TRAINERS = {"banded": train_banded, "sparse": train_sparse_attn, "toroidal": train_toroidal}
SMALL = "--indexer-heads 2 --indexer-dim 4"
RUNS = [
    ("banded", "-w 16"),
    ("banded", "-1 8 -2 24 --mask-init 0"),
    ("banded", "-d 1"),
    ("banded", "-w 16 --kernel mask --permute 3"),
    ("sparse", f"{SMALL} --top-k 3 --indexer-warmup 3"),
    ("sparse", f"{SMALL} --top-k 6 --adaptive prefix --indexer-warmup 3"),
    ("sparse", f"{SMALL} --top-k 6 --selector top-p --answers-after 97:122"),
    ("sparse", "--top-k 3 --selector random"),
    ("sparse", "--adaptive upstream --indexer upstream"),
    ("sparse", "--attention dense"),
    ("deepseek", f"{SMALL} --top-k 3 --indexer-warmup 3"),
    ("toroidal", "--layers 0,1"),
    ("toroidal", "--layers 0 --train all --learn-lambda 1 --fusion attention"),
]


@pytest.fixture
def train(folder, capfdbinary):
    """train("sparse", "-n 3") -> Result: a trainer on the tiny files, in this process."""

    def run(trainer, flags, **changed):
        if trainer == "deepseek":
            trainer = "sparse"
            write_model("model.bin", Model(tiny.DEEPSEEK, gpt2_init(tiny.DEEPSEEK, 1)))
        return tiny.call(capfdbinary, TRAINERS[trainer].main, *tiny.options(**changed), *shlex.split(flags))

    return run


@pytest.mark.parametrize("trainer, flags", RUNS)
def test_it_changes_no_digit(train, trainer, flags):
    """All that is printed but memory and times, and every bit that is saved, also of a run resumed with it."""
    flags = f"{flags} -n 6 -v 2 -s 3 --grad-accum 2 -l 0.01 --grad-clip 0.5"
    outs = [done(train(trainer, f"{flags} --recompute {value} -c {value}.bin")).out for value in (0, 1)]
    measured = re.compile(r"\||allocated|activations|memory|indexer and selection")
    one, other = (
        [line for line in tiny.without_times(out).splitlines() if not measured.match(line)]
        for out in (outs[0].replace("0.bin", "1.bin"), outs[1])
    )
    assert one == other and len(losses(outs[1])) == 6
    assert_same_run("0.bin", "1.bin")
    if trainer != "toroidal":
        assert "predicted" not in outs[0] and "without --recompute" in outs[1]

    done(train(trainer, f"{flags} --recompute 0 -n 4 -c part.bin".replace("-n 6", "")))
    done(train(trainer, "--resume part.bin -n 6 --recompute 1"))
    assert_same_run("0.bin", "part.bin")


MODELS = [("gpt2", kind) for kind in SPARSE] + [("mla", "top-k"), ("moe", "top-k")]


@pytest.mark.parametrize("config, kind, warming_up", [
    *((config, kind, False) for config, kind in MODELS),
    *((config, kind, True) for config, kind in MODELS if SPARSE[kind].indexer != "none"),
])  # fmt: skip
def test_gradients_and_measures_of_sparse_models_are_the_same_bits(config, kind, warming_up):
    assert sparse_step(config, kind, warming_up, False, cpu) == sparse_step(config, kind, warming_up, True, cpu)


def sparse_step(config, kind, warming_up, recompute, device) -> tuple:
    """(gradients, indexer's loss, what measure finds) of two micro-steps."""
    (inputs, targets), learns = batch(CONFIGS[config], 2, 9), SPARSE[kind].indexer != "none"
    params = test_sparse_model.tiny_model(CONFIGS[config], SPARSE[kind], 2, 9, np.float32).params_flat
    model = train_sparse_attn.GPT2(device, CONFIGS[config], SPARSE[kind], params, 2, 9, recompute=recompute)
    for micro_step in range(2):
        model.forward(inputs, targets, 2, dense=warming_up)
        model.backward(micro_step == 0, not warming_up, learns, dense=warming_up, grad_accum=2)
    grads, kl = device.to_host(model.grads_flat).tobytes(), model.mean_kl() if learns else 0.0
    divergences, agreements, _ = measure_rows(model, inputs, dense=warming_up)
    return grads, kl, divergences, agreements


@pytest.mark.parametrize("recompute", [False, True])
def test_sparse_steps_on_a_gpu_have_no_race_and_are_the_cpus(recompute):
    """In mode check, in which a buffer that is shared too soon would be a race or another value."""
    device = cuda.device(EmulatedRuntime("check"))
    grads, kl, *_ = sparse_step("gpt2", "top-k", False, recompute, device)
    wanted, wanted_kl, *_ = sparse_step("gpt2", "top-k", False, False, cpu)
    assert np.allclose(np.frombuffer(grads, np.float32), np.frombuffer(wanted, np.float32), rtol=1e-4, atol=1e-5)
    assert kl == pytest.approx(wanted_kl, rel=1e-4)


SIZES = GPT2Config(maxT=64, V=96, L=6, NH=4, C=64, Vp=96)


def banded(recompute: bool, device=cpu, B=4, T=64, config=SIZES):
    return train_banded.GPT2(device, config, gpt2_init(config, 1), B, T, Band(64, 64), recompute=recompute)


def sparse(recompute: bool, B=4, T=64):
    sparsity = replace(SPARSE["top-k"], k=6 * (8,))
    flat = test_sparse_model.tiny_model(SIZES, sparsity, B, T, np.float32).params_flat
    return train_sparse_attn.GPT2(cpu, SIZES, sparsity, flat, B, T, recompute=recompute)


def toroidal(recompute: bool):
    torus = replace(test_torus_model.BASE, layers=(0, 3), period=64)
    return test_torus_model.tiny_model(torus, 4, 64, np.float32, config=SIZES, recompute=recompute)


@pytest.mark.parametrize("make", [banded, sparse, toroidal])
def test_it_saves_the_memory_that_it_says(make):
    """Peak of Python's allocations in a first step: the difference is the predicted one within 2%."""
    (inputs, targets), peaks, predicted = batch(SIZES, 4, 64), [], []
    step(make(True), inputs, targets)  # the ops' own small buffers are there from then on
    for recompute in (False, True):
        model = make(recompute)
        tracemalloc.start()
        step(model, inputs, targets)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        predicted.append(model.activation_bytes(recompute))
    saved, expected = peaks[0] - peaks[1], predicted[0] - predicted[1]
    print(f"saved {saved} bytes, predicted {expected}; peaks {peaks}")
    assert expected > 0.5 * predicted[0] and abs(saved - expected) < 0.02 * expected


def step(model, inputs, targets):
    model.forward(inputs, targets)
    model.backward()


def test_banded_steps_on_a_gpu_are_the_same_bits():
    (inputs, targets), grads = batch(SIZES, 2, 8), []
    config = GPT2Config(maxT=16, V=96, L=3, NH=2, C=16, Vp=96)
    for recompute in (False, True):
        device = cuda.device(EmulatedRuntime("check"))
        model = banded(recompute, device, 2, 8, config)
        step(model, inputs, targets)
        grads.append(device.to_host(model.grads_flat).tobytes())
    assert grads[0] == grads[1] and num_parameters(config) * 4 == len(grads[0])


@pytest.mark.parametrize("script", ["train_banded.py", "train_sparse_attn.py"])
def test_what_a_run_says_of_its_memory(folder, script):
    """In a process of its own: in this one memory of earlier tests would be taken again."""
    tiny.make_folder(folder, tiny.resized(L=6, C=32, V=256, Vp=256, maxT=256))
    write_tokens("train.bin", np.zeros(4 * 256 + 1, np.uint16))
    sizes = dict(batch_size=4, seq_len=256, train_data="train.bin", val_data="train.bin")
    out = done(tiny.run_script(script, [*tiny.options(**sizes), *["-n", "1", "--recompute", "1"]], folder)).out
    found = re.search(
        r"^activations: (\d+) MiB predicted \((\d+) without --recompute\), memory grew by (\d+) MiB$", out, re.M
    )
    predicted, without, grew = map(int, found.groups())
    assert f"allocated {predicted} MiB for activations\n" in out
    assert predicted < 0.6 * without and 0.5 * predicted < grew < without
