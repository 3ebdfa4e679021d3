// global_norm.cu: the norm of the whole gradient (kernels/cpu/gpt2/global_norm.py)
//
// A fixed number of blocks, each of which leaves one number; one more block adds those up. It stays on the device, where
// AdamW reads it, so that clipping waits for nothing.

// partial (gridDim.x) from values (n)
extern "C" __global__ void __launch_bounds__(512)
sum_of_squares_kernel(float* __restrict__ partial, const float* __restrict__ values, size_t n) {
    __shared__ float shared[512 / WARP];
    const size_t packs = aligned(values) ? n / 4 : 0;
    const size_t threads = (size_t)gridDim.x * blockDim.x;
    const size_t thread = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    float total = 0.0f;
    for (size_t i = thread; i < packs; i += threads) {
        Pack<4> x = load<4>(values, i);
#pragma unroll
        for (int j = 0; j < 4; j++) { x.at[j] *= x.at[j]; }
        total += sum(x);
    }
    for (size_t i = 4 * packs + thread; i < n; i += threads) { total += values[i] * values[i]; }
    total = block_sum(total, shared);
    if (threadIdx.x == 0) { partial[blockIdx.x] = total; }
}

// norm (1) from partial (count)
extern "C" __global__ void __launch_bounds__(512)
norm_kernel(float* __restrict__ norm, const float* __restrict__ partial, int count) {
    __shared__ float shared[512 / WARP];
    float total = 0.0f;
    for (int i = threadIdx.x; i < count; i += blockDim.x) { total += partial[i]; }
    total = block_sum(total, shared);
    if (threadIdx.x == 0) { norm[0] = sqrtf(total); }
}
