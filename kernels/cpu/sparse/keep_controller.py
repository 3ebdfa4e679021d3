"""A controller that chooses for each query how many keys it keeps, from statistics of the prefix alone.

    h = relu(w1 f + b1)  (16),   kappa = sigmoid(w2 h + b2),   keep = round(kappa (t+1)), between 1 and min(most, t+1)

f (5) are the features of kernels/cpu/sparse/prefix_features.py and, last, the normalised entropy of the indexer's row.
Rounding passes no gradient: kappa is taught by the share of keys kappa* = m*/(t+1) that would have held the wanted
attention mass, through the cross entropy -kappa* ln kappa - (1 - kappa*) ln(1 - kappa), whose derivative by the logit
is kappa - kappa*. Gradients stop at the features.
"""

import numpy as np

from kernels.cpu.blocks import rows_per_block, scratch
from kernels.cpu.gpt2.column_sum import column_sum

FEATURES, HIDDEN = 5, 16
SPREAD = 0.3  # standard deviation of the first weights
TYPICAL = np.array([1, 1, 2, 1, 1], np.float32)  # features far into a sequence of independent states of variance 1
LARGEST = 80  # minus the logit: beyond it exp would overflow in float32
CERTAIN = 2**-23  # kappa counts as no nearer than this to 0 and 1, so losses stay below 16


def keep_controller_init(generator) -> np.ndarray:
    """w1 (16,5), b1 (16), w2 (1,16), b2 (1), flat float32: normal weights, b1 = 0, b2 such that TYPICAL gives 1/2."""
    w1 = SPREAD * generator.standard_normal((HIDDEN, FEATURES))
    w2 = SPREAD * generator.standard_normal(HIDDEN)
    b2 = -(w2 @ np.maximum(w1 @ TYPICAL, 0))
    return np.concatenate([w1.ravel(), np.zeros(HIDDEN, np.float32), w2, [b2]], dtype=np.float32)


def keep_controller_forward(keep, kappa, hidden, features, w1, b1, w2, b2, first, rows, most, start=0):
    """keep (B,Tq) int32, kappa (B,Tq), hidden (B,Tq,16) from features (B,Tq,5), for queries first .. first + rows - 1.

    w1 (16,5), b1 (16), w2 (1,16), b2 (1). Row 0 of the arrays is position `start`; keep is at most `most`, at least 1.
    """
    block = slice(first - start, first - start + rows)
    f, p, h = features[:, block], kappa[:, block], hidden[:, block]
    term = scratch("keep_controller", h.shape, h.dtype)
    # products by hand: those of BLAS may have other bits for another number of rows
    h[...] = b1
    for i in range(FEATURES):
        h += np.multiply(f[:, :, i, None], w1[:, i], out=term)
    np.maximum(h, 0, out=h)
    np.multiply(h, w2[0], out=term)
    z = scratch("keep_controller_logit", p.shape, p.dtype)
    np.add.reduce(term, axis=2, out=z)
    z += b2
    np.negative(z, out=z)
    np.minimum(z, LARGEST, out=z)
    np.exp(z, out=z)
    z += 1
    np.divide(1, z, out=p)
    counts = np.arange(first + 1, first + rows + 1).astype(p.dtype)
    np.multiply(p, counts, out=z)
    np.rint(z, out=z)
    np.fmin(z, np.minimum(counts, most), out=z)  # fmin takes the other of a NaN and a number: always legal
    np.maximum(z, 1, out=z)
    keep[:, block] = z


def keep_controller_backward(losses, dw1, db1, dw2, db2, target, kappa, hidden, features, w2, dscale):
    """losses (B,T) = cross entropy of kappa (B,T) against target/(t+1), target (B,T) int32: how many keys would have
    been enough. dw1 (16,5), db1 (16), dw2 (1,16), db2 (1) += the gradients of sum(losses) * dscale.

        dz = (kappa - kappa*) dscale,  dw2 = sum dz h,  dh = dz w2 where h > 0,  dw1 = sum dh f
    """
    B, T = kappa.shape
    counts = np.arange(1, T + 1).astype(kappa.dtype)
    per_block = rows_per_block(B, T * HIDDEN)
    for begin in range(0, B, per_block):
        b = slice(begin, min(begin + per_block, B))
        p, wanted, dz = scratch("keep_controller_rows", (3, *kappa[b].shape), kappa.dtype)
        np.divide(target[b], counts, out=wanted, dtype=kappa.dtype, casting="unsafe")
        np.subtract(kappa[b], wanted, out=dz)
        dz *= dscale

        loss = losses[b]  # -ln(1-p) + wanted * (ln(1-p) - ln(p))
        np.clip(kappa[b], CERTAIN, 1 - CERTAIN, out=loss)
        np.log(loss, out=p)
        np.negative(loss, out=loss)
        np.log1p(loss, out=loss)
        np.subtract(loss, p, out=p)
        p *= wanted
        np.subtract(p, loss, out=loss)

        dh = scratch("keep_controller", hidden[b].shape, kappa.dtype)
        np.greater(hidden[b], 0, out=dh, casting="unsafe")
        dh *= w2[0]
        dh *= dz[:, :, None]
        f, h, dh, dz = (array.reshape(dz.size, -1) for array in (features[b], hidden[b], dh, dz))
        dw1 += dh.T @ f
        column_sum(db1, dh)
        dw2 += dz.T @ h
        column_sum(db2, dz)
