// keep_controller.cu: how many keys each query keeps, by a network of 5, 16 and 1 units, and its gradients
// (kernels/cpu/sparse/keep_controller.py)
//
// keep_controller_forward_kernel: few rows, a launch for each block of queries, so what counts is latency
//   v1 a thread a row            96 products one after another, rows of hidden written 64 bytes apart
//   v2 16 lanes a row (this)     a lane has a hidden unit; writes are coalesced, four shuffles add up the logit
// keep_controller_backward_kernel: a block sums over 128 rows, keep_controller_add_kernel over blocks, in their order
//   v1 a matrix product          dh (N,16) goes through memory, and a 16 x 5 result keeps no cuBLAS kernel busy
//   v2 a thread a gradient (this)  rows wait in shared memory; 113 threads walk down them

#define FEATURES 5
#define HIDDEN 16
#define ROWS 128                             // rows, and threads, of a block of the backward pass
#define W1 (HIDDEN * FEATURES)               // gradients lie behind each other: w1, b1, w2, b2
#define B1 (W1 + HIDDEN)
#define W2 (B1 + HIDDEN)
#define PARAMETERS (W2 + 1)
#define CERTAIN (1.0f / (1 << 23))           // kappa is taken to be no nearer to 0 and 1 in losses

// keep, kappa (B,Tq), hidden (B,Tq,16) from features (B,Tq,5), w1 (16,5), b1 (16), w2 (16), b2 (1), for queries
// first .. first + rows - 1 of each sequence; row 0 is position start
extern "C" __global__ void __launch_bounds__(256)
keep_controller_forward_kernel(int* __restrict__ keep, float* __restrict__ kappa, float* __restrict__ hidden,
                               const float* __restrict__ features, const float* __restrict__ w1,
                               const float* __restrict__ b1, const float* __restrict__ w2,
                               const float* __restrict__ b2, int B, int Tq, int first, int rows, int most, int start) {
    const int row = (blockIdx.x * blockDim.x + threadIdx.x) / HIDDEN;
    const int unit = threadIdx.x % HIDDEN;
    const int last = B * rows - 1;
    const int of = min(row, last);  // lanes without a row go along for the shuffles
    const int t = first + of % rows;
    const size_t n = (size_t)(of / rows) * Tq + (t - start);
    float h = b1[unit];
#pragma unroll
    for (int i = 0; i < FEATURES; i++) { h = fmaf(features[n * FEATURES + i], w1[unit * FEATURES + i], h); }
    h = h < 0.0f ? 0.0f : h;  // a NaN stays one
    float logit = h * w2[unit];
#pragma unroll
    for (int step = HIDDEN / 2; step > 0; step /= 2) { logit += __shfl_xor_sync(ALL_LANES, logit, step); }
    if (row > last) { return; }
    hidden[n * HIDDEN + unit] = h;
    if (unit > 0) { return; }
    const float share = 1.0f / (1.0f + expf(-(logit + b2[0])));
    kappa[n] = share;
    keep[n] = (int)fmaxf(fminf(rintf(share * (t + 1)), (float)min(t + 1, most)), 1.0f);  // legal even for a NaN
}

// losses (N) = cross entropy of kappa (N) against target / (t + 1), and of dscale * their sum, partial (blocks,113) the
// gradients from each block's 128 rows. target (N), hidden (N,16), features (N,5), w2 (16); row n is position n % T
extern "C" __global__ void __launch_bounds__(128)
keep_controller_backward_kernel(float* __restrict__ losses, float* __restrict__ partial,
                                const int* __restrict__ target, const float* __restrict__ kappa,
                                const float* __restrict__ hidden, const float* __restrict__ features,
                                const float* __restrict__ w2, int N, int T, float dscale) {
    __shared__ float dlogit[ROWS];
    __shared__ float shared_hidden[ROWS * HIDDEN];
    __shared__ float shared_features[ROWS * FEATURES];
    const int j = threadIdx.x;
    const size_t first = (size_t)blockIdx.x * ROWS;
    const int rows = min(ROWS, N - (int)first);
    if (j < rows) {
        const size_t n = first + j;
        const float wanted = (float)target[n] / ((int)n % T + 1);
        const float share = kappa[n];
        const float p = share < CERTAIN ? CERTAIN : (share > 1.0f - CERTAIN ? 1.0f - CERTAIN : share);
        losses[n] = -wanted * logf(p) - (1.0f - wanted) * log1pf(-p);
        dlogit[j] = (share - wanted) * dscale;
    }
    for (int i = j; i < rows * HIDDEN; i += ROWS) { shared_hidden[i] = hidden[first * HIDDEN + i]; }
    for (int i = j; i < rows * FEATURES; i += ROWS) { shared_features[i] = features[first * FEATURES + i]; }
    __syncthreads();
    if (j >= PARAMETERS) { return; }

    // a row's gradients, all times dlogit: w1 gets [h > 0] w2 f, b1 [h > 0] w2, w2 h, b2 1
    const bool below = j < B1;  // the hidden units
    const bool weight = j < W1;
    const int unit = weight ? j / FEATURES : below ? j - W1 : j < W2 ? j - B1 : 0;
    const float scale = below ? w2[unit] : 1.0f;
    float total = 0.0f;
    for (int r = 0; r < rows; r++) {
        const float h = shared_hidden[r * HIDDEN + unit];
        float slope = j < W2 ? h : 1.0f;
        if (below) { slope = h > 0.0f ? scale : 0.0f; }
        if (weight) { slope *= shared_features[r * FEATURES + j % FEATURES]; }
        total += dlogit[r] * slope;
    }
    partial[(size_t)blockIdx.x * PARAMETERS + j] = total;
}

// dw1 (16,5), db1 (16), dw2 (16), db2 (1) += the sums over partial (blocks,113); one block
extern "C" __global__ void __launch_bounds__(128)
keep_controller_add_kernel(float* __restrict__ dw1, float* __restrict__ db1, float* __restrict__ dw2,
                           float* __restrict__ db2, const float* __restrict__ partial, int blocks) {
    const int j = threadIdx.x;
    if (j >= PARAMETERS) { return; }
    float total = 0.0f;
#pragma unroll 8
    for (int block = 0; block < blocks; block++) { total += partial[(size_t)block * PARAMETERS + j]; }
    float* gradient = j < W1 ? dw1 + j : j < B1 ? db1 + (j - W1) : j < W2 ? dw2 + (j - B1) : db2;
    *gradient += total;
}
