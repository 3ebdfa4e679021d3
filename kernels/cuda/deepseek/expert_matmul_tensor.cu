// expert_matmul_tensor.cu: expert_matmul.cu's products on tensor cores (kernels/cpu/deepseek/expert_matmul.py); tiles
// in gemm_mma.cuh. tf32: operands of products are rounded to nearest; 3xtf32: split, with float32's accuracy
//
//   v1 expert_matmul.cu   FMAs: more than half of a small model's step on an H100
//   v2 mma (this)         a tile has all rows that an expert's tile may have, 64, and as many columns, since there are
//                         few tiles. An element is added up in the same order, whatever its row's place in the tile

template <bool EXACT, bool A_ALONG_K, bool B_ALONG_K>
using Tile = MmaTile<64, 64, 32, 32, 4, EXACT, A_ALONG_K, B_ALONG_K>;

// out (rows,OUT) = inp (rows,IN) times the weight of the tile's expert, (OUT,IN) if ALONG_K, else (IN,OUT); 0 where a
// tile is not used
template <bool EXACT, bool ALONG_K>
__device__ __forceinline__ void rows_tile(float* out, const float* inp, const float* weight, const int* tile_expert,
                                          int tile, int IN, int OUT) {
    using T = Tile<EXACT, true, ALONG_K>;
    using Shared = typename T::Shared;
    __shared__ Shared shared;
    const int expert = tile_expert[blockIdx.y], n0 = blockIdx.x * T::COLUMNS;
    const size_t row0 = (size_t)blockIdx.y * tile;
    float total[T::MI][T::NI][4] = {};
    if (expert >= 0) {
        const typename T::A a(inp + row0 * IN, IN, 0, tile, 0);
        const typename T::B b(weight + (size_t)expert * IN * OUT, ALONG_K ? IN : OUT, n0, OUT, 0);
        T::multiply(total, shared, a, b, 0, IN, ALL_K);
    }
    write_tile<T>(out + row0 * OUT, total, nullptr, false, 0, n0, tile, OUT);
}

// dweight (E,OC,C) = beta * dweight + dout^T inp over the expert's rows; dout (rows,OC), inp (rows,C)
template <bool EXACT>
__device__ __forceinline__ void dweight_tile(float* dweight, const float* dout, const float* inp,
                                             const int* tile_expert, int tiles, int tile, int C, int OC, int beta) {
    using T = Tile<EXACT, false, false>;
    using Shared = typename T::Shared;
    __shared__ Shared shared;
    const int first = first_tile(tile_expert, tiles, blockIdx.z), last = first_tile(tile_expert, tiles, blockIdx.z + 1);
    const int oc0 = blockIdx.y * T::ROWS, c0 = blockIdx.x * T::COLUMNS;
    const size_t row0 = (size_t)first * tile;
    const typename T::A a(dout + row0 * OC, OC, oc0, OC, 0);
    const typename T::B b(inp + row0 * C, C, c0, C, 0);
    float total[T::MI][T::NI][4];
    T::multiply(total, shared, a, b, 0, (last - first) * tile, ALL_K);
    write_tile<T>(dweight + (size_t)blockIdx.z * OC * C, total, nullptr, beta, oc0, c0, OC, C);
}

// out (rows,OC) from inp (rows,C), weight (E,OC,C); grid (ceil(OC / 64), tiles)
extern "C" __global__ void __launch_bounds__(128, 4)
expert_matmul_forward_tf32_kernel(float* __restrict__ out, const float* __restrict__ inp,
                                  const float* __restrict__ weight, const int* __restrict__ tile_expert, int tile,
                                  int C, int OC) {
    FOR_TENSOR_CORES((rows_tile<false, true>(out, inp, weight, tile_expert, tile, C, OC));)
}

extern "C" __global__ void __launch_bounds__(128, 4)
expert_matmul_forward_3xtf32_kernel(float* __restrict__ out, const float* __restrict__ inp,
                                    const float* __restrict__ weight, const int* __restrict__ tile_expert, int tile,
                                    int C, int OC) {
    FOR_TENSOR_CORES((rows_tile<true, true>(out, inp, weight, tile_expert, tile, C, OC));)
}

// dinp (rows,C) from dout (rows,OC), weight (E,OC,C); grid (ceil(C / 64), tiles)
extern "C" __global__ void __launch_bounds__(128, 4)
expert_matmul_dinp_tf32_kernel(float* __restrict__ dinp, const float* __restrict__ dout,
                               const float* __restrict__ weight, const int* __restrict__ tile_expert, int tile, int C,
                               int OC) {
    FOR_TENSOR_CORES((rows_tile<false, false>(dinp, dout, weight, tile_expert, tile, OC, C));)
}

// for four blocks a multiprocessor it lacks a few registers
extern "C" __global__ void __launch_bounds__(128, 3)
expert_matmul_dinp_3xtf32_kernel(float* __restrict__ dinp, const float* __restrict__ dout,
                                 const float* __restrict__ weight, const int* __restrict__ tile_expert, int tile, int C,
                                 int OC) {
    FOR_TENSOR_CORES((rows_tile<true, false>(dinp, dout, weight, tile_expert, tile, OC, C));)
}

// grid (ceil(C / 64), ceil(OC / 64), E)
extern "C" __global__ void __launch_bounds__(128, 4)
expert_matmul_dweight_tf32_kernel(float* __restrict__ dweight, const float* __restrict__ dout,
                                  const float* __restrict__ inp, const int* __restrict__ tile_expert, int tiles,
                                  int tile, int C, int OC, int beta) {
    FOR_TENSOR_CORES(dweight_tile<false>(dweight, dout, inp, tile_expert, tiles, tile, C, OC, beta);)
}

extern "C" __global__ void __launch_bounds__(128, 4)
expert_matmul_dweight_3xtf32_kernel(float* __restrict__ dweight, const float* __restrict__ dout,
                                    const float* __restrict__ inp, const int* __restrict__ tile_expert, int tiles,
                                    int tile, int C, int OC, int beta) {
    FOR_TENSOR_CORES(dweight_tile<true>(dweight, dout, inp, tile_expert, tiles, tile, C, OC, beta);)
}
