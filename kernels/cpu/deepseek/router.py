"""The router of a mixture of experts (Shazeer et al. 2017), and the gradient of its balance loss (Fedus et al. 2021).

    p = softmax over all experts of a token's logits z;   the token's experts: those of its `top` largest logits
    g = softmax over the logits of these alone: the weights of their outputs
    balance = E sum_e f_e P_e,   f_e = load_e / (N top), a constant to the gradient;   P_e = mean over tokens of p_e

balance is 1 where all experts get the same.
"""

import numpy as np

from kernels.cpu.blocks import for_blocks, rows_per_block, scratch


def router_forward(probs, gates, experts, logits):
    """probs (N,E), gates (N,top), experts (N,top) int32 from logits (N,E).

    A token's experts stand in descending order of their logits; of equal ones the lower number comes first.
    """
    (N, E), top = logits.shape, experts.shape[1]

    def rows(start, stop):
        z = scratch("router", (stop - start, E), logits.dtype)
        np.negative(logits[start:stop], out=z)
        chosen = z.argsort(axis=1, kind="stable")[:, :top]
        experts[start:stop] = chosen
        gates[start:stop] = np.take_along_axis(logits[start:stop], chosen, axis=1)
        probs[start:stop] = logits[start:stop]
        _softmax(gates[start:stop])
        _softmax(probs[start:stop])

    for_blocks(rows, N, rows_per_block(N, E), E)


def _softmax(z):
    """Rows of z (n,m) become their softmax."""
    z -= z.max(axis=1, keepdims=True)
    np.exp(z, out=z)
    z /= z.sum(axis=1, keepdims=True)


def router_backward(dlogits, dgates, probs, gates, experts, load, balance):
    """dlogits (N,E) = ... from dgates (N,top) and balance times the balance loss.

        dz_e = p_e (dp_e - sum_e' p_e' dp_e'),   dp_e = balance E f_e / N,   for every e
        dz_e += g_j (dg_j - sum_j' g_j' dg_j')   for e the token's j-th expert

    probs (N,E), gates, experts (N,top) are router_forward's, load (E) is expert_plan's.
    """
    (N, E), top = probs.shape, gates.shape[1]
    dprobs = (balance * E / (N * top) / N * load).astype(probs.dtype)  # (E)

    def rows(start, stop):
        p, g, dg = probs[start:stop], gates[start:stop], dgates[start:stop]
        chosen = experts[start:stop]
        dz = dlogits[start:stop]
        np.subtract(dprobs, np.einsum("ne,e->n", p, dprobs)[:, None], out=dz)
        dz *= p
        dg = g * (dg - np.einsum("nj,nj->n", g, dg)[:, None])  # (n,top)
        dz[np.arange(stop - start)[:, None], chosen] += dg  # a token's experts differ

    for_blocks(rows, N, rows_per_block(N, E), E)
