"""Launcher of attention_join.cu, and the rule by which the keys of a query are split."""

from kernels.cuda.runtime.grid import BLOCKS, ceil_div, threads_for

SHARE = 128  # the fewest keys of a block where a query's keys are split


def split_keys(keys: int, blocks: int, unit: int) -> tuple[int, int]:
    """(parts, keys of a part): shares, in whole units, of so many blocks that `blocks` times these fill a GPU."""
    parts = min(ceil_div(keys, SHARE), ceil_div(BLOCKS, blocks))
    share = ceil_div(ceil_div(keys, parts), unit) * unit
    return ceil_div(keys, share), share


def part_buffers(cuda, parts: int, rows: int, columns: int) -> tuple:
    """part_sums (parts,rows,columns) and part_softmax (parts,rows,2) for blocks to write."""
    return cuda.scratch("part_sums", (parts, rows, columns)), cuda.scratch("part_softmax", (parts, rows, 2))


def attention_join(cuda, out, lse, part_sums, part_softmax):
    """out (B,n,NH,columns), in any shape, and lse (B,NH,n) from the parts of a query's keys."""
    parts, rows, columns = part_sums.shape
    args = (out, lse, part_sums, part_softmax, rows, columns, parts, lse.shape[1], lse.shape[2])
    cuda.launch("attention_join_kernel", rows, threads_for(4 * columns), args)
