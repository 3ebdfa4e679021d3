// topk.cuh: the positions of a row's highest scores, ascending; it is compiled in front of the files that name it
//
// The n-th highest by its digits: 4 histograms of 8 bits, each of what shares the digits found so far. Then one pass
// writes what is above, and of equals the last ones. Counts are integers, so their order does not matter. Each pass reads
// the row again, from L1: 1024 scores are 4 KiB. Scores are compared as integers, which no -ftz rounds to 0.

#define DIGIT 8  // bits
#define BINS (1 << DIGIT)

// integers in the order of the scores: NaN is -inf, -0 is 0, and forced keys are above all
__device__ __forceinline__ unsigned order_of(const float* row, int s, int t, int force_self, int sink) {
    if ((force_self && s == t) || (sink && s == 0)) { return 0xffffffffu; }
    unsigned bits = __float_as_uint(row[s]);
    if ((bits & 0x7fffffffu) > 0x7f800000u) { bits = 0xff800000u; }
    if (bits == 0x80000000u) { bits = 0; }
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// the sum over the threads before this one, in blocks of BINS threads; `shared` has an int for each warp. every thread
// must pass another barrier before `shared` is used again
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

// index (n): the positions of the n highest of row[0..t], of equals the last ones, 0 < n <= t. by all of a block of BINS
// threads, who see it after their next barrier
__device__ __forceinline__ void write_highest(int* __restrict__ index, const float* __restrict__ row, int t, int n,
                                              int force_self, int sink) {
    __shared__ int histogram[BINS];
    __shared__ int sums[2][BINS / WARP];
    __shared__ int found[3];  // digit, how many of its bin are wanted, how many it has

    unsigned threshold = 0;  // the digits of the n-th highest, found from the top
    int equals = n;          // how many are wanted of those that share these digits
    int there = 0;           // and so many there are
    for (int shift = 32 - DIGIT; shift >= 0; shift -= DIGIT) {
        histogram[threadIdx.x] = 0;
        __syncthreads();
        for (int s = threadIdx.x; s <= t; s += blockDim.x) {
            const unsigned order = order_of(row, s, t, force_self, sink);
            // a shift by 32 would be undefined
            if (shift == 32 - DIGIT || order >> (shift + DIGIT) == threshold) {
                atomicAdd(&histogram[order >> shift & (BINS - 1)], 1);
            }
        }
        __syncthreads();
        const int bin = BINS - 1 - threadIdx.x;  // the highest first
        const int here = histogram[bin];
        const int above = sum_before(here, sums[0]);
        if (above < equals && above + here >= equals) {  // one bin alone
            found[0] = bin;
            found[1] = equals - above;
            found[2] = here;
        }
        __syncthreads();
        threshold = threshold << DIGIT | found[0];
        equals = found[1];
        there = found[2];
    }

    const int skipped = there - equals;  // equals that are too old
    int higher = 0, equal = 0;           // in the chunks before this one
    for (int base = 0; base <= t; base += BINS) {
        const int s = base + threadIdx.x;
        const unsigned order = s <= t ? order_of(row, s, t, force_self, sink) : 0;
        const bool is_higher = s <= t && order > threshold, is_equal = s <= t && order == threshold;
        const unsigned higher_lanes = __ballot_sync(ALL_LANES, is_higher);
        const unsigned equal_lanes = __ballot_sync(ALL_LANES, is_equal);
        const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
        __syncthreads();  // the sums of the chunk before, or of the last digit, have been read
        if (lane == 0) {
            sums[0][warp] = __popc(higher_lanes);
            sums[1][warp] = __popc(equal_lanes);
        }
        __syncthreads();
        const unsigned lanes_before = (1u << lane) - 1;
        int higher_before = higher + __popc(higher_lanes & lanes_before);
        int equal_before = equal + __popc(equal_lanes & lanes_before);
        for (int w = 0; w < BINS / WARP; w++) {
            higher_before += w < warp ? sums[0][w] : 0;
            equal_before += w < warp ? sums[1][w] : 0;
            higher += sums[0][w];
            equal += sums[1][w];
        }
        if (is_higher || (is_equal && equal_before >= skipped)) {
            index[higher_before + max(equal_before - skipped, 0)] = s;
        }
    }
}
