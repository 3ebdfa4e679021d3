// fusion_matrix.cu: the matrix that mixes platters, and its factors' gradients (kernels/cpu/torus/fusion_matrix.py)
//
// At most 128 x 128 values, so what counts is the launch: one each way, a warp or a block a row.

#define IDENTITY 0  // FUSIONS
#define MEAN 1
#define LOW_RANK_RESIDUAL 3
#define ATTENTION 4

// omega (D,D) from first, second (D,r), which modes 0 and 1 do not read; a warp a row, a lane reads back what it wrote
extern "C" __global__ void __launch_bounds__(256)
fusion_matrix_forward_kernel(float* __restrict__ omega, const float* __restrict__ first,
                             const float* __restrict__ second, int D, int r, int mode) {
    const int k = (blockIdx.x * blockDim.x + threadIdx.x) / WARP;
    const int lane = threadIdx.x % WARP;
    if (k >= D) { return; }
    float top = MINUS_INFINITY;
    for (int l = lane; l < D; l += WARP) {
        float z = mode == MEAN ? 1.0f / D : 0.0f;
        if (mode > MEAN) {
            for (int t = 0; t < r; t++) { z = fmaf(first[k * r + t], second[l * r + t], z); }
            z /= sqrtf((float)r);
        }
        if (k == l && (mode == IDENTITY || mode == LOW_RANK_RESIDUAL)) { z += 1.0f; }
        omega[k * D + l] = z;
        top = fmaxf(top, z);
    }
    if (mode != ATTENTION) { return; }
    top = warp_max(top);
    float total = 0.0f;
    for (int l = lane; l < D; l += WARP) {
        const float weight = expf(omega[k * D + l] - top);
        omega[k * D + l] = weight;
        total += weight;
    }
    total = warp_sum(total);
    for (int l = lane; l < D; l += WARP) { omega[k * D + l] /= total; }
}

// row k = blockIdx.x of dfirst, dsecond (D,r) += ... from domega, omega (D,D), first, second, modes 2 to 4. For
// attention each block takes the dot products of all rows of domega and omega; dynamic shared memory: D floats
extern "C" __global__ void __launch_bounds__(128)
fusion_matrix_backward_kernel(float* __restrict__ dfirst, float* __restrict__ dsecond,
                              const float* __restrict__ domega, const float* __restrict__ omega,
                              const float* __restrict__ first, const float* __restrict__ second, int D, int r,
                              int mode) {
    extern __shared__ float dots[];
    if (mode == ATTENTION) {
        for (int row = threadIdx.x / WARP; row < D; row += blockDim.x / WARP) {
            float dot = 0.0f;
            for (int l = threadIdx.x % WARP; l < D; l += WARP) { dot += domega[row * D + l] * omega[row * D + l]; }
            dot = warp_sum(dot);
            if (threadIdx.x % WARP == 0) { dots[row] = dot; }
        }
        __syncthreads();
    }
    auto dz = [&](int row, int column) {
        const float d = domega[row * D + column];
        return mode == ATTENTION ? omega[row * D + column] * (d - dots[row]) : d;
    };
    const int k = blockIdx.x;
    const float scale = 1.0f / sqrtf((float)r);
    for (int t = threadIdx.x; t < r; t += blockDim.x) {
        float to_first = 0.0f;
        float to_second = 0.0f;
        for (int l = 0; l < D; l++) {
            to_first = fmaf(dz(k, l), second[l * r + t], to_first);
            to_second = fmaf(dz(l, k), first[l * r + t], to_second);
        }
        dfirst[k * r + t] += scale * to_first;
        dsecond[k * r + t] += scale * to_second;
    }
}
