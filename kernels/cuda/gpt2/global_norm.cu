// global_norm.cu: the sum of squares of the whole gradient (kernels/cpu/gpt2/global_norm.py)
//
// A fixed number of blocks, each of which leaves one number; the host adds those up in their order, in double.

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
