// band_matmul.cu: fully connected layer whose weight is zero outside a band (kernels/cpu/band/band_matmul.py)
//
// The band of a row follows from its index (common.cuh), no mask is stored. A tile of outputs meets the stretch of the
// inner dimension that the bands of its rows cover together, from the first row's start to the last row's stop:
//   v1 one thread an output      the reference's: reads the band alone, but every value from memory
//   v2 dense product, then mask  reads and multiplies everything
//   v3 tiles (this)              a dense tile's inner loop over the tile's own stretch

#define BM 128
#define BN 64
#define BK 16

// out (N,OC) from inp (N,C), weight (OC,C), bias (OC)
extern "C" __global__ void __launch_bounds__(256)
band_matmul_forward_kernel(float* __restrict__ out, const float* __restrict__ inp, const float* __restrict__ weight,
                           const float* __restrict__ bias, int N, int C, int OC, int bandwidth) {
    using Tile = GemmTile<BM, BN, BK, 8, 4, true, true>;
    __shared__ Tile::Shared shared;
    const int n0 = blockIdx.y * BM;
    const int oc0 = blockIdx.x * BN;
    const Band band = band_of_rows(oc0, BN, OC, C, bandwidth);
    float total[8][4];
    Tile::multiply(total, shared, Tile::A(inp, C, n0, N), Tile::B(weight, C, oc0, OC), band.start, band.stop);
    write_tile<Tile>(out, total, bias, n0, oc0, N, OC);
}

// dinp (N,C) = dout (N,OC) weight (OC,C): the band of the transposed weight
extern "C" __global__ void __launch_bounds__(256)
band_matmul_dinp_kernel(float* __restrict__ dinp, const float* __restrict__ dout, const float* __restrict__ weight, int N,
                        int C, int OC, int bandwidth) {
    using Tile = GemmTile<BM, BN, BK, 8, 4, true, false>;
    __shared__ Tile::Shared shared;
    const int n0 = blockIdx.y * BM;
    const int c0 = blockIdx.x * BN;
    const Band band = band_of_rows(c0, BN, C, OC, bandwidth);
    float total[8][4];
    Tile::multiply(total, shared, Tile::A(dout, OC, n0, N), Tile::B(weight, C, c0, C), band.start, band.stop);
    write_tile<Tile>(dinp, total, nullptr, n0, c0, N, C);
}

// dweight (OC,C) = beta * dweight + dout (N,OC)^T inp (N,C), inside the band alone
extern "C" __global__ void __launch_bounds__(256)
band_matmul_dweight_kernel(float* __restrict__ dweight, const float* __restrict__ dout, const float* __restrict__ inp,
                           int N, int C, int OC, int bandwidth, int beta) {
    using Tile = GemmTile<BM, BN, BK, 8, 4, false, false>;
    __shared__ Tile::Shared shared;
    const int oc0 = blockIdx.y * BM;
    const int c0 = blockIdx.x * BN;
    const Band band = band_of_rows(oc0, BM, OC, C, bandwidth);
    if (c0 >= band.stop || c0 + BN <= band.start) { return; }
    float total[8][4];
    Tile::multiply(total, shared, Tile::A(dout, OC, oc0, OC), Tile::B(inp, C, c0, C), 0, N);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const int oc = oc0 + Tile::row(i);
        if (oc >= OC) { continue; }
        const Band kept = band_of_row(oc, OC, C, bandwidth);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int c = c0 + Tile::column(j);
            if (c < kept.start || c >= kept.stop) { continue; }
            const size_t index = (size_t)oc * C + c;
            dweight[index] = beta ? dweight[index] + total[i][j] : total[i][j];
        }
    }
}
