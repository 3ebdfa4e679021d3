// indexer_tensor.cu: indexer.cu's products on tensor cores (kernels/cpu/sparse/indexer.py); tiles in gemm_mma.cuh and
// attention_mma.cuh. tf32: operands of products are rounded to nearest; 3xtf32: split, with float32's accuracy
//
// indexer_scores_forward
//   v1 indexer.cu                    FMAs are the limit
//   v2 mma, head after head (this)   a tile's product with one head and its weighted sum over heads, both in registers.
//                                    Pieces of the next head are under way while this one is multiplied
//
// indexer_scores_dq, indexer_scores_dk: gradients of whole rows, in 4 products as in indexer.cu
//   v1 indexer.cu                    m crosses shared memory from one product to the next
//   v2 mma (this)                    m leaves the first product as what enters the second; queries, or keys, stay with
//                                    their warp. Keys of a range of queries, and queries of a range of keys, have a
//                                    block each: else a few rows would leave most multiprocessors idle. Ranges are
//                                    added in order, by indexer_finish and indexer_join

// --- forward ---------------------------------------------------------------------------------------------------------

// 3xTF32 takes the registers of half the columns of a warp
template <bool EXACT>
using ScoresTile = MmaTile<EXACT ? 64 : 128, 64, 32, EXACT ? 32 : 64, 4, EXACT, true, true>;

// scores (B,R,S) for the queries at first ..; grid (key tiles, query tiles, B)
template <bool EXACT>
__device__ __forceinline__ void scores_tile(float* scores, const float* q, const float* k, const float* w, float scale,
                                            int R, int S, int Tq, int Tk, int HI, int dI, int own_keys, int first,
                                            int start) {
    using Tile = ScoresTile<EXACT>;
    using Shared = typename Tile::Shared;
    constexpr int STAGES = sizeof(Shared::a) / sizeof(Shared::a[0]), MI = Tile::MI, NI = Tile::NI;
    __shared__ Shared shared;
    const int r0 = blockIdx.y * Tile::ROWS, s0 = blockIdx.x * Tile::COLUMNS;
    const int width = own_keys ? HI * dI : dI;
    const size_t row = (size_t)blockIdx.z * Tq + first - start;
    const float* weights = w + row * HI;

    float total[MI][NI][4] = {};
    if (s0 <= first + min(r0 + Tile::ROWS, R) - 1) {  // not all of the future
        typename Tile::A a(q + row * HI * dI, HI * dI, r0, R, 0);
        typename Tile::B b(k + (size_t)blockIdx.z * Tk * width, width, s0, S, 0);
        a.packed = a.packed && dI % 4 == 0;  // heads begin at multiples of 16 bytes
        b.packed = b.packed && dI % 4 == 0;
        int asked = 0, column = 0;  // head and column of the next piece that is fetched
        const auto fetch = [&](int stage) {
            Tile::fetch(shared, stage, a, b, asked < HI ? dI - column : 0);
            column += PIECE;
            if (asked < HI && column >= dI) {
                a.from += dI - column;
                b.from += (own_keys ? dI : 0) - column;
                asked++, column = 0;
            }
        };
        for (int stage = 0; stage < STAGES - 1; stage++) { fetch(stage); }
        int stage = 0;
        for (int j = 0; j < HI; j++) {
            float z[MI][NI][4] = {};
            for (int c = 0; c < dI; c += PIECE) {
                wait_for_copies<STAGES - 2>();
                if (!EXACT) {
                    Tile::A::round(shared.a[stage]);
                    Tile::B::round(shared.b[stage]);
                }
                __syncthreads();  // the piece is there for all threads, and all are done with the one in front of it
                fetch(stage ? stage - 1 : STAGES - 1);
                Tile::multiply_piece(z, shared.a[stage], shared.b[stage]);
                stage = stage + 1 == STAGES ? 0 : stage + 1;
            }
#pragma unroll
            for (int i = 0; i < MI; i++) {
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const int r = r0 + Tile::row(i, 2 * half);
                    const float weight = r < R ? weights[(size_t)r * HI + j] : 0.0f;
#pragma unroll
                    for (int n = 0; n < NI; n++) {
#pragma unroll
                        for (int l = 2 * half; l < 2 * half + 2; l++) {
                            total[i][n][l] += weight * (z[i][n][l] < 0.0f ? 0.0f : z[i][n][l]);
                        }
                    }
                }
            }
        }
    }
#pragma unroll
    for (int i = 0; i < MI; i++) {
#pragma unroll
        for (int n = 0; n < NI; n++) {
#pragma unroll
            for (int l = 0; l < 4; l++) {
                const bool past = s0 + Tile::column(n, l) <= first + r0 + Tile::row(i, l);
                total[i][n][l] = past ? scale * total[i][n][l] : MINUS_INFINITY;
            }
        }
    }
    write_tile<Tile>(scores + (size_t)blockIdx.z * R * S, total, nullptr, false, r0, s0, R, S);
}

extern "C" __global__ void __launch_bounds__(128, 2)
indexer_scores_forward_tf32_kernel(float* __restrict__ scores, const float* __restrict__ q,
                                   const float* __restrict__ k, const float* __restrict__ w, float scale, int R, int S,
                                   int Tq, int Tk, int HI, int dI, int own_keys, int first, int start) {
    FOR_TENSOR_CORES(scores_tile<false>(scores, q, k, w, scale, R, S, Tq, Tk, HI, dI, own_keys, first, start);)
}

extern "C" __global__ void __launch_bounds__(128, 3)
indexer_scores_forward_3xtf32_kernel(float* __restrict__ scores, const float* __restrict__ q,
                                     const float* __restrict__ k, const float* __restrict__ w, float scale, int R,
                                     int S, int Tq, int Tk, int HI, int dI, int own_keys, int first, int start) {
    FOR_TENSOR_CORES(scores_tile<true>(scores, q, k, w, scale, R, S, Tq, Tk, HI, dI, own_keys, first, start);)
}

// --- gradients of whole rows -----------------------------------------------------------------------------------------

// z of queries row .. and keys key .. -> m: scale times dscores (R,S) where z > 0, for keys up to the query's own
template <int M, int N>
__device__ __forceinline__ void gate(float (&z)[M][N][4], const float* dscores, float scale, int row, int key, int R,
                                     int S, int first, bool packed) {
    const int g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int m = 0; m < M; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int r = row + 16 * m + 8 * half + g, last = r < R ? first + r : -1;
            const float* of_row = dscores + (size_t)r * S;
#pragma unroll
            for (int n = 0; n < N; n++) {
                const int s = key + 8 * n + 2 * t;
                Pack<2> x = zeros<2>();
                if (packed && s < last) {
                    x = load<2>(of_row + s, 0);
                } else if (s <= last) {
                    x.at[0] = of_row[s];
                    if (s < last) { x.at[1] = of_row[s + 1]; }
                }
#pragma unroll
                for (int l = 0; l < 2; l++) {
                    float& value = z[m][n][2 * half + l];
                    value = value > 0.0f ? scale * x.at[l] : 0.0f;
                }
            }
        }
    }
}

// parts (ranges,B,R,HI*dI): each range's share of u. A warp has M x 16 queries of a head; if EXACT they stay in shared
// memory, since splitting takes the registers. grid (query tiles, HI, B * ranges)
template <bool EXACT, int HS, int M, int KEYS>
__device__ __forceinline__ void scores_dq_tile(float* parts, const float* dscores, const float* q, const float* k,
                                               float scale, int B, int R, int S, int T, int HI, int dI, int own_keys,
                                               int first, int range) {
    constexpr int OWN = 16 * M, QUERIES = TILE_WARPS * OWN, TILE = KEYS * STRIDE<HS>;
    extern __shared__ Pack<4> shared[];  // two stages of keys, then queries
    const int r0 = blockIdx.x * QUERIES, j = blockIdx.y, mine = r0 + threadIdx.x / WARP * OWN;
    const size_t b = blockIdx.z % B, part = blockIdx.z / B;
    const int begin = part * range, end = min(begin + range, first + min(r0 + QUERIES, R));  // keys that queries have
    if (begin >= end) { return; }
    const int width = own_keys ? HI * dI : dI, stride = HI * dI;
    const bool packed = dI % 4 == 0 && aligned(q, k), pairs = S % 2 == 0 && (size_t)dscores % 8 == 0;
    const float* queries = q + (b * T + first + mine) * stride + j * dI;
    const float* keys = k + b * T * width + (own_keys ? j * dI : 0);
    dscores += b * R * S;

    fetch<HS, KEYS>(shared, keys + (size_t)begin * width, width, end - begin, dI, packed);
    commit_copies();
    Rows<HS, M, EXACT> rows(shared + 2 * TILE);
    load_rows<EXACT>(rows, queries, stride, R - mine, dI, packed);
    Sums<HS, M> u;
    clear(u);
    int stage = 0;
    for (int key = begin; key < end; key += KEYS) {
        const int next = key + KEYS;
        Pack<4>* now = shared + stage;
        stage = TILE - stage;
        await<EXACT, HS, KEYS>(now, false);
        if (next < end) {
            fetch<HS, KEYS>(shared + stage, keys + (size_t)next * width, width, end - next, dI, packed);
            commit_copies();
        }
        if (key < first + mine + OWN && mine < R) {
            Sums<KEYS, M> z;
            clear(z);
            add_dots<EXACT, HS>(z, rows, now, dI);
            gate(z, dscores, scale, mine, key, R, S, first, pairs);
            add_products<EXACT, false, HS>(u, z, now, dI);
        }
    }
    const float factor[2] = {1.0f, 1.0f};
#pragma unroll
    for (int m = 0; m < M; m++) {
        const int row = mine + 16 * m;
        float* to = parts + ((part * B + b) * R + row) * stride + j * dI;
        store_rows<HS>(to, stride, R - row, dI, u[m], factor, dI % 4 == 0);  // scratch is aligned
    }
}

// parts (ranges,B,T,.): what each range of queries adds to dk. A warp has M x 16 keys. grid (key tiles, HI if heads
// have keys of their own, B * ranges)
template <bool EXACT, int HS, int M, int QUERIES>
__device__ __forceinline__ void scores_dk_tile(float* parts, const float* dscores, const float* q, const float* k,
                                               const float* w, float scale, int B, int R, int S, int T, int HI, int dI,
                                               int own_keys, int first, int range) {
    constexpr int OWN = 16 * M, KEYS = TILE_WARPS * OWN, TILE = QUERIES * STRIDE<HS>, STAGE = TILE + QUERIES / 4;
    extern __shared__ Pack<4> shared[];  // two stages of queries and their head weights, then keys
    const int s0 = blockIdx.x * KEYS, mine = s0 + threadIdx.x / WARP * OWN;
    const size_t b = blockIdx.z % B, part = blockIdx.z / B;
    // queries that have one of the keys
    const int begin = max((int)part * range, max(0, s0 - first) / QUERIES * QUERIES);
    const int end = min((int)(part + 1) * range, R);
    const int last_key = first + R;  // the end of the keys that a query has
    if (begin >= end || s0 >= last_key) { return; }
    const int head = blockIdx.y, last_head = own_keys ? head + 1 : HI;
    const int width = own_keys ? HI * dI : dI, stride = HI * dI;
    const bool packed = dI % 4 == 0 && aligned(q, k);
    const float* queries = q + (b * T + first) * stride;
    const float* keys = k + (b * T + mine) * width + head * dI;
    const float* weights = w + (b * T + first) * HI;
    const int g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
    dscores += b * R * S;
    const auto fetch_stage = [&](Pack<4>* to, int r, int j) {
        fetch<HS, QUERIES>(to, queries + (size_t)r * stride + j * dI, stride, end - r, dI, packed);
        const int row = r + threadIdx.x;
        if (threadIdx.x < QUERIES) {
            copy_later<4>(reinterpret_cast<float*>(to + TILE) + threadIdx.x, weights + (size_t)row * HI + j, row < end);
        }
        commit_copies();
    };

    fetch_stage(shared, begin, head);
    Rows<HS, M, EXACT> rows(shared + 2 * STAGE);
    load_rows<EXACT>(rows, keys, width, last_key - mine, dI, packed);
    Sums<HS, M> dk;
    clear(dk);
    int stage = 0;
    for (int r = begin; r < end; r += QUERIES) {
        Sums<QUERIES, M> of_pair;  // scale times dscores, by key and query
#pragma unroll
        for (int m = 0; m < M; m++) {
#pragma unroll
            for (int n = 0; n < QUERIES / 8; n++) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const int s = mine + 16 * m + g + i / 2 * 8, row = r + 8 * n + 2 * t + i % 2;
                    of_pair[m][n][i] = row < end && s <= first + row ? scale * dscores[(size_t)row * S + s] : 0.0f;
                }
            }
        }
        for (int j = head; j < last_head; j++) {
            Pack<4>* now = shared + stage;
            stage = STAGE - stage;
            await<EXACT, HS, QUERIES>(now, false);
            const int next = j + 1 < last_head ? r : r + QUERIES;
            if (next < end) { fetch_stage(shared + stage, next, j + 1 < last_head ? j + 1 : head); }
            if (r + QUERIES + first > mine) {
                const Pack<2>* of_query = reinterpret_cast<const Pack<2>*>(now + TILE) + t;
                Sums<QUERIES, M> z;
                clear(z);
                add_dots<EXACT, HS>(z, rows, now, dI);
#pragma unroll
                for (int n = 0; n < QUERIES / 8; n++) {
                    const Pack<2> weight = of_query[4 * n];
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
    }
    const float factor[2] = {1.0f, 1.0f};
#pragma unroll
    for (int m = 0; m < M; m++) {
        const int row = mine + 16 * m;
        float* to = parts + ((part * B + b) * T + row) * width + head * dI;
        store_rows<HS>(to, width, last_key - row, dI, dk[m], factor, dI % 4 == 0);
    }
}

// dk (B,T,C) += parts (ranges,B,T,C), of the ranges that have queries for a tile of `keys` keys; a thread for a value
// of the keys up to the last query's, grid (blocks, B)
extern "C" __global__ void __launch_bounds__(256)
indexer_join_kernel(float* __restrict__ dk, const float* __restrict__ parts, int B, int T, int C, int R, int first,
                    int keys, int range) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= (first + R) * C) { return; }
    const int s0 = i / C / keys * keys;
    const size_t at = (size_t)blockIdx.y * T * C + i;
    float total = dk[at];
    for (int part = max(0, s0 - first) / range; part * range < R; part++) {
        total += parts[(size_t)part * B * T * C + at];
    }
    dk[at] = total;
}

extern "C" __global__ void __launch_bounds__(128, 2) DYNAMIC_SHARED(17408)
indexer_scores_dq_tf32_64_kernel(float* __restrict__ parts, const float* __restrict__ dscores,
                                 const float* __restrict__ q, const float* __restrict__ k, float scale, int B, int R,
                                 int S, int T, int HI, int dI, int own_keys, int first, int range) {
    FOR_TENSOR_CORES(
        (scores_dq_tile<false, 64, 2, 32>(parts, dscores, q, k, scale, B, R, S, T, HI, dI, own_keys, first, range));)
}

extern "C" __global__ void __launch_bounds__(128, 2) DYNAMIC_SHARED(33792)
indexer_scores_dq_tf32_128_kernel(float* __restrict__ parts, const float* __restrict__ dscores,
                                  const float* __restrict__ q, const float* __restrict__ k, float scale, int B, int R,
                                  int S, int T, int HI, int dI, int own_keys, int first, int range) {
    FOR_TENSOR_CORES(
        (scores_dq_tile<false, 128, 1, 32>(parts, dscores, q, k, scale, B, R, S, T, HI, dI, own_keys, first, range));)
}

extern "C" __global__ void __launch_bounds__(128, 2) DYNAMIC_SHARED(50176)
indexer_scores_dq_3xtf32_64_kernel(float* __restrict__ parts, const float* __restrict__ dscores,
                                   const float* __restrict__ q, const float* __restrict__ k, float scale, int B,
                                   int R, int S, int T, int HI, int dI, int own_keys, int first, int range) {
    FOR_TENSOR_CORES(
        (scores_dq_tile<true, 64, 2, 32>(parts, dscores, q, k, scale, B, R, S, T, HI, dI, own_keys, first, range));)
}

extern "C" __global__ void __launch_bounds__(128, 2) DYNAMIC_SHARED(66560)
indexer_scores_dq_3xtf32_128_kernel(float* __restrict__ parts, const float* __restrict__ dscores,
                                    const float* __restrict__ q, const float* __restrict__ k, float scale, int B,
                                    int R, int S, int T, int HI, int dI, int own_keys, int first, int range) {
    FOR_TENSOR_CORES(
        (scores_dq_tile<true, 128, 1, 32>(parts, dscores, q, k, scale, B, R, S, T, HI, dI, own_keys, first, range));)
}

extern "C" __global__ void __launch_bounds__(128, 2) DYNAMIC_SHARED(17664)
indexer_scores_dk_tf32_64_kernel(float* __restrict__ parts, const float* __restrict__ dscores,
                                 const float* __restrict__ q, const float* __restrict__ k,
                                 const float* __restrict__ w, float scale, int B, int R, int S, int T, int HI, int dI,
                                 int own_keys, int first, int range) {
    FOR_TENSOR_CORES((
        scores_dk_tile<false, 64, 2, 32>(parts, dscores, q, k, w, scale, B, R, S, T, HI, dI, own_keys, first, range));)
}

extern "C" __global__ void __launch_bounds__(128, 2) DYNAMIC_SHARED(34048)
indexer_scores_dk_tf32_128_kernel(float* __restrict__ parts, const float* __restrict__ dscores,
                                  const float* __restrict__ q, const float* __restrict__ k,
                                  const float* __restrict__ w, float scale, int B, int R, int S, int T, int HI,
                                  int dI, int own_keys, int first, int range) {
    FOR_TENSOR_CORES((
        scores_dk_tile<false, 128, 1, 32>(parts, dscores, q, k, w, scale, B, R, S, T, HI, dI, own_keys, first, range));)
}

extern "C" __global__ void __launch_bounds__(128, 2) DYNAMIC_SHARED(50432)
indexer_scores_dk_3xtf32_64_kernel(float* __restrict__ parts, const float* __restrict__ dscores,
                                   const float* __restrict__ q, const float* __restrict__ k,
                                   const float* __restrict__ w, float scale, int B, int R, int S, int T, int HI,
                                   int dI, int own_keys, int first, int range) {
    FOR_TENSOR_CORES(
        (scores_dk_tile<true, 64, 2, 32>(parts, dscores, q, k, w, scale, B, R, S, T, HI, dI, own_keys, first, range));)
}

extern "C" __global__ void __launch_bounds__(128, 2) DYNAMIC_SHARED(66816)
indexer_scores_dk_3xtf32_128_kernel(float* __restrict__ parts, const float* __restrict__ dscores,
                                    const float* __restrict__ q, const float* __restrict__ k,
                                    const float* __restrict__ w, float scale, int B, int R, int S, int T, int HI,
                                    int dI, int own_keys, int first, int range) {
    FOR_TENSOR_CORES((
        scores_dk_tile<true, 128, 1, 32>(parts, dscores, q, k, w, scale, B, R, S, T, HI, dI, own_keys, first, range));)
}
