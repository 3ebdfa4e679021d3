// union_mean.cu: probabilities of attention over selected keys, averaged over heads, on tensor cores, for sm_80 and
// later; formulas in kernels/cpu/sparse/sparse_attention.py, lists in union_lists.cu, tiles in attention_mma.cuh
//
// qkv (B,T,3C), lse (B,NH,T), index, p (B,T,K), count (B,T), as in sparse_attention.cu; ids (B,tiles,capacity), masks
// (B,tiles,2,capacity), size (B,tiles), where ids ascend. Any hs: 64 columns of a head at a time, padded with zeros.
//
//   v1 sparse_attention_mean                 each query gathers its own keys, of all heads
//   v2 tiles of the union of lists (this)    64 queries meet 64 keys of their union, head after head; the mean stays in
//                                            registers. Written where a query's list has the key: a search finds the
//                                            first of the 64, the bits of those before a key do the rest
//
// What was not selected is computed, and not written. Bytes: 128 rows of C floats for 64 x 64 pairs, u N C T / 64
// floats for a share u of the pairs up to the diagonal.

#define ROWS 64   // queries of a tile
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
// ids ascend in a list. A block takes 64 keys of a list at a time, a warp 32 of the queries and 32 of the keys; blocks
// of a tile take turns, grid (blocks, tiles, B)
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
