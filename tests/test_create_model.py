"""Random models: the drawing rule of gpt2_init to the bit, and data/create_model.py's sizes, files and refusals."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data import corpus, create_model
from llmc.checkpoint import (
    BFLOAT16,
    GPT2Config,
    from_bfloat16,
    named_views,
    num_parameters,
    read_model,
    tensor_shapes,
    to_bfloat16,
)
from llmc.errors import UserError
from llmc.init import gpt2_init
from llmc.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
SMALL = GPT2Config(maxT=64, V=510, L=2, NH=4, C=64, Vp=512)
FLAGS = ["-C", "8", "-L", "2", "-H", "2", "-T", "16", "--vocab", "250"]


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_init_is_fixed_to_the_bit():
    params = gpt2_init(SMALL, seed=11)
    np.testing.assert_allclose(params[:4], [0.00320362, 0.00162531, 0.02180252, 0.01601468], atol=5e-9)
    digest = hashlib.sha256(params.astype("<f4").tobytes()).hexdigest()
    assert digest == "7e20791e435c98ddbc14290c04e6943f69695997e0e00561bf559bf68f25864f"
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
    stds = dict(wte=0.02, wpe=0.02, qkvw=0.02, attprojw=residual, fcw=0.02, fcprojw=residual)
    for name, std in stds.items():
        values = tensors[name][:500] if name == "wte" else tensors[name]
        error = std / (2 * values.size) ** 0.5  # the standard error of a sample's standard deviation
        assert abs(values.std() - std) < 5 * error
        assert abs(values.mean()) < 8 * error


def test_init_draws_in_the_documented_order():
    generator = np.random.default_rng(3)
    tensors = named_views(gpt2_init(SMALL, seed=3), tensor_shapes(SMALL))
    for name in ("wte", "wpe", "qkvw", "attprojw", "fcw", "fcprojw"):
        std = np.float32(0.02 / 2 if name in ("attprojw", "fcprojw") else 0.02)
        expected = generator.standard_normal(tensors[name].shape, dtype=np.float32) * std
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
    assert "next: python train_banded.py" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 1
    assert again.stderr.startswith("error: model.bin: exists already\n---> HINT: --force")
