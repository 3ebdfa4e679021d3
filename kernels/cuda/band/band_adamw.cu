// band_adamw.cu: AdamW on the band of banded weights (kernels/cpu/band/band_adamw.py; update_adamw of common.cuh)
//
//   v1 adamw.cu on all of it        most of what it reads and writes is zero
//   v2 one warp a row (this)        visits the columns inside the band, which it works out by itself; outside all
//                                   four are zero and stay so

// params, grads, m, v (L,rows,columns), rates (6), norm (1); a warp for each of the L * rows rows
extern "C" __global__ void __launch_bounds__(256)
band_adamw_kernel(float* __restrict__ params, const float* __restrict__ grads, float* __restrict__ m,
                  float* __restrict__ v, int L, int rows, int columns, int bandwidth,
                  const float* __restrict__ rates, const float* __restrict__ norm) {
    const AdamwRates r = adamw_rates(rates, norm);
    const int row = (blockIdx.x * blockDim.x + threadIdx.x) / WARP;
    if (row >= L * rows) { return; }
    const Band band = band_of_row(row % rows, rows, columns, bandwidth);
    for (int column = band.start + threadIdx.x % WARP; column < band.stop; column += WARP) {
        const size_t i = (size_t)row * columns + column;
        update_adamw(params[i], grads[i], m[i], v[i], r);
    }
}
