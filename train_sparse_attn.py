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

import math
import time
import warnings
from argparse import Namespace
from types import SimpleNamespace

import kernels  # before NumPy, see its docstring  # isort: skip
import numpy as np

from kernels.cpu.deepseek.expert_plan import expert_rows
from kernels.cpu.sparse.keep_controller import keep_controller_init
from kernels.cpu.sparse.upstream_controller import upstream_controller_init
from llmc import errors, loop, options, table
from llmc.checkpoint import (
    DENSE,
    MATRICES,
    SPARSE_ATTENTION,
    GPT2Config,
    Model,
    named_views,
    num_parameters,
    tensor_shapes,
)
from llmc.cli import ArgumentParser, flag01, natural, natural_float, positive_float, positive_int
from llmc.interrupt import Interrupt
from llmc.logger import Logger
from llmc.rand import normals
from llmc.schedulers import learning_rate
from systems.selection import Agreement, report
from systems.sparsity import (
    ADAPTIVE,
    ATTENTION,
    FEATURES,
    HIDDEN,
    INDEXERS,
    SELECTORS,
    Sparsity,
    check_architecture,
    choose_sparsity,
    coverage,
    extra_shapes,
    ids,
    is_mla,
    print_sparsity,
    read_sparsity,
    share,
)

ROWS = 128  # queries whose scores are in memory at a time: ROWS x T of them, never T x T

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
    add = parser.add_argument_group("attention (defaults: the -e file's, if it is sparse)").add_argument
    add("--attention", choices=ATTENTION, default="sparse", help="dense: all keys, as GPT-2")
    add("--selector", choices=SELECTORS, default="indexer", help="what chooses the keys: " + ", ".join(SELECTORS))
    add("--top-k", type=positive_int, help="keys of a query, at most (default: --keep-ratio's)")
    add("--keep-ratio", type=share, help="the same in parts of -t (default: 0.125; with top-p and --adaptive: 1)")
    add("--layer-keep", metavar="R,R,...", help="--keep-ratio of each layer, or of early, middle and late layers")
    add("--force-self", type=flag01, default=True, help="1: a query always keeps its own key")
    add("--sink", type=flag01, default=False, help="1: and the first one")
    add("--adaptive", choices=ADAPTIVE, default="none", help="k by query (prefix) or, acausal, sequence (upstream)")
    add("--coverage", type=coverage, default="0.95", help="share of attention that top-p keeps, prefix learns to keep")
    add("--legacy-leak", type=flag01, default=False, help="1: k keys for the first queries, too, so future ones")
    add = parser.add_argument_group("indexer (sizes: of the -e file, if it has one)").add_argument
    add("--indexer", choices=INDEXERS[1:], default="lightning", help="upstream: a key per head, constant head weights")
    add("--indexer-heads", type=positive_int, default=4, help="heads of the indexer")
    add("--indexer-dim", type=positive_int, default=64, help="width of a head of the indexer")
    add("--indexer-rope", type=natural, help="rotated dims of the indexer (default: the model's, 0 for GPT-2)")
    add(
        "--indexer-warmup", type=natural, default=0, help="first steps, in which attention is dense and it learns alone"
    )
    add("--indexer-lr", type=positive_float, default=5e-3, help="its learning rate in the warm-up")
    add("--indexer-lr-sparse", type=positive_float, default=2e-3, help="and after it")
    add("--train-indexer", type=flag01, default=True, help="0: leave it as it is")
    add = parser.add_argument_group("DeepSeek-style models").add_argument
    add("--mla", type=flag01, default=None, help="1: the -e file must have latent attention, 0: must not")
    add("--experts", type=natural, help="experts that the -e file must have, 0: none")
    add("--top-experts", type=positive_int, help="experts that a token of the -e file must take")
    add("--balance", type=natural_float, default=0.01, help="weight of the experts' load-balance loss")
    options.add_options(parser)
    add("--answers-after", type=ids, metavar="FIRST:END", help="ids whose next token is an answer: report accuracy")
    return parser


# ----------------------------------------------------------------------------------------------------------------------
# the model


def extra_init(device, file: Model, s: Sparsity, path: str, seed: int) -> np.ndarray:
    """Values of the extra tensors, flat: the file's where it has them, else drawn."""
    config = file.config
    shapes, generator = extra_shapes(config, s), normals(seed)
    flat = np.zeros(sum(map(math.prod, shapes.values())), np.float32)
    views = named_views(flat, shapes)
    for name, values in views.items():
        if name in ("idxqw", "idxkw", "idxww"):
            values[...] = generator.standard_normal(values.shape) * (config.C**-0.5 if name == "idxww" else 0.02)
        elif name == "idxwb":  # as published
            values[...] = abs(generator.standard_normal(values.shape)) * 0.1
        elif name == "idxknw":
            values[...] = 1
        elif name == "controller":
            for layer in values:
                layer[...] = upstream_controller_init(config.C, generator)
    if "ctlw1" in views:
        names = ("ctlw1", "ctlb1", "ctlw2", "ctlb2")
        for l in range(config.L):
            start = keep_controller_init(generator)
            for name, values in named_views(start, {name: views[name].shape[1:] for name in names}).items():
                views[name][l] = values
    for name, values in named_views(file.extra, extra_shapes(config, read_sparsity(file, path))).items():
        if name in views:
            views[name][...] = values
    return flat


class GPT2:
    """The model on a device: parameters, gradients, m and v are one flat float32 buffer each, with a view per tensor.

    The model's own parameters come first, then the indexer's and the controllers', which have a loss of their own.
    """

    def __init__(self, device, config: GPT2Config, sparsity: Sparsity, params: np.ndarray, B: int, T: int):
        self.ops, self.config, self.sparsity, self.B, self.T = device, config, sparsity, B, T
        self.extra = extra_shapes(config, sparsity)
        self.shapes = tensor_shapes(config) | self.extra
        self.mla, self.moe = is_mla(config), getattr(config, "E", 0) > 0
        self.own = num_parameters(config)  # values of the model itself, in front
        self.params_flat, self.params = self._buffer(params)
        self.no_weights = device.zeros((sparsity.heads, config.C)) if sparsity.indexer == "upstream" else None
        self.dense = sparsity.attention == "dense"  # what forward runs; the warm-up sets it
        self.balance, self.draw = 0.01, 0  # weight of the load-balance loss; which draw of the random selector
        self.grads_flat = self.m_flat = self.v_flat = self.layers = self.acts = self.decoder = None

    def _buffer(self, values: np.ndarray | None = None) -> tuple:
        """A flat buffer on the device, of `values` or of zeros for all parameters, and its views by name."""
        count = sum(map(math.prod, self.shapes.values()))
        flat = self.ops.zeros(count) if values is None else self.ops.to_device(values)
        return flat, SimpleNamespace(**named_views(flat, self.shapes))

    def _allocate(self, shapes: dict) -> SimpleNamespace:
        ints = ("index", "count", "keep", "target", "experts", "slot", "source", "tile_expert", "load")
        return SimpleNamespace(
            **{n: self.ops.zeros(s, np.int32 if n in ints else np.float32) for n, s in shapes.items()}
        )

    def _layer_shapes(self, l: int, B: int, T: int, start: int = 0) -> dict:
        """What a layer keeps of a forward pass over B x T new tokens behind `start` old ones."""
        c, s = self.config, self.sparsity
        N, C = B * T, c.C
        shapes = dict(ln1=(N, C), ln1_mean=(N,), ln1_rstd=(N,), qkv=(B, start + T, 3 * C), atty=(N, C))
        shapes |= dict(lse=(B, c.NH, T), residual2=(N, C), ln2=(N, C), ln2_mean=(N,), ln2_rstd=(N,), residual3=(N, C))
        if self.mla:
            shapes |= dict(qa=(N, c.q_rank), qn=(N, c.q_rank), q_rrms=(N,), kva=(N, c.kv_rank + c.R))
            shapes |= dict(kvn=(N, c.kv_rank), kv_rrms=(N,))
        if self.moe:
            rows, tile = expert_rows(N, c.top, c.E)
            shapes |= dict(probs=(N, c.E), gates=(N, c.top), experts=(N, c.top), slot=(N, c.top), source=(rows,))
            shapes |= dict(tile_expert=(rows // tile,), load=(c.E,), exh=(rows, c.F), exy=(rows, C))
        else:
            shapes |= dict(fch=(N, 4 * C), fch_gelu=(N, 4 * C))
        if s.attention == "sparse":
            shapes |= dict(keep=(B, T), count=(B, T), index=(B, T, min(s.k[l], start + T)))
        if s.indexer != "none":
            keys = s.width * (s.heads if s.indexer == "upstream" else 1)
            shapes |= dict(iq=(B, T, s.heads * s.width), ik=(B, start + T, keys), iw=(B, T, s.heads), kl=(B, T))
            shapes |= dict(ik0=(N, keys), ik_mean=(N,), ik_rstd=(N,))
        if s.adaptive == "prefix":
            shapes |= dict(features=(B, T, FEATURES), state=(B, 4, C), kappa=(B, T), hidden=(B, T, HIDDEN))
        return shapes

    def _scratch_shapes(self, B: int, T: int, keys: int) -> dict:
        """Buffers that every layer uses anew."""
        c, N = self.config, B * T
        block = (B * max(min(ROWS, T) * keys, T * min(max(self.sparsity.k), keys)),)
        shapes = dict(scores=block, p=block, btc=(N, c.C), dense_lse=(B, c.NH, T))
        if self.mla:
            shapes |= dict(q=(N, c.C), kv=(N, c.NH * (2 * c.C // c.NH - c.R)))
        if self.moe:
            rows, _ = expert_rows(N, c.top, c.E)
            shapes |= dict(router=(N, c.E), exi=(rows, c.C), exa=(rows, c.F), balance=(1,))
        return shapes

    def forward(self, inputs: np.ndarray, targets: np.ndarray | None = None, grad_accum: int = 1) -> None:
        """inputs, targets (B,T) int32 -> logits; with targets, losses, which mean_loss fetches.

        With targets, the logits are overwritten by the gradient of loss / grad_accum, which backward starts from.
        """
        ops, p, B, T, L, C = self.ops, self.params, self.B, self.T, self.config.L, self.config.C
        N = B * T
        if self.layers is None:
            self.layers = [self._allocate(self._layer_shapes(l, B, T)) for l in range(L)]
            shapes = self._scratch_shapes(B, T, T) | dict(encoded=(N, C), lnf=(N, C), lnf_mean=(N,), lnf_rstd=(N,))
            self.acts = self._allocate(shapes | dict(logits=(N, self.config.Vp), losses=(N,)))
            arrays = [array for space in (*self.layers, self.acts) for array in vars(space).values()]
            print(f"allocated {sum(array.nbytes for array in arrays) >> 20} MiB for activations")
            self.inputs, self.targets = ops.zeros((B, T), np.int32), ops.zeros(N, np.int32)
        a = self.acts
        ops.copy_in(self.inputs, inputs)
        ops.encoder_forward(a.encoded, self.inputs, p.wte, p.wpe)
        residual = a.encoded  # (N,C)
        for l, v in enumerate(self.layers):
            self._layer(l, v, a, residual, 0)
            residual = v.residual3
        ops.layernorm_forward(a.lnf, a.lnf_mean, a.lnf_rstd, residual, p.lnfw, p.lnfb)
        self._head(a.logits, a.lnf)
        if targets is not None:
            ops.copy_in(self.targets, targets.ravel())
            ops.fused_classifier(a.losses, a.logits, self.targets, self.config.V, 1 / (N * grad_accum))
            self.losses, self.grad_accum = ops.to_host_later(a.losses), grad_accum

    def _head(self, logits, x):
        """logits (N,Vp): GPT-2's head is wte, a DeepSeek-style model has its own."""
        own = hasattr(self.params, "headw")
        self.ops.matmul_forward(logits, x, *((self.params.headw, self.params.headb) if own else (self.params.wte,)))

    def mean_loss(self) -> float:
        """The loss of the last forward with targets; waits for that, not for what was begun since."""
        return float(self.losses().mean())

    def mean_kl(self) -> float:
        """The indexer's loss, a mean over layers and queries, of the last backward that trained it."""
        return sum(float(kl().mean()) for kl in self.divergences) / self.config.L

    def _layer(self, l: int, v, s, residual, start: int):
        """One layer over the rows `residual` (N,C) at positions start.. : v keeps what backward needs, s is scratch."""
        ops, p, NH = self.ops, self.params, self.config.NH
        ops.layernorm_forward(v.ln1, v.ln1_mean, v.ln1_rstd, residual, p.ln1w[l], p.ln1b[l])
        if hasattr(v, "latent"):
            self._latent_attention(l, v, s, start)
        else:
            self._queries_keys_values(l, v, s, start)
            if self.dense:
                ops.attention_forward(v.atty, v.lse, v.qkv, NH, start)
            else:
                self._index(l, v, start)
                self._select(l, v, s, start)
                ops.sparse_attention_forward(v.atty, v.lse, v.qkv, v.index, v.count, NH, start)
        ops.matmul_forward(v.residual2, v.atty, p.attprojw[l], None if self.mla else p.attprojb[l])
        ln2 = (v.ln2, v.ln2_mean, v.ln2_rstd)
        ops.fused_residual_forward(v.residual2, *ln2, v.residual2, residual, p.ln2w[l], p.ln2b[l])
        if self.moe:
            ops.matmul_forward(s.router, v.ln2, p.routerw[l])  # (N,E)
            ops.router_forward(v.probs, v.gates, v.experts, s.router)
            ops.expert_plan(v.slot, v.source, v.tile_expert, v.load, v.experts)
            ops.expert_gather(s.exi, v.ln2, v.source, self.config.top)
            ops.expert_matmul_forward(v.exh, s.exi, p.expertw[l], v.tile_expert)
            ops.silu_forward(s.exa, v.exh)
            ops.expert_matmul_forward(v.exy, s.exa, p.expertprojw[l], v.tile_expert)
            ops.expert_combine_forward(v.residual3, v.exy, v.gates, v.slot)
        else:
            ops.matmul_forward(v.fch, v.ln2, p.fcw[l], p.fcb[l])
            ops.gelu_forward(v.fch_gelu, v.fch)
            ops.matmul_forward(v.residual3, v.fch_gelu, p.fcprojw[l], p.fcprojb[l])
        ops.residual_forward(v.residual3, v.residual3, v.residual2)

    def _queries_keys_values(self, l: int, v, s, start: int):
        """The new rows of v.qkv: one product in GPT-2; in MLA through a latent for queries, one for keys and values."""
        ops, p = self.ops, self.params
        qkv = v.qkv[:, start:]
        if not self.mla:
            return ops.matmul_forward(qkv.reshape(len(v.ln1), -1), v.ln1, p.qkvw[l], p.qkvb[l])
        self._latents(l, v, s)
        ops.rmsnorm_forward(v.kvn, v.kv_rrms, v.kva, p.kvnw[l])
        ops.matmul_forward(s.kv, v.kvn, p.kvbw[l])
        ops.mla_qkv_forward(qkv, s.q, s.kv, v.kva, self.config.NH, self.config.R, start)

    def _latents(self, l: int, v, s):
        """MLA's queries s.q (N,C), by way of their normed latent v.qn, and v.kva: the keys' latent and rotary key."""
        ops, p = self.ops, self.params
        ops.matmul_forward(v.qa, v.ln1, p.qaw[l])
        ops.rmsnorm_forward(v.qn, v.q_rrms, v.qa, p.qnw[l])
        ops.matmul_forward(s.q, v.qn, p.qbw[l])
        ops.matmul_forward(v.kva, v.ln1, p.kvaw[l])

    def _index(self, l: int, v, start: int):
        """The indexer's queries, keys and head weights for the new rows."""
        ops, p, s = self.ops, self.params, self.sparsity
        if s.indexer == "none":
            return
        N = len(v.ln1)
        iq, ik, iw = v.iq.reshape(N, -1), v.ik[:, start:], v.iw.reshape(N, -1)
        if s.indexer == "upstream":
            ops.matmul_forward(iq, v.ln1, p.idxqw[l], p.idxqb[l])
            ops.matmul_forward(ik.reshape(N, -1), v.ln1, p.idxkw[l], p.idxkb[l])
            return ops.matmul_forward(iw, v.ln1, self.no_weights, p.idxwb[l])
        ops.matmul_forward(iq, v.qn if self.mla else v.ln1, p.idxqw[l])
        ops.matmul_forward(v.ik0, v.ln1, p.idxkw[l])
        ops.layernorm_forward(ik.reshape(N, -1), v.ik_mean, v.ik_rstd, v.ik0, p.idxknw[l], p.idxknb[l])
        ops.matmul_forward(iw, v.ln1, p.idxww[l])
        if s.rotated:
            ops.rope_forward(v.iq, s.heads, s.rotated, start)
            ops.rope_forward(ik, 1, s.rotated, start)

    @property
    def _scale(self) -> float:
        """Of the indexer's scores."""
        return 1.0 if self.sparsity.indexer == "upstream" else (self.sparsity.width * self.sparsity.heads) ** -0.5

    def _blocks(self, buffer, B: int, start: int, T: int):
        """(first, B x rows x keys view of buffer) for blocks of queries at first.. with the keys up to their last."""
        for first in range(start, T, ROWS):
            rows, keys = min(ROWS, T - first), min(first + ROWS, T)
            yield first, buffer[: B * rows * keys].reshape(B, rows, keys)

    def _select(self, l: int, v, scratch, start: int):
        """v.index, v.count: the keys of the queries at positions start.., a block of queries at a time."""
        ops, s, NH = self.ops, self.sparsity, self.config.NH
        B, n = v.count.shape
        if s.selector == "oracle":
            ops.attention_forward(scratch.btc, scratch.dense_lse, v.qkv, NH, start)
        if s.adaptive == "prefix":
            ops.prefix_features(v.features, v.state, v.ln1.reshape(B, n, -1), self.config.maxT, start)
        elif s.adaptive == "upstream":  # from all the tokens that there are; a decoder keeps those before in v.seen
            seen = v.seen if hasattr(v, "seen") else v.ln1.reshape(B, n, -1)
            ops.upstream_controller(v.keep, seen, self.params.controller[l])
        else:
            v.keep.fill(s.k[l])
        for first, scores in self._blocks(scratch.scores, B, start, start + n):
            if s.selector == "oracle":
                ops.attention_mean(scores, v.qkv, scratch.dense_lse, NH, first, start)
            elif s.selector == "random":
                ops.random_scores(scores, (s.seed + 1000003 * self.draw + 7919 * l) % 2**32, first)
            elif s.selector == "recency":
                scores.fill(0)  # the most recent wins ties
            else:
                ops.indexer_scores_forward(scores, v.iq, v.ik, v.iw, self._scale, first, start)
            if s.selector == "top-p":
                ops.mass_count(v.keep, scores, s.coverage, first, start, 1)
            if s.adaptive == "prefix":
                self._prefix_keep(l, v, scores, first, start)
            leak = int(s.leak and scratch is self.acts)  # a decoder has no future keys
            ops.select_topk(v.index, v.count, scores, v.keep, first, start, int(s.force_self), int(s.sink), leak)

    def _prefix_keep(self, l: int, v, scores, first: int, start: int):
        """v.keep of a block of queries, from the features of what came before and the entropy of their scores."""
        ops, p = self.ops, self.params
        ops.row_entropy(v.features, scores, first, start)  # the last feature
        weights = p.ctlw1[l], p.ctlb1[l], p.ctlw2[l], p.ctlb2[l]
        rows, most = scores.shape[1], self.sparsity.k[l]
        ops.keep_controller_forward(v.keep, v.kappa, v.hidden, v.features, *weights, first, rows, most, start)

    def _divergence(self, l: int, v, learn: bool, dscale: float = 0.0):
        """v.kl (B,T): KL(p || softmax(scores)) of each query, over all keys if attention is dense, else those selected.

        learn: also its gradients at the indexer's queries, keys and head weights, into dacts, and --adaptive prefix's.
        """
        ops, a, NH, d, s = self.ops, self.acts, self.config.NH, self.dacts if learn else None, self.sparsity
        indexer = v.iq, v.ik, v.iw
        if not self.dense:
            scores, p = (buffer[: v.index.size].reshape(v.index.shape) for buffer in (a.scores, a.p))
            ops.indexer_gathered_forward(scores, *indexer, v.index, v.count, self._scale)
            ops.sparse_attention_mean(p, v.qkv, v.lse, v.index, v.count, NH)
            ops.fused_kl(v.kl, scores, p, dscale)
            if learn:
                grads = d.iq, d.ik, d.iw
                ops.indexer_gathered_backward(*grads, scores, *indexer, v.index, v.count, self._scale)
            return
        adapt = learn and s.adaptive == "prefix"
        if adapt:
            ops.prefix_features(v.features, v.state, v.ln1.reshape(self.B, self.T, -1), self.config.maxT)
        if learn:
            d.ik.fill(0)
        for (first, scores), (_, p) in zip(*(self._blocks(buffer, self.B, 0, self.T) for buffer in (a.scores, a.p))):
            ops.indexer_scores_forward(scores, *indexer, self._scale, first)
            ops.attention_mean(p, v.qkv, v.lse, NH, first)
            if adapt:
                self._prefix_keep(l, v, scores, first, 0)
                ops.mass_count(d.target, p, s.coverage, first, 0, 0)
            ops.fused_kl(v.kl, scores, p, dscale, first)
            if learn:
                ops.indexer_scores_backward(d.iq, d.ik, d.iw, scores, *indexer, self._scale, first)
        if adapt:
            grads = [getattr(self.grads, name)[l] for name in ("ctlw1", "ctlb1", "ctlw2", "ctlb2")]
            saved = v.kappa, v.hidden, v.features, self.params.ctlw2[l]
            ops.keep_controller_backward(d.ctl_losses, *grads, d.target, *saved, dscale)

    def _indexer_backward(self, l: int, v, beta: int):
        """The indexer's gradients from its own loss. Nothing flows on into its input or into attention."""
        ops, p, g, d, s, N = self.ops, self.params, self.grads, self.dacts, self.sparsity, len(v.ln1)
        if self.dense:
            self._index(l, v, 0)
        self._divergence(l, v, True, 1 / (N * self.grad_accum))
        diq, dik, diw = d.iq.reshape(N, -1), d.ik.reshape(N, -1), d.iw.reshape(N, -1)
        if s.indexer == "upstream":
            ops.matmul_backward(None, g.idxqw[l], g.idxqb[l], diq, v.ln1, p.idxqw[l], beta)
            ops.matmul_backward(None, g.idxkw[l], g.idxkb[l], dik, v.ln1, p.idxkw[l], beta)
            return ops.column_sum(g.idxwb[l], diw)
        if s.rotated:
            ops.rope_backward(d.iq, s.heads, s.rotated)
            ops.rope_backward(d.ik, 1, s.rotated)
        ops.matmul_backward(None, g.idxww[l], None, diw, v.ln1, p.idxww[l], beta)
        ops.matmul_backward(None, g.idxqw[l], None, diq, v.qn if self.mla else v.ln1, p.idxqw[l], beta)
        d.ik0.fill(0)
        norm = p.idxknw[l], v.ik_mean, v.ik_rstd
        ops.layernorm_backward(d.ik0, g.idxknw[l], g.idxknb[l], dik, v.ik0, *norm)
        ops.matmul_backward(None, g.idxkw[l], None, d.ik0, v.ln1, p.idxkw[l], beta)

    def backward(self, first: bool = True, model: bool = True, indexer: bool = False):
        """Gradients of the last forward's loss; the `first` micro-step of an update starts them, later ones add.

        model: those of the language-model loss, at the model's own parameters; indexer: those of the indexer's KL.
        """
        ops, p, a, L, C = self.ops, self.params, self.acts, self.config.L, self.config.C
        N = self.B * self.T
        if self.grads_flat is None:
            self._allocate_gradients()
        g, d, beta = self.grads, self.dacts, 0 if first else 1
        tied = not hasattr(p, "headw")
        if first:  # the matrices' gradients are written by their product, all others are added to
            for name, tensor in vars(g).items():
                if name not in (*MATRICES, "idxqw", "idxkw", "idxww") or name == "wpe" or (name == "wte" and not tied):
                    tensor.fill(0)
        if indexer:
            for l in reversed(range(L)):
                self._indexer_backward(l, self.layers[l], beta)
            self.divergences = [ops.to_host_later(v.kl) for v in self.layers]
        if not model:
            return
        d.residual.fill(0)
        head = (g.wte, None) if tied else (g.headw, g.headb)
        ops.matmul_backward(d.btc, *head, a.logits, a.lnf, p.wte if tied else p.headw, beta)
        last = self.layers[L - 1].residual3
        ops.layernorm_backward(d.residual, g.lnfw, g.lnfb, d.btc, last, p.lnfw, a.lnf_mean, a.lnf_rstd)
        for l in reversed(range(L)):
            v, residual = self.layers[l], self.layers[l - 1].residual3 if l > 0 else a.encoded
            self._mlp_backward(l, v, beta)
            ln2 = v.residual2, p.ln2w[l], v.ln2_mean, v.ln2_rstd
            ops.layernorm_backward(d.residual, g.ln2w[l], g.ln2b[l], d.btc, *ln2)
            bias = None if self.mla else g.attprojb[l]
            ops.matmul_backward(d.btc, g.attprojw[l], bias, d.residual, v.atty, p.attprojw[l], beta)
            if self.dense:
                ops.attention_backward(d.qkv, d.btc, v.qkv, v.atty, v.lse, self.config.NH)
            else:
                lists = v.index, v.count
                ops.sparse_attention_backward(d.qkv, d.btc, v.qkv, v.atty, v.lse, *lists, self.config.NH)
            if self.mla:
                self._mla_backward(l, v, beta)
            else:
                dqkv = d.qkv.reshape(N, 3 * C)
                ops.matmul_backward(d.btc, g.qkvw[l], g.qkvb[l], dqkv, v.ln1, p.qkvw[l], beta)
            ln1 = residual, p.ln1w[l], v.ln1_mean, v.ln1_rstd
            ops.layernorm_backward(d.residual, g.ln1w[l], g.ln1b[l], d.btc, *ln1)
        ops.encoder_backward(g.wte, g.wpe, d.residual, self.inputs)

    def _allocate_gradients(self):
        print(f"allocated {self.params_flat.nbytes >> 20} MiB for parameter gradients")
        self.grads_flat, self.grads = self._buffer()
        c, v, N = self.config, self.layers[0], self.B * self.T
        shapes = dict(residual=(N, c.C), btc=(N, c.C), qkv=v.qkv.shape)
        if self.mla:
            shapes |= dict(q=(N, c.C), kv=self.acts.kv.shape, kva=v.kva.shape, qa=v.qa.shape, qn=v.qn.shape)
            shapes |= dict(kvn=v.kvn.shape)
        if self.moe:
            shapes |= dict(exy=v.exy.shape, gates=v.gates.shape, exa=v.exh.shape, exi=v.exy.shape)
            shapes |= dict(router=(N, c.E))
        else:
            shapes |= dict(bt4c=(N, 4 * c.C))
        if self.sparsity.indexer != "none":
            shapes |= dict(iq=v.iq.shape, ik=v.ik.shape, iw=v.iw.shape, ik0=v.ik0.shape)
        if self.sparsity.adaptive == "prefix":
            shapes |= dict(target=(self.B, self.T), ctl_losses=(self.B, self.T))
        self.dacts = self._allocate(shapes)
        print(
            f"allocated {sum(array.nbytes for array in vars(self.dacts).values()) >> 20} MiB for activation gradients"
        )

    def _mlp_backward(self, l: int, v, beta: int):
        """d.btc (N,C), the gradient at ln2, from d.residual."""
        ops, p, g, a, d = self.ops, self.params, self.grads, self.acts, self.dacts
        if not self.moe:
            ops.matmul_backward(d.bt4c, g.fcprojw[l], g.fcprojb[l], d.residual, v.fch_gelu, p.fcprojw[l], beta)
            ops.gelu_backward(d.bt4c, v.fch, d.bt4c)
            return ops.matmul_backward(d.btc, g.fcw[l], g.fcb[l], d.bt4c, v.ln2, p.fcw[l], beta)
        ops.expert_combine_backward(d.exy, d.gates, d.residual, v.exy, v.gates, v.slot, v.source)
        ops.silu_forward(a.exa, v.exh)
        ops.expert_matmul_backward(d.exa, g.expertprojw[l], d.exy, a.exa, p.expertprojw[l], v.tile_expert, beta)
        ops.silu_backward(d.exa, v.exh, d.exa)
        ops.expert_gather(a.exi, v.ln2, v.source, self.config.top)
        ops.expert_matmul_backward(d.exi, g.expertw[l], d.exa, a.exi, p.expertw[l], v.tile_expert, beta)
        balance = self.balance / self.grad_accum
        ops.router_backward(d.router, d.gates, v.probs, v.gates, v.experts, v.load, balance)
        ops.matmul_backward(a.btc, g.routerw[l], None, d.router, v.ln2, p.routerw[l], beta)
        ops.expert_scatter(d.btc, d.exi, v.slot)
        ops.residual_forward(d.btc, d.btc, a.btc)

    def _mla_backward(self, l: int, v, beta: int):
        """d.btc (N,C), the gradient at ln1, from d.qkv, through both latents."""
        ops, p, g, a, d = self.ops, self.params, self.grads, self.acts, self.dacts
        ops.mla_qkv_backward(d.q, d.kv, d.kva, d.qkv, self.config.NH, self.config.R)
        ops.matmul_backward(d.qn, g.qbw[l], None, d.q, v.qn, p.qbw[l], beta)
        ops.rmsnorm_backward(d.qa, g.qnw[l], d.qn, v.qa, p.qnw[l], v.q_rrms)
        ops.matmul_backward(d.btc, g.qaw[l], None, d.qa, v.ln1, p.qaw[l], beta)
        ops.matmul_backward(d.kvn, g.kvbw[l], None, d.kv, v.kvn, p.kvbw[l], beta)
        ops.rmsnorm_backward(d.kva, g.kvnw[l], d.kvn, v.kva, p.kvnw[l], v.kv_rrms)
        ops.matmul_backward(a.btc, g.kvaw[l], None, d.kva, v.ln1, p.kvaw[l], beta)
        ops.residual_forward(d.btc, d.btc, a.btc)

    def update(self, t, lr, indexer_t, indexer_lr, beta2=0.999, weight_decay=0.0, decay_all=True, grad_clip=0.0):
        """AdamW update number t = 1, 2, ... of the model, indexer_t of the indexer; 0 leaves that part as it is.

        Returns the norm of the model's gradient if grad_clip > 0, else None; it limits the model's alone.
        """
        if self.m_flat is None:
            self.allocate_moments()
        norm = self.ops.global_norm(self.grads_flat[: self.own]) if grad_clip and t else None
        clip = grad_clip / norm if norm is not None and norm > grad_clip else 1.0
        for name in self.shapes:
            tensors = [getattr(views, name) for views in (self.params, self.grads, self.m, self.v)]
            if name not in self.extra:
                decay = weight_decay if decay_all or name in MATRICES else 0.0
                step, rate, scale = t, lr, clip
            else:  # a controller learns in the warm-up alone, from dense attention; upstream's never
                learns = name.startswith("idx") or (name.startswith("ctl") and self.dense)
                step, rate, scale, decay = indexer_t if learns else 0, indexer_lr, 1.0, 0.0
            if step:
                self.ops.adamw_update(*tensors, step, rate, 0.9, beta2, 1e-8, decay, scale)
        return norm

    def allocate_moments(self, m: np.ndarray | None = None, v: np.ndarray | None = None):
        """AdamW's m and v: a checkpoint's, or zeros."""
        for name in ("m", "v"):
            print(f"allocated {self.params_flat.nbytes >> 20} MiB for AdamW optimizer state {name}")
        self.m_flat, self.m = self._buffer(m)
        self.v_flat, self.v = self._buffer(v)

    def measure(self, inputs: np.ndarray) -> tuple[list[float], list[Agreement], float]:
        """For a batch: each layer's KL, what its selection has of dense attention; the indexer's share of the time."""
        ops, NH, began = self.ops, self.config.NH, time.perf_counter()
        self.forward(inputs)
        ops.synchronize()
        a = self.acts
        whole, chosen, divergences, agreements = time.perf_counter() - began, 0.0, [], []
        for l, v in enumerate(self.layers):
            began = time.perf_counter()
            self._index(l, v, 0)
            self._select(l, v, a, 0)
            ops.synchronize()
            chosen += time.perf_counter() - began
            if self.sparsity.indexer != "none":
                self._divergence(l, v, False)
                divergences.append(float(ops.to_host(v.kl).mean()))
            if not self.dense:
                ops.attention_forward(a.btc, a.dense_lse, v.qkv, NH)
            top, top_count, agreement = (
                ops.zeros(v.index.shape, np.int32),
                ops.zeros(v.count.shape, np.int32),
                Agreement(),
            )
            for first, p in self._blocks(a.p, self.B, 0, self.T):
                ops.attention_mean(p, v.qkv, v.lse if self.dense else a.dense_lse, NH, first)
                ops.select_topk(top, top_count, p, v.count, first, 0, 0)
                rows = slice(first, first + p.shape[1])
                agreement.add(ops.to_host(v.index)[:, rows], ops.to_host(top)[:, rows], ops.to_host(p), first)
            agreements.append(agreement)
        return divergences, agreements, chosen / (whole + chosen if self.dense else whole)

    def extend(self, tokens: np.ndarray, start: int) -> np.ndarray:
        """Logits (V) after `tokens` (n) int32 at positions start.., of which earlier calls ran 0..start-1.

        What is kept of every position: key and value, in MLA their common latent, and the indexer's key.
        """
        ops, p, c, n = self.ops, self.params, self.config, len(tokens)
        if self.decoder is None:
            self._allocate_decoder()
        if n > 1 and self.sparsity.adaptive == "upstream" and not self.dense:  # k of a token: from those up to it
            return [self.extend(tokens[i : i + 1], start + i) for i in range(n)][-1]
        d, end = self.decoder, start + n
        s = views_of(d.scratch, self._scratch_shapes(1, n, end))
        ops.copy_in(d.tokens[:, :n], tokens.reshape(1, n))
        residual = d.encoded[:n]
        ops.encoder_forward(residual, d.tokens[:, :n], p.wte, p.wpe, start)
        for l in range(c.L):
            v = views_of(d.rows, self._layer_shapes(l, 1, n, start) | self._latent_shapes(n))
            for name, cache in d.cache.items():  # (L,1,maxT,width)
                setattr(v, name, cache[l] if name == "state" else cache[l, :, :end])
            if "seen" in d.cache:
                v.ln1 = v.seen[0, start:]
            self._layer(l, v, s, residual, start)
            residual = v.residual3
        ops.layernorm_forward(d.last, v.ln2_mean[:1], v.ln2_rstd[:1], residual[n - 1 :], p.lnfw, p.lnfb)
        self._head(d.logits, d.last)
        return ops.to_host(d.logits)[0, : c.V]

    def _latent_shapes(self, n: int) -> dict:
        """Of MLA's absorbed form, in which a decoder's queries and outputs live in the latent space of the keys."""
        c = self.config
        return dict(qlat=(n, c.NH, c.kv_rank + c.R), olat=(n, c.NH, c.kv_rank)) if self.mla else {}

    def _allocate_decoder(self):
        c, s, maxT = self.config, self.sparsity, self.config.maxT
        widths = dict(qkv=3 * c.C)
        if self.mla and s.selector != "oracle":  # the oracle looks at whole keys
            widths = dict(latent=c.kv_rank + c.R)
        widths |= dict(ik=self._layer_shapes(0, 1, 1)["ik"][2]) if s.indexer != "none" else {}
        widths |= dict(seen=c.C) if s.adaptive == "upstream" else {}
        cache = {name: self.ops.zeros((c.L, 1, maxT, width)) for name, width in widths.items()}
        if s.adaptive == "prefix":
            cache["state"] = self.ops.zeros((c.L, 1, 4, c.C))
        rows = self._layer_shapes(int(np.argmax(s.k)), 1, maxT) | self._latent_shapes(maxT)
        if self.moe:
            rows["tile_expert"] = rows["source"]  # fewer tokens have smaller tiles, and more of them
        rows = self._allocate({name: shape for name, shape in rows.items() if name not in (*cache, "qkv")})
        own = dict(encoded=(maxT, c.C), last=(1, c.C), logits=(1, c.Vp))
        scratch = self._allocate(self._scratch_shapes(1, maxT, maxT))
        self.decoder = SimpleNamespace(rows=rows, scratch=scratch, cache=cache, **vars(self._allocate(own)))
        self.decoder.tokens = self.ops.zeros((1, maxT), np.int32)

    def _latent_attention(self, l: int, v, s, start: int):
        """v.atty by MLA's absorbed form: of a token, kv_rank + R values are kept, whatever the number of heads."""
        ops, p, c = self.ops, self.params, self.config
        latent, kvbw = v.latent[0], p.kvbw[l]  # (T,kv_rank+R)
        self._latents(l, v, s)
        ops.rmsnorm_forward(v.kvn, v.kv_rrms, v.kva, p.kvnw[l])
        ops.mla_latent(latent, v.kvn, v.kva, start)
        lists = (None, None)
        if not self.dense:
            self._index(l, v, start)
            self._select(l, v, s, start)
            lists = (v.index, v.count)
        ops.mla_absorb(v.qlat, s.q, kvbw, c.NH, c.R, start)
        ops.latent_attention_forward(v.olat, v.qlat, latent, *lists, (c.C // c.NH) ** -0.5, start)
        ops.mla_expand(v.atty, v.olat, kvbw, c.NH, c.R)


def views_of(buffers: SimpleNamespace, shapes: dict) -> SimpleNamespace:
    """The first values of each buffer, in smaller shapes."""
    named = {name: buffer.reshape(-1) for name, buffer in vars(buffers).items()}
    return SimpleNamespace(**{n: named[n][: math.prod(s)].reshape(s) for n, s in shapes.items() if n in named})


# ----------------------------------------------------------------------------------------------------------------------
# the loop


def save(args: Namespace, model: GPT2, step: int, run: loop.Run):
    """Write the checkpoint, attention in its header, and the optimizer state for a run that goes on at `step`."""
    s, host, own = model.sparsity, model.ops.to_host, model.own
    if (
        s.indexer != "none" and s.attention == "sparse" and not s.leak
    ):  # its loss may fail where the language's does not
        run.val_loader.reset()
        divergences, _, _ = model.measure(run.val_loader.next_batch()[0])
        loop.check_finite("indexer's", sum(divergences), step, args)
    params = host(model.params_flat)
    plain = model.sparsity.attention == "dense" and not model.extra
    kind, fields = (DENSE, ()) if plain else (SPARSE_ATTENTION, model.sparsity.fields())
    file = Model(model.config, params[:own], step, kind=kind, fields=fields, extra=params[own:])
    loop.save(args, model, file, host(model.m_flat), host(model.v_flat), run)


def main(argv: list[str] | None = None) -> int:
    warnings.simplefilter("ignore", RuntimeWarning)  # of NumPy, for losses that overflow: reported below, once
    parser = arguments()
    typed = parser.explicit(argv)
    args, file, state = options.parse_options(parser, argv, "train_sparse_attn.py")
    check_architecture(args, file.config)
    sparsity = choose_sparsity(args, typed, file)
    config, B, T, grad_accum = file.config, args.batch_size, args.seq_len, args.grad_accum
    device = kernels.open_device(args.device, args.tf32)

    run = loop.open_run(args, config, state)
    start, steps = run.start, run.steps

    table.heading()
    print_sparsity(config, sparsity, T)
    options.print_options(args)
    options.print_model(device.describe(), device.tf32, config)
    options.print_workload(steps, run.val_batches)

    extra = extra_init(device, file, sparsity, args.model, args.seed or 1337)
    print(f"allocated {(file.params.nbytes + extra.nbytes) >> 20} MiB for model parameters")
    if extra.size:
        print(f"{extra.size} parameters of indexer and controller, {file.params.size + extra.size} in all")
    model = GPT2(device, config, sparsity, np.concatenate([file.params, extra]), B, T)
    model.balance, warmup = args.balance, args.indexer_warmup
    learns = args.train_indexer and sparsity.indexer != "none" and sparsity.attention == "sparse" and not sparsity.leak
    if state:
        model.allocate_moments(state.m, state.v)
        print(f"Resuming from step {start} (shard {state.shard}, sample {state.sample})")
    schedule = dict(warmup=args.warmup, final_frac=args.final_lr_frac)
    adamw = dict(beta2=args.beta2, weight_decay=args.weight_decay, decay_all=args.decay_all, grad_clip=args.grad_clip)
    log = Logger(args.log, start)

    seconds = 0.0
    with Interrupt() as interrupt:
        for step in range(start, steps + 1):
            last_step = step == steps
            if interrupt.signal and not last_step:
                if args.checkpoint and step > start:
                    save(args, model, step, run)
                break
            warming_up = step < warmup
            model.dense, model.draw = sparsity.attention == "dense" or warming_up, 0
            if step == warmup > 0:
                print(f"indexer warmed up: from step {step + 1} attention is sparse and both learn", flush=True)
            if step == 0 or last_step or (args.val_every and step % args.val_every == 0) or step == warmup > 0:
                val_loss = loop.evaluate(model, run.val_loader, run.val_batches)
                loop.check_finite("val", val_loss, step, args)
                print(f"val loss {val_loss:f}", flush=True)
                log.val(step, val_loss)
                if sparsity.attention == "sparse" or args.answers_after:
                    report(model, run.val_loader, run.val_batches, args, log, step)
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
            model.draw, loss = step + 1, 0.0
            for micro_step in range(grad_accum):
                model.forward(*run.train_loader.next_batch(), grad_accum)
                model.backward(micro_step == 0, model=not warming_up, indexer=learns)
                loss += model.mean_loss() / grad_accum
                if learns:
                    loop.check_finite("indexer's", model.mean_kl(), step + 1, args)
            loop.check_finite("train", loss, step + 1, args)
            at, length = (step, warmup) if warming_up else (step - warmup, steps - warmup)
            indexer_lr = args.indexer_lr if warming_up else args.indexer_lr_sparse
            lr, indexer_lr = (
                learning_rate(args.lr_schedule, at, lr=rate, steps=length, **schedule) for rate in (args.lr, indexer_lr)
            )
            norm = model.update(max(0, step + 1 - warmup), lr, (step + 1) * learns, indexer_lr, **adamw)
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
    loop.print_finished(args, device, step - start, seconds)
    return interrupt.exit_code  # 0, but after a signal during the last step


if __name__ == "__main__":
    errors.run(main)
