// topk.cuh: the positions of a row's highest scores, ascending; it is compiled in front of the files that name it
//
// The versions are in select_topk.cu. Counts are integers, so their order does not matter. Scores are compared as
// integers, which no -ftz rounds to 0.

#define ITEMS 16  // scores of a thread
#define DIGIT 11  // bits
#define BINS (1 << DIGIT)

// integers in the order of the scores: NaN is -inf, -0 is 0, and forced keys are above all
__device__ __forceinline__ unsigned order_of(const float* row, int s, int t, int force_self, int sink) {
    if ((force_self && s == t) || (sink && s == 0)) { return 0xffffffffu; }
    unsigned bits = __float_as_uint(row[s]);
    if ((bits & 0x7fffffffu) > 0x7f800000u) { bits = 0xff800000u; }
    if (bits == 0x80000000u) { bits = 0; }
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// the sum over the threads before this one; `shared` has an int for each warp. every thread must pass another barrier
// before `shared` is used again
__device__ __forceinline__ int sum_before(int value, int* shared) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    int sum = value;
#pragma unroll
    for (int step = 1; step < WARP; step *= 2) {
        const int other = __shfl_up_sync(ALL_LANES, sum, step);
        if (lane >= step) { sum += other; }
    }
    if (lane == WARP - 1) { shared[warp] = sum; }
    __syncthreads();
    int before = sum - value;
    for (int w = 0; w < warp; w++) { before += shared[w]; }
    return before;
}

// where the histogram has a bin. neighbours, which count scores that are alike, lie in different banks, and so do the
// bins that the threads of a warp add up at a time
__device__ __forceinline__ int place_of(int bin) { return bin % 8 * (BINS / 8 + 4) + bin / 8; }

// index (n): the positions of the n highest of row[0..t], of equals the last ones, 0 < n <= t. by all threads of a block, a
// power of 2 of them, 32 or more; they see it after their next barrier
__device__ __forceinline__ void write_highest(int* __restrict__ index, const float* __restrict__ row, int t, int n,
                                              int force_self, int sink) {
    __shared__ int histogram[BINS + 32];
    __shared__ int sums[2][WARP];
    __shared__ int found[3];  // bin, how many of it are wanted, how many it has

    // a block has `tile` keys at a time, a warp ITEMS * WARP of them, side by side
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, tile = blockDim.x * ITEMS;
    const int own = warp * ITEMS * WARP + lane;  // a thread's first key in a tile; the next is WARP keys on
    const bool fits = t < tile;
    unsigned order[ITEMS];  // 0 behind t: no score gives that
    const auto read = [&](int begin) {
#pragma unroll
        for (int i = 0; i < ITEMS; i++) {
            const int s = begin + own + i * WARP;
            order[i] = s <= t ? order_of(row, s, t, force_self, sink) : 0;
        }
    };
    if (fits) { read(0); }

    unsigned threshold = 0;      // the n-th highest: its bits from `known` on
    int known = 32;
    int equals = n, there = -1;  // how many are wanted of those that share these bits, and how many there are
    while (known > 0 && there != equals) {
        const int shift = max(known - DIGIT, 0);  // the last digit has bits that are known
        for (int i = threadIdx.x; i < BINS + 32; i += blockDim.x) { histogram[i] = 0; }
        __syncthreads();
        for (int begin = 0; begin <= t; begin += tile) {
            if (!fits) { read(begin); }
#pragma unroll
            for (int i = 0; i < ITEMS; i++) {
                // a shift by 32 would be undefined
                const bool shares = known == 32 ? order[i] != 0 : (order[i] ^ threshold) >> known == 0;
                if (shares) { atomicAdd(&histogram[place_of(order[i] >> shift & (BINS - 1))], 1); }
            }
        }
        __syncthreads();
        const int bins = BINS / blockDim.x;
        int bin = BINS - 1 - threadIdx.x * bins;  // this thread's first, the highest
        int here = 0;
        for (int i = 0; i < bins; i++) { here += histogram[place_of(bin - i)]; }
        int above = sum_before(here, sums[0]);
        if (above < equals && above + here >= equals) {  // one thread alone
            int of_bin = histogram[place_of(bin)];
            while (above + of_bin < equals) {
                above += of_bin;
                of_bin = histogram[place_of(--bin)];
            }
            found[0] = bin;
            found[1] = equals - above;
            found[2] = of_bin;
        }
        __syncthreads();
        threshold |= (unsigned)found[0] << shift;
        equals = found[1];
        there = found[2];
        known = shift;
    }

    const int skipped = there - equals;  // equals that are too old; none if bits of the threshold are not known
    int higher = 0, equal = 0;           // in the tiles before this one
    for (int begin = 0; begin <= t; begin += tile) {
        if (!fits) { read(begin); }
        int of_warp[2] = {0, 0};
#pragma unroll
        for (int i = 0; i < ITEMS; i++) {
            of_warp[0] += __popc(__ballot_sync(ALL_LANES, order[i] > threshold));
            of_warp[1] += __popc(__ballot_sync(ALL_LANES, order[i] == threshold));
        }
        __syncthreads();  // the sums of the tile before, or of the last digit, have been read
        if (lane == 0) {
            sums[0][warp] = of_warp[0];
            sums[1][warp] = of_warp[1];
        }
        __syncthreads();
        int higher_before = higher, equal_before = equal;
        for (int w = 0; w < (int)blockDim.x / WARP; w++) {
            higher_before += w < warp ? sums[0][w] : 0;
            equal_before += w < warp ? sums[1][w] : 0;
            higher += sums[0][w];
            equal += sums[1][w];
        }
        const unsigned lanes_before = (1u << lane) - 1;
#pragma unroll
        for (int i = 0; i < ITEMS; i++) {
            const bool is_higher = order[i] > threshold, is_equal = order[i] == threshold;
            const unsigned higher_lanes = __ballot_sync(ALL_LANES, is_higher);
            const unsigned equal_lanes = __ballot_sync(ALL_LANES, is_equal);
            const int highers = higher_before + __popc(higher_lanes & lanes_before);
            const int recent = equal_before + __popc(equal_lanes & lanes_before) - skipped;
            if (is_higher || (is_equal && recent >= 0)) { index[highers + max(recent, 0)] = begin + own + i * WARP; }
            higher_before += __popc(higher_lanes);
            equal_before += __popc(equal_lanes);
        }
    }
}
