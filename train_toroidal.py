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
import warnings
from argparse import Namespace
from types import SimpleNamespace
from typing import Any, NamedTuple

import kernels  # before NumPy, see its docstring  # isort: skip
import numpy as np

from kernels.cpu.gpt2.adamw import RATES, adamw_rates
from kernels.cpu.torus.fusion_matrix import FUSIONS
from kernels.cpu.torus.torus_rope import torus_frequencies
from kernels.graph import Replay
from kernels.shares import Shares, share_rows
from llmc import errors, loop, options, table
from llmc.buffers import all_but, allocate, first_of, flat_buffer, in_part, matrices_of, num_values, tell_allocated
from llmc.checkpoint import DENSE, MATRICES, TOROIDAL, GPT2Config, Model, named_views, num_parameters, tensor_shapes
from llmc.cli import ArgumentParser, natural, positive_int, refuse
from llmc.interrupt import Interrupt
from llmc.ranks import ALONE, Ranks, open_ranks
from llmc.schedulers import learning_rate
from systems.torus import (
    ATTENTION,
    Torus,
    add_flags,
    choose_torus,
    extra_init,
    extra_shapes,
    factor_shape,
    print_torus,
    replace_attention,
    trained_shapes,
)

# ----------------------------------------------------------------------------------------------------------------------
# options

EPILOG = """examples:
  python train_toroidal.py -e gpt2_124M.bin --layers 0,6 --depth 2 -n 200 -b 1 -t 256 --grad-accum 16 --grad-clip 1
  python train_toroidal.py -e baseline.bin --layers last:2 --depth 4 --lambda 4 --learn-lambda 1 -c toroidal.bin
  python train_toroidal.py -e baseline.bin --layers 0 --init random --train all --recompute 1
  python train_toroidal.py --resume toroidal.bin               go on where a run stopped, with its settings

--depth 1 --lambda 0 --rope none --fusion identity is GPT-2. -n 0 validates and trains nothing.
Exit status: 0 done, 1 error, 2 wrong usage, 130 after Ctrl-C, 143 after SIGTERM."""


def arguments() -> ArgumentParser:
    parser = ArgumentParser(description=(__doc__ or "").partition("\n")[0], epilog=EPILOG)
    add_flags(parser)
    add = parser.add_argument_group("training").add_argument
    add("--train", choices=("replaced", "all"), default="replaced", help="what learns: the replaced attention, or all")
    add("--epochs", type=positive_int, default=1, help="of the training data, if -n does not name the steps")
    add("--patience", type=natural, default=0, help="stop after so many validations without a better one, 0: never")
    options.add_options(parser)
    return parser


# ----------------------------------------------------------------------------------------------------------------------
# the model

# gradients that their product writes in the first micro-step; all others are added to, and start from 0
WRITTEN = ("wte", "qkvw", "attprojw", "fcw", "fcprojw")


def largest(layers: list[dict[str, tuple[int, ...]]]) -> dict[str, tuple[int, ...]]:
    """The largest shape of each name: buffers that one layer after another can use."""
    names = dict.fromkeys(name for shapes in layers for name in shapes)
    return {name: max((shapes[name] for shapes in layers if name in shapes), key=math.prod) for name in names}


class Ring(NamedTuple):
    """The ring of positions: how many there are, and the rotary embedding's frequencies w, f (hs/D/2), None without."""

    period: int
    w: Any
    f: Any


class GPT2:
    """The model on a device: one flat float32 buffer for all parameters; gradients, m and v for what learns.

    torus: the replaced layers, none in the control arm. learns: None for all parameters, or the layers whose attention
    learns, and with it lambda and fusion of the replaced layers. params: flat, GPT-2's 16 tensors, then `extra_shapes`.
    recompute: all layers share one layer's activations, each keeps its output alone, and backward runs it again.
    """

    def __init__(
        self,
        device,
        config: GPT2Config,
        torus: Torus,
        params: np.ndarray,
        B: int,
        T: int,
        learns: tuple[int, ...] | None = None,
        recompute: bool = False,
        ranks: Ranks = ALONE,
    ):
        self.ops, self.config, self.torus, self.B, self.T = device, config, torus, B, T
        self.learns, self.recompute, self.ranks = learns, recompute, ranks
        self.lowest = 0 if learns is None else min(learns, default=config.L)  # the last layer that backward visits
        self.shapes = tensor_shapes(config) | extra_shapes(config, torus)
        self.trained = trained_shapes(config, torus, learns)
        self.num_trained = num_values(self.trained)
        self.params_flat, self.params = flat_buffer(device, self.shapes, params)
        self.part = ranks.part(self.num_trained)  # what this rank updates
        self.replay = Replay(device)  # on a GPU forward, backward and update become a CUDA graph each
        self.fusion, self.has_factors = FUSIONS.index(torus.fusion), factor_shape(torus) is not None
        self.omega = device.zeros((len(torus.layers), torus.depth, torus.depth))  # mix the platters of a layer
        self.causal, self.wrap_depth = int(torus.causal), int(torus.wrap_depth)  # ints, for the ops
        self.depth_major = 1 - self.causal  # order of channels behind the fusion: published, else GPT-2's
        self.ring = self._ring(torus.period if torus.causal else T)
        self.acts = self.layers = self.grads_flat = self.m_flat = self.v_flat = self.decoder = None
        self.text = []  # tokens that extend has seen, for a ring as long as the text

    def _ring(self, period: int) -> Ring:
        """A ring of so many positions, with the frequencies of --rope where a layer is replaced."""
        s = self.torus
        if s.rope == "none" or not s.layers:
            return Ring(period, None, None)
        w, f = torus_frequencies(s.rope, self.config.C // self.config.NH // s.depth, s.depth, period)
        dtype = self.params_flat.dtype
        return Ring(period, self.ops.to_device(w.astype(dtype)), self.ops.to_device(f.astype(dtype)))

    def layer_shapes(self, l: int, B: int, T: int, start: int = 0) -> dict[str, tuple[int, ...]]:
        """The activations of layer l in a pass over B rows of T tokens behind `start` earlier ones, but its output."""
        C, NH, D, N = self.config.C, self.config.NH, self.torus.depth, B * T
        shapes = {
            "ln1": (N, C),
            "ln1_mean": (N,),
            "ln1_rstd": (N,),
            "qkv": (B, start + T, 3 * C),  # a decoder's old rows, too
            "atty": (N, C),
            "lse": (B, NH, T),  # log of the sum of exp(score) over a query's keys
            "residual2": (N, C),  # behind attention
            "ln2": (N, C),
            "ln2_mean": (N,),
            "ln2_rstd": (N,),
            "fch": (N, 4 * C),
            "fch_gelu": (N, 4 * C),
        }
        if l in self.torus.layers:
            shapes["lse"] = (B, NH, T, D)
            shapes["platters"] = (N, C)  # toroidal attention's output; atty is what the fusion makes of it
        return shapes

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """The activations outside the layers, and the layers' outputs."""
        L, C, Vp, N = self.config.L, self.config.C, self.config.Vp, self.B * self.T
        return {
            "encoded": (N, C),
            "residual3": (L, N, C),  # behind the MLP of each layer
            "lnf": (N, C),
            "lnf_mean": (N,),
            "lnf_rstd": (N,),
            "logits": (N, Vp),
            "losses": (N,),
        }

    def activation_bytes(self, recompute: bool) -> int:
        """What forward keeps for backward, logits included."""
        layers = [self.layer_shapes(l, self.B, self.T) for l in range(self.config.L)]
        sizes = [num_values(shapes) for shapes in layers]
        return 4 * (num_values(self._shapes()) + (max(sizes) if recompute else sum(sizes)))

    def allocate_activations(self) -> None:
        """The buffers of forward, at its first call."""
        B, T = self.B, self.T
        shapes = [self.layer_shapes(l, B, T) for l in range(self.config.L)]
        if self.recompute:
            shared = allocate(self.ops, largest(shapes))
            self.layers = [first_of(shared, of_layer) for of_layer in shapes]
        else:
            self.layers = [allocate(self.ops, of_layer) for of_layer in shapes]
        self.acts = allocate(self.ops, self._shapes())
        self.inputs, self.targets = self.ops.zeros((B, T), np.int32), self.ops.zeros(B * T, np.int32)
        tell_allocated(self.activation_bytes(self.recompute), "activations")

    def forward(self, inputs: np.ndarray, targets: np.ndarray | None = None, grad_accum: int = 1) -> None:
        """inputs, targets (B,T) int32 -> logits; with targets, losses, which mean_loss fetches.

        With targets, the logits are overwritten by the gradient of loss / grad_accum, which backward starts from.
        """
        if self.acts is None:
            self.allocate_activations()
        self.ops.copy_in(self.inputs, inputs)
        if targets is not None:
            self.ops.copy_in(self.targets, targets.ravel())
        self.replay(self.launch_forward, targets is not None, grad_accum)
        if targets is not None:
            self.losses = self.ops.to_host_later(self.acts.losses)

    def launch_forward(self, has_targets: bool, grad_accum: int) -> None:
        """What forward does on the device."""
        ops, p, acts, L, N = self.ops, self.params, self.acts, self.config.L, self.B * self.T
        ops.encoder_forward(acts.encoded, self.inputs, p.wte, p.wpe)
        self._fusion_matrices()
        for l in range(L):
            self.layer(l, self.layers[l], acts.residual3[l], self._residual(l), self.ring, 0)
        ops.layernorm_forward(acts.lnf, acts.lnf_mean, acts.lnf_rstd, self._residual(L), p.lnfw, p.lnfb)
        ops.matmul_forward(acts.logits, acts.lnf, p.wte)  # (N,Vp)
        if has_targets:
            ops.fused_classifier(acts.losses, acts.logits, self.targets, self.config.V, 1 / (N * grad_accum))

    def mean_loss(self) -> float:
        """The loss of the last forward with targets; waits for that, not for what was begun since."""
        return float(self.losses().mean())

    def _residual(self, l: int):
        """The residual stream (N,C) in front of layer l, for l = L the last."""
        return self.acts.residual3[l - 1] if l else self.acts.encoded

    def _fusion_matrices(self) -> None:
        """omega (D,D) of each replaced layer, from its factors if the fusion has any."""
        p = self.params
        for i in range(len(self.torus.layers)):
            first, second = (p.fuse1[i], p.fuse2[i]) if self.has_factors else (None, None)
            self.ops.fusion_matrix_forward(self.omega[i], first, second, self.fusion)

    def layer(self, l: int, a: SimpleNamespace, out, residual, ring: Ring, start: int) -> None:
        """Layer l at positions start..start+T-1: out (N,C) from residual (N,C), N = B*T; other activations to a.

        out may be residual, or None if it is there already. a.qkv (B,start+T,3C) holds queries, keys and values of the
        positions before start.
        """
        ops, p, s, NH, D = self.ops, self.params, self.torus, self.config.NH, self.torus.depth
        N, C = residual.shape
        ops.layernorm_forward(a.ln1, a.ln1_mean, a.ln1_rstd, residual, p.ln1w[l], p.ln1b[l])
        qkv = a.qkv[:, start:]  # (B,T,3C)
        ops.matmul_forward(qkv.reshape(N, 3 * C), a.ln1, p.qkvw[l], p.qkvb[l])
        if l in s.layers:
            i = s.layers.index(l)
            if ring.w is not None:
                ops.torus_rope_forward(qkv, ring.w, ring.f, NH, D, ring.period, start)
            lams, lamd, wrap = p.lams[i], p.lamd[i], self.wrap_depth  # (NH), (NH), 0 or 1
            ops.torus_attention_forward(
                a.platters, a.lse, a.qkv, lams, lamd, NH, D, ring.period, s.window, wrap, self.causal, start
            )
            ops.depth_fusion_forward(a.atty, a.platters, self.omega[i], NH, self.depth_major)
        else:
            ops.attention_forward(a.atty, a.lse, a.qkv, NH, start)
        ops.matmul_forward(a.residual2, a.atty, p.attprojw[l], p.attprojb[l])
        ops.fused_residual_forward(
            a.residual2, a.ln2, a.ln2_mean, a.ln2_rstd, a.residual2, residual, p.ln2w[l], p.ln2b[l]
        )
        ops.matmul_forward(a.fch, a.ln2, p.fcw[l], p.fcb[l])
        ops.gelu_forward(a.fch_gelu, a.fch)
        if out is not None:
            ops.matmul_forward(out, a.fch_gelu, p.fcprojw[l], p.fcprojb[l])
            ops.residual_forward(out, out, a.residual2)

    def allocate_gradients(self) -> None:
        """Gradients of what learns, of activations, and dparams: for each tensor of GPT-2 where its gradient goes.

        A tensor that does not learn has None there; a layernorm's, which its op computes anyway, go to normw and normb.
        """
        B, T, C, L, D = self.B, self.T, self.config.C, self.config.L, self.torus.depth
        N = B * T
        tell_allocated(4 * self.num_trained, "parameter gradients")
        self.grads_flat, self.grads = flat_buffer(self.ops, self.trained)
        self.added_to = all_but(WRITTEN, self.grads_flat, self.trained)
        shapes = {"residual": (N, C), "btc": (N, C), "qkv": (B, T, 3 * C), "bt4c": (N, 4 * C)}
        self.dacts = d = allocate(self.ops, shapes | {"omega": (D, D), "normw": (C,), "normb": (C,)})
        if self.learns is None:
            self.dparams = self.grads
            return
        attention = {name: [None] * L for name in ATTENTION}
        for name, by_layer in attention.items():
            for i, l in enumerate(self.learns):
                by_layer[l] = vars(self.grads)[name][i]
        mlp = dict.fromkeys(("fcw", "fcb", "fcprojw", "fcprojb"), [None] * L)
        norms = {"ln1w": [d.normw] * L, "ln1b": [d.normb] * L, "ln2w": [d.normw] * L, "ln2b": [d.normb] * L}
        self.dparams = SimpleNamespace(wte=None, **attention, **mlp, **norms, lnfw=d.normw, lnfb=d.normb)

    def backward(self, first: bool = True, last: bool = True) -> None:
        """Gradients of the last forward's loss; the `first` micro-step of an update starts them, later ones add.

        In the `last` one those of a layer may begin to add up over ranks as soon as they are there, where all learns.
        Nothing is computed below the lowest layer that learns.
        """
        if self.grads_flat is None:
            self.allocate_gradients()
        self.replay(self.launch_backward, first, last and self.ranks.overlaps and self.learns is None)

    def launch_backward(self, first: bool, begins: bool) -> None:
        """What backward does on the device."""
        ops, p, acts, L, NH = self.ops, self.params, self.acts, self.config.L, self.config.NH
        g, d, beta = self.dparams, self.dacts, 0 if first else 1
        if first:
            for grads in self.added_to:
                grads.fill(0)
        d.residual.fill(0)  # (N,C)
        dqkv = d.qkv.reshape(self.B * self.T, -1)  # (N,3C)

        ops.matmul_backward(d.btc, g.wte, None, acts.logits, acts.lnf, p.wte, beta)
        residual = self._residual(L)
        ops.layernorm_backward(d.residual, g.lnfw, g.lnfb, d.btc, residual, p.lnfw, acts.lnf_mean, acts.lnf_rstd)
        for l in reversed(range(self.lowest, L)):
            a, residual = self.layers[l], self._residual(l)
            if self.recompute and l < L - 1:  # the last layer's are still there
                self.layer(l, a, None, residual, self.ring, 0)
            ops.matmul_backward(d.bt4c, g.fcprojw[l], g.fcprojb[l], d.residual, a.fch_gelu, p.fcprojw[l], beta)
            ops.gelu_backward(d.bt4c, a.fch, d.bt4c)
            ops.matmul_backward(d.btc, g.fcw[l], g.fcb[l], d.bt4c, a.ln2, p.fcw[l], beta)
            ops.layernorm_backward(
                d.residual, g.ln2w[l], g.ln2b[l], d.btc, a.residual2, p.ln2w[l], a.ln2_mean, a.ln2_rstd
            )
            ops.matmul_backward(d.btc, g.attprojw[l], g.attprojb[l], d.residual, a.atty, p.attprojw[l], beta)
            if l in self.torus.layers:
                self._torus_backward(l, a)
            else:
                ops.attention_backward(d.qkv, d.btc, a.qkv, a.atty, a.lse, NH)
            if self.learns is not None and l == self.lowest:  # nothing in front of its attention learns
                ops.matmul_backward(None, g.qkvw[l], g.qkvb[l], dqkv, a.ln1, p.qkvw[l], beta)
                return
            ops.matmul_backward(d.btc, g.qkvw[l], g.qkvb[l], dqkv, a.ln1, p.qkvw[l], beta)
            ops.layernorm_backward(d.residual, g.ln1w[l], g.ln1b[l], d.btc, residual, p.ln1w[l], a.ln1_mean, a.ln1_rstd)
            if begins:
                ops.all_reduce_begin(self.grads_flat, matrices_of(l, g, self.config), self.ranks)
        if self.learns is None:
            ops.encoder_backward(g.wte, g.wpe, d.residual, self.inputs)

    def _torus_backward(self, l: int, a: SimpleNamespace) -> None:
        """d.qkv from d.btc, the gradient behind the fusion; and the gradients of the fusion's factors and of lambda."""
        ops, p, g, d, s, ring = self.ops, self.params, self.grads, self.dacts, self.torus, self.ring
        NH, D, P, window, wrap, causal = self.config.NH, s.depth, ring.period, s.window, self.wrap_depth, self.causal
        i = s.layers.index(l)
        omega, lams, lamd = self.omega[i], p.lams[i], p.lamd[i]
        dplatters = a.atty  # a buffer that is free: the projection's matmul_backward was the last to read it
        d.omega.fill(0)
        domega = d.omega if self.has_factors else None
        ops.depth_fusion_backward(dplatters, domega, d.btc, a.platters, omega, NH, self.depth_major)
        if self.has_factors:
            ops.fusion_matrix_backward(g.fuse1[i], g.fuse2[i], domega, omega, p.fuse1[i], p.fuse2[i], self.fusion)
        dlams, dlamd = (g.lams[i], g.lamd[i]) if s.learn_lambda else (None, None)
        ops.torus_attention_backward(
            d.qkv, dlams, dlamd, dplatters, a.qkv, a.platters, a.lse, lams, lamd, NH, D, P, window, wrap, causal
        )
        if ring.w is not None:
            ops.torus_rope_backward(d.qkv, ring.w, ring.f, NH, D, P)

    def update(self, t, lr, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, decay_all=True, grad_clip=0.0):
        """AdamW update number t = 1, 2, ... of what learns; returns the gradient norm if grad_clip > 0, else None."""
        if self.m_flat is None:
            self.allocate_moments()
        decays = weight_decay, weight_decay if decay_all else 0.0  # of the matrices, of all other tensors
        rates = [adamw_rates(t, lr, beta1, beta2, eps, decay, grad_clip) for decay in decays]
        self.ops.copy_in(self.rates, np.array(rates, self.rates.dtype))
        if grad_clip and self.ranks.zero:
            self.gradient_norm()
        self.replay(self.launch_update, grad_clip > 0)
        self.ops.all_gather(self.params_flat, self.ranks)
        return float(self.ops.to_host(self.norm)[0]) if grad_clip else None

    def gradient_norm(self) -> float:
        """The norm of the gradient, which update limits, over the parts of all ranks."""
        if self.m_flat is None:
            self.allocate_moments()
        self.ops.global_norm(self.norm, self.grads_flat[self.part])
        norm = self.ranks.norm(float(self.ops.to_host(self.norm)[0]))
        self.ops.copy_in(self.norm, np.array([norm], self.norm.dtype))
        return norm

    def launch_update(self, clips: bool) -> None:
        """What update does on the device."""
        ops, part, m, v = self.ops, self.part, self.m_flat, self.v_flat
        if clips and not self.ranks.zero:
            ops.global_norm(self.norm, self.grads_flat)
        updates = []  # all at once
        for name in self.trained:
            p, g, row = vars(self.params)[name], vars(self.grads)[name], 0 if name in MATRICES else 1
            if self.learns is None or name not in ATTENTION:
                updates.append((p, g, row))
            else:
                updates += [(p[l], g[i], row) for i, l in enumerate(self.learns)]
        updates = in_part(updates, part, m, v)
        ops.adamw_update_all(self.params_flat, self.grads_flat[part], m, v, updates, self.rates, self.norm)

    def allocate_moments(self, m: np.ndarray | None = None, v: np.ndarray | None = None) -> None:
        """AdamW's m and v: zeros, or a checkpoint's, which keeps them for all parameters."""
        size = self.part.stop - self.part.start
        for name in ("m", "v"):
            tell_allocated(4 * size, f"AdamW optimizer state {name}")
        if m is not None and not self.ranks.zero:  # with ZeRO all learns
            m, v = self._of_what_learns(m), self._of_what_learns(v)
        self.m_flat, self.v_flat = (self.ops.zeros(size) if x is None else self.ops.to_device(x) for x in (m, v))
        self.rates, self.norm = self.ops.zeros((2, RATES)), self.ops.zeros(1)  # AdamW's, and of the gradient

    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """m and v of all parameters on the host, 0 for what does not learn; with ZeRO those of this rank's part."""
        if self.ranks.zero:
            return self.ops.to_host(self.m_flat), self.ops.to_host(self.v_flat)
        return self._of_all(self.ops.to_host(self.m_flat)), self._of_all(self.ops.to_host(self.v_flat))

    def _rows(self, name: str) -> slice | list[int]:
        """The layers of a tensor that learn."""
        return slice(None) if self.learns is None or name not in ATTENTION else list(self.learns)

    def _of_what_learns(self, values: np.ndarray) -> np.ndarray:
        """Flat values of all parameters -> those of what learns."""
        tensors = named_views(values, self.shapes)
        return np.concatenate([tensors[name][self._rows(name)].ravel() for name in self.trained])

    def _of_all(self, values: np.ndarray) -> np.ndarray:
        """Flat values of what learns -> those of all parameters, 0 for the rest."""
        flat = np.zeros(num_values(self.shapes), np.float32)
        tensors = named_views(flat, self.shapes)
        for name, tensor in named_views(values, self.trained).items():
            tensors[name][self._rows(name)] = tensor
        return flat

    def allocate_decoder(self) -> None:
        """Buffers for a text of all positions; queries, keys and values by layer, all other activations shared."""
        C, Vp, L, maxT = self.config.C, self.config.Vp, self.config.L, self.config.maxT
        shapes = largest([self.layer_shapes(l, 1, maxT) for l in range(L)])
        qkv = shapes.pop("qkv")
        shared = vars(allocate(self.ops, shapes))
        once = {"encoded": (maxT, C), "lnf": (1, C), "lnf_mean": (1,), "lnf_rstd": (1,), "logits": (1, Vp)}
        self.decoder = allocate(self.ops, once | {"tokens": (1, maxT)}, ("tokens",))
        self.decoder_layers = [SimpleNamespace(**shared, qkv=self.ops.zeros(qkv)) for _ in range(L)]

    def extend(self, tokens: np.ndarray, start: int) -> np.ndarray:
        """Logits (V) after `tokens` (n) int32 at positions start.., of which earlier calls ran 0..start-1.

        Keys and values are kept, a toroidal layer's rotated: T*D sub-tokens in the room of T tokens. As published, the
        ring is as long as the text: then all of it has to run again.
        """
        ring = self.ring
        if self.torus.layers and not self.torus.causal:
            self.text = [*self.text[:start], *tokens.tolist()]
            tokens, start, ring = np.array(self.text, np.int32), 0, self._ring(len(self.text))
        if self.decoder is None:
            self.allocate_decoder()
        ops, p, d, n = self.ops, self.params, self.decoder, len(tokens)
        if start == 0:
            self._fusion_matrices()  # an update may have changed the factors
        ops.copy_in(d.tokens[:, :n], tokens.reshape(1, n))
        residual = d.encoded[:n]
        ops.encoder_forward(residual, d.tokens[:, :n], p.wte, p.wpe, start)
        for l in range(self.config.L):
            a = first_of(self.decoder_layers[l], self.layer_shapes(l, 1, n, start))
            self.layer(l, a, residual, residual, ring, start)
        ops.layernorm_forward(d.lnf, d.lnf_mean, d.lnf_rstd, residual[n - 1 :], p.lnfw, p.lnfb)
        ops.matmul_forward(d.logits, d.lnf, p.wte)
        return ops.to_host(d.logits)[0, : self.config.V]


# ----------------------------------------------------------------------------------------------------------------------
# the loop


def save(args: Namespace, batch: Shares, step: int, run: loop.Run, extra: dict) -> None:
    """Write the checkpoint, replaced layers in its header, and the optimizer state for a run that goes on at `step`."""
    model = batch.models[0]
    params, own = model.ops.to_host(model.params_flat), num_parameters(model.config)
    kind, fields = (TOROIDAL, model.torus.fields()) if model.torus.layers else (DENSE, ())
    file = Model(model.config, params[:own], step, kind=kind, fields=fields, extra=params[own:])
    m, v = model.moments()
    loop.save(args, batch, file, m, v, run, extra)


def main(argv: list[str] | None = None) -> int:
    warnings.simplefilter("ignore", RuntimeWarning)  # NumPy's, for losses that overflow: reported below, once
    ranks = open_ranks()
    args, typed, file, state = options.parse_options(arguments(), argv, "train_toroidal.py", ranks)
    torus = choose_torus(args, typed, file)
    config, B, T, grad_accum = file.config, args.batch_size, args.seq_len, args.grad_accum
    earlier = state.options.get("train", args.train) if state else args.train
    idle = args.train == "replaced" and not torus.layers and args.steps != 0
    uncounted = args.patience and not args.val_every
    anew = f"start anew from its weights: give -e {args.resume} in place of --resume"
    found = f"--resume with --train {args.train}: {args.resume} was made with --train {earlier}"
    refuse(
        (
            (idle, "--layers none with --train replaced: nothing learns", "add -n 0 to validate, or --train all"),
            (uncounted, f"--patience {args.patience} with -v 0: there are no validations to count", "-v 20"),
            (args.train != earlier, found, anew),
            (args.zero and args.train == "replaced", "--zero 1 with --train replaced: m and v are few", "--zero 0"),
        )
    )
    best, worse = loop.best_so_far(args, state)  # worse: validations since the best
    device = kernels.open_device(args.device, args.tf32, args.graph, ranks)
    run = loop.open_run(args, config, state, ranks, args.epochs)
    start, steps = run.start, run.steps

    if args.init == "random" and not state and torus.layers:
        replace_attention(file, torus.layers, args.seed or 42)
    learns = None if args.train == "all" else torus.layers
    replaced = Torus() if args.control else torus
    params = np.concatenate([file.params, extra_init(file, replaced, args.seed or 42)])
    rows = [B] if ranks.size > 1 else share_rows(device, B, T, config.C, params.size)
    more = learns, args.recompute, ranks
    batch = Shares(device, rows, lambda device, B: GPT2(device, config, replaced, params, B, T, *more))
    model = batch.models[0]
    table.heading()
    print_torus(config, torus, model.num_trained, args)
    options.print_options(args)
    options.print_model(device.describe(), device.tf32, config)
    options.print_workload(steps, run.val_batches, ranks)
    tell_allocated(params.nbytes, "model parameters")
    if state:
        model.allocate_moments(state.m, state.v)
        print(f"Resuming from step {start} (shard {state.shard}, sample {state.sample})")
    schedule = dict(lr=args.lr, warmup=args.warmup, steps=steps, final_frac=args.final_lr_frac)
    adamw = dict(beta2=args.beta2, weight_decay=args.weight_decay, decay_all=args.decay_all, grad_clip=args.grad_clip)

    seconds = 0.0
    before = device.memory_used()
    with Interrupt() as interrupt, run.watch(args, batch.memory_used):
        for step in range(start, steps + 1):
            last_step = step == steps
            extra = {"best_loss": best, "worse": worse}  # without this step's validation, which a resumed run repeats
            if run.stops(interrupt) and not last_step:
                if args.checkpoint and step > start:
                    save(args, batch, step, run, extra)
                break
            if step == 0 or last_step or loop.due(args.val_every, step):
                val_loss = loop.validate(batch, run, step, args)
                print(f"perplexity {math.exp(min(val_loss, 700)):.4f}", flush=True)
                best, worse = (val_loss, 0) if best is None or val_loss < best else (best, worse + 1)
                if args.patience and worse >= args.patience and not last_step:
                    print(f"early stop after {step} steps: {worse} validations without one below {best:f}")
                    last_step = True
            if step == start:
                loop.print_memory(batch.models, device.memory_used() - before)
            if loop.saves(args, run, step, last_step):
                save(args, batch, step, run, extra)
            if args.sample_every and step > 0 and (last_step or loop.due(args.sample_every, step)):
                loop.print_sample(model, run, args.sample_tokens)
            if last_step:
                break

            started = loop.begin_step(args, run)
            loss = 0.0
            for micro_step in range(grad_accum):
                batch.forward(*run.train_loader.next_batch(), grad_accum * ranks.size)
                batch.backward(first=micro_step == 0, last=micro_step == grad_accum - 1)
                loss += batch.mean_loss() / grad_accum
            loop.wait_for_all(args, device, run, started)
            device.all_reduce(model.grads_flat, ranks)
            loss = ranks.mean(loss)
            loop.check_finite("train", loss, step + 1, args)
            lr = learning_rate(args.lr_schedule, step, **schedule)
            skips = loop.spiked(args, run, loss, model.gradient_norm)
            norm = None if skips else model.update(step + 1, lr, **adamw)
            seconds += loop.print_step(args, device, config, run, step, loss, started, lr, norm)

    if last_step:
        print(f"memory: {batch.memory_used() >> 20} MiB")
    loop.print_end(args, device, run, step, last_step, seconds)
    return interrupt.exit_code  # 0, but after a signal during the last step


if __name__ == "__main__":
    errors.run(main)
