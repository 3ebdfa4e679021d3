"""Mixture of experts, all of its ops together: against a loop over tokens and finite differences, and to the bit."""

import numpy as np
import pytest
from check_op import relative, rounded
from routing import plan, router

from kernels import cpu, cuda
from kernels.cpu.deepseek.expert_plan import expert_rows

STEP = 1e-5  # of the central difference


class Layer:
    """router -> plan -> gather -> FC1 -> SiLU -> FC2 -> combine, as a trainer has it, without its buffers."""

    def __init__(self, x, wg, w1, w2, top):
        """x (N,C), wg (E,C), w1 (E,F,C), w2 (E,C,F)"""
        (N, C), (E, F, _), dtype = x.shape, w1.shape, x.dtype
        self.x, self.wg, self.w1, self.w2, self.top = x, wg, w1, w2, top
        self.probs, self.gates, self.experts = router(x @ wg.T, top)
        self.slot, self.source, self.tile_expert, self.load = plan(self.experts, E)
        rows = len(self.source)
        self.rows, self.y = (np.full((rows, C), np.nan, dtype) for _ in range(2))
        self.hidden, self.act = (np.full((rows, F), np.nan, dtype) for _ in range(2))
        self.out = np.full((N, C), np.nan, dtype)
        cpu.expert_gather(self.rows, x, self.source, top)
        cpu.expert_matmul_forward(self.hidden, self.rows, w1, self.tile_expert)
        cpu.silu_forward(self.act, self.hidden)
        cpu.expert_matmul_forward(self.y, self.act, w2, self.tile_expert)
        cpu.expert_combine_forward(self.out, self.y, self.gates, self.slot)
        self.balance = E * self.probs.mean(axis=0) @ self.load / self.load.sum()  # the balance loss

    def backward(self, dout, balance):
        """dx, dwg, dw1, dw2 of sum(dout * out) + balance * the balance loss"""
        arrays = self.y, self.act, self.rows, self.x, self.gates, self.probs, self.w1, self.w2
        dy, dact, drows, dx, dgates, dlogits, dw1, dw2 = (np.full_like(array, np.nan) for array in arrays)
        cpu.expert_combine_backward(dy, dgates, dout, self.y, self.gates, self.slot, self.source)
        cpu.expert_matmul_backward(dact, dw2, dy, self.act, self.w2, self.tile_expert)
        cpu.silu_backward(dact, self.hidden, dact)
        cpu.expert_matmul_backward(drows, dw1, dact, self.rows, self.w1, self.tile_expert)
        cpu.expert_scatter(dx, drows, self.slot)
        cpu.router_backward(dlogits, dgates, self.probs, self.gates, self.experts, self.load, balance)
        return dict(x=dx + dlogits @ self.wg, wg=dlogits.T @ self.x, w1=dw1, w2=dw2)


def tensors(N, C, E, F, dtype=np.float64, seed=0):
    rng = np.random.default_rng(seed)
    shapes = dict(x=(N, C), wg=(E, C), w1=(E, F, C), w2=(E, C, F))
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def by_loop(x, wg, w1, w2, top):
    """out and balance loss, token by token"""
    logits, out, load = x @ wg.T, np.zeros_like(x), np.zeros(len(wg))
    for n, z in enumerate(logits):
        chosen = sorted(range(len(z)), key=lambda e: (-z[e], e))[:top]
        gates = np.exp(z[chosen]) / np.exp(z[chosen]).sum()
        for gate, e in zip(gates, chosen):
            u = w1[e] @ x[n]
            out[n] += gate * (w2[e] @ (u / (1 + np.exp(-u))))
            load[e] += 1
    probs = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return out, len(wg) * (load / load.sum()) @ probs.mean(axis=0)


SIZES = [
    (1, 3, 1, 2, 1), (1, 4, 4, 8, 2), (9, 5, 4, 7, 2), (70, 6, 5, 9, 3), (130, 8, 3, 4, 1), (40, 3, 4, 5, 4),
    (20, 3, 33, 2, 2),
]  # fmt: skip


@pytest.mark.parametrize("N, C, E, F, top", SIZES)
def test_layer_is_a_loop_over_tokens(N, C, E, F, top):
    given = tensors(N, C, E, F)
    layer, (out, balance) = Layer(**given, top=top), by_loop(**given, top=top)
    assert relative(layer.out, out) <= 1e-13 and abs(layer.balance - balance) <= 1e-13
    single = Layer(**tensors(N, C, E, F, np.float32), top=top)
    assert single.out.dtype == np.float32 and relative(single.out, out) <= 1e-5


@pytest.mark.parametrize("N, C, E, F, top", SIZES)
def test_layer_gradients(N, C, E, F, top):
    """Central differences in float64, away from ties: no step changes a choice."""
    given, balance, rng = tensors(N, C, E, F, seed=1), 0.7, np.random.default_rng(2)
    layer, dout = Layer(**given, top=top), rng.standard_normal((N, C))
    grads = layer.backward(dout, balance)
    single = {name: value.astype(np.float32) for name, value in given.items()}
    grads32 = Layer(**single, top=top).backward(dout.astype(np.float32), balance)
    for name, tensor in given.items():
        error = 0.0
        for index in rng.choice(tensor.size, min(tensor.size, 40), replace=False):
            kept, sums = tensor.flat[index], []
            for value in (kept + STEP, kept - STEP):
                tensor.flat[index] = value
                moved = Layer(**given, top=top)
                assert np.array_equal(moved.experts, layer.experts)
                sums.append(np.sum(dout * moved.out) + balance * moved.balance)
            tensor.flat[index] = kept
            error = max(error, abs((sums[0] - sums[1]) / (2 * STEP) - grads[name].flat[index]))
        largest = max(np.abs(grads[name]).max(), 1.0)  # the router's gradient vanishes for one expert
        print(f"d{name}: {error / largest:.1e}, float32 {np.abs(grads32[name] - grads[name]).max() / largest:.1e}")
        assert error / largest <= 1e-6
        assert grads32[name].dtype == np.float32
        assert np.abs(grads32[name] - grads[name]).max() / largest <= 1e-5


@pytest.mark.parametrize("beta", [0, 1])
def test_experts_without_tokens(beta):
    """Their gradient is beta times what it was, not left as it is; dinp is not asked for."""
    given = tensors(70, 4, 5, 6, seed=3)
    given["x"][:, 0], given["wg"][:, 0] = 1, [0, -1e3, 0, -1e3, -1e3]
    layer = Layer(**given, top=2)
    assert layer.load.tolist() == [70, 0, 70, 0, 0]
    dweight, dout = np.full_like(layer.w1, 3.0), np.random.default_rng(1).standard_normal(layer.hidden.shape)
    dout[layer.source < 0] = 0
    cpu.expert_matmul_backward(None, dweight, dout, layer.rows, layer.w1, layer.tile_expert, beta)
    assert (dweight[[1, 3, 4]] == 3 * beta).all()
    for e in (0, 2):
        n, j = np.nonzero(layer.experts == e)
        expected = dout[layer.slot[n, j]].T @ layer.x[n] + 3 * beta
        assert relative(dweight[e], expected) <= 1e-13


def test_all_tokens_to_one_expert():
    given = tensors(150, 4, 4, 6, seed=4)
    given["x"][:, 0], given["wg"][:, 0] = 1, [-1e3, -1e3, 0, -1e3]
    layer, (out, balance) = Layer(**given, top=1), by_loop(**given, top=1)
    assert layer.load.tolist() == [0, 0, 150, 0] and layer.balance == balance == 4
    assert relative(layer.out, out) <= 1e-13


def test_padding_and_unused_tiles_stay_zero():
    layer = Layer(**tensors(100, 4, 4, 6, seed=5), top=2)
    padding = layer.source < 0
    assert padding.any() and (layer.tile_expert < 0).any()
    for array in (layer.rows, layer.hidden, layer.act, layer.y):
        assert not array[padding].any() and np.abs(array[~padding]).min(axis=0).all()


@pytest.mark.parametrize("N, C, F", [(8, 5, 7), (48, 36, 20), (160, 32, 64), (300, 256, 512), (130, 33, 129)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_no_bit_of_a_token_depends_on_the_others(N, C, F, dtype):
    """Neither what other tokens hold nor which experts they chose: this covers later tokens and other batch rows."""
    given = tensors(N, C, 4, F, dtype, seed=6)
    before, other, slots_moved = Layer(**given, top=2), tensors(N, C, 4, F, dtype, seed=7), 0
    for kept in (slice(0, N // 3), slice(N // 3, N // 2), slice(N - N // 4, N)):  # a prefix, a middle, an end
        x = other["x"].copy()
        x[kept] = given["x"][kept]
        after = Layer(x, *(given[name] for name in ("wg", "w1", "w2")), top=2)
        assert np.array_equal(after.experts[kept], before.experts[kept])
        assert np.array_equal(after.out[kept], before.out[kept])
        slots_moved += (after.slot[kept] != before.slot[kept]).sum()
        assert not np.array_equal(after.out, before.out)
    assert slots_moved > 0  # or this shows nothing


# ----------------------------------------------------------------------------------------------------------------------
# on CUDA: the emulator, and a GPU if there is one


@pytest.mark.parametrize("N, C, F", [(48, 12, 20), (140, 8, 36)])
def test_no_bit_of_a_token_depends_on_the_others_on_cuda(runtime, N, C, F):
    """As on the CPU: neither what other tokens hold nor which experts they chose."""
    device, E, top = cuda.device(runtime), 4, 2
    shapes = dict(x=(N, C), wg=(E, C), w1=(E, F, C), w2=(E, C, F))
    given, other = ({name: rounded(*shape, seed=seed) for name, shape in shapes.items()} for seed in (6, 7))

    def layer(x):
        """out, slot"""
        x, wg, w1, w2 = (runtime.to_device(a.astype(np.float32)) for a in (x, given["wg"], given["w1"], given["w2"]))
        rows, tile = expert_rows(N, top, E)
        logits, probs, gates = runtime.zeros((N, E)), runtime.zeros((N, E)), runtime.zeros((N, top))
        experts, slot = runtime.zeros((N, top), np.int32), runtime.zeros((N, top), np.int32)
        source, tile_expert = runtime.zeros(rows, np.int32), runtime.zeros(rows // tile, np.int32)
        load, out = runtime.zeros(E, np.int32), runtime.zeros((N, C))
        inp, hidden, y = runtime.zeros((rows, C)), runtime.zeros((rows, F)), runtime.zeros((rows, C))
        device.matmul_forward(logits, x, wg)
        device.router_forward(probs, gates, experts, logits)
        device.expert_plan(slot, source, tile_expert, load, experts)
        device.expert_gather(inp, x, source, top)
        device.expert_matmul_forward(hidden, inp, w1, tile_expert)
        device.silu_forward(hidden, hidden)
        device.expert_matmul_forward(y, hidden, w2, tile_expert)
        device.expert_combine_forward(out, y, gates, slot)
        return runtime.to_host(out), runtime.to_host(slot)

    before, slots = layer(given["x"])
    slots_moved = 0
    for kept in (slice(0, N // 2), slice(N // 2, N)):  # earlier tokens, another row of the batch
        x = other["x"].copy()
        x[kept] = given["x"][kept]
        after, moved = layer(x)
        assert np.array_equal(after[kept], before[kept]) and not np.array_equal(after, before)
        slots_moved += (moved[kept] != slots[kept]).sum()
    assert slots_moved > 0  # or this shows nothing
