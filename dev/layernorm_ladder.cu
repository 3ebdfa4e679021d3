// layernorm_ladder.cu: the versions of layer normalisation on the way to kernels/cuda/gpt2/layernorm.cu
//
// doc/layernorm.md goes through them; tests/test_doc.py runs each against NumPy on the emulator, races and bounds checked.
//   layernorm_forward1    one thread a row
//   layernorm_forward2    one block a row
//   layernorm_forward3    one warp a row
//   layernorm_backward1   two kernels: rows for dinp, columns for dweight and dbias
// inp (N,C) -> out (N,C), mean (N), rstd (N)

#define EPS 1e-5f

// grid: N / 256 blocks, rounded up
extern "C" __global__ void __launch_bounds__(256)
layernorm_forward1(float* out, float* mean, float* rstd, const float* inp, const float* weight, const float* bias,
                   int N, int C) {
    const int n = blockIdx.x * blockDim.x + threadIdx.x;
    if (n >= N) { return; }
    const float* x = inp + (size_t)n * C;

    float m = 0.0f;
    for (int c = 0; c < C; c++) { m += x[c]; }
    m /= C;
    float var = 0.0f;
    for (int c = 0; c < C; c++) { var += (x[c] - m) * (x[c] - m); }
    const float s = 1.0f / sqrtf(var / C + EPS);
    for (int c = 0; c < C; c++) { out[(size_t)n * C + c] = (x[c] - m) * s * weight[c] + bias[c]; }
    mean[n] = m;
    rstd[n] = s;
}

// grid: N blocks of whole warps
extern "C" __global__ void __launch_bounds__(256)
layernorm_forward2(float* out, float* mean, float* rstd, const float* inp, const float* weight, const float* bias,
                   int C) {
    __shared__ float sums[2 * WARP];
    const size_t n = blockIdx.x;
    const float* x = inp + n * C;

    float total = 0.0f;
    for (int c = threadIdx.x; c < C; c += blockDim.x) { total += x[c]; }
    const float m = block_sum(total, sums) / C;
    float squares = 0.0f;
    for (int c = threadIdx.x; c < C; c += blockDim.x) { squares += (x[c] - m) * (x[c] - m); }
    const float s = 1.0f / sqrtf(block_sum(squares, sums + WARP) / C + EPS);
    for (int c = threadIdx.x; c < C; c += blockDim.x) { out[n * C + c] = (x[c] - m) * s * weight[c] + bias[c]; }
    if (threadIdx.x == 0) {
        mean[n] = m;
        rstd[n] = s;
    }
}

// grid: N / 8 blocks of 8 warps, rounded up
extern "C" __global__ void __launch_bounds__(256)
layernorm_forward3(float* out, float* mean, float* rstd, const float* inp, const float* weight, const float* bias,
                   int N, int C) {
    const int lane = threadIdx.x % WARP;
    const size_t n = (blockIdx.x * blockDim.x + threadIdx.x) / WARP;
    if (n >= N) { return; }
    const float* x = inp + n * C;

    float total = 0.0f;
    for (int c = lane; c < C; c += WARP) { total += x[c]; }
    const float m = warp_sum(total) / C;
    float squares = 0.0f;
    for (int c = lane; c < C; c += WARP) { squares += (x[c] - m) * (x[c] - m); }
    const float s = 1.0f / sqrtf(warp_sum(squares) / C + EPS);
    for (int c = lane; c < C; c += WARP) { out[n * C + c] = (x[c] - m) * s * weight[c] + bias[c]; }
    if (lane == 0) {
        mean[n] = m;
        rstd[n] = s;
    }
}

// dinp (N,C) += ...; grid: N blocks of whole warps
extern "C" __global__ void __launch_bounds__(256)
layernorm_backward1_rows(float* dinp, const float* dout, const float* inp, const float* weight, const float* mean,
                         const float* rstd, int C) {
    __shared__ float sums[2 * WARP];
    const size_t n = blockIdx.x;
    const float m = mean[n], s = rstd[n];
    float g_sum = 0.0f, gx_sum = 0.0f;
    for (int c = threadIdx.x; c < C; c += blockDim.x) {
        const float g = dout[n * C + c] * weight[c];
        g_sum += g;
        gx_sum += g * (inp[n * C + c] - m) * s;
    }
    const float g_mean = block_sum(g_sum, sums) / C;
    const float gx_mean = block_sum(gx_sum, sums + WARP) / C;
    for (int c = threadIdx.x; c < C; c += blockDim.x) {
        const float xhat = (inp[n * C + c] - m) * s;
        dinp[n * C + c] += s * (dout[n * C + c] * weight[c] - g_mean - xhat * gx_mean);
    }
}

// dweight (C) += ..., dbias (C) += ...; grid: C / 256 blocks, rounded up
extern "C" __global__ void __launch_bounds__(256)
layernorm_backward1_columns(float* dweight, float* dbias, const float* dout, const float* inp, const float* mean,
                            const float* rstd, int N, int C) {
    const int c = blockIdx.x * blockDim.x + threadIdx.x;
    if (c >= C) { return; }
    float dw = 0.0f, db = 0.0f;
    for (size_t n = 0; n < N; n++) {
        dw += dout[n * C + c] * (inp[n * C + c] - mean[n]) * rstd[n];
        db += dout[n * C + c];
    }
    dweight[c] += dw;
    dbias[c] += db;
}
