// fused_classifier.cu: softmax, cross-entropy and their gradient (kernels/cpu/gpt2/fused_classifier.py)
//
//   v1 separate kernels          max, sum, probabilities, loss, gradient: the logits cross memory six times
//   v2 one block a row (this)    a running maximum and sum in one pass of reading, the gradient over the logits in a
//                                second, which finds the row in L2 while the rows in flight fit it; float4

// the sum of exp(z - top) over what has been seen, top its maximum
struct Softmax {
    float top, total;
};

__device__ __forceinline__ Softmax join(Softmax a, Softmax b) {
    Softmax both;
    both.top = fmaxf(a.top, b.top);
    if (both.top == MINUS_INFINITY) {  // neither has seen anything: -inf - -inf is no number
        both.total = 0.0f;
    } else {
        both.total = a.total * expf(a.top - both.top) + b.total * expf(b.top - both.top);
    }
    return both;
}

template <int W>
__device__ __forceinline__ Softmax softmax_of_row(const float* row, int V, Softmax* shared) {
    Softmax mine = {MINUS_INFINITY, 0.0f};
    for (int i = threadIdx.x; i * W < V; i += blockDim.x) {
        const Pack<W> z = load<W>(row, i);
        float top = mine.top;
#pragma unroll
        for (int j = 0; j < W; j++) {
            if (i * W + j < V) { top = fmaxf(top, z.at[j]); }
        }
        if (top > mine.top) {
            mine.total *= expf(mine.top - top);
            mine.top = top;
        }
#pragma unroll
        for (int j = 0; j < W; j++) {
            if (i * W + j < V) { mine.total += expf(z.at[j] - mine.top); }
        }
    }
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) {
        Softmax other;
        other.top = __shfl_xor_sync(ALL_LANES, mine.top, step);
        other.total = __shfl_xor_sync(ALL_LANES, mine.total, step);
        mine = join(mine, other);
    }
    if (threadIdx.x % WARP == 0) { shared[threadIdx.x / WARP] = mine; }
    __syncthreads();
    Softmax all = shared[0];
    for (int warp = 1; warp < (int)blockDim.x / WARP; warp++) { all = join(all, shared[warp]); }
    return all;
}

template <int W>
__device__ __forceinline__ void classify_row(float* loss, float* row, int target, Softmax* shared, int V, int Vp,
                                             float dloss) {
    const float z_target = target >= 0 && target < V ? row[target] : nanf("");  // before it is overwritten, see the barrier
    const Softmax all = softmax_of_row<W>(row, V, shared);
    if (threadIdx.x == 0) { *loss = logf(all.total) + all.top - z_target; }
    const float scale = dloss / all.total;
    for (int i = threadIdx.x; i * W < Vp; i += blockDim.x) {
        Pack<W> z = load<W>(row, i);
#pragma unroll
        for (int j = 0; j < W; j++) {
            const int v = i * W + j;
            const float dz = expf(z.at[j] - all.top) * scale;
            z.at[j] = v >= V ? 0.0f : v == target ? dz - dloss : dz;
        }
        store<W>(row, i, z);
    }
}

// losses (N) from logits (N,Vp), targets (N); logits become (softmax - [target]) * dloss, 0 in the padding V .. Vp - 1.
// a target outside 0..V-1 gives a loss of NaN
extern "C" __global__ void __launch_bounds__(512)
fused_classifier_kernel(float* __restrict__ losses, float* __restrict__ logits, const int* __restrict__ targets, int V,
                        int Vp, float dloss) {
    __shared__ Softmax shared[512 / WARP];
    const int n = blockIdx.x;
    float* row = logits + (size_t)n * Vp;
    if (Vp % 4 == 0 && aligned(logits)) {
        classify_row<4>(losses + n, row, targets[n], shared, V, Vp, dloss);
    } else {
        classify_row<1>(losses + n, row, targets[n], shared, V, Vp, dloss);
    }
}
