// tensor_cores.cu: one product of mma.cuh, small enough to be tried before a run relies on it
//
// out (16,8) = a (16,K) b (K,8) by one warp, K % 4 == 0. Tiles of 8 pass through two stages of shared memory by copies
// that run on their own, of 16 bytes and of 4; what lies behind K is not wanted.

template <bool EXACT> __device__ __forceinline__ void multiply(float* out, const float* a, const float* b, int K) {
    constexpr int TILE = 16 * 8 + 8 * 8;  // of a, then of b
    __shared__ __align__(16) float stages[2][TILE];
    const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
    const auto fetch_tile = [&](float* to, int k) {
        const int column = k + lane % 2 * 4;
        copy_later<16>(to + 4 * lane, a + lane / 2 * K + column, column < K);
        for (int i = lane; i < 8 * 8; i += WARP) { copy_later<4>(to + 16 * 8 + i, b + k * 8 + i, k + i / 8 < K); }
        commit_copies();
    };
    fetch_tile(stages[0], 0);
    float c[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    for (int k = 0; k < K; k += 8) {
        const float* now = stages[k / 8 % 2];
        if (k + 8 < K) {
            fetch_tile(stages[(k / 8 + 1) % 2], k + 8);
            wait_for_copies<1>();
        } else {
            wait_for_copies<0>();
        }
        __syncwarp();  // all lanes' copies are there
        Tf32 words[4];
#pragma unroll
        for (int i = 0; i < 4; i++) { words[i] = split_tf32<EXACT>(now[(g + i % 2 * 8) * 8 + t + i / 2 * 4]); }
        const float* column = now + 16 * 8 + g;
        mma<EXACT>(c, words, split_tf32<EXACT>(column[t * 8]), split_tf32<EXACT>(column[(t + 4) * 8]));
        __syncwarp();  // all lanes are done with the stage
    }
#pragma unroll
    for (int i = 0; i < 4; i++) { out[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = c[i]; }
}

extern "C" __global__ void __launch_bounds__(32)
mma_trial_tf32_kernel(float* __restrict__ out, const float* __restrict__ a, const float* __restrict__ b, int K) {
    multiply<false>(out, a, b, K);
}

extern "C" __global__ void __launch_bounds__(32)
mma_trial_3xtf32_kernel(float* __restrict__ out, const float* __restrict__ a, const float* __restrict__ b, int K) {
    multiply<true>(out, a, b, K);
}
