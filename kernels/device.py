"""Device: what a device can do, op by op; kernels.cpu is one, and so is what kernels.cuda.device makes of a GPU.

An op is a function of Device that has its NumPy in kernels/cpu/<shelf>/<file>.py and its launcher, with `cuda` as one
more argument in front, in kernels/cuda/<shelf>/<file>.py. How one is added is told in kernels/README.md.

Outputs come first; `+=` is said where one is added to, all others are overwritten. Sizes are llm.c's: B rows of a
batch, T tokens, C channels, V of Vp vocabulary entries, L layers, NH heads of hs columns, OC outputs, N = B*T rows.
Tq = T - start where only the tokens from `start` on are computed, S keys of R queries first..first+R-1, K keys in a
list. Arrays are float32, token ids, counts and indices int32. An int that is a choice is 0 or 1.
"""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import numpy as np

SHELVES = ("gpt2", "band", "sparse", "deepseek", "torus")
Array = Any  # an array of the device: NumPy's, CuPy's or the emulator's


class Device(Protocol):
    """Every op and memory function of a device, with its signature."""

    # ------------------------------------------------------------------------------------------------------------------
    # the device and its memory

    tf32: bool  # whether products round their operands to TF32
    graph: str  # whether kernels.graph captures: "auto", "0" or "1"

    def describe(self) -> str:
        """The device's name in the parameter table."""

    def memory_used(self) -> int:
        """Bytes in use: by this process on the CPU, by all processes on a GPU."""

    def zeros(self, shape, dtype=np.float32) -> Array:
        """A new array of zeros."""

    def to_device(self, array: np.ndarray) -> Array:
        """`array` on the device; on the CPU the array itself."""

    def copy_in(self, array: Array, values: np.ndarray) -> None:
        """Overwrite `array` with `values` of the same shape and dtype."""

    def to_host(self, array: Array) -> np.ndarray:
        """`array` in NumPy; on the CPU the array itself."""

    def to_host_later(self, array: Array) -> Callable[[], np.ndarray]:
        """A function that gives `array` in NumPy; the device meanwhile goes on with what follows."""

    def synchronize(self) -> None:
        """Wait until the device has done all it was told to."""

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """A function that does what work() tells the device to do; now nothing of it is done."""

    def all_reduce(self, array: Array, ranks) -> None:
        """array (n) float32 becomes its sum over all processes of `ranks`, which open_device was given; with ZeRO
        this process's part of it does."""

    def all_reduce_begin(self, array: Array, views: list[Array], ranks) -> None:
        """all_reduce of `views` of the array, which may go on beside all that follows, until all_reduce of the array.

        Until then nobody touches them. A graph that is captured begins it anew whenever it is launched."""

    def all_gather(self, array: Array, ranks) -> None:
        """With ZeRO each process of `ranks` has a part of array (n) float32: now all have all. Else nothing."""

    # ------------------------------------------------------------------------------------------------------------------
    # gpt2

    def append_rows(self, cache, rows, start):
        """Rows start.. of a decoder's cache (B,T,C) = rows (B,n,C); start, as below, a number or an array (1) int32."""

    def encoder_forward(self, out, inp, wte, wpe, start=0):
        """out (N,C) from token ids inp (B,Tq), wte (Vp,C), wpe (maxT,C)."""

    def encoder_backward(self, dwte, dwpe, dout, inp):
        """dwte (Vp,C) +=, dwpe (maxT,C) += from dout (N,C), inp (B,T)."""

    def layernorm_forward(self, out, mean, rstd, inp, weight, bias):
        """out (N,C), mean (N), rstd (N) from inp (N,C), weight (C), bias (C)."""

    def fused_residual_forward(self, residual, out, mean, rstd, inp1, inp2, weight, bias):
        """residual (N,C) = inp1 + inp2, then layernorm_forward of it into out, mean, rstd."""

    def layernorm_backward(self, dinp, dweight, dbias, dout, inp, weight, mean, rstd):
        """dinp (N,C) +=, dweight (C) +=, dbias (C) += from dout (N,C)."""

    def matmul_forward(self, out, inp, weight, bias=None):
        """out (N,OC) from inp (N,C), weight (OC,C), bias (OC)."""

    def matmul_backward(self, dinp, dweight, dbias, dout, inp, weight, beta=0):
        """dinp (N,C), dweight (OC,C) = beta * dweight + .., dbias (OC) += from dout (N,OC); None is not wanted."""

    def attention_forward(self, out, lse, qkv, NH, start=0):
        """out (B*Tq,C), lse (B,NH,Tq) from qkv (B,T,3C); with an array `start`, qkv may have more rows than tokens."""

    def attention_backward(self, dqkv, dout, qkv, out, lse, NH):
        """dqkv (B,T,3C) from dout, out (N,C), qkv (B,T,3C), lse (B,NH,T)."""

    def residual_forward(self, out, inp1, inp2):
        """out = inp1 + inp2, all (N,C)."""

    def gelu_forward(self, out, inp):
        """out from inp, any shape; inp becomes what gelu_backward needs, on the CPU the derivative, on a GPU itself."""

    def gelu_backward(self, dinp, inp, dout):
        """dinp from dout and what gelu_forward left in inp, any shape."""

    def fused_classifier(self, losses, logits, targets, V, dloss):
        """losses (N) from logits (N,Vp), targets (N); logits become their gradient times dloss."""

    def column_sum(self, out, inp):
        """out (C) += the sums over the rows of inp (N,C)."""

    def global_norm(self, norm, grads):
        """norm (1): the Euclidean norm of a flat array."""

    def adamw_update(self, params, grads, m, v, rates, norm):
        """Update params, m, v, of one shape, by rates (6) of adamw_rates and the gradient's norm (1)."""

    def adamw_update_all(self, params, grads, m, v, updates, rates, norm):
        """adamw_update for each of `updates`, (views of these flat buffers, row of rates (groups,6))."""

    # ------------------------------------------------------------------------------------------------------------------
    # band

    def band_mask(self, weight, bandwidth, place=None):
        """weight (L,4C,C) or (L,C,4C): zero outside the band; row j as row place[j] of the diagonal band, if given."""

    def band_matmul_forward(self, out, inp, weight, bias, bandwidth):
        """out (N,OC) from inp (N,C), weight (OC,C) zero outside its band, bias (OC); bandwidth 0 is no band."""

    def band_matmul_backward(self, dinp, dweight, dbias, dout, inp, weight, bandwidth, beta=0):
        """matmul_backward, dweight inside the band alone."""

    def band_adamw_update(self, params, grads, m, v, bandwidth, rates, norm):
        """adamw_update of banded weights (L,OC,C), inside the band alone."""

    # ------------------------------------------------------------------------------------------------------------------
    # sparse

    def rope_forward(self, x, heads, rotated, start=0):
        """x (B,T,heads*width) in place: the first `rotated` columns of each head turn with the position."""

    def rope_backward(self, x, heads, rotated, start=0):
        """The gradient x (B,T,heads*width) in place."""

    def indexer_scores_forward(self, scores, q, k, w, scale, first, start=0):
        """scores (B,R,S), -inf for the future, from q (B,Tq,HI*dI), k (B,Tk,dI or HI*dI), w (B,Tq,HI)."""

    def indexer_scores_backward(self, dq, dk, dw, dscores, q, k, w, scale, first):
        """Rows first..first+R-1 of dq (B,T,HI*dI) and dw (B,T,HI), dk +=, from dscores (B,R,S)."""

    def indexer_gathered_forward(self, scores, q, k, w, index, count, scale):
        """scores (B,T,K) of the keys index (B,T,K), count (B,T); -inf behind a list's end."""

    def indexer_gathered_backward(self, dq, dk, dw, dscores, q, k, w, index, count, scale):
        """dq, dk, dw, like q, k, w, from dscores (B,T,K)."""

    def random_scores(self, scores, seed, first):
        """scores (B,R,S) in [0,1) from seed (1) int32 and the place, -inf for the future."""

    def select_topk(self, index, count, scores, keep, first, start=0, force_self=1, sink=0, leak=0):
        """index (B,Tq,K), count (B,Tq): the keys of the keep (B,Tq) highest scores (B,R,S), ascending, then -1."""

    def share_topk(self, index, count, sums, scores, k, share, first, start=0, sink=0):
        """index (B,Tq,K), count (B,Tq) of tiles of `share` queries: the highest sums (B,M,S) of scores (B,R,S)."""

    def mass_count(self, keep, scores, mass, first, start=0, softmax=1):
        """keep (B,Tq): how many keys hold `mass` of the scores (B,R,S), of their softmax if that is 1."""

    def row_entropy(self, entropy, scores, first, start=0):
        """entropy (B,Tq), or the last column of (B,Tq,W): how evenly softmax(scores (B,R,S)) spreads, 0..1."""

    def sparse_attention_forward(self, out, lse, qkv, index, count, NH, start=0):
        """out (B*Tq,C), lse (B,NH,Tq) from qkv (B,T,3C) and the keys index (B,Tq,K), count (B,Tq)."""

    def sparse_attention_backward(self, dqkv, dout, qkv, out, lse, index, count, NH):
        """dqkv (B,T,3C) from dout, out (N,C), qkv (B,T,3C), lse (B,NH,T), index (B,T,K), count (B,T)."""

    def sparse_attention_mean(self, p, qkv, lse, index, count, NH):
        """p (B,T,K): attention to the keys index (B,T,K), averaged over heads."""

    def attention_mean(self, p, qkv, lse, NH, first, start=0):
        """p (B,R,S): dense attention averaged over heads, from qkv (B,T,3C), lse (B,NH,Tq)."""

    def fused_kl(self, losses, scores, p, dscale, first=0):
        """losses (B,T)[:, first:first+R] = KL(p || softmax(scores)), both (B,R,S); scores become their gradient."""

    def prefix_features(self, features, state, x, maxT, start=0):
        """features (B,Tq,5), columns 0..3, from x (B,Tq,C); state (B,4,C) goes from one call to the next."""

    def keep_controller_forward(self, keep, kappa, hidden, features, w1, b1, w2, b2, first, rows, most, start=0):
        """keep (B,Tq), kappa (B,Tq), hidden (B,Tq,16) from features (B,Tq,5), w1 (16,5), b1 (16), w2 (1,16), b2 (1)."""

    def keep_controller_backward(self, losses, dw1, db1, dw2, db2, target, kappa, hidden, features, w2, dscale):
        """losses (B,T), dw1, db1, dw2, db2 += from target (B,T), the keys that would have been enough."""

    def upstream_controller(self, keep, x, params, maxpos=2048):
        """keep (B,T): the published controller's k of each sequence, from x (B,T,C) and its flat params."""

    # ------------------------------------------------------------------------------------------------------------------
    # deepseek

    def rmsnorm_forward(self, out, rrms, inp, weight):
        """out (N,C), rrms (N) from the first C columns of inp (N,>=C), weight (C)."""

    def rmsnorm_backward(self, dinp, dweight, dout, inp, weight, rrms):
        """The first C columns of dinp (N,>=C), dweight (C) +=, from dout (N,C)."""

    def mla_qkv_forward(self, qkv, q, kv, kva, NH, R, start=0):
        """qkv (B,T,3C) from q (N,C), kv (N,NH*(2hs-R)) and the last R columns of kva (N,kv_rank+R)."""

    def mla_qkv_backward(self, dq, dkv, dkva, dqkv, NH, R):
        """dq (N,C), dkv (N,NH*(2hs-R)), last R columns of dkva (N,kv_rank+R) from dqkv (B,T,3C)."""

    def mla_latent(self, latent, normed, kva, start=0):
        """Rows start.. of the cache latent (S,kv_rank+R) from normed (n,kv_rank), kva (n,kv_rank+R)."""

    def mla_absorb(self, qlat, q, kvbw, NH, R, start=0):
        """qlat (n,NH,kv_rank+R) from q (n,C), kvbw (NH*(2hs-R),kv_rank): queries that meet latents."""

    def mla_expand(self, out, olat, kvbw, NH, R):
        """out (n,C) from olat (n,NH,kv_rank), kvbw (NH*(2hs-R),kv_rank)."""

    def latent_attention_forward(self, out, qlat, latent, index, count, scale, start=0):
        """out (n,NH,kv_rank) from qlat (n,NH,kv_rank+R), latent (S,kv_rank+R), all of it or by index (1,n,K)."""

    def silu_forward(self, out, inp):
        """out from inp, any shape."""

    def silu_backward(self, dinp, inp, dout):
        """dinp from inp, dout, any shape."""

    def router_forward(self, probs, gates, experts, logits):
        """probs (N,E), gates (N,top), experts (N,top) from logits (N,E)."""

    def router_backward(self, dlogits, dgates, probs, gates, experts, load, balance):
        """dlogits (N,E) from dgates (N,top) and `balance` times the balance loss; load (E)."""

    def expert_plan(self, slot, source, tile_expert, load, experts):
        """slot (N,top), source (rows), tile_expert (rows/tile), load (E) from experts (N,top)."""

    def expert_gather(self, rows_inp, inp, source, top):
        """rows_inp (rows,C): the experts' rows of inp (N,C), 0 for padding."""

    def expert_scatter(self, dinp, drows, slot):
        """dinp (N,C): the sums over a token's experts of drows (rows,C); slot (N,top)."""

    def expert_combine_forward(self, out, y, gates, slot):
        """out (N,C): the sums over a token's experts of gate times row of y (rows,C)."""

    def expert_combine_backward(self, dy, dgates, dout, y, gates, slot, source):
        """dy (rows,C), dgates (N,top) from dout (N,C), y (rows,C)."""

    def expert_matmul_forward(self, out, inp, weight, tile_expert):
        """out (rows,OC) from inp (rows,C), weight (E,OC,C), tile_expert (rows/tile)."""

    def expert_matmul_backward(self, dinp, dweight, dout, inp, weight, tile_expert, beta=0):
        """dinp (rows,C) or None, dweight (E,OC,C) = beta * dweight + .., from dout (rows,OC)."""

    # ------------------------------------------------------------------------------------------------------------------
    # torus

    def torus_rope_forward(self, qkv, w, f, NH, D, P, start=0):
        """q and k of qkv (B,T,3C) in place: turns w (hd/2) round the ring, f (hd/2) in depth; D platters of hd."""

    def torus_rope_backward(self, qkv, w, f, NH, D, P, start=0):
        """The gradient of q and k in qkv (B,T,3C), in place."""

    def torus_attention_forward(self, out, lse, qkv, a_s, a_d, NH, D, P, window=-1, wrap_depth=0, causal=1, start=0):
        """out (B*Tq,C), lse (B,NH,Tq,D) from qkv (B,T,3C), a_s (NH), a_d (NH), on a ring of P tokens."""

    def torus_attention_backward(
        self, dqkv, da_s, da_d, dout, qkv, out, lse, a_s, a_d, NH, D, P, window=-1, wrap_depth=0, causal=1
    ):
        """dqkv (B,T,3C), da_s (NH) +=, da_d (NH) += (or both None) from dout, out (N,C), lse (B,NH,T,D)."""

    def depth_fusion_forward(self, out, inp, omega, NH, depth_major=0):
        """out (N,C) from inp (N,C), omega (D,D): platters of a head mix."""

    def depth_fusion_backward(self, dinp, domega, dout, inp, omega, NH, depth_major=0):
        """dinp (N,C), domega (D,D) += (or None) from dout, inp (N,C), omega (D,D)."""

    def fusion_matrix_forward(self, omega, first, second, mode):
        """omega (D,D) from first, second (D,r), by a mode of FUSIONS."""

    def fusion_matrix_backward(self, dfirst, dsecond, domega, omega, first, second, mode):
        """dfirst +=, dsecond += (D,r) from domega, omega (D,D)."""


NAMES = [*Device.__annotations__, *(name for name in vars(Device) if name[0] != "_")]


def ops_on_shelves(where: str) -> dict[str, Callable]:
    """name -> function of the ops that Device lists, as the files on the shelves of kernels/<where> define them."""
    found = {}
    for shelf in SHELVES:
        for path in sorted((Path(__file__).parent / where / shelf).glob("*.py")):
            module = import_module(f"kernels.{where}.{shelf}.{path.stem}")
            listed = {name: value for name, value in vars(module).items() if name in NAMES}
            found |= {name: value for name, value in listed.items() if value.__module__ == module.__name__}
    return found
