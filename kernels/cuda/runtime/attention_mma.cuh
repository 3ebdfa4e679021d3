// attention_mma.cuh: tiles of attention on tensor cores, in front of the files that name it (attention_tensor.cu,
// union_attention.cu)
//
// What passes a warp's rows: tiles in shared memory on their way from the rows of heads, products of a tile with rows
// and of weights with a tile, the softmax, and what is not finite in it. Layouts are told in attention_tensor.cu.

template <int HS> constexpr int CHUNKS = HS / 4;           // of 16 bytes, of a row
template <int HS> constexpr int STRIDE = CHUNKS<HS> + 1;   // of rows in shared memory, in chunks
template <int COLUMNS, int M> using Sums = float[M][COLUMNS / 8][4];  // of M x 16 rows

__device__ __forceinline__ bool finite(float x) { return (__float_as_uint(x) & 0x7f800000u) != 0x7f800000u; }

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

// the same for rows that lie anywhere: lane r of every warp has the number of row r, or -1, and the row becomes 0
template <int HS, int ROWS, int THREADS>
__device__ __forceinline__ void gather(Pack<4>* tile, const float* rows, int stride, int number, int hs, bool packed) {
    constexpr int STEP = THREADS / CHUNKS<HS>;
    static_assert(ROWS % STEP == 0 && ROWS <= WARP, "every thread copies as much, and a lane has every row's number");
    const int row = threadIdx.x / CHUNKS<HS>, chunk = threadIdx.x % CHUNKS<HS>;
    rows += chunk * 4;
    tile += row * STRIDE<HS> + chunk;
#pragma unroll
    for (int n = 0; n < ROWS / STEP; n++) {
        const int from = __shfl_sync(ALL_LANES, number, row + n * STEP);
        const int left = from < 0 ? 0 : hs - chunk * 4;
        const float* x = rows + (size_t)max(from, 0) * stride;
        Pack<4>* to = tile + n * STEP * STRIDE<HS>;
        if (packed) {
            copy_later<16>(to, x, left > 0);
        } else {
#pragma unroll
            for (int j = 0; j < 4; j++) { copy_later<4>(to->at + j, x + j, j < left); }
        }
    }
}

// waits until ROWS rows of a stage have arrived, all threads' copies, and rounds them unless EXACT. true if there are
// infinities or NaNs, which is only looked for if it matters: where a tile is on the diagonal
template <bool EXACT, int HS, int ROWS, int THREADS = TILE_THREADS>
__device__ __forceinline__ bool await(Pack<4>* tiles, bool matters) {
    constexpr int STEP = THREADS / CHUNKS<HS>;
    wait_for_copies<0>();
    bool found = false;
    if (!EXACT || matters) {  // a thread looks at what it copied itself
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
    if (matters) { return __syncthreads_or(found); }
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

// sums (M x 16, 8N) += rows (M x 16, HS), Rows or what gets them as these do, . 8N rows of a tile
template <bool EXACT, int HS, int M, int N, class Own>
__device__ __forceinline__ void add_dots(float (&sums)[M][N][4], const Own& rows, const Pack<4>* tile, int hs) {
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

// scores p of 16 queries -> weights 2^(scale p - top), where top is the largest of the row so far; what was summed under
// an earlier top shrinks. total is of this lane's keys. A row whose scores are all -inf has weights 0
template <int KEYS, int HS>
__device__ __forceinline__ void online_softmax(float (&p)[KEYS / 8][4], float (&top)[2], float (&total)[2],
                                               float (&sums)[HS / 8][4], float scale) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float largest = MINUS_INFINITY;
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++) { largest = fmaxf(largest, fmaxf(p[n][2 * half], p[n][2 * half + 1])); }
        const float before = top[half], now = fmaxf(before, group_max<4>(largest) * scale);
        const float from = now == MINUS_INFINITY ? 0.0f : now;  // never -inf - -inf
        const float shrink = exp2f(before - from);
        float added = 0.0f;
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
            for (int i = 2 * half; i < 2 * half + 2; i++) {
                p[n][i] = exp2f(p[n][i] * scale - from);
                added += p[n][i];
            }
        }
#pragma unroll
        for (int c = 0; c < HS / 8; c++) { sums[c][2 * half] *= shrink, sums[c][2 * half + 1] *= shrink; }
        total[half] = total[half] * shrink + added;
        top[half] = now;
    }
}

// row g + 8 half of 16, of a head, = factor * sums
template <int HS>
__device__ __forceinline__ void store_row(float* row, int half, int hs, const float (&sums)[HS / 8][4], float factor,
                                          bool packed) {
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int c = 0; c < HS / 32; c++) {
#pragma unroll
        for (int j = 0; j < 2; j++) {
            Pack<4> x;
#pragma unroll
            for (int i = 0; i < 4; i++) { x.at[i] = factor * sums[4 * c + i][2 * half + j]; }
            store_columns(row, 32 * c + 8 * t + 4 * j, hs, packed, x);
        }
    }
}

// 16 rows of a head = factor[half] * sums, in rows g + 8 half below `limit`
template <int HS>
__device__ __forceinline__ void store_rows(float* rows, int stride, int limit, int hs, const float (&sums)[HS / 8][4],
                                           const float (&factor)[2], bool packed) {
    const int g = threadIdx.x % WARP / 4;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        if (g + 8 * half >= limit) { continue; }
        store_row<HS>(rows + (size_t)(g + 8 * half) * stride, half, hs, sums, factor[half], packed);
    }
}

// --- forward ---------------------------------------------------------------------------------------------------------
