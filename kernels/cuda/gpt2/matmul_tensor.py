"""Launchers of matmul_tensor.cu, dense products in 3xTF32: matmul.py takes them where they beat cuBLAS's float32."""

from kernels.cuda.runtime.grid import THREADS, ceil_div
from kernels.cuda.runtime.tensor_cores import product_trial, takes_tensor_cores

ROWS, COLUMNS = 128, 64  # sides of a tile in matmul_tensor.cu
GROUPS = 2  # row groups of a warp, MI in gemm_mma.cuh: blocks of a tile that join parts
MULTIPROCESSORS = 132  # an H100's; an A100 has 108, a B200 148
PART = 256  # rows at least that a part of a weight gradient sums over: it is written and read back once for them
# compute capabilities where make bench_gpu, which has a row of products by 3xTF32, found them faster than cuBLAS's in
# float32: none so far. by its operations FC1 at N = 4096, C = 768 would take 240 to 290 us on an H100, cuBLAS took 385
# to 418
FASTER_THAN_CUBLAS: frozenset[tuple[int, int]] = frozenset()


def tensor_products(cuda, trial=product_trial) -> str | None:
    """How the GPU's tensor cores multiply in our kernels: "tf32", "3xtf32" for float32's accuracy; None: not at all."""
    if not takes_tensor_cores(cuda, trial):
        return None
    return "tf32" if cuda.tf32 else "3xtf32"


def takes_matmul(cuda, tiles: int) -> bool:
    """Whether a dense product of so many tiles is ours: in float32, with a tile for each multiprocessor.

    With fewer tiles than multiprocessors much is lost again, and cuBLAS has smaller tiles. In TF32 cuBLAS is the faster
    one at any size.
    """
    wanted = not cuda.tf32 and cuda.capability in FASTER_THAN_CUBLAS and tiles >= MULTIPROCESSORS
    return wanted and tensor_products(cuda) == "3xtf32"


def tiles_of(rows: int, columns: int) -> tuple[int, int]:
    """(tiles that a matrix has down, across)"""
    return ceil_div(rows, ROWS), ceil_div(columns, COLUMNS)


def parts_of(N: int, tiles: int) -> tuple[int, int]:
    """(parts, rows of a part) of the sum over N rows that gives `tiles` tiles of a weight gradient.

    So many that two blocks come to a multiprocessor, or PART rows to a part. Depends on the sizes alone, so the order
    of the sums does.
    """
    parts = max(1, min(round(2 * MULTIPROCESSORS / tiles), N // PART))
    rows = ceil_div(ceil_div(N, parts), 16) * 16  # whole pieces
    return ceil_div(N, rows), rows


def tensor_forward(cuda, out, inp, weight, bias):
    """matmul_forward in 3xTF32."""
    (N, C), OC = inp.shape, len(weight)
    args = (out, inp, weight, weight if bias is None else bias, int(bias is not None), N, C, OC)
    cuda.launch("matmul_forward_3xtf32_kernel", tiles_of(N, OC), THREADS, args)


def tensor_dinp(cuda, dinp, dout, weight):
    """matmul_backward's dinp in 3xTF32."""
    (N, OC), C = dout.shape, dinp.shape[1]
    cuda.launch("matmul_dinp_3xtf32_kernel", tiles_of(N, C), THREADS, (dinp, dout, weight, N, C, OC))


def tensor_dweight(cuda, dweight, dout, inp, beta):
    """matmul_backward's dweight in 3xTF32."""
    (N, C), OC = inp.shape, len(dweight)
    down, across = tiles_of(OC, C)
    count, rows = parts_of(N, down * across)
    parts = dweight
    if count > 1:
        parts = cuda.scratch("matmul_parts", (count, down * across, ROWS * COLUMNS))
    args = (dweight, parts, dout, inp, N, C, OC, rows, beta)
    cuda.launch("matmul_dweight_3xtf32_kernel", (across, down, count), THREADS, args)
    if count > 1:
        cuda.launch("matmul_join_kernel", (across, down, GROUPS), THREADS, (dweight, parts, C, OC, count, beta))
