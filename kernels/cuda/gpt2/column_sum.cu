// column_sum.cu: sums over the rows of a matrix in a fixed order: bias gradients, and the second stage of layernorm's
//
//   v1 one thread a column       long chains of dependent additions, few threads
//   v2 atomicAdd by row blocks   order of arrival: other bits every run
//   v3 two stages (this)         blocks of rows make partial sums, the same kernel adds those up

// out (gridDim.y,C) = beta * out + the sums over each block's `rows` rows of inp (N,C), for pack `pack` of a lane. A warp
// takes every 8th row; `shared` is free again after the next barrier
template <int W>
__device__ __forceinline__ void column_sum(float* out, const float* inp, int N, int C, int rows, int beta, int pack,
                                           Pack<4> (*shared)[WARP]) {
    const int packs = C / W;
    const int lane = threadIdx.x % WARP;
    const int warp = threadIdx.x / WARP;
    const int warps = blockDim.x / WARP;
    const int last = min((int)(blockIdx.y + 1) * rows, N);
    Pack<W> total = zeros<W>();
    if (pack < packs) {
        for (int n = blockIdx.y * rows + warp; n < last; n += warps) {
            add(total, load<W>(inp, (size_t)n * packs + pack));
        }
    }
    store<W>(shared[warp][lane].at, 0, total);
    __syncthreads();
    if (warp == 0 && pack < packs) {
        for (int other = 1; other < warps; other++) { add(total, load<W>(shared[other][lane].at, 0)); }
        const size_t index = (size_t)blockIdx.y * packs + pack;
        if (beta) { add(total, load<W>(out, index)); }
        store<W>(out, index, total);
    }
}

// grid (ceil(C / 128), blocks of rows), 8 warps
extern "C" __global__ void __launch_bounds__(256)
column_sum_kernel(float* __restrict__ out, const float* __restrict__ inp, int N, int C, int rows, int beta) {
    __shared__ Pack<4> shared[256 / WARP][WARP];
    const int lane = threadIdx.x % WARP;
    if (C % 4 == 0 && aligned(out, inp)) {
        column_sum<4>(out, inp, N, C, rows, beta, blockIdx.x * WARP + lane, shared);
        return;
    }
    for (int group = 0; group < 4; group++) {
        if (group > 0) { __syncthreads(); }
        column_sum<1>(out, inp, N, C, rows, beta, (blockIdx.x * 4 + group) * WARP + lane, shared);
    }
}
