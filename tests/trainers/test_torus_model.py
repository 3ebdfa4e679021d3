"""The model of train_toroidal.py: gradients by finite differences, causality, GPT-2 as a special case, decoding."""

import math
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import tiny
from test_sparse_model import IN_FLOAT64, relative_error

import train_banded
import train_toroidal
from kernels import cpu
from llmc.checkpoint import TOROIDAL, GPT2Config, Model, named_views, num_parameters, tensor_shapes
from llmc.errors import UserError
from llmc.init import gpt2_init
from systems.torus import ATTENTION, FUSIONS, MODES, ROPES, Torus, extra_init, extra_shapes, parse_layers, read_torus

TINY = GPT2Config(maxT=12, V=11, L=2, NH=2, C=32, Vp=16)
BASE = Torus(layers=(0, 1), depth=2, period=5, learn_lambda=True)
IDENTITY = dict(depth=1, rope="none", fusion="identity", lam=0.0)


def tiny_model(torus, B, T, dtype=np.float64, seed=1, config=TINY, device=None, **options) -> train_toroidal.GPT2:
    """A model with every parameter random, lambda too."""
    generator = np.random.default_rng(seed)
    own, extra = num_parameters(config), extra_shapes(config, torus)
    params = generator.standard_normal(own + sum(map(math.prod, extra.values()))) * 0.4
    views = named_views(params[own:], extra)
    for name in {"lams", "lamd"} & extra.keys():
        views[name][...] = abs(views[name]) if torus.lam else 0
    device = device or (IN_FLOAT64 if dtype == np.float64 else cpu)
    return train_toroidal.GPT2(device, config, torus, params.astype(dtype), B, T, **options)


def trained_grads(model) -> dict[str, np.ndarray]:
    """The gradients of what learns, by name, a tensor of GPT-2 over the layers that do."""
    return named_views(model.ops.to_host(model.grads_flat), model.trained)


def batch(B, T, seed=2, V=TINY.V):
    return np.random.default_rng(seed).integers(0, V, (2, B, T)).astype(np.int32)


CASES = [
    *(replace(BASE, fusion=fusion, depth=depth) for fusion in FUSIONS for depth in (1, 2, 4)),
    *(replace(BASE, rope=rope, depth=depth) for rope in ROPES[1:] for depth in (1, 2, 4)),
    replace(BASE, depth=4, wrap_depth=True, window=1),
    replace(BASE, fusion="low_rank", depth=4, rank=3, rope="int"),
    replace(BASE, layers=(1,), depth=4, fusion="attention"),
    replace(BASE, mode="upstream", period=9, fusion="low_rank", rope="orth"),
]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("torus", CASES, ids=lambda t: f"{t.fusion}-D{t.depth}-{t.rope}-{t.mode}-{t.layers}")
def test_every_gradient(torus, recompute):
    """Each tensor against central differences in float64, 1e-6, everything learning."""
    model, (inputs, targets) = tiny_model(torus, 2, 9, recompute=recompute), batch(2, 9)

    def loss():
        model.forward(inputs, targets)
        return model.mean_loss()

    loss()
    model.backward()
    samples = 8 if recompute else 20
    steps = dict.fromkeys(model.trained, 1e-5) | dict.fromkeys(("lams", "lamd"), 1e-4)  # lambda's gradients are small
    learn = [name for name, grad in trained_grads(model).items() if grad.any()]
    errors = {name: relative_error(model, name, loss, samples, steps[name]) for name in learn}
    print(", ".join(f"d{name} {error:.1e}" for name, error in errors.items()))
    assert {"qkvw", "qkvb", "attprojw", "attprojb", "wte", "lams"} <= errors.keys()
    assert ("fuse1" in errors) == (
        torus.fusion not in ("identity", "mean") and (torus.depth > 1 or torus.fusion != "attention")
    )
    assert max(errors.values()) <= 1e-6, errors


@pytest.mark.parametrize(
    "torus", [BASE, replace(BASE, fusion="attention", depth=4, rope="int"), replace(BASE, layers=(1,))]
)
def test_recompute_changes_no_bit(torus):
    (inputs, targets), flats = batch(2, 9), []
    for recompute in (False, True):
        model = tiny_model(torus, 2, 9, np.float32, recompute=recompute)
        for micro_step in range(2):
            model.forward(inputs, targets, grad_accum=2)
            model.backward(first=micro_step == 0)
        flats.append(model.grads_flat.tobytes())
    assert flats[0] == flats[1]


@pytest.mark.parametrize("learns", [None, (0, 1)])
@pytest.mark.parametrize("fusion", ["identity", "low_rank", "low_rank_residual", "mean"])
def test_depth_one_without_lambda_is_gpt2(learns, fusion):
    """Bit for bit: logits, loss, and the weights after an update, beside the control arm and the other trainer."""
    torus, (inputs, targets) = replace(BASE, **IDENTITY | dict(fusion=fusion), learn_lambda=False), batch(2, 9)
    params = gpt2_init(TINY, 1)
    extra = extra_init(Model(TINY, params), torus, 1)
    models = [train_toroidal.GPT2(cpu, TINY, torus, np.concatenate([params, extra]), 2, 9, learns)]
    models.append(train_toroidal.GPT2(cpu, TINY, Torus(), params.copy(), 2, 9, learns))
    if learns is None:
        models.append(train_banded.GPT2(cpu, TINY, params.copy(), 2, 9))
    found = []
    for model in models:
        model.forward(inputs)
        logits = model.acts.logits.copy()
        model.forward(inputs, targets)
        model.backward()
        model.update(1, 1e-3)
        found.append((logits.tobytes(), model.mean_loss(), model.params_flat[: params.size].tobytes()))
    assert all(each == found[0] for each in found[1:])


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("period", [3, 5, 12, 40])
def test_model_is_causal_bit_for_bit_and_decodes(period, rope):
    """T > P too: changing later tokens changes no bit before them; a cache gives the logits of the whole pass."""
    torus = replace(BASE, period=period, rope=rope, fusion="low_rank", window=2 if period == 12 else -1)
    model, (inputs, _) = tiny_model(torus, 2, 12, np.float32), batch(2, 12)
    model.forward(inputs)
    before = model.acts.logits.reshape(2, 12, -1).copy()
    for s in range(1, 12):
        changed = inputs.copy()
        changed[:, s:] = (changed[:, s:] + 1) % TINY.V
        model.forward(changed)
        after = model.acts.logits.reshape(2, 12, -1)
        assert after[:, :s].tobytes() == before[:, :s].tobytes() and (after[:, s] != before[:, s]).any()

    exact = tiny_model(torus, 1, 12)
    exact.forward(inputs[:1])
    expected = exact.acts.logits[:, : TINY.V].copy()
    for sizes in ([1] * 12, [5, 1, 6], [12]):
        start = 0
        for n in sizes:
            logits = exact.extend(inputs[0, start : start + n], start)
            start += n
            assert np.abs(logits - expected[start - 1]).max() < 1e-12
    for T in (4, 9):  # a prefix gives the prefix of the outputs
        prefix = tiny_model(torus, 1, T)
        prefix.forward(inputs[:1, :T])
        assert np.abs(prefix.acts.logits[:, : TINY.V] - expected[:T]).max() < 1e-12


def test_upstream_mode_sees_the_future_and_its_ring_is_the_text():
    torus = replace(BASE, mode="upstream", period=12, fusion="low_rank", rope="upstream")
    model, (inputs, _) = tiny_model(torus, 1, 12), batch(1, 12)
    model.forward(inputs)
    before = model.acts.logits.copy()
    last = model.extend(inputs[0], 0)
    assert np.abs(last - before[-1, : TINY.V]).max() < 1e-12
    inputs[0, -1] = (inputs[0, -1] + 1) % TINY.V
    model.forward(inputs)
    assert (model.acts.logits[0] != before[0]).any()


@pytest.mark.parametrize("layers", [(0,), (1,), (0, 1)])
def test_replaced_layers_learn_alone(layers):
    """Frozen parameters keep every bit; gradients of what learns are those of --train all; below is not run."""
    torus, (inputs, targets) = replace(BASE, layers=layers, fusion="attention"), batch(2, 9)
    some, everything = (tiny_model(torus, 2, 9, np.float32, learns=learns) for learns in (layers, None))
    start = some.params_flat.copy()
    for model in (some, everything):
        model.forward(inputs, targets)
        model.backward()
    extra, whole = extra_shapes(TINY, torus), trained_grads(everything)
    for name, ours in trained_grads(some).items():
        theirs = whole[name] if name in extra else whole[name][list(layers)]
        assert ours.tobytes() == theirs.tobytes(), name
    some.update(1, 1e-2, weight_decay=0.1)
    after, before = named_views(some.params_flat, some.shapes), named_views(start, some.shapes)
    for name, tensor in after.items():
        for l in range(len(tensor) if name in tensor_shapes(TINY) and tensor.ndim > 1 else 1):
            changed = (tensor[l] != before[name][l]).any()
            learns = name in extra or (name in ATTENTION and l in layers)
            assert changed == learns, (name, l)
    assert some.num_trained == len(layers) * (4 * (32 * 32 + 32) + 2 * 2 * 2 + 2 * 2)


def test_moments_of_a_part_survive_a_file():
    """m and v are stored for all parameters, 0 for those that do not learn, and come back."""
    torus, (inputs, targets) = replace(BASE, layers=(1,)), batch(2, 9)
    models = [tiny_model(torus, 2, 9, np.float32, learns=(1,)) for _ in range(2)]
    models[0].forward(inputs, targets)
    models[0].backward()
    models[0].update(1, 1e-2)
    m, v = models[0].moments()
    assert m.size == models[0].params_flat.size and np.count_nonzero(m) <= models[0].num_trained
    models[1].allocate_moments(m, v)
    assert models[1].m_flat.tobytes() == models[0].m_flat.tobytes()
    assert models[1].v_flat.tobytes() == models[0].v_flat.tobytes()


@pytest.mark.parametrize("fusion, D, more", [
    ("low_rank", 1, 2), ("low_rank", 2, 4), ("low_rank", 4, 8), ("low_rank", 8, 32), ("attention", 1, 2),
    ("attention", 2, 8), ("attention", 4, 32), ("attention", 8, 128), ("mean", 4, 0), ("identity", 4, 0),
])  # fmt: skip
def test_parameter_counts(fusion, D, more):
    """GPT-2 124M: 2,362,368 in a layer's attention; low_rank +2Dr, attention +2 D D, mean +0."""
    torus = Torus((0,), depth=D, fusion=fusion, rank=max(1, D // 4))
    config = GPT2Config()
    attention = sum(math.prod(tensor_shapes(config)[name][1:]) for name in ATTENTION)
    extra = {name: shape for name, shape in extra_shapes(config, torus).items() if name.startswith("fuse")}
    assert (attention, sum(map(math.prod, extra.values()))) == (2_362_368, more)


def test_layers():
    assert parse_layers("6,0", 12) == (0, 6) and parse_layers("none", 12) == ()
    assert parse_layers("first:2", 12) == (0, 1) and parse_layers("last:2", 12) == (10, 11)


def test_steps_after_the_first_allocate_nothing_of_activation_size():
    config = GPT2Config(maxT=64, V=5000, L=2, NH=4, C=256, Vp=5120)
    torus = replace(BASE, layers=(0,), period=64, rope="int")
    model = tiny_model(torus, 4, 64, np.float32, config=config)
    inputs, targets = batch(4, 64, V=5000)

    def step(t):
        model.forward(inputs, targets)
        model.backward()
        model.update(t, 1e-4, grad_clip=1.0)

    for t in (1, 2):
        step(t)
    tracemalloc.start()
    step(3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    print(f"peak of a step: {peak} bytes")
    assert peak < 256 * 256 * 4  # bytes of the smallest activation; NumPy itself takes 200 KB for complex products


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("fusion", FUSIONS)
def test_fields_round_trip(mode, rope, fusion):
    torus = Torus((1, 3, 4), mode, 4, 77, rope, fusion, 3, 5, True, True, 0.75)
    config = tiny.resized(L=5, C=48, NH=3)
    extra = np.zeros(sum(map(math.prod, extra_shapes(config, torus).values())), np.float32)
    file = Model(config, extra[:0], kind=TOROIDAL, fields=(*torus.fields(), 0, 0), extra=extra)
    assert read_torus(file, "c.bin") == torus
    with pytest.raises(UserError, match=rf"^c.bin: {extra.size + 1} extra values, .* have {extra.size}$"):
        read_torus(replace(file, extra=np.zeros(extra.size + 1, np.float32)), "c.bin")


def test_tokens_one_by_one_in_the_published_mode():
    """extend gives what a whole pass over that much text gives, and training afterwards has its own ring again."""
    torus = Torus((0, 1), "upstream", 2, 12, "upstream", "low_rank")
    params = np.concatenate([gpt2_init(tiny.CONFIG, 1) * 5, np.random.default_rng(1).random(16, np.float32)])
    tokens = np.random.default_rng(2).integers(0, 256, (1, 12), np.int32)
    model = train_toroidal.GPT2(cpu, tiny.CONFIG, torus, params, 1, 12)
    model.forward(tokens)
    before = model.acts.logits.copy()
    for end in range(1, 13):
        shorter = train_toroidal.GPT2(cpu, tiny.CONFIG, replace(torus, period=end), params, 1, end)
        shorter.forward(tokens[:, :end])
        last = model.extend(tokens[0, end - 1 : end], end - 1)
        assert np.abs(last - shorter.acts.logits[-1, :256]).max() < 1e-5 * np.abs(last).max()
    model.extend(tokens[0, :5], 0)
    model.forward(tokens)
    assert model.acts.logits.tobytes() == before.tobytes()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("fusion", FUSIONS[2:])
def test_text_comes_from_the_weights_at_hand(fusion, mode):
    """After an update extend gives to the bit what a new model with these weights gives."""
    torus, tokens = Torus((0, 1), mode, 4, 8, fusion=fusion, rank=2), np.arange(16, dtype=np.int32).reshape(2, 8)
    file = Model(tiny.CONFIG, gpt2_init(tiny.CONFIG, 1))
    params = np.concatenate([file.params * 5, extra_init(file, torus, 2)])
    model = train_toroidal.GPT2(cpu, tiny.CONFIG, torus, params, 2, 8)
    before = model.extend(tokens[0], 0).tobytes()
    model.forward(tokens, tokens)
    model.backward()
    model.update(1, 0.01)
    new = train_toroidal.GPT2(cpu, tiny.CONFIG, torus, params, 1, 1)
    assert model.extend(tokens[0], 0).tobytes() == new.extend(tokens[0], 0).tobytes() != before
