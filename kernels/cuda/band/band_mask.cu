// band_mask.cu: zero what lies outside the band (kernels/cpu/band/band_mask.py)
//
//   v1 weight *= mask            reads and writes all of it, and holds a mask as large as the weight
//   v2 one warp a row (this)     the band follows from the row's index; only zeros are written, nothing is read

// zero row `row` of (L*rows,columns) but for the columns that row `place` of the band keeps; by a warp
__device__ __forceinline__ void mask_row(float* __restrict__ weight, int row, int place, int rows, int columns,
                                         int bandwidth) {
    const Band band = band_of_row(place, rows, columns, bandwidth);
    for (int column = threadIdx.x % WARP; column < columns; column += WARP) {
        if (column < band.start || column >= band.stop) { weight[(size_t)row * columns + column] = 0.0f; }
    }
}

// weight (L,rows,columns); a warp for each of the L * rows rows
extern "C" __global__ void __launch_bounds__(256)
band_mask_kernel(float* __restrict__ weight, int L, int rows, int columns, int bandwidth) {
    const int row = (blockIdx.x * blockDim.x + threadIdx.x) / WARP;
    if (row < L * rows) { mask_row(weight, row, row % rows, rows, columns, bandwidth); }
}

// the same with the rows' places along the band, place (rows)
extern "C" __global__ void __launch_bounds__(256)
band_mask_placed_kernel(float* __restrict__ weight, const int* __restrict__ place, int L, int rows, int columns,
                        int bandwidth) {
    const int row = (blockIdx.x * blockDim.x + threadIdx.x) / WARP;
    if (row < L * rows) { mask_row(weight, row, place[row % rows], rows, columns, bandwidth); }
}
