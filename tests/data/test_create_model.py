"""Random models: the drawing rule of gpt2_init to the bit, and data/create_model.py's sizes, files and refusals."""

import hashlib
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data import corpus, create_model
from llmc.checkpoint import (
    BFLOAT16,
    DeepSeekConfig,
    GPT2Config,
    from_bfloat16,
    named_views,
    num_parameters,
    read_model,
    tensor_shapes,
    to_bfloat16,
)
from llmc.dataloader import write_tokens
from llmc.errors import UserError
from llmc.init import gpt2_init
from llmc.rand import mersenne
from llmc.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent.parent
SMALL = GPT2Config(maxT=64, V=510, L=2, NH=4, C=64, Vp=512)
DEEPSEEK = DeepSeekConfig(maxT=64, V=500, L=3, NH=4, C=64, Vp=504, F=128, E=3, top=2, q_rank=24, kv_rank=16, R=6)
MLA, MOE = ("qaw", "qbw", "kvaw", "kvbw", "attprojw"), ("routerw", "expertw", "expertprojw")
DEEPSEEK_MATRICES = ("wte", "wpe", *MLA, *MOE, "headw")
FLAGS = ["-C", "8", "-L", "2", "-H", "2", "-T", "16", "--vocab", "250"]


@pytest.fixture(autouse=True)
def in_empty_folder_with_data(tmp_path, monkeypatch):
    """The current folder is empty; whether the checkout has data makes no difference."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(create_model, "default_data", lambda V, split: __file__)


def polar_normals(seed, count):
    """Standard normals by Marsaglia's polar method from MT19937's words, two to a double of 53 bits."""
    words = iter(mersenne(seed).random_raw(8 * count).tolist())
    double = lambda: ((next(words) >> 5) * 67108864 + (next(words) >> 6)) / 9007199254740992  # noqa: E731
    normals = []
    while len(normals) < count:
        x1, x2 = 2 * double() - 1, 2 * double() - 1
        r2 = x1 * x1 + x2 * x2
        if 0 < r2 < 1:
            f = (-2 * math.log(r2) / r2) ** 0.5
            normals += [f * x2, f * x1]
    return np.array(normals[:count])


def test_init_is_fixed_to_the_bit():
    params = gpt2_init(SMALL, seed=11)
    np.testing.assert_allclose(params[:500], 0.02 * polar_normals(11, 500), rtol=1e-7)
    digest = hashlib.sha256(params.astype("<f4").tobytes()).hexdigest()
    assert digest == "35678a8b246777c7692389da1b16fd00d14ea4c530812d040afac890df1c1969"
    assert not np.array_equal(params, gpt2_init(SMALL, seed=12))


def test_init_tensors():
    config = GPT2Config(maxT=64, V=500, L=3, NH=4, C=64, Vp=512)
    tensors = named_views(gpt2_init(config, seed=1), tensor_shapes(config))
    assert not tensors["wte"][500:].any()
    for name in ("ln1w", "ln2w", "lnfw"):
        assert (tensors[name] == 1).all()
    for name in ("ln1b", "qkvb", "attprojb", "ln2b", "fcb", "fcprojb", "lnfb"):
        assert not tensors[name].any()
    residual = 0.02 / 6**0.5  # 2 * L = 6 projections write to the residual stream
    check_stds(tensors, config.V, wte=0.02, wpe=0.02, qkvw=0.02, attprojw=residual, fcw=0.02, fcprojw=residual)


def check_stds(tensors, V, **stds):
    for name, std in stds.items():
        values = tensors[name][:V] if name in ("wte", "headw") else tensors[name]
        error = std / (2 * values.size) ** 0.5  # the standard error of a sample's standard deviation
        assert abs(values.std() - std) < 5 * error
        assert abs(values.mean()) < 8 * error


def test_init_of_mla_and_moe():
    """No projection is scaled by the depth; the head is padded as wte is."""
    tensors = named_views(gpt2_init(DEEPSEEK, seed=1), tensor_shapes(DEEPSEEK))
    ones = ("ln1w", "qnw", "kvnw", "ln2w", "lnfw")
    for name, tensor in tensors.items():
        if name not in DEEPSEEK_MATRICES:
            assert (tensor == (name in ones)).all()
    for name in ("wte", "headw"):
        assert not tensors[name][500:].any() and tensors[name][499].any()
    check_stds(tensors, 500, **dict.fromkeys(DEEPSEEK_MATRICES, 0.02))


def test_init_of_mla_and_moe_draws_in_file_order():
    tensors = named_views(gpt2_init(DEEPSEEK, seed=3), tensor_shapes(DEEPSEEK))
    generator = np.random.RandomState(3)
    for name in DEEPSEEK_MATRICES:
        expected = (0.02 * generator.standard_normal(tensors[name].shape)).astype(np.float32)
        rows = slice(0, 500) if name in ("wte", "headw") else slice(None)
        np.testing.assert_array_equal(tensors[name][rows], expected[rows])


def test_init_of_experts_alone_leaves_attention_unscaled():
    config = DeepSeekConfig(maxT=64, V=500, L=3, NH=4, C=64, Vp=504, F=128, E=2, top=1)
    tensors = named_views(gpt2_init(config, seed=1), tensor_shapes(config))
    check_stds(tensors, 500, qkvw=0.02, attprojw=0.02, expertprojw=0.02)
    assert not tensors["qkvb"].any() and not tensors["attprojb"].any()


def test_init_draws_in_the_documented_order():
    generator = np.random.RandomState(3)
    tensors = named_views(gpt2_init(SMALL, seed=3), tensor_shapes(SMALL))
    for name in ("wte", "wpe", "qkvw", "attprojw", "fcw", "fcprojw"):
        std = 0.02 / 2 if name in ("attprojw", "fcprojw") else 0.02
        expected = (std * generator.standard_normal(tensors[name].shape)).astype(np.float32)
        rows = slice(0, SMALL.V) if name == "wte" else slice(None)
        np.testing.assert_array_equal(tensors[name][rows], expected[rows])


@pytest.mark.parametrize(
    "preset, parameters",
    [
        ("tiny", 7_265_024),
        ("small", 51_237_888),
        ("d12", 124_475_904),
        ("d24", 354_871_296),
        ("d36", 774_090_240),
        ("d48", 1_557_686_400),
    ],
)
def test_presets(preset, parameters):
    config = create_model.model_config(create_model.parse_arguments(["--preset", preset]))
    assert num_parameters(config) == parameters
    assert (config.V, config.Vp) == (50257, 50304)
    assert config.C % config.NH == 0


def config_of(flags):
    return create_model.model_config(create_model.parse_arguments(flags.split()))


def test_published_sparse_attention_model(capsys):
    config = config_of("--preset dsa --vocab 1000")
    assert num_parameters(config) == 10_008_552
    assert config == DeepSeekConfig(2048, 1000, 4, 8, 256, 1000, F=1024, E=4, top=2, q_rank=64, kv_rank=64, R=16)
    create_model.main(["--preset", "dsa", "--vocab", "1000", "--seed", "5", "-o", "dsa.bin"])
    model = read_model("dsa.bin")
    assert model.config == config and (model.kind, model.extra.size) == (0, 0)
    np.testing.assert_array_equal(model.params, gpt2_init(config, 5))
    out = capsys.readouterr().out
    assert "channels           256\nq_rank             64\nkv_rank            64\nrope_dim           16\n" in out
    assert "experts            4\ntop_experts        2\nexpert_width       1024\n" in out
    assert "num_parameters     10,008,552\nfile size          40,035,232 bytes\n" in out
    own = "no data script makes tokens 0..999: write your own"
    assert out.endswith(f"next: {own}, then name them by -i and -j to train_sparse_attn.py -e dsa.bin\n")


@pytest.mark.parametrize(
    "flags, own",
    [
        ("--mla 1", dict(q_rank=64, kv_rank=64, R=16)),
        ("--mla 1 --q-rank 48 --kv-rank 20 --rope-dim 8", dict(q_rank=48, kv_rank=20, R=8)),
        ("--experts 4", dict(E=4, top=2, F=512)),
        ("--experts 1", dict(E=1, top=1, F=512)),
        ("--experts 8 --top-experts 3 --expert-width 50 --mla 0", dict(E=8, top=3, F=50)),
        ("--mla 1 --experts 4", dict(q_rank=64, kv_rank=64, R=16, E=4, top=2, F=512)),
        ("--preset dsa --mla 0 -C 128 -L 4 -H 4 -T 256", dict(E=4, top=2, F=512)),
        ("--preset dsa --experts 0 -C 128 -L 4 -H 4 -T 256", dict(q_rank=64, kv_rank=64, R=16)),
    ],
)
def test_parts(flags, own):
    """MLA and MoE, each by its flags; the vocabulary is padded to a multiple of 8 only."""
    assert config_of(f"{flags} --vocab 1001") == DeepSeekConfig(256, 1001, 4, 4, 128, 1008, **own)


def test_without_its_parts_the_preset_is_a_gpt2():
    assert config_of("--preset dsa --mla 0 --experts 0 --vocab 9") == GPT2Config(2048, 9, 4, 8, 256, 128)


def test_tiny_model_is_the_default(capsys):
    create_model.main([])
    assert os.path.getsize("model.bin") == 1024 + 4 * 7_265_024
    model = read_model("model.bin")
    assert model.config == GPT2Config(maxT=256, V=50257, L=4, NH=4, C=128, Vp=50304)
    np.testing.assert_array_equal(model.params, gpt2_init(model.config, 42))
    assert Tokenizer.read("gpt2_tokenizer.bin").vocab_size == 50257
    out = capsys.readouterr().out
    assert "num_parameters     7,265,024\n" in out
    assert "file size          29,061,120 bytes\n" in out
    assert out.endswith("next: python train_banded.py -e model.bin\n")


def test_free_sizes_and_bfloat16():
    create_model.main([*FLAGS, "--seed", "7", "--dtype", "bfloat16", "-o", "b.bin"])
    model = read_model("b.bin")
    assert model.config == GPT2Config(maxT=16, V=250, L=2, NH=2, C=8, Vp=256)
    assert model.version == BFLOAT16
    assert os.path.getsize("b.bin") == 1024 + 2 * num_parameters(model.config)
    np.testing.assert_array_equal(model.params, from_bfloat16(to_bfloat16(gpt2_init(model.config, 7))))
    assert os.listdir() == ["b.bin"]  # a vocabulary without a name has no tokenizer file


def test_one_size_replaces_the_presets():
    args = create_model.parse_arguments(["--preset", "small", "-T", "1024", "--vocab", "byte"])
    assert create_model.model_config(args) == GPT2Config(maxT=1024, V=256, L=8, NH=8, C=512, Vp=256)


def test_byte_model_gets_its_tokenizer_beside_it(capsys):
    os.mkdir("models")
    create_model.main(["-C", "8", "-L", "1", "-H", "1", "-T", "8", "--vocab", "byte", "-o", "models/byte.bin"])
    assert Tokenizer.read("models/byte_tokenizer.bin").vocab_size == 256
    assert capsys.readouterr().out.endswith("next: python train_banded.py -e models/byte.bin\n")  # data found by V


def test_tokenizer_that_is_there_is_kept():
    Path("byte_tokenizer.bin").write_bytes(b"mine")
    create_model.main(["-C", "8", "-L", "1", "-H", "1", "-T", "8", "--vocab", "byte"])
    assert Path("byte_tokenizer.bin").read_bytes() == b"mine"


def test_model_is_written_even_without_a_vocabulary(monkeypatch, capsys):
    def offline():
        raise UserError("GPT-2's vocabulary: no network", "pip install it")

    monkeypatch.setitem(corpus.TOKENIZERS, "gpt2", offline)
    create_model.main(["-C", "8", "-L", "1", "-H", "1", "-T", "8"])
    assert read_model("model.bin").config.V == 50257
    expected = "warning: no gpt2_tokenizer.bin: GPT-2's vocabulary: no network\n---> HINT: pip install it\n"
    assert capsys.readouterr().err == expected
    assert os.listdir() == ["model.bin"]


def test_existing_file_is_overwritten_only_by_force():
    Path("model.bin").write_bytes(b"trained for a week")
    with pytest.raises(UserError, match=r"model\.bin: exists already") as refused:
        create_model.main(FLAGS)
    assert "--force" in refused.value.hint
    assert Path("model.bin").read_bytes() == b"trained for a week"
    create_model.main([*FLAGS, "--force"])
    assert read_model("model.bin").config.C == 8


@pytest.mark.parametrize(
    "flags, message",
    [
        (["-C", "100", "-H", "3"], "-C -L -H -T: C = 100 channels do not divide by NH = 3"),
        (["-L", "5000"], "-C -L -H -T: L is 5000, expected 1..4096"),
        (["-L", "0"], "-L"),
        (["-T", "-1"], "-T"),
        (["-C", "1e3"], "-C"),
        (["--vocab", "65537"], "--vocab: '65537', expected a whole number in 1..65536, gpt2 or byte"),
        (["--vocab", "llama"], "--vocab: 'llama', expected"),
        (["--seed", "-1"], "--seed"),
        (["--preset", "huge"], "--preset"),
        (["--dtype", "float16"], "--dtype"),
        (["--mla", "2"], "--mla: '2', expected 0 or 1"),
        (["--q-rank", "8"], "--q-rank without --mla 1"),
        (["--experts", "4", "--kv-rank", "8"], "--kv-rank without --mla 1"),
        (["--preset", "dsa", "--mla", "0", "--rope-dim", "8"], "--rope-dim without --mla 1"),
        (["--mla", "1", "--top-experts", "1"], "--top-experts without --experts N"),
        (["--experts", "0", "--expert-width", "8"], "--expert-width without --experts N"),
        (["--mla", "1", "--rope-dim", "7"], "-C -L -H -T: R is 7, expected an even number"),
        (["--mla", "1", "--rope-dim", "34"], "-C -L -H -T: R is 34, expected 2..32"),
        (["--experts", "2", "--top-experts", "3"], "-C -L -H -T: top is 3, expected 1..2"),
        (["--experts", "257"], "-C -L -H -T: E is 257, expected 0..256"),
        (["--experts", "-1"], "--experts: '-1'"),
        (["--mla", "1", "--dtype", "bfloat16"], "--dtype bfloat16: a model with MLA or MoE is stored in float32"),
    ],
)
def test_bad_flags(flags, message):
    with pytest.raises(UserError) as refused:
        create_model.main(flags)
    assert message in refused.value.message
    assert refused.value.exit_code == 2
    assert os.listdir() == []


def test_missing_folder():
    with pytest.raises(UserError, match=r"nowhere/model\.bin"):
        create_model.main([*FLAGS, "-o", "nowhere/model.bin"])


def test_runs_as_a_script_from_any_folder():
    command = [sys.executable, str(ROOT / "data" / "create_model.py"), *FLAGS]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "next: no data script makes tokens 0..249: write your own" in shown
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 1
    assert again.stderr.startswith("error: model.bin: exists already\n---> HINT: --force")


@pytest.mark.parametrize("vocab, script", [("gpt2", "shakespeare.py"), ("byte", "shakespeare.py --tokenizer byte")])
def test_data_that_are_not_made_come_first(monkeypatch, capsys, vocab, script):
    monkeypatch.setattr(create_model, "default_data", lambda V, split: f"nowhere/{V}_{split}.bin")
    create_model.main(["-C", "8", "-L", "1", "-H", "1", "-T", "8", "--vocab", vocab, "-o", "my model.bin"])
    lines = capsys.readouterr().out.splitlines()[-2:]
    assert lines == [f"next: python data/{script}", "then: python train_banded.py -e 'my model.bin'"]


PRESETS_SHRUNK = [  # -C so that a head has 2 channels; NH and T are the preset's
    "--preset tiny -C 8 -L 1",
    "--preset small -C 16 -L 1",
    "--preset d12 -C 24 -L 1",
    "--preset d24 -C 32 -L 1",
    "--preset d36 -C 40 -L 1",
    "--preset d48 -C 50 -L 1",
    "--preset dsa -L 1 --vocab byte",
]
ODD_SIZES = ["-T 32", "-C 4 -H 1", "-T 1", "-C 15 -H 3", "-C 7 -H 7", "-T 32 --experts 4", "--mla 1 -C 128"]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """The scripts as a user has them, beside Shakespeare's plays in both vocabularies, cut short."""
    folder = tmp_path_factory.mktemp("checkout")
    for path in (ROOT / "kernels", *ROOT.glob("systems")):
        (folder / path.name).symlink_to(path)
    for path in (*ROOT.glob("train_*.py"), *ROOT.glob("llmc/*.py"), *ROOT.glob("data/*.py")):
        copy = folder / path.relative_to(ROOT)  # no link: data are looked for beside the file that is read
        copy.parent.mkdir(exist_ok=True)
        shutil.copy(path, copy)
    (folder / "data" / "shakespeare").mkdir()
    for name, V in (("shakespeare", 50257), ("shakespeare_byte", 256)):
        for split in ("train", "val"):
            tokens = np.random.default_rng(0).integers(0, V, 5000).astype(np.uint16)
            write_tokens(folder / "data" / "shakespeare" / f"{name}_{split}.bin", tokens)
    return folder


@pytest.mark.parametrize("flags", [*PRESETS_SHRUNK, *(f"{flags} --vocab byte" for flags in ODD_SIZES)])
def test_the_printed_next_command_runs(checkout, monkeypatch, flags):
    """As it is typed, for one step of one short row."""
    monkeypatch.chdir(checkout)
    small = (
        [] if "--preset" in flags else ["-L", "1"] + (["-C", "8"] if "-C" not in flags and "-H" not in flags else [])
    )
    words = [*flags.split(), *small, "-o", "next.bin", "--force"]
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    made = subprocess.run([sys.executable, "data/create_model.py", *words], capture_output=True, text=True, check=True)
    (command,) = re.findall(r"^next: python (.*)$", made.stdout, re.M)
    T = min(64, int(re.search(r"^max_seq_len +(\d+)$", made.stdout, re.M)[1]))
    words = [sys.executable, *shlex.split(command), *f"-n 1 -b 1 -t {T} -m 1 --device cpu".split()]
    trained = subprocess.run(words, capture_output=True, text=True, errors="replace", env=environment)
    assert (trained.returncode, trained.stderr) == (0, "")
    V = 256 if "byte" in flags else 50257
    loss = float(re.search(r"^val loss ([0-9.]+)$", trained.stdout, re.M)[1])
    assert abs(loss - np.log(V)) < 0.2  # a random model's
