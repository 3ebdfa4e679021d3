// gemm_mma.cuh: one tile of a matrix product on tensor cores, in front of the files that name it: matmul_tensor.cu,
// band_matmul_tensor.cu, expert_matmul_tensor.cu, mla_tensor.cu
//
//   total(m,n) = sum over k of a(m,k) * b(n,k)      m in BM rows, n in BN columns, k in first .. last - 1
//
//   v1 gemm_tile.cuh              FMAs are the limit, and tensor cores idle
//   v2 products by mma            sums grow inside tensor cores, which cut off what is too small for a sum: an H100 was
//                                 off by 1e-5 after 16384 steps of 3xTF32. Splits took longer than products
//   v3 sums of a piece (this)     in 3xTF32, PIECE steps are summed inside, and then added outside, to nearest; a split
//                                 is two operations (mma.cuh). In TF32 a value is rounded once, by the thread that
//                                 copied it, and not by every warp that reads it
//
// A piece of both operands is in one of STAGES stages of shared memory: one is multiplied while the others are on their
// way by cp.async, with one barrier a piece. A warp has WM x WN of the tile; a lane reads k = 4t .. 4t + 3 of a row,
// which are its words of two products: word t and word t+4 are neighbours in memory. Operands along k lie in shared
// memory as in global memory, 64 bytes a row: 8 lanes at a time read 128 bytes, all different banks. Operands across k
// have their rows in another order for each four k, row ^ 2k, so that the 32 lanes that read 8 rows and k = 4t + j meet
// 32 banks.

constexpr int PIECE = 16;  // steps of k in a stage

// a or b: element (row,k) is array[row * ld + k] if ALONG_K, else array[k * ld + row]. Rows from `row0` to `rows`,
// pieces from `first` on. Along k, `first` and the last k are multiples of 4, or the last one is where rows end
template <int ROWS, int THREADS, bool ALONG_K> struct MmaOperand {
    static constexpr int WIDE = ALONG_K ? PIECE / 4 : ROWS > 64 ? 32 : 16;  // threads side by side, 16 bytes each
    static constexpr int STEP = THREADS / WIDE;                             // rows or k to a thread's next copy
    static constexpr int COPIES = (ALONG_K ? ROWS : PIECE) / STEP;
    static_assert(COPIES * STEP == (ALONG_K ? ROWS : PIECE) && (ALONG_K || ROWS % 32 == 0), "whole copies");
    const float* from;  // this thread's first copy of the next piece
    int ld, left;       // rows from there on
    bool packed;        // all copies are of 16 bytes

    __device__ __forceinline__ MmaOperand(const float* array, int ld, int row0, int rows, int first)
        : ld(ld), packed(ld % 4 == 0 && aligned(array)) {
        const int x = threadIdx.x % WIDE * 4, y = threadIdx.x / WIDE;
        left = rows - row0 - (ALONG_K ? y : x);
        from = array + (ALONG_K ? (size_t)(row0 + y) * ld + first + x : (size_t)(first + y) * ld + row0 + x);
    }

    // where copy i of this thread goes
    static __device__ __forceinline__ float* place(float* piece, int i) {
        const int x = threadIdx.x % WIDE * 4, line = threadIdx.x / WIDE + i * STEP;
        return piece + (ALONG_K ? 4 * (threadIdx.x + i * THREADS) : line * ROWS + (x ^ line / 4 * 8));
    }
    static __device__ __forceinline__ bool copies() { return ALONG_K || threadIdx.x % WIDE * 4 < ROWS; }

    // the next PIECE steps, of which there are `steps`; the others become 0
    __device__ __forceinline__ void fetch(float* piece, int steps) {
        const int x = threadIdx.x % WIDE * 4, y = threadIdx.x / WIDE;
#pragma unroll
        for (int i = 0; i < COPIES; i++) {
            if (!copies()) { continue; }
            const int there = ALONG_K ? (i * STEP < left ? steps - x : 0) : (y + i * STEP < steps ? left : 0);
            const float* copied = from + (size_t)(i * STEP) * ld;
            if (packed) {
                copy_later<16>(place(piece, i), copied, there > 0);
            } else {
#pragma unroll
                for (int j = 0; j < 4; j++) { copy_later<4>(place(piece, i) + j, copied + j, j < there); }
            }
        }
        from += ALONG_K ? PIECE : (size_t)PIECE * ld;
    }

    // a thread rounds what it has copied itself
    static __device__ __forceinline__ void round(float* piece) {
#pragma unroll
        for (int i = 0; i < COPIES; i++) {
            if (!copies()) { continue; }
            Pack<4> values = load<4>(place(piece, i), 0);
#pragma unroll
            for (int j = 0; j < 4; j++) { values.at[j] = kept<false>(values.at[j]); }
            store<4>(place(piece, i), 0, values);
        }
    }

    // k = 4t .. 4t + 3 of a row of a piece
    static __device__ __forceinline__ Pack<4> read(const float* piece, int row) {
        const int t = threadIdx.x % 4;
        Pack<4> x;
        if (ALONG_K) {
            x = load<4>(piece + row * PIECE, t);
        } else {
#pragma unroll
            for (int j = 0; j < 4; j++) { x.at[j] = piece[(4 * t + j) * ROWS + (row ^ 8 * t)]; }
        }
        return x;
    }
};

template <int BM, int BN, int WM, int WN, int STAGES, bool EXACT, bool A_ALONG_K, bool B_ALONG_K> struct MmaTile {
    static constexpr int THREADS = (BM / WM) * (BN / WN) * WARP;
    static constexpr int ROWS = BM, COLUMNS = BN, WARP_ROWS = WM, WARP_COLUMNS = WN, MI = WM / 16, NI = WN / 8;
    static_assert(BM % WM == 0 && BN % WN == 0 && WM % 16 == 0 && WN % 8 == 0, "whole warps and products");
    using A = MmaOperand<BM, THREADS, A_ALONG_K>;
    using B = MmaOperand<BN, THREADS, B_ALONG_K>;
    struct __align__(16) Shared {
        float a[STAGES][BM * PIECE];
        float b[STAGES][BN * PIECE];
    };

    // corner of this warp's part
    static __device__ __forceinline__ int warp_row() { return threadIdx.x / WARP / (BN / WN) * WM; }
    static __device__ __forceinline__ int warp_column() { return threadIdx.x / WARP % (BN / WN) * WN; }

    // place in the tile of total[i][j][l]
    static __device__ __forceinline__ int row(int i, int l) {
        return warp_row() + 16 * i + threadIdx.x % WARP / 4 + l / 2 * 8;
    }
    static __device__ __forceinline__ int column(int j, int l) {
        return warp_column() + 8 * j + threadIdx.x % 4 * 2 + l % 2;
    }

    // the warp leaves out pieces that have no k of `own`: its part is 0 there
    static __device__ __forceinline__ void multiply(float (&total)[MI][NI][4], Shared& shared, A a, B b, int first,
                                                    int last, Band own) {
#pragma unroll
        for (int i = 0; i < MI * NI * 4; i++) { total[i / (NI * 4)][i / 4 % NI][i % 4] = 0.0f; }
#pragma unroll
        for (int stage = 0; stage < STAGES - 1; stage++) { fetch(shared, stage, a, b, last - first - stage * PIECE); }
        int stage = 0;
        for (int k = first; k < last; k += PIECE) {
            wait_for_copies<STAGES - 2>();
            if (!EXACT) {
                A::round(shared.a[stage]);
                B::round(shared.b[stage]);
            }
            __syncthreads();  // the piece is there for all threads, and all are done with the one in front of it
            fetch(shared, stage ? stage - 1 : STAGES - 1, a, b, last - k - (STAGES - 1) * PIECE);
            if (k < own.stop && k + PIECE > own.start) { multiply_piece(total, shared.a[stage], shared.b[stage]); }
            stage = stage + 1 == STAGES ? 0 : stage + 1;
        }
    }

    static __device__ __forceinline__ void fetch(Shared& shared, int stage, A& a, B& b, int steps) {
        if (steps > 0) {
            a.fetch(shared.a[stage], steps);
            b.fetch(shared.b[stage], steps);
        }
        commit_copies();
    }

    static __device__ __forceinline__ void multiply_piece(float (&total)[MI][NI][4], const float* a, const float* b) {
        const int m = warp_row() + threadIdx.x % WARP / 4, n = warp_column() + threadIdx.x % WARP / 4;
        Tf32 x[MI][2][4];  // of two products
#pragma unroll
        for (int i = 0; i < MI; i++) {
            const Pack<4> upper = A::read(a, m + 16 * i), lower = A::read(a, m + 16 * i + 8);
#pragma unroll
            for (int l = 0; l < 4; l++) {
                x[i][l / 2][l % 2 * 2] = operand<EXACT>(upper.at[l]);
                x[i][l / 2][l % 2 * 2 + 1] = operand<EXACT>(lower.at[l]);
            }
        }
#pragma unroll
        for (int j = 0; j < NI; j++) {
            const Pack<4> of_b = B::read(b, n + 8 * j);
            Tf32 y[4];
#pragma unroll
            for (int l = 0; l < 4; l++) { y[l] = operand<EXACT>(of_b.at[l]); }
#pragma unroll
            for (int i = 0; i < MI; i++) {
                float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
                float(&to)[4] = EXACT ? sums : total[i][j];
                mma<EXACT>(to, x[i][0], y[0], y[1]);
                mma<EXACT>(to, x[i][1], y[2], y[3]);
                if (EXACT) {
#pragma unroll
                    for (int l = 0; l < 4; l++) { total[i][j][l] += sums[l]; }
                }
            }
        }
    }
};

constexpr Band ALL_K = {0, 0x7fffffff};

// out (M,N) = add * out + total + bias, of row group i of the tile whose corner is m0, n0; rows are ld apart; bias (N)
// may be null
template <class Tile, int NI>
__device__ __forceinline__ void write_rows(float* out, const float (&total)[NI][4], const float* bias, bool add, int i,
                                           int m0, int n0, int M, int N, int ld) {
    const bool packed = (N | ld) % 2 == 0 && (size_t)out % 8 == 0;
#pragma unroll
    for (int j = 0; j < NI; j++) {
        const int n = n0 + Tile::column(j, 0);
        if (n >= N) { continue; }
        const int next = n + 1 < N ? 1 : 0;
        const Pack<2> shift = bias ? Pack<2>{bias[n], bias[n + next]} : zeros<2>();
#pragma unroll
        for (int l = 0; l < 4; l += 2) {
            const int m = m0 + Tile::row(i, l);
            if (m >= M) { continue; }
            float* place = out + (size_t)m * ld + n;
            Pack<2> x = {total[j][l] + shift.at[0], total[j][l + 1] + shift.at[1]};
            if (add) { x.at[0] += place[0], x.at[1] += place[next]; }
            if (packed) {
                store<2>(place, 0, x);
            } else {
                place[0] = x.at[0];
                if (next) { place[1] = x.at[1]; }
            }
        }
    }
}

template <class Tile, int MI, int NI>
__device__ __forceinline__ void write_tile(float* out, const float (&total)[MI][NI][4], const float* bias, bool add,
                                           int m0, int n0, int M, int N, int ld) {
#pragma unroll
    for (int i = 0; i < MI; i++) { write_rows<Tile>(out, total[i], bias, add, i, m0, n0, M, N, ld); }
}

template <class Tile, int MI, int NI>
__device__ __forceinline__ void write_tile(float* out, const float (&total)[MI][NI][4], const float* bias, bool add,
                                           int m0, int n0, int M, int N) {
    write_tile<Tile>(out, total, bias, add, m0, n0, M, N, N);
}

// --- sums in parts ---------------------------------------------------------------------------------------------------
//
// Where tiles are too few for a GPU, gridDim.z blocks share the steps of a tile. What each of their threads has summed
// goes to parts (gridDim.z,tiles,MI,NI,THREADS,4), and a kernel whose blocks are the tiles' row groups adds it up

template <class Tile, int MI, int NI>
__device__ __forceinline__ void put_part(float* parts, const float (&total)[MI][NI][4]) {
    const size_t tile = ((size_t)blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
#pragma unroll
    for (int i = 0; i < MI * NI; i++) {
        const float(&x)[4] = total[i / NI][i % NI];
        store<4>(parts, (tile * MI * NI + i) * Tile::THREADS + threadIdx.x, {x[0], x[1], x[2], x[3]});
    }
}

// grid (of the tiles, MI): block z has row group z
template <class Tile, int NI>
__device__ __forceinline__ void join_parts(float (&total)[NI][4], const float* parts, int count) {
    const size_t tile = (size_t)blockIdx.y * gridDim.x + blockIdx.x, tiles = (size_t)gridDim.y * gridDim.x;
    Pack<4> sums[NI];
#pragma unroll
    for (int j = 0; j < NI; j++) { sums[j] = zeros<4>(); }
#pragma unroll 4
    for (int part = 0; part < count; part++) {
#pragma unroll
        for (int j = 0; j < NI; j++) {
            const size_t group = ((part * tiles + tile) * Tile::MI + blockIdx.z) * NI + j;
            add(sums[j], load<4>(parts, group * Tile::THREADS + threadIdx.x));
        }
    }
#pragma unroll
    for (int j = 0; j < NI; j++) {
#pragma unroll
        for (int l = 0; l < 4; l++) { total[j][l] = sums[j].at[l]; }
    }
}
