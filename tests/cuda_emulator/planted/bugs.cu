// bugs.cu: a mistake in each kernel; the tests expect the emulator to name it

// no __syncthreads between a warp's store and the others' loads
extern "C" __global__ void __launch_bounds__(64)
missing_syncthreads(float* out, const float* inp) {
    __shared__ float values[64];
    values[threadIdx.x] = inp[threadIdx.x];
    out[threadIdx.x] = values[63 - threadIdx.x];
}

// no __syncthreads at the end of the loop: a thread stores the next tile while others still load this one
extern "C" __global__ void __launch_bounds__(64)
missing_syncthreads_at_loop_end(float* out, const float* inp, int tiles) {
    __shared__ float tile[64];
    float sum = 0.0f;
    for (int i = 0; i < tiles; i++) {
        tile[threadIdx.x] = inp[64 * i + threadIdx.x];
        __syncthreads();
        for (int j = 0; j < 64; j++) { sum += tile[j]; }
    }
    out[threadIdx.x] = sum;
}

// a shuffle does not order memory, so __syncwarp is missing
extern "C" __global__ void __launch_bounds__(32)
missing_syncwarp(float* out, const float* inp) {
    __shared__ float values[32];
    values[threadIdx.x] = inp[threadIdx.x];
    const float zero = 0.0f * __shfl_xor_sync(0xffffffffu, inp[threadIdx.x], 1);
    out[threadIdx.x] = values[31 - threadIdx.x] + zero;
}

// half of the lanes wait for each other, but values come from the other half, too
extern "C" __global__ void __launch_bounds__(32)
syncwarp_of_too_few(float* out, const float* inp) {
    __shared__ float values[32];
    values[threadIdx.x] = inp[threadIdx.x];
    __syncwarp(threadIdx.x < 16 ? 0x0000ffffu : 0xffff0000u);
    out[threadIdx.x] = values[31 - threadIdx.x];
}

// an addition that is not atomic, by all blocks
extern "C" __global__ void __launch_bounds__(32)
missing_atomic(float* out, const float* inp, int C) {
    const int row = blockIdx.x;
    if (threadIdx.x < C) { out[threadIdx.x] += inp[row * C + threadIdx.x]; }
}

// atomics here, a plain load there
extern "C" __global__ void __launch_bounds__(32)
load_beside_atomics(float* out, float* total, const float* inp) {
    atomicAdd(total, inp[threadIdx.x]);
    if (threadIdx.x == 0) { out[0] = *total; }
}

extern "C" __global__ void __launch_bounds__(256)
store_out_of_bounds(float* out, const float* inp, int N) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i <= N) { out[i] = 2.0f * inp[i % N]; }
}

extern "C" __global__ void __launch_bounds__(256)
load_out_of_bounds(float* out, const float* inp, int N) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < N) { out[i] = inp[i - 1]; }
}

extern "C" __global__ void __launch_bounds__(32)
store_far_away(float* out, size_t distance) { out[threadIdx.x + distance] = 0.0f; }

// out and inp need not start at a multiple of 16 bytes
extern "C" __global__ void __launch_bounds__(32)
misaligned_float4(float* out, const float* inp) {
    const float4 pack = reinterpret_cast<const float4*>(inp)[threadIdx.x];
    out[threadIdx.x] = pack.y;
}

// a float array, and so not necessarily aligned to 16 bytes
extern "C" __global__ void __launch_bounds__(32)
misaligned_shared_float4(float* out) {
    __shared__ float values[128];
    reinterpret_cast<float4*>(values)[threadIdx.x] = make_float4(1.0f, 2.0f, 3.0f, 4.0f);
    out[threadIdx.x] = values[4 * threadIdx.x];
}

extern "C" __global__ void __launch_bounds__(32)
overrun_of_dynamic_shared(float* out, const float* inp) {
    extern __shared__ __align__(16) float values[];
    values[threadIdx.x + 1] = inp[threadIdx.x];
    __syncthreads();
    out[threadIdx.x] = values[threadIdx.x];
}

extern "C" __global__ void __launch_bounds__(32)
overrun_of_static_shared(float* out, const float* inp) {
    __shared__ float values[32];
    __shared__ float others[32];
    float* const flat = values;
    flat[threadIdx.x + 1] = inp[threadIdx.x];
    others[threadIdx.x] = inp[threadIdx.x];
    __syncthreads();
    out[threadIdx.x] = flat[threadIdx.x] + others[31 - threadIdx.x];
}

// stays inside the whole array
extern "C" __global__ void __launch_bounds__(32)
overrun_of_a_row(float* out, const float* inp) {
    __shared__ float values[32][8];
    values[threadIdx.x % 16][threadIdx.x / 3] = inp[threadIdx.x];
    __syncthreads();
    out[threadIdx.x] = values[threadIdx.x][0];
}

extern "C" __global__ void __launch_bounds__(32)
overrun_of_a_local_array(float* out, int N) {
    float values[4];
    for (int i = 0; i < 4; i++) { values[i] = i; }
    out[threadIdx.x] = values[threadIdx.x % N];
}

// one half shuffles, the other synchronises
extern "C" __global__ void __launch_bounds__(32)
divergent_shuffle(float* out) {
    float value = threadIdx.x;
    if (threadIdx.x < 16) {
        value = __shfl_xor_sync(0xffffffffu, value, 1);
    } else {
        __syncwarp(0xffffffffu);
    }
    out[threadIdx.x] = value;
}

extern "C" __global__ void __launch_bounds__(32)
lane_outside_its_mask(float* out) { out[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, (float)threadIdx.x, 1); }

extern "C" __global__ void __launch_bounds__(32)
shuffle_from_outside_the_mask(float* out) {
    if (threadIdx.x >= 16) { return; }
    out[threadIdx.x] = __shfl_sync(0x0000ffffu, (float)threadIdx.x, 16);
}

extern "C" __global__ void __launch_bounds__(32)
shuffle_from_a_lane_that_left(float* out, int N) {
    if (threadIdx.x >= N) { return; }
    out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, (float)threadIdx.x, 16);
}

// lanes name each other, but not in the same words
extern "C" __global__ void __launch_bounds__(32)
masks_that_differ(float* out) {
    __syncwarp(threadIdx.x < 16 ? 0xffffffffu : 0xffff0001u);
    out[threadIdx.x] = 1.0f;
}

extern "C" __global__ void __launch_bounds__(64)
barrier_for_one_half(float* out) {
    if (threadIdx.x < 32) { __syncthreads(); }
    out[threadIdx.x] = 1.0f;
}

// as many in each half, but not the same ones
extern "C" __global__ void __launch_bounds__(64)
barriers_in_two_branches(float* out) {
    if (threadIdx.x < 32) {
        out[threadIdx.x] = 1.0f;
        __syncthreads();
    } else {
        __syncthreads();
        out[threadIdx.x] = 1.0f;
    }
}

// half a warp waits for the block, the other half for its warp
extern "C" __global__ void __launch_bounds__(32)
barrier_against_syncwarp(float* out) {
    if (threadIdx.x < 16) { __syncthreads(); }
    __syncwarp();
    out[threadIdx.x] = 1.0f;
    if (threadIdx.x >= 16) { __syncthreads(); }
}

extern "C" __global__ void __launch_bounds__(32)
uninitialised_shared(float* out) {
    __shared__ float values[32];
    extern __shared__ float others[];
    if (threadIdx.x) { values[threadIdx.x] = others[threadIdx.x] = 1.0f; }
    __syncthreads();
    out[threadIdx.x] = values[31 - threadIdx.x] + others[threadIdx.x];
}

// with more than 32 KiB of dynamic shared memory beside it
extern "C" __global__ void __launch_bounds__(32) DYNAMIC_SHARED(81920)
much_shared(float* out) {
    __shared__ float values[4096];
    extern __shared__ float others[];
    values[threadIdx.x] = others[20479 - threadIdx.x] = 1.0f;
    out[threadIdx.x] = values[threadIdx.x] + others[20479 - threadIdx.x];
}

// the same, undeclared
extern "C" __global__ void __launch_bounds__(32)
too_much_shared(float* out) {
    __shared__ float values[4096];
    extern __shared__ float others[];
    values[threadIdx.x] = others[threadIdx.x] = 1.0f;
    out[threadIdx.x] = values[threadIdx.x] + others[threadIdx.x];
}
