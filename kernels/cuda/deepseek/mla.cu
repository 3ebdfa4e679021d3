// mla.cu: between the products of multi-head latent attention (kernels/cpu/deepseek/mla.py); plain = hs - R
//
// mla_qkv_forward_kernel, mla_qkv_backward_kernel: every value is read once and written once
//   v1 a thread a value                    an angle for each head, and double arithmetic is slow on consumer GPUs
//   v2 a block a row (this)                the row's R / 2 rotations wait in shared memory; float4s on both sides
// mla_absorb_kernel, mla_expand_kernel: a product for each head, for the few queries of a decoder
//   v1 a thread an output                  each query reads the weight again
//   v2 QUERIES at a time (this)            a weight, read once by neighbouring lanes, serves 8 queries

#define QUERIES 8

// columns j .. j+W-1 of a part of a row, rotated; or of the sum of `parts` such parts, `stride` apart. W is 4 with j a
// multiple of 4, or 1
template <int W>
__device__ __forceinline__ Pack<W> rotated(const float* part, int parts, int stride, int j, const Rotation* rotations,
                                           bool back) {
    constexpr int PAIRS = (W + 1) / 2;
    float a[PAIRS], b[PAIRS];
#pragma unroll
    for (int k = 0; k < PAIRS; k++) { a[k] = b[k] = 0.0f; }
#pragma unroll 2
    for (int p = 0; p < parts; p++, part += stride) {
        if (W == 4) {
            const Pack<4> x = load<4>(part + j, 0);
#pragma unroll
            for (int k = 0; k < PAIRS; k++) {
                a[k] += x.at[2 * k];
                b[k] += x.at[2 * k + 1];
            }
        } else {
            a[0] += part[j & ~1];
            b[0] += part[j | 1];
        }
    }
    Pack<W> out;
#pragma unroll
    for (int k = 0; k < W; k++) {
        const Rotation r = rotations[(j + k) / 2];
        const float sine = back ? -r.sine : r.sine;
        out.at[k] = (j + k) % 2 ? a[k / 2] * sine + b[k / 2] * r.cosine : a[k / 2] * r.cosine - b[k / 2] * sine;
    }
    return out;
}

// rotations (R/2) of a position, by all threads of the block
__device__ __forceinline__ void make_rotations(Rotation* rotations, int position, int R) {
    for (int pair = threadIdx.x; pair < R / 2; pair += blockDim.x) {
        rotations[pair] = rotation(position, pair, R);
    }
    __syncthreads();
}

template <int W>
__device__ __forceinline__ void qkv_row(float* qkv, const float* q, const float* kv, const float* shared_key,
                                        const Rotation* rotations, int NH, int hs, int R) {
    const int C = NH * hs;
    const int plain = hs - R;
    for (int column = threadIdx.x * W; column < 3 * C; column += blockDim.x * W) {
        const int third = column / C;
        const int c = column - third * C;
        const int h = c / hs;
        const int d = c - h * hs;
        const float* head = kv + h * (2 * hs - R);
        Pack<W> x;
        if (third == 2) {
            x = load<W>(head + plain + d, 0);
        } else if (d < plain) {
            x = load<W>(third == 0 ? q + c : head + d, 0);
        } else {
            x = rotated<W>(third == 0 ? q + h * hs + plain : shared_key, 1, 0, d - plain, rotations, false);
        }
        store<W>(qkv + column, 0, x);
    }
}

// qkv (B*T,3C) from q (B*T,C), kv (B*T,NH*(2hs-R)), kva (B*T,kv_rank+R); row n is at position start + n % T. a block a
// row; R / 2 rotations of dynamic shared memory
extern "C" __global__ void __launch_bounds__(256)
mla_qkv_forward_kernel(float* __restrict__ qkv, const float* __restrict__ q, const float* __restrict__ kv,
                       const float* __restrict__ kva, int T, int NH, int hs, int R, int kv_rank, int start) {
    extern __shared__ Rotation rotations[];
    const size_t n = blockIdx.x;
    make_rotations(rotations, start + blockIdx.x % T, R);
    const bool packed = (hs | R | kv_rank) % 4 == 0 && aligned(qkv, q, kv, kva);
    qkv += n * 3 * NH * hs;
    q += n * NH * hs;
    kv += n * NH * (2 * hs - R);
    kva += n * (kv_rank + R) + kv_rank;
    if (packed) {
        qkv_row<4>(qkv, q, kv, kva, rotations, NH, hs, R);
    } else {
        qkv_row<1>(qkv, q, kv, kva, rotations, NH, hs, R);
    }
}

template <int W>
__device__ __forceinline__ void qkv_row_backward(float* dq, float* dkv, float* dshared_key, const float* dqkv,
                                                 const Rotation* rotations, int NH, int hs, int R) {
    const int C = NH * hs;
    const int plain = hs - R;
    const int width = 2 * hs - R;
    const float* dkey = dqkv + C;
    const float* dvalue = dkey + C;
    for (int column = threadIdx.x * W; column < C; column += blockDim.x * W) {
        const int d = column % hs;
        store<W>(dq + column, 0, d < plain ? load<W>(dqkv + column, 0)
                                           : rotated<W>(dqkv + column - d + plain, 1, 0, d - plain, rotations, true));
    }
    for (int column = threadIdx.x * W; column < NH * width; column += blockDim.x * W) {
        const int h = column / width;
        const int d = column - h * width;
        store<W>(dkv + column, 0, load<W>(d < plain ? dkey + h * hs + d : dvalue + h * hs + d - plain, 0));
    }
    for (int column = threadIdx.x * W; column < R; column += blockDim.x * W) {
        store<W>(dshared_key + column, 0, rotated<W>(dkey + plain, NH, hs, column, rotations, true));
    }
}

// dq, dkv and the last R columns of dkva = ... from dqkv (B*T,3C), as above
extern "C" __global__ void __launch_bounds__(256)
mla_qkv_backward_kernel(float* __restrict__ dq, float* __restrict__ dkv, float* __restrict__ dkva,
                        const float* __restrict__ dqkv, int T, int NH, int hs, int R, int kv_rank) {
    extern __shared__ Rotation rotations[];
    const size_t n = blockIdx.x;
    make_rotations(rotations, blockIdx.x % T, R);
    const bool packed = (hs | R | kv_rank) % 4 == 0 && aligned(dq, dkv, dkva, dqkv);
    dq += n * NH * hs;
    dkv += n * NH * (2 * hs - R);
    dkva += n * (kv_rank + R) + kv_rank;
    dqkv += n * 3 * NH * hs;
    if (packed) {
        qkv_row_backward<4>(dq, dkv, dkva, dqkv, rotations, NH, hs, R);
    } else {
        qkv_row_backward<1>(dq, dkv, dkva, dqkv, rotations, NH, hs, R);
    }
}

// rows start .. start+n-1 of latent (S,kv_rank+R) = [normed ; RoPE(kr)]: normed (n,kv_rank), kr the last R columns of
// kva (n,kv_rank+R). a block a row
extern "C" __global__ void __launch_bounds__(256)
mla_latent_kernel(float* __restrict__ latent, const float* __restrict__ normed, const float* __restrict__ kva, int R,
                  int kv_rank, int start) {
    const int position = start + blockIdx.x;
    latent += (size_t)position * (kv_rank + R);
    normed += (size_t)blockIdx.x * kv_rank;
    kva += (size_t)blockIdx.x * (kv_rank + R);
    for (int column = threadIdx.x; column < kv_rank; column += blockDim.x) { latent[column] = normed[column]; }
    turn_rows(latent + kv_rank, 0, kva + kv_rank, 0, 1, R, position);
}

// qlat (n,NH,kv_rank+R) = [q plain of head h times W^UK_h ; RoPE(q rest)] from q (n,C) and kvbw, where W^UK_h
// (plain,kv_rank) is the first `plain` of head h's 2hs-R rows. grid (NH, blocks of QUERIES queries, blocks of columns),
// a thread a column; QUERIES * plain floats of dynamic shared memory
extern "C" __global__ void __launch_bounds__(128)
mla_absorb_kernel(float* __restrict__ qlat, const float* __restrict__ q, const float* __restrict__ kvbw, int n, int NH,
                  int hs, int R, int kv_rank, int start) {
    extern __shared__ Pack<4> tile[];  // (plain,QUERIES): a dimension of all queries is two float4s
    const int h = blockIdx.x;
    const int plain = hs - R;
    const int first = blockIdx.y * QUERIES;
    const int queries = min(QUERIES, n - first);
    const float* head = q + ((size_t)first * NH + h) * hs;
    float* out = qlat + ((size_t)first * NH + h) * (kv_rank + R);
    for (int i = threadIdx.x; i < QUERIES * plain; i += blockDim.x) {
        const int query = i / plain;
        const int d = i - query * plain;
        tile[2 * d + query / 4].at[query % 4] = query < queries ? head[(size_t)query * NH * hs + d] : 0.0f;
    }
    __syncthreads();

    const int column = blockIdx.z * blockDim.x + threadIdx.x;
    if (column < kv_rank) {
        const float* weight = kvbw + (size_t)h * (2 * hs - R) * kv_rank + column;
        float sums[QUERIES];
#pragma unroll
        for (int query = 0; query < QUERIES; query++) { sums[query] = 0.0f; }
#pragma unroll 4
        for (int d = 0; d < plain; d++) {
            const float w = weight[(size_t)d * kv_rank];
            const Pack<4> low = tile[2 * d], high = tile[2 * d + 1];
#pragma unroll
            for (int j = 0; j < 4; j++) {
                sums[j] += w * low.at[j];
                sums[j + 4] += w * high.at[j];
            }
        }
#pragma unroll
        for (int query = 0; query < QUERIES; query++) {
            if (query < queries) { out[(size_t)query * NH * (kv_rank + R) + column] = sums[query]; }
        }
    }

    if (blockIdx.z > 0) { return; }
    turn_rows(out + kv_rank, (size_t)NH * (kv_rank + R), head + plain, (size_t)NH * hs, queries, R, start + first);
}

template <int W>
__device__ __forceinline__ void expand(float* out, const float* latents, const float* weight, int queries, int stride,
                                       int out_stride, int kv_rank) {
    const int lane = threadIdx.x % WARP;
    const int packs = kv_rank / W;
    float sums[QUERIES];
#pragma unroll
    for (int query = 0; query < QUERIES; query++) { sums[query] = 0.0f; }
    for (int i = lane; i < packs; i += WARP) {
        const Pack<W> w = load<W>(weight, i);
#pragma unroll
        for (int query = 0; query < QUERIES; query++) {
            if (query >= queries) { break; }
            const Pack<W> x = load<W>(latents + (size_t)query * stride, i);
#pragma unroll
            for (int j = 0; j < W; j++) { sums[query] += x.at[j] * w.at[j]; }
        }
    }
#pragma unroll
    for (int query = 0; query < QUERIES; query++) {
        const float total = warp_sum(sums[query]);
        if (lane == 0 && query < queries) { out[(size_t)query * out_stride] = total; }
    }
}

// out (n,C): head h is olat[:,h] (n,kv_rank) times W^UV_h^T, W^UV_h (hs,kv_rank) being the last hs of head h's rows of
// kvbw. grid (NH, blocks of QUERIES queries, blocks of columns), a warp a column
extern "C" __global__ void __launch_bounds__(256)
mla_expand_kernel(float* __restrict__ out, const float* __restrict__ olat, const float* __restrict__ kvbw, int n,
                  int NH, int hs, int R, int kv_rank) {
    const int h = blockIdx.x;
    const int first = blockIdx.y * QUERIES;
    const int queries = min(QUERIES, n - first);
    const int d = (blockIdx.z * blockDim.x + threadIdx.x) / WARP;
    if (d >= hs) { return; }
    const float* latents = olat + ((size_t)first * NH + h) * kv_rank;
    const float* weight = kvbw + ((size_t)h * (2 * hs - R) + hs - R + d) * kv_rank;
    out += ((size_t)first * NH + h) * hs + d;
    if (kv_rank % 4 == 0 && aligned(olat, kvbw)) {
        expand<4>(out, latents, weight, queries, NH * kv_rank, NH * hs, kv_rank);
    } else {
        expand<1>(out, latents, weight, queries, NH * kv_rank, NH * hs, kv_rank);
    }
}
