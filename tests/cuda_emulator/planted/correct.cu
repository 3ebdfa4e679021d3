// correct.cu: kernels without a mistake; between them they use all of CUDA that the emulator knows

#define TILE 16

__constant__ float halves[3] = {0.5f, 1.0f, 1.5f};

template <int WIDTH> __device__ __forceinline__ int group_max(unsigned mask, int value) {
#pragma unroll
    for (int step = WIDTH / 2; step > 0; step /= 2) { value = max(value, __shfl_xor_sync(mask, value, step, WIDTH)); }
    return value;
}

// out (N) = sums of the rows of inp (N,C), a warp a row; warps beyond the last row leave at once
extern "C" __global__ void __launch_bounds__(256)
row_sum_by_shuffle(float* __restrict__ out, const float* __restrict__ inp, int N, int C) {
    const int row = (blockIdx.x * blockDim.x + threadIdx.x) / warpSize, lane = threadIdx.x % warpSize;
    if (row >= N) { return; }
    float sum = 0.0f;
    for (int c = lane; c < C; c += warpSize) { sum += __ldg(&inp[(size_t)row * C + c]); }
    for (unsigned step = 16; step > 0; step /= 2) { sum += __shfl_down_sync(0xffffffffu, sum, step); }
    if (lane == 0) { out[row] = sum; }
}

// the same, a block of 128 a row: halves the number of sums until one is left. C is a multiple of 4
extern "C" __global__ void __launch_bounds__(128)
row_sum_by_shared(float* __restrict__ out, const float* __restrict__ inp, int C) {
    __shared__ float4 packs[128];
    __shared__ float sums[2][64], result;  // two in a declaration
    const int t = threadIdx.x;
    float4 pack = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    for (int c = t; c < C / 4; c += blockDim.x) {
        const float4 next = reinterpret_cast<const float4*>(inp + (size_t)blockIdx.x * C)[c];
        pack = make_float4(pack.x + next.x, pack.y + next.y, pack.z + next.z, pack.w + next.w);
    }
    packs[t] = pack;
    __syncthreads();
    sums[t / 64][t % 64] = packs[t].x + packs[t].y + packs[t].z + packs[t].w;
    for (int half = 64; half > 0; half /= 2) {
        __syncthreads();
        float* const flat = &sums[0][0];
        if (t < half) { flat[t] += flat[t + half]; }
    }
    if (t == 0) {
        result = sums[0][0];
        out[blockIdx.x] = result;
    }
}

// out (M,N) = a (M,K) b (K,N), a tile of TILE x TILE outputs a block
extern "C" __global__ void __launch_bounds__(256)
matmul_by_tiles(float* __restrict__ out, const float* __restrict__ a, const float* __restrict__ b, int M, int N,
                int K) {
    extern __shared__ float tiles[];
    float* const a_tile = tiles;
    float* const b_tile = tiles + TILE * (TILE + 1);
    const int x = threadIdx.x, y = threadIdx.y, row = blockIdx.y * TILE + y, column = blockIdx.x * TILE + x;
    float sum = 0.0f;
    for (int k = 0; k < K; k += TILE) {
        a_tile[y * (TILE + 1) + x] = row < M && k + x < K ? a[row * K + k + x] : 0.0f;
        b_tile[y * TILE + x] = k + y < K && column < N ? b[(k + y) * N + column] : 0.0f;
        __syncthreads();
        for (int i = 0; i < TILE; i++) { sum = fmaf(a_tile[y * (TILE + 1) + i], b_tile[i * TILE + x], sum); }
        __syncthreads();
    }
    if (row < M && column < N) { out[row * N + column] = sum; }
}

// counts (bins) += how often each value occurs; total += the sum of all; largest = the largest, as the bits of a float
extern "C" __global__ void __launch_bounds__(256)
count_by_atomics(int* counts, float* total, int* largest, const int* inp, int N) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= N) { return; }
    atomicAdd(&counts[inp[i]], 1);
    atomicAdd(total, inp[i]);
    atomicMax(reinterpret_cast<unsigned*>(largest), __float_as_uint(inp[i]));
}

// out (N / 8) = the largest of 8 neighbours, by lanes under masks of their own; counts (warps): how many are positive
extern "C" __global__ void __launch_bounds__(128)
group_max_by_mask(int* out, int* counts, const int* inp, int N) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x, lane = threadIdx.x % 32;
    if (i >= N) { return; }
    const unsigned active = __activemask();
    const unsigned positive = __ballot_sync(active, inp[i] > 0);
    if (lane == 0) { counts[i / 32] = __popc(positive); }
    if (__any_sync(active, inp[i] > 0) != (positive != 0) || __all_sync(active, inp[i] > 0) != (positive == active)) {
        counts[i / 32] = -1;  // never
    }
    const unsigned mask = 0xffu << (lane & ~7);
    const int value = lane < 16 ? group_max<8>(mask, inp[i]) : group_max<8>(mask, inp[i]);  // halves go their own way
    if (lane % 8 == 0) { out[i / 8] = value; }
}

// out = inp with each 8 neighbours reversed, through shared memory: only those 8 lanes wait for each other
extern "C" __global__ void __launch_bounds__(64)
reverse_by_syncwarp(float* out, const float* inp, int rounds) {
    __shared__ volatile float values[64];
    const int t = threadIdx.x;
    const unsigned mask = 0xffu << (t % 32 & ~7);
    float value = inp[t];
    for (int round = 0; round < rounds; round++) {
        values[t] = value;
        __syncwarp(mask);
        value = values[t ^ 7];
        __syncwarp(mask);
    }
    out[t] = value;
}

// out (6,N): functions of inp (N), the grid and the block of three dimensions; N = their number of threads
extern "C" __global__ void __launch_bounds__(64)
functions_in_three_dimensions(float* out, double* twice, const float* inp, float scale, size_t N) {
    const int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    const size_t i = (size_t)block * (blockDim.x * blockDim.y * blockDim.z) + thread;
    const float x = inp[i];
    const float2 pair = make_float2(x, halves[i % 3]);
    out[i] = __expf(x) * scale;
    out[N + i] = __logf(fabsf(x) + 1.0f) + fmaxf(x, fminf(x, 0.0f));
    out[2 * N + i] = tanhf(pair.x) * pair.y;
    __stcs(&out[3 * N + i], rsqrtf(__fdividef(x * x + 1.0f, 2.0f)) + sqrtf(__ldcs(&inp[i]) + 8.0f));
    out[4 * N + i] = __ffs(thread) + 100 * __clz(thread) + min(thread, 7u);
    out[5 * N + i] = __int_as_float(__float_as_int(x) ^ 0x80000000);
    twice[i] = 2.0 * x;
}

// out (blocks) = how many of the block's values are positive, -1 if all or none; from a shuffle of all kinds
extern "C" __global__ void __launch_bounds__(256)
count_by_barrier(int* out, const float* inp, int* shuffled) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x, lane = threadIdx.x % 32;
    const int count = __syncthreads_count(inp[i] > 0.0f);
    const bool same = __syncthreads_and(inp[i] > 0.0f) || !__syncthreads_or(inp[i] > 0.0f);
    if (threadIdx.x == 0) { out[blockIdx.x] = same ? -1 : count; }
    const int up = __shfl_up_sync(0xffffffffu, lane, 3, 16), down = __shfl_down_sync(0xffffffffu, lane, 3, 16);
    const int from = __shfl_sync(0xffffffffu, lane, 5, 8);
    shuffled[i] = up + 100 * down + 10000 * from;
}
