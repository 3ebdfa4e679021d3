"""Tokens' rows to their experts and back: expert_plan says which row is whose.

gather    rows[r] = x[token of r], 0 for padding            its backward, scatter: dx_n = sum_j drows[slot_nj]
combine   out_n = sum_j g_nj y[slot_nj]                     dy[slot_nj] = g_nj dout_n,   dg_nj = dout_n . y[slot_nj]
"""

import numpy as np

from kernels.cpu.blocks import for_blocks, rows_per_block, scratch


def expert_gather(rows_inp, inp, source, top):
    """rows_inp (rows,C) = the token's row of inp (N,C), 0 for padding; source (rows) int32, top experts a token."""
    rows, C = rows_inp.shape

    def block(start, stop):
        _take_tokens(rows_inp[start:stop], inp, source[start:stop], top)

    for_blocks(block, rows, rows_per_block(rows, C), C)


def expert_scatter(dinp, drows, slot):
    """dinp (N,C) = sum over a token's experts, in their order, of its rows of drows (rows,C); slot (N,top) int32."""
    _sum_rows(dinp, drows, slot, None)


def expert_combine_forward(out, y, gates, slot):
    """out (N,C) = sum over a token's experts, in their order, of gate times row; y (rows,C), gates, slot (N,top)."""
    _sum_rows(out, y, slot, gates)


def expert_combine_backward(dy, dgates, dout, y, gates, slot, source):
    """dy (rows,C) = ..., 0 for padding, dgates (N,top) = ... from dout (N,C), y (rows,C); dy may be y.

    gates, slot (N,top) and source (rows) are router_forward's and expert_plan's.
    """
    (rows, C), (N, top) = dy.shape, slot.shape
    gate_of = gates.reshape(-1)

    def tokens(start, stop):
        taken = scratch("expert_rows", (stop - start, C), y.dtype)
        for j in range(top):
            np.take(y, slot[start:stop, j], axis=0, out=taken, mode="clip")
            dgates[start:stop, j] = np.einsum("nc,nc->n", dout[start:stop], taken)

    def block(start, stop):
        _take_tokens(dy[start:stop], dout, source[start:stop], top)
        dy[start:stop] *= gate_of[source[start:stop], None]  # padding takes the last gate, times 0

    for_blocks(tokens, N, rows_per_block(N, C), C)
    for_blocks(block, rows, rows_per_block(rows, C), C)


def _take_tokens(out, inp, source, top):
    """out (n,C) = rows of inp by assignment, 0 for padding"""
    np.take(inp, source // top, axis=0, out=out, mode="clip")  # "raise" would go through a temporary
    out[source < 0] = 0


def _sum_rows(out, inp, slot, gates):
    """out (N,C) = sum_j inp[slot[:,j]], times gates[:,j] if there are any"""
    N, C = out.shape

    def tokens(start, stop):
        total = out[start:stop]
        taken = scratch("expert_rows", total.shape, total.dtype)
        for j in range(slot.shape[1]):
            into = taken if j else total
            np.take(inp, slot[start:stop, j], axis=0, out=into, mode="clip")
            if gates is not None:
                into *= gates[start:stop, j, None]
            if j:
                total += into

    for_blocks(tokens, N, rows_per_block(N, C), C)
