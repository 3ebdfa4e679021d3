// inverse_lists.cu: which queries selected a key, from which keys a query selected; sparse backward passes use it to
// add up a key's gradient in one place, in a fixed order, where scattering from the queries would take float atomics
//
// index (B,T,K) strictly ascending in a list, count (B,T) -> offsets (B,T+1), pairs (B,T*K): list t of sequence b holds
// key s at place j for the pairs t*K + j from offsets[b,s] to offsets[b,s+1], ascending. A counting sort:
//   v1 one block a sequence, list after list   T barriers one after another, one multiprocessor
//   v2 chunks of lists (this)                  count in each chunk; sum over keys and chunks; place: in a chunk again
//                                              list after list, where no key comes twice, so that threads never meet
// Bytes: index is read twice, pairs written once, and `places` (B,chunks,T) written twice and read three times.

// places (B,chunks,T) = how often the lists of a chunk hold a key; grid (chunks, B), `lists` lists in a chunk
extern "C" __global__ void __launch_bounds__(256)
inverse_count_kernel(int* __restrict__ places, const int* __restrict__ index, const int* __restrict__ count, int T,
                     int K, int lists) {
    const size_t b = blockIdx.y;
    int* found = places + (b * gridDim.x + blockIdx.x) * T;
    for (int s = threadIdx.x; s < T; s += blockDim.x) { found[s] = 0; }
    __syncthreads();
    const int first = blockIdx.x * lists;
    const int last = min(first + lists, T);
    for (int t = first + threadIdx.x / WARP; t < last; t += blockDim.x / WARP) {
        const int n = count[b * T + t];
        for (int j = threadIdx.x % WARP; j < n; j += WARP) { atomicAdd(found + index[(b * T + t) * K + j], 1); }
    }
}

// places -> where the first pair of a key and a chunk goes; offsets (B,T+1); a block for each sequence
extern "C" __global__ void __launch_bounds__(1024)
inverse_sum_kernel(int* __restrict__ offsets, int* __restrict__ places, int T, int chunks) {
    __shared__ int warp_total[WARP];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const size_t b = blockIdx.x;
    int* found = places + b * chunks * T;
    int before = 0;  // pairs of the keys of earlier rounds
    for (int first = 0; first < T; first += blockDim.x) {
        const int s = first + threadIdx.x;
        int mine = 0;
        for (int chunk = 0; chunk < chunks && s < T; chunk++) { mine += found[(size_t)chunk * T + s]; }
        int sum = mine;  // the sum of this lane and those before it
#pragma unroll
        for (int step = 1; step < WARP; step *= 2) {
            const int other = __shfl_up_sync(ALL_LANES, sum, step);
            if (lane >= step) { sum += other; }
        }
        if (lane == WARP - 1) { warp_total[warp] = sum; }
        __syncthreads();
        int place = before + sum - mine;
        for (int w = 0; w < (int)blockDim.x / WARP; w++) {
            if (w < warp) { place += warp_total[w]; }
            before += warp_total[w];
        }
        __syncthreads();
        if (s < T) {
            offsets[b * (T + 1) + s] = place;
            for (int chunk = 0; chunk < chunks; chunk++) {
                const int next = place + found[(size_t)chunk * T + s];
                found[(size_t)chunk * T + s] = place;
                place = next;
            }
        }
    }
    if (threadIdx.x == 0) { offsets[b * (T + 1) + T] = before; }
}

// pairs, by places, which are moved on; grid as for the count
extern "C" __global__ void __launch_bounds__(256)
inverse_place_kernel(int* __restrict__ pairs, int* __restrict__ places, const int* __restrict__ index,
                     const int* __restrict__ count, int T, int K, int lists) {
    const size_t b = blockIdx.y;
    int* next = places + (b * gridDim.x + blockIdx.x) * T;
    const int first = blockIdx.x * lists;
    const int last = min(first + lists, T);
    for (int t = first; t < last; t++) {
        const int n = count[b * T + t];
        for (int j = threadIdx.x; j < n; j += blockDim.x) {
            const int s = index[(b * T + t) * K + j];
            const int place = next[s];
            pairs[b * T * K + place] = t * K + j;
            next[s] = place + 1;
        }
        __syncthreads();
    }
}
