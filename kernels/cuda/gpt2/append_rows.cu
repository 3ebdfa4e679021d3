// append_rows.cu: new rows of a decoder's cache (kernels/cpu/gpt2/append_rows.py)
//
//   v1 the product writes them            its address, and with it every launch, hangs on the position
//   v2 a copy to where memory says (this) one launch more a layer, 2 us of an H100, but the same for every token

// cache (B,T,C) from rows (B,n,C), at start + *further
extern "C" __global__ void __launch_bounds__(256)
append_rows_kernel(float* __restrict__ cache, const float* __restrict__ rows, int B, int T, int n, int C, int start,
                   const int* __restrict__ further) {
    const size_t pack = (size_t)blockIdx.x * blockDim.x + threadIdx.x, size = (size_t)B * n * C;
    for (size_t i = 4 * pack; i < 4 * pack + 4 && i < size; i++) {
        const size_t row = i / C;
        cache[(row / n * T + start + *further + row % n) * C + i % C] = rows[i];
    }
}
