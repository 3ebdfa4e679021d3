// indexer.cu: scores of the lightning indexer and their gradients (kernels/cpu/sparse/indexer.py)
//
//   z[t,j,s] = q[t,j] . k[s],  scores[t,s] = scale sum_j w[t,j] max(0, z[t,j,s])
//   m[t,j,s] = scale dscores[t,s] where z > 0, else 0;   u[t,j] = sum_s m[t,j,s] k[s]
//   dq[t,j] = w[t,j] u[t,j],  dw[t,j] = q[t,j] . u[t,j],  dk[s] += sum_tj m[t,j,s] w[t,j] q[t,j]
//
// q (B,Tq,HI*dI), w (B,Tq,HI); a row of k has dI columns, or HI*dI with a key for each head. Any dI.
//
// indexer_scores_forward: a tile of 64 queries and 64 keys a block
//   v1 a product, then its weighted sum over heads   z is HI times as large as the scores, and crosses memory twice
//   v2 heads one after another (this)                z of a tile lives in registers, scores are written once
// indexer_scores_dq, indexer_scores_dk: z again, then a second product with m, which is handed over in shared memory
//   v1 one pass                                      3 products, but dk needs float atomics
//   v2 two passes (this)                             4 products: queries stay for u, keys for dk. u in ranges of 256
//                                                    keys, else a few rows would leave most multiprocessors
//                                                    idle; indexer_finish adds the ranges in order
// indexer_gathered_forward: few keys a query
//   v1 a warp a key                                  five steps of shuffles for a sum of 64
//   v2 a thread a key (this)                         no shuffles: q is the same for all threads, a key's row is read
//                                                    from L1 for 4 heads at once
// indexer_gathered_signs, _u, _dk: m of each pair is computed once, then read by query for u and, through the inverse
// lists, by key for dk: O(T K HI dI), no atomics

#define TILE 64          // queries, keys and columns of a tile
#define RANGE 256        // keys that a block of indexer_scores_dq meets
#define GATHERED_HEADS 4 // heads that a thread of indexer_gathered_forward computes at once

using Product = GemmTile<TILE, TILE, 16, 4, 4, true, true>;       // rows by rows: z
using Values = Operand<TILE, 16, Product::THREADS, false>;        // rows of k or q as they lie, for the second product
using Row = float[TILE + 4];

// shared memory of a block, for both products
struct __align__(16) Shared {
    Product::Shared product;
    Row m[TILE];  // m by key and query for u, by query and key for dk
};

// total (64,64) += m^T (64,n) by rows first .. last - 1 of `values`, n <= 64: m[i] belongs to row first + i. a barrier
// must lie between the last use of `shared` and this
__device__ __forceinline__ void add_product(float (&total)[4][4], Shared& shared, Values values, int first, int last) {
    values.fetch(first, last);
    int buffer = 0;
    for (int k = first; k < last; k += 16, buffer ^= 1) {
        values.put(shared.product.b[buffer]);
        __syncthreads();
        if (k + 16 < last) { values.fetch(k + 16, last); }
#pragma unroll
        for (int step = 0; step < 16; step++) {
            Product::multiply_step(total, shared.m[k - first + step], shared.product.b[buffer][step]);
        }
    }
}

// --- whole rows ------------------------------------------------------------------------------------------------------

// scores (B,R,S) for the queries at first ..; grid (key tiles, query tiles, B)
extern "C" __global__ void __launch_bounds__(256)
indexer_scores_forward_kernel(float* __restrict__ scores, const float* __restrict__ q, const float* __restrict__ k,
                              const float* __restrict__ w, float scale, int R, int S, int Tq, int Tk, int HI, int dI,
                              int own_keys, int first, int start) {
    __shared__ Product::Shared shared;
    const int r0 = blockIdx.y * TILE, s0 = blockIdx.x * TILE;
    const int width = own_keys ? HI * dI : dI;
    const float* queries = q + ((size_t)blockIdx.z * Tq + first - start) * HI * dI;
    const float* keys = k + (size_t)blockIdx.z * Tk * width;
    const float* weights = w + ((size_t)blockIdx.z * Tq + first - start) * HI;

    float total[4][4] = {};
    if (s0 <= first + min(r0 + TILE, R) - 1) {  // not all of the future
        for (int j = 0; j < HI; j++) {
            float z[4][4];
            const Product::A a(queries + j * dI, HI * dI, r0, R);
            const Product::B b(keys + (own_keys ? j * dI : 0), width, s0, S);
            __syncthreads();  // the tiles of the head before have been read
            Product::multiply(z, shared, a, b, 0, dI);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int r = r0 + Product::row(i);
                const float weight = r < R ? weights[(size_t)r * HI + j] : 0.0f;
#pragma unroll
                for (int l = 0; l < 4; l++) { total[i][l] += weight * (z[i][l] < 0.0f ? 0.0f : z[i][l]); }
            }
        }
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int t = first + r0 + Product::row(i);
#pragma unroll
        for (int l = 0; l < 4; l++) {
            const int s = s0 + Product::column(l);
            total[i][l] = s <= t ? scale * total[i][l] : MINUS_INFINITY;
        }
    }
    write_tile<Product>(scores + (size_t)blockIdx.z * R * S, total, nullptr, r0, s0, R, S);
}

// z of a tile -> g where z > 0, times a weight for each query if there are any; g (R,S) for keys up to the query's own
__device__ __forceinline__ void gate(float (&z)[4][4], const float* dscores, const float* weights, float scale, int r0,
                                     int s0, int R, int S, int first, int HI) {
    const bool packed = S % 4 == 0 && aligned(dscores);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int r = r0 + Product::row(i), s = s0 + Product::column(0);
        const int keys = min(S, first + r + 1);
        const Pack<4> g = r < R ? load_up_to(dscores, (size_t)r * S + s, keys - s, packed) : zeros<4>();
        const float factor = weights && r < R ? scale * weights[(size_t)r * HI] : scale;
#pragma unroll
        for (int l = 0; l < 4; l++) { z[i][l] = z[i][l] > 0.0f ? factor * g.at[l] : 0.0f; }
    }
}

// parts (ranges,B,R,HI*dI): each range's share of u; grid (query tiles, HI * column tiles, B * ranges)
extern "C" __global__ void __launch_bounds__(256)
indexer_scores_dq_kernel(float* __restrict__ parts, const float* __restrict__ dscores, const float* __restrict__ q,
                         const float* __restrict__ k, float scale, int B, int R, int S, int T, int HI, int dI,
                         int own_keys, int first) {
    __shared__ Shared shared;
    const int r0 = blockIdx.x * TILE;
    const int j = blockIdx.y % HI, c0 = blockIdx.y / HI * TILE;
    const int b = blockIdx.z % B, range = blockIdx.z / B;
    const int end = min((range + 1) * RANGE, first + min(r0 + TILE, R));  // keys that some query of the tile has
    if (range * RANGE >= end) { return; }
    const int width = own_keys ? HI * dI : dI;
    const float* queries = q + ((size_t)b * T + first) * HI * dI + j * dI;
    const float* keys = k + (size_t)b * T * width + (own_keys ? j * dI : 0);
    dscores += (size_t)b * R * S;

    float u[4][4] = {};
    for (int s0 = range * RANGE; s0 < end; s0 += TILE) {
        float z[4][4];
        const Product::A rows(queries, HI * dI, r0, R);
        const Product::B columns(keys, width, s0, S);
        __syncthreads();
        Product::multiply(z, shared.product, rows, columns, 0, dI);
        gate(z, dscores, nullptr, scale, r0, s0, R, S, first, HI);
        __syncthreads();
#pragma unroll
        for (int l = 0; l < 4; l++) {
            Pack<4> of_key;
#pragma unroll
            for (int i = 0; i < 4; i++) { of_key.at[i] = z[i][l]; }
            store<4>(&shared.m[Product::column(l)][Product::row(0)], 0, of_key);
        }
        add_product(u, shared, Values(keys, width, c0, dI), s0, min(s0 + TILE, end));
    }
    const size_t part = ((size_t)range * B + b) * R;
    const bool packed = dI % 4 == 0;  // scratch is aligned
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int r = r0 + Product::row(i), c = c0 + Product::column(0);
        if (r >= R) { continue; }
        float* row = parts + (part + r) * HI * dI + j * dI;
        if (packed && c < dI) {
            Pack<4> values;
#pragma unroll
            for (int l = 0; l < 4; l++) { values.at[l] = u[i][l]; }
            store<4>(row + c, 0, values);
        } else {
#pragma unroll
            for (int l = 0; l < 4; l++) {
                if (c + l < dI) { row[c + l] = u[i][l]; }
            }
        }
    }
}

// dq (B,T,HI*dI), dw (B,T,HI) at rows first .. first + R - 1 from parts (ranges,B,R,HI*dI); a warp for each head of
// each of B * R rows. range: keys of a range, of which a row's tile of queries has as many as it takes; 0: there is one
extern "C" __global__ void __launch_bounds__(256)
indexer_finish_kernel(float* __restrict__ dq, float* __restrict__ dw, const float* __restrict__ parts,
                      const float* __restrict__ q, const float* __restrict__ w, int B, int R, int T, int HI, int dI,
                      int first, int tile, int range) {
    const int n = (blockIdx.x * blockDim.x + threadIdx.x) / WARP;
    if (n >= B * R * HI) { return; }
    const int j = n % HI, r = n / HI % R, b = n / HI / R;
    const int end = first + min((r / tile + 1) * tile, R);  // as in indexer_scores_dq_kernel
    const int ranges = range ? (end + range - 1) / range : 1;
    const size_t out = ((size_t)b * T + first + r) * HI + j;
    const size_t stride = (size_t)B * R * HI * dI;  // from range to range
    const float weight = w[out];
    const float* of_head = parts + (((size_t)b * R + r) * HI + j) * dI;
    float product = 0.0f;
    for (int c = threadIdx.x % WARP; c < dI; c += WARP) {
        float u = 0.0f;
#pragma unroll 1
        for (int part = 0; part < ranges; part++) { u += of_head[part * stride + c]; }
        product += q[out * dI + c] * u;
        dq[out * dI + c] = weight * u;
    }
    product = warp_sum(product);
    if (threadIdx.x % WARP == 0) { dw[out] = product; }
}

// dk (B,T,.) += ...; grid (key tiles, column tiles, times HI with own keys, B)
extern "C" __global__ void __launch_bounds__(256)
indexer_scores_dk_kernel(float* __restrict__ dk, const float* __restrict__ dscores, const float* __restrict__ q,
                         const float* __restrict__ k, const float* __restrict__ w, float scale, int R, int S, int T,
                         int HI, int dI, int own_keys, int first) {
    __shared__ Shared shared;
    const int s0 = blockIdx.x * TILE, b = blockIdx.z;
    const int width = own_keys ? HI * dI : dI;
    const int own = own_keys ? blockIdx.y % HI : 0;  // the head of these columns
    const int c0 = (own_keys ? blockIdx.y / HI : blockIdx.y) * TILE;
    const float* queries = q + ((size_t)b * T + first) * HI * dI;
    const float* keys = k + (size_t)b * T * width + own * dI;
    const float* weights = w + ((size_t)b * T + first) * HI;
    dscores += (size_t)b * R * S;
    const int end = min(S, first + R);  // the end of the keys that a query has

    float total[4][4] = {};
    for (int j = own; j < (own_keys ? own + 1 : HI); j++) {
        for (int r0 = max(0, (s0 - first) / TILE * TILE); r0 < R; r0 += TILE) {  // tiles before have none of these keys
            float z[4][4];
            const Product::A rows(queries + j * dI, HI * dI, r0, R);
            const Product::B columns(keys, width, s0, end);
            __syncthreads();
            Product::multiply(z, shared.product, rows, columns, 0, dI);
            gate(z, dscores, weights + j, scale, r0, s0, R, S, first, HI);
            __syncthreads();
#pragma unroll
            for (int i = 0; i < 4; i++) {
                Pack<4> of_query;
#pragma unroll
                for (int l = 0; l < 4; l++) { of_query.at[l] = z[i][l]; }
                store<4>(&shared.m[Product::row(i)][Product::column(0)], 0, of_query);
            }
            add_product(total, shared, Values(queries + j * dI, HI * dI, c0, dI), r0, min(r0 + TILE, R));
        }
    }
    const bool packed = width % 4 == 0 && dI % 4 == 0 && aligned(dk);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int s = s0 + Product::row(i), c = c0 + Product::column(0);
        if (s >= end) { continue; }
        float* row = dk + ((size_t)b * T + s) * width + own * dI;
        if (packed && c < dI) {
            Pack<4> values = load<4>(row + c, 0);
#pragma unroll
            for (int l = 0; l < 4; l++) { values.at[l] += total[i][l]; }
            store<4>(row + c, 0, values);
        } else {
#pragma unroll
            for (int l = 0; l < 4; l++) {
                if (c + l < dI) { row[c + l] += total[i][l]; }
            }
        }
    }
}

// --- gathered keys ---------------------------------------------------------------------------------------------------

// z[j] = q (HEADS,dI) . key, whose heads are `stride` columns apart, 0 if they share it. a head from `heads` on gives 0
template <int HEADS>
__device__ __forceinline__ void dot_heads(float (&z)[HEADS], const float* q, const float* key, int stride, int heads,
                                          int dI, bool packed) {
#pragma unroll
    for (int j = 0; j < HEADS; j++) { z[j] = 0.0f; }
    for (int c = 0; c < dI; c += 4) {
        const Pack<4> shared_key = load_up_to(key, c, dI - c, packed);
#pragma unroll
        for (int j = 0; j < HEADS; j++) {
            if (j >= heads) { continue; }
            const Pack<4> x = load_up_to(q + j * dI, c, dI - c, packed);
            const Pack<4> y = stride && j ? load_up_to(key + j * stride, c, dI - c, packed) : shared_key;
#pragma unroll
            for (int l = 0; l < 4; l++) { z[j] += x.at[l] * y.at[l]; }
        }
    }
}

// scores (B,T,K) of the keys index (B,T,K), -inf from count (B,T) on; a block for each of B * T queries
extern "C" __global__ void __launch_bounds__(128)
indexer_gathered_forward_kernel(float* __restrict__ scores, const float* __restrict__ q, const float* __restrict__ k,
                                const float* __restrict__ w, const int* __restrict__ index,
                                const int* __restrict__ count, float scale, int T, int K, int HI, int dI,
                                int own_keys) {
    const size_t n = blockIdx.x, b = n / T;
    const int width = own_keys ? HI * dI : dI, stride = own_keys ? dI : 0;
    const bool packed = dI % 4 == 0 && aligned(q, k);
    const int valid = count[n];
    for (int i = threadIdx.x; i < K; i += blockDim.x) {
        float score = MINUS_INFINITY;
        if (i < valid) {
            const float* key = k + (b * T + index[n * K + i]) * width;
            float total = 0.0f;
            for (int j0 = 0; j0 < HI; j0 += GATHERED_HEADS) {
                float z[GATHERED_HEADS];
                dot_heads(z, q + (n * HI + j0) * dI, key + j0 * stride, stride, HI - j0, dI, packed);
#pragma unroll
                for (int j = 0; j < GATHERED_HEADS; j++) {
                    if (j0 + j < HI) { total += w[n * HI + j0 + j] * (z[j] < 0.0f ? 0.0f : z[j]); }
                }
            }
            score = scale * total;
        }
        scores[n * K + i] = score;
    }
}

// m (B,T,K,HI) = scale dscores where z > 0, else 0; a block for each of B * T queries
extern "C" __global__ void __launch_bounds__(128)
indexer_gathered_signs_kernel(float* __restrict__ m, const float* __restrict__ dscores, const float* __restrict__ q,
                              const float* __restrict__ k, const int* __restrict__ index,
                              const int* __restrict__ count, float scale, int T, int K, int HI, int dI, int own_keys) {
    const size_t n = blockIdx.x, b = n / T;
    const int width = own_keys ? HI * dI : dI, stride = own_keys ? dI : 0;
    const bool packed = dI % 4 == 0 && aligned(q, k);
    const int valid = count[n];
    for (int i = threadIdx.x; i < valid; i += blockDim.x) {  // the others are not read
        const float* key = k + (b * T + index[n * K + i]) * width;
        const float g = scale * dscores[n * K + i];
        for (int j0 = 0; j0 < HI; j0 += GATHERED_HEADS) {
            float z[GATHERED_HEADS];
            dot_heads(z, q + (n * HI + j0) * dI, key + j0 * stride, stride, HI - j0, dI, packed);
#pragma unroll
            for (int j = 0; j < GATHERED_HEADS; j++) {
                if (j0 + j < HI) { m[(n * K + i) * HI + j0 + j] = z[j] > 0.0f ? g : 0.0f; }
            }
        }
    }
}

// u (B,T,HI*dI) = sum over the keys of a query of m k; grid (B * T, packs of columns / threads)
extern "C" __global__ void __launch_bounds__(256)
indexer_gathered_u_kernel(float* __restrict__ u, const float* __restrict__ m, const float* __restrict__ k,
                          const int* __restrict__ index, const int* __restrict__ count, int T, int K, int HI, int dI,
                          int own_keys) {
    const size_t n = blockIdx.x, b = n / T;
    const int width = own_keys ? HI * dI : dI, packs = (dI + 3) / 4;  // packs: of a head
    const bool packed = dI % 4 == 0 && aligned(k);
    const int thread = blockIdx.y * blockDim.x + threadIdx.x;
    const int j = thread / packs, c = thread % packs * 4;
    if (j >= HI) { return; }
    const float* keys = k + b * T * width + (own_keys ? j * dI : 0);
    Pack<4> total = zeros<4>();
    const int valid = count[n];
    for (int i = 0; i < valid; i++) {
        const float weight = m[(n * K + i) * HI + j];
        const Pack<4> key = load_up_to(keys + (size_t)index[n * K + i] * width, c, dI - c, packed);
        add_product(total, weight, key);
    }
    float* out = u + (n * HI + j) * dI;
    store_columns(out, c, dI, false, total);
}

// dk (B,T,.) = sum over the pairs of a key of m w q; grid (T, packs of columns / lanes, B). a block of `lanes` packs of
// four columns by groups that take turns at the key's pairs: those of the first keys are many
extern "C" __global__ void __launch_bounds__(256)
indexer_gathered_dk_kernel(float* __restrict__ dk, const float* __restrict__ m, const float* __restrict__ q,
                           const float* __restrict__ w, const int* __restrict__ offsets, const int* __restrict__ pairs,
                           int T, int K, int HI, int dI, int own_keys, int lanes) {
    __shared__ Pack<4> sums[256];
    const size_t b = blockIdx.z;
    const int s = blockIdx.x, packs = (dI + 3) / 4;
    const int width = own_keys ? HI * dI : dI;
    const bool packed = dI % 4 == 0 && aligned(q);
    const int column = blockIdx.y * lanes + threadIdx.x % lanes;  // in packs
    const int groups = blockDim.x / lanes, group = threadIdx.x / lanes;
    const int own = own_keys ? column / packs : 0, c = column % packs * 4;
    const bool mine = column < (own_keys ? HI * packs : packs);

    Pack<4> total = zeros<4>();
    const int end = offsets[b * (T + 1) + s + 1];
    for (int i = offsets[b * (T + 1) + s] + group; mine && i < end; i += groups) {
        const size_t pair = pairs[b * T * K + i];
        const size_t n = b * T + pair / K;  // its query
        for (int j = own; j < (own_keys ? own + 1 : HI); j++) {
            const float weight = m[(b * T * K + pair) * HI + j] * w[n * HI + j];
            const Pack<4> x = load_up_to(q + (n * HI + j) * dI, c, dI - c, packed);
            add_product(total, weight, x);
        }
    }
    sums[threadIdx.x] = total;
    __syncthreads();
    if (group > 0 || !mine) { return; }
    for (int g = 1; g < groups; g++) { add(total, sums[threadIdx.x + g * lanes]); }
    float* out = dk + (b * T + s) * width + own * dI;
    store_columns(out, c, dI, false, total);
}
