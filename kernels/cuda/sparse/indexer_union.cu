// indexer_union.cu: indexer.cu's scores and gradients of gathered keys on tensor cores, for heads that share a key
// (kernels/cpu/sparse/indexer.py); lists in union_lists.cu, tiles in attention_mma.cuh. tf32: operands of products are
// rounded to nearest; 3xtf32: split, with float32's accuracy
//
//   v1 indexer.cu                           a row is fetched for each query by itself: half an FMA for a byte of L2
//   v2 tiles of the union of lists (this)   64 queries share the rows that one of them selected; what another one
//                                           selected is computed and thrown away
//
// index (B,T,K), count (B,T); ids (B,tiles,capacity), ascending, masks (B,tiles,2,capacity), size (B,tiles): the keys
// that 64 queries selected, and bits that say which of them did. Both ascend: the place of a key in a query's list is
// the number of the query's bits in front of it.
//
//   forward   keys of the union stay, their queries pass, head after head, and the sum over heads stays in registers
//   u         queries of a head stay, keys of the union pass: dq and dw
//   dk        keys of the union stay, queries pass: what a tile of queries adds to dk, in parts; a warp for each key
//             adds them up, tile after tile. With the tiles of queries that a key's own list names there would be no
//             parts, but each of its queries would have to look for it

#define QUERIES 64                 // of a tile
#define PASSING 32                 // rows that pass at a time
#define WORDS (TILE_THREADS / WARP)

// the first of n ascending numbers that is `value` or more
__device__ __forceinline__ int lower_bound(const int* numbers, int n, int value) {
    int low = 0;
    while (low < n) {
        const int middle = (low + n) / 2;
        if (numbers[middle] < value) {
            low = middle + 1;
        } else {
            n = middle;
        }
    }
    return low;
}

// of a query and 32 keys of the union: which it selected, and how many it selected in front of these
struct __align__(8) Chosen {
    unsigned keys;
    int before;

    __device__ __forceinline__ bool has(int key) const { return keys >> key & 1u; }
    __device__ __forceinline__ int place(int key) const { return before + __popc(keys & ((1u << key) - 1)); }
};

// a tile's list
struct Union {
    const int *ids, *masks;
    int n, capacity;

    __device__ __forceinline__ Union(const int* ids, const int* masks, const int* size, size_t list, int capacity)
        : ids(ids + list * capacity), masks(masks + list * 2 * capacity), n(size[list]), capacity(capacity) {}

    // bits of key `place` for the queries of a half, 0 behind the list
    __device__ __forceinline__ unsigned mask(int half, int place) const {
        return place < n ? (unsigned)masks[half * capacity + place] : 0;
    }
};

// chosen of the tile's queries and the block's keys, a thread for each, first ..; index, count of the tile's queries
__device__ __forceinline__ void find_chosen(Chosen (&chosen)[QUERIES][WORDS], const Union& list, const int* index,
                                            const int* count, int K, int queries, int first) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const unsigned mask = list.mask(half, first + threadIdx.x);
        unsigned mine = 0;
        for (int row = 0; row < WARP; row++) {
            const unsigned keys = __ballot_sync(ALL_LANES, mask >> row & 1u);
            if (row == lane) { mine = keys; }
        }
        chosen[half * WARP + lane][warp].keys = mine;
    }
    __syncthreads();
    const int query = threadIdx.x;
    if (query < QUERIES) {
        int before = query < queries ? lower_bound(index + (size_t)query * K, count[query], list.ids[first]) : 0;
        for (int word = 0; word < WORDS; word++) {
            chosen[query][word].before = before;
            before += __popc(chosen[query][word].keys);
        }
    }
    __syncthreads();
}

// M x 16 rows, of the first n of these ids
template <bool EXACT, int HS, int M, bool SHARED>
__device__ __forceinline__ void load_listed(Rows<HS, M, SHARED>& to, const float* rows, int stride, const int* ids,
                                            int n, int hs, bool packed) {
    const int g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int m = 0; m < M; m++) {
        const int low = 16 * m + g, high = low + 8;
        const float* of_low = rows + (size_t)(low < n ? ids[low] : 0) * stride;
        const float* of_high = rows + (size_t)(high < n ? ids[high] : 0) * stride;
#pragma unroll
        for (int pair = 0; pair < HS / 16; pair++) {
            const int column = (pair / 2 * 8 + t * 2 + pair % 2) * 4;
            put_chunks<EXACT>(to, m, pair, load_columns(of_low, column, low < n ? hs : 0, packed),
                              load_columns(of_high, column, high < n ? hs : 0, packed));
        }
    }
}

// queries of a head, and their head weights behind them, on their way to a stage; `left` of them are there
template <int HS>
__device__ __forceinline__ void fetch_queries(Pack<4>* to, const float* q, const float* w, int left, int HI, int dI,
                                              bool packed) {
    fetch<HS, PASSING>(to, q, HI * dI, left, dI, packed);
    if (threadIdx.x < PASSING) {
        float* weights = reinterpret_cast<float*>(to + PASSING * STRIDE<HS>);
        copy_later<4>(weights + threadIdx.x, w + (size_t)threadIdx.x * HI, (int)threadIdx.x < left);
    }
    commit_copies();
}

// scores (B,T,K), -inf from count (B,T) on. grid (capacity / keys of a block, tiles, B); a warp has M x 16 keys
template <bool EXACT, int HS, int M>
__device__ __forceinline__ void gathered_scores(float* scores, const float* q, const float* k, const float* w,
                                                const int* index, const int* count, const int* ids, const int* masks,
                                                const int* size, float scale, int T, int K, int HI, int dI,
                                                int capacity) {
    constexpr int OWN = 16 * M, STAGE = PASSING * STRIDE<HS> + PASSING / 4;
    extern __shared__ Pack<4> shared[];  // two stages of queries, then keys
    __shared__ Chosen chosen[QUERIES][WORDS];
    const size_t b = blockIdx.z, query = b * T + blockIdx.y * QUERIES;
    const int queries = min(QUERIES, T - (int)blockIdx.y * QUERIES);
    const Union list(ids, masks, size, b * gridDim.y + blockIdx.y, capacity);
    const int first = blockIdx.x * TILE_WARPS * OWN, mine = threadIdx.x / WARP * OWN;
    scores += query * K, index += query * K, count += query, q += query * HI * dI, w += query * HI;
    if (blockIdx.x == 0) {
        for (int i = threadIdx.x; i < queries * K; i += TILE_THREADS) {
            if (i % K >= count[i / K]) { scores[i] = MINUS_INFINITY; }
        }
    }
    if (first >= list.n) { return; }
    const bool packed = dI % 4 == 0 && aligned(q, k);
    fetch_queries<HS>(shared, q, w, queries, HI, dI, packed);
    Rows<HS, M, EXACT> rows(shared + 2 * STAGE);
    load_listed<EXACT>(rows, k + b * T * dI, dI, list.ids + first + mine, list.n - first - mine, dI, packed);
    find_chosen(chosen, list, index, count, K, queries, first);
    const int g = threadIdx.x % WARP / 4, t = threadIdx.x % 4, word = mine / WARP, own = mine % WARP + g;
    int stage = 0;
    for (int r = 0; r < queries; r += PASSING) {
        Sums<PASSING, M> total;
        clear(total);
        for (int j = 0; j < HI; j++) {
            Pack<4>* now = shared + stage;
            stage = STAGE - stage;
            await<EXACT, HS, PASSING>(now, false);
            const int next = j + 1 < HI ? r : r + PASSING, head = j + 1 < HI ? j + 1 : 0;
            if (next < queries) {
                fetch_queries<HS>(shared + stage, q + ((size_t)next * HI + head) * dI, w + next * HI + head,
                                  queries - next, HI, dI, packed);
            }
            const Pack<2>* weights = reinterpret_cast<const Pack<2>*>(now + PASSING * STRIDE<HS>) + t;
            Sums<PASSING, M> z;
            clear(z);
            add_dots<EXACT, HS>(z, rows, now, dI);
#pragma unroll
            for (int n = 0; n < PASSING / 8; n++) {
                const Pack<2> weight = weights[4 * n];
#pragma unroll
                for (int m = 0; m < M; m++) {
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        total[m][n][i] += weight.at[i % 2] * (z[m][n][i] < 0.0f ? 0.0f : z[m][n][i]);
                    }
                }
            }
        }
#pragma unroll
        for (int n = 0; n < PASSING / 8; n++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int row = r + 8 * n + 2 * t + i;
                const Chosen of = chosen[row][word];
                float* to = scores + (size_t)row * K;
#pragma unroll
                for (int m = 0; m < M; m++) {
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        const int key = own + 16 * m + 8 * half;
                        if (of.has(key)) { to[of.place(key)] = scale * total[m][n][2 * half + i]; }
                    }
                }
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(128, 2) DYNAMIC_SHARED(17664)
indexer_union_forward_tf32_64_kernel(float* __restrict__ scores, const float* __restrict__ q,
                                     const float* __restrict__ k, const float* __restrict__ w,
                                     const int* __restrict__ index, const int* __restrict__ count,
                                     const int* __restrict__ ids, const int* __restrict__ masks,
                                     const int* __restrict__ size, float scale, int T, int K, int HI, int dI,
                                     int capacity) {
    FOR_TENSOR_CORES(
        (gathered_scores<false, 64, 2>(scores, q, k, w, index, count, ids, masks, size, scale, T, K, HI, dI,
                                       capacity));)
}

extern "C" __global__ void __launch_bounds__(128, 2) DYNAMIC_SHARED(34048)
indexer_union_forward_tf32_128_kernel(float* __restrict__ scores, const float* __restrict__ q,
                                      const float* __restrict__ k, const float* __restrict__ w,
                                      const int* __restrict__ index, const int* __restrict__ count,
                                      const int* __restrict__ ids, const int* __restrict__ masks,
                                      const int* __restrict__ size, float scale, int T, int K, int HI, int dI,
                                      int capacity) {
    FOR_TENSOR_CORES(
        (gathered_scores<false, 128, 1>(scores, q, k, w, index, count, ids, masks, size, scale, T, K, HI, dI,
                                        capacity));)
}

extern "C" __global__ void __launch_bounds__(128, 2) DYNAMIC_SHARED(50432)
indexer_union_forward_3xtf32_64_kernel(float* __restrict__ scores, const float* __restrict__ q,
                                       const float* __restrict__ k, const float* __restrict__ w,
                                       const int* __restrict__ index, const int* __restrict__ count,
                                       const int* __restrict__ ids, const int* __restrict__ masks,
                                       const int* __restrict__ size, float scale, int T, int K, int HI, int dI,
                                       int capacity) {
    FOR_TENSOR_CORES(
        (gathered_scores<true, 64, 2>(scores, q, k, w, index, count, ids, masks, size, scale, T, K, HI, dI,
                                      capacity));)
}

extern "C" __global__ void __launch_bounds__(128, 2) DYNAMIC_SHARED(66816)
indexer_union_forward_3xtf32_128_kernel(float* __restrict__ scores, const float* __restrict__ q,
                                        const float* __restrict__ k, const float* __restrict__ w,
                                        const int* __restrict__ index, const int* __restrict__ count,
                                        const int* __restrict__ ids, const int* __restrict__ masks,
                                        const int* __restrict__ size, float scale, int T, int K, int HI, int dI,
                                        int capacity) {
    FOR_TENSOR_CORES(
        (gathered_scores<true, 128, 1>(scores, q, k, w, index, count, ids, masks, size, scale, T, K, HI, dI,
                                       capacity));)
}

// parts (B,tiles,capacity,dI): what the queries of a tile add to dk; grid and warps as for the scores, of `tiles` tiles
// from tile0 on
template <bool EXACT, int HS, int M>
__device__ __forceinline__ void gathered_dk(float* parts, const float* dscores, const float* q, const float* k,
                                            const float* w, const int* index, const int* count, const int* ids,
                                            const int* masks, const int* size, float scale, int T, int K, int HI,
                                            int dI, int capacity, int tile0) {
    constexpr int OWN = 16 * M, STAGE = PASSING * STRIDE<HS> + PASSING / 4;
    extern __shared__ Pack<4> shared[];  // two stages of queries, then keys
    __shared__ Chosen chosen[QUERIES][WORDS];
    const int tiles = (T + QUERIES - 1) / QUERIES, tile = tile0 + blockIdx.y;
    const size_t b = blockIdx.z, query = b * T + tile * QUERIES;
    const int queries = min(QUERIES, T - tile * QUERIES);
    const Union list(ids, masks, size, b * tiles + tile, capacity);
    const int first = blockIdx.x * TILE_WARPS * OWN, mine = threadIdx.x / WARP * OWN;
    if (first >= list.n) { return; }
    dscores += query * K, index += query * K, count += query, q += query * HI * dI, w += query * HI;
    const bool packed = dI % 4 == 0 && aligned(q, k);
    fetch_queries<HS>(shared, q, w, queries, HI, dI, packed);
    Rows<HS, M, EXACT> rows(shared + 2 * STAGE);
    load_listed<EXACT>(rows, k + b * T * dI, dI, list.ids + first + mine, list.n - first - mine, dI, packed);
    find_chosen(chosen, list, index, count, K, queries, first);
    const int g = threadIdx.x % WARP / 4, t = threadIdx.x % 4, word = mine / WARP, own = mine % WARP + g;
    Sums<HS, M> dk;
    clear(dk);
    int stage = 0;
    for (int r = 0; r < queries; r += PASSING) {
        Sums<PASSING, M> of_pair;  // scale times dscores, 0 for what was not selected
#pragma unroll
        for (int n = 0; n < PASSING / 8; n++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int row = r + 8 * n + 2 * t + i;
                const Chosen of = chosen[row][word];
                const float* from = dscores + (size_t)row * K;
#pragma unroll
                for (int m = 0; m < M; m++) {
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        const int key = own + 16 * m + 8 * half;
                        of_pair[m][n][2 * half + i] = of.has(key) ? scale * from[of.place(key)] : 0.0f;
                    }
                }
            }
        }
        for (int j = 0; j < HI; j++) {
            Pack<4>* now = shared + stage;
            stage = STAGE - stage;
            await<EXACT, HS, PASSING>(now, false);
            const int next = j + 1 < HI ? r : r + PASSING, head = j + 1 < HI ? j + 1 : 0;
            if (next < queries) {
                fetch_queries<HS>(shared + stage, q + ((size_t)next * HI + head) * dI, w + next * HI + head,
                                  queries - next, HI, dI, packed);
            }
            const Pack<2>* weights = reinterpret_cast<const Pack<2>*>(now + PASSING * STRIDE<HS>) + t;
            Sums<PASSING, M> z;
            clear(z);
            add_dots<EXACT, HS>(z, rows, now, dI);
#pragma unroll
            for (int n = 0; n < PASSING / 8; n++) {
                const Pack<2> weight = weights[4 * n];
#pragma unroll
                for (int m = 0; m < M; m++) {
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        z[m][n][i] = z[m][n][i] > 0.0f ? weight.at[i % 2] * of_pair[m][n][i] : 0.0f;
                    }
                }
            }
            add_products<EXACT, false, HS>(dk, z, now, dI);
        }
    }
    const float factor[2] = {1.0f, 1.0f};
    float* to = parts + ((b * gridDim.y + blockIdx.y) * capacity + first + mine) * dI;
#pragma unroll
    for (int m = 0; m < M; m++) {
        const int left = list.n - first - mine - 16 * m;
        store_rows<HS>(to + (size_t)(16 * m) * dI, dI, left, dI, dk[m], factor, dI % 4 == 0);  // scratch is aligned
    }
}

extern "C" __global__ void __launch_bounds__(128, 2) DYNAMIC_SHARED(17664)
indexer_union_dk_tf32_64_kernel(float* __restrict__ parts, const float* __restrict__ dscores,
                                const float* __restrict__ q, const float* __restrict__ k, const float* __restrict__ w,
                                const int* __restrict__ index, const int* __restrict__ count,
                                const int* __restrict__ ids, const int* __restrict__ masks,
                                const int* __restrict__ size, float scale, int T, int K, int HI, int dI, int capacity,
                                int tile0) {
    FOR_TENSOR_CORES(
        (gathered_dk<false, 64, 2>(parts, dscores, q, k, w, index, count, ids, masks, size, scale, T, K, HI, dI,
                                   capacity, tile0));)
}

extern "C" __global__ void __launch_bounds__(128, 2) DYNAMIC_SHARED(34048)
indexer_union_dk_tf32_128_kernel(float* __restrict__ parts, const float* __restrict__ dscores,
                                 const float* __restrict__ q, const float* __restrict__ k,
                                 const float* __restrict__ w, const int* __restrict__ index,
                                 const int* __restrict__ count, const int* __restrict__ ids,
                                 const int* __restrict__ masks, const int* __restrict__ size, float scale, int T,
                                 int K, int HI, int dI, int capacity, int tile0) {
    FOR_TENSOR_CORES(
        (gathered_dk<false, 128, 1>(parts, dscores, q, k, w, index, count, ids, masks, size, scale, T, K, HI,
                                    dI, capacity, tile0));)
}

extern "C" __global__ void __launch_bounds__(128, 2) DYNAMIC_SHARED(50432)
indexer_union_dk_3xtf32_64_kernel(float* __restrict__ parts, const float* __restrict__ dscores,
                                  const float* __restrict__ q, const float* __restrict__ k,
                                  const float* __restrict__ w, const int* __restrict__ index,
                                  const int* __restrict__ count, const int* __restrict__ ids,
                                  const int* __restrict__ masks, const int* __restrict__ size, float scale, int T,
                                  int K, int HI, int dI, int capacity, int tile0) {
    FOR_TENSOR_CORES(
        (gathered_dk<true, 64, 2>(parts, dscores, q, k, w, index, count, ids, masks, size, scale, T, K, HI, dI,
                                  capacity, tile0));)
}

extern "C" __global__ void __launch_bounds__(128, 2) DYNAMIC_SHARED(66816)
indexer_union_dk_3xtf32_128_kernel(float* __restrict__ parts, const float* __restrict__ dscores,
                                   const float* __restrict__ q, const float* __restrict__ k,
                                   const float* __restrict__ w, const int* __restrict__ index,
                                   const int* __restrict__ count, const int* __restrict__ ids,
                                   const int* __restrict__ masks, const int* __restrict__ size, float scale, int T,
                                   int K, int HI, int dI, int capacity, int tile0) {
    FOR_TENSOR_CORES(
        (gathered_dk<true, 128, 1>(parts, dscores, q, k, w, index, count, ids, masks, size, scale, T, K, HI, dI,
                                   capacity, tile0));)
}

// dk (B,T,dI) = parts (B,count,capacity,dI) of `count` of the tiles, from tile0 on, added to dk if `more`; bits
// (B,tiles,T,2). A warp for each key, a lane for each tile: where it has the key; grid (T / warps of a block, B)
extern "C" __global__ void __launch_bounds__(256)
indexer_union_join_kernel(float* __restrict__ dk, const float* __restrict__ parts, const int* __restrict__ bits,
                          const int* __restrict__ ids, const int* __restrict__ size, int T, int dI, int tiles,
                          int capacity, int tile0, int count, int more) {
    const int lane = threadIdx.x % WARP, s = (blockIdx.x * blockDim.x + threadIdx.x) / WARP;
    const size_t b = blockIdx.y;
    if (s >= T) { return; }
    float* row = dk + (b * T + s) * dI;
    for (int c0 = 0; c0 < dI; c0 += 2 * WARP) {  // two columns a lane
        const int c = c0 + lane, d = c + WARP;
        float total[2] = {more && c < dI ? row[c] : 0.0f, more && d < dI ? row[d] : 0.0f};
        for (int begin = 0; begin < count; begin += WARP) {
            const size_t tile = b * tiles + tile0 + begin + lane;
            int place = -1;
            if (begin + lane < count) {
                const int* by = bits + (tile * T + s) * 2;
                if (by[0] | by[1]) { place = lower_bound(ids + tile * capacity, size[tile], s); }
            }
            for (unsigned having = __ballot_sync(ALL_LANES, place >= 0); having; having &= having - 1) {
                const int of = __ffs(having) - 1;
                const size_t at = (b * count + begin + of) * capacity + __shfl_sync(ALL_LANES, place, of);
                if (c < dI) { total[0] += parts[at * dI + c]; }
                if (d < dI) { total[1] += parts[at * dI + d]; }
            }
        }
        if (c < dI) { row[c] = total[0]; }
        if (d < dI) { row[d] = total[1]; }
    }
}

// dq (B,T,HI*dI), dw (B,T,HI): a warp has 16 queries of a head; grid (tiles, HI, B)
template <bool EXACT, int HS>
__device__ __forceinline__ void gathered_dq(float* dq, float* dw, const float* dscores, const float* q, const float* k,
                                            const float* w, const int* ids, const int* masks, const int* size,
                                            float scale, int T, int K, int HI, int dI, int capacity) {
    constexpr int TILE = PASSING * STRIDE<HS>;
    extern __shared__ Pack<4> shared[];  // two stages of keys, then queries
    const int g = threadIdx.x % WARP / 4, t = threadIdx.x % 4, lane = threadIdx.x % WARP, stride = HI * dI;
    const int tile = gridDim.x - 1 - blockIdx.x, j = blockIdx.y;  // blocks with most keys start first
    const size_t b = blockIdx.z;
    const int warp = threadIdx.x / WARP, mine = tile * QUERIES + 16 * warp;
    const bool packed = dI % 4 == 0 && aligned(q, k, dq);
    const Union list(ids, masks, size, b * gridDim.x + tile, capacity);
    const float* keys = k + b * T * dI;
    const size_t row = (b * T + mine) * stride + j * dI;
    const auto id = [&](int first) { return first + lane < list.n ? list.ids[first + lane] : -1; };

    gather<HS, PASSING, TILE_THREADS>(shared, keys, dI, id(0), dI, packed);
    commit_copies();
    Rows<HS, 1, EXACT> rows(shared + 2 * TILE);
    load_rows<EXACT>(rows, q + row, stride, T - mine, dI, packed);
    int next_id = id(PASSING), stage = 0;
    Chosen chosen[2] = {};  // of queries g and g + 8
    Sums<HS, 1> u;
    clear(u);
    for (int first = 0; first < list.n; first += PASSING) {
        Pack<4>* now = shared + stage;
        stage = TILE - stage;
        const unsigned mask = list.mask(warp / 2, first + lane) >> warp % 2 * 16 & 0xffffu;
        await<EXACT, HS, PASSING>(now, false);
        if (first + PASSING < list.n) {
            gather<HS, PASSING, TILE_THREADS>(shared + stage, keys, dI, next_id, dI, packed);
            commit_copies();
            next_id = id(first + 2 * PASSING);
        }
        if (!__any_sync(ALL_LANES, mask != 0)) { continue; }
#pragma unroll
        for (int of = 0; of < 16; of++) {
            const unsigned found = __ballot_sync(ALL_LANES, mask >> of & 1u);
            if (of % 8 == g) { chosen[of / 8].keys = found; }
        }
        Sums<PASSING, 1> z, of_pair;  // scale times dscores, 0 for what was not selected
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float* from = dscores + (b * T + mine + g + 8 * half) * K;
#pragma unroll
            for (int n = 0; n < PASSING / 8; n++) {
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const int key = 8 * n + 2 * t + i;
                    const bool has = chosen[half].has(key);
                    of_pair[0][n][2 * half + i] = has ? scale * from[chosen[half].place(key)] : 0.0f;
                }
            }
            chosen[half].before += __popc(chosen[half].keys);
        }
        clear(z);
        add_dots<EXACT, HS>(z, rows, now, dI);
#pragma unroll
        for (int n = 0; n < PASSING / 8; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) { z[0][n][i] = z[0][n][i] > 0.0f ? of_pair[0][n][i] : 0.0f; }
        }
        add_products<EXACT, false, HS>(u, z, now, dI);
    }

    float factor[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {  // dw = q . u, dq = w u
        const int query = mine + g + 8 * half;
        const float* of_query = q + row + (size_t)(g + 8 * half) * stride;
        float product = 0.0f;
#pragma unroll
        for (int c = 0; c < HS / 32; c++) {
#pragma unroll
            for (int l = 0; l < 2; l++) {
                const Pack<4> x = load_columns(of_query, 32 * c + 8 * t + 4 * l, query < T ? dI : 0, packed);
#pragma unroll
                for (int i = 0; i < 4; i++) { product += x.at[i] * u[0][4 * c + i][2 * half + l]; }
            }
        }
        product = group_sum<4>(product);
        const size_t at = (b * T + query) * HI + j;
        factor[half] = query < T ? w[at] : 0.0f;
        if (t == 0 && query < T) { dw[at] = product; }
    }
    store_rows<HS>(dq + row, stride, T - mine, dI, u[0], factor, packed);
}

extern "C" __global__ void __launch_bounds__(128, 2) DYNAMIC_SHARED(17408)
indexer_union_dq_tf32_64_kernel(float* __restrict__ dq, float* __restrict__ dw, const float* __restrict__ dscores,
                                const float* __restrict__ q, const float* __restrict__ k, const float* __restrict__ w,
                                const int* __restrict__ ids, const int* __restrict__ masks,
                                const int* __restrict__ size, float scale, int T, int K, int HI, int dI, int capacity) {
    FOR_TENSOR_CORES(
        (gathered_dq<false, 64>(dq, dw, dscores, q, k, w, ids, masks, size, scale, T, K, HI, dI, capacity));)
}

extern "C" __global__ void __launch_bounds__(128, 2) DYNAMIC_SHARED(33792)
indexer_union_dq_tf32_128_kernel(float* __restrict__ dq, float* __restrict__ dw, const float* __restrict__ dscores,
                                 const float* __restrict__ q, const float* __restrict__ k,
                                 const float* __restrict__ w, const int* __restrict__ ids,
                                 const int* __restrict__ masks, const int* __restrict__ size, float scale, int T,
                                 int K, int HI, int dI, int capacity) {
    FOR_TENSOR_CORES(
        (gathered_dq<false, 128>(dq, dw, dscores, q, k, w, ids, masks, size, scale, T, K, HI, dI, capacity));)
}

extern "C" __global__ void __launch_bounds__(128, 2) DYNAMIC_SHARED(33792)
indexer_union_dq_3xtf32_64_kernel(float* __restrict__ dq, float* __restrict__ dw, const float* __restrict__ dscores,
                                  const float* __restrict__ q, const float* __restrict__ k,
                                  const float* __restrict__ w, const int* __restrict__ ids,
                                  const int* __restrict__ masks, const int* __restrict__ size, float scale, int T,
                                  int K, int HI, int dI, int capacity) {
    FOR_TENSOR_CORES(
        (gathered_dq<true, 64>(dq, dw, dscores, q, k, w, ids, masks, size, scale, T, K, HI, dI, capacity));)
}

extern "C" __global__ void __launch_bounds__(128, 2) DYNAMIC_SHARED(66560)
indexer_union_dq_3xtf32_128_kernel(float* __restrict__ dq, float* __restrict__ dw, const float* __restrict__ dscores,
                                   const float* __restrict__ q, const float* __restrict__ k,
                                   const float* __restrict__ w, const int* __restrict__ ids,
                                   const int* __restrict__ masks, const int* __restrict__ size, float scale, int T,
                                   int K, int HI, int dI, int capacity) {
    FOR_TENSOR_CORES(
        (gathered_dq<true, 128>(dq, dw, dscores, q, k, w, ids, masks, size, scale, T, K, HI, dI, capacity));)
}
