// router.cu: which experts a token goes to, and with what weight (kernels/cpu/deepseek/router.py)
//
//   v1 one thread a token        neighbours read E floats apart; few threads
//   v2 one warp a token (this)   coalesced; the `top` largest one after another, each a maximum over the warp

// whether expert e with logit z comes before expert `other` with logit `than`: the larger first, of equals the lower
// number, NaN last; expert -1 is none
__device__ __forceinline__ bool comes_before(float z, int e, float than, int other) {
    if (e < 0 || other < 0) { return e >= 0; }
    if (z > than) { return true; }
    if (z < than) { return false; }
    const bool is_nan = z != z;
    const bool than_is_nan = than != than;
    return is_nan == than_is_nan ? e < other : than_is_nan;
}

// probs (N,E), gates (N,top), experts (N,top) from logits (N,E), E at most 32 * 32; a warp a token
extern "C" __global__ void __launch_bounds__(256)
router_forward_kernel(float* __restrict__ probs, float* __restrict__ gates, int* __restrict__ experts,
                      const float* __restrict__ logits, int N, int E, int top) {
    const int n = (blockIdx.x * blockDim.x + threadIdx.x) / WARP;
    const int lane = threadIdx.x % WARP;
    if (n >= N) { return; }
    const float* row = logits + (size_t)n * E;
    float largest = MINUS_INFINITY;
    for (int e = lane; e < E; e += WARP) { largest = fmaxf(largest, row[e]); }
    largest = warp_max(largest);
    float total = 0.0f;
    for (int e = lane; e < E; e += WARP) { total += expf(row[e] - largest); }
    total = warp_sum(total);
    for (int e = lane; e < E; e += WARP) { probs[(size_t)n * E + e] = expf(row[e] - largest) / total; }

    unsigned taken = 0;  // bit i: expert lane + 32 i
    float first = 0.0f, total_of_chosen = 0.0f;
    for (int j = 0; j < top; j++) {
        float z = 0.0f;
        int chosen = -1;
        for (int e = lane; e < E; e += WARP) {
            if (!(taken >> (e / WARP) & 1) && comes_before(row[e], e, z, chosen)) {
                z = row[e];
                chosen = e;
            }
        }
#pragma unroll
        for (int step = WARP / 2; step > 0; step /= 2) {
            const float other_z = __shfl_xor_sync(ALL_LANES, z, step);
            const int other = __shfl_xor_sync(ALL_LANES, chosen, step);
            if (comes_before(other_z, other, z, chosen)) {
                z = other_z;
                chosen = other;
            }
        }
        if (chosen % WARP == lane) { taken |= 1u << (chosen / WARP); }
        if (j == 0) { first = z; }
        const float weight = expf(z - first);
        total_of_chosen += weight;
        if (lane == 0) {
            experts[(size_t)n * top + j] = chosen;
            gates[(size_t)n * top + j] = weight;
        }
    }
    if (lane == 0) {
        for (int j = 0; j < top; j++) { gates[(size_t)n * top + j] /= total_of_chosen; }
    }
}

// dlogits (N,E) from dgates, gates, experts (N,top), probs (N,E), load (E); the balance loss's gradient by probs[n,e]
// is scale * load[e]; a warp a token
extern "C" __global__ void __launch_bounds__(256)
router_backward_kernel(float* __restrict__ dlogits, const float* __restrict__ dgates, const float* __restrict__ probs,
                       const float* __restrict__ gates, const int* __restrict__ experts, const int* __restrict__ load,
                       float scale, int N, int E, int top) {
    const int n = (blockIdx.x * blockDim.x + threadIdx.x) / WARP;
    const int lane = threadIdx.x % WARP;
    if (n >= N) { return; }
    const float* p = probs + (size_t)n * E;
    const float* g = gates + (size_t)n * top;
    const float* dg = dgates + (size_t)n * top;
    const int* chosen = experts + (size_t)n * top;
    float mean_dprob = 0.0f, mean_dgate = 0.0f;
    for (int e = lane; e < E; e += WARP) { mean_dprob += p[e] * (scale * load[e]); }
    for (int j = lane; j < top; j += WARP) { mean_dgate += g[j] * dg[j]; }
    mean_dprob = warp_sum(mean_dprob);
    mean_dgate = warp_sum(mean_dgate);
    for (int e = lane; e < E; e += WARP) {
        float dz = p[e] * (scale * load[e] - mean_dprob);
        for (int j = 0; j < top; j++) {
            if (chosen[j] == e) { dz += g[j] * (dg[j] - mean_dgate); }
        }
        dlogits[(size_t)n * E + e] = dz;
    }
}
