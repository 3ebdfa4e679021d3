// latent_attention.cu: attention over latents that all heads share (kernels/cpu/deepseek/latent_attention.py)
//
// latent_attention_kernel: qlat (n,NH,D) meets the rows of latent (S,D), D = kv_rank + R, up to its position or by list
//   v1 a block a query and head    each head reads the latents again, although they are the same for all
//   v2 a block a query             a tile of latents in shared memory is both keys and values of up to 8 heads
//   v3 also its keys split (this)  a decoder has one query: blocks take parts of its keys, each with a softmax of its
//                                  own, and attention_join.cu joins these in their order
//
// Sums have a fixed order that depends on sizes alone. Rows of shared memory are an odd number of float4s, so that the
// same column of 8 keys lies in different banks.

#define LATENT_THREADS 128
#define LATENT_WARPS (LATENT_THREADS / WARP)
#define HEADS 8  // the most heads of a block: two for each warp

// row (D) -> tile (stride packs), zeros behind; by one warp
__device__ __forceinline__ void fetch_row(Pack<4>* tile, const float* row, int D, int stride, bool packed) {
    for (int i = threadIdx.x % WARP; i < stride; i += WARP) {
        Pack<4> x = zeros<4>();
        if (packed) {
            if (4 * i < D) { x = load<4>(row, i); }
        } else {
#pragma unroll
            for (int j = 0; j < 4; j++) {
                if (4 * i + j < D) { x.at[j] = row[4 * i + j]; }
            }
        }
        tile[i] = x;
    }
}

// KEYS of a tile, KEYS * LANES = 32 lanes for the scores of a head; a thread keeps PACKS float4s of sums
template <int KEYS, int PACKS>
__device__ __forceinline__ void attend(float* out, float* part_sums, float* part_softmax, const float* qlat,
                                       const float* latent, const int* index, const int* count, float scale, int NH,
                                       int kv_rank, int D, int heads, int K, int share, int start, Pack<4>* shared) {
    constexpr int LANES = WARP / KEYS;
    __shared__ float p[HEADS][KEYS];
    __shared__ float shrinks[HEADS], totals[HEADS];
    const int warp = threadIdx.x / WARP;
    const int lane = threadIdx.x % WARP;
    const int n = gridDim.x;
    const int query = blockIdx.x;
    const int first_head = blockIdx.y * heads;
    const int stride = (D + 3) / 4 | 1;
    const bool packed = D % 4 == 0 && aligned(qlat, latent);
    heads = min(heads, NH - first_head);
    Pack<4>* const queries = shared;
    Pack<4>* const tile = shared + HEADS * stride;
    qlat += ((size_t)query * NH + first_head) * D;
    index += (size_t)query * K;
    const int limit = K > 0 ? count[query] : start + query + 1;
    const int begin = blockIdx.z * share;
    const int end = min(begin + share, limit);

    for (int h = warp; h < heads; h += LATENT_WARPS) {
        fetch_row(queries + h * stride, qlat + h * D, D, stride, packed);
    }
    const int packs = (kv_rank + 3) / 4;  // packs of sums: the last may have columns of R, left out in the end
    Pack<4> sums[PACKS];
    float top[HEADS / LATENT_WARPS], total[HEADS / LATENT_WARPS];  // those of heads warp and warp + 4
#pragma unroll
    for (int i = 0; i < PACKS; i++) { sums[i] = zeros<4>(); }
#pragma unroll
    for (int i = 0; i < HEADS / LATENT_WARPS; i++) { top[i] = MINUS_INFINITY, total[i] = 0.0f; }

    for (int first = begin; first < end; first += KEYS) {
        __syncthreads();  // the tile before is done with
        for (int key = warp; key < KEYS; key += LATENT_WARPS) {
            const int at = first + key;
            const int row = at >= end ? 0 : K > 0 ? index[at] : at;
            fetch_row(tile + key * stride, latent + (size_t)row * D, at < end ? D : 0, stride, packed);
        }
        __syncthreads();

        const int key = lane % KEYS;
#pragma unroll
        for (int i = 0; i < HEADS / LATENT_WARPS; i++) {
            const int h = warp + i * LATENT_WARPS;
            if (h >= heads) { break; }
            float score = 0.0f;
            for (int c = lane / KEYS; c < stride; c += LANES) {
                const Pack<4> x = queries[h * stride + c], k = tile[key * stride + c];
#pragma unroll
                for (int j = 0; j < 4; j++) { score += x.at[j] * k.at[j]; }
            }
#pragma unroll
            for (int step = WARP / 2; step >= KEYS; step /= 2) { score += __shfl_xor_sync(ALL_LANES, score, step); }
            score = first + key < end ? score * (scale * LOG2E) : MINUS_INFINITY;
            const float before = top[i];
            top[i] = fmaxf(before, warp_max(score));
            const float shrink = top[i] == before ? 1.0f : exp2f(before - top[i]);
            const float weight = score == MINUS_INFINITY ? 0.0f : exp2f(score - top[i]);
            total[i] = total[i] * shrink + warp_sum(lane < KEYS ? weight : 0.0f);
            if (lane < KEYS) { p[h][key] = weight; }
            if (lane == 0) { shrinks[h] = shrink; }
        }
        __syncthreads();

#pragma unroll
        for (int i = 0; i < PACKS; i++) {
            const int item = threadIdx.x + i * LATENT_THREADS;
            const int h = item / packs, c = item % packs;
            if (h >= heads) { break; }
            const float shrink = shrinks[h];
#pragma unroll
            for (int j = 0; j < 4; j++) { sums[i].at[j] *= shrink; }
#pragma unroll 8
            for (int k = 0; k < KEYS; k++) {
                const Pack<4> x = tile[k * stride + c];
#pragma unroll
                for (int j = 0; j < 4; j++) { sums[i].at[j] += p[h][k] * x.at[j]; }
            }
        }
    }

    const size_t row = (size_t)query * NH + first_head;  // the row of the block's first head
    const size_t rows = (size_t)n * NH;
    if (lane == 0) {
#pragma unroll
        for (int i = 0; i < HEADS / LATENT_WARPS; i++) {
            const int h = warp + i * LATENT_WARPS;
            if (h >= heads) { break; }
            totals[h] = total[i];
            if (gridDim.z > 1) {
                part_softmax[2 * (blockIdx.z * rows + row + h)] = top[i];
                part_softmax[2 * (blockIdx.z * rows + row + h) + 1] = total[i];
            }
        }
    }
    __syncthreads();
    float* target = gridDim.z > 1 ? part_sums + blockIdx.z * rows * kv_rank : out;
#pragma unroll
    for (int i = 0; i < PACKS; i++) {
        const int item = threadIdx.x + i * LATENT_THREADS;
        const int h = item / packs, c = item % packs;
        if (h >= heads) { break; }
        const float factor = gridDim.z > 1 ? 1.0f : 1.0f / totals[h];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            if (4 * c + j < kv_rank) { target[(row + h) * kv_rank + 4 * c + j] = sums[i].at[j] * factor; }
        }
    }
}

// out (n,NH,kv_rank) from qlat (n,NH,D), latent (S,D): query i meets keys 0 .. start+i if K is 0, else the first
// count[i] of index[i] (n,K). grid (n, groups of `heads` heads, parts of `share` keys). Of several parts each writes
// its sums to part_sums (parts,n,NH,kv_rank), its largest score and sum of exponentials to part_softmax
// (parts,n,NH,2). dynamic shared memory: 8 queries and 32 latents, each D / 4 float4s rounded up to an odd number
extern "C" __global__ void __launch_bounds__(128)
latent_attention_kernel(float* __restrict__ out, float* __restrict__ part_sums, float* __restrict__ part_softmax,
                        const float* __restrict__ qlat, const float* __restrict__ latent,
                        const int* __restrict__ index, const int* __restrict__ count, float scale, int NH, int kv_rank,
                        int D, int heads, int K, int share, int start) {
    extern __shared__ Pack<4> shared[];
    attend<32, 5>(out, part_sums, part_softmax, qlat, latent, index, count, scale, NH, kv_rank, D, heads, K, share,
                  start, shared);
}

// latent_attention_kernel for wider latents, up to kv_rank = 512, with 8 keys a tile
extern "C" __global__ void __launch_bounds__(128)
latent_attention_wide_kernel(float* __restrict__ out, float* __restrict__ part_sums, float* __restrict__ part_softmax,
                             const float* __restrict__ qlat, const float* __restrict__ latent,
                             const int* __restrict__ index, const int* __restrict__ count, float scale, int NH,
                             int kv_rank, int D, int heads, int K, int share, int start) {
    extern __shared__ Pack<4> shared[];
    attend<8, 8>(out, part_sums, part_softmax, qlat, latent, index, count, scale, NH, kv_rank, D, heads, K, share,
                 start, shared);
}
