// mla_tensor.cu: mla.cu's products for each head, for more queries than a few, on tensor cores; formulas in
// kernels/cpu/deepseek/mla.py, tiles in gemm_mma.cuh. plain = hs - R. tf32: operands of products are rounded to
// nearest; 3xtf32: split, with float32's accuracy
//
//   v1 mla.cu        8 queries share a weight: of a prompt's thousands, each 8 read all of kvbw
//   v2 mma (this)    64 queries share it. Rows of a head are strided rows of all heads: nothing is copied together

template <bool EXACT, bool ALONG_K> using Tile = MmaTile<64, 64, 32, 32, 4, EXACT, true, ALONG_K>;

// qlat (n,NH,kv_rank+R) = [q plain of head h times W^UK_h ; RoPE(q rest)] from q (n,C), kvbw (NH*(2hs-R),kv_rank)
template <bool EXACT>
__device__ __forceinline__ void absorb_tile(float* qlat, const float* q, const float* kvbw, int n, int NH, int hs,
                                            int R, int kv_rank, int start) {
    using T = Tile<EXACT, false>;
    using Shared = typename T::Shared;
    __shared__ Shared shared;
    const int plain = hs - R, D = kv_rank + R, h = blockIdx.z;
    const int column = blockIdx.x * T::COLUMNS, query = blockIdx.y * T::ROWS;
    q += h * hs;
    qlat += h * D;
    typename T::A a(q, NH * hs, query, n, 0);
    a.packed &= plain % 4 == 0;  // or a copy would go on into the columns that turn
    const typename T::B b(kvbw + (size_t)h * (2 * hs - R) * kv_rank, kv_rank, column, kv_rank, 0);
    float total[T::MI][T::NI][4];
    T::multiply(total, shared, a, b, 0, plain, ALL_K);
    write_tile<T>(qlat, total, nullptr, false, query, column, n, kv_rank, NH * D);
    if (blockIdx.x == 0) {
        const size_t row = (size_t)query * NH;
        const int rows = min(T::ROWS, n - query);
        turn_rows(qlat + row * D + kv_rank, (size_t)NH * D, q + row * hs + plain, (size_t)NH * hs, rows, R,
                  start + query);
    }
}

// out (n,C): head h is olat[:,h] (n,kv_rank) times W^UV_h^T; olat (n,NH,kv_rank)
template <bool EXACT>
__device__ __forceinline__ void expand_tile(float* out, const float* olat, const float* kvbw, int n, int NH, int hs,
                                            int R, int kv_rank) {
    using T = Tile<EXACT, true>;
    using Shared = typename T::Shared;
    __shared__ Shared shared;
    const int h = blockIdx.z, column = blockIdx.x * T::COLUMNS, query = blockIdx.y * T::ROWS;
    typename T::A a(olat + h * kv_rank, NH * kv_rank, query, n, 0);
    a.packed &= kv_rank % 4 == 0;  // or a copy would go on into the next head
    const typename T::B b(kvbw + ((size_t)h * (2 * hs - R) + hs - R) * kv_rank, kv_rank, column, hs, 0);
    float total[T::MI][T::NI][4];
    T::multiply(total, shared, a, b, 0, kv_rank, ALL_K);
    write_tile<T>(out + h * hs, total, nullptr, false, query, column, n, hs, NH * hs);
}

// grid (ceil(kv_rank / 64), ceil(n / 64), NH)
extern "C" __global__ void __launch_bounds__(128, 4)
mla_absorb_tf32_kernel(float* __restrict__ qlat, const float* __restrict__ q, const float* __restrict__ kvbw, int n,
                       int NH, int hs, int R, int kv_rank, int start) {
    FOR_TENSOR_CORES(absorb_tile<false>(qlat, q, kvbw, n, NH, hs, R, kv_rank, start);)
}

extern "C" __global__ void __launch_bounds__(128, 3)
mla_absorb_3xtf32_kernel(float* __restrict__ qlat, const float* __restrict__ q, const float* __restrict__ kvbw, int n,
                         int NH, int hs, int R, int kv_rank, int start) {
    FOR_TENSOR_CORES(absorb_tile<true>(qlat, q, kvbw, n, NH, hs, R, kv_rank, start);)
}

// grid (ceil(hs / 64), ceil(n / 64), NH)
extern "C" __global__ void __launch_bounds__(128, 4)
mla_expand_tf32_kernel(float* __restrict__ out, const float* __restrict__ olat, const float* __restrict__ kvbw, int n,
                       int NH, int hs, int R, int kv_rank) {
    FOR_TENSOR_CORES(expand_tile<false>(out, olat, kvbw, n, NH, hs, R, kv_rank);)
}

extern "C" __global__ void __launch_bounds__(128, 3)
mla_expand_3xtf32_kernel(float* __restrict__ out, const float* __restrict__ olat, const float* __restrict__ kvbw, int n,
                         int NH, int hs, int R, int kv_rank) {
    FOR_TENSOR_CORES(expand_tile<true>(out, olat, kvbw, n, NH, hs, R, kv_rank);)
}
