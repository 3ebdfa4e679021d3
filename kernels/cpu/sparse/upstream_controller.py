"""The published controller of sparse attention, for reproduction: one k for a whole sequence, from all of its tokens.

Open-Superintelligence-Lab/deepseek-sparse-attention-research, experiment 3 ("dynamic"), as published, which means that

    it looks into the future      k of query t depends on tokens behind t: not to be used where that matters
    it cannot learn               k is rounded and passes no gradient, so parameters stay as they were drawn
    its entropy is the batch's    a mean over all rows, so k of a sequence depends on its neighbours
    two modules are never read    diversity_proj and entropy_proj, and of the attention the values and the projection

keep_controller is ours, without these. With X (B,T,C) of a row, sg = sigmoid and variances with n - 1:

    length      l = sg(Lin(32,1)(relu(Lin(C,32)(mean_t X + 1e-8))))
    complexity  c = sg(Lin(3,1)(f1, f2, f3)),   f1 = mean_c var_t X,   f3 = var_{t,c} X,
                f2 = mean (G(X_t) - X_{t+1})^2,   G = LayerNorm(Lin(64,C)(relu(Lin(C,64))))
    entropy     e = sg(mean over the batch of -sum_t a ln a),   a = 1e-8 + attention of 4 heads, not causal, averaged
                over heads and queries
    position    r = sg(Lin(16,1)(relu(Lin(1,16)(T / maxpos))))
    k           round(T * clamp(b (a_l l r + a_c c + a_e e), 0.1, 0.9)), a_* scaled to sum 1; between 1 and T - 1

All is in NumPy on the host, a loop over the batch, for a GPU as well: it makes B integers and is there to be compared
with, not to be fast.
"""

from math import prod, sqrt

import numpy as np

from kernels.cpu.blocks import scratch
from kernels.cpu.gpt2.layernorm import layernorm_forward
from kernels.cpu.gpt2.matmul import matmul_forward

HEADS = 4
LENGTH, PREDICTOR, POSITION = 32, 64, 16  # hidden units
WEIGHTS = (0.4, 0.3, 0.3)  # a_l, a_c, a_e before any training, as b = 0.5
BASE = 0.5
LEAST, MOST = 0.1, 0.9  # the smallest and the largest share of keys
TINY = 1e-8  # added before logarithms
QUERIES = 256  # queries in a block of the attention


def upstream_controller_shapes(C: int) -> dict[str, tuple[int, ...]]:
    """The parameters of one controller in their order in the flat array; 313,596 values for C = 256."""
    linears = {  # name: (inputs, outputs)
        "length1": (C, LENGTH),
        "length2": (LENGTH, 1),
        "diversity": (C, 1),
        "predictor1": (C, PREDICTOR),
        "predictor2": (PREDICTOR, C),
        "combiner": (3, 1),
        "attention_in": (C, 3 * C),
        "attention_out": (C, C),
        "entropy1": (C, LENGTH),
        "entropy2": (LENGTH, 1),
        "position1": (1, POSITION),
        "position2": (POSITION, 1),
    }
    shapes = {}
    for name, (inputs, outputs) in linears.items():
        shapes |= {f"{name}_weight": (outputs, inputs), f"{name}_bias": (outputs,)}
    return shapes | dict(predictor_norm_weight=(C,), predictor_norm_bias=(C,), weights=(3,), base=(1,))


def upstream_controller_init(C: int, generator) -> np.ndarray:
    """Parameters as published, flat float32: weights N(0,0.02), those of attention_in Xavier's uniform, biases 0."""
    flat = np.zeros(sum(map(prod, upstream_controller_shapes(C).values())), np.float32)
    for name, values in _views(flat, C).items():
        if name == "attention_in_weight":
            values[...] = generator.uniform(-1, 1, values.shape) * sqrt(6 / (C + 3 * C))
        elif values.ndim == 2:
            values[...] = 0.02 * generator.standard_normal(values.shape)
        elif name == "predictor_norm_weight":
            values[...] = 1
        elif name == "weights":
            values[...] = WEIGHTS
        elif name == "base":
            values[...] = BASE
    return flat


def upstream_controller(keep, x, params, maxpos=2048):
    """keep (B,T) int32 = k of each sequence from x (B,T,C), normed hidden states; C % 4 == 0. params: flat, as
    upstream_controller_shapes. For T = 1, where the published limits 1 and T - 1 give 0, k is 1."""
    B, T, C = x.shape
    p = _views(params, C)
    length, complexity, entropy = (np.empty(B, x.dtype) for _ in range(3))
    for b in range(B):
        mean = x[b].mean(axis=0) + TINY  # (C)
        length[b] = _two_layers(p, "length", mean)
        complexity[b] = _complexity(x[b], p)
        entropy[b] = _attention_entropy(x[b], p)
    position = _two_layers(p, "position", np.full(1, T / maxpos, x.dtype))
    length, complexity = np.nan_to_num(length), np.nan_to_num(complexity)
    entropy = np.nan_to_num(_sigmoid(entropy.mean()))
    w = p["weights"] / p["weights"].sum()
    factor = w[0] * length * position + w[1] * complexity + w[2] * entropy  # (B)
    k = np.rint(T * np.clip(p["base"] * factor, LEAST, MOST))
    keep[...] = np.maximum(np.minimum(k, T - 1), 1)[:, None]


def _views(flat, C):
    """The parameters by name, views of the flat array."""
    shapes = upstream_controller_shapes(C)
    expected = sum(map(prod, shapes.values()))
    if flat.size != expected:
        raise ValueError(f"upstream_controller: {flat.size} parameters, expected {expected} for {C} channels")
    views, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + prod(shape)
        views[name] = flat[start:end].reshape(shape)
    return views


def _sigmoid(z):
    return 0.5 * (1 + np.tanh(0.5 * z))


def _linear(p, name, x):
    """x (inputs) -> (outputs)"""
    return p[f"{name}_weight"] @ x + p[f"{name}_bias"]


def _two_layers(p, name, x):
    """x (inputs) -> a number in (0,1)"""
    return _sigmoid(_linear(p, f"{name}2", np.maximum(_linear(p, f"{name}1", x), 0)))[0]


def _complexity(x, p):
    """c of a sequence x (T,C); NaN if T = 1, as a variance of one value is."""
    T, C = x.shape
    if T == 1:
        return np.nan
    hidden = scratch("upstream_hidden", (T - 1, PREDICTOR), x.dtype)
    guess, error = scratch("upstream_states", (2, T - 1, C), x.dtype)
    mean, rstd = scratch("upstream_rows", (2, T - 1), x.dtype)
    matmul_forward(hidden, x[:-1], p["predictor1_weight"], p["predictor1_bias"])
    np.maximum(hidden, 0, out=hidden)
    matmul_forward(guess, hidden, p["predictor2_weight"], p["predictor2_bias"])
    layernorm_forward(error, mean, rstd, guess, p["predictor_norm_weight"], p["predictor_norm_bias"])
    error -= x[1:]
    f2 = np.vdot(error, error) / error.size
    centre = x.mean(axis=0)  # (C)
    centred = np.subtract(x, centre, out=scratch("upstream_states", (T, C), x.dtype))
    within = np.vdot(centred, centred)
    between = T * np.square(centre - centre.mean()).sum()
    features = np.array([within / (T - 1) / C, f2, (within + between) / (T * C - 1)], x.dtype)
    return _sigmoid(_linear(p, "combiner", features))[0]


def _attention_entropy(x, p):
    """-sum_t a ln a of a sequence x (T,C), where a (T) is the mean attention that a token gets."""
    T, C = x.shape
    hs = C // HEADS
    qk = scratch("upstream_qk", (T, 2 * C), x.dtype)  # values would not change the weights
    matmul_forward(qk, x, p["attention_in_weight"][: 2 * C], p["attention_in_bias"][: 2 * C])
    a = np.zeros(T, x.dtype)
    for head in range(HEADS):
        q, k = (qk[:, first + head * hs : first + (head + 1) * hs] for first in (0, C))
        for first in range(0, T, QUERIES):
            rows = q[first : first + QUERIES]
            scores = scratch("upstream_scores", (len(rows), T), x.dtype)
            np.matmul(rows, k.T, out=scores)
            scores *= 1 / sqrt(hs)
            scores -= scores.max(axis=1)[:, None]
            np.exp(scores, out=scores)
            scores /= scores.sum(axis=1)[:, None]
            a += scores.sum(axis=0)
    a /= HEADS * T
    a += TINY
    return -np.vdot(a, np.log(a))
