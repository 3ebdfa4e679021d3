// row_entropy.cu: how evenly a query's scores spread over its keys (kernels/cpu/sparse/row_entropy.py)
//
//   v1 softmax, then its entropy   the probabilities are written and read again
//   v2 one warp a row (this)       maximum, then two sums: H = ln sum e - sum e x / sum e; the future is not read

#define LOWEST -1e30f  // for -inf: times an exponential of 0 it is 0

// the entropy of the first `keys` of a row, a part of the largest possible
template <int W> __device__ __forceinline__ float entropy_of_row(const float* row, int keys) {
    const int lane = threadIdx.x % WARP;
    float top = LOWEST;
    for (int i = lane; i * W < keys; i += WARP) {
        const Pack<W> values = load<W>(row, i);
#pragma unroll
        for (int j = 0; j < W; j++) {
            if (i * W + j < keys) { top = fmaxf(top, values.at[j]); }
        }
    }
    top = warp_max(top);
    float total = 0.0f, weighted = 0.0f;
    for (int i = lane; i * W < keys; i += WARP) {
        const Pack<W> values = load<W>(row, i);
#pragma unroll
        for (int j = 0; j < W; j++) {
            if (i * W + j < keys) {
                const float x = fmaxf(values.at[j], LOWEST) - top;
                const float e = expf(x);
                total += e;
                weighted += e * x;
            }
        }
    }
    total = warp_sum(total);
    weighted = warp_sum(weighted);
    return keys == 1 ? 0.0f : fminf(fmaxf((logf(total) - weighted / total) / logf(keys), 0.0f), 1.0f);
}

// the last column of entropy (B,Tq,W) at rows first - start .. from scores (B,R,S); rows = B * R
extern "C" __global__ void __launch_bounds__(256)
row_entropy_kernel(float* __restrict__ entropy, const float* __restrict__ scores, int rows, int R, int S, int Tq,
                   int W, int first, int start) {
    const int n = (blockIdx.x * blockDim.x + threadIdx.x) / WARP;
    if (n >= rows) { return; }
    const int r = n % R;
    const float* row = scores + (size_t)n * S;
    const float part = S % 4 == 0 && aligned(scores) ? entropy_of_row<4>(row, first + r + 1)
                                                     : entropy_of_row<1>(row, first + r + 1);
    if (threadIdx.x % WARP == 0) { entropy[((size_t)(n / R) * Tq + first - start + r) * W + W - 1] = part; }
}
