// attention_tensor.cu: causal multi-head self-attention on tensor cores, for sm_80 and later; formulas in
// kernels/cpu/gpt2/attention.py, fragments of products in mma.cuh
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

// older GPUs, which launchers do not give these kernels, need not compile the fallbacks of mma.cuh
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#define FOR_TENSOR_CORES(...)
#else
#define FOR_TENSOR_CORES(...) __VA_ARGS__
#endif

template <int HS> constexpr int CHUNKS = HS / 4;           // of 16 bytes, of a row
template <int HS> constexpr int STRIDE = CHUNKS<HS> + 1;   // of rows in shared memory, in chunks
template <int COLUMNS, int M> using Sums = float[M][COLUMNS / 8][4];  // of M x 16 rows

__device__ __forceinline__ bool finite(float x) { return (__float_as_uint(x) & 0x7f800000u) != 0x7f800000u; }

// a float of memory as it is kept, and what was kept as an operand: rounded once, or split at each use
template <bool EXACT> __device__ __forceinline__ float kept(float x) {
    return EXACT ? x : __uint_as_float(to_tf32(x));
}
template <bool EXACT> __device__ __forceinline__ Tf32 operand(float x) {
    if (EXACT) { return split_tf32<true>(x); }
    return {__float_as_uint(x), 0u};
}

// operand a, M x 16 rows of a head, for HS / 8 products; in registers, or SHARED, where a lane reads what it wrote itself
template <int HS, int M, bool SHARED> struct Rows {
    static constexpr int CHUNKS_A_WARP = 0;
    Pack<4> a[M][HS / 8];
    __device__ __forceinline__ explicit Rows(Pack<4>*) {}
    __device__ __forceinline__ void put(int m, int step, Pack<4> x) { a[m][step] = x; }
    __device__ __forceinline__ Pack<4> get(int m, int step) const { return a[m][step]; }
};

template <int HS, int M> struct Rows<HS, M, true> {
    static constexpr int CHUNKS_A_WARP = M * HS / 8 * WARP;
    Pack<4>* a;
    __device__ __forceinline__ explicit Rows(Pack<4>* shared)
        : a(shared + threadIdx.x / WARP * CHUNKS_A_WARP + threadIdx.x % WARP) {}
    __device__ __forceinline__ void put(int m, int step, Pack<4> x) { a[(m * HS / 8 + step) * WARP] = x; }
    __device__ __forceinline__ Pack<4> get(int m, int step) const { return a[(m * HS / 8 + step) * WARP]; }
};

template <int N, int M> __device__ __forceinline__ void clear(float (&sums)[M][N][4]) {
#pragma unroll
    for (int m = 0; m < M; m++) {
#pragma unroll
        for (int n = 0; n < N; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) { sums[m][n][i] = 0.0f; }
        }
    }
}

// ROWS rows of a head on their way to a tile; from `limit` on they become 0 and are not read
template <int HS, int ROWS>
__device__ __forceinline__ void fetch(Pack<4>* tile, const float* rows, int stride, int limit, int hs, bool packed) {
    constexpr int STEP = TILE_THREADS / CHUNKS<HS>;
    static_assert(ROWS % STEP == 0, "every thread copies as much");
    const int row = threadIdx.x / CHUNKS<HS>, chunk = threadIdx.x % CHUNKS<HS>;
    rows += (size_t)row * stride + chunk * 4;
    tile += row * STRIDE<HS> + chunk;
    if (packed) {
        if (chunk * 4 >= hs) { limit = 0; }
#pragma unroll
        for (int n = 0; n < ROWS / STEP; n++) {
            copy_later<16>(tile + n * STEP * STRIDE<HS>, rows, row + n * STEP < limit);
            rows += STEP * stride;
        }
    } else {
#pragma unroll 1
        for (int n = 0; n < ROWS / STEP; n++) {
            const int left = row + n * STEP < limit ? hs - chunk * 4 : 0;
            float* to = reinterpret_cast<float*>(tile + n * STEP * STRIDE<HS>);
#pragma unroll
            for (int j = 0; j < 4; j++) { copy_later<4>(to + j, rows + j, j < left); }
            rows += STEP * stride;
        }
    }
}

// waits until ROWS rows of a stage have arrived, all threads' copies, and rounds them unless EXACT. true if there are
// infinities or NaNs, which is only looked for where a tile is on the diagonal
template <bool EXACT, int HS, int ROWS> __device__ __forceinline__ bool await(Pack<4>* tiles, bool diagonal) {
    constexpr int STEP = TILE_THREADS / CHUNKS<HS>;
    wait_for_copies<0>();
    bool found = false;
    if (!EXACT || diagonal) {  // a thread looks at what it copied itself
        Pack<4>* mine = tiles + threadIdx.x / CHUNKS<HS> * STRIDE<HS> + threadIdx.x % CHUNKS<HS>;
#pragma unroll
        for (int n = 0; n < ROWS / STEP; n++) {
            Pack<4> x = mine[n * STEP * STRIDE<HS>];
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const float rounded = __uint_as_float(to_tf32(x.at[j]));
                found |= !finite(rounded);
                x.at[j] = rounded;
            }
            if (!EXACT) { mine[n * STEP * STRIDE<HS>] = x; }
        }
    }
    if (diagonal) { return __syncthreads_or(found); }
    __syncthreads();
    return false;
}

// 16 bytes of row g + 8 half that are this lane's words of products 2 pair and 2 pair + 1
__device__ __forceinline__ Pack<4> load_chunk(const float* rows, int stride, int half, int pair, int limit, int hs,
                                              bool packed) {
    const int row = threadIdx.x % WARP / 4 + 8 * half, chunk = pair / 2 * 8 + threadIdx.x % 4 * 2 + pair % 2;
    return load_columns(rows + (size_t)row * stride, chunk * 4, row < limit ? hs : 0, packed);
}

// the same pair of both halves
template <bool EXACT, int HS, int M, bool SHARED>
__device__ __forceinline__ void put_chunks(Rows<HS, M, SHARED>& to, int m, int pair, Pack<4> low, Pack<4> high) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        to.put(m, 2 * pair + i, {kept<EXACT>(low.at[2 * i]), kept<EXACT>(high.at[2 * i]),
                                 kept<EXACT>(low.at[2 * i + 1]), kept<EXACT>(high.at[2 * i + 1])});
    }
}

template <bool EXACT, int HS, int M, bool SHARED>
__device__ __forceinline__ void load_rows(Rows<HS, M, SHARED>& to, const float* rows, int stride, int limit, int hs,
                                          bool packed) {
#pragma unroll
    for (int m = 0; m < M; m++) {
        const float* of_m = rows + (size_t)(16 * m) * stride;
#pragma unroll
        for (int pair = 0; pair < HS / 16; pair++) {
            const Pack<4> low = load_chunk(of_m, stride, 0, pair, limit - 16 * m, hs, packed);
            const Pack<4> high = load_chunk(of_m, stride, 1, pair, limit - 16 * m, hs, packed);
            put_chunks<EXACT>(to, m, pair, low, high);
        }
    }
}

// sums (M x 16, 8N) += rows (M x 16, HS) . 8N rows of a tile
template <bool EXACT, int HS, int M, int N, bool SHARED>
__device__ __forceinline__ void add_dots(float (&sums)[M][N][4], const Rows<HS, M, SHARED>& rows, const Pack<4>* tile,
                                         int hs) {
    static_assert(N <= 4, "loads in flight");
    const Pack<4>* mine = tile + threadIdx.x % WARP / 4 * STRIDE<HS> + threadIdx.x % 4 * 2;
#pragma unroll
    for (int pair = 0; pair < HS / 16; pair++) {
        if (pair / 2 * 32 >= hs) { continue; }
        Pack<4> b[N];
#pragma unroll
        for (int n = 0; n < N; n++) { b[n] = mine[n * 8 * STRIDE<HS> + pair / 2 * 8 + pair % 2]; }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            Tf32 a[M][4];
#pragma unroll
            for (int m = 0; m < M; m++) {
                const Pack<4> x = rows.get(m, 2 * pair + i);
#pragma unroll
                for (int j = 0; j < 4; j++) { a[m][j] = operand<EXACT>(x.at[j]); }
            }
#pragma unroll
            for (int n = 0; n < N; n++) {
                const Tf32 b0 = operand<EXACT>(b[n].at[2 * i]), b1 = operand<EXACT>(b[n].at[2 * i + 1]);
#pragma unroll
                for (int m = 0; m < M; m++) { mma<EXACT>(sums[m][n], a[m], b0, b1); }
            }
        }
    }
}

// sums (M x 16, HS) += weights (M x 16, 8N) times 8N rows of a tile. A lane's sums [4c + i][2 half + j] are of row
// g + 8 half, column 32c + 8t + 4j + i. CAREFUL: infinities and NaNs are left out
template <bool EXACT, bool CAREFUL, int HS, int M, int N>
__device__ __forceinline__ void add_products(float (&sums)[M][HS / 8][4], const float (&weights)[M][N][4],
                                             const Pack<4>* tile, int hs) {
    const Pack<4>* mine = tile + threadIdx.x % 4 * 2 * STRIDE<HS> + threadIdx.x % WARP / 4;
#pragma unroll
    for (int n = 0; n < N; n++) {
        Tf32 a[M][4];
#pragma unroll
        for (int m = 0; m < M; m++) {  // rows g, g+8 of column 2t, then of column 2t+1
#pragma unroll
            for (int j = 0; j < 4; j++) { a[m][j] = split_tf32<EXACT>(weights[m][n][j % 2 * 2 + j / 2]); }
        }
#pragma unroll
        for (int c = 0; c < HS / 32; c++) {
            if (32 * c >= hs) { continue; }
            Pack<4> x = mine[n * 8 * STRIDE<HS> + 8 * c], y = mine[(n * 8 + 1) * STRIDE<HS> + 8 * c];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                if (CAREFUL && !finite(kept<false>(x.at[i]))) { x.at[i] = 0.0f; }
                if (CAREFUL && !finite(kept<false>(y.at[i]))) { y.at[i] = 0.0f; }
                const Tf32 b0 = operand<EXACT>(x.at[i]), b1 = operand<EXACT>(y.at[i]);
#pragma unroll
                for (int m = 0; m < M; m++) { mma<EXACT>(sums[m][4 * c + i], a[m], b0, b1); }
            }
        }
    }
}

// what add_products left out: infinities and NaNs, where their weights are not 0. Slow, and hardly ever called
template <int HS, int M, int N>
__device__ __forceinline__ void add_left_out(float (&sums)[M][HS / 8][4], const float (&weights)[M][N][4],
                                             const Pack<4>* tile) {
    const int g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int m = 0; m < M; m++) {
#pragma unroll
        for (int n = 0; n < N; n++) {
#pragma unroll 1
            for (int key = 0; key < 8; key++) {
                const float(&of)[4] = weights[m][n];
                float weight[2];
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const float even = __shfl_sync(ALL_LANES, of[2 * half], 4 * g + key / 2);
                    const float odd = __shfl_sync(ALL_LANES, of[2 * half + 1], 4 * g + key / 2);
                    weight[half] = key % 2 ? odd : even;
                }
                const Pack<4>* row = tile + (8 * n + key) * STRIDE<HS> + 2 * t;
#pragma unroll
                for (int c = 0; c < HS / 8; c++) {
#pragma unroll
                    for (int j = 0; j < 2; j++) {
                        const float x = row[c / 4 * 8 + j].at[c % 4];
#pragma unroll
                        for (int half = 0; half < 2; half++) {
                            const float w = weight[half];
                            if (w != 0.0f && !finite(kept<false>(x))) { sums[m][c][2 * half + j] += w * x; }
                        }
                    }
                }
            }
        }
    }
}

template <bool EXACT, int HS, int M, int N>
__device__ __forceinline__ void add_products(float (&sums)[M][HS / 8][4], const float (&weights)[M][N][4],
                                             const Pack<4>* tile, int hs, bool careful) {
    if (careful) {
        add_products<EXACT, true, HS>(sums, weights, tile, hs);
        add_left_out<HS>(sums, weights, tile);
    } else {
        add_products<EXACT, false, HS>(sums, weights, tile, hs);
    }
}

// what belongs to keys behind their query becomes `value`. Rows are keys and columns queries if KEYS, else the other way
// round
template <bool KEYS, int M, int N>
__device__ __forceinline__ void hide_future(float (&x)[M][N][4], int first_row, int first_column, float value) {
    const int g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int m = 0; m < M; m++) {
#pragma unroll
        for (int n = 0; n < N; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int row = first_row + 16 * m + g + i / 2 * 8, column = first_column + 8 * n + 2 * t + i % 2;
                if (KEYS ? row > column : column > row) { x[m][n][i] = value; }
            }
        }
    }
}

// 16 rows of a head = factor[half] * sums, in rows g + 8 half below `limit`
template <int HS>
__device__ __forceinline__ void store_rows(float* rows, int stride, int limit, int hs, const float (&sums)[HS / 8][4],
                                           const float (&factor)[2], bool packed) {
    const int g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        if (g + 8 * half >= limit) { continue; }
        float* row = rows + (size_t)(g + 8 * half) * stride;
#pragma unroll
        for (int c = 0; c < HS / 32; c++) {
#pragma unroll
            for (int j = 0; j < 2; j++) {
                Pack<4> x;
#pragma unroll
                for (int i = 0; i < 4; i++) { x.at[i] = factor[half] * sums[4 * c + i][2 * half + j]; }
                store_columns(row, 32 * c + 8 * t + 4 * j, hs, packed, x);
            }
        }
    }
}

// --- forward ---------------------------------------------------------------------------------------------------------

// scores p of 16 queries -> weights 2^(scale p - top), where top is the largest of the row so far; what was summed under
// an earlier top shrinks. total is of this lane's keys
template <int KEYS, int HS>
__device__ __forceinline__ void online_softmax(float (&p)[KEYS / 8][4], float (&top)[2], float (&total)[2],
                                               float (&sums)[HS / 8][4], float scale) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float largest = MINUS_INFINITY;
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++) { largest = fmaxf(largest, fmaxf(p[n][2 * half], p[n][2 * half + 1])); }
        const float before = top[half], now = fmaxf(before, group_max<4>(largest) * scale);
        const float shrink = exp2f(before - now);  // every query sees key 0: never -inf - -inf
        float added = 0.0f;
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
            for (int i = 2 * half; i < 2 * half + 2; i++) {
                p[n][i] = exp2f(p[n][i] * scale - now);
                added += p[n][i];
            }
        }
#pragma unroll
        for (int c = 0; c < HS / 8; c++) { sums[c][2 * half] *= shrink, sums[c][2 * half + 1] *= shrink; }
        total[half] = total[half] * shrink + added;
        top[half] = now;
    }
}

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
