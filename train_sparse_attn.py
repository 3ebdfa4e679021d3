"""Train GPT-2, or a DeepSeek-style model, with sparse attention: lightning indexer, causal top-k, adaptive k, MLA, MoE.

    make train_sparse_attn                                       # dense, indexer warm-up, sparse (a few minutes, CPU)
    python train_sparse_attn.py -e model.bin --attention dense -n 1000 -c dense.bin
    python train_sparse_attn.py -e dense.bin --indexer-warmup 100 -n 500 --keep-ratio 0.125 -c sparse.bin

Reads top to bottom as train_gpt2_fp32.cu does: options, model (views, forward, backward, update), loop. What differs
from GPT-2 is which keys a query attends to. The indexer scores every earlier token s for the query at t,

    I[t,s] = c sum_j w[t,j] ReLU(q[t,j] . k[s])    (DeepSeek-V3.2, eq. 1)

and the query attends to the k best, S_t, alone. The indexer learns from attention, not from the language: its loss is
KL(p_t || softmax(I_t)), with p_t the mean of the heads' attention; p_t and the indexer's input are constants to it. In
the warm-up attention is dense and the indexer learns alone; after it S_t decides and both learn, each by its own loss.
"""

if __name__ == "__main__":
    from llmc import startup

    startup.begin()

import warnings
from argparse import Namespace
from types import SimpleNamespace

import kernels  # before NumPy, see its docstring  # isort: skip
import numpy as np

from kernels.cpu.gpt2.adamw import RATES, adamw_rates
from kernels.graph import Replay
from kernels.shares import Shares, share_rows
from llmc import errors, loop, options, table
from llmc.buffers import (
    all_but,
    allocate,
    first_of,
    flat_buffer,
    in_part,
    matrices_of,
    num_values,
    query_blocks,
    split,
    tell_allocated,
)
from llmc.checkpoint import DENSE, MATRICES, SPARSE_ATTENTION, GPT2Config, Model, num_parameters, tensor_shapes
from llmc.cli import ArgumentParser
from llmc.interrupt import Interrupt
from llmc.ranks import ALONE, Ranks, open_ranks
from llmc.schedulers import learning_rate
from systems.parts import AbsorbedLatents, Attention, Experts, Latents, NoIndexer, Part, Selection, UpstreamIndexer
from systems.selection import add_report_options, measure, report, rows_at_once
from systems.sparsity import (
    CONTROLLER,
    Sparsity,
    add_sparsity_options,
    check_architecture,
    choose_sparsity,
    extra_init,
    extra_shapes,
    is_mla,
    is_moe,
    print_sparsity,
)

# gradients that their product writes in the first micro-step; all others are added to, and start from 0
WRITTEN = ("qkvw", "attprojw", "fcw", "fcprojw")  # GPT-2
WRITTEN += ("qaw", "qbw", "kvaw", "kvbw", "routerw", "expertw", "expertprojw", "headw")  # DeepSeek
WRITTEN += ("idxqw", "idxkw", "idxww")  # indexer
SCRATCH = ("btc", "scores", "p", "dense_lse", "sums")  # activations that are one buffer for all layers
KEPT = ("residual3", "keep", "count", "index", "kl")  # with --recompute a layer has these alone for itself

# ----------------------------------------------------------------------------------------------------------------------
# options

EPILOG = """examples:
  python train_sparse_attn.py --attention dense -n 1000 -c dense.bin      the dense model first
  python train_sparse_attn.py -e dense.bin --indexer-warmup 100 -n 500    then the indexer alone, then both
  python train_sparse_attn.py -e dense.bin --selector recency --top-k 16  a sliding window, to compare
  python train_sparse_attn.py -e dense.bin --adaptive prefix --indexer-warmup 100 -n 500 -c sparse.bin
  python train_sparse_attn.py -e dsa.bin -i TRAIN.bin -j VAL.bin --layer-keep 1,0.5,0.75   create_model.py --preset dsa
  python train_sparse_attn.py --resume sparse.bin                         go on where a run stopped, with its settings

k counts the keys of a query, of itself and all before it. Exit status: 0 done, 1 error, 2 wrong usage, 130, 143."""


def arguments() -> ArgumentParser:
    parser = ArgumentParser(description=(__doc__ or "").partition("\n")[0], epilog=EPILOG)
    add_sparsity_options(parser)
    options.add_options(parser)
    add_report_options(parser)
    return parser


# ----------------------------------------------------------------------------------------------------------------------
# the parts of a layer that can be exchanged


class Heads(Attention):
    """Queries, keys and values of all heads by one product, as in GPT-2."""

    def forward(self, l: int, a, start: int = 0):
        """The rows from `start` of a.qkv (B,start+T,3C), from a.ln1 (N,C)."""
        p, new = self.params, a.qkv[:, start:]
        self.ops.matmul_forward(new.reshape(len(a.ln1), -1), a.ln1, p.qkvw[l], p.qkvb[l])

    def backward(self, l: int, a, d, g, beta: int):
        """d.btc (N,C), the gradient at a.ln1, from d.qkv (B,T,3C)."""
        dqkv = d.qkv.reshape(len(a.ln1), -1)
        self.ops.matmul_backward(d.btc, g.qkvw[l], g.qkvb[l], dqkv, a.ln1, self.params.qkvw[l], beta)


class MLP(Part):
    """GPT-2's: two layers with a GELU between."""

    gradients = ("fch",)

    def shapes(self, B: int, T: int) -> dict:
        return dict(fch=(B * T, 4 * self.config.C), fch_gelu=(B * T, 4 * self.config.C))

    def forward(self, l: int, a, again: bool = False):
        """a.residual3 (N,C), what is added to the stream, from a.ln2 (N,C); again: all but that."""
        ops, p = self.ops, self.params
        ops.matmul_forward(a.fch, a.ln2, p.fcw[l], p.fcb[l])
        ops.gelu_forward(a.fch_gelu, a.fch)
        if not again:
            ops.matmul_forward(a.residual3, a.fch_gelu, p.fcprojw[l], p.fcprojb[l])

    def backward(self, l: int, a, d, g, beta: int, balance: float):
        """d.btc (N,C), the gradient at a.ln2, from d.residual (N,C)."""
        ops, p = self.ops, self.params
        ops.matmul_backward(d.fch, g.fcprojw[l], g.fcprojb[l], d.residual, a.fch_gelu, p.fcprojw[l], beta)
        ops.gelu_backward(d.fch, a.fch, d.fch)
        ops.matmul_backward(d.btc, g.fcw[l], g.fcb[l], d.fch, a.ln2, p.fcw[l], beta)


class Lightning(Part):
    """DeepSeek's indexer: queries of several heads, one key a token for all of them, head weights from the token."""

    gradients = ("iq", "ik", "iw", "ik0")

    @property
    def scale(self) -> float:
        """c in I[t,s]"""
        return (self.sparsity.width * self.sparsity.heads) ** -0.5

    def kept(self) -> dict:
        return dict(ik=self.sparsity.width)

    def shapes(self, B: int, T: int) -> dict:
        heads, width = self.sparsity.heads, self.sparsity.width
        return dict(
            iq=(B, T, heads * width),  # queries
            iw=(B, T, heads),  # head weights
            ik0=(B * T, width),  # keys before their layernorm; after it a.ik (B,start+T,width)
            ik_mean=(B * T,),
            ik_rstd=(B * T,),
            kl=(B, T),  # the loss of a query
        )

    def forward(self, l: int, a, start: int = 0):
        """a.iq, a.iw and the rows from `start` of a.ik, from a.ln1 (N,C); with MLA a.iq comes from its query latent."""
        ops, p, s, N, ik = self.ops, self.params, self.sparsity, len(a.ln1), a.ik[:, start:]
        ops.matmul_forward(a.iq.reshape(N, -1), a.qn if self.mla else a.ln1, p.idxqw[l])
        ops.matmul_forward(a.ik0, a.ln1, p.idxkw[l])
        ops.layernorm_forward(ik.reshape(N, -1), a.ik_mean, a.ik_rstd, a.ik0, p.idxknw[l], p.idxknb[l])
        ops.matmul_forward(a.iw.reshape(N, -1), a.ln1, p.idxww[l])
        if s.rotated:
            ops.rope_forward(a.iq, s.heads, s.rotated, start)
            ops.rope_forward(ik, 1, s.rotated, start)

    def backward(self, l: int, a, d, g, beta: int):
        """The gradients of its tensors, from d.iq, d.ik and d.iw; none flows on into its input."""
        ops, p, s, N = self.ops, self.params, self.sparsity, len(a.ln1)
        if s.rotated:
            ops.rope_backward(d.iq, s.heads, s.rotated)
            ops.rope_backward(d.ik, 1, s.rotated)
        diq, dik, diw = d.iq.reshape(N, -1), d.ik.reshape(N, -1), d.iw.reshape(N, -1)
        ops.matmul_backward(None, g.idxww[l], None, diw, a.ln1, p.idxww[l], beta)
        ops.matmul_backward(None, g.idxqw[l], None, diq, a.qn if self.mla else a.ln1, p.idxqw[l], beta)
        d.ik0.fill(0)
        ops.layernorm_backward(d.ik0, g.idxknw[l], g.idxknb[l], dik, a.ik0, p.idxknw[l], a.ik_mean, a.ik_rstd)
        ops.matmul_backward(None, g.idxkw[l], None, d.ik0, a.ln1, p.idxkw[l], beta)


# ----------------------------------------------------------------------------------------------------------------------
# the model


class GPT2:
    """The model on a device: parameters, gradients, m and v are one flat float32 buffer each, with a view per tensor.

    The model's own parameters come first, then the indexer's and the controllers', which have a loss of their own.
    The phase is an argument. dense: queries attend to all keys, as in the indexer's warm-up, and always if that is what
    sparsity.attention says; draw: number of the random selector's draw.
    """

    def __init__(
        self,
        device,
        config: GPT2Config,
        sparsity: Sparsity,
        params: np.ndarray,
        B: int,
        T: int,
        balance: float = 0.01,
        recompute: bool = False,
        ranks: Ranks = ALONE,
    ):
        """params: all values, flat; B rows of T tokens; balance: weight of the experts' load-balance loss.

        recompute: of its activations a layer keeps its output and its selection, all others are one layer's, and
        backward runs the layer again.
        """
        self.ops, self.config, self.sparsity, self.B, self.T = device, config, sparsity, B, T
        self.balance, self.recompute, self.ranks = balance, recompute, ranks
        self.extra = extra_shapes(config, sparsity)
        self.shapes = tensor_shapes(config) | self.extra
        self.own = num_parameters(config)  # values of the model itself, in front
        self.params_flat, self.params = flat_buffer(device, self.shapes, params)
        self.part = ranks.part(self.params_flat.size)  # what this rank updates
        self.replay = Replay(device)  # on a GPU forward, backward and update become a CUDA graph each
        self.always_dense, self.mla = sparsity.attention == "dense", is_mla(config)
        self.tied = "headw" not in self.shapes  # GPT-2's head is wte, a DeepSeek-style model has its own
        self.written = (*WRITTEN, "wte") if self.tied else WRITTEN  # the head's product comes before the encoder's sum

        part = device, config, sparsity, self.params
        self.attention = Latents(*part) if self.mla else Heads(*part)
        absorbs = self.mla and sparsity.selector != "oracle"  # the oracle looks at whole keys
        self.decoding = AbsorbedLatents(*part) if absorbs else self.attention
        self.mlp = Experts(*part) if is_moe(config) else MLP(*part)
        kinds = dict(none=NoIndexer, lightning=Lightning, upstream=UpstreamIndexer)
        self.indexer = kinds[sparsity.indexer](*part)
        self.selection = Selection(*part, self.indexer, rows_at_once(device, B, config.maxT))
        self.parts = self.attention, self.mlp, self.indexer, self.selection
        self.scratch = SCRATCH + self.attention.scratch + self.mlp.scratch
        self.integers = self.mlp.integers + self.selection.integers
        self.acts = self.grads_flat = self.grads = self.dacts = self.m_flat = self.decoder = None  # until needed

    def layer_shapes(self, l: int, attention: Part, B: int, T: int, keys: int) -> dict:
        """Layer l's activations for B x T new tokens and so many keys, but for what is kept of every position."""
        N, C, NH = B * T, self.config.C, self.config.NH
        block = (B * max(min(self.selection.rows, T) * keys, T * min(max(self.sparsity.k), keys)),)
        shapes = dict(
            ln1=(N, C),
            ln1_mean=(N,),
            ln1_rstd=(N,),
            atty=(N, C),
            lse=(B, NH, T),  # log of the sum over a query's keys
            residual2=(N, C),  # behind attention
            ln2=(N, C),
            ln2_mean=(N,),
            ln2_rstd=(N,),
            residual3=(N, C),  # behind the MLP
            btc=(N, C),
            scores=block,  # (B,rows,keys) in blocks of queries, or (B,T,k) of the keys selected
            p=block,  # attention, the heads' mean
            dense_lse=(B, NH, T),  # lse if all keys were selected
        )
        parts = attention.shapes(B, T) | self.mlp.shapes(B, T) | self.indexer.shapes(B, T)
        return shapes | parts | self.selection.shapes_of(l, B, T, keys)

    def training_shapes(self, recompute: bool) -> tuple[list[dict], dict, dict]:
        """What forward keeps: of each layer, of all layers together, outside the layers."""
        c, B, T, N = self.config, self.B, self.T, self.B * self.T
        kept = {name: (B, T, channels) for name, channels in (self.attention.kept() | self.indexer.kept()).items()}
        layers = [self.layer_shapes(l, self.attention, B, T, T) | kept for l in range(c.L)]
        shared = (set(layers[0]) - set(KEPT)) if recompute else set(self.scratch)
        rest = dict(
            encoded=(N, c.C),
            lnf=(N, c.C),
            lnf_mean=(N,),
            lnf_rstd=(N,),
            logits=(N, c.Vp),
            losses=(N,),
        )
        return [split(layer, shared)[1] for layer in layers], split(layers[0], shared)[0], rest

    def activation_bytes(self, recompute: bool) -> int:
        """What forward keeps for backward, logits included."""
        layers, shared, rest = self.training_shapes(recompute)
        return 4 * sum(map(num_values, (*layers, shared, rest)))

    def allocate_activations(self) -> None:
        """The buffers of forward, at its first call."""
        tell_allocated(self.activation_bytes(self.recompute), "activations")
        layers, shared, rest = self.training_shapes(self.recompute)
        shared = vars(allocate(self.ops, shared, self.integers))
        self.layers = [SimpleNamespace(**vars(allocate(self.ops, own, self.integers)), **shared) for own in layers]
        for a in self.layers:
            a.seen = a.ln1.reshape(self.B, self.T, -1)
        self.acts = allocate(self.ops, rest)
        self.inputs = self.ops.zeros((self.B, self.T), np.int32)
        self.targets = self.ops.zeros(self.B * self.T, np.int32)

    def allocate_gradients(self) -> None:
        """The buffers of backward, at its first call."""
        ops, B, T, N, C, a = self.ops, self.B, self.T, self.B * self.T, self.config.C, vars(self.layers[0])
        tell_allocated(self.params_flat.nbytes, "parameter gradients")
        self.grads_flat, self.grads = flat_buffer(ops, self.shapes)
        self.added_to = all_but(self.written, self.grads_flat, self.shapes)
        shapes = dict(residual=(N, C), btc=(N, C))
        shapes |= {name: a[name].shape for part in self.parts for name in part.gradients}
        if self.sparsity.adaptive == "prefix":
            shapes |= dict(target=(B, T), ctl_losses=(B, T))  # keys that would have been enough; the controller's loss
        self.dacts = allocate(ops, shapes, ("target",))
        tell_allocated(4 * num_values(shapes), "activation gradients")

    def allocate_moments(self, m: np.ndarray | None = None, v: np.ndarray | None = None) -> None:
        """AdamW's m and v: a checkpoint's, or zeros."""
        size = self.part.stop - self.part.start
        for name in ("m", "v"):
            tell_allocated(4 * size, f"AdamW optimizer state {name}")
        self.m_flat, self.v_flat = (self.ops.zeros(size) if x is None else self.ops.to_device(x) for x in (m, v))
        self.rates, self.norm = self.ops.zeros((3, RATES)), self.ops.zeros(1)  # AdamW's, and of the gradient

    def head(self, views) -> tuple:
        """The output head's weight (Vp,C) and bias (Vp), which GPT-2 lacks, among the parameters or the gradients."""
        return (views.wte, None) if self.tied else (views.headw, views.headb)

    def forward(self, inputs, targets=None, grad_accum: int = 1, dense: bool = False, draw: int = 0) -> None:
        """inputs, targets (B,T) int32 -> logits; with targets, losses, which mean_loss fetches.

        With targets, the logits are overwritten by the gradient of loss / grad_accum, which backward starts from.
        """
        self.load(inputs, targets, draw)
        self.replay(self.launch_forward, targets is not None, grad_accum, dense or self.always_dense)
        if targets is not None:
            self.losses = self.ops.to_host_later(self.acts.losses)

    def load(self, inputs: np.ndarray, targets: np.ndarray | None, draw: int) -> None:
        """What launch_forward reads from the host."""
        if self.acts is None:
            self.allocate_activations()
        self.ops.copy_in(self.inputs, inputs)
        if targets is not None:
            self.ops.copy_in(self.targets, targets.ravel())
        self.selection.draw(draw)

    def launch_forward(self, has_targets: bool, grad_accum: int, dense: bool) -> None:
        """What forward does on the device."""
        ops, p, acts, N = self.ops, self.params, self.acts, self.B * self.T
        ops.encoder_forward(acts.encoded, self.inputs, p.wte, p.wpe)
        residual = acts.encoded  # (N,C)
        for l, a in enumerate(self.layers):
            self.layer(l, a, residual, self.attention, 0, dense, self.sparsity.leak)
            residual = a.residual3
        ops.layernorm_forward(acts.lnf, acts.lnf_mean, acts.lnf_rstd, residual, p.lnfw, p.lnfb)
        headw, headb = self.head(p)
        ops.matmul_forward(acts.logits, acts.lnf, headw, headb)  # (N,Vp)
        if has_targets:
            ops.fused_classifier(acts.losses, acts.logits, self.targets, self.config.V, 1 / (N * grad_accum))

    def layer(
        self, l: int, a, residual, attention: Attention, start: int, dense: bool, leak: bool, again: bool = False
    ) -> None:
        """Layer l over the rows `residual` (N,C) at positions start.. -> a, as layer_shapes lists it.

        again: its selection and a.residual3 are there.
        """
        ops, p = self.ops, self.params
        ops.layernorm_forward(a.ln1, a.ln1_mean, a.ln1_rstd, residual, p.ln1w[l], p.ln1b[l])
        attention.forward(l, a, start)
        if not dense and not again:
            self.indexer.forward(l, a, start)
            self.selection.forward(l, a, start, leak)
        attention.attend(l, a, start, dense)
        ops.matmul_forward(a.residual2, a.atty, p.attprojw[l], None if self.mla else p.attprojb[l])
        ops.fused_residual_forward(
            a.residual2, a.ln2, a.ln2_mean, a.ln2_rstd, a.residual2, residual, p.ln2w[l], p.ln2b[l]
        )
        self.mlp.forward(l, a, again)
        if not again:
            ops.residual_forward(a.residual3, a.residual3, a.residual2)

    def layer_again(self, l: int, dense: bool) -> None:
        """Run layer l of the last forward again, for the activations that layers share with --recompute."""
        self.layer(l, self.layers[l], self.residual(l), self.attention, 0, dense, self.sparsity.leak, again=True)

    def residual(self, l: int):
        """The residual stream (N,C) in front of layer l, for l = L behind the last."""
        return self.layers[l - 1].residual3 if l > 0 else self.acts.encoded

    def mean_loss(self) -> float:
        """The loss of the last forward with targets; waits for that, not for what was begun since."""
        return float(self.losses().mean())

    def mean_kl(self) -> float:
        """The indexer's loss, a mean over layers and queries, of the last backward that trained it."""
        return sum(float(kl().mean()) for kl in self.divergences) / self.config.L

    def backward(self, first=True, model=True, indexer=False, dense=False, grad_accum: int = 1, last=True) -> None:
        """Gradients of the last forward's loss; the `first` micro-step of an update starts them, later ones add.

        In the `last` one the model's own of a layer may begin to add up over ranks as soon as they are there.
        model: those of the language-model loss, at the model's own parameters; indexer: those of the indexer's KL.
        dense, grad_accum: as in that forward.
        """
        if self.grads_flat is None:
            self.allocate_gradients()
        begins = last and self.ranks.overlaps
        self.replay(self.launch_backward, first, model, indexer, dense or self.always_dense, grad_accum, begins)
        if indexer:
            self.divergences = [self.ops.to_host_later(a.kl) for a in self.layers]

    def launch_backward(
        self, first: bool, model: bool, indexer: bool, dense: bool, grad_accum: int, begins: bool
    ) -> None:
        """What backward does on the device."""
        ops, p, L, N = self.ops, self.params, self.config.L, self.B * self.T
        acts, g, d, beta = self.acts, self.grads, self.dacts, 0 if first else 1
        if first:
            for grads in self.added_to:
                grads.fill(0)
        if model:
            d.residual.fill(0)  # (N,C)
            (headw, _), (dheadw, dheadb) = self.head(p), self.head(g)
            ops.matmul_backward(d.btc, dheadw, dheadb, acts.logits, acts.lnf, headw, beta)
            residual = self.residual(L)
            ops.layernorm_backward(d.residual, g.lnfw, g.lnfb, d.btc, residual, p.lnfw, acts.lnf_mean, acts.lnf_rstd)
        for l in reversed(range(L)):
            again = self.recompute and l < L - 1  # the last layer's are still there
            if again:
                self.layer_again(l, dense)
            if indexer:
                if dense or again:
                    self.indexer.forward(l, self.layers[l])
                self.divergence(l, dense, learn=True, scale=1 / (N * grad_accum))
                self.indexer.backward(l, self.layers[l], d, g, beta)
            if model:
                self.layer_backward(l, beta, dense, self.balance / grad_accum)
                if begins:
                    ops.all_reduce_begin(self.grads_flat, matrices_of(l, g, self.config), self.ranks)
        if model:
            ops.encoder_backward(g.wte, g.wpe, d.residual, self.inputs)

    def layer_backward(self, l: int, beta: int, dense: bool, balance: float) -> None:
        """d.residual (N,C), the gradient in front of layer l from that behind it, and those of its parameters."""
        ops, p, g, d, a, residual = self.ops, self.params, self.grads, self.dacts, self.layers[l], self.residual(l)
        NH, dbias = self.config.NH, None if self.mla else self.grads.attprojb[l]
        self.mlp.backward(l, a, d, g, beta, balance)
        ops.layernorm_backward(d.residual, g.ln2w[l], g.ln2b[l], d.btc, a.residual2, p.ln2w[l], a.ln2_mean, a.ln2_rstd)
        ops.matmul_backward(d.btc, g.attprojw[l], dbias, d.residual, a.atty, p.attprojw[l], beta)
        if dense:
            ops.attention_backward(d.qkv, d.btc, a.qkv, a.atty, a.lse, NH)
        else:
            ops.sparse_attention_backward(d.qkv, d.btc, a.qkv, a.atty, a.lse, a.index, a.count, NH)
        self.attention.backward(l, a, d, g, beta)
        ops.layernorm_backward(d.residual, g.ln1w[l], g.ln1b[l], d.btc, residual, p.ln1w[l], a.ln1_mean, a.ln1_rstd)

    def divergence(self, l: int, dense: bool, learn: bool = False, scale: float = 0.0) -> None:
        """a.kl (B,T): KL(p || softmax(scores)) of each query, over all keys if attention is dense, else those selected.

        learn: also the gradients of scale * its sum at the indexer's queries, keys and head weights, into dacts.
        """
        if dense:
            return self.dense_divergence(l, learn, scale)
        ops, a, d, c = self.ops, self.layers[l], self.dacts, self.indexer.scale
        scores, p = (buffer[: a.index.size].reshape(a.index.shape) for buffer in (a.scores, a.p))
        ops.indexer_gathered_forward(scores, a.iq, a.ik, a.iw, a.index, a.count, c)
        ops.sparse_attention_mean(p, a.qkv, a.lse, a.index, a.count, self.config.NH)
        ops.fused_kl(a.kl, scores, p, scale)  # scores become their gradient
        if learn:
            ops.indexer_gathered_backward(d.iq, d.ik, d.iw, scores, a.iq, a.ik, a.iw, a.index, a.count, c)

    def dense_divergence(self, l: int, learn: bool, scale: float) -> None:
        """a.kl over all keys, a block of queries at a time; the prefix controller learns from the same blocks."""
        ops, a, d, g, B, T, c = self.ops, self.layers[l], self.dacts, self.grads, self.B, self.T, self.indexer.scale
        adapt = learn and self.sparsity.adaptive == "prefix"
        if adapt:
            ops.prefix_features(a.features, a.state, a.ln1.reshape(B, T, -1), self.config.maxT)
        if learn:
            d.ik.fill(0)
        for first, scores in query_blocks(a.scores, B, 0, T, self.selection.rows):
            p = a.p[: scores.size].reshape(scores.shape)
            ops.indexer_scores_forward(scores, a.iq, a.ik, a.iw, c, first)
            ops.attention_mean(p, a.qkv, a.lse, self.config.NH, first)
            if adapt:
                self.selection.prefix_keep(l, a, scores, first, 0)
                ops.mass_count(d.target, p, self.sparsity.coverage, first, 0, 0)
            ops.fused_kl(a.kl, scores, p, scale, first)
            if learn:
                ops.indexer_scores_backward(d.iq, d.ik, d.iw, scores, a.iq, a.ik, a.iw, c, first)
        if adapt:
            dw1, db1, dw2, db2, w2 = g.ctlw1[l], g.ctlb1[l], g.ctlw2[l], g.ctlb2[l], self.params.ctlw2[l]
            losses, kappa, hidden = d.ctl_losses, a.kappa, a.hidden
            ops.keep_controller_backward(losses, dw1, db1, dw2, db2, d.target, kappa, hidden, a.features, w2, scale)

    def update(
        self, t, lr, indexer_t, indexer_lr, dense=False, beta2=0.999, weight_decay=0.0, decay_all=True, grad_clip=0.0
    ) -> float | None:
        """AdamW update number t = 1, 2, ... of the model, indexer_t of the indexer; 0 leaves that part as it is.

        Returns the norm of the model's gradient if grad_clip > 0, else None; it limits the model's alone.
        """
        if self.m_flat is None:
            self.allocate_moments()
        groups = (t, lr, weight_decay, grad_clip), (t, lr, weight_decay if decay_all else 0.0, grad_clip)
        groups += ((indexer_t, indexer_lr, 0.0, 0.0),)  # the matrices, all else of the model, the indexer
        rates = [adamw_rates(max(t, 1), lr, 0.9, beta2, 1e-8, decay, clip) for t, lr, decay, clip in groups]
        self.ops.copy_in(self.rates, np.array(rates, self.rates.dtype))
        clips = bool(grad_clip and t)
        if clips and self.ranks.zero:
            self.gradient_norm()
        self.replay(self.launch_update, t > 0, indexer_t > 0, dense or self.always_dense, clips)
        self.ops.all_gather(self.params_flat, self.ranks)
        return float(self.ops.to_host(self.norm)[0]) if clips else None

    def gradient_norm(self) -> float:
        """The norm of the model's gradient, which update limits, over the parts of all ranks."""
        if self.m_flat is None:
            self.allocate_moments()
        own = slice(min(self.part.start, self.own), min(self.part.stop, self.own))
        self.ops.global_norm(self.norm, self.grads_flat[own])
        norm = self.ranks.norm(float(self.ops.to_host(self.norm)[0]))
        self.ops.copy_in(self.norm, np.array([norm], self.norm.dtype))
        return norm

    def launch_update(self, model: bool, indexer: bool, dense: bool, clips: bool) -> None:
        """What update does on the device."""
        ops, part, m, v = self.ops, self.part, self.m_flat, self.v_flat
        if clips and not self.ranks.zero:
            ops.global_norm(self.norm, self.grads_flat[: self.own])
        grads, updates = vars(self.grads), []  # all at once
        for name, param in vars(self.params).items():
            if name not in self.extra:
                row, learns = 0 if name in MATRICES else 1, model
            else:  # --adaptive prefix learns from dense attention alone, the upstream controller never
                row, learns = 2, indexer and (dense if name in CONTROLLER else name != "controller")
            updates.append((param, grads[name], row if learns else None))
        updates = in_part(updates, part, m, v)
        ops.adamw_update_all(self.params_flat, self.grads_flat[part], m, v, updates, self.rates, self.norm)

    def extend(self, tokens: np.ndarray, start: int, dense: bool = False) -> np.ndarray:
        """Logits (V) after `tokens` (n) int32 at positions start.., of which earlier calls ran 0..start-1.

        What is kept of every position: key and value, in MLA their common latent, and the indexer's key; of all: sums.
        """
        ops, p, n, dense = self.ops, self.params, len(tokens), dense or self.always_dense
        if self.decoder is None:
            self.allocate_decoder()
        if n > 1 and self.sparsity.adaptive == "upstream" and not dense:  # k of a token: from those up to it
            for i in range(n):
                logits = self.extend(tokens[i : i + 1], start + i)
            return logits
        decoder = self.decoder
        self.selection.draw(0)
        ops.copy_in(decoder.tokens[:, :n], tokens.reshape(1, n))
        residual = decoder.encoded[:n]  # (n,C)
        ops.encoder_forward(residual, decoder.tokens[:, :n], p.wte, p.wpe, start)
        for l in range(self.config.L):
            a = self.decoder_layer(l, n, start)
            self.layer(l, a, residual, self.decoding, start, dense, leak=False)  # there are no future keys
            residual = a.residual3
        last, (headw, headb) = residual[n - 1 :], self.head(p)
        ops.layernorm_forward(decoder.lnf, decoder.lnf_mean, decoder.lnf_rstd, last, p.lnfw, p.lnfb)
        ops.matmul_forward(decoder.logits, decoder.lnf, headw, headb)
        return ops.to_host(decoder.logits)[0, : self.config.V]

    def decoder_layer(self, l: int, n: int, start: int) -> SimpleNamespace:
        """Layer l's activations for n new tokens: rows that all layers share, and what is kept from call to call."""
        decoder, end = self.decoder, start + n
        layer = vars(first_of(decoder.rows, self.layer_shapes(l, self.decoding, 1, n, end)))
        layer |= {name: cache[l, :, :end] for name, cache in vars(decoder.kept).items()}  # (1,end,channels)
        layer |= {name: of_layers[l] for name, of_layers in vars(decoder.carried).items()}
        if self.sparsity.adaptive == "upstream":
            layer["ln1"] = layer["seen"][0, start:]
        return SimpleNamespace(**layer)

    def allocate_decoder(self):
        ops, c, s, maxT = self.ops, self.config, self.sparsity, self.config.maxT
        kept = self.decoding.kept() | self.indexer.kept() | (dict(seen=c.C) if s.adaptive == "upstream" else {})
        rows = self.layer_shapes(int(np.argmax(s.k)), self.decoding, 1, maxT, maxT)
        if is_moe(c):
            rows["tile_expert"] = rows["source"]  # fewer tokens have smaller tiles, and more of them
        self.decoder = allocate(ops, dict(
            encoded=(maxT, c.C),
            lnf=(1, c.C),
            lnf_mean=(1,),
            lnf_rstd=(1,),
            logits=(1, c.Vp),
        ))  # fmt: skip
        self.decoder.tokens = ops.zeros((1, maxT), np.int32)
        self.decoder.kept = allocate(ops, {name: (c.L, 1, maxT, channels) for name, channels in kept.items()})
        self.decoder.carried = allocate(ops, {name: (c.L, *rows[name]) for name in ("state", "sums") if name in rows})
        self.decoder.rows = allocate(ops, rows, self.integers)


# ----------------------------------------------------------------------------------------------------------------------
# the loop


def save(args: Namespace, batch: Shares, step: int, run: loop.Run, dense: bool):
    """Write the checkpoint, attention in its header, and the optimizer state for a run that goes on at `step`."""
    model = batch.models[0]
    s, host, own = model.sparsity, model.ops.to_host, model.own
    if s.indexer_has_loss:  # it may fail where the language's does not
        run.val_loader.reset()
        loop.check_finite("indexer's", sum(measure(batch, run.val_loader.next_batch()[0], dense)[0]), step, args)
    params = host(model.params_flat)
    plain = s.attention == "dense" and not model.extra
    kind, fields = (DENSE, ()) if plain else (SPARSE_ATTENTION, s.fields())
    file = Model(model.config, params[:own], step, kind=kind, fields=fields, extra=params[own:])
    loop.save(args, batch, file, host(model.m_flat), host(model.v_flat), run, dense=dense)


def main(argv: list[str] | None = None) -> int:
    warnings.simplefilter("ignore", RuntimeWarning)  # NumPy's, for losses that overflow: reported below, once
    ranks = open_ranks()
    args, typed, file, state = options.parse_options(arguments(), argv, "train_sparse_attn.py", ranks)
    check_architecture(args, file.config)
    sparsity = choose_sparsity(args, typed, file)
    config, B, T, grad_accum = file.config, args.batch_size, args.seq_len, args.grad_accum
    device = kernels.open_device(args.device, args.tf32, args.graph, ranks)
    run = loop.open_run(args, config, state, ranks)
    start, steps, warmup = run.start, run.steps, args.indexer_warmup
    batches = grad_accum * ranks.size  # of a step

    table.heading()
    print_sparsity(sparsity, T)
    options.print_options(args)
    options.print_model(device.describe(), device.tf32, config)
    options.print_workload(steps, run.val_batches, ranks)

    extra = extra_init(file, sparsity, args.model, args.seed or 1337)
    tell_allocated(file.params.nbytes + extra.nbytes, "model parameters")
    if extra.size:
        print(f"{extra.size} parameters of indexer and controller, {file.params.size + extra.size} in all")
    params = np.concatenate([file.params, extra])
    whole = is_moe(config) or sparsity.adaptive == "upstream"  # the experts' balance, or k, is the whole batch's
    rows = [B] if whole or ranks.size > 1 else share_rows(device, B, T, config.C, params.size)
    more = args.balance, args.recompute, ranks
    batch = Shares(device, rows, lambda device, B: GPT2(device, config, sparsity, params, B, T, *more))
    model = batch.models[0]
    learns = args.train_indexer and sparsity.indexer_has_loss
    if state:
        model.allocate_moments(state.m, state.v)
        print(f"Resuming from step {start} (shard {state.shard}, sample {state.sample})")
    schedule = dict(warmup=args.warmup, final_frac=args.final_lr_frac)
    adamw = dict(beta2=args.beta2, weight_decay=args.weight_decay, decay_all=args.decay_all, grad_clip=args.grad_clip)

    seconds, before = 0.0, device.memory_used()
    with Interrupt() as interrupt, run.watch(args, batch.memory_used):
        for step in range(start, steps + 1):
            last_step, warming_up = step == steps, step < warmup  # in the warm-up attention is dense
            if run.stops(interrupt) and not last_step:
                if args.checkpoint and step > start:
                    save(args, batch, step, run, warming_up)
                break
            if step == warmup > 0:
                print(f"indexer warmed up: from step {step + 1} attention is sparse and both learn", flush=True)
            if step == 0 or last_step or loop.due(args.val_every, step) or step == warmup > 0:
                loop.validate(batch, run, step, args, dense=warming_up)
                if sparsity.attention == "sparse" or args.answers_after:
                    report(batch, run, args, step, warming_up)
            if args.recompute and step == start:
                loop.print_memory(batch.models, device.memory_used() - before)
            if loop.saves(args, run, step, last_step):
                save(args, batch, step, run, warming_up)
            if args.sample_every and step > 0 and (last_step or loop.due(args.sample_every, step)):
                loop.print_sample(model, run, args.sample_tokens, dense=warming_up)
            if last_step:
                break

            started = loop.begin_step(args, run)
            loss = 0.0
            for micro_step in range(grad_accum):
                batch.forward(*run.train_loader.next_batch(), batches, dense=warming_up, draw=step + 1)
                phase = dict(dense=warming_up, grad_accum=batches, last=micro_step == grad_accum - 1)
                batch.backward(micro_step == 0, not warming_up, learns, **phase)
                loss += batch.mean_loss() / grad_accum
                if learns:
                    loop.check_finite("indexer's", batch.mean("mean_kl"), step + 1, args)
            loop.wait_for_all(args, device, run, started)
            device.all_reduce(model.grads_flat, ranks)
            loss = ranks.mean(loss)
            loop.check_finite("train", loss, step + 1, args)
            if warming_up:  # a schedule for each stage
                at, length, indexer_lr = step, warmup, args.indexer_lr
            else:
                at, length, indexer_lr = step - warmup, steps - warmup, args.indexer_lr_sparse
            lr = learning_rate(args.lr_schedule, at, lr=args.lr, steps=length, **schedule)
            indexer_lr = learning_rate(args.lr_schedule, at, lr=indexer_lr, steps=length, **schedule)
            model_t, indexer_t = 0 if warming_up else step + 1 - warmup, step + 1 if learns else 0
            norm = None
            if warming_up or not loop.spiked(args, run, loss, model.gradient_norm):
                norm = model.update(model_t, lr, indexer_t, indexer_lr, dense=warming_up, **adamw)
            seconds += loop.print_step(args, device, config, run, step, loss, started, lr, norm)

    loop.print_end(args, device, run, step, last_step, seconds)
    return interrupt.exit_code  # 0, but after a signal during the last step


if __name__ == "__main__":
    errors.run(main)
