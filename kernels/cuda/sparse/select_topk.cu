// select_topk.cu: the positions of a row's highest scores, ascending (kernels/cpu/sparse/select_topk.py)
//
//   v1 sort every row                 all places are found where one, that of the n-th, is needed
//   v2 one block a row                the n-th highest by its digits: 4 histograms of 8 bits, each of what shares the
//                                     digits found so far; then one pass that writes what is above, and of equals the
//                                     last ones. Each pass reads the row again, and most scores meet in a few bins of
//                                     the first histogram, one after another. For rows that are too long for v3
//   v3 the row in registers (this)    read once. Digits of 11 bits: the first tells scores of an octave apart, and the
//                                     others come only where a bin is not wanted as a whole. A key's place in the list
//                                     comes from one sum over all warps' counts, without barriers between chunks
//
// Counts are integers, so their order does not matter. A row that keeps all its keys is not looked at. Scores are
// compared as integers, which no -ftz rounds to 0.

#define ITEMS 16  // scores of a thread
#define DIGIT 11  // bits
#define BINS (1 << DIGIT)
#define LONG_DIGIT 8  // v2's
#define LONG_BINS (1 << LONG_DIGIT)

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

// a block's row: its query's position, how many keys it keeps, where they go
struct Row {
    const float* scores;
    int* list;
    int t, n;
};

// a block for each of B * R rows. writes the count, -1 behind the list, and the list where there is nothing to choose
__device__ __forceinline__ Row open_row(int* index, int* count, const float* scores, const int* keep, int R, int S,
                                        int Tq, int K, int first, int start, int leak) {
    const int t = first + blockIdx.x % R;
    const size_t out = (size_t)(blockIdx.x / R) * Tq + t - start;
    const int wanted = max(1, min(keep[out], K));
    const Row row = {scores + (size_t)blockIdx.x * S, index + out * K, t, leak ? wanted : min(wanted, t + 1)};
    if (threadIdx.x == 0) { count[out] = row.n; }
    for (int j = row.n + threadIdx.x; j < K; j += blockDim.x) { row.list[j] = -1; }
    if (row.n >= t + 1) {  // all keys, and with the leak those of the future that fill the list
        for (int j = threadIdx.x; j < row.n; j += blockDim.x) { row.list[j] = j; }
    }
    return row;
}

// where v3's histogram has a bin. neighbours, which count scores that are alike, lie in different banks, and so do the
// bins that the threads of a warp add up at a time
__device__ __forceinline__ int place_of(int bin) { return bin % 8 * (BINS / 8 + 4) + bin / 8; }

// index (B,Tq,K), count (B,Tq) at rows first - start .. from scores (B,R,S), keep (B,Tq). threads: a power of 2 of
// whole warps, S / ITEMS at least
extern "C" __global__ void __launch_bounds__(1024)
select_topk_kernel(int* __restrict__ index, int* __restrict__ count, const float* __restrict__ scores,
                   const int* __restrict__ keep, int R, int S, int Tq, int K, int first, int start, int force_self,
                   int sink, int leak) {
    __shared__ int histogram[BINS + 32];
    __shared__ int counts[ITEMS * WARP];  // by chunk of blockDim.x keys and warp: higher ones, and equals times 2^16
    __shared__ int sums[WARP];
    __shared__ int found[3];  // bin, how many of it are wanted, how many it has
    const Row row = open_row(index, count, scores, keep, R, S, Tq, K, first, start, leak);
    if (row.n >= row.t + 1) { return; }
    const int t = row.t, chunks = t / blockDim.x + 1;
    unsigned order[ITEMS];  // 0 behind t: no score gives that
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        const int s = i * blockDim.x + threadIdx.x;
        order[i] = s <= t ? order_of(row.scores, s, t, force_self, sink) : 0;
    }

    unsigned threshold = 0;          // the n-th highest: its bits from `known` on
    int known = 32;
    int equals = row.n, there = -1;  // how many are wanted of those that share these bits, and how many there are
    while (known > 0 && there != equals) {
        const int shift = max(known - DIGIT, 0);  // the last digit has bits that are known
        for (int i = threadIdx.x; i < BINS + 32; i += blockDim.x) { histogram[i] = 0; }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < ITEMS; i++) {
            // a shift by 32 would be undefined
            const bool shares = known == 32 ? order[i] != 0 : (order[i] ^ threshold) >> known == 0;
            if (shares) { atomicAdd(&histogram[place_of(order[i] >> shift & (BINS - 1))], 1); }
        }
        __syncthreads();
        const int bins = BINS / blockDim.x;
        int bin = BINS - 1 - threadIdx.x * bins;  // this thread's first, the highest
        int here = 0;
        for (int i = 0; i < bins; i++) { here += histogram[place_of(bin - i)]; }
        int above = sum_before(here, sums);
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
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        const unsigned higher = __ballot_sync(ALL_LANES, order[i] > threshold);
        const unsigned equal = __ballot_sync(ALL_LANES, order[i] == threshold);
        if (lane == 0 && i < chunks) { counts[i * warps + warp] = __popc(higher) + (__popc(equal) << 16); }
    }
    __syncthreads();
    // as many counts as that are half of the threads at most, and a row has less than 2^15 keys
    const bool has_count = threadIdx.x < chunks * warps;
    const int before = sum_before(has_count ? counts[threadIdx.x] : 0, sums);
    if (has_count) { counts[threadIdx.x] = before; }
    __syncthreads();
    const unsigned lanes_before = (1u << lane) - 1;
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        if (i >= chunks) { break; }
        const bool is_higher = order[i] > threshold, is_equal = order[i] == threshold;
        const unsigned higher = __ballot_sync(ALL_LANES, is_higher), equal = __ballot_sync(ALL_LANES, is_equal);
        const int count_before = counts[i * warps + warp];
        const int equal_before = (count_before >> 16) + __popc(equal & lanes_before);
        if (is_higher || (is_equal && equal_before >= skipped)) {
            const int higher_before = (count_before & 0xffff) + __popc(higher & lanes_before);
            row.list[higher_before + max(equal_before - skipped, 0)] = i * blockDim.x + threadIdx.x;
        }
    }
}

// the same for any S; blocks of LONG_BINS threads
extern "C" __global__ void __launch_bounds__(256)
select_topk_long_kernel(int* __restrict__ index, int* __restrict__ count, const float* __restrict__ scores,
                        const int* __restrict__ keep, int R, int S, int Tq, int K, int first, int start,
                        int force_self, int sink, int leak) {
    __shared__ int histogram[LONG_BINS];
    __shared__ int sums[2][LONG_BINS / WARP];
    __shared__ int found[3];  // digit, how many of its bin are wanted, how many it has
    const Row row = open_row(index, count, scores, keep, R, S, Tq, K, first, start, leak);
    if (row.n >= row.t + 1) { return; }
    const int t = row.t;

    unsigned threshold = 0;  // the digits of the n-th highest, found from the top
    int equals = row.n;      // how many are wanted of those that share these digits
    int there = 0;           // and so many there are
    for (int shift = 32 - LONG_DIGIT; shift >= 0; shift -= LONG_DIGIT) {
        histogram[threadIdx.x] = 0;
        __syncthreads();
        for (int s = threadIdx.x; s <= t; s += blockDim.x) {
            const unsigned order = order_of(row.scores, s, t, force_self, sink);
            // a shift by 32 would be undefined
            if (shift == 32 - LONG_DIGIT || order >> (shift + LONG_DIGIT) == threshold) {
                atomicAdd(&histogram[order >> shift & (LONG_BINS - 1)], 1);
            }
        }
        __syncthreads();
        const int bin = LONG_BINS - 1 - threadIdx.x;  // the highest first
        const int here = histogram[bin];
        const int above = sum_before(here, sums[0]);
        if (above < equals && above + here >= equals) {  // one bin alone
            found[0] = bin;
            found[1] = equals - above;
            found[2] = here;
        }
        __syncthreads();
        threshold = threshold << LONG_DIGIT | found[0];
        equals = found[1];
        there = found[2];
    }

    const int skipped = there - equals;  // equals that are too old
    int higher = 0, equal = 0;           // in the chunks before this one
    for (int base = 0; base <= t; base += LONG_BINS) {
        const int s = base + threadIdx.x;
        const unsigned order = s <= t ? order_of(row.scores, s, t, force_self, sink) : 0;
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
        for (int w = 0; w < LONG_BINS / WARP; w++) {
            higher_before += w < warp ? sums[0][w] : 0;
            equal_before += w < warp ? sums[1][w] : 0;
            higher += sums[0][w];
            equal += sums[1][w];
        }
        if (is_higher || (is_equal && equal_before >= skipped)) {
            row.list[higher_before + max(equal_before - skipped, 0)] = s;
        }
    }
}
