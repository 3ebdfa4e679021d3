// rmsnorm.cu: normalisation by the root mean square over the first C columns of a row, and its gradients
// (kernels/cpu/deepseek/rmsnorm.py)
//
// rmsnorm_forward_kernel: x is read once, out written once
//   v1 one thread a row          neighbours read addresses a row apart
//   v2 one warp a row (this)     no barrier; up to 1024 channels stay in registers, what lies beyond is read again
// rmsnorm_backward_kernel: one block takes several rows one after another
//   v1 two kernels               rows for dinp, columns for dweight: dout and inp are read twice
//   v2 one kernel (this)         a thread owns columns, keeps their sums in registers, writes them once a block

#define EPS 1e-6f

template <int W, int KEPT>
__device__ __forceinline__ void rmsnorm_row(float* out, float* rrms, const float* x, const float* weight, size_t n,
                                            int C) {
    const int lane = threadIdx.x % WARP;
    const int packs = C / W;
    float squares = 0.0f;
    auto add_squares = [&](Pack<W> values) {
#pragma unroll
        for (int j = 0; j < W; j++) { squares += values.at[j] * values.at[j]; }
    };
    Pack<W> kept[KEPT];
#pragma unroll
    for (int k = 0; k < KEPT; k++) {
        const int i = lane + WARP * k;
        if (i < packs) {
            kept[k] = load<W>(x, i);
            add_squares(kept[k]);
        }
    }
    for (int i = lane + WARP * KEPT; i < packs; i += WARP) { add_squares(load<W>(x, i)); }
    const float r = 1.0f / sqrtf(warp_sum(squares) / C + EPS);

    auto write = [&](int i, Pack<W> values) {
        const Pack<W> w = load<W>(weight, i);
#pragma unroll
        for (int j = 0; j < W; j++) { values.at[j] *= r * w.at[j]; }
        store<W>(out, n * packs + i, values);
    };
#pragma unroll
    for (int k = 0; k < KEPT; k++) {
        if (lane + WARP * k < packs) { write(lane + WARP * k, kept[k]); }
    }
    for (int i = lane + WARP * KEPT; i < packs; i += WARP) { write(i, load<W>(x, i)); }
    if (lane == 0) { rrms[n] = r; }
}

// out (N,C), rrms (N) from the first C columns of inp (N,columns), weight (C)
extern "C" __global__ void __launch_bounds__(256)
rmsnorm_forward_kernel(float* __restrict__ out, float* __restrict__ rrms, const float* __restrict__ inp,
                       const float* __restrict__ weight, int N, int C, int columns) {
    const int n = (blockIdx.x * blockDim.x + threadIdx.x) / WARP;
    if (n >= N) { return; }
    const float* x = inp + (size_t)n * columns;
    if (C % 4 == 0 && columns % 4 == 0 && aligned(out, inp, weight)) {
        rmsnorm_row<4, 8>(out, rrms, x, weight, n, C);
    } else {
        rmsnorm_row<1, 1>(out, rrms, x, weight, n, C);
    }
}

// with g = w * dy and xhat = x * rrms: dx = rrms * (g - xhat * mean_C(g * xhat)). a block takes rows first .. last - 1,
// a thread the packs threadIdx.x + k * blockDim.x, k < PACKS
template <int W, int PACKS>
__device__ __forceinline__ void rmsnorm_rows_backward(float* dinp, float* partial, const float* dout, const float* inp,
                                                      const float* weight, const float* rrms, float* shared, int first,
                                                      int last, int C, int dcolumns, int columns) {
    const int packs = C / W;
    Pack<W> dweight[PACKS];
#pragma unroll
    for (int k = 0; k < PACKS; k++) { dweight[k] = zeros<W>(); }
    for (int n = first; n < last; n++) {
        const float r = rrms[n];
        const float* x = inp + (size_t)n * columns;
        float* dx = dinp + (size_t)n * dcolumns;
        Pack<W> xhat[PACKS], g[PACKS];
        float gx_sum = 0.0f;
#pragma unroll
        for (int k = 0; k < PACKS; k++) {
            const int i = threadIdx.x + k * blockDim.x;
            if (i >= packs) { continue; }
            const Pack<W> dy = load<W>(dout, (size_t)n * packs + i);
            const Pack<W> w = load<W>(weight, i);
            xhat[k] = load<W>(x, i);
#pragma unroll
            for (int j = 0; j < W; j++) {
                xhat[k].at[j] *= r;
                g[k].at[j] = dy.at[j] * w.at[j];
                dweight[k].at[j] += dy.at[j] * xhat[k].at[j];
                gx_sum += g[k].at[j] * xhat[k].at[j];
            }
        }
        // by turns: the barrier of the next row frees this one's
        const float gx_mean = block_sum(gx_sum, shared + n % 2 * WARP) / C;
#pragma unroll
        for (int k = 0; k < PACKS; k++) {
            const int i = threadIdx.x + k * blockDim.x;
            if (i >= packs) { continue; }
            Pack<W> values;
#pragma unroll
            for (int j = 0; j < W; j++) { values.at[j] = r * (g[k].at[j] - xhat[k].at[j] * gx_mean); }
            store<W>(dx, i, values);
        }
    }
#pragma unroll
    for (int k = 0; k < PACKS; k++) {
        const int i = threadIdx.x + k * blockDim.x;
        if (i < packs) { store<W>(partial, (size_t)blockIdx.x * packs + i, dweight[k]); }
    }
}

template <int PACKS>
__device__ __forceinline__ void rmsnorm_backward(float* dinp, float* partial, const float* dout, const float* inp,
                                                 const float* weight, const float* rrms, int N, int C, int dcolumns,
                                                 int columns, int rows) {
    __shared__ float shared[2 * WARP];
    const int first = blockIdx.x * rows;
    const int last = min(first + rows, N);
    if ((C | dcolumns | columns) % 4 == 0 && aligned(dinp, dout, inp, weight) && aligned(partial)) {
        rmsnorm_rows_backward<4, PACKS>(dinp, partial, dout, inp, weight, rrms, shared, first, last, C, dcolumns,
                                        columns);
    } else {
        rmsnorm_rows_backward<1, 4 * PACKS>(dinp, partial, dout, inp, weight, rrms, shared, first, last, C, dcolumns,
                                            columns);
    }
}

// the first C columns of dinp (N,dcolumns) = ... from dout (N,C), inp (N,columns), weight (C), rrms (N); partial
// (blocks,C) gets each block's sums over its `rows` rows for dweight. blockDim.x: whole warps, at least C / 4 threads
extern "C" __global__ void __launch_bounds__(256)
rmsnorm_backward_kernel(float* __restrict__ dinp, float* __restrict__ partial, const float* __restrict__ dout,
                        const float* __restrict__ inp, const float* __restrict__ weight,
                        const float* __restrict__ rrms, int N, int C, int dcolumns, int columns, int rows) {
    rmsnorm_backward<1>(dinp, partial, dout, inp, weight, rrms, N, C, dcolumns, columns, rows);
}

// rmsnorm_backward_kernel for 1024 < C <= 2048, with twice the registers
extern "C" __global__ void __launch_bounds__(256)
rmsnorm_backward_wide_kernel(float* __restrict__ dinp, float* __restrict__ partial, const float* __restrict__ dout,
                             const float* __restrict__ inp, const float* __restrict__ weight,
                             const float* __restrict__ rrms, int N, int C, int dcolumns, int columns, int rows) {
    rmsnorm_backward<2>(dinp, partial, dout, inp, weight, rrms, N, C, dcolumns, columns, rows);
}
