"""Launchers of attention_tensor.cu: attention.py takes them where there are tensor cores for TF32."""

from kernels.cuda.runtime.grid import TILE_THREADS, ceil_div

ROWS = {64: 128, 128: 64}  # padded head size: rows of a block


def tensor_forward(cuda, out, lse, qkv, NH, start, size):
    """attention_forward for heads padded to `size`; operands of products are rounded only if cuda.tf32."""
    B, T, C3 = qkv.shape
    grid, args = (B * NH, ceil_div(T - start, ROWS[size])), (out, lse, qkv, T, NH, C3 // 3 // NH, start)
    cuda.launch(f"attention_forward_{_products(cuda)}_{size}_kernel", grid, TILE_THREADS, args)


def tensor_backward(cuda, dqkv, dout, qkv, out, lse, NH, size):
    """attention_backward for heads padded to `size`; operands of products are rounded only if cuda.tf32."""
    B, T, C3 = qkv.shape
    delta = cuda.scratch("attention_delta", (B, NH, T))
    grid, sizes = (B * NH, ceil_div(T, ROWS[size])), (T, NH, C3 // 3 // NH)
    dq, dkdv = (f"attention_{part}_{_products(cuda)}_{size}_kernel" for part in ("dq", "dkdv"))
    cuda.launch(dq, grid, TILE_THREADS, (dqkv, delta, dout, qkv, out, lse, *sizes))  # writes delta
    cuda.launch(dkdv, grid, TILE_THREADS, (dqkv, dout, qkv, lse, delta, *sizes))


def _products(cuda) -> str:
    return "tf32" if cuda.tf32 else "3xtf32"
