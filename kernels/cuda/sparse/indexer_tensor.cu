// indexer_tensor.cu: indexer.cu's products on tensor cores (kernels/cpu/sparse/indexer.py); tiles in gemm_mma.cuh and
// attention_mma.cuh. tf32: operands of products are rounded to nearest; 3xtf32: split, with float32's accuracy
//
// indexer_scores_forward
//   v1 indexer.cu                        FMAs are the limit; 128 queries a launch leave most multiprocessors idle
//   v2 mma, head after head (this)       a tile's product with one head and its weighted sum over heads, both in
//                                        registers. Pieces of the next head are under way while this one is multiplied

// --- forward ---------------------------------------------------------------------------------------------------------

template <bool EXACT> using ScoresTile = MmaTile<128, 64, 32, 64, 4, EXACT, true, true>;

// scores (B,R,S) for the queries at first ..; a block for each tile of 128 queries and 64 keys, grid (key tiles, query
// tiles, B)
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

extern "C" __global__ void __launch_bounds__(128, 2)
indexer_scores_forward_3xtf32_kernel(float* __restrict__ scores, const float* __restrict__ q,
                                     const float* __restrict__ k, const float* __restrict__ w, float scale, int R,
                                     int S, int Tq, int Tk, int HI, int dI, int own_keys, int first, int start) {
    FOR_TENSOR_CORES(scores_tile<true>(scores, q, k, w, scale, R, S, Tq, Tk, HI, dI, own_keys, first, start);)
}
