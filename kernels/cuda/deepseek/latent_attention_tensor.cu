// latent_attention_tensor.cu: attention over latents that all heads share, on tensor cores, for sm_80 and later;
// formulas in kernels/cpu/deepseek/latent_attention.py, fragments of products in mma.cuh, rows in attention_mma.cuh
//
// qlat (n,NH,D) meets the rows of latent (S,D), D = kv_rank + R, up to its position or by list. tf32: operands of
// products are rounded to nearest; 3xtf32: split, with float32's accuracy. Sums and softmax are float32.
//
//   v1 latent_attention.cu                    8 heads read a tile from shared memory for an FMA each: that is the limit
//   v2 16 heads are the rows of a product,    every warp reads all queries again for every tile
//      a warp has some of a tile's keys
//   v3 a warp has some columns (this)         its part of the queries and of the sums stays in registers, a latent is
//                                             read once for scores and once for sums, the next tile is under way
//
// A block is a query, up to 16 of its heads, and a part of its keys. Warps take turns at groups of 32 columns. Of a score
// each warp has the sum over its own columns; these meet in shared memory, where every warp adds them up in the same
// order. Then it has all scores in the layout of c, which is that of operand a for its own columns of the sums. A row of
// shared memory is 16 bytes too long, against bank conflicts: see attention_tensor.cu.
//
// A key costs D floats out of L2, whatever the heads, and 2 (D + kv_rank) flops a head: with 16 heads and 512 + 64
// columns 2304 bytes and 34816 flops. In TF32 L2 is the limit, in 3xTF32 tensor cores are.
//
// Keys behind the end are zeros with weight 0. All rows of a block have the same keys: no later one is ever read.

template <int WIDTH> constexpr int ROW = WIDTH / 4 + 1;  // of shared memory, in chunks of 16 bytes
// groups of 32 columns that one of so many warps has at most, and its group i
template <int COLUMNS, int WARPS> constexpr int GROUPS = (COLUMNS / 32 + WARPS - 1) / WARPS;
template <int WARPS> __device__ __forceinline__ int group_of_warp(int i) { return threadIdx.x / WARP + i * WARPS; }

// KEYS rows (D) of latent on their way to a tile, zeros behind D and where there is none. Lane i knows the row of key
// i, or -1
template <int WIDTH, int KEYS, int WARPS>
__device__ __forceinline__ void fetch_latents(Pack<4>* tile, const float* latent, int row_of_lane, int D, bool packed) {
    const int lane = threadIdx.x % WARP;
    for (int key = threadIdx.x / WARP; key < KEYS; key += WARPS) {
        const int row = __shfl_sync(ALL_LANES, row_of_lane, key);
        const float* from = latent + (size_t)max(row, 0) * D;
        Pack<4>* to = tile + key * ROW<WIDTH>;
        for (int chunk = lane; chunk < (D + 31) / 32 * 8; chunk += WARP) {
            const int left = row < 0 ? 0 : D - 4 * chunk;
            if (packed) {
                copy_later<16>(to + chunk, from + 4 * chunk, left > 0);
            } else {
                float* values = reinterpret_cast<float*>(to + chunk);
#pragma unroll
                for (int j = 0; j < 4; j++) { copy_later<4>(values + j, from + 4 * chunk + j, j < left); }
            }
        }
    }
}

// sums (16 heads, 8N keys) += queries . latents over this warp's columns: two sums, so that a product need not wait for
// the one before
template <bool EXACT, int WIDTH, int WARPS, int N>
__device__ __forceinline__ void add_scores(float (&sums)[2][N][4],
                                           const Rows<32 * GROUPS<WIDTH, WARPS>, 1, false>& queries,
                                           const Pack<4>* tile, int D) {
    const Pack<4>* mine = tile + threadIdx.x % WARP / 4 * ROW<WIDTH> + threadIdx.x % 4 * 2;
#pragma unroll
    for (int i = 0; i < GROUPS<WIDTH, WARPS>; i++) {
        const int group = group_of_warp<WARPS>(i);
        if (32 * group >= D) { break; }
#pragma unroll
        for (int pair = 0; pair < 2; pair++) {
            Pack<4> b[N];
#pragma unroll
            for (int n = 0; n < N; n++) { b[n] = mine[n * 8 * ROW<WIDTH> + 8 * group + pair]; }
#pragma unroll
            for (int step = 0; step < 2; step++) {
                Pack<4> x = queries.get(0, 4 * i + 2 * pair + step);
                if (EXACT) { forget(x); }
                Tf32 a[4];
#pragma unroll
                for (int j = 0; j < 4; j++) { a[j] = operand<EXACT>(x.at[j]); }
#pragma unroll
                for (int n = 0; n < N; n++) {
                    const Tf32 b0 = split_tf32<EXACT>(b[n].at[2 * step]), b1 = split_tf32<EXACT>(b[n].at[2 * step + 1]);
                    mma<EXACT>(sums[pair][n], a, b0, b1);
                }
            }
        }
    }
}

// sums (16 heads, this warp's columns) += weights (16 heads, 8N keys) times latents
template <bool EXACT, int WIDTH, int WARPS, int OWN, int N>
__device__ __forceinline__ void add_latents(float (&sums)[OWN * 4][4], const float (&weights)[N][4],
                                            const Pack<4>* tile, int kv_rank) {
    const Pack<4>* mine = tile + threadIdx.x % 4 * 2 * ROW<WIDTH> + threadIdx.x % WARP / 4;
#pragma unroll
    for (int n = 0; n < N; n++) {
        Tf32 a[4];
#pragma unroll
        for (int j = 0; j < 4; j++) { a[j] = split_tf32<EXACT>(weights[n][j % 2 * 2 + j / 2]); }
#pragma unroll
        for (int i = 0; i < OWN; i++) {
            const int group = group_of_warp<WARPS>(i);
            if (32 * group >= kv_rank) { break; }
            const Pack<4> x = mine[n * 8 * ROW<WIDTH> + 8 * group], y = mine[(n * 8 + 1) * ROW<WIDTH> + 8 * group];
#pragma unroll
            for (int c = 0; c < 4; c++) {
                mma<EXACT>(sums[4 * i + c], a, split_tf32<EXACT>(x.at[c]), split_tf32<EXACT>(y.at[c]));
            }
        }
    }
}

// D up to WIDTH, kv_rank up to RANK, KEYS of a tile
template <bool EXACT, int WIDTH, int RANK, int KEYS, int WARPS>
__device__ __forceinline__ void attend(float* out, float* part_sums, float* part_softmax, const float* qlat,
                                       const float* latent, const int* index, const int* count, float scale, int NH,
                                       int kv_rank, int D, int heads, int K, int share, int start) {
    constexpr int TILE = KEYS * ROW<WIDTH>, OWN = GROUPS<RANK, WARPS>, N = KEYS / 8;
    static_assert(KEYS <= WARP && KEYS % 8 == 0 && WIDTH % 32 == 0 && RANK % 32 == 0, "whole warps and groups");
    extern __shared__ Pack<4> shared[];  // two stages of latents, then scores: every warp's part
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    const int query = blockIdx.x, first_head = blockIdx.y * heads;
    const size_t row = (size_t)query * NH + first_head, rows = (size_t)gridDim.x * NH;  // the block's first; all
    const bool packed = D % 4 == 0 && aligned(qlat, latent);
    heads = min(heads, NH - first_head);
    scale *= LOG2E;
    qlat += row * D;
    index += (size_t)query * K;
    const int limit = K > 0 ? count[query] : start + query + 1;
    const int begin = blockIdx.z * share, end = min(begin + share, limit);
    const auto row_of_lane = [&](int first) {
        const int at = first + lane;
        return lane >= KEYS || at >= end ? -1 : K > 0 ? index[at] : at;
    };

    if (begin < end) { fetch_latents<WIDTH, KEYS, WARPS>(shared, latent, row_of_lane(begin), D, packed); }
    commit_copies();
    int ahead = row_of_lane(begin + KEYS);  // rows of the next tile, so that no copy waits for the list
    Rows<32 * GROUPS<WIDTH, WARPS>, 1, false> queries(nullptr);
#pragma unroll
    for (int i = 0; i < GROUPS<WIDTH, WARPS>; i++) {
#pragma unroll
        for (int pair = 0; pair < 2; pair++) {
            const int of_row = 2 * group_of_warp<WARPS>(i) + pair;
            const Pack<4> low = load_chunk(qlat, D, 0, of_row, heads, D, packed);
            const Pack<4> high = load_chunk(qlat, D, 1, of_row, heads, D, packed);
            put_chunks<EXACT>(queries, 0, 2 * i + pair, low, high);
        }
    }
    float sums[1][OWN * 4][4], top[2] = {MINUS_INFINITY, MINUS_INFINITY}, total[2] = {0.0f, 0.0f};
    clear(sums);

    Pack<4>* const scores = shared + 2 * TILE;
    int stage = 0;
    for (int first = begin; first < end; first += KEYS) {
        const Pack<4>* now = shared + stage;
        stage = TILE - stage;
        wait_for_copies<0>();
        __syncthreads();  // all copies are there, and all warps are done with the other stage and the scores
        if (first + KEYS < end) {
            fetch_latents<WIDTH, KEYS, WARPS>(shared + stage, latent, ahead, D, packed);
            commit_copies();
            ahead = row_of_lane(first + 2 * KEYS);
        }
        float p[2][N][4];
        clear(p);
        add_scores<EXACT, WIDTH, WARPS>(p, queries, now, D);
#pragma unroll
        for (int n = 0; n < N; n++) {
            Pack<4> score;
#pragma unroll
            for (int i = 0; i < 4; i++) { score.at[i] = p[0][n][i] + p[1][n][i]; }
            scores[(warp * N + n) * WARP + lane] = score;
        }
        __syncthreads();
#pragma unroll
        for (int n = 0; n < N; n++) {
            Pack<4> score = scores[n * WARP + lane];
#pragma unroll
            for (int other = 1; other < WARPS; other++) { add(score, scores[(other * N + n) * WARP + lane]); }
#pragma unroll
            for (int i = 0; i < 4; i++) {
                p[0][n][i] = first + 8 * n + 2 * t + i % 2 < end ? score.at[i] : MINUS_INFINITY;
            }
        }
        online_softmax<KEYS, 32 * OWN>(p[0], top, total, sums[0], scale);
        add_latents<EXACT, WIDTH, WARPS, OWN>(sums[0], p[0], now, kv_rank);
    }

    const bool whole = gridDim.z == 1;
    float factor[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        total[half] = group_sum<4>(total[half]);
        factor[half] = whole ? 1.0f / total[half] : 1.0f;
        const int head = g + 8 * half;
        if (!whole && warp == 0 && t == 0 && head < heads) {
            part_softmax[2 * (blockIdx.z * rows + row + head)] = top[half];
            part_softmax[2 * (blockIdx.z * rows + row + head) + 1] = total[half];
        }
    }
    float* const to = (whole ? out : part_sums + blockIdx.z * rows * kv_rank) + row * kv_rank;
    const bool packed_sums = kv_rank % 4 == 0 && aligned(to);
#pragma unroll
    for (int i = 0; i < OWN; i++) {
        const int column = 32 * group_of_warp<WARPS>(i);
        if (column >= kv_rank) { break; }
        float of_group[4][4];
#pragma unroll
        for (int j = 0; j < 16; j++) { of_group[j / 4][j % 4] = sums[0][4 * i + j / 4][j % 4]; }
        store_rows<32>(to + column, kv_rank, heads, kv_rank - column, of_group, factor, packed_sums);
    }
}

// out (n,NH,kv_rank) from qlat (n,NH,D), latent (S,D): query i meets keys 0 .. start+i if K is 0, else the first
// count[i] of index[i] (n,K). grid (n, groups of `heads` heads, parts of `share` keys). Of several parts each writes
// its sums to part_sums (parts,n,NH,kv_rank), its largest score and sum of exponentials to part_softmax
// (parts,n,NH,2). D up to 128
extern "C" __global__ void __launch_bounds__(128, 2) DYNAMIC_SHARED(41984)
latent_attention_tf32_kernel(float* __restrict__ out, float* __restrict__ part_sums, float* __restrict__ part_softmax,
                             const float* __restrict__ qlat, const float* __restrict__ latent,
                             const int* __restrict__ index, const int* __restrict__ count, float scale, int NH,
                             int kv_rank, int D, int heads, int K, int share, int start) {
    FOR_TENSOR_CORES((attend<false, 128, 128, 32, 4>(out, part_sums, part_softmax, qlat, latent, index, count, scale,
                                                    NH, kv_rank, D, heads, K, share, start));)
}

extern "C" __global__ void __launch_bounds__(128, 2) DYNAMIC_SHARED(41984)
latent_attention_3xtf32_kernel(float* __restrict__ out, float* __restrict__ part_sums, float* __restrict__ part_softmax,
                               const float* __restrict__ qlat, const float* __restrict__ latent,
                               const int* __restrict__ index, const int* __restrict__ count, float scale, int NH,
                               int kv_rank, int D, int heads, int K, int share, int start) {
    FOR_TENSOR_CORES((attend<true, 128, 128, 32, 4>(out, part_sums, part_softmax, qlat, latent, index, count, scale,
                                                    NH, kv_rank, D, heads, K, share, start));)
}

// the same for wider latents, D up to 576, kv_rank up to 512
extern "C" __global__ void __launch_bounds__(192, 2) DYNAMIC_SHARED(80384)
latent_attention_wide_tf32_kernel(float* __restrict__ out, float* __restrict__ part_sums,
                                  float* __restrict__ part_softmax, const float* __restrict__ qlat,
                                  const float* __restrict__ latent, const int* __restrict__ index,
                                  const int* __restrict__ count, float scale, int NH, int kv_rank, int D, int heads,
                                  int K, int share, int start) {
    FOR_TENSOR_CORES((attend<false, 576, 512, 16, 6>(out, part_sums, part_softmax, qlat, latent, index, count, scale,
                                                    NH, kv_rank, D, heads, K, share, start));)
}

extern "C" __global__ void __launch_bounds__(192, 2) DYNAMIC_SHARED(80384)
latent_attention_wide_3xtf32_kernel(float* __restrict__ out, float* __restrict__ part_sums,
                                    float* __restrict__ part_softmax, const float* __restrict__ qlat,
                                    const float* __restrict__ latent, const int* __restrict__ index,
                                    const int* __restrict__ count, float scale, int NH, int kv_rank, int D, int heads,
                                    int K, int share, int start) {
    FOR_TENSOR_CORES((attend<true, 576, 512, 16, 6>(out, part_sums, part_softmax, qlat, latent, index, count, scale,
                                                    NH, kv_rank, D, heads, K, share, start));)
}
