// attention_tensor.cu: causal multi-head self-attention on tensor cores, for sm_80 and later; formulas in
// kernels/cpu/gpt2/attention.py, fragments of products in mma.cuh, tiles in attention_mma.cuh
//
// qkv, dqkv (B,T,3C), out (B*(T-start),C), dout (B*T,C), lse (B,NH,T-start), delta (B,NH,T), as in attention.cu. Any hs
// from 1 to 128; tiles are HS = 64 or 128 wide, padded with zeros. tf32: operands of products are rounded to nearest;
// 3xtf32: split, with float32's accuracy. Sums, softmax, lse and delta are float32.
//
//   v1 attention.cu                      FMAs are the limit, and tensor cores idle
//   v2 a warp owns 16 rows, as operand a a tile that passes is read from shared memory for 16 rows alone
//   v3 32 rows a warp if HS is 64 (this) half the reads; the next tile is under way by cp.async
//
//   forward  queries stay, keys and values pass     s = q k^T, out = p v
//   dq       queries and dout stay, k and v pass    s = q k^T, da = dout v^T, dq = ds k; writes delta too
//   dkdv     keys and values stay, q and dout pass  s^T = k q^T, da^T = v dout^T, dv = a^T dout, dk = ds^T q
//
// Bytes and flops are those of attention.cu, but what passes by is read by blocks of 128 rows (64 if HS is 128) instead
// of 64 (32), and flops are a tensor core's. A block writes what no other one writes; sums have a fixed order.
//
// Scores leave a product in the layout of c and enter the next one as operand a without a shuffle: a lane's neighbouring
// columns 2t, 2t+1 are word t and word t+4 of the sum over keys. In the same way 16 bytes of a row are a lane's words of
// two products over the columns of a head. A tile's row is 16 bytes too long: eight lanes at a time read
//     row g, chunk 2t + i       (rows as columns of b)    g even, odd; t = 0..3: chunks g + 2t mod 8, all different
//     row 2t + i, chunk g + 8c  (rows as rows of b)       likewise
// so that no two of them meet in a bank.
//
// Tiles above the diagonal are skipped. On the diagonal, weights of the future are 0, and 0 * v is 0 unless v is infinite
// or NaN: where a tile has such values, they are left out of the product and added one by one where weights are not 0.

// a warp has M x 16 queries; if EXACT they stay in shared memory, since splitting takes the registers
template <bool EXACT, int HS, int M, int KEYS>
__device__ __forceinline__ void forward_tile(float* out, float* lse, const float* qkv, int T, int NH, int hs,
                                             int start) {
    constexpr int OWN = 16 * M, QUERIES = TILE_WARPS * OWN, TILE = KEYS * STRIDE<HS>;
    extern __shared__ Pack<4> shared[];  // two stages of keys and values

    const int g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
    const int C = NH * hs, stride = 3 * C;
    const size_t b = blockIdx.x / NH, h = blockIdx.x % NH;
    const int first = start + (gridDim.y - 1 - blockIdx.y) * QUERIES;  // blocks with most keys start first
    const int end = min(T, first + QUERIES);
    const int mine = first + threadIdx.x / WARP * OWN;                 // the warp's first query
    const bool packed = hs % 4 == 0 && aligned(qkv, out);
    const float scale = LOG2E / sqrtf(hs);
    const float* queries = qkv + b * T * stride + h * hs;
    const float* keys = queries + C;
    const float* values = keys + C;

    fetch<HS, KEYS>(shared, keys, stride, end, hs, packed);
    fetch<HS, KEYS>(shared + TILE, values, stride, end, hs, packed);
    commit_copies();
    Rows<HS, M, EXACT> q(shared + 4 * TILE);
    load_rows<EXACT>(q, queries + (size_t)mine * stride, stride, T - mine, hs, packed);
    Sums<HS, M> sums;
    clear(sums);
    float top[M][2], total[M][2];
#pragma unroll
    for (int m = 0; m < M; m++) { top[m][0] = top[m][1] = MINUS_INFINITY, total[m][0] = total[m][1] = 0.0f; }

    int stage = 0;
    for (int key = 0; key < end; key += KEYS) {
        const int next = key + KEYS;
        Pack<4>* now = shared + stage;
        stage = 2 * TILE - stage;
        Pack<4>* then = shared + stage;
        // all copies are there, and all warps are done with the other stage
        const bool careful = await<EXACT, HS, 2 * KEYS>(now, next - 1 > first);
        if (next < end) {
            fetch<HS, KEYS>(then, keys + (size_t)next * stride, stride, end - next, hs, packed);
            fetch<HS, KEYS>(then + TILE, values + (size_t)next * stride, stride, end - next, hs, packed);
            commit_copies();
        }
        if (key < mine + OWN && mine < T) {
            Sums<KEYS, M> p;
            clear(p);
            add_dots<EXACT, HS>(p, q, now, hs);
            if (next - 1 > mine) { hide_future<false>(p, mine, key, MINUS_INFINITY); }
#pragma unroll
            for (int m = 0; m < M; m++) { online_softmax<KEYS, HS>(p[m], top[m], total[m], sums[m], scale); }
            add_products<EXACT, HS>(sums, p, now + TILE, hs, careful);
        }
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
            if (t == 0 && query < T) {
                lse[(b * NH + h) * (T - start) + query - start] = LN2 * (top[m][half] + log2f(total[m][half]));
            }
        }
        store_rows<HS>(out + (b * (T - start) + row - start) * C + h * hs, C, T - row, hs, sums[m], factor, packed);
    }
}

extern "C" __global__ void __launch_bounds__(128, 2) DYNAMIC_SHARED(34816)
attention_forward_tf32_64_kernel(float* __restrict__ out, float* __restrict__ lse, const float* __restrict__ qkv,
                                 int T, int NH, int hs, int start) {
    FOR_TENSOR_CORES(forward_tile<false, 64, 2, 32>(out, lse, qkv, T, NH, hs, start);)
}

extern "C" __global__ void __launch_bounds__(128, 2) DYNAMIC_SHARED(67584)
attention_forward_tf32_128_kernel(float* __restrict__ out, float* __restrict__ lse, const float* __restrict__ qkv,
                                  int T, int NH, int hs, int start) {
    FOR_TENSOR_CORES(forward_tile<false, 128, 1, 32>(out, lse, qkv, T, NH, hs, start);)
}

extern "C" __global__ void __launch_bounds__(128, 2) DYNAMIC_SHARED(67584)
attention_forward_3xtf32_64_kernel(float* __restrict__ out, float* __restrict__ lse, const float* __restrict__ qkv,
                                   int T, int NH, int hs, int start) {
    FOR_TENSOR_CORES(forward_tile<true, 64, 2, 32>(out, lse, qkv, T, NH, hs, start);)
}

extern "C" __global__ void __launch_bounds__(128, 2) DYNAMIC_SHARED(100352)
attention_forward_3xtf32_128_kernel(float* __restrict__ out, float* __restrict__ lse, const float* __restrict__ qkv,
                                    int T, int NH, int hs, int start) {
    FOR_TENSOR_CORES(forward_tile<true, 128, 1, 32>(out, lse, qkv, T, NH, hs, start);)
}

// --- backward --------------------------------------------------------------------------------------------------------

// dq, and delta = dout . out for attention_dkdv, which comes after it. A warp has M x 16 queries
template <bool EXACT, int HS, int M, int KEYS>
__device__ __forceinline__ void dq_tile(float* dqkv, float* delta, const float* dout, const float* qkv,
                                        const float* out, const float* lse, int T, int NH, int hs) {
    constexpr int OWN = 16 * M, QUERIES = TILE_WARPS * OWN, TILE = KEYS * STRIDE<HS>;
    extern __shared__ Pack<4> shared[];  // two stages of keys and values, then q and dout

    const int g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
    const int C = NH * hs, stride = 3 * C;
    const size_t b = blockIdx.x / NH, h = blockIdx.x % NH;
    const int first = (gridDim.y - 1 - blockIdx.y) * QUERIES;   // blocks with most keys start first
    const int end = min(T, first + QUERIES);
    const int mine = first + threadIdx.x / WARP * OWN;          // the warp's first query
    const bool packed = hs % 4 == 0 && aligned(dqkv, dout, qkv, out);
    const float scale = 1.0f / sqrtf(hs);
    const float* queries = qkv + b * T * stride + h * hs;
    const float* keys = queries + C;
    const float* values = keys + C;

    fetch<HS, KEYS>(shared, keys, stride, end, hs, packed);
    fetch<HS, KEYS>(shared + TILE, values, stride, end, hs, packed);
    commit_copies();
    Rows<HS, M, true> q(shared + 4 * TILE), d(shared + 4 * TILE + TILE_WARPS * q.CHUNKS_A_WARP);
    load_rows<EXACT>(q, queries + (size_t)mine * stride, stride, T - mine, hs, packed);
    float query_lse[M][2], query_delta[M][2];
#pragma unroll
    for (int m = 0; m < M; m++) {
        const int row = mine + 16 * m;
        const size_t offset = (b * T + row) * C + h * hs;
        query_delta[m][0] = query_delta[m][1] = 0.0f;
#pragma unroll
        for (int pair = 0; pair < HS / 16; pair++) {
            Pack<4> rows[2];
#pragma unroll
            for (int half = 0; half < 2; half++) {
                rows[half] = load_chunk(dout + offset, C, half, pair, T - row, hs, packed);
                add_product(query_delta[m][half], rows[half], load_chunk(out + offset, C, half, pair, T - row, hs, packed));
            }
            put_chunks<EXACT>(d, m, pair, rows[0], rows[1]);
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int query = row + g + 8 * half;
            query_delta[m][half] = group_sum<4>(query_delta[m][half]);
            query_lse[m][half] = query < T ? LOG2E * lse[(b * NH + h) * T + query] : 0.0f;
            if (t == 0 && query < T) { delta[(b * NH + h) * T + query] = query_delta[m][half]; }
        }
    }
    Sums<HS, M> dq;
    clear(dq);

    int stage = 0;
    for (int key = 0; key < end; key += KEYS) {
        const int next = key + KEYS;
        Pack<4>* now = shared + stage;
        stage = 2 * TILE - stage;
        Pack<4>* then = shared + stage;
        const bool careful = await<EXACT, HS, 2 * KEYS>(now, next - 1 > first);
        if (next < end) {
            fetch<HS, KEYS>(then, keys + (size_t)next * stride, stride, end - next, hs, packed);
            fetch<HS, KEYS>(then + TILE, values + (size_t)next * stride, stride, end - next, hs, packed);
            commit_copies();
        }
        if (key < mine + OWN && mine < T) {
            Sums<KEYS, M> a, ds;
            clear(a);
            clear(ds);
            add_dots<EXACT, HS>(a, q, now, hs);
            add_dots<EXACT, HS>(ds, d, now + TILE, hs);
#pragma unroll
            for (int m = 0; m < M; m++) {
#pragma unroll
                for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        const float weight = exp2f(LOG2E * scale * a[m][n][i] - query_lse[m][i / 2]);
                        ds[m][n][i] = weight * (ds[m][n][i] - query_delta[m][i / 2]);
                    }
                }
            }
            if (next - 1 > mine) { hide_future<false>(ds, mine, key, 0.0f); }
            add_products<EXACT, HS>(dq, ds, now, hs, careful);
        }
    }

    const float factor[2] = {scale, scale};
#pragma unroll
    for (int m = 0; m < M; m++) {
        const int row = mine + 16 * m;
        store_rows<HS>(dqkv + (b * T + row) * stride + h * hs, stride, T - row, hs, dq[m], factor, packed);
    }
}

// a warp has M x 16 keys
template <bool EXACT, int HS, int M, int QUERIES>
__device__ __forceinline__ void dkdv_tile(float* dqkv, const float* dout, const float* qkv, const float* lse,
                                          const float* delta, int T, int NH, int hs) {
    constexpr int OWN = 16 * M, KEYS = TILE_WARPS * OWN, TILE = QUERIES * STRIDE<HS>, STAGE = 2 * TILE + QUERIES / 2;
    static_assert(KEYS % QUERIES == 0 && TILE_THREADS >= 2 * QUERIES, "tiles of queries begin with those of keys");
    extern __shared__ Pack<4> shared[];  // two stages of q, dout, lse, delta, then keys and values

    const int t = threadIdx.x % 4;
    const int C = NH * hs, stride = 3 * C;
    const size_t b = blockIdx.x / NH, h = blockIdx.x % NH;
    const int first = blockIdx.y * KEYS;                // blocks with most queries start first
    const int mine = first + threadIdx.x / WARP * OWN;  // the warp's first key
    const bool packed = hs % 4 == 0 && aligned(dqkv, dout, qkv);
    const float scale = 1.0f / sqrtf(hs);
    const float* queries = qkv + b * T * stride + h * hs;
    const float* keys = queries + C + (size_t)mine * stride;
    const float* douts = dout + b * T * C + h * hs;
    // a thread copies one number of a tile: lse, then delta
    const int number = threadIdx.x % QUERIES;
    const float* numbers = (threadIdx.x < QUERIES ? lse : delta) + (b * NH + h) * T + number;
    const auto fetch_stage = [&](Pack<4>* to, int query) {
        fetch<HS, QUERIES>(to, queries + (size_t)query * stride, stride, T - query, hs, packed);
        fetch<HS, QUERIES>(to + TILE, douts + (size_t)query * C, C, T - query, hs, packed);
        if (threadIdx.x < 2 * QUERIES) {
            copy_later<4>(reinterpret_cast<float*>(to + 2 * TILE) + threadIdx.x, numbers + query, query + number < T);
        }
        commit_copies();
    };

    fetch_stage(shared, first);
    Rows<HS, M, true> k(shared + 2 * STAGE), v(shared + 2 * STAGE + TILE_WARPS * k.CHUNKS_A_WARP);
    load_rows<EXACT>(k, keys, stride, T - mine, hs, packed);
    load_rows<EXACT>(v, keys + C, stride, T - mine, hs, packed);
    Sums<HS, M> dk, dv;
    clear(dk);
    clear(dv);

    int stage = 0;
    for (int query = first; query < T; query += QUERIES) {
        const int next = query + QUERIES;
        Pack<4>* now = shared + stage;
        stage = STAGE - stage;
        Pack<4>* then = shared + stage;
        const bool careful = await<EXACT, HS, 2 * QUERIES>(now, query < first + KEYS - 1);
        if (next < T) { fetch_stage(then, next); }
        if (next > mine && mine < T) {
            const Pack<2>* query_lse = reinterpret_cast<const Pack<2>*>(now + 2 * TILE) + t;
            const Pack<2>* query_delta = query_lse + QUERIES / 2;
            const bool diagonal = query < mine + OWN - 1;
            Sums<QUERIES, M> a, ds;
            clear(a);
            add_dots<EXACT, HS>(a, k, now, hs);
#pragma unroll
            for (int n = 0; n < QUERIES / 8; n++) {
                const Pack<2> of = query_lse[4 * n];
#pragma unroll
                for (int m = 0; m < M; m++) {
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        a[m][n][i] = exp2f(LOG2E * scale * a[m][n][i] - LOG2E * of.at[i % 2]);
                    }
                }
            }
            if (diagonal) { hide_future<true>(a, mine, query, 0.0f); }
            clear(ds);
            add_dots<EXACT, HS>(ds, v, now + TILE, hs);
#pragma unroll
            for (int n = 0; n < QUERIES / 8; n++) {
                const Pack<2> of = query_delta[4 * n];
#pragma unroll
                for (int m = 0; m < M; m++) {
#pragma unroll
                    for (int i = 0; i < 4; i++) { ds[m][n][i] = a[m][n][i] * (ds[m][n][i] - of.at[i % 2]); }
                }
            }
            if (diagonal) { hide_future<true>(ds, mine, query, 0.0f); }
            add_products<EXACT, HS>(dv, a, now + TILE, hs, careful);
            add_products<EXACT, HS>(dk, ds, now, hs, careful);
        }
    }

    const float factor_k[2] = {scale, scale}, factor_v[2] = {1.0f, 1.0f};
#pragma unroll
    for (int m = 0; m < M; m++) {
        const int row = mine + 16 * m;
        float* to = dqkv + (b * T + row) * stride + C + h * hs;
        store_rows<HS>(to, stride, T - row, hs, dk[m], factor_k, packed);
        store_rows<HS>(to + C, stride, T - row, hs, dv[m], factor_v, packed);
    }
}

extern "C" __global__ void __launch_bounds__(128, 2) DYNAMIC_SHARED(100352)
attention_dq_tf32_64_kernel(float* __restrict__ dqkv, float* __restrict__ delta, const float* __restrict__ dout,
                            const float* __restrict__ qkv, const float* __restrict__ out,
                            const float* __restrict__ lse, int T, int NH, int hs) {
    FOR_TENSOR_CORES(dq_tile<false, 64, 2, 32>(dqkv, delta, dout, qkv, out, lse, T, NH, hs);)
}

extern "C" __global__ void __launch_bounds__(128, 2) DYNAMIC_SHARED(99328)
attention_dq_tf32_128_kernel(float* __restrict__ dqkv, float* __restrict__ delta, const float* __restrict__ dout,
                             const float* __restrict__ qkv, const float* __restrict__ out,
                             const float* __restrict__ lse, int T, int NH, int hs) {
    FOR_TENSOR_CORES(dq_tile<false, 128, 1, 16>(dqkv, delta, dout, qkv, out, lse, T, NH, hs);)
}

extern "C" __global__ void __launch_bounds__(128, 2) DYNAMIC_SHARED(100352)
attention_dq_3xtf32_64_kernel(float* __restrict__ dqkv, float* __restrict__ delta, const float* __restrict__ dout,
                              const float* __restrict__ qkv, const float* __restrict__ out,
                              const float* __restrict__ lse, int T, int NH, int hs) {
    FOR_TENSOR_CORES(dq_tile<true, 64, 2, 32>(dqkv, delta, dout, qkv, out, lse, T, NH, hs);)
}

extern "C" __global__ void __launch_bounds__(128, 2) DYNAMIC_SHARED(99328)
attention_dq_3xtf32_128_kernel(float* __restrict__ dqkv, float* __restrict__ delta, const float* __restrict__ dout,
                               const float* __restrict__ qkv, const float* __restrict__ out,
                               const float* __restrict__ lse, int T, int NH, int hs) {
    FOR_TENSOR_CORES(dq_tile<true, 128, 1, 16>(dqkv, delta, dout, qkv, out, lse, T, NH, hs);)
}

extern "C" __global__ void __launch_bounds__(128, 2) DYNAMIC_SHARED(83200)
attention_dkdv_tf32_64_kernel(float* __restrict__ dqkv, const float* __restrict__ dout,
                              const float* __restrict__ qkv, const float* __restrict__ lse,
                              const float* __restrict__ delta, int T, int NH, int hs) {
    FOR_TENSOR_CORES(dkdv_tile<false, 64, 2, 16>(dqkv, dout, qkv, lse, delta, T, NH, hs);)
}

extern "C" __global__ void __launch_bounds__(128, 2) DYNAMIC_SHARED(99584)
attention_dkdv_tf32_128_kernel(float* __restrict__ dqkv, const float* __restrict__ dout,
                               const float* __restrict__ qkv, const float* __restrict__ lse,
                               const float* __restrict__ delta, int T, int NH, int hs) {
    FOR_TENSOR_CORES(dkdv_tile<false, 128, 1, 16>(dqkv, dout, qkv, lse, delta, T, NH, hs);)
}

extern "C" __global__ void __launch_bounds__(128, 2) DYNAMIC_SHARED(83200)
attention_dkdv_3xtf32_64_kernel(float* __restrict__ dqkv, const float* __restrict__ dout,
                                const float* __restrict__ qkv, const float* __restrict__ lse,
                                const float* __restrict__ delta, int T, int NH, int hs) {
    FOR_TENSOR_CORES(dkdv_tile<true, 64, 2, 16>(dqkv, dout, qkv, lse, delta, T, NH, hs);)
}

extern "C" __global__ void __launch_bounds__(128, 2) DYNAMIC_SHARED(99584)
attention_dkdv_3xtf32_128_kernel(float* __restrict__ dqkv, const float* __restrict__ dout,
                                 const float* __restrict__ qkv, const float* __restrict__ lse,
                                 const float* __restrict__ delta, int T, int NH, int hs) {
    FOR_TENSOR_CORES(dkdv_tile<true, 128, 1, 16>(dqkv, dout, qkv, lse, delta, T, NH, hs);)
}
