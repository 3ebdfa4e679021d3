// matmul_tensor.cu: a fully connected layer's products in 3xTF32 (kernels/cpu/gpt2/matmul.py); tiles in gemm_mma.cuh
//
//   v1 cuBLAS in float32   FMAs: an H100 took 385 to 418 us for FC1 or FC2 of 4096 tokens, C = 768: 50 TFLOP/s of 67
//   v2 3xTF32 (this)       three products on tensor cores, whose mma.sync does 314 TFLOP/s there: 185 us at best, 240
//                          to 290 expected, none measured. The bias is added in the product, which saves reading and
//                          writing out again
//
// In TF32 cuBLAS took 55 to 108 us, by wgmma, which mma.sync cannot follow: it keeps those products. A block has 8
// warps of 32 x 32, and two blocks fill a multiprocessor's registers; larger parts for a warp would save reads of
// shared memory, and spill.

template <bool A_ALONG_K, bool B_ALONG_K> using Tile = MmaTile<128, 64, 32, 32, 4, true, A_ALONG_K, B_ALONG_K>;

// out (N,OC) from inp (N,C), weight (OC,C), bias (OC) if has_bias; grid (ceil(N / 128), ceil(OC / 64)): blocks that run
// at once share columns of the weight, the larger operand where there are many of them
extern "C" __global__ void __launch_bounds__(256, 2)
matmul_forward_3xtf32_kernel(float* __restrict__ out, const float* __restrict__ inp, const float* __restrict__ weight,
                             const float* __restrict__ bias, int has_bias, int N, int C, int OC) {
    FOR_TENSOR_CORES(
        using T = Tile<true, true>;
        __shared__ T::Shared shared;
        const int n0 = blockIdx.x * T::ROWS, oc0 = blockIdx.y * T::COLUMNS;
        float total[T::MI][T::NI][4];
        T::multiply(total, shared, T::A(inp, C, n0, N, 0), T::B(weight, C, oc0, OC, 0), 0, C, ALL_K);
        write_tile<T>(out, total, has_bias ? bias : nullptr, false, n0, oc0, N, OC);)
}

// dinp (N,C) = dout (N,OC) weight (OC,C); grid (ceil(N / 128), ceil(C / 64))
extern "C" __global__ void __launch_bounds__(256, 2)
matmul_dinp_3xtf32_kernel(float* __restrict__ dinp, const float* __restrict__ dout, const float* __restrict__ weight,
                          int N, int C, int OC) {
    FOR_TENSOR_CORES(
        using T = Tile<true, false>;
        __shared__ T::Shared shared;
        const int n0 = blockIdx.x * T::ROWS, c0 = blockIdx.y * T::COLUMNS;
        float total[T::MI][T::NI][4];
        T::multiply(total, shared, T::A(dout, OC, n0, N, 0), T::B(weight, C, c0, C, 0), 0, OC, ALL_K);
        write_tile<T>(dinp, total, nullptr, false, n0, c0, N, C);)
}

// dweight (OC,C) = beta * dweight + dout (N,OC)^T inp (N,C), or parts of it, of `rows` of the N rows each;
// grid (ceil(C / 64), ceil(OC / 128), parts)
extern "C" __global__ void __launch_bounds__(256, 2)
matmul_dweight_3xtf32_kernel(float* __restrict__ dweight, float* __restrict__ parts, const float* __restrict__ dout,
                             const float* __restrict__ inp, int N, int C, int OC, int rows, int beta) {
    FOR_TENSOR_CORES(
        using T = Tile<false, false>;
        __shared__ T::Shared shared;
        const int oc0 = blockIdx.y * T::ROWS, c0 = blockIdx.x * T::COLUMNS, first = blockIdx.z * rows;
        float total[T::MI][T::NI][4];
        T::multiply(total, shared, T::A(dout, OC, oc0, OC, first), T::B(inp, C, c0, C, first), first,
                    min(first + rows, N), ALL_K);
        if (gridDim.z > 1) {
            put_part<T>(parts, total);
        } else {
            write_tile<T>(dweight, total, nullptr, beta, oc0, c0, OC, C);
        })
}

// dweight (OC,C) = beta * dweight + the sum of `count` parts; grid (ceil(C / 64), ceil(OC / 128), 2)
extern "C" __global__ void __launch_bounds__(256, 2)
matmul_join_kernel(float* __restrict__ dweight, const float* __restrict__ parts, int C, int OC, int count, int beta) {
    FOR_TENSOR_CORES(
        using T = Tile<false, false>;
        float total[T::NI][4];
        join_parts<T>(total, parts, count);
        write_rows<T>(dweight, total, nullptr, beta, blockIdx.z, blockIdx.y * T::ROWS, blockIdx.x * T::COLUMNS, OC, C, C);)
}
