// union_attention.cu: attention over selected keys on tensor cores, for sm_80 and later; formulas in
// kernels/cpu/sparse/sparse_attention.py, lists in union_lists.cu, fragments of products in mma.cuh, tiles in
// attention_mma.cuh and attention_tensor.cu
//
// qkv, dqkv (B,T,3C), out (B*(T-start),C), dout (B*T,C), lse (B,NH,T-start), delta (B,NH,T), as in sparse_attention.cu;
// ids (B,tiles,capacity), masks (B,tiles,2,capacity), size (B,tiles). Any hs from 1 to 128; tiles are HS = 64 or 128
// wide, padded with zeros. tf32: operands of products are rounded to nearest; 3xtf32: split, with float32's accuracy.
//
//   v1 sparse_attention.cu                  each query gathers its own keys: half an FMA for each byte of L2
//   v2 tiles of the union of lists (this)   64 queries share the rows that pass, on tensor cores, with a mask: the
//                                           result is that of the lists alone, whatever they hold
//
//   forward  64 queries stay, keys and values that one of them selected pass
//   dq       queries and dout stay, k and v pass; writes delta too
//   dkdv     64 keys and values stay, q and dout of queries that selected one of them pass
//   mean     64 queries meet 64 keys of their union, head after head; the mean stays in registers
//
// With a share u of the pairs up to the diagonal in the tiles, flops are u times dense attention's, and so are bytes, by
// 64 rows a tile: u N C T / 64 floats forward. Where all pairs are selected that is dense attention, with cp.async by row
// number, a mask, and 64 rows a tile in place of 128: 12% slower than dense tiles by the proof on an H100. A second path
// for such tiles would not pay.
//
// A pair that was not selected has weight 0, and 0 * x is 0 unless x is infinite or NaN. Looking for such values would
// take a pass over all that comes by: instead a block whose sums are not finite does its work again, with care. Keys come
// in an order that the lists of later queries do not change (by_first), and zeros change no sum: what a query gets does
// not depend on what comes after it by a single bit.

#define ROWS 64  // of a tile that stays

// neighbours 2t and 2t + 1 of what passes
struct __align__(8) Two {
    unsigned of[2];
};

// a tile's list, of which STAGE pass at a time
template <int STAGE> struct Passing {
    const int *ids, *masks;
    int n, capacity;

    __device__ __forceinline__ Passing(const int* ids, const int* masks, const int* size, size_t list, int capacity)
        : ids(ids + list * capacity), masks(masks + list * 2 * capacity), n(size[list]), capacity(capacity) {}

    // number of row lane % STAGE of the stage at `first`, -1 behind the list
    __device__ __forceinline__ int id(int first) const {
        const int place = first + threadIdx.x % STAGE;
        return place < n ? ids[place] : -1;
    }

    // the stage's bits on their way to `words` (2,STAGE), 0 behind the list
    __device__ __forceinline__ void fetch_words(Pack<4>* words, int first) const {
        const int half = threadIdx.x / STAGE, place = first + threadIdx.x % STAGE;
        if (half < 2) {
            copy_later<4>(reinterpret_cast<float*>(words) + threadIdx.x, masks + half * capacity + place, place < n);
        }
    }
};

// whether a stage of whose `words` bits first .. first + OWN - 1 belong to this warp has any for it
template <int OWN, int STAGE> __device__ __forceinline__ bool wanted(const unsigned* words, int first) {
    const unsigned mine = words[threadIdx.x % STAGE] >> first;
    return __any_sync(ALL_LANES, (OWN < 32 ? mine & ((1u << OWN) - 1) : mine) != 0);
}

// what was not selected becomes `value`; words, from bit `first` on, for the warp's rows
template <int M, int N>
__device__ __forceinline__ void hide_others(float (&x)[M][N][4], const unsigned* words, int first, float value) {
    const int g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
    const Two* mine = reinterpret_cast<const Two*>(words) + t;
#pragma unroll
    for (int n = 0; n < N; n++) {
        const Two two = mine[4 * n];
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const unsigned bits = two.of[j] >> (first + g);
#pragma unroll
            for (int m = 0; m < M; m++) {
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    if (!(bits >> (16 * m + 8 * half) & 1u)) { x[m][n][2 * half + j] = value; }
                }
            }
        }
    }
}

template <int N, int M> __device__ __forceinline__ bool all_finite(const float (&sums)[M][N][4]) {
    bool yes = true;
#pragma unroll
    for (int m = 0; m < M; m++) {
#pragma unroll
        for (int n = 0; n < N; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) { yes = yes && finite(sums[m][n][i]); }
        }
    }
    return yes;
}

// --- forward ---------------------------------------------------------------------------------------------------------

// a warp has M x 16 queries; if EXACT they stay in shared memory, since splitting takes the registers
template <bool EXACT, int HS, int M, int KEYS>
__device__ __forceinline__ void forward_union(float* out, float* lse, const float* qkv, const int* ids,
                                              const int* masks, const int* size, int T, int NH, int hs, int start,
                                              int capacity) {
    constexpr int OWN = 16 * M, THREADS = ROWS / OWN * WARP, TILE = KEYS * STRIDE<HS>, STAGE = 2 * TILE + KEYS / 2;
    extern __shared__ Pack<4> shared[];  // two stages of keys, values, words, then q

    const int g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
    const int Tq = T - start, C = NH * hs, stride = 3 * C;
    const int tile = gridDim.y - 1 - blockIdx.y;  // blocks with most keys start first
    const size_t b = blockIdx.x / NH, h = blockIdx.x % NH;
    const int own = threadIdx.x / WARP * OWN;     // the warp's first row, then its first query
    const int mine = tile * ROWS + own;
    const bool packed = hs % 4 == 0 && aligned(qkv, out);
    const float scale = LOG2E / sqrtf(hs);
    const float* queries = qkv + b * T * stride + h * hs;
    const float* keys = queries + C;
    const Passing<KEYS> list(ids, masks, size, b * gridDim.y + tile, capacity);
    const auto fetch_stage = [&](Pack<4>* to, int first, int id) {
        gather<HS, KEYS, THREADS>(to, keys, stride, id, hs, packed);
        gather<HS, KEYS, THREADS>(to + TILE, keys + C, stride, id, hs, packed);
        list.fetch_words(to + 2 * TILE, first);
        commit_copies();
    };

    Rows<HS, M, EXACT> q(shared + 2 * STAGE);
    load_rows<EXACT>(q, queries + (size_t)(start + mine) * stride, stride, Tq - mine, hs, packed);
    Sums<HS, M> sums;
    float top[M][2], total[M][2];
    for (bool again = false;; again = true) {
        clear(sums);
#pragma unroll
        for (int m = 0; m < M; m++) { top[m][0] = top[m][1] = MINUS_INFINITY, total[m][0] = total[m][1] = 0.0f; }
        fetch_stage(shared, 0, list.id(0));
        int id = list.id(KEYS), stage = 0;
        for (int first = 0; first < list.n; first += KEYS) {
            const int next = first + KEYS;
            Pack<4>* now = shared + stage;
            stage = STAGE - stage;
            Pack<4>* then = shared + stage;
            // all copies are there, and all warps are done with the other stage
            const bool careful = await<EXACT, HS, 2 * KEYS, THREADS>(now, again);
            if (next < list.n) {
                fetch_stage(then, next, id);
                id = list.id(next + KEYS);
            }
            const unsigned* words = reinterpret_cast<const unsigned*>(now + 2 * TILE) + own / 32 * KEYS;
            if (wanted<OWN, KEYS>(words, own % 32)) {
                Sums<KEYS, M> p;
                clear(p);
                add_dots<EXACT, HS>(p, q, now, hs);
                hide_others(p, words, own % 32, MINUS_INFINITY);
#pragma unroll
                for (int m = 0; m < M; m++) { online_softmax<KEYS, HS>(p[m], top[m], total[m], sums[m], scale); }
                add_products<EXACT, HS>(sums, p, now + TILE, hs, careful);
            }
        }
        if (again || !__syncthreads_or(!all_finite(sums))) { break; }
    }

#pragma unroll
    for (int m = 0; m < M; m++) {
        const int row = mine + 16 * m;
        float factor[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            total[m][half] = group_sum<4>(total[m][half]);
            factor[half] = 1.0f / total[m][half];
            const int query = row + g + 8 * half;
            if (t == 0 && query < Tq) {
                lse[(b * NH + h) * Tq + query] = LN2 * (top[m][half] + log2f(total[m][half]));
            }
        }
        store_rows<HS>(out + (b * Tq + row) * C + h * hs, C, Tq - row, hs, sums[m], factor, packed);
    }
}

extern "C" __global__ void __launch_bounds__(64, 4) DYNAMIC_SHARED(35328)
union_forward_tf32_64_kernel(float* __restrict__ out, float* __restrict__ lse, const float* __restrict__ qkv,
                             const int* __restrict__ ids, const int* __restrict__ masks, const int* __restrict__ size,
                             int T, int NH, int hs, int start, int capacity) {
    FOR_TENSOR_CORES(
        forward_union<false, 64, 2, 32>(out, lse, qkv, ids, masks, size, T, NH, hs, start, capacity);)
}

extern "C" __global__ void __launch_bounds__(128, 2) DYNAMIC_SHARED(68096)
union_forward_tf32_128_kernel(float* __restrict__ out, float* __restrict__ lse, const float* __restrict__ qkv,
                              const int* __restrict__ ids, const int* __restrict__ masks,
                              const int* __restrict__ size, int T, int NH, int hs, int start, int capacity) {
    FOR_TENSOR_CORES(
        forward_union<false, 128, 1, 32>(out, lse, qkv, ids, masks, size, T, NH, hs, start, capacity);)
}

extern "C" __global__ void __launch_bounds__(64, 4) DYNAMIC_SHARED(51712)
union_forward_3xtf32_64_kernel(float* __restrict__ out, float* __restrict__ lse, const float* __restrict__ qkv,
                               const int* __restrict__ ids, const int* __restrict__ masks,
                               const int* __restrict__ size, int T, int NH, int hs, int start, int capacity) {
    FOR_TENSOR_CORES(
        forward_union<true, 64, 2, 32>(out, lse, qkv, ids, masks, size, T, NH, hs, start, capacity);)
}

extern "C" __global__ void __launch_bounds__(128, 2) DYNAMIC_SHARED(100864)
union_forward_3xtf32_128_kernel(float* __restrict__ out, float* __restrict__ lse, const float* __restrict__ qkv,
                                const int* __restrict__ ids, const int* __restrict__ masks,
                                const int* __restrict__ size, int T, int NH, int hs, int start, int capacity) {
    FOR_TENSOR_CORES(
        forward_union<true, 128, 1, 32>(out, lse, qkv, ids, masks, size, T, NH, hs, start, capacity);)
}

// --- backward --------------------------------------------------------------------------------------------------------

// dq, and delta = dout . out for dkdv, which comes after it. A warp has 16 queries; what stays is SHARED where a thread
// has no registers for it
template <bool EXACT, int HS, int KEYS>
__device__ __forceinline__ void dq_union(float* dqkv, float* delta, const float* dout, const float* qkv,
                                         const float* out, const float* lse, const int* ids, const int* masks,
                                         const int* size, int T, int NH, int hs, int capacity) {
    constexpr int OWN = 16, TILE = KEYS * STRIDE<HS>, STAGE = 2 * TILE + KEYS / 2;
    constexpr bool SHARED = EXACT || HS > 64;
    extern __shared__ Pack<4> shared[];  // two stages of keys, values, words, then q and dout

    const int g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
    const int C = NH * hs, stride = 3 * C;
    const int tile = gridDim.y - 1 - blockIdx.y;
    const size_t b = blockIdx.x / NH, h = blockIdx.x % NH;
    const int own = threadIdx.x / WARP * OWN, mine = tile * ROWS + own;  // the warp's first row, its first query
    const bool packed = hs % 4 == 0 && aligned(dqkv, dout, qkv, out);
    const float scale = 1.0f / sqrtf(hs);
    const float* queries = qkv + b * T * stride + h * hs;
    const float* keys = queries + C;
    const size_t offset = (b * T + mine) * C + h * hs, number = (b * NH + h) * T + mine;
    const Passing<KEYS> list(ids, masks, size, b * gridDim.y + tile, capacity);
    const auto fetch_stage = [&](Pack<4>* to, int first, int id) {
        gather<HS, KEYS, TILE_THREADS>(to, keys, stride, id, hs, packed);
        gather<HS, KEYS, TILE_THREADS>(to + TILE, keys + C, stride, id, hs, packed);
        list.fetch_words(to + 2 * TILE, first);
        commit_copies();
    };

    Rows<HS, 1, SHARED> q(shared + 2 * STAGE), d(shared + 2 * STAGE + TILE_WARPS * q.CHUNKS_A_WARP);
    load_rows<EXACT>(q, queries + (size_t)mine * stride, stride, T - mine, hs, packed);
    float query_lse[2], query_delta[2] = {0.0f, 0.0f};
#pragma unroll
    for (int pair = 0; pair < HS / 16; pair++) {
        Pack<4> rows[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            rows[half] = load_chunk(dout + offset, C, half, pair, T - mine, hs, packed);
            add_product(query_delta[half], rows[half], load_chunk(out + offset, C, half, pair, T - mine, hs, packed));
        }
        put_chunks<EXACT>(d, 0, pair, rows[0], rows[1]);
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = g + 8 * half;
        query_delta[half] = group_sum<4>(query_delta[half]);
        query_lse[half] = mine + row < T ? LOG2E * lse[number + row] : 0.0f;
        if (t == 0 && mine + row < T) { delta[number + row] = query_delta[half]; }
    }

    Sums<HS, 1> dq;
    for (bool again = false;; again = true) {
        clear(dq);
        fetch_stage(shared, 0, list.id(0));
        int id = list.id(KEYS), stage = 0;
        for (int first = 0; first < list.n; first += KEYS) {
            const int next = first + KEYS;
            Pack<4>* now = shared + stage;
            stage = STAGE - stage;
            Pack<4>* then = shared + stage;
            const bool careful = await<EXACT, HS, 2 * KEYS>(now, again);
            if (next < list.n) {
                fetch_stage(then, next, id);
                id = list.id(next + KEYS);
            }
            const unsigned* words = reinterpret_cast<const unsigned*>(now + 2 * TILE) + own / 32 * KEYS;
            if (wanted<OWN, KEYS>(words, own % 32)) {
                Sums<KEYS, 1> a, ds;
                clear(a);
                clear(ds);
                add_dots<EXACT, HS>(a, q, now, hs);
                add_dots<EXACT, HS>(ds, d, now + TILE, hs);
#pragma unroll
                for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        const float weight = exp2f(LOG2E * scale * a[0][n][i] - query_lse[i / 2]);
                        ds[0][n][i] = weight * (ds[0][n][i] - query_delta[i / 2]);
                    }
                }
                hide_others(ds, words, own % 32, 0.0f);
                add_products<EXACT, HS>(dq, ds, now, hs, careful);
            }
        }
        if (again || !__syncthreads_or(!all_finite(dq))) { break; }
    }
    const float factor[2] = {scale, scale};
    store_rows<HS>(dqkv + (b * T + mine) * stride + h * hs, stride, T - mine, hs, dq[0], factor, packed);
}

// rows g and g + 8 of `rows`, by their numbers, -1 for zeros
template <bool EXACT, int HS, bool SHARED>
__device__ __forceinline__ void load_rows_at(Rows<HS, 1, SHARED>& to, const float* rows, int stride,
                                             const int (&number)[2], int hs, bool packed) {
#pragma unroll
    for (int pair = 0; pair < HS / 16; pair++) {
        Pack<4> x[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int chunk = pair / 2 * 8 + threadIdx.x % 4 * 2 + pair % 2;
            const float* row = rows + (size_t)max(number[half], 0) * stride;
            x[half] = load_columns(row, chunk * 4, number[half] < 0 ? 0 : hs, packed);
        }
        put_chunks<EXACT>(to, 0, pair, x[0], x[1]);
    }
}

// dk and dv of the keys at order (B,T); a warp has 16 of them
template <bool EXACT, int HS, int QUERIES>
__device__ __forceinline__ void dkdv_union(float* dqkv, const float* dout, const float* qkv, const float* lse,
                                           const float* delta, const int* order, const int* ids, const int* masks,
                                           const int* size, int T, int NH, int hs, int capacity) {
    constexpr int OWN = 16, TILE = QUERIES * STRIDE<HS>, STAGE = 2 * TILE + QUERIES;
    constexpr bool SHARED = EXACT || HS > 64;
    static_assert(TILE_THREADS >= 2 * QUERIES, "a thread copies a number of each kind");
    extern __shared__ Pack<4> shared[];  // two stages of q, dout, words, lse and delta, then keys and values

    const int g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
    const int C = NH * hs, stride = 3 * C;
    const size_t b = blockIdx.x / NH, h = blockIdx.x % NH;
    const int own = threadIdx.x / WARP * OWN;  // tiles with most queries start first
    const bool packed = hs % 4 == 0 && aligned(dqkv, dout, qkv);
    const float scale = 1.0f / sqrtf(hs);
    const float* queries = qkv + b * T * stride + h * hs;
    const float* douts = dout + b * T * C + h * hs;
    const float* numbers = (threadIdx.x < QUERIES ? lse : delta) + (b * NH + h) * T;
    const Passing<QUERIES> list(ids, masks, size, b * gridDim.y + blockIdx.y, capacity);
    const auto fetch_stage = [&](Pack<4>* to, int first, int id) {
        gather<HS, QUERIES, TILE_THREADS>(to, queries, stride, id, hs, packed);
        gather<HS, QUERIES, TILE_THREADS>(to + TILE, douts, C, id, hs, packed);
        list.fetch_words(to + 2 * TILE, first);
        if (threadIdx.x < 2 * QUERIES) {
            float* place = reinterpret_cast<float*>(to + 2 * TILE + QUERIES / 2) + threadIdx.x;
            copy_later<4>(place, numbers + max(id, 0), id >= 0);
        }
        commit_copies();
    };

    int key[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int place = blockIdx.y * ROWS + own + g + 8 * half;
        key[half] = place < T ? order[b * T + place] : -1;
    }
    Rows<HS, 1, SHARED> k(shared + 2 * STAGE), v(shared + 2 * STAGE + TILE_WARPS * k.CHUNKS_A_WARP);
    load_rows_at<EXACT>(k, queries + C, stride, key, hs, packed);
    load_rows_at<EXACT>(v, queries + 2 * C, stride, key, hs, packed);
    Sums<HS, 1> dk, dv;
    for (bool again = false;; again = true) {
        clear(dk);
        clear(dv);
        fetch_stage(shared, 0, list.id(0));
        int id = list.id(QUERIES), stage = 0;
        for (int first = 0; first < list.n; first += QUERIES) {
            const int next = first + QUERIES;
            Pack<4>* now = shared + stage;
            stage = STAGE - stage;
            Pack<4>* then = shared + stage;
            const bool careful = await<EXACT, HS, 2 * QUERIES>(now, again);
            if (next < list.n) {
                fetch_stage(then, next, id);
                id = list.id(next + QUERIES);
            }
            const unsigned* words = reinterpret_cast<const unsigned*>(now + 2 * TILE) + own / 32 * QUERIES;
            if (wanted<OWN, QUERIES>(words, own % 32)) {
                const Pack<2>* query_lse = reinterpret_cast<const Pack<2>*>(now + 2 * TILE + QUERIES / 2) + t;
                const Pack<2>* query_delta = query_lse + QUERIES / 2;
                Sums<QUERIES, 1> a, ds;
                clear(a);
                clear(ds);
                add_dots<EXACT, HS>(a, k, now, hs);
                add_dots<EXACT, HS>(ds, v, now + TILE, hs);
#pragma unroll
                for (int n = 0; n < QUERIES / 8; n++) {
                    const Pack<2> l = query_lse[4 * n], d = query_delta[4 * n];
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        a[0][n][i] = exp2f(LOG2E * scale * a[0][n][i] - LOG2E * l.at[i % 2]);
                        ds[0][n][i] = a[0][n][i] * (ds[0][n][i] - d.at[i % 2]);
                    }
                }
                hide_others(a, words, own % 32, 0.0f);
                hide_others(ds, words, own % 32, 0.0f);
                add_products<EXACT, HS>(dv, a, now + TILE, hs, careful);
                add_products<EXACT, HS>(dk, ds, now, hs, careful);
            }
        }
        if (again || !__syncthreads_or(!all_finite(dk) || !all_finite(dv))) { break; }
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        if (key[half] < 0) { continue; }
        float* row = dqkv + (b * T + key[half]) * stride + C + h * hs;
        store_row<HS>(row, half, hs, dk[0], scale, packed);
        store_row<HS>(row + C, half, hs, dv[0], 1.0f, packed);
    }
}

extern "C" __global__ void __launch_bounds__(128, 2) DYNAMIC_SHARED(35328)
union_dq_tf32_64_kernel(float* __restrict__ dqkv, float* __restrict__ delta, const float* __restrict__ dout,
                        const float* __restrict__ qkv, const float* __restrict__ out, const float* __restrict__ lse,
                        const int* __restrict__ ids, const int* __restrict__ masks, const int* __restrict__ size,
                        int T, int NH, int hs, int capacity) {
    FOR_TENSOR_CORES(
        dq_union<false, 64, 32>(dqkv, delta, dout, qkv, out, lse, ids, masks, size, T, NH, hs, capacity);)
}

extern "C" __global__ void __launch_bounds__(128, 2) DYNAMIC_SHARED(99584)
union_dq_tf32_128_kernel(float* __restrict__ dqkv, float* __restrict__ delta, const float* __restrict__ dout,
                         const float* __restrict__ qkv, const float* __restrict__ out, const float* __restrict__ lse,
                         const int* __restrict__ ids, const int* __restrict__ masks, const int* __restrict__ size,
                         int T, int NH, int hs, int capacity) {
    FOR_TENSOR_CORES(
        dq_union<false, 128, 16>(dqkv, delta, dout, qkv, out, lse, ids, masks, size, T, NH, hs, capacity);)
}

extern "C" __global__ void __launch_bounds__(128, 3) DYNAMIC_SHARED(68096)
union_dq_3xtf32_64_kernel(float* __restrict__ dqkv, float* __restrict__ delta, const float* __restrict__ dout,
                          const float* __restrict__ qkv, const float* __restrict__ out, const float* __restrict__ lse,
                          const int* __restrict__ ids, const int* __restrict__ masks, const int* __restrict__ size,
                          int T, int NH, int hs, int capacity) {
    FOR_TENSOR_CORES(
        dq_union<true, 64, 32>(dqkv, delta, dout, qkv, out, lse, ids, masks, size, T, NH, hs, capacity);)
}

extern "C" __global__ void __launch_bounds__(128, 2) DYNAMIC_SHARED(99584)
union_dq_3xtf32_128_kernel(float* __restrict__ dqkv, float* __restrict__ delta, const float* __restrict__ dout,
                           const float* __restrict__ qkv, const float* __restrict__ out,
                           const float* __restrict__ lse, const int* __restrict__ ids, const int* __restrict__ masks,
                           const int* __restrict__ size, int T, int NH, int hs, int capacity) {
    FOR_TENSOR_CORES(
        dq_union<true, 128, 16>(dqkv, delta, dout, qkv, out, lse, ids, masks, size, T, NH, hs, capacity);)
}

extern "C" __global__ void __launch_bounds__(128, 2) DYNAMIC_SHARED(35840)
union_dkdv_tf32_64_kernel(float* __restrict__ dqkv, const float* __restrict__ dout, const float* __restrict__ qkv,
                          const float* __restrict__ lse, const float* __restrict__ delta,
                          const int* __restrict__ order, const int* __restrict__ ids, const int* __restrict__ masks,
                          const int* __restrict__ size, int T, int NH, int hs, int capacity) {
    FOR_TENSOR_CORES(
        dkdv_union<false, 64, 32>(dqkv, dout, qkv, lse, delta, order, ids, masks, size, T, NH, hs, capacity);)
}

extern "C" __global__ void __launch_bounds__(128, 2) DYNAMIC_SHARED(99840)
union_dkdv_tf32_128_kernel(float* __restrict__ dqkv, const float* __restrict__ dout, const float* __restrict__ qkv,
                           const float* __restrict__ lse, const float* __restrict__ delta,
                           const int* __restrict__ order, const int* __restrict__ ids, const int* __restrict__ masks,
                           const int* __restrict__ size, int T, int NH, int hs, int capacity) {
    FOR_TENSOR_CORES(
        dkdv_union<false, 128, 16>(dqkv, dout, qkv, lse, delta, order, ids, masks, size, T, NH, hs, capacity);)
}

extern "C" __global__ void __launch_bounds__(128, 2) DYNAMIC_SHARED(68608)
union_dkdv_3xtf32_64_kernel(float* __restrict__ dqkv, const float* __restrict__ dout, const float* __restrict__ qkv,
                            const float* __restrict__ lse, const float* __restrict__ delta,
                            const int* __restrict__ order, const int* __restrict__ ids, const int* __restrict__ masks,
                            const int* __restrict__ size, int T, int NH, int hs, int capacity) {
    FOR_TENSOR_CORES(
        dkdv_union<true, 64, 32>(dqkv, dout, qkv, lse, delta, order, ids, masks, size, T, NH, hs, capacity);)
}

extern "C" __global__ void __launch_bounds__(128, 2) DYNAMIC_SHARED(99840)
union_dkdv_3xtf32_128_kernel(float* __restrict__ dqkv, const float* __restrict__ dout, const float* __restrict__ qkv,
                             const float* __restrict__ lse, const float* __restrict__ delta,
                             const int* __restrict__ order, const int* __restrict__ ids,
                             const int* __restrict__ masks, const int* __restrict__ size, int T, int NH, int hs,
                             int capacity) {
    FOR_TENSOR_CORES(
        dkdv_union<true, 128, 16>(dqkv, dout, qkv, lse, delta, order, ids, masks, size, T, NH, hs, capacity);)
}

// --- mean over heads -------------------------------------------------------------------------------------------------

#define SLICE 64  // columns of a head that pass at a time

// 16 M rows of a tile as Rows get them
template <int M> struct TileRows {
    const Pack<4>* mine;

    __device__ __forceinline__ explicit TileRows(const Pack<4>* tile)
        : mine(tile + threadIdx.x % WARP / 4 * STRIDE<SLICE> + threadIdx.x % 4 * 2) {}

    __device__ __forceinline__ Pack<4> get(int m, int step) const {
        const Pack<4>* row = mine + 16 * m * STRIDE<SLICE> + step / 4 * 8 + step / 2 % 2;
        const Pack<4> low = row[0], high = row[8 * STRIDE<SLICE>];
        const int i = step % 2 * 2;
        return {low.at[i], high.at[i], low.at[i + 1], high.at[i + 1]};
    }
};

// the first place of an ascending list (n) whose key is not before `key`
__device__ __forceinline__ int first_place(const int* list, int n, int key) {
    int low = 0, high = n;
    while (low < high) {
        const int middle = (low + high) / 2;
        if (list[middle] < key) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low;
}

// p (B,T,K) = mean over heads of exp(q . k / sqrt(hs) - lse) for the keys of index (B,T,K), count (B,T), 0 behind them;
// ids ascend in a list. A block takes 64 keys of a list at a time, a warp 32 of the queries and 32 of the keys; blocks of
// a tile take turns, grid (blocks, tiles, B)
template <bool EXACT>
__device__ __forceinline__ void mean_union(float* p, const float* qkv, const float* lse, const int* index,
                                           const int* count, const int* ids, const int* masks, const int* size, int T,
                                           int NH, int hs, int K, int capacity) {
    constexpr int KEYS = 64, TILE = ROWS * STRIDE<SLICE>, STAGE = 2 * TILE;
    extern __shared__ Pack<4> shared[];     // two stages of queries and keys
    __shared__ unsigned selected[ROWS][2];  // of a query, keys 0..31 and 32..63
    __shared__ int places[ROWS];            // of the first of the 64 keys in a query's list
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4;
    const int C = NH * hs, stride = 3 * C, tile = gridDim.y - 1 - blockIdx.y, query = tile * ROWS;
    const int own = warp / 2 * WARP, part = warp % 2;  // the warp's first query and its half of the keys
    const size_t b = blockIdx.z, list = b * gridDim.y + tile;
    const bool packed = hs % 4 == 0 && aligned(qkv);
    const float scale = LOG2E / sqrtf(hs);
    const int slices = (hs + SLICE - 1) / SLICE, steps = NH * slices;
    const float* queries = qkv + (b * T + query) * stride;
    const float* keys = qkv + b * T * stride + C;
    index += (b * T + query) * K;
    count += b * T + query;
    p += (b * T + query) * K;
    ids += list * capacity;
    masks += (2 * list + own / WARP) * capacity;
    const int n = size[list];

    if (blockIdx.x == 0) {
        for (int row = warp; row < ROWS && query + row < T; row += TILE_WARPS) {
            for (int j = count[row] + lane; j < K; j += WARP) { p[(size_t)row * K + j] = 0.0f; }
        }
    }
    for (int first = blockIdx.x * KEYS; first < n; first += gridDim.x * KEYS) {
        const int low = first + lane < n ? ids[first + lane] : -1;
        const int high = first + WARP + lane < n ? ids[first + WARP + lane] : -1;
        const auto fetch_stage = [&](Pack<4>* to, int step) {
            const int column = step % slices * SLICE, at = step / slices * hs + column, left = min(SLICE, hs - column);
            fetch<SLICE, ROWS>(to, queries + at, stride, T - query, left, packed);
            gather<SLICE, WARP, TILE_THREADS>(to + TILE, keys + at, stride, low, left, packed);
            gather<SLICE, WARP, TILE_THREADS>(to + TILE + WARP * STRIDE<SLICE>, keys + at, stride, high, left, packed);
            commit_copies();
        };

        fetch_stage(shared, 0);
        const unsigned of_key = (part ? high : low) < 0 ? 0 : masks[first + part * WARP + lane];
#pragma unroll 1
        for (int row = 0; row < WARP; row++) {
            const unsigned of_row = __ballot_sync(ALL_LANES, of_key >> row & 1u);
            if (lane == row) { selected[own + row][part] = of_row; }
        }
        if (threadIdx.x < ROWS && query + threadIdx.x < T) {
            places[threadIdx.x] = first_place(index + (size_t)threadIdx.x * K, count[threadIdx.x], ids[first]);
        }
        float mean[2][4][4], s[2][4][4], log_sum[2][2];
        clear(mean);
        clear(s);
        for (int step = 0; step < steps; step++) {
            Pack<4>* now = shared + step % 2 * STAGE;
            const bool last = step % slices == slices - 1;  // of the head
            await<EXACT, SLICE, 2 * ROWS>(now, false);
            if (step + 1 < steps) { fetch_stage(shared + (step + 1) % 2 * STAGE, step + 1); }
#pragma unroll
            for (int m = 0; m < 2; m++) {
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const int row = query + own + 16 * m + 8 * half + g;
                    log_sum[m][half] = last && row < T ? LOG2E * lse[(b * NH + step / slices) * T + row] : 0.0f;
                }
            }
            const TileRows<2> rows(now + own * STRIDE<SLICE>);
            add_dots<EXACT, SLICE>(s, rows, now + TILE + part * WARP * STRIDE<SLICE>, hs - step % slices * SLICE);
            if (last) {
#pragma unroll
                for (int m = 0; m < 2; m++) {
#pragma unroll
                    for (int k = 0; k < 4; k++) {
#pragma unroll
                        for (int i = 0; i < 4; i++) { mean[m][k][i] += exp2f(s[m][k][i] * scale - log_sum[m][i / 2]); }
                    }
                }
                clear(s);
            }
        }
#pragma unroll
        for (int m = 0; m < 2; m++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int row = own + 16 * m + 8 * half + g;
                const unsigned of_row = selected[row][part];
                if (of_row == 0) { continue; }  // as is that of a row behind the last query
                float* to = p + (size_t)row * K + places[row] + (part ? __popc(selected[row][0]) : 0);
#pragma unroll
                for (int k = 0; k < 4; k++) {
#pragma unroll
                    for (int j = 0; j < 2; j++) {
                        const unsigned bit = 1u << (8 * k + 2 * t + j);
                        if (of_row & bit) { to[__popc(of_row & (bit - 1))] = mean[m][k][2 * half + j] / NH; }
                    }
                }
            }
        }
        __syncthreads();  // all warps are done with what the next keys overwrite
    }
}

extern "C" __global__ void __launch_bounds__(128, 3) DYNAMIC_SHARED(69632)
union_mean_tf32_kernel(float* __restrict__ p, const float* __restrict__ qkv, const float* __restrict__ lse,
                       const int* __restrict__ index, const int* __restrict__ count, const int* __restrict__ ids,
                       const int* __restrict__ masks, const int* __restrict__ size, int T, int NH, int hs, int K,
                       int capacity) {
    FOR_TENSOR_CORES(mean_union<false>(p, qkv, lse, index, count, ids, masks, size, T, NH, hs, K, capacity);)
}

extern "C" __global__ void __launch_bounds__(128, 3) DYNAMIC_SHARED(69632)
union_mean_3xtf32_kernel(float* __restrict__ p, const float* __restrict__ qkv, const float* __restrict__ lse,
                         const int* __restrict__ index, const int* __restrict__ count, const int* __restrict__ ids,
                         const int* __restrict__ masks, const int* __restrict__ size, int T, int NH, int hs, int K,
                         int capacity) {
    FOR_TENSOR_CORES(mean_union<true>(p, qkv, lse, index, count, ids, masks, size, T, NH, hs, K, capacity);)
}
