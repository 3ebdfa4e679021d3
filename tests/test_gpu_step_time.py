"""gpu_step_time.py and kernel_times.py in benchmarks/: turns on the CPU, tables, llm.c's output, bounds by hand."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import gpu_step_time
import kernel_times
import numpy as np
import pytest
import turns
from gpu_step_time import PROGRAMS, SIZES, Figure
from kernel_times import PRODUCTS, Spent, Stopwatch

from kernels import cpu
from kernels.cuda import device as device_of
from kernels.cuda.gpt2 import matmul_tensor
from llmc.checkpoint import GPT2Config
from llmc.errors import UserError

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "benchmarks" / "gpu_step_time.py"
H100 = "NVIDIA H100 80GB HBM3"


def test_on_the_cpu():
    """Every program of ours that tiny has, in one table; nothing is written."""
    before = (ROOT / "benchmarks" / "GPU.md").read_bytes()
    flags = ["--device", "cpu", "--sizes", "tiny", "--steps", "1", "--precisions", "float32"]
    done = subprocess.run([sys.executable, SCRIPT, *flags], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("| C=128 L=4 B=4 T=64 | ours")]
    assert [row.split(" | ")[1] for row in rows] == [PROGRAMS[program] for program in SIZES["tiny"].ours]
    assert (ROOT / "benchmarks" / "GPU.md").read_bytes() == before


@pytest.mark.parametrize("program", ["dense", "both256", "toroidal", "sparse", "shared", "recency"])
def test_steps_learn(program, capsys):
    """Each program's step at a small size: the loss of one batch falls, and pause is called before both halves."""
    size = gpt2_of(32)
    step, batch, pauses = gpu_step_time.our_step(program, size, cpu), next(gpu_step_time.batches(size)), []
    losses = [step(t, *batch, lambda: pauses.append(0)) for t in range(1, 6)]
    assert losses[0] == pytest.approx(np.log(size.config.V), abs=0.1) and losses[-1] < losses[0]
    assert len(pauses) == 10


def gpt2_of(T: int) -> gpu_step_time.Size:
    return gpu_step_time.Size(GPT2Config(maxT=T, V=60, L=2, NH=2, C=32, Vp=64), 2, T, ())


def test_wrong_lists_are_refused():
    for flags, words in (("--sizes 125M", "--sizes 125M"), ("--precisions fp8,tf32", "--precisions fp8")):
        done = subprocess.run([sys.executable, SCRIPT, *flags.split()], capture_output=True, text=True, check=False)
        assert done.returncode == 2 and f"error: {words}: expected some of" in done.stderr


# ----------------------------------------------------------------------------------------------------------------------
# tables


def test_table():
    figures = {
        "124M": {
            ("dense", "float32"): Figure(84.4, 5730, 10.98),
            ("dense", "tf32"): Figure(32.2, 5730, 10.98),
            ("torch", "bfloat16"): Figure(17.9, 5126, 10.97),
            ("llmc", "tf32"): Figure(57.9, 4000),
        },
        "long": {},
    }
    assert gpu_step_time.table(figures, ["float32", "tf32", "bfloat16"]).splitlines() == [
        "| size | program | float32, ms | MiB | TF32, ms | MiB | bfloat16, ms | MiB |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
        "| C=768 L=12 B=4 T=1024 | ours, dense | 84.40 | 5730 | 32.20 | 5730 | | |",
        "| C=768 L=12 B=4 T=1024 | PyTorch eager | | | | | 17.90 | 5126 |",
        "| C=768 L=12 B=4 T=1024 | llm.c | | | 57.90 | 4000 | | |",
    ]
    assert gpu_step_time.losses_apart(figures["124M"]) == "0.0e+00" and gpu_step_time.losses_apart({}) == "none"


def test_figures_are_medians_after_the_warm_up():
    rows = [[1000.0, 5.0, 1]] * gpu_step_time.WARM_UP + [[ms, 4.0, 70] for ms in (3.0, 9.0, 4.0)]
    assert gpu_step_time.figure_of(rows) == Figure(4.0, 70, 5.0)


def test_a_program_that_ends_early_is_left_out(capfd):
    """PyTorch without a package of that name: its process ends, ours go on."""
    pairs = [("torch", "float32"), ("dense", "float32")]
    if turns.find_spec("torch"):
        pytest.skip("PyTorch is installed")
    figures = gpu_step_time.compare("tiny", pairs, 1, "cpu")
    assert [*figures] == [("dense", "float32")] and figures["dense", "float32"].ms > 0
    assert "tiny, PyTorch eager, float32: ended early" in capfd.readouterr().err


def test_sections_are_kept(tmp_path):
    """A section of the same card and day is written anew, all others stay."""
    page = tmp_path / "GPU.md"
    old = (ROOT / "benchmarks" / "GPU.md").read_text()
    page.write_text(old)
    for text in ("| 1 |", "| 2 |"):
        turns.write_section("H100 PCIe, 2027-01-01: make bench_gpu", text, page)
    turns.write_section("H100 PCIe, 2027-01-02: make bench_gpu", "| 3 |", page)
    added = "\n## H100 PCIe, 2027-01-01: make bench_gpu\n\n| 2 |\n\n## H100 PCIe, 2027-01-02: make bench_gpu\n\n| 3 |\n"
    assert page.read_text() == old + added


# ----------------------------------------------------------------------------------------------------------------------
# llm.c

FP32 = """allocated 474 MiB for model parameters
allocated 5706 MiB for activations
val loss 11.009
step    1/16: train loss 11.004 (400.5 ms, 1 tok/s)
"""
STEPS = "".join(f"step {i:4d}/16: train loss 10.9 ({50 + i}.250000 ms, 70000 tok/s)\n" for i in range(2, 17))
BEFORE, BEHIND = "loss 10.98 (+nanz)| norm 2.1 (+nanz)| lr 1.00e-04", "20.0% bf16 MFU | 270000 tok/s"
CUDA = "".join(f"step {i:4d}/16 | {BEFORE} | {15 + i / 10:.2f} ms | {BEHIND}\n" for i in range(1, 17))


@pytest.fixture
def llmc(tmp_path):
    """A folder with the two programs, which check their files and print what llm.c's do."""
    check = "test -f train.bin -a -f val.bin -a -f gpt2_124M.bin || exit 3\n"
    for name, more, text in (
        ("train_gpt2fp32cu", 'test "$NVIDIA_TF32_OVERRIDE" = 0 && echo "allocated 1 MiB for a mode"\n', FP32 + STEPS),
        ("train_gpt2cu", "test -f gpt2_124M_bf16.bin || exit 4\n", CUDA),
    ):
        program = tmp_path / name
        program.write_text(f"#!/bin/sh\n{check}{more}cat <<'END'\n{text}END\n")
        program.chmod(0o755)
    return tmp_path


@pytest.mark.skipif(os.name == "nt", reason="a shell script")
def test_llmc(llmc):
    """Steps 5 to 16: 50.25 + 5 .. 50.25 + 16, their median 60.75; 15 + 0.5 .. 15 + 1.6, 16.05."""
    size = gpt2_of(16)
    assert gpu_step_time.run_llmc(llmc, size, "tf32", 12)[:2] == (60.75, 474 + 5706)
    assert gpu_step_time.run_llmc(llmc, size, "float32", 12)[:2] == (60.75, 474 + 5706 + 1)
    assert gpu_step_time.run_llmc(llmc, size, "bfloat16", 12)[:2] == (pytest.approx(16.05), 0)


@pytest.mark.skipif(os.name == "nt", reason="a shell script")
def test_llmc_that_fails(llmc, capsys):
    (llmc / "train_gpt2cu").write_text("#!/bin/sh\necho [CUDA ERROR] out of memory; exit 1\n")
    (llmc / "train_gpt2fp32cu").unlink()
    assert gpu_step_time.run_llmc(llmc, gpt2_of(16), "bfloat16", 1) is None
    assert gpu_step_time.run_llmc(llmc, gpt2_of(16), "tf32", 1) is None
    said = capsys.readouterr().err
    assert "ended with 1 and said: [CUDA ERROR] out of memory" in said and "make train_gpt2fp32cu in" in said


def test_llmc_s_command_lines():
    words = gpu_step_time.llmc_command(Path("/llm.c"), SIZES["124M"], "bfloat16")
    assert words[:3] == ["/llm.c/train_gpt2cu", "-e", "gpt2_124M_bf16.bin"] and words[-2:] == ["-d", "4096"]
    words = gpu_step_time.llmc_command(Path("/llm.c"), SIZES["124M"], "tf32")
    assert words[0] == "/llm.c/train_gpt2fp32cu" and "-e" not in words and "0" not in words


# ----------------------------------------------------------------------------------------------------------------------
# kernels


class Clock:
    """Events that read a clock which only work moves on."""

    def __init__(self):
        self.now = 0.0

    def event(self):
        event = SimpleNamespace(at=None)
        event.record = lambda: setattr(event, "at", self.now)
        return event


class FakeRuntime:
    def __init__(self, clock):
        self.clock, self.calls = clock, []

    def launch(self, kernel, grid, block, args, shared_mem=0):
        self.calls.append((kernel, grid, block, args, shared_mem))
        self.clock.now += {"gelu_forward_kernel": 0.5, "adamw_kernel": 2.0}[kernel]

    def gemm(self, out, a, b, transa=False, transb=False, beta=0.0):
        self.calls.append(("gemm", transa, transb, beta))
        self.clock.now += 3.0


def test_stopwatch():
    """Two equal steps of two gelus, an adamw and two products; time between them is nobody's."""
    clock = Clock()
    runtime, matrix = FakeRuntime(clock), np.zeros
    with Stopwatch(runtime, clock.event, lambda start, stop: stop.at - start.at) as stopwatch:
        for _ in range(2):
            for _ in range(2):
                runtime.launch("gelu_forward_kernel", 4, 256, ("x",), shared_mem=16)
                clock.now += 100
            runtime.gemm(matrix((4, 6)), matrix((4, 5)), matrix((6, 5)), transb=True)
            runtime.gemm(matrix((5, 6)), matrix((4, 5)), matrix((4, 6)), True, beta=1.0)
            runtime.launch("adamw_kernel", grid=1, block=32, args=())
    spent = stopwatch.spent(2)
    assert [*spent] == [PRODUCTS, "adamw_kernel", "gelu_forward_kernel"]
    assert spent[PRODUCTS] == (6.0, 2, ((4, 6, 5, 0.0), (5, 6, 4, 1.0)))
    assert spent["adamw_kernel"] == (2.0, 1, ()) and spent["gelu_forward_kernel"] == (1.0, 2, ())
    assert runtime.calls[0] == ("gelu_forward_kernel", 4, 256, ("x",), 16) and runtime.calls[2] == ("gemm", 0, 1, 0.0)
    assert "launch" not in vars(runtime) and "gemm" not in vars(runtime)


NAMES = kernel_times.names_of(GPT2Config(), 4, 1024, 256, 2, 0)


def test_bounds():
    """On the H100, 3350 GB/s, 67 TFLOP/s, in TF32 494.7.

    gelu: 2*4096*3072 floats, 100.66 MB, in each of 12 layers: 0.3606 ms. A product of (4096,768) and (768,2304):
    14.496 GFLOP, 29.30 us in TF32, 216.35 in float32. adamw: 7*124,475,904 floats: 1.0404 ms.
    """
    product = Spent(1.0, 1, ((4096, 2304, 768, 0.0),))
    for kernel, spent, tf32, expected in (
        ("gelu_forward_kernel", Spent(1.0, 12), False, 0.36056),
        ("adamw_kernel", Spent(1.0, 16), False, 1.04043),
        (PRODUCTS, product, True, 0.029302),
        (PRODUCTS, product, False, 0.216351),
        ("matmul_forward_3xtf32_kernel", product, False, 3 * 0.029302),
    ):
        assert kernel_times.bound(kernel, spent, NAMES, H100, tf32) == pytest.approx(expected, rel=1e-4)
    assert kernel_times.bound("gelu_forward_kernel", product, NAMES, "NVIDIA T1000", False) is None
    assert kernel_times.bound("unheard_of_kernel", product, NAMES, H100, False) is None


def test_bounds_of_what_dense_models_lack():
    """Banded products: twice in a layer, 5*N*C + K floats or 2*N*A1 operations; wider heads count as those of 64."""
    names = kernel_times.names_of(GPT2Config(), 4, 1024, 256, 2, 256)
    assert names["P"] == 124_475_904 - 12 * 8 * 768**2
    memory, arithmetic = 4 * (5 * 4096 * 768 + names["K"]) / 3350e9, 2 * 4096 * names["A1"] / 67e12
    found = kernel_times.bound("band_matmul_forward_kernel", Spent(1.0, 24), names, H100, True)
    assert found == pytest.approx(24e3 * max(memory, arithmetic))
    found = kernel_times.bound("band_matmul_forward_3xtf32_kernel", Spent(1.0, 24), names, H100, False)
    assert found == pytest.approx(24e3 * max(memory, arithmetic * 67 * 3 / 494.7))
    one, other = (f"attention_forward_{hs}_kernel" for hs in (64, 128))
    assert kernel_times.bound(other, Spent(1.0, 12), NAMES, H100, True) == pytest.approx(
        kernel_times.bound(one, Spent(1.0, 12), NAMES, H100, True)
    )


def test_our_own_products_are_known_by_their_arguments():
    """Sizes from the launchers' arguments, in the kernels' order."""
    runtime = SimpleNamespace(tf32=False, launch=lambda *args: None, gemm=None, capability=(9, 0))
    event = lambda: SimpleNamespace(record=lambda: None)  # noqa: E731
    with Stopwatch(runtime, event, lambda start, stop: 0.5) as stopwatch:
        inp, weight, dout = (np.empty(shape, np.float32) for shape in ((40, 8), (12, 8), (40, 12)))
        matmul_tensor.tensor_forward(runtime, dout, inp, weight, None)
        matmul_tensor.tensor_dinp(runtime, inp, dout, weight)
        matmul_tensor.tensor_dweight(runtime, weight, dout, inp, 1)
    shapes = [spent.shapes for spent in stopwatch.spent(1).values()]
    assert shapes == [((40, 12, 8, 0),), ((40, 8, 12, 0),), ((12, 8, 40, 1),)]


def test_every_card_s_products_have_a_bound():
    for card, rates in kernel_times.RATES.items():
        assert len(rates) == 3
        assert all(kernel_times.promised(card, tf32) > 0 for tf32 in (False, True))


def test_table_of_kernels():
    kernels = {"adamw_kernel": Spent(2.0, 16), "odd_kernel": Spent(1.0, 3), "a_kernel": Spent(0.6, 2)}
    kernels["b_kernel"] = Spent(0.4, 1)
    assert kernel_times.table(kernels, NAMES, H100, False, most=2).splitlines()[2:] == [
        "| adamw | 2.000 | 50.0% | 16 | 52% |",
        "| odd | 1.000 | 25.0% | 3 | |",
        "| 2 others | 1.000 | 25.0% | 3 | |",
        "| all | 4.000 | 100.0% | 22 | |",
    ]


@pytest.mark.launches("gpt2", "band")
def test_profile_of_a_step(emulator, monkeypatch):
    """A dense step of 2 layers on the emulator: 4 products a layer and the head's, each three times; 2 gelus."""
    paused = []
    pause_kernel = SimpleNamespace(get_function=lambda name: lambda grid, block, args: paused.append(args))
    event = lambda: SimpleNamespace(record=lambda: None)  # noqa: E731
    cuda = SimpleNamespace(Event=event, get_elapsed_time=lambda start, stop: 0.25)
    fake = SimpleNamespace(RawModule=lambda code, options: pause_kernel, cuda=cuda)
    monkeypatch.setitem(sys.modules, "cupy", fake)
    size, at = gpt2_of(16), iter(range(1, 9))
    step, batch = gpu_step_time.our_step("dense", size, device_of(emulator)), next(gpu_step_time.batches(size))
    spent = kernel_times.measure(emulator, lambda pause: step(next(at), *batch, pause), steps=2)
    assert len(paused) == 4 and next(at) == 7
    assert spent[PRODUCTS].launches == 27 and spent[PRODUCTS].ms == 27 * 0.25
    assert spent["gelu_forward_kernel"][:2] == (0.5, 2)
    assert spent[PRODUCTS].shapes[0] == (32, 96, 32, 0.0)  # 2 rows of 16 tokens, the first layer's q, k and v
    # the first micro-step writes every product's gradient
    assert {beta for _, _, _, beta in spent[PRODUCTS].shapes} == {0}
    names = kernel_times.names_of(size.config, size.B, size.T, 8, 2, 0)
    assert f"| all | {0.25 * sum(each.launches for each in spent.values()):.3f} |" in kernel_times.table(
        spent, names, H100, False
    )


@pytest.fixture
def on_an_h100(tmp_path, monkeypatch):
    """main on what seems to be an H100, with figures that are at hand."""
    card = SimpleNamespace(describe=lambda: f"{H100}, 532 of 81079 MiB used")
    monkeypatch.setattr(turns, "open_gpu", lambda: card)
    monkeypatch.setattr(gpu_step_time, "versions", lambda name: f"{name}, driver 580, CUDA 13.0, CuPy 14.2.0")
    monkeypatch.setattr(gpu_step_time, "torch_version", lambda: "PyTorch 2.11.0 for CUDA 13.0")
    monkeypatch.setattr(gpu_step_time, "PAGE", tmp_path / "GPU.md")
    monkeypatch.setattr(gpu_step_time, "profiles", lambda *of: [f"kernels of {of}"])
    monkeypatch.setattr(gpu_step_time, "run_llmc", lambda folder, size, precision, steps: Figure(58.0, 4000))
    monkeypatch.setenv("LLMC", str(tmp_path))
    asked = []

    def compare(name, pairs, steps, device):
        asked.append((name, pairs, steps, device))
        return {pair: Figure(10.0, 500, 10.9) for pair in pairs}

    monkeypatch.setattr(gpu_step_time, "compare", compare)
    (tmp_path / "GPU.md").write_text("# On a GPU\n\n## another\n\ntext\n")
    return SimpleNamespace(page=tmp_path / "GPU.md", asked=asked)


def test_all_of_it_writes_a_section(on_an_h100, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_step_time.py", "--profile"])
    assert gpu_step_time.main() == 0
    assert [(name, len(pairs), steps, device) for name, pairs, steps, device in on_an_h100.asked] == [
        ("124M", 13, 12, "cuda"), ("tiny", 12, 12, "cuda"), ("long", 14, 12, "cuda")
    ]  # fmt: skip
    assert ("dense", "bfloat16") not in on_an_h100.asked[0][1] and ("compiled", "bfloat16") in on_an_h100.asked[0][1]
    assert [pair for pair in on_an_h100.asked[0][1] if pair[0] == "own"] == [("own", "float32")]
    text = on_an_h100.page.read_text()
    assert text.startswith("# On a GPU\n\n## another\n\ntext\n\n## NVIDIA H100 80GB HBM3, 2")
    assert f": make bench_gpu\n\n{H100}, driver 580, CUDA 13.0, CuPy 14.2.0, 2" in text
    assert text.count("| C=768 L=4 B=1 T=4096 |") == 7 and text.count("| llm.c | 58.00 | 4000 |") == 3
    assert text.count("kernels of ") == 6 and f"kernels of ('long', 'tf32', '{H100}')" in text
    assert capsys.readouterr().out.count("first losses of the dense programs within 0.0e+00") == 3


@pytest.mark.parametrize("flags", ["--sizes 124M", "--precisions tf32,float32", "--steps 3"])
def test_a_part_of_it_writes_nothing(on_an_h100, monkeypatch, flags):
    before = on_an_h100.page.read_text()
    monkeypatch.setattr(sys, "argv", ["gpu_step_time.py", *flags.split()])
    assert gpu_step_time.main() == 0 and on_an_h100.page.read_text() == before


def test_versions(monkeypatch):
    """As nvidia-smi and CuPy tell them; without nvidia-smi the driver is unknown."""
    runtime = SimpleNamespace(runtimeGetVersion=lambda: 12090)
    fake = SimpleNamespace(__version__="14.2.0", cuda=SimpleNamespace(runtime=runtime))
    monkeypatch.setitem(sys.modules, "cupy", fake)
    monkeypatch.setattr(gpu_step_time, "torch_version", lambda: "")
    monkeypatch.setenv("PATH", "")
    assert gpu_step_time.versions(H100) == f"{H100}, driver unknown, CUDA 12.9, CuPy 14.2.0, no PyTorch"
    smi = SimpleNamespace(stdout="580.95.05\n580.95.05\n")
    monkeypatch.setattr(gpu_step_time.subprocess, "run", lambda *args, **options: smi)
    assert "driver 580.95.05, CUDA 12.9" in gpu_step_time.versions(H100)


def test_workers_that_end_are_told():
    worker = turns.start(str(SCRIPT), "--worker", "none")
    worker.wait()
    with pytest.raises(UserError, match="stopped without an answer"):
        turns.turn(worker)
    turns.stop([worker])
