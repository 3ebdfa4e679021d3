// attention.cu: causal multi-head self-attention in float32, FlashAttention style (kernels/cpu/gpt2/attention.py)
//
// qkv (B,T,3C): in row (b,t), the q, k and v of head h start at columns h*hs, C + h*hs and 2C + h*hs, so loads permute.
// out (B*(T-start),C), lse (B,NH,T-start). Any hs from 1 to 128; tiles are HS = 64 or 128 wide, padded with zeros.
//
// attention_forward: a block takes 64 queries of a head and meets its keys 64 at a time (32 and 32 if HS is 128)
//   v1 scores, softmax, product in three kernels  T x T is written and read twice: memory is the limit
//   v2 online softmax, one warp a query           T x T is gone, but each query reads all its keys again
//   v3 tiles in shared memory (this)              64 queries share a load, and 12 loads of 16 bytes feed 128 FMAs
//
// attention_decode: few queries, many keys; a block takes one query, and lanes take turns at its keys
//   v1 attention_forward                          of a tile of 64 queries 63 are idle work
//   v2 one block a query                          reads a key and a value once, several loads in flight a lane
//   v3 several blocks for many keys (this)        12 heads would leave 120 of 132 multiprocessors idle;
//                                                 attention_join.cu joins the parts
//
// attention_dkdv, attention_dq: scores again from q, k and lse. A block writes what no other one writes
//   v1 one pass over tiles of keys                5 products, but dq needs float atomics: new bits every time
//   v2 two passes (this)                          7 products: for dk and dv the keys stay and queries pass, for dq the
//                                                 other way round; sums stay in registers and are written once
//
// Bytes and flops: forward must read qkv and write out, 16 BTC bytes, and does 2 BCT(T+1) flops; backward reads qkv,
// out and dout and writes dqkv, 32 BTC bytes, and does 7 BCT(T+1). So from T of about 200 on FMAs are the limit. What
// passes by the tiles comes from L2, BCT(T/16 + 4) bytes in each of forward, dkdv and dq: 32 flops a byte or more.
//
// Tiles above the diagonal are skipped. In a tile on the diagonal scores of the future are replaced, and products leave
// out weights of 0: with 0 * v a NaN would come through. Sums have a fixed order everywhere.

// rows of a head on their way to a tile; from `limit` on they become 0 and are not read
template <int ROWS, int HS>
__device__ __forceinline__ void fetch(Fetched<ROWS, HS>& to, const float* rows, int stride, int limit, int hs,
                                      bool packed) {
    constexpr int PACKS = Fetched<ROWS, HS>::PACKS, STEP = Fetched<ROWS, HS>::STEP;
    const int first = threadIdx.x / PACKS, column = threadIdx.x % PACKS * 4;
    rows += first * stride;
    if (packed) {  // asked here, not for every row: the loads follow each other without a branch
#pragma unroll
        for (int n = 0; n < ROWS / STEP; n++) {
            to.x[n] = zeros<4>();
            if (first + n * STEP < limit && column < hs) { to.x[n] = load<4>(rows + n * STEP * stride + column, 0); }
        }
    } else {
#pragma unroll
        for (int n = 0; n < ROWS / STEP; n++) {
            to.x[n] = zeros<4>();
            if (first + n * STEP < limit) { to.x[n] = load_columns(rows + n * STEP * stride, column, hs, false); }
        }
    }
}

// --- forward ---------------------------------------------------------------------------------------------------------

// a warp owns a quarter of the queries, and 16 lanes every second one of these: the scores, weights and sums of a query
// stay with these lanes, so handing weights over, from keys to columns, needs no barrier of the block
template <int HS, int QUERIES, int KEYS>
__device__ __forceinline__ void forward_tile(float* out, float* lse, const float* qkv, int T, int NH, int hs,
                                             int start) {
    constexpr int LANES = ROW_LANES<HS>, GROUPS = ROW_GROUPS<HS>;
    constexpr int R = QUERIES / TILE_WARPS / GROUPS;         // queries of a thread
    constexpr int N = KEYS / LANES;                          // keys of a thread
    constexpr int PART = 2;                                  // keys of a thread handed over together: less memory
    __shared__ TileRow<HS> query_tile[QUERIES];
    __shared__ TileRow<HS> tile[KEYS];                       // keys, then their values
    __shared__ TileRow<QUERIES> weights[PART * LANES];       // the queries of a thread side by side
    static_assert(R % 4 == 0 && N % PART == 0, "weights are handed over in packs, keys in whole parts");

    const int warp = threadIdx.x / WARP, lane = threadIdx.x % LANES;
    const int group = threadIdx.x % WARP / LANES;
    const int C = NH * hs, stride = 3 * C;
    const size_t b = blockIdx.x / NH, h = blockIdx.x % NH;
    const int first = start + (gridDim.y - 1 - blockIdx.y) * QUERIES;  // blocks with most keys start first
    const int end = min(T, first + QUERIES);
    const int mine = warp * (QUERIES / TILE_WARPS) + group;  // this thread's queries: first + mine + 2i
    const int slot = warp * (QUERIES / TILE_WARPS) + group * R;
    const bool packed = hs % 4 == 0 && aligned(qkv, out);
    const float scale = LOG2E / sqrtf(hs);
    const float* queries = qkv + b * T * stride + h * hs;
    const float* keys = queries + C;
    const float* values = keys + C;

    Fetched<QUERIES, HS> query_rows;
    fetch(query_rows, queries + (size_t)first * stride, stride, end - first, hs, packed);
    query_rows.put(query_tile);
    Fetched<KEYS, HS> fetched;
    fetch(fetched, keys, stride, end, hs, packed);

    Pack<4> sums[R][ROW_PACKS<HS>];
    float top[R], total[R];
    clear(sums);
#pragma unroll
    for (int i = 0; i < R; i++) { top[i] = MINUS_INFINITY, total[i] = 0.0f; }

    for (int key = 0; key < end; key += KEYS) {
        const int next = key + KEYS;
        const bool diagonal = next - 1 > first;
        float p[R][N];
        fetched.put(tile);
        __syncthreads();
        fetch(fetched, values + (size_t)key * stride, stride, end - key, hs, packed);
        dot_rows<HS, GROUPS, LANES>(p, query_tile + mine, tile + lane, hs);
#pragma unroll
        for (int i = 0; i < R && diagonal; i++) {
#pragma unroll
            for (int j = 0; j < N; j++) {
                if (key + lane + LANES * j > first + mine + GROUPS * i) { p[i][j] = MINUS_INFINITY; }
            }
        }
        online_softmax<LANES, false>(p, top, total, sums, scale);  // all queries see key 0
        __syncthreads();  // every warp is done with the keys
        fetched.put(tile);
        __syncthreads();
#pragma unroll
        for (int part = 0; part < N; part += PART) {
            hand_over<PART, LANES, QUERIES>(weights, slot, lane, p, part);
            __syncwarp();
            if (part + PART == N) {  // the registers of the weights are free for the next keys
                fetch(fetched, keys + (size_t)next * stride, stride, end - next, hs, packed);
            }
            add_weighted<PART * LANES, QUERIES, HS>(sums, weights, slot, tile + part * LANES, lane, diagonal);
            __syncwarp();
        }
        __syncthreads();
    }

#pragma unroll
    for (int i = 0; i < R; i++) {
#pragma unroll
        for (int step = LANES / 2; step > 0; step /= 2) {  // group_sum() in its place spills on sm_100
            total[i] += __shfl_xor_sync(ALL_LANES, total[i], step);
        }
        const int query = first + mine + GROUPS * i;
        if (query < T) {
            float* row = out + (b * (T - start) + query - start) * C + h * hs;
#pragma unroll
            for (int c = 0; c < ROW_PACKS<HS>; c++) {
                store_columns(row, lane * 4 + c * 64, hs, packed, times(1.0f / total[i], sums[i][c]));
            }
            if (lane == 0) { lse[(b * NH + h) * (T - start) + query - start] = LN2 * (top[i] + log2f(total[i])); }
        }
    }
}

extern "C" __global__ void __launch_bounds__(128)
attention_forward_64_kernel(float* __restrict__ out, float* __restrict__ lse, const float* __restrict__ qkv,
                            int T, int NH, int hs, int start) {
    forward_tile<64, 64, 64>(out, lse, qkv, T, NH, hs, start);
}

extern "C" __global__ void __launch_bounds__(128)
attention_forward_128_kernel(float* __restrict__ out, float* __restrict__ lse, const float* __restrict__ qkv,
                             int T, int NH, int hs, int start) {
    forward_tile<128, 32, 32>(out, lse, qkv, T, NH, hs, start);
}

// --- decoding --------------------------------------------------------------------------------------------------------

// HS / 4 lanes share a key. each such group has a softmax of its own, over every SHARES-th key; these are joined last.
// `further` is memory: a CUDA graph serves every position, with blocks for all of the T rows that qkv has, of which
// those behind the query find no key. of several parts of `keys_of_part` keys a block writes what it found to part_sums (parts,B*n,C) and part_softmax
// (parts,B,n,NH,2), else out and lse
template <int HS, int THREADS>
__device__ __forceinline__ void decode_query(float* out, float* lse, float* part_sums, float* part_softmax,
                                             const float* qkv, int T, int NH, int hs, int start, int keys_of_part) {
    constexpr int LANES = HS / 4, SHARES = THREADS / LANES;
    constexpr int N = 4;  // keys of a group at a time: loads in flight
    __shared__ Pack<4> share_sums[SHARES][LANES];
    __shared__ float share_top[SHARES], share_total[SHARES];

    const int share = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    const int C = NH * hs, stride = 3 * C;
    const size_t b = blockIdx.x / NH, h = blockIdx.x % NH;
    const int query = start + blockIdx.y;
    const int begin = blockIdx.z * keys_of_part, end = min(begin + keys_of_part, query + 1);
    const bool packed = hs % 4 == 0 && aligned(qkv);
    const float scale = LOG2E / sqrtf(hs);
    const float* queries = qkv + b * T * stride + h * hs;
    const float* keys = queries + C;
    const float* values = keys + C;

    const Pack<4> q = load_columns(queries + (size_t)query * stride, lane * 4, hs, packed);
    Pack<4> sums = zeros<4>();
    float top = MINUS_INFINITY, total = 0.0f;
    for (int first = begin + share; first - share < end; first += N * SHARES) {
        Pack<4> value[N];
        float p[N];
#pragma unroll
        for (int n = 0; n < N; n++) {
            const int key = first + n * SHARES;
            const int columns = key < end ? hs : 0;  // nothing is read of other keys
            const Pack<4> k = load_columns(keys + (size_t)key * stride, lane * 4, columns, packed);
            value[n] = load_columns(values + (size_t)key * stride, lane * 4, columns, packed);
            p[n] = 0.0f;
            add_product(p[n], q, k);
        }
        const float before = top;
#pragma unroll
        for (int n = 0; n < N; n++) {
            p[n] = group_sum<LANES>(p[n]);
            p[n] = first + n * SHARES < end ? p[n] * scale : MINUS_INFINITY;
            top = fmaxf(top, p[n]);
        }
        const float shrink = top == before ? 1.0f : exp2f(before - top);  // -inf - -inf, without a key yet, is NaN
        total *= shrink;
        sums = times(shrink, sums);
#pragma unroll
        for (int n = 0; n < N; n++) {
            const float weight = p[n] == MINUS_INFINITY ? 0.0f : exp2f(p[n] - top);
            total += weight;
            add_product(sums, weight, value[n]);
        }
    }

    share_sums[share][lane] = sums;
    if (lane == 0) { share_top[share] = top, share_total[share] = total; }
    __syncthreads();
    if (threadIdx.x >= hs) { return; }
    for (int s = 0; s < SHARES; s++) { top = fmaxf(top, share_top[s]); }
    float result = 0.0f;
    total = 0.0f;
    for (int s = 0; s < SHARES; s++) {
        const float weight = share_top[s] == MINUS_INFINITY ? 0.0f : exp2f(share_top[s] - top);
        total += weight * share_total[s];
        result += weight * share_sums[s][threadIdx.x / 4].at[threadIdx.x % 4];
    }
    const int n = gridDim.y;  // queries
    const size_t row = (b * n + blockIdx.y) * NH + h;
    if (gridDim.z == 1) {
        out[row * hs + threadIdx.x] = result / total;
        if (threadIdx.x == 0) { lse[(b * NH + h) * n + blockIdx.y] = LN2 * (top + log2f(total)); }
    } else {
        const size_t of_part = (size_t)blockIdx.z * gridDim.x * gridDim.y + row;
        part_sums[of_part * hs + threadIdx.x] = result;
        if (threadIdx.x == 0) { part_softmax[2 * of_part] = top, part_softmax[2 * of_part + 1] = total; }
    }
}

extern "C" __global__ void __launch_bounds__(256)
attention_decode_64_kernel(float* __restrict__ out, float* __restrict__ lse, float* __restrict__ part_sums,
                           float* __restrict__ part_softmax, const float* __restrict__ qkv, int T, int NH, int hs,
                           int start, const int* __restrict__ further, int keys_of_part) {
    decode_query<64, 256>(out, lse, part_sums, part_softmax, qkv, T, NH, hs, start + *further, keys_of_part);
}

extern "C" __global__ void __launch_bounds__(256)
attention_decode_128_kernel(float* __restrict__ out, float* __restrict__ lse, float* __restrict__ part_sums,
                            float* __restrict__ part_softmax, const float* __restrict__ qkv, int T, int NH, int hs,
                            int start, const int* __restrict__ further, int keys_of_part) {
    decode_query<128, 256>(out, lse, part_sums, part_softmax, qkv, T, NH, hs, start + *further, keys_of_part);
}

// --- backward --------------------------------------------------------------------------------------------------------

// delta (B,NH,T) = dout . out over the columns of a head, one warp each
extern "C" __global__ void __launch_bounds__(256)
attention_delta_kernel(float* __restrict__ delta, const float* __restrict__ dout, const float* __restrict__ out,
                       int T, int NH, int hs, int rows) {
    const int row = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;  // (b,t,h)
    if (row >= rows) { return; }
    const size_t first = (size_t)row * hs;
    float total = 0.0f;
    for (int c = threadIdx.x % WARP; c < hs; c += WARP) { total += dout[first + c] * out[first + c]; }
    total = warp_sum(total);
    const size_t b = row / NH / T, t = row / NH % T, h = row % NH;
    if (threadIdx.x % WARP == 0) { delta[(b * NH + h) * T + t] = total; }
}

// ROWS rows stay in shared memory while the other side passes, PASSING rows at a time:
//   KEYS:  k and v stay, q and dout pass    dv = a^T dout,  dk = ds^T q / sqrt(hs)
//   else:  q and dout stay, k and v pass    dq = ds k / sqrt(hs)
// with a = exp(q . k / sqrt(hs) - lse), ds = a * (dout . v - delta), where delta = dout . out. For a and ds a warp is 4
// groups of 8 lanes, for the sums 2 groups of 16: `weights` is where they are handed over. Slot s of a warp there holds
// its row s / R + 4 (s % R), so that a thread's rows are side by side
template <bool KEYS, int HS, int ROWS, int PASSING>
__device__ __forceinline__ void backward_tile(float* dqkv, const float* dout, const float* qkv, const float* lse,
                                              const float* delta, int T, int NH, int hs) {
    constexpr int OWN = ROWS / TILE_WARPS;                   // rows of a warp
    constexpr int R = OWN / 4, N = PASSING / 8;              // a and ds of a thread: R rows, N that pass
    constexpr int SUMS = OWN / ROW_GROUPS<HS>;               // rows of a thread's sums
    __shared__ TileRow<HS> tile1[ROWS], tile2[ROWS];              // k and v, or q and dout
    __shared__ TileRow<HS> passing1[PASSING], passing2[PASSING];  // q and dout, or k and v
    __shared__ TileRow<ROWS> weights[PASSING];

    const int warp = threadIdx.x / WARP, lane = threadIdx.x % 8;
    const int group = threadIdx.x % WARP / 8;
    const int C = NH * hs, stride = 3 * C;
    const size_t b = blockIdx.x / NH, h = blockIdx.x % NH;
    const int first = (KEYS ? blockIdx.y : gridDim.y - 1 - blockIdx.y) * ROWS;  // blocks with most to meet start first
    const int begin = KEYS ? first : 0, end = KEYS ? T : min(T, first + ROWS);
    const bool packed = hs % 4 == 0 && aligned(dqkv, dout, qkv);
    const float scale = 1.0f / sqrtf(hs);
    const float* queries = qkv + b * T * stride + h * hs;
    const float* douts = dout + b * T * C + h * hs;
    const float* side1 = KEYS ? queries : queries + C;       // the sides that pass
    const float* side2 = KEYS ? douts : queries + 2 * C;
    const int stride2 = KEYS ? C : stride;
    lse += (b * NH + h) * T;
    delta += (b * NH + h) * T;

    Fetched<ROWS, HS> rows;
    fetch(rows, (KEYS ? queries + C : queries) + (size_t)first * stride, stride, T - first, hs, packed);
    rows.put(tile1);
    if (KEYS) {
        fetch(rows, queries + 2 * C + (size_t)first * stride, stride, T - first, hs, packed);
    } else {
        fetch(rows, douts + (size_t)first * C, C, T - first, hs, packed);
    }
    rows.put(tile2);
    Fetched<PASSING, HS> fetched1, fetched2;
    fetch(fetched1, side1 + (size_t)begin * stride, stride, end - begin, hs, packed);
    fetch(fetched2, side2 + (size_t)begin * stride2, stride2, end - begin, hs, packed);

    const int mine = warp * OWN + group;                     // rows of this thread's a and ds: first + mine + 4i
    float query_lse[KEYS ? N : R], query_delta[KEYS ? N : R];
#pragma unroll
    for (int i = 0; i < R && !KEYS; i++) {
        const int query = first + mine + 4 * i;
        query_lse[i] = query < T ? LOG2E * lse[query] : 0.0f;
        query_delta[i] = query < T ? delta[query] : 0.0f;
    }
    const int sum_lane = threadIdx.x % ROW_LANES<HS>, sum_group = threadIdx.x % WARP / ROW_LANES<HS>;
    const int slot = warp * OWN + sum_group * SUMS;          // the slot of this thread's rows of the sums
    Pack<4> sums1[SUMS][ROW_PACKS<HS>], sums2[SUMS][ROW_PACKS<HS>];  // dk and dv, or dq
    clear(sums1);
    clear(sums2);

    for (int passing = begin; passing < end; passing += PASSING) {
        const int next = passing + PASSING;
        const bool diagonal = KEYS ? passing < first + ROWS - 1 : next - 1 > first;
        fetched1.put(passing1);
        fetched2.put(passing2);
        __syncthreads();
        fetch(fetched1, side1 + (size_t)next * stride, stride, end - next, hs, packed);
        fetch(fetched2, side2 + (size_t)next * stride2, stride2, end - next, hs, packed);
#pragma unroll
        for (int j = 0; j < N && KEYS; j++) {
            const int query = passing + lane + 8 * j;
            query_lse[j] = query < T ? LOG2E * lse[query] : 0.0f;
            query_delta[j] = query < T ? delta[query] : 0.0f;
        }
        float a[R][N], ds[R][N];
        dot_rows<HS, 4, 8>(a, tile1 + mine, passing1 + lane, hs);
        dot_rows<HS, 4, 8>(ds, tile2 + mine, passing2 + lane, hs);
#pragma unroll
        for (int i = 0; i < R; i++) {
#pragma unroll
            for (int j = 0; j < N; j++) {
                const int row = first + mine + 4 * i, other = passing + lane + 8 * j;
                const bool future = KEYS ? row > other : other > row;
                a[i][j] = future ? 0.0f : exp2f(LOG2E * scale * a[i][j] - query_lse[KEYS ? j : i]);
                ds[i][j] = future ? 0.0f : a[i][j] * (ds[i][j] - query_delta[KEYS ? j : i]);
            }
        }
        if (KEYS) {
            hand_over<N, 8, ROWS>(weights, warp * OWN + group * R, lane, a, 0);
            __syncwarp();
            add_weighted<PASSING, ROWS, HS>(sums2, weights, slot, passing2, sum_lane, diagonal);
            __syncwarp();
        }
        hand_over<N, 8, ROWS>(weights, warp * OWN + group * R, lane, ds, 0);
        __syncwarp();
        add_weighted<PASSING, ROWS, HS>(sums1, weights, slot, passing1, sum_lane, diagonal);
        __syncthreads();
    }

#pragma unroll
    for (int i = 0; i < SUMS; i++) {
        const int s = sum_group * SUMS + i;
        const int row = first + warp * OWN + s / R + 4 * (s % R);
        if (row < T) {
            float* dq = dqkv + (b * T + row) * stride + h * hs;
#pragma unroll
            for (int c = 0; c < ROW_PACKS<HS>; c++) {
                const int column = sum_lane * 4 + c * 64;
                store_columns(KEYS ? dq + C : dq, column, hs, packed, times(scale, sums1[i][c]));
                if (KEYS) { store_columns(dq + 2 * C, column, hs, packed, sums2[i][c]); }
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(128)
attention_dkdv_64_kernel(float* __restrict__ dqkv, const float* __restrict__ dout, const float* __restrict__ qkv,
                         const float* __restrict__ lse, const float* __restrict__ delta, int T, int NH, int hs) {
    backward_tile<true, 64, 64, 16>(dqkv, dout, qkv, lse, delta, T, NH, hs);
}

extern "C" __global__ void __launch_bounds__(128)
attention_dkdv_128_kernel(float* __restrict__ dqkv, const float* __restrict__ dout, const float* __restrict__ qkv,
                          const float* __restrict__ lse, const float* __restrict__ delta, int T, int NH, int hs) {
    backward_tile<true, 128, 32, 8>(dqkv, dout, qkv, lse, delta, T, NH, hs);
}

extern "C" __global__ void __launch_bounds__(128)
attention_dq_64_kernel(float* __restrict__ dqkv, const float* __restrict__ dout, const float* __restrict__ qkv,
                       const float* __restrict__ lse, const float* __restrict__ delta, int T, int NH, int hs) {
    backward_tile<false, 64, 64, 16>(dqkv, dout, qkv, lse, delta, T, NH, hs);
}

extern "C" __global__ void __launch_bounds__(128)
attention_dq_128_kernel(float* __restrict__ dqkv, const float* __restrict__ dout, const float* __restrict__ qkv,
                        const float* __restrict__ lse, const float* __restrict__ delta, int T, int NH, int hs) {
    backward_tile<false, 128, 32, 8>(dqkv, dout, qkv, lse, delta, T, NH, hs);
}
