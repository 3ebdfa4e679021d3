// layernorm.cu: layer normalisation over channels, alone or after a residual sum, and its gradients
// (kernels/cpu/gpt2/layernorm.py)
//
// layernorm_forward_kernel, fused_residual_forward_kernel: x (N,C) is read once, out written once
//   v1 one thread a row          neighbours read addresses C floats apart
//   v2 one block a row           barriers between mean, variance and output
//   v3 one warp a row            no barrier, but x comes three times through the cache
//   v4 and in registers (this)   up to 1024 channels: KEPT = 8 float4 a lane; what lies beyond is read again
// layernorm_backward_kernel: one block takes several rows one after another
//   v1 two kernels               rows for dinp, columns for dweight and dbias: dout and inp are read twice
//   v2 one kernel (this)         a thread owns columns, keeps their two sums in registers, writes them once a block

#define EPS 1e-5f

// the row in `kept` and, beyond WARP * KEPT packs, in x -> out, mean, rstd
template <int W, int KEPT>
__device__ __forceinline__ void normalise(float* out, float* mean, float* rstd, const Pack<W>* kept, const float* x,
                                          const float* weight, const float* bias, size_t n, int C) {
    const int lane = threadIdx.x % WARP;
    const int packs = C / W;
    float total = 0.0f;
#pragma unroll
    for (int k = 0; k < KEPT; k++) {
        if (lane + WARP * k < packs) { total += sum(kept[k]); }
    }
    for (int i = lane + WARP * KEPT; i < packs; i += WARP) { total += sum(load<W>(x, n * packs + i)); }
    const float m = warp_sum(total) / C;

    float squares = 0.0f;
    auto add_square = [&](Pack<W> values) {
#pragma unroll
        for (int j = 0; j < W; j++) { squares += (values.at[j] - m) * (values.at[j] - m); }
    };
#pragma unroll
    for (int k = 0; k < KEPT; k++) {
        if (lane + WARP * k < packs) { add_square(kept[k]); }
    }
    for (int i = lane + WARP * KEPT; i < packs; i += WARP) { add_square(load<W>(x, n * packs + i)); }
    const float s = 1.0f / sqrtf(warp_sum(squares) / C + EPS);

    auto write = [&](int i, Pack<W> values) {
        const Pack<W> w = load<W>(weight, i);
        const Pack<W> b = load<W>(bias, i);
#pragma unroll
        for (int j = 0; j < W; j++) { values.at[j] = (values.at[j] - m) * s * w.at[j] + b.at[j]; }
        store<W>(out, n * packs + i, values);
    };
#pragma unroll
    for (int k = 0; k < KEPT; k++) {
        if (lane + WARP * k < packs) { write(lane + WARP * k, kept[k]); }
    }
    for (int i = lane + WARP * KEPT; i < packs; i += WARP) { write(i, load<W>(x, n * packs + i)); }
    if (lane == 0) {
        mean[n] = m;
        rstd[n] = s;
    }
}

template <int W, int KEPT>
__device__ __forceinline__ void layernorm_row(float* out, float* mean, float* rstd, const float* inp,
                                              const float* weight, const float* bias, size_t n, int C) {
    const int packs = C / W;
    Pack<W> kept[KEPT];
#pragma unroll
    for (int k = 0; k < KEPT; k++) {
        const int i = threadIdx.x % WARP + WARP * k;
        if (i < packs) { kept[k] = load<W>(inp, n * packs + i); }
    }
    normalise<W, KEPT>(out, mean, rstd, kept, inp, weight, bias, n, C);
}

// out (N,C), mean (N), rstd (N) from inp (N,C), weight (C), bias (C)
extern "C" __global__ void __launch_bounds__(256)
layernorm_forward_kernel(float* __restrict__ out, float* __restrict__ mean, float* __restrict__ rstd,
                         const float* __restrict__ inp, const float* __restrict__ weight,
                         const float* __restrict__ bias, int N, int C) {
    const int n = (blockIdx.x * blockDim.x + threadIdx.x) / WARP;
    if (n >= N) { return; }
    if (C % 4 == 0 && aligned(out, inp, weight, bias)) {
        layernorm_row<4, 8>(out, mean, rstd, inp, weight, bias, n, C);
    } else {
        layernorm_row<1, 1>(out, mean, rstd, inp, weight, bias, n, C);
    }
}

template <int W, int KEPT>
__device__ __forceinline__ void residual_row(float* residual, float* out, float* mean, float* rstd, const float* inp1,
                                             const float* inp2, const float* weight, const float* bias, size_t n,
                                             int C) {
    const int packs = C / W;
    Pack<W> kept[KEPT];
    auto sum_at = [&](int i) {
        Pack<W> values = load<W>(inp1, n * packs + i);
        add(values, load<W>(inp2, n * packs + i));
        store<W>(residual, n * packs + i, values);
        return values;
    };
#pragma unroll
    for (int k = 0; k < KEPT; k++) {
        const int i = threadIdx.x % WARP + WARP * k;
        if (i < packs) { kept[k] = sum_at(i); }
    }
    for (int i = threadIdx.x % WARP + WARP * KEPT; i < packs; i += WARP) { sum_at(i); }
    normalise<W, KEPT>(out, mean, rstd, kept, residual, weight, bias, n, C);  // a lane reads back only what it wrote
}

// residual (N,C) = inp1 + inp2, and out, mean, rstd from residual as above; residual may be inp1 or inp2
extern "C" __global__ void __launch_bounds__(256)
fused_residual_forward_kernel(float* residual, float* out, float* mean, float* rstd, const float* inp1,
                              const float* inp2, const float* weight, const float* bias, int N, int C) {
    const int n = (blockIdx.x * blockDim.x + threadIdx.x) / WARP;
    if (n >= N) { return; }
    if (C % 4 == 0 && aligned(residual, out, inp1, inp2) && aligned(weight, bias)) {
        residual_row<4, 8>(residual, out, mean, rstd, inp1, inp2, weight, bias, n, C);
    } else {
        residual_row<1, 1>(residual, out, mean, rstd, inp1, inp2, weight, bias, n, C);
    }
}

// with g = w * dy and xhat = (x - mean) * rstd: dx = rstd * (g - mean_C(g) - xhat * mean_C(g * xhat)). a block takes
// rows first .. last - 1, a thread the packs threadIdx.x + k * blockDim.x, k < PACKS
template <int W, int PACKS>
__device__ __forceinline__ void layernorm_rows_backward(float* dinp, float* partial, const float* dout,
                                                        const float* inp, const float* weight, const float* mean,
                                                        const float* rstd, float* shared, int first, int last, int C) {
    const int packs = C / W;
    Pack<W> dweight[PACKS], dbias[PACKS];
#pragma unroll
    for (int k = 0; k < PACKS; k++) { dweight[k] = dbias[k] = zeros<W>(); }
    for (int n = first; n < last; n++) {
        const float m = mean[n];
        const float s = rstd[n];
        Pack<W> xhat[PACKS], g[PACKS];
        float g_sum = 0.0f;
        float gx_sum = 0.0f;
#pragma unroll
        for (int k = 0; k < PACKS; k++) {
            const int i = threadIdx.x + k * blockDim.x;
            if (i >= packs) { continue; }
            const Pack<W> dy = load<W>(dout, (size_t)n * packs + i);
            const Pack<W> w = load<W>(weight, i);
            xhat[k] = load<W>(inp, (size_t)n * packs + i);
#pragma unroll
            for (int j = 0; j < W; j++) {
                xhat[k].at[j] = (xhat[k].at[j] - m) * s;
                g[k].at[j] = dy.at[j] * w.at[j];
                dweight[k].at[j] += dy.at[j] * xhat[k].at[j];
                dbias[k].at[j] += dy.at[j];
                g_sum += g[k].at[j];
                gx_sum += g[k].at[j] * xhat[k].at[j];
            }
        }
        float* sums = shared + n % 2 * 2 * WARP;  // by turns: the barrier of the next row frees this one's
        g_sum = warp_sum(g_sum);
        gx_sum = warp_sum(gx_sum);
        if (threadIdx.x % WARP == 0) {
            sums[threadIdx.x / WARP] = g_sum;
            sums[threadIdx.x / WARP + WARP] = gx_sum;
        }
        __syncthreads();
        g_sum = gx_sum = 0.0f;
        for (int warp = 0; warp < (int)blockDim.x / WARP; warp++) {
            g_sum += sums[warp];
            gx_sum += sums[warp + WARP];
        }
        const float g_mean = g_sum / C;
        const float gx_mean = gx_sum / C;
#pragma unroll
        for (int k = 0; k < PACKS; k++) {
            const int i = threadIdx.x + k * blockDim.x;
            if (i >= packs) { continue; }
            Pack<W> dx = load<W>(dinp, (size_t)n * packs + i);
#pragma unroll
            for (int j = 0; j < W; j++) { dx.at[j] += s * (g[k].at[j] - g_mean - xhat[k].at[j] * gx_mean); }
            store<W>(dinp, (size_t)n * packs + i, dx);
        }
    }
#pragma unroll
    for (int k = 0; k < PACKS; k++) {
        const int i = threadIdx.x + k * blockDim.x;
        if (i >= packs) { continue; }
        store<W>(partial, (size_t)blockIdx.x * packs + i, dweight[k]);
        store<W>(partial, (size_t)(gridDim.x + blockIdx.x) * packs + i, dbias[k]);
    }
}

template <int PACKS>
__device__ __forceinline__ void layernorm_backward(float* dinp, float* partial, const float* dout, const float* inp,
                                                   const float* weight, const float* mean, const float* rstd, int N,
                                                   int C, int rows) {
    __shared__ float shared[4 * WARP];
    const int first = blockIdx.x * rows;
    const int last = min(first + rows, N);
    if (C % 4 == 0 && aligned(dinp, dout, inp, weight) && aligned(partial)) {
        layernorm_rows_backward<4, PACKS>(dinp, partial, dout, inp, weight, mean, rstd, shared, first, last, C);
    } else {
        layernorm_rows_backward<1, 4 * PACKS>(dinp, partial, dout, inp, weight, mean, rstd, shared, first, last, C);
    }
}

// dinp (N,C) += ... from dout, inp (N,C), weight (C), mean, rstd (N); partial (2,blocks,C) gets each block's sums over
// its `rows` rows for dweight and dbias. blockDim.x: whole warps, at least C / 4 threads
extern "C" __global__ void __launch_bounds__(256)
layernorm_backward_kernel(float* __restrict__ dinp, float* __restrict__ partial, const float* __restrict__ dout,
                          const float* __restrict__ inp, const float* __restrict__ weight,
                          const float* __restrict__ mean, const float* __restrict__ rstd, int N, int C, int rows) {
    layernorm_backward<1>(dinp, partial, dout, inp, weight, mean, rstd, N, C, rows);
}

// layernorm_backward_kernel for 1024 < C <= 4096, with four times the registers
extern "C" __global__ void __launch_bounds__(256)
layernorm_backward_wide_kernel(float* __restrict__ dinp, float* __restrict__ partial, const float* __restrict__ dout,
                               const float* __restrict__ inp, const float* __restrict__ weight,
                               const float* __restrict__ mean, const float* __restrict__ rstd, int N, int C,
                               int rows) {
    layernorm_backward<4>(dinp, partial, dout, inp, weight, mean, rstd, N, C, rows);
}
