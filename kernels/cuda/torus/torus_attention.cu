// torus_attention.cu: attention among the platters of tokens on a torus (kernels/cpu/torus/torus_attention.py)
//
// qkv (B,T,3C): in row (b,t), platter k of the q, k and v of head h starts at column (h*D + k)*hd of each third. A row
// of a tile is a sub-token i*D + k of a head, whatever D. out (B*(T-start),C), lse (B,NH,T-start,D). hd from 1 to 128;
// tiles are HS = 16, 32, 64 or 128 wide, padded with zeros: the first three are a head of 64 at D = 4, 2 and 1.
//
// The tiles are those of attention.cu: forward, a block takes 64 queries (32 if HS is 128) and meets the keys that they
// see, 64 at a time (32 if HS is 16 or 128), with an online softmax; backward, one pass for dk and dv and one for dq,
// with scores again from lse. What is new:
//   v1 a table of distances T x T and D x D      as many bytes as the scores have
//   v2 i - j modulo P for every score            an integer division each, as long as a product of 16 columns
//   v3 places in shared memory (this)            a sub-token's place on the ring and in depth is found once a tile, and
//                                                two subtractions and minima of floats give both distances
//   HS below 64                                  16 lanes a row would leave most columns empty: 4 or 8 lanes then, and
//                                                more rows of a warp side by side
//   a window                                     tiles of which no pair is near on the ring are passed over
//   gradients of the weights                     in the pass for dq: a sum for each block, added up in order by another
//                                                kernel; no atomics
//
// Bytes and flops: those of attention of T D tokens with heads of hd, so D times the flops at the same bytes, and FMAs
// are the limit. With HS = 16 a score is 16 + 16 FMAs forward and some 12 operations of bias and softmax.
//
// Scores of the future are replaced, and products leave out weights of 0 where a tile has any: with 0 * v a NaN would
// come through. Sums have a fixed order everywhere.

#define FAR 1e30f                  // more than any distance

// --- geometry --------------------------------------------------------------------------------------------------------

// a key's token; a query's last token that it sees, or -1 beyond the last query: with its lse of 0 a weight
// could be infinite. and where it is on the ring and in depth
struct Place {
    int token;
    float ring, platter;
};

struct Torus {
    int T, D, P, window, causal;
    float tokens, platters;             // once round
    float near;                         // farthest on the ring that is seen
    float ring_weight, depth_weight;    // bias of a token and of a platter of distance, times log2(e)
};

__device__ __forceinline__ Torus torus(float a_s, float a_d, int T, int D, int P, int window, int wrap_depth,
                                       int causal) {
    Torus at;
    at.T = T, at.D = D, at.P = P, at.window = window, at.causal = causal;
    at.tokens = P, at.platters = wrap_depth ? (float)D : FAR;
    at.near = window >= 0 ? (float)window : FAR;
    at.ring_weight = LOG2E * a_s / P, at.depth_weight = LOG2E * a_d / D;
    return at;
}

__device__ __forceinline__ Place place_of_key(Torus at, int row) {
    const int token = row / at.D;
    return {token, (float)(token % at.P), (float)(row % at.D)};
}

__device__ __forceinline__ Place place_of_query(Torus at, int row) {
    const int token = row / at.D;
    const int last = at.causal ? token : at.T - 1;
    return {token < at.T ? last : -1, (float)(token % at.P), (float)(row % at.D)};
}

// the shorter way between two points that lie once round or less from each other
__device__ __forceinline__ float distance(float a, float b, float round) {
    const float way = fabsf(a - b);
    return fminf(way, round - way);
}

__device__ __forceinline__ float bias(Torus at, float ring, float depth) {
    return -(at.ring_weight * ring + at.depth_weight * depth);
}

// whether any of the tokens a .. b is near any of c .. d: whether some lag between them, give or take the window, is a
// number of whole rounds
__device__ __forceinline__ bool near_each_other(Torus at, int a, int b, int c, int d) {
    if (at.window < 0) { return true; }
    const int least = max(a - d, c - b) - at.window, most = max(b - c, d - a) + at.window;
    return least <= 0 || most / at.P * at.P >= least;
}

// the first tile of ROWS rows, from `row` on and before `end`, with tokens near a .. b; `end` or more if there is none
template <int ROWS> __device__ __forceinline__ int next_tile(Torus at, int row, int end, int a, int b) {
    while (row < end && !near_each_other(at, a, b, row / at.D, min(row + ROWS - 1, end - 1) / at.D)) { row += ROWS; }
    return row;
}

// sub-tokens first .. of a head that starts at `head`, with `stride` floats between tokens, on their way to a tile;
// from `limit` on they become 0 and are not read
template <int ROWS, int HS>
__device__ __forceinline__ void fetch(Fetched<ROWS, HS>& to, const float* head, int stride, int first, int limit,
                                      int D, int hd, bool packed) {
    constexpr int PACKS = Fetched<ROWS, HS>::PACKS, STEP = Fetched<ROWS, HS>::STEP;
    const int column = threadIdx.x % PACKS * 4;
#pragma unroll
    for (int n = 0; n < ROWS / STEP; n++) {
        const int row = first + threadIdx.x / PACKS + n * STEP;
        to.x[n] = zeros<4>();
        if (row >= limit) { continue; }
        to.x[n] = load_columns(head + (size_t)(row / D) * stride + row % D * hd, column, hd, packed);
    }
}

// --- forward ---------------------------------------------------------------------------------------------------------

// a warp owns a quarter of the queries, and LANES lanes every GROUPS-th of these: scores, weights and sums of a query
// stay with these lanes, so handing weights over, from keys to columns, needs no barrier of the block
template <int HS, int QUERIES, int KEYS>
__device__ __forceinline__ void forward_tile(float* out, float* lse, const float* qkv, const float* a_s,
                                             const float* a_d, int T, int NH, int D, int hd, int P, int window,
                                             int wrap_depth, int causal, int start) {
    constexpr int LANES = ROW_LANES<HS>, GROUPS = ROW_GROUPS<HS>;
    constexpr int R = QUERIES / TILE_WARPS / GROUPS;         // queries of a thread
    constexpr int N = KEYS / LANES;                          // keys of a thread
    constexpr int PART = WARP / LANES;                       // keys of a thread handed over together: less memory
    __shared__ TileRow<HS> query_tile[QUERIES];
    __shared__ TileRow<HS> tile[KEYS];                       // keys, then their values
    __shared__ TileRow<QUERIES> weights[WARP];               // the queries of a thread side by side
    __shared__ Place query_place[QUERIES], key_place[KEYS];
    static_assert(N % PART == 0, "keys are handed over in whole parts");

    const int warp = threadIdx.x / WARP, lane = threadIdx.x % LANES;
    const int group = threadIdx.x % WARP / LANES;
    const int C = NH * D * hd, stride = 3 * C;
    const size_t b = blockIdx.x / NH, h = blockIdx.x % NH;
    const Torus at = torus(a_s[h], a_d[h], T, D, P, window, wrap_depth, causal);
    const int first = start * D + (gridDim.y - 1 - blockIdx.y) * QUERIES;  // blocks with most keys start first
    const int stop = min(T * D, first + QUERIES);
    const int first_token = first / D, last_token = (stop - 1) / D;
    const int end = causal ? (last_token + 1) * D : T * D;   // the end of the keys
    const int mine = warp * (QUERIES / TILE_WARPS) + group;  // this thread's queries: first + mine + GROUPS i
    const int slot = warp * (QUERIES / TILE_WARPS) + group * R;
    const bool packed = hd % 4 == 0 && aligned(qkv, out);
    const float scale = LOG2E / sqrtf(hd);
    const float* queries = qkv + b * T * stride + h * D * hd;
    const float* keys = queries + C;
    const float* values = keys + C;

    Fetched<QUERIES, HS> query_rows;
    fetch(query_rows, queries, stride, first, stop, D, hd, packed);
    query_rows.put(query_tile);
    if (threadIdx.x < QUERIES) { query_place[threadIdx.x] = place_of_query(at, first + threadIdx.x); }
    int key = next_tile<KEYS>(at, 0, end, first_token, last_token);
    Fetched<KEYS, HS> fetched;
    fetch(fetched, keys, stride, key, end, D, hd, packed);

    Pack<4> sums[R][ROW_PACKS<HS>];
    float top[R], total[R];
    clear(sums);
#pragma unroll
    for (int i = 0; i < R; i++) { top[i] = MINUS_INFINITY, total[i] = 0.0f; }

    while (key < end) {
        const int next = next_tile<KEYS>(at, key + KEYS, end, first_token, last_token);
        const bool skip = window >= 0 || (causal && (key + KEYS - 1) / D > first_token);
        float p[R][N];
        fetched.put(tile);
        if (threadIdx.x < KEYS) { key_place[threadIdx.x] = place_of_key(at, key + threadIdx.x); }
        __syncthreads();
        fetch(fetched, values, stride, key, end, D, hd, packed);
        dot_rows<HS, GROUPS, LANES>(p, query_tile + mine, tile + lane, hd);
#pragma unroll
        for (int j = 0; j < N; j++) {
            const Place there = key_place[lane + LANES * j];
#pragma unroll
            for (int i = 0; i < R; i++) {
                const Place here = query_place[mine + GROUPS * i];
                const float ring = distance(here.ring, there.ring, at.tokens);
                const float depth = distance(here.platter, there.platter, at.platters);
                const bool seen = there.token <= here.token && ring <= at.near;
                p[i][j] = seen ? scale * p[i][j] + bias(at, ring, depth) : MINUS_INFINITY;
            }
        }
        online_softmax<LANES, true>(p, top, total, sums, 1.0f);
        __syncthreads();  // every warp is done with the keys
        fetched.put(tile);
        __syncthreads();
#pragma unroll
        for (int part = 0; part < N; part += PART) {
            hand_over<PART, LANES, QUERIES>(weights, slot, lane, p, part);
            __syncwarp();
            if (part + PART == N) {  // the registers of the weights are free for the next keys
                fetch(fetched, keys, stride, next, end, D, hd, packed);
            }
            add_weighted<WARP, QUERIES, HS>(sums, weights, slot, tile + part * LANES, lane, skip);
            __syncwarp();
        }
        __syncthreads();
        key = next;
    }

#pragma unroll
    for (int i = 0; i < R; i++) {
        total[i] = group_sum<LANES>(total[i]);
        const int row = first + mine + GROUPS * i;
        if (row < stop) {
            float* query = out + (b * (T - start) + row / D - start) * C + (h * D + row % D) * hd;
#pragma unroll
            for (int c = 0; c < ROW_PACKS<HS>; c++) {
                store_columns(query, (lane + c * LANES) * 4, hd, packed, times(1.0f / total[i], sums[i][c]));
            }
            if (lane == 0) { lse[((b * NH + h) * (T - start) - start) * D + row] = LN2 * (top[i] + log2f(total[i])); }
        }
    }
}

#define FORWARD_KERNEL(HS, QUERIES, KEYS) \
    forward_tile<HS, QUERIES, KEYS>(out, lse, qkv, a_s, a_d, T, NH, D, hd, P, window, wrap_depth, causal, start)

extern "C" __global__ void __launch_bounds__(128)
torus_attention_forward_16_kernel(float* __restrict__ out, float* __restrict__ lse, const float* __restrict__ qkv,
                                  const float* __restrict__ a_s, const float* __restrict__ a_d, int T, int NH, int D,
                                  int hd, int P, int window, int wrap_depth, int causal, int start) {
    FORWARD_KERNEL(16, 64, 32);
}

extern "C" __global__ void __launch_bounds__(128)
torus_attention_forward_32_kernel(float* __restrict__ out, float* __restrict__ lse, const float* __restrict__ qkv,
                                  const float* __restrict__ a_s, const float* __restrict__ a_d, int T, int NH, int D,
                                  int hd, int P, int window, int wrap_depth, int causal, int start) {
    FORWARD_KERNEL(32, 64, 64);
}

extern "C" __global__ void __launch_bounds__(128)
torus_attention_forward_64_kernel(float* __restrict__ out, float* __restrict__ lse, const float* __restrict__ qkv,
                                  const float* __restrict__ a_s, const float* __restrict__ a_d, int T, int NH, int D,
                                  int hd, int P, int window, int wrap_depth, int causal, int start) {
    FORWARD_KERNEL(64, 64, 64);
}

extern "C" __global__ void __launch_bounds__(128)
torus_attention_forward_128_kernel(float* __restrict__ out, float* __restrict__ lse, const float* __restrict__ qkv,
                                   const float* __restrict__ a_s, const float* __restrict__ a_d, int T, int NH, int D,
                                   int hd, int P, int window, int wrap_depth, int causal, int start) {
    FORWARD_KERNEL(128, 32, 32);
}

// --- backward --------------------------------------------------------------------------------------------------------

// ROWS rows stay in shared memory while the other side passes, PASSING rows at a time:
//   KEYS:  k and v stay, q and dout pass    dv = a^T dout,  dk = ds^T q / sqrt(hd)
//   else:  q and dout stay, k and v pass    dq = ds k / sqrt(hd), and the sums of ds times each distance
// with a = exp(s - lse), ds = a * (dout . v - delta), where delta = dout . out. For a and ds a warp is 4 groups of 8
// lanes, for the sums GROUPS of LANES: `weights` is where they are handed over. Slot s of a warp there holds its row
// s / R + 4 (s % R), so that a thread's rows are side by side.
// delta (B,NH,D,T): attention_delta_kernel's, with platters for heads
template <bool KEYS, int HS, int ROWS, int PASSING>
__device__ __forceinline__ void backward_tile(float* dqkv, float* partial, const float* dout, const float* qkv,
                                              const float* lse, const float* delta, const float* a_s,
                                              const float* a_d, int T, int NH, int D, int hd, int P, int window,
                                              int wrap_depth, int causal) {
    constexpr int OWN = ROWS / TILE_WARPS;                   // rows of a warp
    constexpr int R = OWN / 4, N = PASSING / 8;              // a and ds of a thread: R rows, N that pass
    constexpr int SUMS = OWN / ROW_GROUPS<HS>;               // rows of a thread's sums
    __shared__ TileRow<HS> tile1[ROWS], tile2[ROWS];              // k and v, or q and dout
    __shared__ TileRow<HS> passing1[PASSING], passing2[PASSING];  // q and dout, or k and v
    __shared__ TileRow<ROWS> weights[PASSING];
    __shared__ Place place[ROWS], passing_place[PASSING];

    const int warp = threadIdx.x / WARP, lane = threadIdx.x % 8;
    const int group = threadIdx.x % WARP / 8;
    const int C = NH * D * hd, stride = 3 * C, rows = T * D;
    const size_t b = blockIdx.x / NH, h = blockIdx.x % NH;
    const Torus at = torus(a_s[h], a_d[h], T, D, P, window, wrap_depth, causal);
    const int tile = KEYS ? blockIdx.y : gridDim.y - 1 - blockIdx.y;  // blocks with most to meet start first
    const int first = tile * ROWS, stop = min(rows, first + ROWS);
    const int first_token = first / D, last_token = (stop - 1) / D;
    const int begin = KEYS && causal ? first_token * D : 0, end = KEYS || !causal ? rows : (last_token + 1) * D;
    const bool packed = hd % 4 == 0 && aligned(dqkv, dout, qkv);
    const float scale = 1.0f / sqrtf(hd);
    const float* queries = qkv + b * T * stride + h * D * hd;
    const float* keys = queries + C;
    const float* values = keys + C;
    const float* douts = dout + b * T * C + h * D * hd;
    const float* side1 = KEYS ? queries : keys;              // the sides that pass
    const float* side2 = KEYS ? douts : values;
    const int stride2 = KEYS ? C : stride;
    lse += (b * NH + h) * rows;
    delta += (b * NH + h) * rows;

    Fetched<ROWS, HS> staying;
    fetch(staying, KEYS ? keys : queries, stride, first, stop, D, hd, packed);
    staying.put(tile1);
    fetch(staying, KEYS ? values : douts, KEYS ? stride : C, first, stop, D, hd, packed);
    staying.put(tile2);
    if (threadIdx.x < ROWS) {
        place[threadIdx.x] = KEYS ? place_of_key(at, first + threadIdx.x) : place_of_query(at, first + threadIdx.x);
    }
    int passing = next_tile<PASSING>(at, begin, end, first_token, last_token);
    Fetched<PASSING, HS> fetched1, fetched2;
    fetch(fetched1, side1, stride, passing, end, D, hd, packed);
    fetch(fetched2, side2, stride2, passing, end, D, hd, packed);

    const int mine = warp * OWN + group;                     // rows of this thread's a and ds: first + mine + 4i
    float query_lse[KEYS ? N : R], query_delta[KEYS ? N : R];
#pragma unroll
    for (int i = 0; i < R && !KEYS; i++) {
        const int row = first + mine + 4 * i;
        query_lse[i] = row < stop ? LOG2E * lse[row] : 0.0f;
        query_delta[i] = row < stop ? delta[row % D * T + row / D] : 0.0f;
    }
    const int sum_lane = threadIdx.x % ROW_LANES<HS>, sum_group = threadIdx.x % WARP / ROW_LANES<HS>;
    const int slot = warp * OWN + sum_group * SUMS;          // the slot of this thread's rows of the sums
    Pack<4> sums1[SUMS][ROW_PACKS<HS>], sums2[SUMS][ROW_PACKS<HS>];  // dk and dv, or dq
    float ring_sum = 0.0f, depth_sum = 0.0f;
    clear(sums1);
    clear(sums2);

    while (passing < end) {
        const int next = next_tile<PASSING>(at, passing + PASSING, end, first_token, last_token);
        const bool hidden = causal && (KEYS ? passing / D < last_token : (passing + PASSING - 1) / D > first_token);
        const bool skip = window >= 0 || hidden;
        fetched1.put(passing1);
        fetched2.put(passing2);
        if (threadIdx.x < PASSING) {
            const int row = passing + threadIdx.x;
            passing_place[threadIdx.x] = KEYS ? place_of_query(at, row) : place_of_key(at, row);
        }
        __syncthreads();
        fetch(fetched1, side1, stride, next, end, D, hd, packed);
        fetch(fetched2, side2, stride2, next, end, D, hd, packed);
#pragma unroll
        for (int j = 0; j < N && KEYS; j++) {
            const int row = passing + lane + 8 * j;
            query_lse[j] = row < end ? LOG2E * lse[row] : 0.0f;
            query_delta[j] = row < end ? delta[row % D * T + row / D] : 0.0f;
        }
        float a[R][N], ds[R][N];
        dot_rows<HS, 4, 8>(a, tile1 + mine, passing1 + lane, hd);
        dot_rows<HS, 4, 8>(ds, tile2 + mine, passing2 + lane, hd);
#pragma unroll
        for (int j = 0; j < N; j++) {
            const Place there = passing_place[lane + 8 * j];
#pragma unroll
            for (int i = 0; i < R; i++) {
                const Place here = place[mine + 4 * i];
                const float ring = distance(here.ring, there.ring, at.tokens);
                const float depth = distance(here.platter, there.platter, at.platters);
                const bool past = KEYS ? here.token <= there.token : there.token <= here.token;
                const bool seen = past && ring <= at.near;
                const float score = LOG2E * scale * a[i][j] + bias(at, ring, depth);
                a[i][j] = seen ? exp2f(score - query_lse[KEYS ? j : i]) : 0.0f;
                ds[i][j] = seen ? a[i][j] * (ds[i][j] - query_delta[KEYS ? j : i]) : 0.0f;
                if (!KEYS) {
                    ring_sum += ds[i][j] * ring;
                    depth_sum += ds[i][j] * depth;
                }
            }
        }
        if (KEYS) {
            hand_over<N, 8, ROWS>(weights, warp * OWN + group * R, lane, a, 0);
            __syncwarp();
            add_weighted<PASSING, ROWS, HS>(sums2, weights, slot, passing2, sum_lane, skip);
            __syncwarp();
        }
        hand_over<N, 8, ROWS>(weights, warp * OWN + group * R, lane, ds, 0);
        __syncwarp();
        add_weighted<PASSING, ROWS, HS>(sums1, weights, slot, passing1, sum_lane, skip);
        __syncthreads();
        passing = next;
    }

#pragma unroll
    for (int i = 0; i < SUMS; i++) {
        const int s = sum_group * SUMS + i;
        const int row = first + warp * OWN + s / R + 4 * (s % R);
        if (row < stop) {
            float* dq = dqkv + (b * T + row / D) * stride + (h * D + row % D) * hd;
#pragma unroll
            for (int c = 0; c < ROW_PACKS<HS>; c++) {
                const int column = (sum_lane + c * ROW_LANES<HS>) * 4;
                store_columns(KEYS ? dq + C : dq, column, hd, packed, times(scale, sums1[i][c]));
                if (KEYS) { store_columns(dq + 2 * C, column, hd, packed, sums2[i][c]); }
            }
        }
    }
    if (!KEYS) {
        float* shared = (float*)weights;  // free since the loop's last barrier
        ring_sum = block_sum(ring_sum, shared);
        depth_sum = block_sum(depth_sum, shared + TILE_WARPS);
        if (threadIdx.x == 0) {
            const size_t blocks = gridDim.x / NH * gridDim.y, block = b * gridDim.y + tile;
            partial[h * blocks + block] = ring_sum;
            partial[(NH + h) * blocks + block] = depth_sum;
        }
    }
}

#define DKDV_KERNEL(HS, ROWS, PASSING) \
    backward_tile<true, HS, ROWS, PASSING>(dqkv, nullptr, dout, qkv, lse, delta, a_s, a_d, T, NH, D, hd, P, window, \
                                           wrap_depth, causal)
#define DQ_KERNEL(HS, ROWS, PASSING) \
    backward_tile<false, HS, ROWS, PASSING>(dqkv, partial, dout, qkv, lse, delta, a_s, a_d, T, NH, D, hd, P, window, \
                                            wrap_depth, causal)

extern "C" __global__ void __launch_bounds__(128)
torus_attention_dkdv_16_kernel(float* __restrict__ dqkv, const float* __restrict__ dout, const float* __restrict__ qkv,
                               const float* __restrict__ lse, const float* __restrict__ delta,
                               const float* __restrict__ a_s, const float* __restrict__ a_d, int T, int NH, int D,
                               int hd, int P, int window, int wrap_depth, int causal) {
    DKDV_KERNEL(16, 64, 32);
}

extern "C" __global__ void __launch_bounds__(128)
torus_attention_dkdv_32_kernel(float* __restrict__ dqkv, const float* __restrict__ dout, const float* __restrict__ qkv,
                               const float* __restrict__ lse, const float* __restrict__ delta,
                               const float* __restrict__ a_s, const float* __restrict__ a_d, int T, int NH, int D,
                               int hd, int P, int window, int wrap_depth, int causal) {
    DKDV_KERNEL(32, 64, 32);
}

extern "C" __global__ void __launch_bounds__(128)
torus_attention_dkdv_64_kernel(float* __restrict__ dqkv, const float* __restrict__ dout, const float* __restrict__ qkv,
                               const float* __restrict__ lse, const float* __restrict__ delta,
                               const float* __restrict__ a_s, const float* __restrict__ a_d, int T, int NH, int D,
                               int hd, int P, int window, int wrap_depth, int causal) {
    DKDV_KERNEL(64, 64, 16);
}

extern "C" __global__ void __launch_bounds__(128)
torus_attention_dkdv_128_kernel(float* __restrict__ dqkv, const float* __restrict__ dout, const float* __restrict__ qkv,
                                const float* __restrict__ lse, const float* __restrict__ delta,
                                const float* __restrict__ a_s, const float* __restrict__ a_d, int T, int NH, int D,
                                int hd, int P, int window, int wrap_depth, int causal) {
    DKDV_KERNEL(128, 32, 8);
}

extern "C" __global__ void __launch_bounds__(128)
torus_attention_dq_16_kernel(float* __restrict__ dqkv, float* __restrict__ partial, const float* __restrict__ dout,
                             const float* __restrict__ qkv, const float* __restrict__ lse,
                             const float* __restrict__ delta, const float* __restrict__ a_s,
                             const float* __restrict__ a_d, int T, int NH, int D, int hd, int P, int window,
                             int wrap_depth, int causal) {
    DQ_KERNEL(16, 64, 32);
}

extern "C" __global__ void __launch_bounds__(128)
torus_attention_dq_32_kernel(float* __restrict__ dqkv, float* __restrict__ partial, const float* __restrict__ dout,
                             const float* __restrict__ qkv, const float* __restrict__ lse,
                             const float* __restrict__ delta, const float* __restrict__ a_s,
                             const float* __restrict__ a_d, int T, int NH, int D, int hd, int P, int window,
                             int wrap_depth, int causal) {
    DQ_KERNEL(32, 64, 32);
}

extern "C" __global__ void __launch_bounds__(128)
torus_attention_dq_64_kernel(float* __restrict__ dqkv, float* __restrict__ partial, const float* __restrict__ dout,
                             const float* __restrict__ qkv, const float* __restrict__ lse,
                             const float* __restrict__ delta, const float* __restrict__ a_s,
                             const float* __restrict__ a_d, int T, int NH, int D, int hd, int P, int window,
                             int wrap_depth, int causal) {
    DQ_KERNEL(64, 64, 16);
}

extern "C" __global__ void __launch_bounds__(128)
torus_attention_dq_128_kernel(float* __restrict__ dqkv, float* __restrict__ partial, const float* __restrict__ dout,
                              const float* __restrict__ qkv, const float* __restrict__ lse,
                              const float* __restrict__ delta, const float* __restrict__ a_s,
                              const float* __restrict__ a_d, int T, int NH, int D, int hd, int P, int window,
                              int wrap_depth, int causal) {
    DQ_KERNEL(128, 32, 8);
}

// da_s, da_d (NH) -= the sums of a head's `blocks` partial sums (2,NH,blocks), over P and D; a block for each head
extern "C" __global__ void __launch_bounds__(256)
torus_attention_weights_kernel(float* __restrict__ da_s, float* __restrict__ da_d, const float* __restrict__ partial,
                               int NH, int blocks, int P, int D) {
    __shared__ float shared[2][256 / WARP];
    const size_t h = blockIdx.x;
    float ring = 0.0f, depth = 0.0f;
    for (int n = threadIdx.x; n < blocks; n += blockDim.x) {
        ring += partial[h * blocks + n];
        depth += partial[(NH + h) * blocks + n];
    }
    ring = block_sum(ring, shared[0]);
    depth = block_sum(depth, shared[1]);
    if (threadIdx.x == 0) { da_s[h] -= ring / P, da_d[h] -= depth / D; }
}
