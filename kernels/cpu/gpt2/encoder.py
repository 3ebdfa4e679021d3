"""Token plus position embedding (llm.c encoder_forward/backward).

out[b,t] = wte[inp[b,t]] + wpe[t]
"""

import numpy as np

from kernels.cpu.gpt2.append_rows import position


def encoder_forward(out, inp, wte, wpe, start=0):
    """out (B*T,C) from token ids inp (B,T), wte (Vp,C), wpe (maxT,C); the first position is `start`.

    start is a number, or an array (1).
    Raises IndexError for a token id outside 0..Vp-1.
    """
    (B, T), start = inp.shape, position(start)
    if inp.min() < 0 or inp.max() >= len(wte):
        raise IndexError(f"token ids {inp.min()}..{inp.max()}, the embedding has rows 0..{len(wte) - 1}")
    np.take(wte, inp.ravel(), axis=0, out=out, mode="clip")  # "raise" would gather into a temporary first
    out.reshape(B, T, -1)[...] += wpe[start : start + T]


def encoder_backward(dwte, dwpe, dout, inp):
    """dwte (Vp,C) += ..., dwpe (maxT,C) += ... from dout (B*T,C) and token ids inp (B,T).

    Rows are added in the order of the tokens, as llm.c does on the CPU, so repeated tokens sum in a fixed order.
    """
    B, T = inp.shape
    for row, token in zip(dout, inp.ravel()):
        dwte[token] += row
    for b in range(B):
        dwpe[:T] += dout[b * T : (b + 1) * T]
