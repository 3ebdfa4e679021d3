// random_scores.cu: numbers that follow from the seed and their place alone (kernels/cpu/sparse/random_scores.py)
//
//   v1 a generator's state a thread   the numbers depend on the grid
//   v2 a hash of the place (this)     20 integer operations, once for all B; in 24 bits, so exact: the CPU's bits

__device__ __forceinline__ unsigned mix(unsigned bits) {
    bits = (bits ^ bits >> 16) * 0x85EBCA6Bu;
    bits = (bits ^ bits >> 13) * 0xC2B2AE35u;
    return bits ^ bits >> 16;
}

// scores (B,R,S), seed (1); grid (ceil(S / threads), R)
extern "C" __global__ void __launch_bounds__(256)
random_scores_kernel(float* __restrict__ scores, const int* __restrict__ seed, int B, int R, int S, int first) {
    const int s = blockIdx.x * blockDim.x + threadIdx.x;
    if (s >= S) { return; }
    for (int r = blockIdx.y; r < R; r += gridDim.y) {
        const unsigned t = first + r;
        const unsigned bits = mix(mix(mix((unsigned)seed[0]) + t) + 0x9E3779B1u * s);
        const float x = s <= (int)t ? (bits >> 8) * 0x1p-24f : MINUS_INFINITY;
        for (int b = 0; b < B; b++) { scores[((size_t)b * R + r) * S + s] = x; }
    }
}
