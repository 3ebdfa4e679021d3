"""data/to_hf.py and data/from_hf.py: values bit for bit, transformers' own logits, and what is refused."""

import json
import os
import re
import shutil
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import generate
from data import from_hf, hf, tensor_file, to_hf
from kernels import cpu
from llmc.checkpoint import (
    BANDED,
    BFLOAT16,
    FLOAT32,
    SPARSE_ATTENTION,
    TOROIDAL,
    DeepSeekConfig,
    GPT2Config,
    Model,
    from_bfloat16,
    named_views,
    num_parameters,
    read_model,
    tensor_shapes,
    to_bfloat16,
    write_model,
)
from llmc.errors import UserError
from llmc.tokenizer import Tokenizer, byte_tokenizer, gpt2_tokenizer
from systems.band import Band
from train_banded import GPT2

ROOT = Path(__file__).resolve().parent.parent.parent
CONFIG = GPT2Config(maxT=32, V=256, L=3, NH=2, C=16, Vp=320)  # more padding than llm.c's 128 ask for


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def transformers():
    hint = "pip install -r requirements-hf.txt"
    pytest.importorskip("torch", reason=hint)
    found = pytest.importorskip("transformers", reason=hint)
    found.logging.set_verbosity_error()
    return found


def values(config: GPT2Config = CONFIG, seed: int = 0) -> np.ndarray:
    """All parameters from N(0, 0.3), so that each counts in the logits; zeros in the padding."""
    params = np.random.default_rng(seed).normal(0, 0.3, num_parameters(config)).astype(np.float32)
    named_views(params, tensor_shapes(config))["wte"][config.V :] = 0
    return params


def write(name: str = "model.bin", config: GPT2Config = CONFIG, tokenizer: Tokenizer | None = None, **rest) -> Model:
    model = Model(config, values(config), **rest)
    write_model(name, model)
    if tokenizer:
        tokenizer.write("byte_tokenizer.bin" if config.V == 256 else "gpt2_tokenizer.bin")
    return model


def logits(config: GPT2Config, params: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    model = GPT2(cpu, config, params.copy(), *tokens.shape)
    model.forward(tokens)
    return model.acts.logits[:, : config.V].reshape(*tokens.shape, config.V).copy()


def theirs(transformers, folder: str, tokens: np.ndarray) -> np.ndarray:
    import torch

    model = transformers.GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor(tokens, dtype=torch.long)).logits.numpy()


TOKENS = np.random.default_rng(1).integers(0, 256, (2, 32)).astype(np.int32)


# ----------------------------------------------------------------------------------------------------------------------
# the format by hand


def safetensors(tensors: dict[str, tuple[str, np.ndarray]], path: str = "x/model.safetensors") -> None:
    """A file of {name: (dtype, values)}, byte by byte as the format's description has it."""
    header, data = {}, b""
    for name, (dtype, array) in tensors.items():
        header[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": [len(data), len(data) + array.nbytes]}
        data += array.tobytes()
    text = json.dumps(header).encode()
    Path(path).parent.mkdir(exist_ok=True)
    Path(path).write_bytes(struct.pack("<Q", len(text)) + text + data)


def parsed(path) -> tuple[dict, bytes]:
    data = Path(path).read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    return json.loads(data[8 : 8 + length]), data[8 + length :]


SETTINGS = dict(model_type="gpt2", n_positions=32, vocab_size=256, n_layer=3, n_head=2, n_embd=16, eos_token_id=0)


def gpt2_tensors(prefix: str = "", dtype: str = "F32", config: GPT2Config = CONFIG) -> dict:
    """A GPT-2's tensors under transformers' names, (in, out) where they multiply."""
    convert = {"F32": lambda x: x, "F16": lambda x: x.astype("<f2"), "BF16": to_bfloat16}[dtype]
    tensors = named_views(values(config), tensor_shapes(config))
    rename = {"ln1": "ln_1", "ln2": "ln_2", "qkv": "attn.c_attn", "attproj": "attn.c_proj"}
    rename |= {"fc": "mlp.c_fc", "fcproj": "mlp.c_proj"}
    ends = {"w": "weight", "b": "bias"}
    found = {"wte.weight": tensors["wte"][: config.V], "wpe.weight": tensors["wpe"]}
    for l in range(config.L):
        for name, theirs in rename.items():
            for end, word in ends.items():
                value = tensors[name + end][l]
                found[f"h.{l}.{theirs}.{word}"] = value.T.copy() if value.ndim == 2 else value
    found |= {"ln_f.weight": tensors["lnfw"], "ln_f.bias": tensors["lnfb"]}
    return {prefix + name: (dtype, convert(value)) for name, value in found.items()}


def folder(tensors: dict, **changed) -> None:
    """The folder x with these tensors in one file, and config.json."""
    safetensors(tensors)
    settings = {name: value for name, value in (SETTINGS | changed).items() if value is not ...}
    Path("x/config.json").write_text(json.dumps(settings))


def test_the_file_that_is_written():
    """Names in order, values in place, transposed, without the padding rows; the header ends at a multiple of 8."""
    model = write(tokenizer=byte_tokenizer())
    to_hf.main(["model.bin", "-o", "out"])
    header, data = parsed("out/model.safetensors")
    assert (os.path.getsize("out/model.safetensors") - len(data)) % 8 == 0
    assert header.pop("__metadata__") == {"format": "pt"}
    expected = {f"transformer.{name}": value for name, (_, value) in gpt2_tensors().items()}
    assert set(header) == set(expected) and len(header) == 4 + 12 * 3
    end = 0
    for name, entry in header.items():
        begin, stop = entry["data_offsets"]
        assert (begin, entry["dtype"], tuple(entry["shape"])) == (end, "F32", expected[name].shape)
        assert data[begin:stop] == expected[name].tobytes(), name
        end = stop
    assert end == len(data) == 4 * (model.params.size - 64 * 16)
    settings = json.loads(Path("out/config.json").read_text())
    assert {name: settings[name] for name in SETTINGS} == SETTINGS
    assert (settings["activation_function"], settings["layer_norm_epsilon"]) == ("gelu_new", 1e-5)
    assert (settings["padded_vocab_size"], settings["attn_pdrop"], settings["n_inner"]) == (320, 0.0, None)


@pytest.mark.parametrize("version, flags", [(FLOAT32, []), (BFLOAT16, ["--dtype", "bfloat16"])])
@pytest.mark.parametrize("config", [CONFIG, replace(CONFIG, Vp=256), GPT2Config(maxT=8, V=50257, L=1, NH=2, C=8)])
def test_there_and_back_bit_for_bit(version, flags, config):
    tokenizer = byte_tokenizer() if config.V == 256 else gpt2_tokenizer()
    write(config=config, tokenizer=tokenizer, version=version)
    to_hf.main(["model.bin"])
    Path("back").mkdir()
    from_hf.main(["model_hf", "-o", "back/model.bin", *flags])
    assert Path("back/model.bin").read_bytes() == Path("model.bin").read_bytes()
    (name,) = {*os.listdir("back")} - {"model.bin"}
    assert Path("back", name).read_bytes() == Path(name).read_bytes()


@pytest.mark.parametrize("prefix", ["", "transformer."])
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_types_and_names(dtype, prefix):
    """float16 and bfloat16 come as float32, exactly; masks that older versions saved and a tied head are left out."""
    tensors = gpt2_tensors(prefix, dtype)
    tensors[f"{prefix}h.1.attn.bias"] = ("U8", np.ones((1, 1, 32, 32), np.uint8))
    tensors[f"{prefix}h.1.attn.masked_bias"] = ("F32", np.float32(-1e4))
    tensors["lm_head.weight"] = tensors[f"{prefix}wte.weight"]
    folder(tensors)
    from_hf.main(["x", "-o", "model.bin"])
    model = read_model("model.bin")
    assert (model.config, model.version, model.kind) == (replace(CONFIG, Vp=256), FLOAT32, 0)
    ours = named_views(model.params, tensor_shapes(model.config))
    for name, value in named_views(values(), tensor_shapes(CONFIG)).items():
        value = value[:256] if name == "wte" else value
        rounded = {"F32": value, "F16": value.astype("<f2").astype("<f4"), "BF16": from_bfloat16(to_bfloat16(value))}
        assert np.array_equal(ours[name], rounded[dtype]), name
    assert generate.main(["-e", "model.bin", "-n", "3"]) == 0


def test_weights_in_several_files():
    tensors = gpt2_tensors()
    folder(tensors)
    from_hf.main(["x", "-o", "one.bin"])
    names = list(tensors)
    shares = {f"model-{i + 1:05d}-of-00003.safetensors": names[i::3] for i in range(3)}
    for file, members in shares.items():
        safetensors({name: tensors[name] for name in members}, f"x/{file}")
    os.remove("x/model.safetensors")
    index = {"weight_map": {name: file for file, members in shares.items() for name in members}}
    Path("x/model.safetensors.index.json").write_text(json.dumps(index))
    for i, source in enumerate(("x", "x/model.safetensors.index.json")):
        from_hf.main([source, "-o", f"{i}.bin"])
        assert Path(f"{i}.bin").read_bytes() == Path("one.bin").read_bytes()

    index["weight_map"]["wpe.weight"] = "model-00001-of-00003.safetensors"
    Path("x/model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-00001-of-00003.safetensors: lacks wpe.weight" in refused("x").message
    for bad in ("../other.safetensors", "/etc/passwd", 5, "x.bin"):
        index["weight_map"]["wpe.weight"] = bad
        Path("x/model.safetensors.index.json").write_text(json.dumps(index))
        assert "weight_map is no object" in refused("x").message


def test_padding_that_the_vocabulary_counts():
    """nanoGPT's 50304 of 50257, here 320 of 256: the tokenizer says where the tokens end, and the rest is zero."""
    config = replace(CONFIG, V=320)
    tensors = gpt2_tensors(config=config)
    tensors["wte.weight"][1][256:] = 0
    folder(tensors, vocab_size=320)
    for name, content in hf.tokenizer_files(byte_tokenizer(), 32).items():
        Path("x", name).write_text(content)
    from_hf.main(["x", "-o", "model.bin"])
    assert read_model("model.bin").config == replace(CONFIG, Vp=384)
    assert Tokenizer.read("byte_tokenizer.bin") == byte_tokenizer()
    tensors["wte.weight"][1][300, 5] = 1
    folder(tensors, vocab_size=320)
    from_hf.main(["x", "-o", "model.bin", "--force"])
    assert read_model("model.bin").config == replace(CONFIG, V=320, Vp=384)


# ----------------------------------------------------------------------------------------------------------------------
# what is refused, and what is lost


def refused(source: str) -> UserError:
    with pytest.raises(UserError) as error:
        from_hf.main([source, "-o", "never.bin"])
    assert not os.path.exists("never.bin") and not list(Path().glob(".*tmp"))
    return error.value


@pytest.mark.parametrize(
    "field, value, expected",
    [
        ("model_type", "llama", "'gpt2'"),
        ("model_type", ..., "'gpt2'"),
        ("activation_function", "gelu", "'gelu_new' or 'gelu_pytorch_tanh'"),
        ("activation_function", "relu", "'gelu_new' or 'gelu_pytorch_tanh'"),
        ("layer_norm_epsilon", 1e-6, "1e-05"),
        ("scale_attn_weights", False, "True"),
        ("scale_attn_by_inverse_layer_idx", True, "False"),
        ("add_cross_attention", True, "False"),
        ("tie_word_embeddings", False, "True"),
        ("n_inner", 48, "null or 4 n_embd, 64"),
        ("n_layer", "3", "a whole number"),
        ("n_head", ..., "a whole number"),
        ("n_embd", True, "a whole number"),
        ("padded_vocab_size", 1.5, "a whole number"),
    ],
)
def test_another_kind_of_model_is_refused_by_its_field(field, value, expected):
    folder(gpt2_tensors(), **{field: value})
    found = None if value is ... else value
    assert refused("x").message == f"x/config.json: {field} is {found!r}, expected {expected}"


@pytest.mark.parametrize(
    "changed, found",
    [
        (dict(n_head=3), "x/config.json: C = 16 channels do not divide by NH = 3 heads"),
        (dict(n_layer=0), "x/config.json: L is 0, expected 1..4096"),
        (dict(padded_vocab_size=255), "x/config.json: padded vocabulary Vp = 255 is smaller than V = 256"),
        (dict(n_layer=4), "x: holds no h.3.ln_1.weight, a GPT-2 of 4 layers has one"),
        (dict(n_layer=2), "x: holds h.2.ln_1.weight, which a GPT-2 has not (12 such tensors)"),
        (dict(n_positions=16), "x/model.safetensors: wpe.weight is (32, 16), config.json asks for (16, 16)"),
        (dict(vocab_size=250), "x/model.safetensors: wte.weight is (256, 16), config.json asks for (250, 16)"),
    ],
)
def test_sizes_that_do_not_go_together(changed, found):
    folder(gpt2_tensors(), **changed)
    assert refused("x").message == found


@pytest.mark.parametrize(
    "name, tensor, found",
    [
        ("h.0.mlp.c_fc.weight", ("F32", np.zeros((64, 16), "<f4")), "is (64, 16), config.json asks for (16, 64)"),
        ("ln_f.bias", ("F64", np.zeros(16)), "is F64, expected F32, F16, BF16"),
        ("lm_head.weight", ("F32", np.zeros((256, 16), "<f4")), "is not wte.weight: an output head of its own"),
        ("lm_head.weight", ("F32", np.zeros((4, 16), "<f4")), "is not wte.weight: an output head of its own"),
        ("score.weight", ("F32", np.zeros((2, 16), "<f4")), "which a GPT-2 has not (1 such tensors)"),
    ],
)
def test_another_models_tensors(name, tensor, found):
    folder(gpt2_tensors() | {name: tensor})
    message = refused("x").message
    assert name in message and message.endswith(found)


def test_folders_without_a_model():
    Path("x").mkdir()
    assert "x/config.json" in refused("x").message
    Path("x/config.json").write_text(json.dumps(SETTINGS))
    Path("x/pytorch_model.bin").write_text("")
    error = refused("x")
    assert error.message == "x: holds no model.safetensors and no model.safetensors.index.json"
    assert "save_pretrained" in error.hint
    for content, found in (("[1]", "list, expected a JSON object"), ("{", "no JSON")):
        Path("x/config.json").write_text(content)
        assert f"x/config.json: {found}" in refused("x").message


def entry(**changed) -> bytes:
    """A file of one tensor of two floats, its entry changed."""
    header = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changed}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(8)


@pytest.mark.parametrize(
    "content, found",
    [
        (b"", "a header of 0 bytes in a file of 0"),
        (b"\x80\2}q\0" * 30, "not a safetensors file: a header of"),
        (struct.pack("<Q", 5) + b"[1,2]", "its header is no JSON object"),
        (struct.pack("<Q", 5) + b'{"a":', "its header is no JSON object"),
        (entry()[:-1], "is truncated: "),
        (entry() + b"\0", "is too long: "),
        (entry(dtype="F33"), "a is of dtype 'F33', expected one of BOOL"),
        (entry(dtype=3), "the header's entry of a is"),
        (entry(shape=[-2]), "the header's entry of a is"),
        (entry(shape=2), "the header's entry of a is"),
        (entry(shape=[1 << 60]), "the header's entry of a is"),
        (entry(data_offsets=[0]), "the header's entry of a is"),
        (entry(data_offsets=[0, 4]), "a is at bytes 0..4, expected 0..8"),
        (entry(data_offsets=[4, 12]), "a is at bytes 4..12, expected 0..8"),
        (struct.pack("<Q", 7) + b'{"a":1}', "the header's entry of a is 1, expected dtype, shape and data_offsets"),
    ],
)
def test_damaged_files(content, found):
    Path("x.safetensors").write_bytes(content)
    with pytest.raises(UserError) as error:
        tensor_file.read_tensors(Path("x.safetensors"))
    assert error.value.message.startswith("x.safetensors: ") and found in error.value.message


def test_any_length_and_any_byte_of_the_header():
    """A message, or the tensors; nothing else is raised."""
    good, rng = entry(), np.random.default_rng(0)
    for i in range(len(good)):
        for content in (good[:i], good[:i] + bytes(rng.integers(0, 256, 1, np.uint8)) + good[i + 1 :]):
            Path("x.safetensors").write_bytes(content)
            try:
                tensor_file.read_tensors(Path("x.safetensors"))
            except UserError as error:
                assert error.message.startswith("x.safetensors: ")


def test_what_is_there_is_kept_without_force():
    write(tokenizer=byte_tokenizer())
    Path("model_hf").mkdir()
    Path("model_hf/config.json").write_text("mine")
    with pytest.raises(UserError, match=r"model_hf/config\.json: exists already"):
        to_hf.main(["model.bin"])
    assert os.listdir("model_hf") == ["config.json"]
    to_hf.main(["model.bin", "--force"])
    with pytest.raises(UserError, match=r"model\.bin: exists already"):
        from_hf.main(["model_hf"])
    Path("back").mkdir()
    Tokenizer([*byte_tokenizer().tokens[1:], b"\0"], 255).write("back/byte_tokenizer.bin")
    before = Path("back/byte_tokenizer.bin").read_bytes()
    from_hf.main(["model_hf", "-o", "back/model.bin"])
    assert Path("back/byte_tokenizer.bin").read_bytes() == before
    from_hf.main(["model_hf", "-o", "back/model.bin", "--force"])
    assert Tokenizer.read("back/byte_tokenizer.bin") == byte_tokenizer()


@pytest.mark.parametrize(
    "kind, fields, extra, told",
    [
        (BANDED, Band(fc1=8, fc2=8).header()[1], 0, "of the band only its zeros are kept"),
        (SPARSE_ATTENTION, (), 12, "sparse attention and its 12 extra values are lost"),
        (TOROIDAL, (), 12, "toroidal attention and its 12 extra values are lost"),
    ],
)
def test_what_is_lost_is_told(kind, fields, extra, told, capsys):
    write(kind=kind, fields=fields, extra=np.ones(extra, np.float32), step=40, tokenizer=byte_tokenizer())
    to_hf.main(["model.bin"])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and told in lines[0] and "step 40" in lines[1]
    from_hf.main(["model_hf", "-o", "back.bin"])
    assert np.array_equal(read_model("back.bin").params, values())


def test_padding_weights_are_told(capsys):
    params = values()
    named_views(params, tensor_shapes(CONFIG))["wte"][300, 3] = 1
    write_model("model.bin", Model(CONFIG, params))
    to_hf.main(["model.bin"])
    assert "rows 256..319 of wte, which stand for no token, are not all 0: lost" in capsys.readouterr().err


def test_mla_and_experts_are_refused():
    config = DeepSeekConfig(maxT=32, V=256, L=2, NH=2, C=16, Vp=256, F=24, E=3, top=2, q_rank=8, kv_rank=12, R=4)
    write_model("model.bin", Model(config, np.zeros(num_parameters(config), np.float32)))
    with pytest.raises(UserError, match=r"model\.bin: has MLA or MoE"):
        to_hf.main(["model.bin"])


# ----------------------------------------------------------------------------------------------------------------------
# tokenizers


def test_merges_are_openais():
    """Taken from the tokens alone, they are those of vocab.bpe, in its order."""
    from llmc import tokenizer as tokenizers

    path = tokenizers._installed_vocab_bpe()
    theirs = path.read_text().split("\n")[1:-1]
    files = hf.tokenizer_files(gpt2_tokenizer(), 1024)
    assert files["merges.txt"].split("\n")[1:-1] == theirs and len(theirs) == 50_000
    vocab = json.loads(files["vocab.json"])
    assert (len(vocab), vocab["<|endoftext|>"], vocab["!"], vocab["Ġthe"]) == (50257, 50256, 0, 262)


def test_tokenizers_that_cannot_be_said(capsys):
    folder(gpt2_tensors())
    for files, found in (
        ({}, "there is no vocab.json with merges.txt, nor tokenizer.json"),
        ({"vocab.json": {"a": 0, "b": 2}, "merges.txt": ""}, "its 2 ids are not 0 and on"),
        ({"vocab.json": {"a": 0, "b": 1, "ab": 2}, "merges.txt": "b a\n"}, "its merges do not go with the order"),
        ({"vocab.json": {"a": 0, "b": 1, "abc": 2, "z": 3}, "merges.txt": ""}, "is not made by a merge of two tokens"),
        ({"vocab.json": {"a": "0", "b": 1}, "merges.txt": ""}, "TypeError: "),
        ({"tokenizer.json": {"model": {"type": "Unigram", "vocab": []}}}, "model is 'Unigram', expected 'BPE'"),
        ({"tokenizer.json": {"model": {"type": "BPE"}, "pre_tokenizer": {"type": "Metaspace"}}}, "'Metaspace'"),
        ({"tokenizer.json": {}}, "KeyError: 'model'"),
    ):
        for name in ("vocab.json", "merges.txt", "tokenizer.json"):
            Path("x", name).unlink(missing_ok=True)
        for name, content in files.items():
            Path("x", name).write_text(content if isinstance(content, str) else json.dumps(content))
        from_hf.main(["x", "-o", "model.bin", "--force"])
        err = capsys.readouterr().err
        assert err.startswith("x: no tokenizer file is made: ") and found in err, err
        assert not list(Path().glob("*tokenizer.bin"))


def test_a_model_without_its_tokenizer_is_converted_without(capsys):
    write()
    to_hf.main(["model.bin"])
    assert "no tokenizer file for 256 tokens beside model.bin" in capsys.readouterr().err
    assert sorted(os.listdir("model_hf")) == ["config.json", "model.safetensors"]
    gpt2_tokenizer().write("other.bin")
    with pytest.raises(UserError, match=r"other\.bin: 50257 tokens, model\.bin has a vocabulary of 256"):
        to_hf.main(["model.bin", "--tokenizer", "other.bin", "--force"])


# ----------------------------------------------------------------------------------------------------------------------
# memory

MEASURE = """
import resource, runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def peak_megabytes(script: str, *words) -> int:
    command = [sys.executable, "-c", MEASURE, str(ROOT / "data" / script), *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(re.search(r"peak (\d+)", done.stdout)[1])


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in another unit")
def test_memory_is_that_of_the_largest_tensor():
    """A model of 122 MB, whose largest tensor has 4 MB, takes less than 20 MB more than one of 2 MB."""
    peaks = []
    for L in (1, 39):
        config = GPT2Config(maxT=8, V=256, L=L, NH=4, C=256, Vp=256)
        write_model(f"{L}.bin", Model(config, np.zeros(num_parameters(config), np.float32)))
        peaks.append([peak_megabytes("to_hf.py", f"{L}.bin"), peak_megabytes("from_hf.py", f"{L}_hf", "-o", "b.bin")])
        assert Path("b.bin").read_bytes() == Path(f"{L}.bin").read_bytes()
        os.remove("b.bin")
    assert os.path.getsize("39.bin") > 120e6
    assert all(large < small + 20 for small, large in zip(*peaks)), peaks


# ----------------------------------------------------------------------------------------------------------------------
# beside transformers


@pytest.mark.parametrize("band", [Band(), Band(fc1=16, fc2=24)])
def test_transformers_gives_our_logits(transformers, band):
    """Within 1e-5, of a model whose every parameter counts; a banded one is dense there, with zeros."""
    kind, fields = band.header()
    model = Model(CONFIG, values(), kind=kind, fields=fields)
    if not band.dense:
        masked = GPT2(cpu, CONFIG, model.params, 1, 1, band)
        masked.mask_weights()
        model.params = masked.params_flat
        assert np.mean(named_views(model.params, tensor_shapes(CONFIG))["fcw"] == 0) > 0.5
    write_model("model.bin", model)
    byte_tokenizer().write("byte_tokenizer.bin")
    to_hf.main(["model.bin"])
    params = read_model("model.bin").params
    ours, found = logits(CONFIG, params, TOKENS), theirs(transformers, "model_hf", TOKENS)
    assert np.abs(found).max() > 1 and np.abs(ours - found).max() < 1e-5


@pytest.mark.parametrize("shard_size", ["50GB", "20KB"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_what_transformers_saves_gives_its_logits(transformers, dtype, shard_size):
    import torch

    torch.manual_seed(0)
    settings = transformers.GPT2Config(
        vocab_size=250, n_positions=32, n_embd=16, n_layer=3, n_head=2, initializer_range=0.3, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(settings).to(getattr(torch, dtype))
    model.save_pretrained("x", max_shard_size=shard_size)
    assert (len(list(Path("x").glob("*.safetensors"))) > 1) == (shard_size == "20KB")
    from_hf.main(["x", "-o", "model.bin"])
    ours = read_model("model.bin")
    tokens = TOKENS % 250
    found = theirs(transformers, "x", tokens)
    assert np.abs(found).max() > 1 and np.abs(logits(ours.config, ours.params, tokens) - found).max() < 1e-5


def test_there_and_back_through_transformers(transformers):
    """Loaded, saved, and converted back: the file that it was, and so is the tokenizer, from tokenizer.json."""
    config = GPT2Config(maxT=16, V=50257, L=1, NH=2, C=8)
    write(config=config, tokenizer=gpt2_tokenizer())
    to_hf.main(["model.bin"])
    transformers.GPT2LMHeadModel.from_pretrained("model_hf").save_pretrained("again")
    transformers.AutoTokenizer.from_pretrained("model_hf").save_pretrained("again")
    assert not os.path.exists("again/vocab.json")
    Path("back").mkdir()
    from_hf.main(["again", "-o", "back/model.bin"])
    assert Path("back/model.bin").read_bytes() == Path("model.bin").read_bytes()
    assert Path("back/gpt2_tokenizer.bin").read_bytes() == Path("gpt2_tokenizer.bin").read_bytes()


TEXT = "Hello  world, it's 雨 naïve\n\n\t x 1234567 \u3000 ' s'll\r\n end "


@pytest.mark.parametrize("tokenizer, V", [(byte_tokenizer(), 256), (gpt2_tokenizer(), 50257)])
def test_transformers_tokenizes_as_we_do(transformers, tokenizer, V):
    config = GPT2Config(maxT=16, V=V, L=1, NH=2, C=8, Vp=V)
    write(config=config, tokenizer=tokenizer)
    to_hf.main(["model.bin"])
    found = transformers.AutoTokenizer.from_pretrained("model_hf")
    assert found(TEXT)["input_ids"] == tokenizer.encode(TEXT)
    assert found.decode(tokenizer.encode(TEXT), clean_up_tokenization_spaces=False) == TEXT
    assert found.eos_token_id == (50256 if V == 50257 else None)


def test_the_package_safetensors_reads_ours(transformers):
    from safetensors.numpy import load_file

    write(tokenizer=byte_tokenizer())
    to_hf.main(["model.bin"])
    found = load_file("model_hf/model.safetensors")
    for name, (_, value) in gpt2_tensors("transformer.").items():
        assert np.array_equal(found[name], value)
    shutil.rmtree("model_hf")
