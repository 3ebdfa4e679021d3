// band_mask.cu: zero what lies outside the band (kernels/cpu/band/band_mask.py)
//
//   v1 weight *= mask            reads and writes all of it, and holds a mask as large as the weight
//   v2 one warp a row (this)     the band follows from the row's index; only zeros are written, nothing is read

// weight (L,rows,columns); a warp for each of the L * rows rows
extern "C" __global__ void __launch_bounds__(256)
band_mask_kernel(float* __restrict__ weight, int L, int rows, int columns, int bandwidth) {
    const int row = (blockIdx.x * blockDim.x + threadIdx.x) / WARP;
    if (row >= L * rows) { return; }
    const Band band = band_of_row(row % rows, rows, columns, bandwidth);
    for (int column = threadIdx.x % WARP; column < columns; column += WARP) {
        if (column < band.start || column >= band.stop) { weight[(size_t)row * columns + column] = 0.0f; }
    }
}
