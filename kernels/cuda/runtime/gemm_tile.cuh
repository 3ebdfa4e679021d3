// gemm_tile.cuh: one tile of a matrix product, for band_matmul.cu and expert_matmul.cu; compiled in front of every file
//
//   total(m,n) = sum over k of a(m,k) * b(n,k)      m in BM rows, n in BN columns, k in first .. last - 1
//
// Threads share BK steps of k at a time through shared memory; each holds TM x TN sums in registers and reads 4 of a row
// at once. While a piece is multiplied, the next one is on its way from global memory to registers; two buffers, so one
// barrier a piece.

// four values from array[offset], of which `left` may be read; the others are 0
__device__ __forceinline__ Pack<4> load_up_to(const float* array, size_t offset, int left, bool packed) {
    if (packed && left >= 4) { return load<4>(array + offset, 0); }
    Pack<4> values = zeros<4>();
#pragma unroll
    for (int j = 0; j < 4; j++) {
        if (j < left) { values.at[j] = array[offset + j]; }
    }
    return values;
}

// a or b: element (row,k) is array[row * ld + k] if ALONG_K, else array[k * ld + row]. rows from `row0` on, up to `rows`
template <int ROWS, int BK, int THREADS, bool ALONG_K> struct Operand {
    static const int PACKS = ROWS * BK / 4 / THREADS;
    static_assert(ROWS * BK % (4 * THREADS) == 0, "every thread fetches the same number of packs");
    const float* array;
    int ld, row0, rows;
    bool packed;  // rows start at multiples of 16 bytes
    Pack<4> next[PACKS];

    __device__ __forceinline__ Operand(const float* array, int ld, int row0, int rows)
        : array(array), ld(ld), row0(row0), rows(rows), packed(ld % 4 == 0 && aligned(array)) {}

    // from global memory to registers; first is a multiple of 4 if ALONG_K
    __device__ __forceinline__ void fetch(int first, int last) {
#pragma unroll
        for (int p = 0; p < PACKS; p++) {
            const int index = threadIdx.x + p * THREADS;
            next[p] = zeros<4>();
            if (ALONG_K) {
                const int row = row0 + index / (BK / 4);
                const int k = first + index % (BK / 4) * 4;
                if (row < rows) { next[p] = load_up_to(array, (size_t)row * ld + k, last - k, packed); }
            } else {
                const int row = row0 + index % (ROWS / 4) * 4;
                const int k = first + index / (ROWS / 4);
                if (k < last) { next[p] = load_up_to(array, (size_t)k * ld + row, rows - row, packed); }
            }
        }
    }

    // from registers to shared memory, k by k
    __device__ __forceinline__ void put(float (*tile)[ROWS + 4]) const {
#pragma unroll
        for (int p = 0; p < PACKS; p++) {
            const int index = threadIdx.x + p * THREADS;
            if (ALONG_K) {
#pragma unroll
                for (int j = 0; j < 4; j++) { tile[index % (BK / 4) * 4 + j][index / (BK / 4)] = next[p].at[j]; }
            } else {
                store<4>(&tile[index / (ROWS / 4)][index % (ROWS / 4) * 4], 0, next[p]);
            }
        }
    }
};

template <int BM, int BN, int BK, int TM, int TN, bool A_ALONG_K, bool B_ALONG_K> struct GemmTile {
    static const int THREADS = (BM / TM) * (BN / TN);
    using A = Operand<BM, BK, THREADS, A_ALONG_K>;
    using B = Operand<BN, BK, THREADS, B_ALONG_K>;
    struct __align__(16) Shared {
        float a[2][BK][BM + 4];
        float b[2][BK][BN + 4];
    };

    // row and column in the tile of total[i][j]: groups of 4 lie side by side, so that the reads of neighbouring threads
    // do, too
    static __device__ __forceinline__ int row(int i) {
        return i / 4 * (4 * BM / TM) + threadIdx.x / (BN / TN) * 4 + i % 4;
    }
    static __device__ __forceinline__ int column(int j) {
        return j / 4 * (4 * BN / TN) + threadIdx.x % (BN / TN) * 4 + j % 4;
    }

    static __device__ __forceinline__ void multiply(float (&total)[TM][TN], Shared& shared, A a, B b, int first,
                                                    int last) {
#pragma unroll
        for (int i = 0; i < TM; i++) {
#pragma unroll
            for (int j = 0; j < TN; j++) { total[i][j] = 0.0f; }
        }
        a.fetch(first, last);
        b.fetch(first, last);
        int buffer = 0;
        for (int k = first; k < last; k += BK, buffer ^= 1) {
            a.put(shared.a[buffer]);
            b.put(shared.b[buffer]);
            __syncthreads();
            if (k + BK < last) {
                a.fetch(k + BK, last);
                b.fetch(k + BK, last);
            }
#pragma unroll
            for (int step = 0; step < BK; step++) { multiply_step(total, shared.a[buffer][step], shared.b[buffer][step]); }
        }
    }

    static __device__ __forceinline__ void multiply_step(float (&total)[TM][TN], const float* a, const float* b) {
        Pack<4> x[TM / 4], y[TN / 4];
#pragma unroll
        for (int i = 0; i < TM; i += 4) { x[i / 4] = load<4>(a + row(i), 0); }
#pragma unroll
        for (int j = 0; j < TN; j += 4) { y[j / 4] = load<4>(b + column(j), 0); }
#pragma unroll
        for (int i = 0; i < TM; i++) {
#pragma unroll
            for (int j = 0; j < TN; j++) { total[i][j] += x[i / 4].at[i % 4] * y[j / 4].at[j % 4]; }
        }
    }
};

// out (M,N) of this tile = total + bias, the tile's corner at m0, n0; bias (N) may be null
template <class Tile, int TM, int TN>
__device__ __forceinline__ void write_tile(float* out, const float (&total)[TM][TN], const float* bias, int m0, int n0,
                                           int M, int N) {
    const bool packed = N % 4 == 0 && aligned(out);
#pragma unroll
    for (int j = 0; j < TN; j += 4) {
        const int n = n0 + Tile::column(j);
        const Pack<4> shift = bias && n < N ? load_up_to(bias, n, N - n, false) : zeros<4>();
#pragma unroll
        for (int i = 0; i < TM; i++) {
            const int m = m0 + Tile::row(i);
            if (m >= M) { continue; }
            Pack<4> values;
#pragma unroll
            for (int l = 0; l < 4; l++) { values.at[l] = total[i][j + l] + shift.at[l]; }
            if (packed && n + 4 <= N) {
                store<4>(out + (size_t)m * N + n, 0, values);
            } else {
                for (int l = 0; l < 4 && n + l < N; l++) { out[(size_t)m * N + n + l] = values.at[l]; }
            }
        }
    }
}
