"""What each kernel must move and compute, and how fast that could be at best: the table in kernels/cuda/README.md.

    make roofline          # python -m kernels.cuda.runtime.roofline: writes the table for GPT-2 124M, B = 4, T = 1024

A kernel cannot be faster than its bytes at the memory's rate, nor than its floating-point operations at the
processors': the larger of the two times is its bound. None of these times is a measurement.
"""

if __name__ == "__main__":
    from llmc import startup

    startup.begin()

from math import prod
from pathlib import Path
from typing import NamedTuple

from kernels.cpu.band.band_mask import band_columns, band_count
from kernels.cuda.band.band_matmul import COLUMNS, ROWS
from kernels.cuda.band.band_matmul_tensor import GRADIENT_TILES, gradient_tiles
from kernels.cuda.gpt2.matmul_tensor import parts_of
from kernels.cuda.runtime import source
from llmc.cli import ArgumentParser
from llmc.errors import run

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- table: make roofline -->\n", "<!-- end of the table -->\n"

# memory in GB/s, float32 multiply-adds outside tensor cores and TF32 inside, dense, in TFLOP/s: NVIDIA's data sheets
# (A100 80GB SXM, H100 SXM) and Ada architecture paper
GPUS = {"A100": (2039, 19.5, 156.0), "H100": (3350, 67.0, 494.7), "RTX 4090": (1008, 82.6, 82.6)}


class Row(NamedTuple):
    """A kernel at work: how often in a training step; floats to and from memory at least; floats between the blocks and
    L2 as it is written, empty if the same; floating-point operations. All are expressions of the sizes below.

    tensor: products in TF32 that tensor cores do for each of float32, 3 for 3xTF32; 0 is a kernel without."""

    kernel: str
    calls: str
    must: str
    does: str
    flop: str
    tensor: int = 0


# FLOP counts an addition, a multiplication, exp, log, tanh, sqrt and a division as one each
ROWS_OF_TABLE = [
    Row("append_rows_kernel", "0", "6*B*C", "", "0"),
    Row("encoder_forward_kernel", "1", "2*N*C + T*C + N", "2*N*C + N*C + N", "N*C"),
    Row("encoder_backward_wte_kernel", "1", "3*N*C + N", "3*N*C + N*N", "N*C"),
    Row("encoder_backward_wpe_kernel", "1", "N*C + 2*T*C", "", "N*C"),
    Row("layernorm_forward_kernel", "1", "2*N*C + 2*C + 2*N", "", "8*N*C"),
    Row("fused_residual_forward_kernel", "2*L", "4*N*C + 2*C + 2*N", "", "9*N*C"),
    Row("layernorm_backward_kernel", "2*L + 1", "4*N*C + C + 2*N", "4*N*C + 2*min(N, 512)*C + 2*N", "14*N*C"),
    Row("column_sum_kernel (layernorm)", "2*L + 1", "2*(min(N, 512) + 2)*C", "", "2*min(N, 512)*C"),
    Row("column_sum_kernel (bias)", "4*L", "(N + 2)*C9/4", "", "N*C9/4"),
    Row("add_bias_kernel", "4*L", "2*N*C9/4", "", "N*C9/4"),
    Row(
        "matmul_forward_3xtf32_kernel",
        "0",
        "5*N*C + 4*C*C",
        "N*4*C*C*(1/64 + 1/128) + N*4*C",
        "2*N*4*C*C",
        3,
    ),
    Row("matmul_dinp_3xtf32_kernel", "0", "5*N*C + 4*C*C", "N*4*C*C*(1/64 + 1/128) + N*C", "2*N*4*C*C", 3),
    Row("matmul_dweight_3xtf32_kernel", "0", "5*N*C + 4*C*C", "N*4*C*C*(1/64 + 1/128) + 4*C*C", "2*N*4*C*C", 3),
    Row("matmul_join_kernel", "0", "5*C*C", "", "4*C*C"),
    Row("gelu_forward_kernel", "L", "2*N*4*C", "", "9*N*4*C"),
    Row("gelu_backward_kernel", "L", "3*N*4*C", "", "20*N*4*C"),
    Row("attention_forward_64_kernel", "L", "4*N*C + N*NH", "2*N*C + N*C*(T/64 + 1) + N*NH", "2*N*C*(T + 1)"),
    Row("attention_delta_kernel", "L", "2*N*C + N*NH", "", "2*N*C"),
    Row("attention_dkdv_64_kernel", "L", "6*N*C + 2*N*NH", "4*N*C + N*C*(T/64 + 1) + 2*N*NH", "4*N*C*(T + 1)"),
    Row("attention_dq_64_kernel", "L", "5*N*C + 2*N*NH", "3*N*C + N*C*(T/64 + 1) + 2*N*NH", "3*N*C*(T + 1)"),
    Row(
        "attention_forward_3xtf32_64_kernel",
        "0",
        "4*N*C + N*NH",
        "2*N*C + N*C*(T/128 + 1) + N*NH",
        "2*N*C*(T + 1)",
        3,
    ),
    Row(
        "attention_dq_3xtf32_64_kernel",
        "0",
        "6*N*C + 2*N*NH",
        "4*N*C + N*C*(T/128 + 1) + 2*N*NH",
        "3*N*C*(T + 1) + 2*N*C",
        3,
    ),
    Row(
        "attention_dkdv_3xtf32_64_kernel",
        "0",
        "6*N*C + 2*N*NH",
        "4*N*C + N*C*(T/128 + 1) + 2*N*NH",
        "4*N*C*(T + 1)",
        3,
    ),
    Row(
        "attention_forward_tf32_64_kernel",
        "0",
        "4*N*C + N*NH",
        "2*N*C + N*C*(T/128 + 1) + N*NH",
        "2*N*C*(T + 1)",
        1,
    ),
    Row(
        "attention_dq_tf32_64_kernel",
        "0",
        "6*N*C + 2*N*NH",
        "4*N*C + N*C*(T/128 + 1) + 2*N*NH",
        "3*N*C*(T + 1) + 2*N*C",
        1,
    ),
    Row(
        "attention_dkdv_tf32_64_kernel",
        "0",
        "6*N*C + 2*N*NH",
        "4*N*C + N*C*(T/128 + 1) + 2*N*NH",
        "4*N*C*(T + 1)",
        1,
    ),
    Row("attention_decode_64_kernel", "0", "2*B*T*C + 2*B*C", "2*B*T*C + B*(C + 2*NH)*T/128 + B*C", "4*B*T*C"),
    Row("attention_join_kernel", "0", "B*(C + 2*NH)*T/128 + B*C + B*NH", "", "2*B*C*T/128"),
    Row("matmul_row_kernel", "0", "3*C*C + 7*C", "", "6*C*C + 3*C"),
    Row("rope_kernel", "0", "2*N*4*R", "", "3*N*4*R"),
    Row("rmsnorm_forward_kernel", "0", "2*N*r + r + N", "", "4*N*r"),
    Row("rmsnorm_backward_kernel", "0", "3*N*r + r + N", "3*N*r + min(N, 512)*r + r + N", "9*N*r"),
    Row("mla_qkv_forward_kernel", "0", "6*N*C - N*R*(NH - 1)", "6*N*C", "6*N*NH*R"),
    Row("mla_qkv_backward_kernel", "0", "6*N*C - N*R*(NH - 1)", "", "N*R*(4*NH + 3)"),
    Row("mla_latent_kernel", "0", "2*D", "", "3*R"),
    Row("mla_absorb_kernel", "0", "(C - NH*R)*(r + 1) + NH*(D + R)", "", "2*(C - NH*R)*r + 3*NH*R"),
    Row("mla_expand_kernel", "0", "C*(r + 1) + NH*r", "", "2*C*r"),
    Row(
        "mla_absorb_3xtf32_kernel",
        "0",
        "N*C + (C - NH*R)*r + N*NH*D",
        "N*(C - NH*R)*r/32 + N*NH*(D + R)",
        "2*N*(C - NH*R)*r + 3*N*NH*R",
        3,
    ),
    Row("mla_expand_3xtf32_kernel", "0", "N*NH*r + C*r + N*C", "N*C*r/32 + N*C", "2*N*C*r", 3),
    Row(
        "mla_absorb_tf32_kernel",
        "0",
        "N*C + (C - NH*R)*r + N*NH*D",
        "N*(C - NH*R)*r/32 + N*NH*(D + R)",
        "2*N*(C - NH*R)*r + 3*N*NH*R",
        1,
    ),
    Row("mla_expand_tf32_kernel", "0", "N*NH*r + C*r + N*C", "N*C*r/32 + N*C", "2*N*C*r", 1),
    Row("latent_attention_kernel", "0", "T*D + NH*(D + r)", "2*T*D + NH*(D + r)*T/128", "2*T*NH*(D + r)"),
    Row("latent_attention_3xtf32_kernel", "0", "T*D + NH*(D + r)", "T*D + NH*(D + r)*T/128", "2*T*NH*(D + r)", 3),
    Row("latent_attention_tf32_kernel", "0", "T*D + NH*(D + r)", "T*D + NH*(D + r)*T/128", "2*T*NH*(D + r)", 1),
    Row("inverse_count_kernel", "0", "N*k + 33*N", "2*N*k + 33*N", "0"),
    Row("inverse_sum_kernel", "0", "65*N", "97*N", "0"),
    Row("inverse_place_kernel", "0", "2*N*k + 65*N", "4*N*k + N", "0"),
    Row("sparse_attention_forward_64_kernel", "0", "4*N*C + N*NH + N*k", "2*N*C*(k + 1) + N*NH + N*k", "4*N*k*C"),
    Row("sparse_attention_dq_64_kernel", "0", "5*N*C + 2*N*NH + N*k", "N*C*(2*k + 3) + 2*N*NH + N*k", "6*N*k*C"),
    Row("sparse_attention_dkdv_64_kernel", "0", "6*N*C + 2*N*NH + N*k", "N*C*(2*k + 4) + 2*N*NH*k + N*k", "8*N*k*C"),
    Row("selected_bits_kernel", "0", "N*k + N*T/32", "", "0"),
    Row("union_keys_kernel", "0", "N*T/32 + 3*u*N*T/128", "N*T/16 + 3*u*N*T/128", "0"),
    Row("key_classes_kernel", "0", "N*T/32 + N", "", "0"),
    Row("key_order_kernel", "0", "2*N", "3*N", "0"),
    Row("union_queries_kernel", "0", "N*T/32 + 3*uq*N*T/128 + N", "", "0"),
    Row("attention_mean_kernel", "0", "2*N*C + N*NH + N*T", "N*C*(T/64 + 1) + N*NH*T/64 + N*T", "N*C*(T + 1)"),
    Row("sparse_attention_mean_kernel", "0", "2*N*C + N*NH + 2*N*k", "N*C*(k + 1) + 2*N*k", "2*N*k*C"),
    Row(
        "union_forward_3xtf32_64_kernel",
        "0",
        "4*N*C + N*NH + 3*u*N*T/128",
        "2*N*C + u*N*C*T/64 + N*NH + 3*u*N*T/128*NH",
        "2*u*N*C*(T + 1)",
        3,
    ),
    Row(
        "union_dq_3xtf32_64_kernel",
        "0",
        "6*N*C + 2*N*NH + 3*u*N*T/128",
        "4*N*C + u*N*C*T/64 + 2*N*NH + 3*u*N*T/128*NH",
        "3*u*N*C*(T + 1) + 2*N*C",
        3,
    ),
    Row(
        "union_dkdv_3xtf32_64_kernel",
        "0",
        "6*N*C + 2*N*NH + 3*uq*N*T/128",
        "4*N*C + uq*N*C*T/64 + 5*uq*N*T/128*NH",
        "4*uq*N*C*(T + 1)",
        3,
    ),
    Row(
        "union_mean_3xtf32_kernel",
        "0",
        "2*N*C + N*NH + 2*N*k + 3*u*N*T/128",
        "u*N*C*T/64 + 2*N*k + 3*u*N*T/128",
        "u*N*C*(T + 1)",
        3,
    ),
    Row(
        "union_forward_tf32_64_kernel",
        "0",
        "4*N*C + N*NH + 3*u*N*T/128",
        "2*N*C + u*N*C*T/64 + N*NH + 3*u*N*T/128*NH",
        "2*u*N*C*(T + 1)",
        1,
    ),
    Row(
        "union_dq_tf32_64_kernel",
        "0",
        "6*N*C + 2*N*NH + 3*u*N*T/128",
        "4*N*C + u*N*C*T/64 + 2*N*NH + 3*u*N*T/128*NH",
        "3*u*N*C*(T + 1) + 2*N*C",
        1,
    ),
    Row(
        "union_dkdv_tf32_64_kernel",
        "0",
        "6*N*C + 2*N*NH + 3*uq*N*T/128",
        "4*N*C + uq*N*C*T/64 + 5*uq*N*T/128*NH",
        "4*uq*N*C*(T + 1)",
        1,
    ),
    Row(
        "union_mean_tf32_kernel",
        "0",
        "2*N*C + N*NH + 2*N*k + 3*u*N*T/128",
        "u*N*C*T/64 + 2*N*k + 3*u*N*T/128",
        "u*N*C*(T + 1)",
        1,
    ),
    Row(
        "indexer_scores_forward_kernel",
        "0",
        "N*(HI + 1)*dI + N*HI + N*T",
        "N*HI*dI*(T/64 + 1) + N*T",
        "N*(T + 1)*HI*(dI + 1)",
    ),
    Row(
        "indexer_scores_dq_kernel",
        "0",
        "N*(2*HI + 1)*dI + N*T/2",
        "N*(T/128 + 1/2)*HI*(3*dI + 64)",
        "2*N*(T + 1)*HI*dI",
    ),
    Row("indexer_finish_kernel", "0", "3*N*HI*dI + 2*N*HI", "N*HI*dI*(5/2 + T/512) + 2*N*HI", "4*N*HI*dI"),
    Row(
        "indexer_scores_dk_kernel",
        "0",
        "N*(HI + 3)*dI + N*HI + N*T/2",
        "N*(T/128 + 1/2)*HI*(3*dI + 64)",
        "2*N*(T + 1)*HI*dI",
    ),
    Row(
        "indexer_scores_forward_3xtf32_kernel",
        "0",
        "N*(HI + 1)*dI + N*HI + N*T",
        "N*T*HI*dI/64 + N*T",
        "N*(T + 1)*HI*(dI + 1)",
        3,
    ),
    Row(
        "indexer_scores_dq_3xtf32_64_kernel",
        "0",
        "N*(2*HI + 1)*dI + N*T/2",
        "N*HI*(dI*(T/256 + T/2048 + 2) + T/2)",
        "2*N*(T + 1)*HI*dI",
        3,
    ),
    Row(
        "indexer_scores_dk_3xtf32_64_kernel",
        "0",
        "N*(HI + 3)*dI + N*HI + N*T/2",
        "N*dI*(HI*T/256 + T/512 + 2) + N*T/2",
        "2*N*(T + 1)*HI*dI",
        3,
    ),
    Row(
        "indexer_scores_forward_tf32_kernel",
        "0",
        "N*(HI + 1)*dI + N*HI + N*T",
        "N*T*HI*dI*3/256 + N*T",
        "N*(T + 1)*HI*(dI + 1)",
        1,
    ),
    Row(
        "indexer_scores_dq_tf32_64_kernel",
        "0",
        "N*(2*HI + 1)*dI + N*T/2",
        "N*HI*(dI*(T/256 + T/2048 + 2) + T/2)",
        "2*N*(T + 1)*HI*dI",
        1,
    ),
    Row(
        "indexer_scores_dk_tf32_64_kernel",
        "0",
        "N*(HI + 3)*dI + N*HI + N*T/2",
        "N*dI*(HI*T/256 + T/512 + 2) + N*T/2",
        "2*N*(T + 1)*HI*dI",
        1,
    ),
    Row("indexer_join_kernel", "0", "3*N*dI", "N*dI*(T/1024 + 5/2)", "N*dI*(T/1024 + 1/2)"),
    Row(
        "indexer_gathered_forward_kernel",
        "0",
        "N*(HI + 1)*dI + N*HI + 2*N*k",
        "N*(k + HI)*dI + N*HI + 2*N*k",
        "2*N*k*HI*(dI + 1)",
    ),
    Row(
        "indexer_gathered_signs_kernel",
        "0",
        "N*(HI + 1)*dI + N*k*(HI + 2)",
        "N*(k + HI)*dI + N*k*(HI + 2)",
        "2*N*k*HI*dI",
    ),
    Row(
        "indexer_gathered_u_kernel",
        "0",
        "N*(HI + 1)*dI + N*k*(HI + 1)",
        "N*(k + HI)*dI + N*k*(HI + 1)",
        "2*N*k*HI*dI",
    ),
    Row(
        "indexer_gathered_dk_kernel",
        "0",
        "N*(HI + 1)*dI + N*HI + N*k*(HI + 1)",
        "N*(k*HI + 1)*dI + N*k*(2*HI + 1)",
        "2*N*k*HI*(dI + 1)",
    ),
    Row(
        "indexer_union_forward_3xtf32_64_kernel",
        "0",
        "N*(HI + 1)*dI + N*HI + 2*N*k",
        "u*N*T/128*(dI*(1 + HI/2) + 3) + 2*N*k",
        "u*N*T*HI*(dI + 1)",
        3,
    ),
    Row(
        "indexer_union_dq_3xtf32_64_kernel",
        "0",
        "N*(2*HI + 1)*dI + 2*N*HI + N*k",
        "HI*(3*N*dI + N*k + u*N*T/128*(dI + 3))",
        "2*u*N*T*HI*dI",
        3,
    ),
    Row(
        "indexer_union_dk_3xtf32_64_kernel",
        "0",
        "N*(HI + 1)*dI + N*HI + N*k + u*N*T/128*dI",
        "u*N*T/128*(dI*(2 + HI/2) + 3) + 2*N*k",
        "2*u*N*T*HI*dI",
        3,
    ),
    Row(
        "indexer_union_forward_tf32_64_kernel",
        "0",
        "N*(HI + 1)*dI + N*HI + 2*N*k",
        "u*N*T/128*(dI*(1 + HI/2) + 3) + 2*N*k",
        "u*N*T*HI*(dI + 1)",
        1,
    ),
    Row(
        "indexer_union_dq_tf32_64_kernel",
        "0",
        "N*(2*HI + 1)*dI + 2*N*HI + N*k",
        "HI*(3*N*dI + N*k + u*N*T/128*(dI + 3))",
        "2*u*N*T*HI*dI",
        1,
    ),
    Row(
        "indexer_union_dk_tf32_64_kernel",
        "0",
        "N*(HI + 1)*dI + N*HI + N*k + u*N*T/128*dI",
        "u*N*T/128*(dI*(2 + HI/2) + 3) + 2*N*k",
        "2*u*N*T*HI*dI",
        1,
    ),
    Row("indexer_union_join_kernel", "0", "N*dI + u*N*T/128*dI + N*T/32", "", "u*N*T/128*dI"),
    Row("random_scores_kernel", "0", "N*T", "", "0"),
    Row("select_topk_kernel", "0", "N*T/2 + N*k + 2*N", "", "0"),
    Row("share_sums_kernel", "0", "N*T/2 + N*T/Q/2", "", "N*T/2"),
    Row("share_lists_kernel", "0", "N*T/Q/2 + N*k + N", "", "0"),
    Row("mass_count_kernel", "0", "N*T/2 + N", "", "48*N*T"),
    Row("row_entropy_kernel", "0", "N*T/2 + N", "", "3*N*T"),
    Row("fused_kl_kernel", "0", "3*N*T + N", "", "14*N*T"),
    Row("silu_forward_kernel", "0", "2*A*4*C", "", "4*A*4*C"),
    Row("silu_backward_kernel", "0", "3*A*4*C", "", "8*A*4*C"),
    Row("router_forward_kernel", "0", "2*N*E + 2*A", "", "7*N*E + A*E + 4*A"),
    Row("router_backward_kernel", "0", "2*N*E + 3*A + E", "", "6*N*E + 5*A"),
    Row("expert_load_kernel", "0", "A + E", "A*E + E", "0"),
    Row("expert_place_kernel", "0", "3*A + E", "A*E + 2*A + E*E/2", "0"),
    Row("expert_gather_kernel", "0", "N*C + A*C + A", "2*A*C + A", "0"),
    Row("expert_scatter_kernel", "0", "N*C + A*C + A", "", "A*C"),
    Row("expert_combine_forward_kernel", "0", "N*C + A*C + 2*A", "", "2*A*C"),
    Row("expert_combine_backward_kernel", "0", "N*C + 2*A*C + 3*A", "3*A*C + 3*A", "3*A*C"),
    Row("expert_matmul_forward_kernel", "0", "5*A*C + E*4*C*C", "A*4*C*C*(1/128 + 1/64) + A*4*C", "2*A*4*C*C"),
    Row("expert_matmul_dinp_kernel", "0", "5*A*C + E*4*C*C", "A*4*C*C*(1/128 + 1/64) + A*C", "2*A*4*C*C"),
    Row("expert_matmul_dweight_kernel", "0", "5*A*C + E*4*C*C", "A*4*C*C*(1/128 + 1/64) + E*4*C*C", "2*A*4*C*C"),
    Row("expert_matmul_forward_3xtf32_kernel", "0", "5*A*C + E*4*C*C", "A*4*C*C/32 + A*4*C", "2*A*4*C*C", 3),
    Row("expert_matmul_dinp_3xtf32_kernel", "0", "5*A*C + E*4*C*C", "A*4*C*C/32 + A*C", "2*A*4*C*C", 3),
    Row("expert_matmul_dweight_3xtf32_kernel", "0", "5*A*C + E*4*C*C", "A*4*C*C/32 + E*4*C*C", "2*A*4*C*C", 3),
    Row("expert_matmul_forward_tf32_kernel", "0", "5*A*C + E*4*C*C", "A*4*C*C/32 + A*4*C", "2*A*4*C*C", 1),
    Row("expert_matmul_dinp_tf32_kernel", "0", "5*A*C + E*4*C*C", "A*4*C*C/32 + A*C", "2*A*4*C*C", 1),
    Row("expert_matmul_dweight_tf32_kernel", "0", "5*A*C + E*4*C*C", "A*4*C*C/32 + E*4*C*C", "2*A*4*C*C", 1),
    Row("residual_forward_kernel", "0", "3*N*C", "", "N*C"),
    Row("depth_fusion_kernel", "0", "2*N*C + Dp*Dp", "2*N*C + 512*Dp*Dp", "2*N*C*Dp"),
    Row("depth_fusion_backward_kernel", "0", "3*N*C + 2*Dp*Dp", "3*N*C + 1024*Dp*Dp", "4*N*C*Dp"),
    Row("fusion_matrix_forward_kernel", "0", "3*Dp*Dp", "", "2*Dp*Dp*Dp + 6*Dp*Dp"),
    Row("fusion_matrix_backward_kernel", "0", "8*Dp*Dp", "", "4*Dp*Dp*Dp + 6*Dp*Dp"),
    Row("torus_rope_kernel", "0", "4*N*C + C/NH", "", "6*N*C"),
    # platters of 16, 32 and 64 columns: a head of 64 in 4, 2 and 1
    Row("torus_attention_forward_16_kernel", "0", "4*N*C + 4*N*NH", "N*C*(T/16 + 3) + 4*N*NH", "8*N*C*(T + 1)"),
    Row("torus_attention_dkdv_16_kernel", "0", "6*N*C + 8*N*NH", "N*C*(T/16 + 5) + 8*N*NH", "16*N*C*(T + 1)"),
    Row("torus_attention_dq_16_kernel", "0", "5*N*C + 8*N*NH", "N*C*(T/16 + 4) + 8*N*NH", "12*N*C*(T + 1)"),
    Row("torus_attention_forward_32_kernel", "0", "4*N*C + 2*N*NH", "N*C*(T/32 + 3) + 2*N*NH", "4*N*C*(T + 1)"),
    Row("torus_attention_dkdv_32_kernel", "0", "6*N*C + 4*N*NH", "N*C*(T/32 + 5) + 4*N*NH", "8*N*C*(T + 1)"),
    Row("torus_attention_dq_32_kernel", "0", "5*N*C + 4*N*NH", "N*C*(T/32 + 4) + 4*N*NH", "6*N*C*(T + 1)"),
    Row("torus_attention_forward_64_kernel", "0", "4*N*C + N*NH", "N*C*(T/64 + 3) + N*NH", "2*N*C*(T + 1)"),
    Row("torus_attention_dkdv_64_kernel", "0", "6*N*C + 2*N*NH", "N*C*(T/64 + 5) + 2*N*NH", "4*N*C*(T + 1)"),
    Row("torus_attention_dq_64_kernel", "0", "5*N*C + 2*N*NH", "N*C*(T/64 + 4) + 2*N*NH", "3*N*C*(T + 1)"),
    Row("torus_attention_weights_kernel", "0", "2*N*NH/64 + 4*NH", "", "2*N*NH/64"),
    Row("prefix_sums_kernel", "0", "N*C + 4*B*C", "N*C*(1 + 3/32) + 4*B*C", "15*N*C"),
    Row("prefix_features_kernel", "0", "N*C*3/32 + 4*N", "", "N*C*3/32 + 8*N"),
    Row("keep_controller_forward_kernel", "0", "23*N", "", "220*N"),
    Row("keep_controller_backward_kernel", "0", "24*N", "24*N + 113*N/128", "370*N"),
    Row("keep_controller_add_kernel", "0", "113*N/128 + 226", "", "113*N/128"),
    Row("fused_classifier_kernel", "1", "2*N*Vp + 2*N", "3*N*Vp + 2*N", "7*N*V"),
    Row("adamw_kernel", "1", "7*P", "", "14*P"),
    Row("band_adamw_kernel", "0", "7*L*K", "", "14*L*K"),
    Row("sum_of_squares_kernel", "0", "P", "", "2*P"),
    Row("norm_kernel", "0", "513", "", "512"),
    Row("band_mask_kernel", "0", "L*(4*C*C - K)", "", "0"),
    Row("band_matmul_forward_kernel", "0", "5*N*C + K", "N*A1/64 + A1*N/128 + N*4*C", "2*N*A1"),
    Row("band_matmul_dinp_kernel", "0", "5*N*C + K", "N*A2/64 + A2*N/128 + N*C", "2*N*A2"),
    Row("band_matmul_dweight_kernel", "0", "5*N*C + K", "N*A3/64 + A3*N/128 + K", "2*N*A3"),
    Row("band_matmul_forward_3xtf32_kernel", "0", "5*N*C + K", "N*A1/64 + A1*N/64 + N*4*C", "2*N*A1", 3),
    Row("band_matmul_dinp_3xtf32_kernel", "0", "5*N*C + K", "N*A2/64 + A2*N/64 + N*C", "2*N*A2", 3),
    Row("band_matmul_dweight_3xtf32_kernel", "0", "5*N*C + S3*G3", "N*G3*(1/64 + 1/128) + S3*G3", "2*N*A4", 3),
    Row("band_matmul_join_3xtf32_kernel", "0", "S3*G3 + K", "", "S3*G3"),
    Row("band_matmul_forward_tf32_kernel", "0", "5*N*C + K", "N*A1/64 + A1*N/128 + N*4*C", "2*N*A1", 1),
    Row("band_matmul_dinp_tf32_kernel", "0", "5*N*C + K", "N*A2/64 + A2*N/128 + N*C", "2*N*A2", 1),
    Row("band_matmul_dweight_tf32_kernel", "0", "5*N*C + S1*G1", "N*G1*(1/96 + 1/128) + S1*G1", "2*N*A4", 1),
    Row("band_matmul_join_tf32_kernel", "0", "S1*G1 + K", "", "S1*G1"),
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
    names |= dict(r=192, R=32, D=192 + 32)  # latent attention: kv_rank, rotary dimensions, both
    names |= dict(k=128, Q=64)  # keys in a list of sparse attention, queries that share one
    # of all pairs up to the diagonal, those in tiles of 64 queries, of 64 keys, with such lists: trained at T = 1024
    names |= dict(u=0.73, uq=0.91)
    names |= dict(HI=4, dI=64)  # the indexer's heads and their size
    names |= dict(E=4, A=2 * B * T)  # experts, and assignments of tokens to them, two each
    names["Dp"] = 4  # platters of a head
    names["A1"] = covered(4 * C, C, w, COLUMNS)
    names["A2"] = covered(C, 4 * C, w, COLUMNS)
    names["A3"] = covered(4 * C, C, w, ROWS, COLUMNS)
    names["A4"] = covered(4 * C, C, w, GRADIENT_TILES["tf32"][0])
    for products, digit in (("tf32", 1), ("3xtf32", 3)):  # tiles of gradients, and the parts of their sums
        *_, used = gradient_tiles(products, C, w)
        names[f"G{digit}"] = used * prod(GRADIENT_TILES[products])
        names[f"S{digit}"] = parts_of(B * T, used)[0]
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
        for gpu, (gigabytes, teraflops, tensor) in GPUS.items():
            memory, arithmetic = 4e-3 * must / gigabytes, 1e-6 * flop / teraflops
            if row.tensor:
                arithmetic = 1e-6 * flop * row.tensor / tensor
            totals[gpu] += calls * max(memory, arithmetic)
            cells.append(f"{max(memory, arithmetic):.1f} {'m' if memory >= arithmetic else 'c'}")
        lines.append(f"| {' | '.join(cells)} |")
    bounds = ", ".join(f"{gpu} {total / 1000:.1f} ms" for gpu, total in totals.items())
    lines.append(f"\nA dense step, each kernel at its bound, one after another, all without tensor cores: {bounds}.")
    return "\n".join(lines) + "\n"


def with_table(text: str) -> str:
    """`text` of the README with the table of today's kernels between its two markers."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{table(sizes(B=4, T=1024))}{END}{after}"


def kernels_without_row() -> set[str]:
    """Kernels of ops that the table forgets; those for wider heads or rows, or a permuted band, count with GPT-2
    124M's."""
    listed = {row.kernel.partition(" ")[0] for row in ROWS_OF_TABLE}
    ops = [name for name, kernel in source.kernels().items() if kernel.path.parent != source.FOLDER / "runtime"]
    return {name.replace("_128_", "_64_").replace("_wide_", "_").replace("_placed_", "_") for name in ops} - listed


def main(argv: list[str] | None = None) -> int:
    ArgumentParser(prog="python -m kernels.cuda.runtime.roofline", description=__doc__).parse(argv)
    README.write_text(with_table(README.read_text()))
    print(table(sizes(B=4, T=1024)), end="")
    return 0


if __name__ == "__main__":
    run(main)
