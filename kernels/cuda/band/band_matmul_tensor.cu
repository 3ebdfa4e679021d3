// band_matmul_tensor.cu: band_matmul.cu's products on tensor cores (kernels/cpu/band/band_matmul.py); tiles in
// gemm_mma.cuh. tf32: operands of products are rounded to nearest; 3xtf32: split, with float32's accuracy
//
//   v1 band_matmul.cu            FMAs, and the weight's gradient has a block for each of its few tiles
//   v2 mma, tokens in parts      the gradient's blocks share the tokens, a second kernel joins what they summed
//   v3 warps skip (this)         a warp leaves out the pieces that the bands of its own columns do not reach
//
// Band 256 of 4096 tokens, C = 768, on an H100, us of FC1 and FC2. Measured: v1, and v3 with splits of six operations
// and roundings of two, for each warp that reads a value. Expected: today's, from its operations. Bytes alone take 19 us.
// Sides of tiles are those that were the fastest there.
//
//              v1       | TF32: measured | expected | 3xTF32: measured | expected
//   forward    73  113  |       42   61  |  36   46 |         61    86  |   50   65
//   dinp      107   67  |       61   41  |  46   35 |         89    61  |   66   50
//   dweight   515  510  |       51   41  |  44   38 |         74    66  |   60   55

template <bool EXACT> constexpr int BM = EXACT ? 64 : 128;  // rows of inp and dout

// out (N,OC) from inp (N,C), weight (OC,C), bias (OC)
template <bool EXACT>
__device__ __forceinline__ void forward_tile(float* out, const float* inp, const float* weight, const float* bias,
                                             int N, int C, int OC, int bandwidth) {
    using T = MmaTile<BM<EXACT>, 64, 32, 32, 4, EXACT, true, true>;
    using Shared = typename T::Shared;
    __shared__ Shared shared;
    const int n0 = blockIdx.y * T::ROWS, oc0 = blockIdx.x * T::COLUMNS;
    const Band band = band_of_rows(oc0, T::COLUMNS, OC, C, bandwidth);
    const Band own = band_of_rows(oc0 + T::warp_column(), T::WARP_COLUMNS, OC, C, bandwidth);
    const typename T::A a(inp, C, n0, N, band.start);
    const typename T::B b(weight, C, oc0, OC, band.start);
    float total[T::MI][T::NI][4];
    T::multiply(total, shared, a, b, band.start, band.stop, own);
    write_tile<T>(out, total, bias, false, n0, oc0, N, OC);
}

// dinp (N,C) = dout (N,OC) weight (OC,C): the band of the transposed weight
template <bool EXACT>
__device__ __forceinline__ void dinp_tile(float* dinp, const float* dout, const float* weight, int N, int C, int OC,
                                          int bandwidth) {
    using T = MmaTile<BM<EXACT>, 64, 32, 32, 4, EXACT, true, false>;
    using Shared = typename T::Shared;
    __shared__ Shared shared;
    const int n0 = blockIdx.y * T::ROWS, c0 = blockIdx.x * T::COLUMNS;
    const Band band = band_of_rows(c0, T::COLUMNS, C, OC, bandwidth);
    const Band own = band_of_rows(c0 + T::warp_column(), T::WARP_COLUMNS, C, OC, bandwidth);
    const typename T::A a(dout, OC, n0, N, band.start);
    const typename T::B b(weight, C, c0, C, band.start);
    float total[T::MI][T::NI][4];
    T::multiply(total, shared, a, b, band.start, band.stop, own);
    write_tile<T>(dinp, total, nullptr, false, n0, c0, N, C);
}

// --- the weight's gradient -------------------------------------------------------------------------------------------
//
// Of either layer: a tile is 128 hidden units and some of the channels that their bands cover. 96 are all of them for
// band 256, and three quarters of the reads; in 3xTF32 a warp would not have the registers, and reads matter less.
// hidden (N,4C) and channel (N,C) are the layer's inp and dout, or dout and inp

template <bool EXACT> struct GradientTile {
    using T = MmaTile<128, 96, 32, 48, 3, false, false, false>;
};
template <> struct GradientTile<true> {
    using T = MmaTile<128, 64, 32, 32, 4, true, false, false>;
};

// corner of this block's tile; `used` unless it is past the band
template <class T> struct GradientPlace {
    int h0, c0;
    bool used;
    __device__ __forceinline__ GradientPlace(int C, int bandwidth) : h0(blockIdx.y * T::ROWS) {
        const Band band = band_of_rows(h0, T::ROWS, 4 * C, C, bandwidth);
        c0 = band.start + blockIdx.x * T::COLUMNS;
        used = c0 < band.stop;
    }
};

// dweight (4C,C), or (C,4C) if transposed, = beta * dweight + total in row group i, inside the band alone
template <class T>
__device__ __forceinline__ void write_band(float* dweight, const float (&total)[T::NI][4], GradientPlace<T> at, int i,
                                           int C, int bandwidth, int transposed, int beta) {
#pragma unroll
    for (int l = 0; l < 4; l++) {
        const int h = at.h0 + T::row(i, l);
        if (h >= 4 * C) { continue; }
        const Band kept = band_of_row(h, 4 * C, C, bandwidth);
#pragma unroll
        for (int j = 0; j < T::NI; j++) {
            const int c = at.c0 + T::column(j, l);
            if (c < kept.start || c >= kept.stop) { continue; }
            float* place = dweight + (transposed ? (size_t)c * 4 * C + h : (size_t)h * C + c);
            *place = beta ? *place + total[j][l] : total[j][l];
        }
    }
}

template <bool EXACT>
__device__ __forceinline__ void dweight_tile(float* dweight, float* parts, const float* hidden, const float* channel,
                                             int N, int C, int bandwidth, int rows, int transposed, int beta) {
    using T = typename GradientTile<EXACT>::T;
    using Shared = typename T::Shared;
    __shared__ Shared shared;
    const GradientPlace<T> at(C, bandwidth);
    if (!at.used) { return; }
    const int first = blockIdx.z * rows, last = min(first + rows, N);
    const int h = at.h0 + T::warp_row(), c = at.c0 + T::warp_column();
    const Band own = h < 4 * C ? band_of_rows(h, T::WARP_ROWS, 4 * C, C, bandwidth) : Band{0, 0};
    const bool meets = c < own.stop && c + T::WARP_COLUMNS > own.start;
    const typename T::A a(hidden, 4 * C, at.h0, 4 * C, first);
    const typename T::B b(channel, C, at.c0, C, first);
    float total[T::MI][T::NI][4];
    T::multiply(total, shared, a, b, first, last, meets ? ALL_K : Band{0, 0});
    if (gridDim.z > 1) {
        put_part<T>(parts, total);
        return;
    }
#pragma unroll
    for (int i = 0; i < T::MI; i++) { write_band<T>(dweight, total[i], at, i, C, bandwidth, transposed, beta); }
}

template <bool EXACT>
__device__ __forceinline__ void join_tile(float* dweight, const float* parts, int C, int bandwidth, int count,
                                          int transposed, int beta) {
    using T = typename GradientTile<EXACT>::T;
    const GradientPlace<T> at(C, bandwidth);
    if (!at.used) { return; }
    float total[T::NI][4];
    join_parts<T>(total, parts, count);
    write_band<T>(dweight, total, at, blockIdx.z, C, bandwidth, transposed, beta);
}

// --- kernels ---------------------------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(256, 2)
band_matmul_forward_tf32_kernel(float* __restrict__ out, const float* __restrict__ inp,
                                const float* __restrict__ weight, const float* __restrict__ bias, int N, int C, int OC,
                                int bandwidth) {
    FOR_TENSOR_CORES(forward_tile<false>(out, inp, weight, bias, N, C, OC, bandwidth);)
}

extern "C" __global__ void __launch_bounds__(128, 4)
band_matmul_forward_3xtf32_kernel(float* __restrict__ out, const float* __restrict__ inp,
                                  const float* __restrict__ weight, const float* __restrict__ bias, int N, int C,
                                  int OC, int bandwidth) {
    FOR_TENSOR_CORES(forward_tile<true>(out, inp, weight, bias, N, C, OC, bandwidth);)
}

extern "C" __global__ void __launch_bounds__(256, 2)
band_matmul_dinp_tf32_kernel(float* __restrict__ dinp, const float* __restrict__ dout, const float* __restrict__ weight,
                             int N, int C, int OC, int bandwidth) {
    FOR_TENSOR_CORES(dinp_tile<false>(dinp, dout, weight, N, C, OC, bandwidth);)
}

extern "C" __global__ void __launch_bounds__(128, 4)
band_matmul_dinp_3xtf32_kernel(float* __restrict__ dinp, const float* __restrict__ dout,
                               const float* __restrict__ weight, int N, int C, int OC, int bandwidth) {
    FOR_TENSOR_CORES(dinp_tile<true>(dinp, dout, weight, N, C, OC, bandwidth);)
}

// grid (channels, hidden units, parts), in tiles; parts of `rows` of the N rows each, if there are several
extern "C" __global__ void __launch_bounds__(256, 2)
band_matmul_dweight_tf32_kernel(float* __restrict__ dweight, float* __restrict__ parts,
                                const float* __restrict__ hidden, const float* __restrict__ channel, int N, int C,
                                int bandwidth, int rows, int transposed, int beta) {
    FOR_TENSOR_CORES(
        dweight_tile<false>(dweight, parts, hidden, channel, N, C, bandwidth, rows, transposed, beta);)
}

extern "C" __global__ void __launch_bounds__(256, 2)
band_matmul_dweight_3xtf32_kernel(float* __restrict__ dweight, float* __restrict__ parts,
                                  const float* __restrict__ hidden, const float* __restrict__ channel, int N, int C,
                                  int bandwidth, int rows, int transposed, int beta) {
    FOR_TENSOR_CORES(dweight_tile<true>(dweight, parts, hidden, channel, N, C, bandwidth, rows, transposed, beta);)
}

// dweight from `count` parts; grid (channels, hidden units, 2)
extern "C" __global__ void __launch_bounds__(256)
band_matmul_join_tf32_kernel(float* __restrict__ dweight, const float* __restrict__ parts, int C, int bandwidth,
                             int count, int transposed, int beta) {
    FOR_TENSOR_CORES(join_tile<false>(dweight, parts, C, bandwidth, count, transposed, beta);)
}

extern "C" __global__ void __launch_bounds__(256)
band_matmul_join_3xtf32_kernel(float* __restrict__ dweight, const float* __restrict__ parts, int C, int bandwidth,
                               int count, int transposed, int beta) {
    FOR_TENSOR_CORES(join_tile<true>(dweight, parts, C, bandwidth, count, transposed, beta);)
}
