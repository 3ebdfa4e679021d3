"""Parts of a layer that train_sparse_attn.py chooses from, and what all parts have in common.

Selection is that of all selectors. Latents (AbsorbedLatents where text is decoded) and Experts are DeepSeek's MLA and
MoE in the place of GPT-2's Heads and MLP; UpstreamIndexer is the published experiments' in the place of Lightning.
"""

from types import SimpleNamespace

import numpy as np

from kernels.cpu.deepseek.expert_plan import expert_rows
from kernels.cpu.sparse.keep_controller import FEATURES, HIDDEN
from kernels.cpu.sparse.share_topk import tile_sums
from llmc.buffers import query_blocks
from llmc.checkpoint import GPT2Config
from systems.selection import kept_pairs
from systems.sparsity import SCORED, Sparsity, is_mla


class Part:
    """A part of every layer. shapes: its activations; kept: channels of what every position keeps for later queries.

    Methods take l, the layer; a, its activations; d and g, gradients of activations and of parameters; beta, 0 to write
    the gradients in WRITTEN, 1 to add to them. N = B * T rows. Activations named in `scratch` are one buffer for all
    layers, those in `integers` are int32, those in `gradients` have a gradient in d.
    """

    scratch = integers = gradients = ()

    def __init__(self, ops, config: GPT2Config, sparsity: Sparsity, params: SimpleNamespace):
        self.ops, self.config, self.sparsity, self.params = ops, config, sparsity, params
        self.mla = is_mla(config)

    def shapes(self, B: int, T: int) -> dict:
        return {}

    def kept(self) -> dict:
        return {}


class Attention(Part):
    """Queries, keys and values of all heads, in a.qkv (B,T,3C)."""

    gradients = ("qkv",)

    def kept(self) -> dict:
        return dict(qkv=3 * self.config.C)

    def attend(self, l: int, a, start: int, dense: bool):
        """a.atty (N,C): what the queries from `start` on see of all keys, or of those selected."""
        if dense:
            self.ops.attention_forward(a.atty, a.lse, a.qkv, self.config.NH, start)
        else:
            self.ops.sparse_attention_forward(a.atty, a.lse, a.qkv, a.index, a.count, self.config.NH, start)


class Latents(Attention):
    """Multi-head latent attention: queries through one normed latent, keys and values through another (DeepSeek-V2)."""

    scratch = ("q", "kv")
    gradients = ("qkv", "q", "kv", "qa", "qn", "kva", "kvn")

    def shapes(self, B: int, T: int) -> dict:
        c, N = self.config, B * T
        return dict(
            qa=(N, c.q_rank),  # the queries' latent
            qn=(N, c.q_rank),  # normed
            q_rrms=(N,),
            q=(N, c.C),
            kva=(N, c.kv_rank + c.R),  # the latent of keys and values, then the rotary key
            kvn=(N, c.kv_rank),  # normed
            kv_rrms=(N,),
            kv=(N, c.NH * (2 * c.C // c.NH - c.R)),
        )

    def latents(self, l: int, a):
        """a.q by way of a.qn; a.kvn and a.kva, of which keys and values are made."""
        ops, p = self.ops, self.params
        ops.matmul_forward(a.qa, a.ln1, p.qaw[l])
        ops.rmsnorm_forward(a.qn, a.q_rrms, a.qa, p.qnw[l])
        ops.matmul_forward(a.q, a.qn, p.qbw[l])
        ops.matmul_forward(a.kva, a.ln1, p.kvaw[l])
        ops.rmsnorm_forward(a.kvn, a.kv_rrms, a.kva, p.kvnw[l])

    def forward(self, l: int, a, start: int = 0):
        """The rows from `start` of a.qkv (B,start+T,3C), of a.ln1 (N,C)."""
        self.latents(l, a)
        self.expand(l, a, start)

    def expand(self, l: int, a, start: int):
        """The rows from `start` of a.qkv, of a.q, a.kvn and a.kva."""
        self.ops.matmul_forward(a.kv, a.kvn, self.params.kvbw[l])
        self.ops.mla_qkv_forward(a.qkv[:, start:], a.q, a.kv, a.kva, self.config.NH, self.config.R, start)

    def backward(self, l: int, a, d, g, beta: int):
        """d.btc (N,C), the gradient at a.ln1, from d.qkv (B,T,3C), through both latents."""
        ops, p = self.ops, self.params
        ops.mla_qkv_backward(d.q, d.kv, d.kva, d.qkv, self.config.NH, self.config.R)
        ops.matmul_backward(d.qn, g.qbw[l], None, d.q, a.qn, p.qbw[l], beta)
        ops.rmsnorm_backward(d.qa, g.qnw[l], d.qn, a.qa, p.qnw[l], a.q_rrms)
        ops.matmul_backward(d.btc, g.qaw[l], None, d.qa, a.ln1, p.qaw[l], beta)
        ops.matmul_backward(d.kvn, g.kvbw[l], None, d.kv, a.kvn, p.kvbw[l], beta)
        ops.rmsnorm_backward(d.kva, g.kvnw[l], d.kvn, a.kva, p.kvnw[l], a.kv_rrms)
        ops.matmul_backward(a.btc, g.kvaw[l], None, d.kva, a.ln1, p.kvaw[l], beta)
        ops.residual_forward(d.btc, d.btc, a.btc)


class AbsorbedLatents(Latents):
    """MLA for decoding: queries and outputs live in the keys' latent space, and a position keeps kv_rank + R values.

    A prompt, which sees itself alone, has the same products with kvbw in both forms; where the rest is less work, its
    heads have keys and values of their own.
    """

    def kept(self) -> dict:
        return dict(latent=self.config.kv_rank + self.config.R)

    def shapes(self, B: int, T: int) -> dict:
        c, N = self.config, B * T
        absorbed = dict(qlat=(N, c.NH, c.kv_rank + c.R), olat=(N, c.NH, c.kv_rank))
        return super().shapes(B, T) | absorbed | dict(qkv=(B, T, 3 * c.C))

    def forward(self, l: int, a, start: int = 0):
        """The rows from `start` of a.latent (1,start+T,kv_rank+R), of a.ln1 (T,C)."""
        self.latents(l, a)
        self.ops.mla_latent(a.latent[0], a.kvn, a.kva, start)

    def expands(self, l: int, n: int, dense: bool) -> bool:
        """Whether a prompt of n tokens is expanded, by a head's multiplications.

        2 hs with every key up to the query, as tiles have them whatever is selected; 2 kv_rank + R with those that are.
        """
        c, s, pairs = self.config, self.sparsity, n * (n + 1) // 2
        selected = pairs if dense else kept_pairs(s.k[l], n, s.share)
        return pairs * 2 * (c.C // c.NH) < selected * (2 * c.kv_rank + c.R)

    def attend(self, l: int, a, start: int, dense: bool):
        """a.atty (T,C): what the queries from `start` on see of all keys, or of those selected."""
        if start == 0 and self.expands(l, len(a.q), dense):
            self.expand(l, a, 0)
            return super().attend(l, a, 0, dense)
        ops, c, kvbw = self.ops, self.config, self.params.kvbw[l]
        index, count = (None, None) if dense else (a.index, a.count)
        ops.mla_absorb(a.qlat, a.q, kvbw, c.NH, c.R, start)
        ops.latent_attention_forward(a.olat, a.qlat, a.latent[0], index, count, (c.C // c.NH) ** -0.5, start)
        ops.mla_expand(a.atty, a.olat, kvbw, c.NH, c.R)


class Experts(Part):
    """A mixture of experts: a token goes to the `top` experts that a router likes best, and comes back as their sum."""

    scratch = ("router", "exi", "exa")
    integers = ("experts", "slot", "source", "tile_expert", "load")
    gradients = ("router", "gates", "exi", "exa", "exy")

    def shapes(self, B: int, T: int) -> dict:
        c, N = self.config, B * T
        rows, tile = expert_rows(N, c.top, c.E)
        return dict(
            router=(N, c.E),  # logits
            probs=(N, c.E),  # softmax over all experts
            gates=(N, c.top),  # softmax over the token's own: the weights of their outputs
            experts=(N, c.top),  # the token's own
            slot=(N, c.top),  # the row of each
            source=(rows,),  # the token of a row
            tile_expert=(rows // tile,),  # the expert of a tile of rows
            load=(c.E,),  # tokens of an expert
            exi=(rows, c.C),  # inputs
            exh=(rows, c.F),  # hidden units
            exa=(rows, c.F),  # after the SiLU
            exy=(rows, c.C),  # outputs
        )

    def forward(self, l: int, a, again: bool = False):
        """a.residual3 (N,C), what is added to the stream, from a.ln2 (N,C); again: all but that."""
        ops, p = self.ops, self.params
        ops.matmul_forward(a.router, a.ln2, p.routerw[l])
        ops.router_forward(a.probs, a.gates, a.experts, a.router)
        ops.expert_plan(a.slot, a.source, a.tile_expert, a.load, a.experts)
        ops.expert_gather(a.exi, a.ln2, a.source, self.config.top)
        ops.expert_matmul_forward(a.exh, a.exi, p.expertw[l], a.tile_expert)
        ops.silu_forward(a.exa, a.exh)
        ops.expert_matmul_forward(a.exy, a.exa, p.expertprojw[l], a.tile_expert)
        if not again:
            ops.expert_combine_forward(a.residual3, a.exy, a.gates, a.slot)

    def backward(self, l: int, a, d, g, beta: int, balance: float):
        """d.btc (N,C), the gradient at a.ln2, from d.residual (N,C) and from `balance` times the load-balance loss."""
        ops, p = self.ops, self.params
        ops.expert_combine_backward(d.exy, d.gates, d.residual, a.exy, a.gates, a.slot, a.source)
        ops.silu_forward(a.exa, a.exh)
        ops.expert_matmul_backward(d.exa, g.expertprojw[l], d.exy, a.exa, p.expertprojw[l], a.tile_expert, beta)
        ops.silu_backward(d.exa, a.exh, d.exa)
        ops.expert_gather(a.exi, a.ln2, a.source, self.config.top)
        ops.expert_matmul_backward(d.exi, g.expertw[l], d.exa, a.exi, p.expertw[l], a.tile_expert, beta)
        ops.router_backward(d.router, d.gates, a.probs, a.gates, a.experts, a.load, balance)
        ops.matmul_backward(a.btc, g.routerw[l], None, d.router, a.ln2, p.routerw[l], beta)
        ops.expert_scatter(d.btc, d.exi, a.slot)
        ops.residual_forward(d.btc, d.btc, a.btc)


class NoIndexer(Part):
    """For selectors that need none."""

    def forward(self, l: int, a, start: int = 0):
        pass


class UpstreamIndexer(Part):
    """The published experiments' indexer: a key per head, head weights the same for all tokens, no rotation."""

    gradients = ("iq", "ik", "iw")
    scale = 1.0

    def __init__(self, ops, config: GPT2Config, sparsity: Sparsity, params: SimpleNamespace):
        super().__init__(ops, config, sparsity, params)
        self.no_weights = ops.zeros((sparsity.heads, config.C))  # a token's share in its head weights

    def kept(self) -> dict:
        return dict(ik=self.sparsity.heads * self.sparsity.width)

    def shapes(self, B: int, T: int) -> dict:
        heads, width = self.sparsity.heads, self.sparsity.width
        return dict(iq=(B, T, heads * width), iw=(B, T, heads), kl=(B, T))

    def forward(self, l: int, a, start: int = 0):
        """a.iq, a.iw and the rows from `start` of a.ik, of a.ln1 (N,C)."""
        ops, p, N = self.ops, self.params, len(a.ln1)
        ops.matmul_forward(a.iq.reshape(N, -1), a.ln1, p.idxqw[l], p.idxqb[l])
        ops.matmul_forward(a.ik[:, start:].reshape(N, -1), a.ln1, p.idxkw[l], p.idxkb[l])
        ops.matmul_forward(a.iw.reshape(N, -1), a.ln1, self.no_weights, p.idxwb[l])

    def backward(self, l: int, a, d, g, beta: int):
        """The gradients of its tensors, from d.iq, d.ik and d.iw; none flows on into its input."""
        ops, p, N = self.ops, self.params, len(a.ln1)
        ops.matmul_backward(None, g.idxqw[l], g.idxqb[l], d.iq.reshape(N, -1), a.ln1, p.idxqw[l], beta)
        ops.matmul_backward(None, g.idxkw[l], g.idxkb[l], d.ik.reshape(N, -1), a.ln1, p.idxkw[l], beta)
        ops.column_sum(g.idxwb[l], d.iw.reshape(N, -1))


class Selection(Part):
    """The keys of each query: those with the best scores, as many as k[l] or, if k adapts, as its selector allows."""

    integers = ("keep", "count", "index")

    def __init__(self, ops, config: GPT2Config, sparsity: Sparsity, params: SimpleNamespace, indexer: Part, rows: int):
        super().__init__(ops, config, sparsity, params)
        self.rows = rows  # of queries whose scores are in memory at a time
        self.indexer, self.seeds = indexer, ops.zeros(config.L, np.int32)  # of the random selector, by layer

    def shapes_of(self, l: int, B: int, T: int, keys: int) -> dict:
        s, shapes = self.sparsity, {}
        if s.attention == "sparse":
            shapes |= dict(
                keep=(B, T),  # how many keys a query may keep
                count=(B, T),  # how many it has
                index=(B, T, min(s.k[l], keys)),  # where they are, then -1
            )
        if s.share > 1:
            shapes |= dict(sums=(B, tile_sums(self.rows, s.share), keys))  # of the scores of a tile's queries, by tile
        if s.adaptive == "prefix":
            shapes |= dict(
                features=(B, T, FEATURES),  # what the tokens up to a query are like
                state=(B, 4, self.config.C),  # the sums behind them
                hidden=(B, T, HIDDEN),
                kappa=(B, T),  # the share of keys that the controller keeps
            )
        return shapes

    def draw(self, number: int) -> None:
        """Seed the random selector for its draw of that number."""
        if self.sparsity.selector == "random":
            seeds = (self.sparsity.seed + 1000003 * number) % 2**32 + 7919 * np.arange(self.config.L)
            self.ops.copy_in(self.seeds, seeds.astype(np.uint32).view(np.int32))

    def forward(self, l: int, a, start: int, leak: bool):
        """a.index, a.count of the queries at positions start.., a block of them at a time."""
        ops, s, (B, T) = self.ops, self.sparsity, a.count.shape
        if s.selector == "oracle":
            ops.attention_forward(a.btc, a.dense_lse, a.qkv, self.config.NH, start)
        if s.adaptive == "prefix":
            ops.prefix_features(a.features, a.state, a.ln1.reshape(B, T, -1), self.config.maxT, start)
        elif s.adaptive == "upstream":  # all tokens that there are decide
            ops.upstream_controller(a.keep, a.seen, self.params.controller[l])
        else:
            a.keep.fill(s.k[l])
        for first, scores in query_blocks(a.scores, B, start, start + T, self.rows):
            self.score(l, a, scores, first, start)
            if s.share > 1:
                ops.share_topk(a.index, a.count, a.sums, scores, s.k[l], s.share, first, start, int(s.sink))
                continue
            if s.selector == "top-p":
                ops.mass_count(a.keep, scores, s.coverage, first, start, 1)
            if s.adaptive == "prefix":
                self.prefix_keep(l, a, scores, first, start)
            ops.select_topk(a.index, a.count, scores, a.keep, first, start, int(s.force_self), int(s.sink), int(leak))

    def score(self, l: int, a, scores, first: int, start: int):
        """scores (B,rows,keys) of the queries at positions first..; of equal scores the most recent key's wins."""
        ops, selector = self.ops, self.sparsity.selector
        if selector == "oracle":
            ops.attention_mean(scores, a.qkv, a.dense_lse, self.config.NH, first, start)
        elif selector == "random":
            ops.random_scores(scores, self.seeds[l : l + 1], first)
        elif selector == "recency":
            scores.fill(0)
        elif selector in SCORED:
            ops.indexer_scores_forward(scores, a.iq, a.ik, a.iw, self.indexer.scale, first, start)

    def prefix_keep(self, l: int, a, scores, first: int, start: int):
        """a.keep of a block of queries, from the features of what came before and the entropy of their scores."""
        ops, p, rows, k = self.ops, self.params, scores.shape[1], self.sparsity.k[l]
        w1, b1, w2, b2 = p.ctlw1[l], p.ctlb1[l], p.ctlw2[l], p.ctlb2[l]
        ops.row_entropy(a.features, scores, first, start)  # the last feature
        ops.keep_controller_forward(a.keep, a.kappa, a.hidden, a.features, w1, b1, w2, b2, first, rows, k, start)
