// attention_mean.cu: dense attention's probabilities averaged over heads (kernels/cpu/sparse/attention_mean.py)
//
// qkv (B,T,3C): in row (b,t), the q, k and v of head h start at columns h*hs, C + h*hs and 2C + h*hs. A query meets all
// keys up to its own, T*T*C/2 FMAs a sequence:
//   v1 one warp a query              every query reads all keys, of all heads
//   v2 tiles of 64 x 64 (this)       heads one after another; the mean stays in registers

#define TILE 64        // queries and keys of a tile
#define SLICE 32       // columns of a head in shared memory at a time
#define MEAN_THREADS 256
#define SIDE 16        // threads along each side of a tile: 4 x 4 scores for each
#define EACH (TILE / SIDE)

// rows first..first+63 of a head, columns from `column` on -> tile; what lies beyond `limit` rows or hs columns is 0
__device__ __forceinline__ void put_rows(Pack<4> (*tile)[SLICE / 4 + 1], const float* rows, size_t stride, int limit,
                                         int column, int hs, bool packed) {
    constexpr int PACKS = SLICE / 4;
    for (int i = threadIdx.x; i < TILE * PACKS; i += MEAN_THREADS) {
        const int r = i / PACKS, c = i % PACKS;
        tile[r][c] = load_columns(rows + r * stride, column + c * 4, r < limit ? hs : 0, packed);
    }
}

// p (B,R,S), qkv (B,T,3C), lse (B,NH,Tq), Tq = T - start, queries first..first+R-1; grid (S / 64, R / 64, B)
extern "C" __global__ void __launch_bounds__(256)
attention_mean_kernel(float* __restrict__ p, const float* __restrict__ qkv, const float* __restrict__ lse, int T,
                      int NH, int hs, int R, int S, int first, int start) {
    __shared__ Pack<4> query_tile[TILE][SLICE / 4 + 1], key_tile[TILE][SLICE / 4 + 1];
    __shared__ float log_sums[TILE];
    const int tx = threadIdx.x % SIDE, ty = threadIdx.x / SIDE;  // queries ty + 16i, keys tx + 16j
    const int C = NH * hs, row = blockIdx.y * TILE, key = blockIdx.x * TILE, query = first + row;
    const size_t b = blockIdx.z, stride = 3 * C;
    const bool packed = hs % 4 == 0 && aligned(qkv);
    const float scale = LOG2E / sqrtf(hs);
    const int queries = min(TILE, R - row);
    const int heads = key < query + queries ? NH : 0;  // above the diagonal there is nothing to compute
    const float* head = qkv + b * T * stride;

    float mean[EACH][EACH];
#pragma unroll
    for (int i = 0; i < EACH; i++) {
#pragma unroll
        for (int j = 0; j < EACH; j++) { mean[i][j] = 0.0f; }
    }
    for (int h = 0; h < heads; h++, head += hs) {
        float s[EACH][EACH];
#pragma unroll
        for (int i = 0; i < EACH; i++) {
#pragma unroll
            for (int j = 0; j < EACH; j++) { s[i][j] = 0.0f; }
        }
        for (int column = 0; column < hs; column += SLICE) {
            __syncthreads();  // every thread is done with the slice before
            put_rows(query_tile, head + query * stride, stride, queries, column, hs, packed);
            put_rows(key_tile, head + key * stride + C, stride, T - key, column, hs, packed);
            if (column == 0 && threadIdx.x < queries) {
                log_sums[threadIdx.x] = LOG2E * lse[(b * NH + h) * (T - start) + query - start + threadIdx.x];
            }
            __syncthreads();
#pragma unroll 2
            for (int c = 0; c < SLICE / 4; c++) {
                Pack<4> k[EACH];
#pragma unroll
                for (int j = 0; j < EACH; j++) { k[j] = key_tile[tx + j * SIDE][c]; }
#pragma unroll
                for (int i = 0; i < EACH; i++) {
                    const Pack<4> q = query_tile[ty + i * SIDE][c];
#pragma unroll
                    for (int j = 0; j < EACH; j++) { s[i][j] += dot(q, k[j]); }
                }
            }
        }
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            if (ty + i * SIDE >= queries) { continue; }
#pragma unroll
            for (int j = 0; j < EACH; j++) { mean[i][j] += exp2f(s[i][j] * scale - log_sums[ty + i * SIDE]); }
        }
    }
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const int r = row + ty + i * SIDE;
#pragma unroll
        for (int j = 0; j < EACH; j++) {
            const int column = key + tx + j * SIDE;
            if (r < R && column < S) { p[(b * R + r) * S + column] = column <= first + r ? mean[i][j] / NH : 0.0f; }
        }
    }
}
