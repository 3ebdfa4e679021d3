// column_sum.cu: sums over the rows of a matrix in a fixed order: bias gradients, and the second stage of layernorm's
//
//   v1 one thread a column       long chains of dependent additions, few threads
//   v2 atomicAdd by row blocks   order of arrival: other bits every run
//   v3 two stages                blocks of rows make partial sums, the same kernel adds those up: two launches
//   v4 one launch (this)         a block has some columns to itself and all rows: nothing is left for a second launch,
//                                no block waits for another, no counter has to be reset
//
// v4 on an H100 took 5.9 us for (4096,768) and 9.3 for (4096,2304), v3 8.8 and 17.7, and 12 us of the host instead of
// 28. layernorm's two sums share a launch: a step of GPT-2 124M has 73 of these instead of 196, 1.9 ms less of the host
// and 0.3 less of the GPU expected.

#define BLOCK 1024

// out (C) += the sums over the rows of inp (N,C), for the block's 4 * LANES columns. 32 / LANES rows are one access of a
// warp: 64 bytes of each row, or 128. Lanes and then warps add up in an order that depends on N alone
template <int LANES>
__device__ __forceinline__ void column_sum(float* out, const float* inp, int N, int C, Pack<4> (*shared)[LANES]) {
    const int lane = threadIdx.x % WARP;
    const int first = blockIdx.x * 4 * LANES;
    const int column = first + 4 * (lane % LANES);
    const bool packed = C % 4 == 0 && aligned(inp);
    Pack<4> total = zeros<4>();
    if (column < C) {
#pragma unroll 8
        for (int n = threadIdx.x / LANES; n < N; n += BLOCK / LANES) {
            add(total, load_columns(inp + (size_t)n * C, column, C, packed));
        }
    }
#pragma unroll
    for (int step = WARP / 2; step >= LANES; step /= 2) {
#pragma unroll
        for (int j = 0; j < 4; j++) { total.at[j] += __shfl_xor_sync(ALL_LANES, total.at[j], step); }
    }
    if (lane < LANES) { shared[threadIdx.x / WARP][lane] = total; }
    __syncthreads();
    const int own = threadIdx.x;
    if (own < 4 * LANES && first + own < C) {
        float sum = 0.0f;
#pragma unroll
        for (int warp = 0; warp < BLOCK / WARP; warp++) { sum += shared[warp][own / 4].at[own % 4]; }
        out[first + own] += sum;
    }
}

// of inp (gridDim.y,N,C) the first matrix goes to out (C), a second one to out2 (C). grid (ceil(C / 16), 1 or 2)
extern "C" __global__ void __launch_bounds__(1024)
column_sum_kernel(float* out, float* out2, const float* __restrict__ inp, int N, int C) {
    __shared__ Pack<4> shared[BLOCK / WARP][4];
    column_sum<4>(blockIdx.y ? out2 : out, inp + (size_t)blockIdx.y * N * C, N, C, shared);
}

// column_sum_kernel where 16 columns a block make more blocks than fit at once. grid (ceil(C / 32), 1 or 2)
extern "C" __global__ void __launch_bounds__(1024)
column_sum_wide_kernel(float* out, float* out2, const float* __restrict__ inp, int N, int C) {
    __shared__ Pack<4> shared[BLOCK / WARP][8];
    column_sum<8>(blockIdx.y ? out2 : out, inp + (size_t)blockIdx.y * N * C, N, C, shared);
}
