// matmul_row.cu: a fully connected layer of one row, a decoder's token (kernels/cpu/gpt2/matmul.py)
//
//   v1 cuBLAS, then add_bias_kernel    two launches, each of which takes the host longer than the weights their way
//   v2 a warp a value (this)           one launch; a weight is read once, coalesced, several loads in flight a lane
//
// Bytes: the weights, 4 OC K, once. Of 2 OC K flops the GPU has plenty. Sums are float32's, also where products are TF32.

// out (OC) = inp (K) . weight (OC,K) + bias (OC), which is not read unless `biased`
extern "C" __global__ void __launch_bounds__(256)
matmul_row_kernel(float* __restrict__ out, const float* __restrict__ inp, const float* __restrict__ weight,
                  const float* __restrict__ bias, int K, int OC, int biased) {
    const int o = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (o >= OC) { return; }
    const float* row = weight + (size_t)o * K;
    float total = 0.0f;
    if (K % 4 == 0 && aligned(inp, weight)) {
#pragma unroll 4
        for (int i = lane; i < K / 4; i += WARP) { add_product(total, load<4>(row, i), load<4>(inp, i)); }
    } else {
        for (int i = lane; i < K; i += WARP) { total += row[i] * inp[i]; }
    }
    total = warp_sum(total);
    if (lane == 0) { out[o] = biased ? total + bias[o] : total; }
}
