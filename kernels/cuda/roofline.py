"""What each kernel must move and compute, and how fast that could be at best: the table in kernels/cuda/README.md.

    make roofline          # python -m kernels.cuda.roofline: writes the table for GPT-2 124M, B = 4, T = 1024

A kernel cannot be faster than its bytes at the memory's rate, nor than its floating-point operations at the
processors': the larger of the two times is its bound. None of these times is a measurement.
"""

import sys
from pathlib import Path
from typing import NamedTuple

from kernels.cpu.band_mask import band_columns, band_count
from kernels.cuda import source
from kernels.cuda.band_matmul import COLUMNS, ROWS

README = Path(__file__).parent / "README.md"
BEGIN, END = "<!-- table: make roofline -->\n", "<!-- end of the table -->\n"

# memory in GB/s, float32 multiply-adds outside tensor cores in TFLOP/s: NVIDIA's data sheets (A100 80GB SXM, H100 SXM)
# and Ada architecture paper
GPUS = {"A100": (2039, 19.5), "H100": (3350, 67.0), "RTX 4090": (1008, 82.6)}


class Row(NamedTuple):
    """A kernel at work: how often in a training step; floats to and from memory at least; floats between the blocks and
    L2 as it is written, empty if the same; floating-point operations. All are expressions of the sizes below."""

    kernel: str
    calls: str
    must: str
    does: str
    flop: str


# FLOP counts an addition, a multiplication, exp, log, tanh, sqrt and a division as one each
ROWS_OF_TABLE = [
    Row("encoder_forward_kernel", "1", "2*N*C + T*C + N", "2*N*C + N*C + N", "N*C"),
    Row("encoder_backward_wte_kernel", "1", "3*N*C + N", "3*N*C + N*N", "N*C"),
    Row("encoder_backward_wpe_kernel", "1", "N*C + 2*T*C", "", "N*C"),
    Row("layernorm_forward_kernel", "1", "2*N*C + 2*C + 2*N", "", "8*N*C"),
    Row("fused_residual_forward_kernel", "2*L", "4*N*C + 2*C + 2*N", "", "9*N*C"),
    Row("layernorm_backward_kernel", "2*L + 1", "4*N*C + C + 2*N", "4*N*C + 2*min(N, 512)*C + 2*N", "14*N*C"),
    Row("column_sum_kernel (layernorm)", "4*L + 2", "min(N, 512)*C + 2*C", "", "min(N, 512)*C"),
    Row("column_sum_kernel (bias)", "4*L", "N*C9/4", "N*C9/4*(1 + 1/32)", "N*C9/4"),
    Row("add_bias_kernel", "4*L", "2*N*C9/4", "", "N*C9/4"),
    Row("gelu_forward_kernel", "L", "2*N*4*C", "", "9*N*4*C"),
    Row("gelu_backward_kernel", "L", "3*N*4*C", "", "20*N*4*C"),
    Row("attention_forward_64_kernel", "L", "4*N*C + N*NH", "2*N*C + N*C*(T/64 + 1) + N*NH", "2*N*C*(T + 1)"),
    Row("attention_delta_kernel", "L", "2*N*C + N*NH", "", "2*N*C"),
    Row("attention_dkdv_64_kernel", "L", "6*N*C + 2*N*NH", "4*N*C + N*C*(T/64 + 1) + 2*N*NH", "4*N*C*(T + 1)"),
    Row("attention_dq_64_kernel", "L", "5*N*C + 2*N*NH", "3*N*C + N*C*(T/64 + 1) + 2*N*NH", "3*N*C*(T + 1)"),
    Row("attention_decode_64_kernel", "0", "2*B*T*C + 2*B*C", "", "4*B*T*C"),
    Row("residual_forward_kernel", "0", "3*N*C", "", "N*C"),
    Row("take_columns_kernel", "0", "2*N*4*C + 4*C", "", "0"),
    Row("fused_classifier_kernel", "1", "2*N*Vp + 2*N", "3*N*Vp + 2*N", "7*N*V"),
    Row("adamw_kernel", "1", "7*P", "", "14*P"),
    Row("band_adamw_kernel", "0", "7*L*K", "", "14*L*K"),
    Row("sum_of_squares_kernel", "0", "P", "", "2*P"),
    Row("band_mask_kernel", "0", "L*(4*C*C - K)", "", "0"),
    Row("matmul_forward_kernel1", "0", "5*N*C + 4*C*C", "2*N*4*C*C/16 + N*4*C", "2*N*C*4*C"),
    Row("matmul_forward_kernel2", "0", "5*N*C + 4*C*C", "2*N*4*C*C/32 + N*4*C", "2*N*C*4*C"),
    Row("matmul_forward_kernel3", "0", "5*N*C + 4*C*C", "2*N*4*C*C/128 + N*4*C", "2*N*C*4*C"),
    Row("band_matmul_forward_kernel", "0", "5*N*C + K", "N*A1/64 + A1*N/128 + N*4*C", "2*N*A1"),
    Row("band_matmul_dinp_kernel", "0", "5*N*C + K", "N*A2/64 + A2*N/128 + N*C", "2*N*A2"),
    Row("band_matmul_dweight_kernel", "0", "5*N*C + K", "N*A3/64 + A3*N/128 + K", "2*N*A3"),
    Row("cuBLAS, forward", "1", "L*(N*16*C + 12*C*C) + N*C + N*Vp + Vp*C", "", "2*N*(12*L*C*C + Vp*C)"),
    Row("cuBLAS, backward", "1", "2*(L*(N*16*C + 12*C*C) + N*C + N*Vp + Vp*C)", "", "4*N*(12*L*C*C + Vp*C)"),
]


def covered(rows: int, columns: int, bandwidth: int, height: int, width: int = 1) -> int:
    """Weights in the tiles of height rows, cut to `width` columns, that the band of a (rows,columns) weight touches."""
    area = 0
    for first in range(0, rows, height):
        last = min(first + height, rows)
        start = band_columns(first, rows, columns, bandwidth)[0] // width * width
        stop = -(-band_columns(last - 1, rows, columns, bandwidth)[1] // width) * width
        area += height * (stop - start)
    return area


def sizes(
    B: int, T: int, C: int = 768, L: int = 12, NH: int = 12, V: int = 50257, Vp: int = 50304, w: int = 256
) -> dict:
    """The names that the expressions use."""
    P = Vp * C + 1024 * C + L * (12 * C * C + 13 * C) + 2 * C
    names = dict(B=B, T=T, N=B * T, C=C, C9=9 * C, L=L, NH=NH, V=V, Vp=Vp, P=P, w=w, K=band_count(4 * C, C, w), min=min)
    names["A1"] = covered(4 * C, C, w, COLUMNS)
    names["A2"] = covered(C, 4 * C, w, COLUMNS)
    names["A3"] = covered(4 * C, C, w, ROWS, COLUMNS)
    return names


def table(names: dict) -> str:
    """The Markdown table for the sizes `names`."""
    lines = ["| kernel | calls a step | floats, at least | floats, as written | FLOP | MB | MFLOP | "]
    lines[0] += " | ".join(f"{gpu}, us" for gpu in GPUS) + " |"
    lines.append("|---|---|---|---|---|" + "---:|" * (2 + len(GPUS)))
    totals = dict.fromkeys(GPUS, 0.0)
    for row in ROWS_OF_TABLE:
        must, flop, calls = (eval(text, {"__builtins__": {}}, names) for text in (row.must, row.flop, row.calls))
        cells = [row.kernel.replace("_kernel", ""), row.calls if calls else "-"]
        cells += [f"`{text}`" if text else "the same" for text in (row.must, row.does, row.flop)]
        cells += [f"{4 * must / 1e6:.2f}", f"{flop / 1e6:.1f}"]
        for gpu, (gigabytes, teraflops) in GPUS.items():
            memory, arithmetic = 4e-3 * must / gigabytes, 1e-6 * flop / teraflops
            totals[gpu] += calls * max(memory, arithmetic)
            cells.append(f"{max(memory, arithmetic):.1f} {'m' if memory >= arithmetic else 'c'}")
        lines.append(f"| {' | '.join(cells)} |")
    bounds = ", ".join(f"{gpu} {total / 1000:.1f} ms" for gpu, total in totals.items())
    lines.append(f"\nA dense step, each kernel at its bound, one after another: {bounds}.")
    return "\n".join(lines) + "\n"


def with_table(text: str) -> str:
    """`text` of the README with the table of today's kernels between its two markers."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{table(sizes(B=4, T=1024))}{END}{after}"


def kernels_without_row() -> set[str]:
    """Kernels that the table forgets; those for wider heads or rows count with the ones for GPT-2 124M's."""
    listed = {row.kernel.partition(" ")[0] for row in ROWS_OF_TABLE}
    return {name.replace("_128_", "_64_").replace("_wide_", "_") for name in source.kernels()} - listed


def main() -> int:
    README.write_text(with_table(README.read_text()))
    print(table(sizes(B=4, T=1024)), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
