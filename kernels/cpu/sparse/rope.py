"""Rotary position embedding, RoPE (Su et al. 2021), of neighbouring pairs of dimensions: kernels/cpu/rotation.py.

After it q_t . k_s depends on t - s alone.
"""

from kernels.cpu.blocks import for_blocks, rows_per_block
from kernels.cpu.rotation import pairs, turns


def rope_forward(x, heads, rotated, start=0):
    """x (B,T,heads*width) in place: the first `rotated` dimensions of each head, at positions start..start+T-1.

    rotated: even, 2 to width.
    """
    _rotate(x, heads, rotated, start, back=False)


def rope_backward(x, heads, rotated, start=0):
    """The gradient x (B,T,heads*width) in place: a rotation's transpose is the rotation back."""
    _rotate(x, heads, rotated, start, back=True)


def _rotate(x, heads, rotated, start, back):
    B, T, W = x.shape
    turned = pairs(x.reshape(B, T, heads, -1)[..., :rotated])
    table = turns(start, start + T, rotated, x.dtype, back)

    def rows(begin, stop):
        turned[:, begin:stop] *= table[begin:stop, None]

    for_blocks(rows, T, rows_per_block(T, B * W), B * W)
