// mma_fragments.cu: one product of mma.cuh by one warp, each value put where the fragment layout says
//
// out (16,8) = a (16,K) b (K,8), K = 8 for float and 16 for bf16; a by rows, b by rows. A tile goes through shared memory
// by copies that run on their own, in two groups, rows of 16 bytes or single floats.

// K floats of 16 + K rows of `columns` values, a then b, to shared memory; the last row is left out (0) if `skip`
template <int K> __device__ __forceinline__ void copy_operands(float* shared, const float* a, const float* b, bool skip) {
    for (int i = threadIdx.x; i < 16 * K / 4; i += WARP) {
        copy_later<16>(shared + 4 * i, a + 4 * i, !(skip && i >= 15 * K / 4));
    }
    commit_copies();
    for (int i = threadIdx.x; i < 8 * K; i += WARP) { copy_later<4>(shared + 16 * K + i, b + i, true); }
    commit_copies();
    wait_for_copies<1>();
    wait_for_copies<0>();
    __syncwarp();
}

__device__ __forceinline__ void store_sums(float* out, const float (&c)[4]) {
    const int g = threadIdx.x / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < 4; i++) { out[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = c[i]; }
}

template <bool EXACT>
__device__ __forceinline__ void multiply_floats(float* out, const float* a, const float* b, int skip) {
    __shared__ __align__(16) float shared[16 * 8 + 8 * 8];
    copy_operands<8>(shared, a, b, skip != 0);
    const int g = threadIdx.x / 4, t = threadIdx.x % 4;
    Tf32 words[4];
#pragma unroll
    for (int i = 0; i < 4; i++) { words[i] = split_tf32<EXACT>(shared[(g + i % 2 * 8) * 8 + t + i / 2 * 4]); }
    const float* columns = shared + 16 * 8 + g;
    float c[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    mma<EXACT>(c, words, split_tf32<EXACT>(columns[t * 8]), split_tf32<EXACT>(columns[(t + 4) * 8]));
    store_sums(out, c);
}

extern "C" __global__ void __launch_bounds__(32)
mma_tf32_kernel(float* __restrict__ out, const float* __restrict__ a, const float* __restrict__ b, int skip) {
    multiply_floats<false>(out, a, b, skip);
}

extern "C" __global__ void __launch_bounds__(32)
mma_3xtf32_kernel(float* __restrict__ out, const float* __restrict__ a, const float* __restrict__ b, int skip) {
    multiply_floats<true>(out, a, b, skip);
}

extern "C" __global__ void __launch_bounds__(32)
mma_bf16_kernel(float* __restrict__ out, const float* __restrict__ a, const float* __restrict__ b, int skip) {
    __shared__ __align__(16) float shared[16 * 16 + 16 * 8];
    copy_operands<16>(shared, a, b, skip != 0);
    const int g = threadIdx.x / 4, t = threadIdx.x % 4;
    unsigned words[4], of_b[2];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float* pair = shared + (g + i % 2 * 8) * 16 + 2 * (t + i / 2 * 4);
        words[i] = pack_bf16(pair[0], pair[1]);
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const float* pair = shared + 16 * 16 + 2 * (t + 4 * i) * 8 + g;
        of_b[i] = pack_bf16(pair[0], pair[8]);
    }
    float c[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    mma_bf16(c, words, of_b[0], of_b[1]);
    store_sums(out, c);
}

// out (N) = inp, rounded to TF32
extern "C" __global__ void __launch_bounds__(32)
round_tf32_kernel(float* __restrict__ out, const float* __restrict__ inp, int N) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < N) { out[i] = __uint_as_float(to_tf32(inp[i])); }
}
