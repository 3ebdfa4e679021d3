"""Train GPT-2 with toroidal attention in chosen layers: depth platters, distance on a ring, fusion over depth.

    make train_toroidal                                          # a baseline, then layer 0 replaced (minutes, CPU)
    python train_toroidal.py -e baseline.bin --layers 0,2 --depth 2 -n 200
    python train_toroidal.py -e baseline.bin --layers 0,2 --control 1 -n 200   # the same layers, GPT-2's attention
    python train_toroidal.py -e baseline.bin --layers none -n 0                # the baseline's perplexity

Takes a plain GPT-2 file or a toroidal one.

Reads top to bottom as train_gpt2_fp32.cu does: options, model (views, forward, backward, update), loop. What differs
from GPT-2 is attention in the replaced layers. A head of hs channels is cut into D platters; token i becomes D
sub-tokens (i,k), and each attends to the sub-tokens (j,l) of all tokens j <= i, by one softmax over both:

    score = q_ik . k_jl / sqrt(hs / D) - lams min(r, P-r)/P - lamd |k-l|/D,   r = (i-j) mod P

with the period P a constant of the model. Then a D x D matrix mixes the platters, before GPT-2's output projection.
"""

if __name__ == "__main__":
    from llmc import startup

    startup.begin()

import math
import time
import warnings
from argparse import Namespace
from types import SimpleNamespace

import kernels  # before NumPy, see its docstring  # isort: skip
import numpy as np

from kernels.cpu.torus.fusion_matrix import fusion_init
from kernels.cpu.torus.torus_rope import torus_frequencies
from llmc import errors, loop, options, table
from llmc.checkpoint import DENSE, MATRICES, TOROIDAL, GPT2Config, Model, named_views, num_parameters, tensor_shapes
from llmc.cli import ArgumentParser, any_int, flag01, natural, natural_float, positive_int
from llmc.errors import UserError
from llmc.init import gpt2_init
from llmc.interrupt import Interrupt
from llmc.logger import Logger
from llmc.rand import normals
from llmc.schedulers import learning_rate
from systems.torus import FUSIONS, MODES, ROPES, Torus, choose_torus, extra_shapes, factors, print_torus

# ----------------------------------------------------------------------------------------------------------------------
# options

EPILOG = """examples:
  python train_toroidal.py -e gpt2_124M.bin --layers 0,6 --depth 2 -n 200 -b 1 -t 256 --grad-accum 16 --grad-clip 1
  python train_toroidal.py -e baseline.bin --layers last:2 --depth 4 --lambda 4 --learn-lambda 1 -c toroidal.bin
  python train_toroidal.py -e baseline.bin --layers 0 --init random --train all --recompute 1
  python train_toroidal.py --resume toroidal.bin               go on where a run stopped, with its settings

--depth 1 --lambda 0 --rope none --fusion identity is GPT-2. -n 0 validates and trains nothing.
Exit status: 0 done, 1 error, 2 wrong usage, 130 after Ctrl-C, 143 after SIGTERM."""

ATTENTION = ("qkvw", "qkvb", "attprojw", "attprojb")  # what is trained of a replaced layer


def arguments() -> ArgumentParser:
    parser = ArgumentParser(description=(__doc__ or "").partition("\n")[0], epilog=EPILOG)
    add = parser.add_argument_group("toroidal attention (kept in the file: not for one that is toroidal)").add_argument
    add("--layers", default="0", help="layers to replace: 0,6 or first:N, last:N, none")
    add("--depth", type=positive_int, help="platters D that a head is cut into (default: 2, 1 for an odd head size)")
    add("--period", type=positive_int, help="positions P of the ring (default: -t)")
    add("--lambda", type=natural_float, default=1.0, help="weight of the distance, of sequence and of depth")
    add("--learn-lambda", type=flag01, default=False, help="1: learn it, for each head, sequence and depth apart")
    add("--rope", choices=ROPES, default="none", help="rotary embedding: int (periodic), upstream, orth")
    add("--fusion", choices=FUSIONS, default="low_rank_residual", help="of platters: " + ", ".join(FUSIONS))
    add("--fusion-rank", type=positive_int, help="of low_rank and low_rank_residual (default: D/4, at least 1)")
    add("--window", type=any_int, default=-1, help="largest distance on the ring that attends, -1: any")
    add("--wrap-depth", type=flag01, default=False, help="1: depth is a ring, too")
    add("--mode", choices=MODES, default="causal", help="upstream: as published, every token sees all others")
    add(
        "--init",
        choices=("copy", "random"),
        default="copy",
        help="attention of the replaced layers: the file's, or random",
    )
    add("--control", type=flag01, default=False, help="1: leave the layers' attention as it is, train the same weights")
    add = parser.add_argument_group("training").add_argument
    add("--train", choices=("replaced", "all"), default="replaced", help="what learns: the replaced attention, or all")
    add("--epochs", type=positive_int, default=1, help="of the training data, if -n does not name the steps")
    add("--patience", type=natural, default=0, help="stop after so many validations without a better one, 0: never")
    add("--best-loss", type=natural_float, help="validation loss to beat, for --patience (--resume knows it)")
    add("--worse", type=natural, default=0, help="validations since that one, for --patience (--resume knows it)")
    add("--recompute", type=flag01, default=False, help="1: keep a layer's output only, run it again in backward")
    options.add_options(parser)
    return parser


# ----------------------------------------------------------------------------------------------------------------------
# the model


def extra_init(device, file: Model, torus: Torus, seed: int) -> np.ndarray:
    """Values of lambda and of the fusion's factors, flat: the file's if it is toroidal, else new ones."""
    if file.kind == TOROIDAL:
        return file.extra
    shapes, generator = extra_shapes(file.config, torus), normals(seed)
    flat = np.zeros(sum(map(math.prod, shapes.values())), np.float32)
    views = named_views(flat, shapes)
    for i in range(len(torus.layers)):
        views["lams"][i] = views["lamd"][i] = torus.lam
        if factors(torus):
            pair = fusion_init(FUSIONS.index(torus.fusion), torus.depth, torus.rank, generator)
            views["fuse1"][i], views["fuse2"][i] = pair
    return flat


def replace_attention(file: Model, layers: tuple[int, ...], seed: int):
    """--init random: GPT-2's random initialisation for the attention of these layers, in place."""
    shapes = tensor_shapes(file.config)
    ours, drawn = named_views(file.params, shapes), named_views(gpt2_init(file.config, seed), shapes)
    for name in ATTENTION:
        ours[name][list(layers)] = drawn[name][list(layers)]


class GPT2:
    """The model on a device: one flat float32 buffer for all parameters; gradients, m and v for those that learn.

    learns: "all", or "replaced": attention of the replaced layers, its fusion, and lambda if that is learnt.
    """

    def __init__(
        self,
        device,
        config: GPT2Config,
        torus: Torus,
        params: np.ndarray,
        B,
        T,
        learns="all",
        recompute=False,
        control=False,
    ):
        self.ops, self.config, self.torus, self.B, self.T = device, config, torus, B, T
        self.learns, self.recompute, self.control = learns, recompute, control
        self.extra = {} if control else extra_shapes(config, torus)
        self.shapes = tensor_shapes(config) | self.extra
        self.params_flat = device.to_device(params)
        self.params = SimpleNamespace(**named_views(self.params_flat, self.shapes))
        n, L = len(torus.layers), config.L
        self.lowest = min(torus.layers, default=L) if learns == "replaced" else 0  # backward ends with this layer
        fixed = () if torus.learn_lambda else ("lams", "lamd")
        if learns == "all":
            self.trained = {name: shape for name, shape in self.shapes.items() if name not in fixed}
        else:
            self.trained = {name: (n, *self.shapes[name][1:]) for name in ATTENTION} if n else {}
            self.trained |= {name: shape for name, shape in self.extra.items() if name not in fixed}
        self.omega = device.zeros((max(n, 1), torus.depth, torus.depth))
        self.has_ring_of_text = n > 0 and not torus.causal and not control  # as published, instead of a fixed one
        self._set_period(torus.period)
        self.grads_flat = self.m_flat = self.v_flat = self.layers = self.decoder = None
        self.text = []  # what extend has seen, if the ring is as long as that

    def _set_period(self, period: int):
        """The length of the ring, and the rotary embedding's frequencies, which depend on it."""
        s, self.period, self.rotations = self.torus, period, None
        if s.rope != "none" and s.layers and not self.control:
            pair = torus_frequencies(s.rope, self.config.C // self.config.NH // s.depth, s.depth, period)
            self.rotations = tuple(self.ops.to_device(each.astype(self.params_flat.dtype)) for each in pair)

    @property
    def num_trained(self) -> int:
        return sum(map(math.prod, self.trained.values()))

    def _buffer(self) -> tuple:
        flat = self.ops.zeros(self.num_trained)
        return flat, SimpleNamespace(**named_views(flat, self.trained))

    def _part(self, views, name: str, l: int):
        """Layer l of a tensor in `views` of what is trained; None if it is not."""
        if name not in self.trained:
            return None
        if self.learns == "all" and name not in self.extra:
            return getattr(views, name)[l]
        return getattr(views, name)[self.torus.layers.index(l)] if l in self.torus.layers else None

    def _is_toroidal(self, l: int) -> bool:
        return l in self.torus.layers and not self.control

    def _layer_shapes(self, l: int, B: int, T: int, start: int = 0) -> dict:
        """What a layer keeps of a forward pass over B x T new tokens behind `start` old ones."""
        c, N, C, D = self.config, B * T, self.config.C, self.torus.depth
        shapes = dict(ln1=(N, C), ln1_mean=(N,), ln1_rstd=(N,), qkv=(B, start + T, 3 * C), atty=(N, C))
        shapes |= dict(residual2=(N, C), ln2=(N, C), ln2_mean=(N,), ln2_rstd=(N,), fch=(N, 4 * C), fch_gelu=(N, 4 * C))
        shapes |= dict(lse=(B, c.NH, T, D), mixed=(N, C)) if self._is_toroidal(l) else dict(lse=(B, c.NH, T))
        return shapes

    def activation_bytes(self, recompute: bool) -> int:
        """What forward keeps for backward, logits included."""
        c, N = self.config, self.B * self.T
        layers = [sum(map(math.prod, self._layer_shapes(l, self.B, self.T).values())) for l in range(c.L)]
        kept = max(layers) if recompute else sum(layers)
        return 4 * (kept + (c.L + 2) * N * c.C + N * (c.Vp + 3))

    def _allocate(self, shapes: dict) -> SimpleNamespace:
        return SimpleNamespace(**{name: self.ops.zeros(shape) for name, shape in shapes.items()})

    def forward(self, inputs: np.ndarray, targets: np.ndarray | None = None, grad_accum: int = 1) -> None:
        """inputs, targets (B,T) int32 -> logits; with targets, losses, which mean_loss fetches.

        With targets, the logits are overwritten by the gradient of loss / grad_accum, which backward starts from.
        """
        ops, p, B, T, L = self.ops, self.params, self.B, self.T, self.config.L
        N = B * T
        if self.layers is None:
            self._allocate_activations()
        if self.has_ring_of_text and self.period != T:
            self._set_period(T)
        a = self.acts
        ops.copy_in(self.inputs, inputs)
        ops.encoder_forward(a.encoded, self.inputs, p.wte, p.wpe)
        self._mix_matrices()
        for l in range(L):
            self._layer(l, self.layers[l], self._residual(l), 0)
        ops.layernorm_forward(a.lnf, a.lnf_mean, a.lnf_rstd, self._residual(L), p.lnfw, p.lnfb)
        ops.matmul_forward(a.logits, a.lnf, p.wte)  # (N,Vp)
        if targets is not None:
            ops.copy_in(self.targets, targets.ravel())
            ops.fused_classifier(a.losses, a.logits, self.targets, self.config.V, 1 / (N * grad_accum))
            self.losses = ops.to_host_later(a.losses)

    def _allocate_activations(self):
        """Buffers of a forward pass; with recompute all layers share those of one, and each keeps its output alone."""
        c, B, T = self.config, self.B, self.T
        N, shapes = B * T, [self._layer_shapes(l, B, T) for l in range(c.L)]
        if self.recompute:
            largest = {name: max((s.get(name, ()) for s in shapes), key=math.prod) for s in shapes for name in s}
            shared = self._allocate(largest)
            self.layers = [views_of(shared, of_layer) for of_layer in shapes]
        else:
            self.layers = [self._allocate(of_layer) for of_layer in shapes]
        residual3 = self.ops.zeros((c.L, N, c.C))
        for l, v in enumerate(self.layers):
            v.residual3 = residual3[l]
        rest = dict(encoded=(N, c.C), lnf=(N, c.C), lnf_mean=(N,), lnf_rstd=(N,), logits=(N, c.Vp), losses=(N,))
        self.acts = self._allocate(rest)
        self.inputs, self.targets = self.ops.zeros((B, T), np.int32), self.ops.zeros(N, np.int32)
        print(f"allocated {self.activation_bytes(self.recompute) >> 20} MiB for activations")

    def _residual(self, l: int):
        """The residual stream (N,C) in front of layer l."""
        return self.layers[l - 1].residual3 if l else self.acts.encoded

    def mean_loss(self) -> float:
        """The loss of the last forward with targets; waits for that, not for what was begun since."""
        return float(self.losses().mean())

    def _mix_matrices(self):
        """omega (D,D) of every replaced layer, from its factors."""
        for i in range(0 if self.control else len(self.torus.layers)):
            self.ops.fusion_matrix_forward(self.omega[i], *self._factors(self.params, i), self._fusion)

    @property
    def _fusion(self) -> int:
        return FUSIONS.index(self.torus.fusion)

    def _factors(self, views, i: int) -> tuple:
        return (views.fuse1[i], views.fuse2[i]) if factors(self.torus) else (None, None)

    def _ring(self) -> tuple:
        """What the attention op asks of the geometry: heads, depth, period, window, whether depth wraps, causal."""
        s = self.torus
        return self.config.NH, s.depth, self.period, s.window, int(s.wrap_depth), int(s.causal)

    def _layer(self, l: int, v, residual, start: int):
        """One layer over the rows `residual` (N,C) at positions start.. : v keeps what backward needs."""
        ops, p, NH = self.ops, self.params, self.config.NH
        ops.layernorm_forward(v.ln1, v.ln1_mean, v.ln1_rstd, residual, p.ln1w[l], p.ln1b[l])
        qkv = v.qkv[:, start:]  # the new rows
        ops.matmul_forward(qkv.reshape(len(v.ln1), -1), v.ln1, p.qkvw[l], p.qkvb[l])
        if self._is_toroidal(l):
            i = self.torus.layers.index(l)
            if self.rotations:
                ops.torus_rope_forward(qkv, *self.rotations, NH, self.torus.depth, self.period, start)
            ops.torus_attention_forward(v.mixed, v.lse, v.qkv, p.lams[i], p.lamd[i], *self._ring(), start)
            ops.depth_fusion_forward(v.atty, v.mixed, self.omega[i], NH, int(not self.torus.causal))
        else:
            ops.attention_forward(v.atty, v.lse, v.qkv, NH, start)
        ops.matmul_forward(v.residual2, v.atty, p.attprojw[l], p.attprojb[l])
        ln2 = (v.ln2, v.ln2_mean, v.ln2_rstd)
        ops.fused_residual_forward(v.residual2, *ln2, v.residual2, residual, p.ln2w[l], p.ln2b[l])
        ops.matmul_forward(v.fch, v.ln2, p.fcw[l], p.fcb[l])
        ops.gelu_forward(v.fch_gelu, v.fch)
        ops.matmul_forward(v.residual3, v.fch_gelu, p.fcprojw[l], p.fcprojb[l])
        ops.residual_forward(v.residual3, v.residual3, v.residual2)

    def backward(self, first: bool = True):
        """Gradients of the last forward's loss; the `first` micro-step of an update starts them, later ones add.

        Of what does not learn there are none, and nothing is computed below the lowest layer that does.
        """
        ops, p, a, L, C = self.ops, self.params, self.acts, self.config.L, self.config.C
        N, whole = self.B * self.T, self.learns == "all"
        if self.grads_flat is None:
            print(f"allocated {self.num_trained * 4 >> 20} MiB for parameter gradients")
            self.grads_flat, self.grads = self._buffer()
            shapes = dict(residual=(N, C), btc=(N, C), qkv=(self.B, self.T, 3 * C), bt4c=(N, 4 * C), norm=(2, C))
            shapes |= dict(omega=self.omega.shape[1:], lam=(2, self.config.NH))
            self.dacts = self._allocate(shapes)
        g, d, beta = self.grads, self.dacts, 0 if first else 1
        if first:  # the matrices' gradients are written by their product, all others are added to
            for name, tensor in vars(g).items():
                if name not in MATRICES or name == "wpe":
                    tensor.fill(0)
        d.residual.fill(0)
        ops.matmul_backward(d.btc, g.wte if whole else None, None, a.logits, a.lnf, p.wte, beta)
        norm = (g.lnfw, g.lnfb) if whole else (d.norm[0], d.norm[1])
        ops.layernorm_backward(d.residual, *norm, d.btc, self._residual(L), p.lnfw, a.lnf_mean, a.lnf_rstd)
        for l in reversed(range(self.lowest, L)):
            v = self.layers[l]
            if self.recompute and l < L - 1:  # the last layer's are still there
                self._layer(l, v, self._residual(l), 0)
            self._layer_backward(l, v, beta)
        if whole:
            ops.encoder_backward(g.wte, g.wpe, d.residual, self.inputs)

    def _layer_backward(self, l: int, v, beta: int):
        """d.residual, from the gradient behind layer l to the one in front of it; and the layer's gradients."""
        ops, p, d, NH = self.ops, self.params, self.dacts, self.config.NH
        names = (
            "qkvw",
            "qkvb",
            "attprojw",
            "attprojb",
            "fcw",
            "fcb",
            "fcprojw",
            "fcprojb",
            "ln1w",
            "ln1b",
            "ln2w",
            "ln2b",
        )
        g = SimpleNamespace(**{name: self._part(self.grads, name, l) for name in names})
        norms = [(g.ln1w, g.ln1b), (g.ln2w, g.ln2b)] if self.learns == "all" else [(d.norm[0], d.norm[1])] * 2
        ops.matmul_backward(d.bt4c, g.fcprojw, g.fcprojb, d.residual, v.fch_gelu, p.fcprojw[l], beta)
        ops.gelu_backward(d.bt4c, v.fch, d.bt4c)
        ops.matmul_backward(d.btc, g.fcw, g.fcb, d.bt4c, v.ln2, p.fcw[l], beta)
        ops.layernorm_backward(d.residual, *norms[1], d.btc, v.residual2, p.ln2w[l], v.ln2_mean, v.ln2_rstd)
        ops.matmul_backward(d.btc, g.attprojw, g.attprojb, d.residual, v.atty, p.attprojw[l], beta)
        if self._is_toroidal(l):
            self._torus_backward(l, v)
        else:
            ops.attention_backward(d.qkv, d.btc, v.qkv, v.atty, v.lse, NH)
        below = self.learns == "all" or l > self.lowest  # whether anything in front of this layer's attention learns
        dqkv = d.qkv.reshape(len(v.ln1), -1)
        ops.matmul_backward(d.btc if below else None, g.qkvw, g.qkvb, dqkv, v.ln1, p.qkvw[l], beta)
        if below:
            ln1 = self._residual(l), p.ln1w[l], v.ln1_mean, v.ln1_rstd
            ops.layernorm_backward(d.residual, *norms[0], d.btc, *ln1)

    def _torus_backward(self, l: int, v):
        """d.qkv from d.btc, the gradient behind the fusion; and those of the fusion and of lambda."""
        ops, p, d, g, i = self.ops, self.params, self.dacts, self.grads, self.torus.layers.index(l)
        NH, depth_major, fused = self.config.NH, int(not self.torus.causal), factors(self.torus)
        d.omega.fill(0)
        dmixed = v.atty  # its values have done their work: matmul_backward of the projection was the last to read them
        ops.depth_fusion_backward(dmixed, d.omega if fused else None, d.btc, v.mixed, self.omega[i], NH, depth_major)
        if fused:
            ops.fusion_matrix_backward(*self._factors(g, i), d.omega, self.omega[i], *self._factors(p, i), self._fusion)
        dlam = (g.lams[i], g.lamd[i]) if self.torus.learn_lambda else (None, None)
        ops.torus_attention_backward(d.qkv, *dlam, dmixed, v.qkv, v.mixed, v.lse, p.lams[i], p.lamd[i], *self._ring())
        if self.rotations:
            ops.torus_rope_backward(d.qkv, *self.rotations, NH, self.torus.depth, self.period)

    def update(self, t, lr, beta2=0.999, weight_decay=0.0, decay_all=True, grad_clip=0.0):
        """AdamW update number t = 1, 2, ... of what learns; returns the gradient norm if grad_clip > 0, else None."""
        if self.m_flat is None:
            self.allocate_moments()
        norm = self.ops.global_norm(self.grads_flat) if grad_clip else None
        scale = grad_clip / norm if grad_clip and norm > grad_clip else 1.0
        for name in self.trained:
            decay = weight_decay if decay_all or name in MATRICES else 0.0
            whole, learnt = getattr(self.params, name), [getattr(views, name) for views in (self.grads, self.m, self.v)]
            parts = [(whole, *learnt)]
            if self.learns == "replaced" and name not in self.extra:
                parts = [(whole[l], *(tensor[i] for tensor in learnt)) for i, l in enumerate(self.torus.layers)]
            for tensors in parts:
                self.ops.adamw_update(*tensors, t, lr, 0.9, beta2, 1e-8, decay, scale)
        return norm

    def allocate_moments(self, m: np.ndarray | None = None, v: np.ndarray | None = None):
        """AdamW's m and v: a checkpoint's (of all parameters, as it keeps them), or zeros."""
        for name, saved in (("m", m), ("v", v)):
            print(f"allocated {self.num_trained * 4 >> 20} MiB for AdamW optimizer state {name}")
            flat, views = self._buffer()
            if saved is not None:
                values = np.zeros(self.num_trained, np.float32)
                for ours, whole in self._pairs(values, saved):
                    ours[...] = whole
                self.ops.copy_in(flat, values)
            setattr(self, f"{name}_flat", flat)
            setattr(self, name, views)

    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """m and v of all parameters on the host, 0 for what does not learn."""
        found = []
        for flat in (self.m_flat, self.v_flat):
            values = np.zeros(sum(map(math.prod, self.shapes.values())), np.float32)
            for ours, whole in self._pairs(self.ops.to_host(flat), values):
                whole[...] = ours
            found.append(values)
        return tuple(found)

    def _pairs(self, trained: np.ndarray, whole: np.ndarray):
        """(view of `trained`, view of the same in `whole`), both on the host, for each tensor, or layer of one."""
        ours, all_of_it = named_views(trained, self.trained), named_views(whole, self.shapes)
        for name, tensor in ours.items():
            if self.learns == "all" or name in self.extra:
                yield tensor, all_of_it[name]
            else:
                yield from ((tensor[i], all_of_it[name][l]) for i, l in enumerate(self.torus.layers))

    def extend(self, tokens: np.ndarray, start: int) -> np.ndarray:
        """Logits (V) after `tokens` (n) int32 at positions start.., of which earlier calls ran 0..start-1.

        Keys and values are kept, a toroidal layer's rotated: T*D sub-tokens in the room of T tokens. Where the ring is
        as long as the text, all of it has to run again.
        """
        if self.has_ring_of_text:
            self.text = [*self.text[:start], *tokens.tolist()]
            tokens, start = np.array(self.text, np.int32), 0
            self._set_period(len(tokens))
        ops, p, c, n = self.ops, self.params, self.config, len(tokens)
        maxT, end = c.maxT, start + n
        if self.decoder is None:
            shapes = [self._layer_shapes(l, 1, maxT) for l in range(c.L)]
            largest = {name: max((s.get(name, ()) for s in shapes), key=math.prod) for s in shapes for name in s}
            largest |= dict(encoded=(maxT, c.C), residual3=(maxT, c.C), last=(1, c.C), logits=(1, c.Vp))
            self.decoder = self._allocate({name: shape for name, shape in largest.items() if name != "qkv"})
            self.decoder.tokens = ops.zeros((1, maxT), np.int32)
            self.decoder.qkv = ops.zeros((c.L, 1, maxT, 3 * c.C))
        if start == 0:
            self._mix_matrices()  # an update may have changed the factors
        d = self.decoder
        ops.copy_in(d.tokens[:, :n], tokens.reshape(1, n))
        residual = d.encoded[:n]
        ops.encoder_forward(residual, d.tokens[:, :n], p.wte, p.wpe, start)
        for l in range(c.L):
            shapes = self._layer_shapes(l, 1, n) | dict(residual3=(n, c.C))
            v = views_of(d, {name: shape for name, shape in shapes.items() if name != "qkv"})
            v.qkv = d.qkv[l, :, :end]
            self._layer(l, v, residual, start)
            residual = v.residual3
        ops.layernorm_forward(d.last, v.ln2_mean[:1], v.ln2_rstd[:1], residual[n - 1 :], p.lnfw, p.lnfb)
        ops.matmul_forward(d.logits, d.last, p.wte)
        return ops.to_host(d.logits)[0, : c.V]


def views_of(buffers: SimpleNamespace, shapes: dict) -> SimpleNamespace:
    """The first values of each buffer, in other shapes."""
    return SimpleNamespace(
        **{
            name: getattr(buffers, name).reshape(-1)[: math.prod(shape)].reshape(shape)
            for name, shape in shapes.items()
        }
    )


# ----------------------------------------------------------------------------------------------------------------------
# the loop


def save(args: Namespace, model: GPT2, step: int, run: loop.Run):
    """Write the checkpoint, replaced layers in its header, and the optimizer state for a run that goes on at `step`."""
    params, own = model.ops.to_host(model.params_flat), num_parameters(model.config)
    kind, fields = (TOROIDAL, model.torus.fields()) if model.extra else (DENSE, ())
    file = Model(model.config, params[:own], step, kind=kind, fields=fields, extra=params[own:])
    loop.save(args, model, file, *model.moments(), run)


def main(argv: list[str] | None = None) -> int:
    warnings.simplefilter("ignore", RuntimeWarning)  # of NumPy, for losses that overflow: reported below, once
    parser = arguments()
    typed = parser.explicit(argv)
    args, file, state = options.parse_options(parser, argv, "train_toroidal.py")
    torus = choose_torus(args, typed, file)
    config, B, T, grad_accum = file.config, args.batch_size, args.seq_len, args.grad_accum
    if args.train == "replaced" and not torus.layers and args.steps != 0:
        raise UserError(
            "--layers none with --train replaced: nothing learns", "add -n 0 to validate, or --train all", 2
        )
    if args.patience and not args.val_every:
        raise UserError(f"--patience {args.patience} with -v 0: there are no validations to count", "-v 20", 2)
    if state and args.train != (earlier := state.options.get("train", args.train)):
        hint = f"start anew from its weights: give -e {args.resume} in place of --resume"
        raise UserError(f"--resume with --train {args.train}: {args.resume} was made with --train {earlier}", hint, 2)
    device = kernels.open_device(args.device, args.tf32)

    run = loop.open_run(args, config, state, args.epochs)
    start, steps = run.start, run.steps

    if args.init == "random" and not state and torus.layers:
        replace_attention(file, torus.layers, args.seed or 42)
    extra = file.params[:0] if args.control else extra_init(device, file, torus, args.seed or 42)
    params = np.concatenate([file.params, extra])
    model = GPT2(device, config, torus, params, B, T, args.train, args.recompute, args.control)
    table.heading()
    print_torus(config, torus, model.num_trained, args)
    options.print_options(args)
    options.print_model(device.describe(), device.tf32, config)
    options.print_workload(steps, run.val_batches)
    print(f"allocated {params.nbytes >> 20} MiB for model parameters")
    if state:
        model.allocate_moments(state.m, state.v)
        print(f"Resuming from step {start} (shard {state.shard}, sample {state.sample})")
    schedule = dict(lr=args.lr, warmup=args.warmup, steps=steps, final_frac=args.final_lr_frac)
    adamw = dict(beta2=args.beta2, weight_decay=args.weight_decay, decay_all=args.decay_all, grad_clip=args.grad_clip)
    log = Logger(args.log, start)

    seconds, worse = 0.0, args.worse  # worse: validations since the best
    best = math.inf if args.best_loss is None else args.best_loss
    before = device.memory_used()
    with Interrupt() as interrupt:
        for step in range(start, steps + 1):
            last_step = step == steps
            # what a save keeps: without this step's validation, which the run that resumes it repeats
            args.best_loss, args.worse = None if best == math.inf else best, worse
            if interrupt.signal and not last_step:
                if args.checkpoint and step > start:
                    save(args, model, step, run)
                break
            if step == 0 or last_step or (args.val_every and step % args.val_every == 0):
                val_loss = loop.evaluate(model, run.val_loader, run.val_batches)
                loop.check_finite("val", val_loss, step, args)
                print(f"val loss {val_loss:f}\nperplexity {math.exp(min(val_loss, 700)):.4f}", flush=True)
                log.val(step, val_loss)
                best, worse = (val_loss, 0) if val_loss < best else (best, worse + 1)
                if args.patience and worse >= args.patience and not last_step:
                    print(f"early stop after {step} steps: {worse} validations without one below {best:f}")
                    last_step = True
            if step == start:
                print_memory(model, device.memory_used() - before)
            due = args.checkpoint_every and step % args.checkpoint_every == 0
            if args.checkpoint and step > start and (last_step or due):
                save(args, model, step, run)
            if args.sample_every and step > 0 and (last_step or step % args.sample_every == 0):
                loop.print_sample(model, run, args.sample_tokens)
            if last_step:
                break

            started = time.perf_counter()
            if args.overfit_batch:
                run.train_loader.reset()
            loss = 0.0
            for micro_step in range(grad_accum):
                model.forward(*run.train_loader.next_batch(), grad_accum)
                model.backward(first=micro_step == 0)
                loss += model.mean_loss() / grad_accum
            loop.check_finite("train", loss, step + 1, args)
            lr = learning_rate(args.lr_schedule, step, **schedule)
            norm = model.update(step + 1, lr, **adamw)
            device.synchronize()
            elapsed = time.perf_counter() - started
            seconds += elapsed
            rate = int(B * T * grad_accum / elapsed)
            print(f"step {step + 1:4d}/{steps}: train loss {loss:f} ({elapsed * 1000:f} ms, {rate} tok/s)", flush=True)
            if norm is not None:
                print(f"lr {lr:.2e}, gradient norm {norm:.4f}", flush=True)
            log.train(step, loss)
    log.close()

    if not last_step:
        loop.print_stopped(args, step, start)
        return interrupt.exit_code
    print(f"memory: {device.memory_used() >> 20} MiB")
    loop.print_finished(args, device, step - start, seconds)
    return interrupt.exit_code  # 0, but after a signal during the last step


def print_memory(model: GPT2, measured: int):
    """What is expected of forward passes, with --recompute also without; and what they took, if any has been run."""
    predicted, without = (model.activation_bytes(recompute) >> 20 for recompute in (model.recompute, False))
    saved = f" ({without} without --recompute)" if model.recompute else ""
    grew = f", memory grew by {measured >> 20} MiB" if model.layers else ""
    print(f"activations: {predicted} MiB predicted{saved}{grew}")


if __name__ == "__main__":
    errors.run(main)
