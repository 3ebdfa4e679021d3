// sparse_attention.cu: attention over selected keys, and its probabilities averaged over heads; formulas in
// kernels/cpu/sparse/sparse_attention.py
//
// qkv (B,T,3C): in row (b,t), the q, k and v of head h start at columns h*hs, C + h*hs and 2C + h*hs. index (B,Tq,K),
// count (B,Tq), out (B*Tq,C), lse (B,NH,Tq) with Tq = T - start. hs from 1 to 128; lanes hold HS = 64 or 128 columns.
//
// sparse_attention_forward: a list of keys for each query, anywhere in the sequence
//   v1 tiles of attention_forward and a mask   T keys are read and multiplied, of which K count
//   v2 one block a query, its keys gathered    heads one after another between barriers; few loads in flight
//      into shared memory
//   v3 one warp a query and head (this)        no barrier, no shared memory; HS/4 lanes share a key, 4 keys each in
//                                              flight. warps of a block are heads of one query: they read whole rows
//                                              of k and v together, and its list once, from L1
//
// sparse_attention_dq: the same, with a = exp(q . k / sqrt(hs) - lse) again. sparse_attention_dkdv: queries of a key
//   v1 scattered from the queries              float atomics: new bits every time, and popular keys wait in line
//   v2 one warp a key and head, by inverse     a key that all queries select keeps one warp busy for T of them
//      lists (inverse_lists.cu)
//   v3 one block of 4 warps (this)             each warp takes every fourth query; joined last, in a fixed order
//
// sparse_attention_mean: one block a query, a warp for every eighth key, 16 lanes for every second head of it
//
// Bytes: what is gathered comes from L2, 2K rows of C floats for each query forward, 4K backward in both passes
// together, for a quarter to half an FMA a byte: the rate of L2 is the limit, not the FMAs.

#define FLIGHT 4                   // keys or queries that a group of lanes loads at a time

// over the groups of LANES lanes of a warp, column by column
template <int LANES> __device__ __forceinline__ Pack<4> sum_of_groups(Pack<4> x) {
#pragma unroll
    for (int step = LANES; step < WARP; step *= 2) {
#pragma unroll
        for (int j = 0; j < 4; j++) { x.at[j] += __shfl_xor_sync(ALL_LANES, x.at[j], step); }
    }
    return x;
}

// --- forward ---------------------------------------------------------------------------------------------------------

template <int HS>
__device__ __forceinline__ void forward_query(float* out, float* lse, const float* qkv, const int* index,
                                              const int* count, int T, int NH, int hs, int K, int start, int rows) {
    constexpr int LANES = HS / 4, SHARES = WARP / LANES;
    const int row = (blockIdx.x * blockDim.x + threadIdx.x) / WARP;  // (b,t,h)
    if (row >= rows) { return; }
    const int share = threadIdx.x % WARP / LANES, column = threadIdx.x % LANES * 4;
    const int Tq = T - start, C = NH * hs, h = row % NH, query = row / NH;  // (b,t)
    const size_t b = query / Tq, stride = 3 * C;
    const bool packed = hs % 4 == 0 && aligned(qkv, out);
    const float scale = LOG2E / sqrtf(hs);
    const float* queries = qkv + b * T * stride + h * hs;
    const float* keys = queries + C;
    const float* values = keys + C;
    const int* list = index + (size_t)query * K;
    const int n = count[query];

    const Pack<4> q = load_columns(queries + (start + query % Tq) * stride, column, hs, packed);
    Pack<4> sums = zeros<4>();
    float top = MINUS_INFINITY, total = 0.0f;
    for (int first = 0; first < n; first += FLIGHT * SHARES) {
        Pack<4> value[FLIGHT];
        float p[FLIGHT];
#pragma unroll
        for (int i = 0; i < FLIGHT; i++) {
            const int j = first + share + i * SHARES;
            const int columns = j < n ? hs : 0;  // behind the list nothing is read
            const size_t key = j < n ? list[j] : 0;
            p[i] = dot(q, load_columns(keys + key * stride, column, columns, packed));
            value[i] = load_columns(values + key * stride, column, columns, packed);
        }
        const float before = top;
#pragma unroll
        for (int i = 0; i < FLIGHT; i++) {
            p[i] = group_sum<LANES>(p[i]) * scale;
            if (first + share + i * SHARES < n) { top = fmaxf(top, p[i]); }
        }
        const float shrink = top == before ? 1.0f : exp2f(before - top);  // -inf - -inf, without a key yet, is NaN
        total *= shrink;
        sums = times(shrink, sums);
#pragma unroll
        for (int i = 0; i < FLIGHT; i++) {
            const float weight = first + share + i * SHARES < n ? exp2f(p[i] - top) : 0.0f;
            total += weight;
            add_product(sums, weight, value[i]);
        }
    }

    float largest = top;  // the largest of all groups, of which the first one has a key
#pragma unroll
    for (int step = LANES; step < WARP; step *= 2) {
        largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, step));
    }
    const float shrink = exp2f(top - largest);
    total *= shrink;
#pragma unroll
    for (int step = LANES; step < WARP; step *= 2) { total += __shfl_xor_sync(ALL_LANES, total, step); }
    sums = sum_of_groups<LANES>(times(shrink, sums));
    if (share == 0) { store_columns(out + (size_t)row * hs, column, hs, packed, times(1.0f / total, sums)); }
    if (threadIdx.x % WARP == 0) { lse[(b * NH + h) * Tq + query % Tq] = LN2 * (largest + log2f(total)); }
}

extern "C" __global__ void __launch_bounds__(256)
sparse_attention_forward_64_kernel(float* __restrict__ out, float* __restrict__ lse, const float* __restrict__ qkv,
                                   const int* __restrict__ index, const int* __restrict__ count, int T, int NH,
                                   int hs, int K, int start, int rows) {
    forward_query<64>(out, lse, qkv, index, count, T, NH, hs, K, start, rows);
}

extern "C" __global__ void __launch_bounds__(256)
sparse_attention_forward_128_kernel(float* __restrict__ out, float* __restrict__ lse, const float* __restrict__ qkv,
                                    const int* __restrict__ index, const int* __restrict__ count, int T, int NH,
                                    int hs, int K, int start, int rows) {
    forward_query<128>(out, lse, qkv, index, count, T, NH, hs, K, start, rows);
}

// --- backward --------------------------------------------------------------------------------------------------------

// delta (B,NH,T) = dout . out over the columns of a head
template <int HS>
__device__ __forceinline__ void dq_query(float* dqkv, const float* dout, const float* qkv, const float* lse,
                                         const float* delta, const int* index, const int* count, int T, int NH, int hs,
                                         int K, int rows) {
    constexpr int LANES = HS / 4, SHARES = WARP / LANES;
    const int row = (blockIdx.x * blockDim.x + threadIdx.x) / WARP;  // (b,t,h)
    if (row >= rows) { return; }
    const int share = threadIdx.x % WARP / LANES, column = threadIdx.x % LANES * 4;
    const int C = NH * hs, h = row % NH, query = row / NH;
    const size_t b = query / T, stride = 3 * C;
    const bool packed = hs % 4 == 0 && aligned(qkv, dout, dqkv);
    const float scale = LOG2E / sqrtf(hs);
    const float* keys = qkv + b * T * stride + C + h * hs;
    const float* values = keys + C;
    const int* list = index + (size_t)query * K;
    const int n = count[query];
    const float log_sum = LOG2E * lse[(b * NH + h) * T + query % T];
    const float d = delta[(b * NH + h) * T + query % T];

    const Pack<4> q = load_columns(qkv + query * stride + h * hs, column, hs, packed);
    const Pack<4> dy = load_columns(dout + (size_t)row * hs, column, hs, packed);
    Pack<4> dq = zeros<4>();
    for (int first = 0; first < n; first += FLIGHT * SHARES) {
        Pack<4> k[FLIGHT];
        float s[FLIGHT], da[FLIGHT];
#pragma unroll
        for (int i = 0; i < FLIGHT; i++) {
            const int j = first + share + i * SHARES;
            const int columns = j < n ? hs : 0;
            const size_t key = j < n ? list[j] : 0;
            k[i] = load_columns(keys + key * stride, column, columns, packed);
            s[i] = dot(q, k[i]);
            da[i] = dot(dy, load_columns(values + key * stride, column, columns, packed));
        }
#pragma unroll
        for (int i = 0; i < FLIGHT; i++) {
            const float a = exp2f(group_sum<LANES>(s[i]) * scale - log_sum);
            const float ds = a * (group_sum<LANES>(da[i]) - d);
            if (first + share + i * SHARES < n) { add_product(dq, ds, k[i]); }
        }
    }
    dq = times(1.0f / sqrtf(hs), sum_of_groups<LANES>(dq));
    if (share == 0) { store_columns(dqkv + query * stride + h * hs, column, hs, packed, dq); }
}

extern "C" __global__ void __launch_bounds__(256)
sparse_attention_dq_64_kernel(float* __restrict__ dqkv, const float* __restrict__ dout, const float* __restrict__ qkv,
                              const float* __restrict__ lse, const float* __restrict__ delta,
                              const int* __restrict__ index, const int* __restrict__ count, int T, int NH, int hs,
                              int K, int rows) {
    dq_query<64>(dqkv, dout, qkv, lse, delta, index, count, T, NH, hs, K, rows);
}

extern "C" __global__ void __launch_bounds__(256)
sparse_attention_dq_128_kernel(float* __restrict__ dqkv, const float* __restrict__ dout, const float* __restrict__ qkv,
                               const float* __restrict__ lse, const float* __restrict__ delta,
                               const int* __restrict__ index, const int* __restrict__ count, int T, int NH, int hs,
                               int K, int rows) {
    dq_query<128>(dqkv, dout, qkv, lse, delta, index, count, T, NH, hs, K, rows);
}

// a block for each (b,s,h); group g of its SHARES groups of lanes takes the key's queries g, g + SHARES, ...
template <int HS, int THREADS>
__device__ __forceinline__ void dkdv_key(float* dqkv, const float* dout, const float* qkv, const float* lse,
                                         const float* delta, const int* offsets, const int* pairs, int T, int NH,
                                         int hs, int K) {
    constexpr int LANES = HS / 4, SHARES = THREADS / LANES;
    __shared__ Pack<4> share_dk[SHARES][LANES], share_dv[SHARES][LANES];
    const int share = threadIdx.x / LANES, lane = threadIdx.x % LANES, column = lane * 4;
    const int C = NH * hs, h = blockIdx.x % NH, s = blockIdx.x / NH % T;
    const size_t b = blockIdx.x / NH / T, stride = 3 * C;
    const bool packed = hs % 4 == 0 && aligned(qkv, dout, dqkv);
    const float scale = LOG2E / sqrtf(hs);
    const float* queries = qkv + b * T * stride + h * hs;
    const float* douts = dout + b * T * C + h * hs;
    const size_t row = (b * NH + h) * T;
    const int* list = pairs + b * T * K;
    const int begin = offsets[b * (T + 1) + s], end = offsets[b * (T + 1) + s + 1];

    const Pack<4> k = load_columns(queries + s * stride + C, column, hs, packed);
    const Pack<4> v = load_columns(queries + s * stride + 2 * C, column, hs, packed);
    Pack<4> dk = zeros<4>(), dv = zeros<4>();
    for (int first = begin; first < end; first += FLIGHT * SHARES) {
        Pack<4> q[FLIGHT], dy[FLIGHT];
        float log_sum[FLIGHT], d[FLIGHT];
#pragma unroll
        for (int i = 0; i < FLIGHT; i++) {
            const int pair = first + share + i * SHARES;
            const int columns = pair < end ? hs : 0;
            const size_t t = pair < end ? list[pair] / K : 0;
            q[i] = load_columns(queries + t * stride, column, columns, packed);
            dy[i] = load_columns(douts + t * C, column, columns, packed);
            log_sum[i] = pair < end ? LOG2E * lse[row + t] : -MINUS_INFINITY;  // behind the list: a = 0, ds = 0
            d[i] = pair < end ? delta[row + t] : 0.0f;
        }
#pragma unroll
        for (int i = 0; i < FLIGHT; i++) {
            const float a = exp2f(group_sum<LANES>(dot(q[i], k)) * scale - log_sum[i]);
            const float ds = a * (group_sum<LANES>(dot(dy[i], v)) - d[i]);
            add_product(dk, ds, q[i]);
            add_product(dv, a, dy[i]);
        }
    }
    share_dk[share][lane] = dk;
    share_dv[share][lane] = dv;
    __syncthreads();
    if (share > 0) { return; }
    for (int other = 1; other < SHARES; other++) {
        add(dk, share_dk[other][lane]);
        add(dv, share_dv[other][lane]);
    }
    float* grads = dqkv + (b * T + s) * stride + h * hs;
    store_columns(grads + C, column, hs, packed, times(1.0f / sqrtf(hs), dk));
    store_columns(grads + 2 * C, column, hs, packed, dv);
}

extern "C" __global__ void __launch_bounds__(128)
sparse_attention_dkdv_64_kernel(float* __restrict__ dqkv, const float* __restrict__ dout, const float* __restrict__ qkv,
                                const float* __restrict__ lse, const float* __restrict__ delta,
                                const int* __restrict__ offsets, const int* __restrict__ pairs, int T, int NH, int hs,
                                int K) {
    dkdv_key<64, 128>(dqkv, dout, qkv, lse, delta, offsets, pairs, T, NH, hs, K);
}

extern "C" __global__ void __launch_bounds__(128)
sparse_attention_dkdv_128_kernel(float* __restrict__ dqkv, const float* __restrict__ dout,
                                 const float* __restrict__ qkv, const float* __restrict__ lse,
                                 const float* __restrict__ delta, const int* __restrict__ offsets,
                                 const int* __restrict__ pairs, int T, int NH, int hs, int K) {
    dkdv_key<128, 128>(dqkv, dout, qkv, lse, delta, offsets, pairs, T, NH, hs, K);
}

// --- mean over heads -------------------------------------------------------------------------------------------------

#define MEAN_LANES 16  // lanes that share a head

// p (B,T,K); a block for each query
extern "C" __global__ void __launch_bounds__(256)
sparse_attention_mean_kernel(float* __restrict__ p, const float* __restrict__ qkv, const float* __restrict__ lse,
                             const int* __restrict__ index, const int* __restrict__ count, int T, int NH, int hs,
                             int K) {
    const int group = threadIdx.x % WARP / MEAN_LANES, lane = threadIdx.x % MEAN_LANES;
    const int C = NH * hs, query = blockIdx.x;
    const size_t b = query / T, stride = 3 * C;
    const bool packed = hs % 4 == 0 && aligned(qkv);
    const float scale = LOG2E / sqrtf(hs);
    const int n = count[query];
    for (int j = threadIdx.x / WARP; j < K; j += blockDim.x / WARP) {
        const size_t place = (size_t)query * K + j;
        float total = 0.0f;
        if (j < n) {
            const float* q = qkv + query * stride;
            const float* k = qkv + (b * T + index[place]) * stride + C;
            for (int h = group; h - group < NH; h += WARP / MEAN_LANES) {
                const int columns = h < NH ? hs : 0;
                float s = 0.0f;
#pragma unroll 1
                for (int column = lane * 4; column < hs; column += MEAN_LANES * 4) {
                    s += dot(load_columns(q + h * hs, column, columns, packed),
                             load_columns(k + h * hs, column, columns, packed));
                }
                s = group_sum<MEAN_LANES>(s);
                if (h < NH) { total += exp2f(s * scale - LOG2E * lse[(b * NH + h) * T + query % T]); }
            }
            total += __shfl_xor_sync(ALL_LANES, total, MEAN_LANES);
        }
        if (threadIdx.x % WARP == 0) { p[place] = total / NH; }
    }
}
