"""Launchers of torus_attention.cu."""

from kernels.cuda.runtime.grid import THREADS, TILE_THREADS, ceil_div, padded_head, warp_a_row

ROWS = {16: 64, 32: 64, 64: 64, 128: 32}  # padded size of a platter: queries or keys of a tile
PLATTER = "{} channels a platter"  # what padded_head's error calls the size


def torus_attention_forward(cuda, out, lse, qkv, a_s, a_d, NH, D, P, window=-1, wrap_depth=0, causal=1, start=0):
    """As kernels.cpu.torus.torus_attention.torus_attention_forward. Raises UserError for hd > 128."""
    B, T, C3 = qkv.shape
    hd = C3 // 3 // NH // D
    size = padded_head("torus_attention_forward", hd, ROWS, PLATTER)
    grid = (B * NH, ceil_div((T - start) * D, ROWS[size]))
    args = (out, lse, qkv, a_s, a_d, T, NH, D, hd, P, window, wrap_depth, causal, start)
    cuda.launch(f"torus_attention_forward_{size}_kernel", grid, TILE_THREADS, args)


def torus_attention_backward(
    cuda, dqkv, da_s, da_d, dout, qkv, out, lse, a_s, a_d, NH, D, P, window=-1, wrap_depth=0, causal=1
):
    """As kernels.cpu.torus.torus_attention.torus_attention_backward. Raises UserError for hd > 128."""
    B, T, C3 = qkv.shape
    hd = C3 // 3 // NH // D
    size, platters = padded_head("torus_attention_backward", hd, ROWS, PLATTER), B * T * NH * D
    delta = cuda.scratch("attention_delta", (B, NH * D, T))  # attention_delta_kernel takes a platter for a head
    cuda.launch("attention_delta_kernel", *warp_a_row(platters), (delta, dout, out, T, NH * D, hd, platters))
    tiles = ceil_div(T * D, ROWS[size])
    partial = cuda.scratch("torus_attention_partial", (2, NH, B * tiles))
    grid, args = (B * NH, tiles), (dout, qkv, lse, delta, a_s, a_d, T, NH, D, hd, P, window, wrap_depth, causal)
    cuda.launch(f"torus_attention_dkdv_{size}_kernel", grid, TILE_THREADS, (dqkv, *args))
    cuda.launch(f"torus_attention_dq_{size}_kernel", grid, TILE_THREADS, (dqkv, partial, *args))
    if da_s is not None:
        cuda.launch("torus_attention_weights_kernel", NH, THREADS, (da_s, da_d, partial, NH, B * tiles, P, D))
