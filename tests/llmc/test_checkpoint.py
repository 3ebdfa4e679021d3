"""Model files: layout, bfloat16, bad files, and what is left when a write fails (llmc/checkpoint.py, llmc/files.py)."""

import builtins
import errno
import os
from dataclasses import replace

import numpy as np
import pytest

from llmc.checkpoint import (
    BANDED,
    BFLOAT16,
    FLOAT32,
    KINDS,
    MATRICES,
    SPARSE_ATTENTION,
    DeepSeekConfig,
    GPT2Config,
    Model,
    check_is_model,
    from_bfloat16,
    num_parameters,
    read_model,
    tensor_shapes,
    to_bfloat16,
    write_model,
)
from llmc.errors import UserError
from llmc.files import atomic_write

CONFIG = GPT2Config(maxT=8, V=13, L=2, NH=2, C=4, Vp=16)
DEEPSEEK = DeepSeekConfig(maxT=8, V=13, L=2, NH=2, C=8, Vp=16, F=6, E=3, top=2, q_rank=5, kv_rank=3, R=2)
PUBLISHED = DeepSeekConfig(
    maxT=2048, V=1000, L=4, NH=8, C=256, Vp=1000, F=1024, E=4, top=2, q_rank=64, kv_rank=64, R=16
)


def make_model(version=FLOAT32, config=CONFIG, **changes):
    params = np.random.default_rng(0).normal(size=num_parameters(config)).astype(np.float32)
    return replace(Model(config, params, step=7, shard=1, sample=5, version=version), **changes)


def edit(path, **ints):
    """Overwrite header ints, given as i<index>=<value>."""
    data = bytearray(path.read_bytes())
    for name, value in ints.items():
        at = 4 * int(name[1:])
        data[at : at + 4] = int(value).to_bytes(4, "little", signed=True)
    path.write_bytes(data)


@pytest.mark.parametrize(
    "config, count",
    [
        (GPT2Config(), 124_475_904),
        (GPT2Config(maxT=256, L=4, NH=4, C=128), 7_265_024),
        (GPT2Config(maxT=512, L=8, NH=8, C=512), 51_237_888),
    ],
)
def test_num_parameters(config, count):
    C, L = config.C, config.L
    assert num_parameters(config) == count == config.Vp * C + config.maxT * C + L * (12 * C * C + 13 * C) + 2 * C


def test_layout_is_llmc(tmp_path):
    """The bytes, put together here by hand: 256 ints, then 16 tensors, then the extra values."""
    path = tmp_path / "model.bin"
    extra = np.float32([1.5, -2.5])
    model = make_model(kind=BANDED, fields=(256, -1), extra=extra)
    write_model(path, model)
    header = [20240326, 3, 8, 13, 2, 2, 4, 16, 7, 1, 5] + [0] * 117 + [20261121, 1, 1, 2, 256, -1] + [0] * 122
    assert path.read_bytes() == np.array(header, "<i4").tobytes() + model.params.tobytes() + extra.tobytes()
    names = "wte wpe ln1w ln1b qkvw qkvb attprojw attprojb ln2w ln2b fcw fcb fcprojw fcprojb lnfw lnfb"
    assert " ".join(tensor_shapes(CONFIG)) == names


@pytest.mark.parametrize("version, itemsize", [(FLOAT32, 4), (BFLOAT16, 2)])
def test_round_trip(tmp_path, version, itemsize):
    first, second = tmp_path / "a.bin", tmp_path / "b.bin"
    model = make_model(version, kind=BANDED, fields=(3,), extra=np.float32([0.1, 0.2, 0.3]))
    write_model(first, model)
    assert first.stat().st_size == 1024 + itemsize * num_parameters(CONFIG) + 4 * 3
    again = read_model(first)
    write_model(second, again)
    assert second.read_bytes() == first.read_bytes()
    assert (again.config, again.step, again.shard, again.sample, again.kind) == (CONFIG, 7, 1, 5, BANDED)
    assert again.fields[:2] == (3, 0)
    assert np.array_equal(again.extra, model.extra)
    assert again.params.dtype == np.float32
    # half a unit in the last place of 8 significant bits
    tolerance = 0 if version == FLOAT32 else 2.0**-8
    assert np.all(np.abs(again.params - model.params) <= tolerance * np.abs(model.params))


def test_reads_files_without_the_extension(tmp_path):
    path = tmp_path / "llmc.bin"
    header = np.zeros(256, "<i4")
    header[:8] = 20240326, 3, 8, 13, 2, 2, 4, 16
    params = make_model().params
    path.write_bytes(header.tobytes() + params.tobytes())
    model = read_model(path)
    assert (model.step, model.kind, model.fields, model.extra.size) == (0, 0, (), 0)
    assert np.array_equal(model.params, params)


@pytest.mark.parametrize(
    "bits, expected",
    [
        (0x3F800000, 0x3F80),  # 1
        (0x3F807FFF, 0x3F80),  # just below the tie
        (0x3F808000, 0x3F80),  # a tie: down to even
        (0x3F808001, 0x3F81),  # just above the tie
        (0x3F818000, 0x3F82),  # a tie: up to even
        (0xBF818000, 0xBF82),
        (0x3FFF8000, 0x4000),  # the carry reaches the exponent
        (0x7F7FFFFF, 0x7F80),  # the largest float32 rounds to infinity
        (0x7F7F7FFF, 0x7F7F),
        (0x7F800000, 0x7F80),  # infinities
        (0xFF800000, 0xFF80),
        (0x7FC00000, 0x7FC0),  # NaNs, quiet and signalling: none may become infinite
        (0x7F800001, 0x7FC0),
        (0xFFFFFFFF, 0xFFFF),
        (0x00000001, 0x0000),  # denormals
        (0x00008000, 0x0000),
        (0x00008001, 0x0001),
        (0x00018000, 0x0002),
        (0x80000001, 0x8000),
        (0x007FFFFF, 0x0080),  # the largest denormal rounds to the smallest normal
    ],
)
def test_bfloat16_rounding(bits, expected):
    assert to_bfloat16(np.uint32([bits]).view(np.float32))[0] == expected


def test_bfloat16_widening_is_exact():
    bits = np.arange(65536, dtype=np.uint16)
    values = from_bfloat16(bits)
    finite = ~np.isnan(values)
    assert np.array_equal(to_bfloat16(values)[finite], bits[finite])
    assert np.isnan(from_bfloat16(to_bfloat16(values[~finite]))).all()


def test_bfloat16_is_the_nearest():
    values = np.random.default_rng(1).normal(size=10_000).astype(np.float32)
    lower = (values.view(np.uint32) >> 16).astype(np.uint16)
    candidates = np.stack([from_bfloat16(lower), from_bfloat16(lower + np.uint16(1))]).astype(np.float64)
    error = np.abs(from_bfloat16(to_bfloat16(values)) - values.astype(np.float64))
    assert np.array_equal(error, np.abs(candidates - values).min(axis=0))


@pytest.mark.parametrize(
    "ints, found",
    [
        (dict(i0=20240520), "magic 20240520, expected 20240326"),
        (dict(i1=4), "version 4, expected 3 or 5"),
        (dict(i1=5), "too long"),
        (dict(i2=0), "maxT is 0"),
        (dict(i3=-1), "V is -1"),
        (dict(i4=3), "truncated"),
        (dict(i5=3), "do not divide by NH = 3"),
        (dict(i6=1 << 30), "C is 1073741824"),
        (dict(i7=12), "Vp = 12 is smaller than V = 13"),
        (dict(i8=-1), "step, shard, sample are -1, 1, 5"),
        (dict(i129=2), "header extension 2"),
        (dict(i130=len(KINDS)), f"kind {len(KINDS)}"),
        (dict(i131=-1), "-1 extra values"),
        (dict(i131=1), "truncated"),
    ],
)
def test_bad_header(tmp_path, ints, found):
    path = tmp_path / "model.bin"
    write_model(path, make_model())
    edit(path, **ints)
    with pytest.raises(UserError) as error:
        read_model(path)
    assert str(path) in error.value.message
    assert found in error.value.message
    assert error.value.hint


@pytest.mark.parametrize("size, found", [(0, "found 0 bytes"), (1023, "found 1023 bytes"), (1024, "truncated")])
def test_cut_file(tmp_path, size, found):
    path = tmp_path / "model.bin"
    write_model(path, make_model())
    os.truncate(path, size)
    with pytest.raises(UserError, match=found):
        read_model(path)


def test_unreadable_paths(tmp_path):
    for path, reason in ((tmp_path / "missing.bin", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(UserError, match=reason) as error:
            read_model(path)
        assert error.value.hint


def test_wrong_sizes_are_the_callers_bug(tmp_path):
    with pytest.raises(ValueError, match="parameters"):
        write_model(tmp_path / "model.bin", make_model(params=np.zeros(3, np.float32)))
    with pytest.raises(ValueError, match="fields"):
        write_model(tmp_path / "model.bin", make_model(fields=(1,) * 125))
    assert list(tmp_path.iterdir()) == []


# MLA and MoE


def test_deepseek_layout(tmp_path):
    """The bytes by hand: sizes of its own in ints 11-16, then the tensors in this order."""
    path = tmp_path / "model.bin"
    extra = np.float32([1.5, -2.5])
    model = make_model(config=DEEPSEEK, kind=SPARSE_ATTENTION, fields=(4, 1), extra=extra)
    write_model(path, model)
    header = [20261122, 1, 8, 13, 2, 2, 8, 16, 7, 1, 5, 6, 3, 2, 5, 3, 2] + [0] * 111
    header += [20261121, 1, 2, 2, 4, 1] + [0] * 122
    assert path.read_bytes() == np.array(header, "<i4").tobytes() + model.params.tobytes() + extra.tobytes()
    assert tensor_shapes(DEEPSEEK) == {
        "wte": (16, 8),
        "wpe": (8, 8),
        "ln1w": (2, 8),
        "ln1b": (2, 8),
        "qaw": (2, 5, 8),
        "qnw": (2, 5),
        "qbw": (2, 8, 5),
        "kvaw": (2, 5, 8),  # 3 latent channels and 2 rotary ones
        "kvnw": (2, 3),
        "kvbw": (2, 12, 3),  # of either head 2 channels of the key and 4 of the value
        "attprojw": (2, 8, 8),
        "ln2w": (2, 8),
        "ln2b": (2, 8),
        "routerw": (2, 3, 8),
        "expertw": (2, 3, 6, 8),
        "expertprojw": (2, 3, 8, 6),
        "lnfw": (8,),
        "lnfb": (8,),
        "headw": (16, 8),
        "headb": (16,),
    }
    # dicts compare without regard to order
    names = "wte wpe ln1w ln1b qaw qnw qbw kvaw kvnw kvbw attprojw ln2w ln2b routerw expertw expertprojw"
    assert " ".join(tensor_shapes(DEEPSEEK)) == f"{names} lnfw lnfb headw headb"


@pytest.mark.parametrize(
    "absent, names",
    [
        (dict(F=0, E=0, top=0), "qaw qnw qbw kvaw kvnw kvbw attprojw ln2w ln2b fcw fcb fcprojw fcprojb"),
        (
            dict(q_rank=0, kv_rank=0, R=0),
            "qkvw qkvb attprojw attprojb ln2w ln2b routerw expertw expertprojw",
        ),
    ],
)
def test_one_of_the_two_parts(tmp_path, absent, names):
    """The other part is GPT-2's, of the same shapes."""
    config, path = replace(DEEPSEEK, **absent), tmp_path / "model.bin"
    shapes = tensor_shapes(config)
    assert " ".join(shapes) == f"wte wpe ln1w ln1b {names} lnfw lnfb headw headb"
    gpt2 = tensor_shapes(GPT2Config(maxT=8, V=13, L=2, NH=2, C=8, Vp=16))
    both = tensor_shapes(DEEPSEEK)
    for name, shape in shapes.items():
        assert shape == both.get(name, gpt2.get(name))
    write_model(path, make_model(config=config))
    assert read_model(path).config == config


def test_published_number_of_parameters():
    """As published: a layer's parts, and 10,534,904 in all, of which 4 * 131,588 are indexers."""
    sizes = {name: np.prod(shape, dtype=int) for name, shape in tensor_shapes(PUBLISHED).items()}
    parts = {
        "qaw qnw qbw kvaw kvnw kvbw attprojw": 4 * 143_488,
        "routerw expertw expertprojw": 4 * 2_098_176,
        "ln1w ln1b ln2w ln2b": 4 * 1_024,
        "wte": 256_000,
        "wpe": 524_288,
        "lnfw lnfb": 512,
        "headw headb": 257_000,
    }
    assert {names: sum(sizes[name] for name in names.split()) for names in parts} == parts
    assert num_parameters(PUBLISHED) == sum(parts.values()) == 10_534_904 - 4 * 131_588 == 10_008_552


def test_matrices_are_what_a_product_multiplies():
    """All tensors with two dimensions or more in a layer, of both kinds of models."""
    for config in (CONFIG, DEEPSEEK):
        shapes = tensor_shapes(config)  # those with all layers begin with L = 2
        matrices = [name for name, shape in shapes.items() if len(shape) > (2 if shape[0] == 2 else 1)]
        assert matrices == [name for name in shapes if name in MATRICES]


def test_deepseek_round_trip(tmp_path):
    first, second = tmp_path / "a.bin", tmp_path / "b.bin"
    model = make_model(config=DEEPSEEK, kind=SPARSE_ATTENTION, fields=(3,), extra=np.float32([0.1, 0.2]))
    write_model(first, model)
    again = read_model(first)
    write_model(second, again)
    assert second.read_bytes() == first.read_bytes()
    assert (again.config, again.step, again.shard, again.sample, again.kind) == (DEEPSEEK, 7, 1, 5, SPARSE_ATTENTION)
    assert again.version == FLOAT32 and again.fields[:2] == (3, 0)
    assert np.array_equal(again.extra, model.extra) and np.array_equal(again.params, model.params)
    with pytest.raises(ValueError, match="written in float32"):
        write_model(second, replace(model, version=BFLOAT16))
    assert second.read_bytes() == first.read_bytes()


@pytest.mark.parametrize(
    "ints, found",
    [
        (dict(i0=20261123), "magic 20261123, expected 20240326"),
        (dict(i0=20240326), "version 1, expected 3 or 5"),
        (dict(i1=3), "version 3, expected 1"),
        (dict(i2=0), "maxT is 0"),
        (dict(i5=3), "do not divide by NH = 3"),
        (dict(i11=0), "F is 0, expected 1..1048576"),
        (dict(i11=7), "truncated"),
        (dict(i11=-1), "F is -1"),
        (dict(i12=0), "top is 2, expected 0..0"),
        (dict(i12=0, i13=0), "F is 6, expected 0..0"),
        (dict(i12=257), "E is 257, expected 0..256"),
        (dict(i12=-3), "E is -3"),
        (dict(i12=2), "too long"),
        (dict(i13=0), "top is 0, expected 1..3"),
        (dict(i13=4), "top is 4, expected 1..3"),
        (dict(i14=0), "q_rank is 0, expected 1..1048576"),
        (dict(i14=1 << 30), "q_rank is 1073741824"),
        (dict(i15=-1), "kv_rank is -1"),
        (dict(i15=0), "q_rank is 5, expected 0..0"),
        (dict(i15=0, i14=0), "R is 2, expected 0..0"),
        (dict(i15=(1 << 31) - 1), "kv_rank is 2147483647, expected 0..1048576"),
        (dict(i16=0), "R is 0, expected 2..4"),
        (dict(i16=3), "R is 3, expected an even number"),
        (dict(i16=6), "R is 6, expected 2..4"),
        (dict(i16=4), "truncated"),
        (dict(i11=0, i12=0, i13=0, i14=0, i15=0, i16=0), "neither MLA (kv_rank is 0) nor MoE (E is 0)"),
        (dict(i130=len(KINDS)), f"kind {len(KINDS)}"),
        (dict(i131=1), "truncated"),
    ],
)
def test_bad_deepseek_header(tmp_path, ints, found):
    path = tmp_path / "model.bin"
    write_model(path, make_model(config=DEEPSEEK))
    edit(path, **ints)
    with pytest.raises(UserError) as error:
        read_model(path)
    assert str(path) in error.value.message
    assert found in error.value.message
    assert error.value.hint


def test_a_checkpoint_may_replace_any_model(tmp_path):
    path = tmp_path / "model.bin"
    for config in (CONFIG, DEEPSEEK):
        write_model(path, make_model(config=config))
        check_is_model(path, "-c")
    edit(path, i0=20240520)
    with pytest.raises(UserError, match=r"-c .*model\.bin: exists and is not a model file \(magic 20240520\)"):
        check_is_model(path, "-c")


# what is left when a write fails


def refuse_writes(monkeypatch, after=0):
    """Every file opened for writing takes `after` writes, then the disk is full."""
    real_open = builtins.open

    def full_open(path, mode="r", *args, **kwargs):
        file = real_open(path, mode, *args, **kwargs)
        if "w" not in mode:
            return file
        real_write, left = file.write, [after]

        class Full:
            def write(self, data):
                if not left[0]:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                left[0] -= 1
                return real_write(data)

            def __enter__(self):
                return self

            def __exit__(self, *_):
                file.close()

            def __getattr__(self, name):
                return getattr(file, name)

        return Full()

    monkeypatch.setattr(builtins, "open", full_open)


@pytest.mark.parametrize("after", [0, 1, 2])
def test_disk_full_keeps_the_old_file(tmp_path, monkeypatch, after):
    path = tmp_path / "model.bin"
    write_model(path, make_model())
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        refuse_writes(patch, after)
        with pytest.raises(UserError, match=r"writing .*model\.bin: No space left on device") as error:
            write_model(path, make_model(step=8))
    assert "disk space" in error.value.hint
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt, UserError])
def test_failure_mid_write_keeps_the_old_file(tmp_path, failure):
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")
    with pytest.raises(failure), atomic_write(path) as file:
        file.write(b"new")
        raise failure("stop")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_failing_rename_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")

    def refuse(*_):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(UserError, match="Operation not permitted"), atomic_write(path) as file:
        file.write(b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_folders_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    places = {"No such file": tmp_path / "missing" / "m.bin", "Not a directory": tmp_path / "file" / "m.bin"}
    for reason, path in places.items():
        with pytest.raises(UserError, match=reason) as error:
            write_model(path, make_model())
        assert str(path) in error.value.message
        assert error.value.hint

    def refuse(*_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(builtins, "open", refuse)  # a folder's mode would not stop root
    with pytest.raises(UserError, match="Permission denied"):
        write_model(tmp_path / "m.bin", make_model())
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_rests_of_a_killed_save_do_not_disturb(tmp_path):
    """In a container every run may have the same process id, and so the same temporary name."""
    path = tmp_path / "model.bin"
    (tmp_path / f".model.bin.{os.getpid()}.tmp").write_bytes(b"x" * 100_000)
    write_model(path, make_model())
    assert read_model(path).step == 7
    assert list(tmp_path.iterdir()) == [path]
