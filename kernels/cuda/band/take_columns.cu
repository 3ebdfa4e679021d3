// take_columns.cu: columns of a matrix in another order (kernels/cpu/band/take_columns.py)
//
// Writes are coalesced, reads are scattered over a row, which is 12 KiB at C = 768 and stays in L1 meanwhile.

// out[n,c] = inp[n,index[c]]; out, inp (N,C), index (C); grid (ceil(C / threads), blocks of rows)
extern "C" __global__ void __launch_bounds__(256)
take_columns_kernel(float* __restrict__ out, const float* __restrict__ inp, const int* __restrict__ index, int N, int C) {
    const int c = blockIdx.x * blockDim.x + threadIdx.x;
    if (c >= C) { return; }
    const int source = index[c];
    for (int n = blockIdx.y; n < N; n += gridDim.y) { out[(size_t)n * C + c] = inp[(size_t)n * C + source]; }
}
