// attention_tile.cuh: tiles of attention in shared memory, their products and the online softmax, for attention.cu and
// torus_attention.cu; compiled in front of every file, after common.cuh
//
// Tiles have rows of HS columns, hs of them used and the rest 0. A block is 4 warps, each with its own quarter of the
// rows of the tile that stays. A thread has R of these: of scores p[R][N], with N rows of the tile that passes, and of
// sums[R], whose columns ROW_LANES lanes share.

#define TILE_THREADS 128
#define TILE_WARPS (TILE_THREADS / WARP)

// a row of a tile in shared memory: a pack too long, so that the same column of 8 rows lies in different banks
template <int WIDTH> using TileRow = Pack<4>[WIDTH / 4 + 1];

// lanes that share the columns of a row of sums, a pack or more each; as many rows side by side as fill a warp
template <int HS> constexpr int ROW_LANES = HS < 64 ? HS / 4 : 16;
template <int HS> constexpr int ROW_GROUPS = WARP / ROW_LANES<HS>;
template <int HS> constexpr int ROW_PACKS = HS / 4 / ROW_LANES<HS>;

// rows of a tile on their way from global to shared memory: what is fetched can arrive during other work
template <int ROWS, int HS> struct Fetched {
    static constexpr int PACKS = HS / 4;               // packs of a row
    static constexpr int STEP = TILE_THREADS / PACKS;  // rows that the block takes at a time
    Pack<4> x[ROWS / STEP];

    __device__ __forceinline__ void put(TileRow<HS>* tile) const {
#pragma unroll
        for (int n = 0; n < ROWS / STEP; n++) { tile[threadIdx.x / PACKS + n * STEP][threadIdx.x % PACKS] = x[n]; }
    }
};

// products[i][j] = rows[i * ROW_STEP] . columns[j * COLUMN_STEP]
template <int HS, int ROW_STEP, int COLUMN_STEP, int R, int N>
__device__ __forceinline__ void dot_rows(float (&products)[R][N], const TileRow<HS>* rows, const TileRow<HS>* columns,
                                         int hs) {
#pragma unroll
    for (int i = 0; i < R; i++) {
#pragma unroll
        for (int j = 0; j < N; j++) { products[i][j] = 0.0f; }
    }
#pragma unroll 1
    for (int c = 0; c < (hs + 3) / 4; c++) {
        Pack<4> column[N];
#pragma unroll
        for (int j = 0; j < N; j++) { column[j] = columns[j * COLUMN_STEP][c]; }
#pragma unroll
        for (int i = 0; i < R; i++) {
            const Pack<4> row = rows[i * ROW_STEP][c];
#pragma unroll
            for (int j = 0; j < N; j++) { add_product(products[i][j], row, column[j]); }
        }
    }
}

// weights[lane + STEP * j][slot..slot+R-1] = p[0..R-1][first + j] for j < COUNT; slot counts floats
template <int COUNT, int STEP, int ROWS, int R, int N>
__device__ __forceinline__ void hand_over(TileRow<ROWS>* weights, int slot, int lane, const float (&p)[R][N],
                                          int first) {
    constexpr int W = R < 4 ? R : 4;
#pragma unroll
    for (int j = 0; j < COUNT; j++) {
#pragma unroll
        for (int i = 0; i < R; i += W) {
            Pack<W> values;
#pragma unroll
            for (int k = 0; k < W; k++) { values.at[k] = p[i + k][first + j]; }
            store<W>((float*)weights[lane + STEP * j], (slot + i) / W, values);
        }
    }
}

// sums[i][c] += sum_n weights[n][slot + i] * values[n][lane + ROW_LANES c]. SKIP leaves out weights of 0, whatever
// their values
template <bool SKIP, int COUNT, int ROWS, int HS, int R>
__device__ __forceinline__ void add_weighted(Pack<4> (&sums)[R][ROW_PACKS<HS>], const TileRow<ROWS>* weights, int slot,
                                             const TileRow<HS>* values, int lane) {
    constexpr int W = R < 4 ? R : 4;
#pragma unroll (SKIP ? 1 : 2)
    for (int n = 0; n < COUNT; n++) {
        Pack<W> weight[R / W];
#pragma unroll
        for (int i = 0; i < R / W; i++) { weight[i] = load<W>((const float*)weights[n], slot / W + i); }
#pragma unroll
        for (int c = 0; c < ROW_PACKS<HS>; c++) {
            const Pack<4> value = values[n][lane + c * ROW_LANES<HS>];
#pragma unroll
            for (int i = 0; i < R; i++) {
                const float w = weight[i / W].at[i % W];
                if (!SKIP || w != 0.0f) { add_product(sums[i][c], w, value); }
            }
        }
    }
}

template <int COUNT, int ROWS, int HS, int R>
__device__ __forceinline__ void add_weighted(Pack<4> (&sums)[R][ROW_PACKS<HS>], const TileRow<ROWS>* weights, int slot,
                                             const TileRow<HS>* values, int lane, bool skip) {
    if (skip) {
        add_weighted<true, COUNT, ROWS, HS>(sums, weights, slot, values, lane);
    } else {
        add_weighted<false, COUNT, ROWS, HS>(sums, weights, slot, values, lane);
    }
}

template <int R, int N> __device__ __forceinline__ void clear(Pack<4> (&sums)[R][N]) {
#pragma unroll
    for (int i = 0; i < R; i++) {
#pragma unroll
        for (int c = 0; c < N; c++) { sums[i][c] = zeros<4>(); }
    }
}

// scores p[i][j] of a thread's R queries -> weights 2^(scale p - top), where top is the largest of the row so far; what
// was summed under an earlier top shrinks. total is this lane's share. UNSEEN: a query may see no key of early tiles
template <int LANES, bool UNSEEN, int R, int N, int PACKS>
__device__ __forceinline__ void online_softmax(float (&p)[R][N], float (&top)[R], float (&total)[R],
                                               Pack<4> (&sums)[R][PACKS], float scale) {
#pragma unroll
    for (int i = 0; i < R; i++) {
        float largest = p[i][0];
#pragma unroll
        for (int j = 1; j < N; j++) { largest = fmaxf(largest, p[i][j]); }
        const float before = top[i];
        top[i] = fmaxf(before, group_max<LANES>(largest) * scale);
        const float from = UNSEEN && top[i] == MINUS_INFINITY ? 0.0f : top[i];  // -inf - -inf would be NaN
        const float shrink = exp2f(before - from);
        total[i] *= shrink;
#pragma unroll
        for (int j = 0; j < N; j++) {
            p[i][j] = exp2f(p[i][j] * scale - from);
            total[i] += p[i][j];
        }
#pragma unroll
        for (int c = 0; c < PACKS; c++) { sums[i][c] = times(shrink, sums[i][c]); }
    }
}
