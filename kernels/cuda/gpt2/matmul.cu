// matmul.cu: a fully connected layer's bias, added to cuBLAS's product (kernels/cpu/gpt2/matmul.py)
//
// Bias gradients are column_sum.cu's. dev/matmul_ladder.cu goes from one thread an output to tiles.

// out (N,OC) += bias (OC)
extern "C" __global__ void __launch_bounds__(256)
add_bias_kernel(float* __restrict__ out, const float* __restrict__ bias, size_t N, int OC) {
    const size_t n = N * OC;
    const size_t pack = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (OC % 4 == 0 && aligned(out, bias)) {
        if (4 * pack >= n) { return; }
        Pack<4> values = load<4>(out, pack);
        add(values, load<4>(bias, pack % (OC / 4)));
        store<4>(out, pack, values);
    } else {
        for (size_t i = 4 * pack; i < 4 * pack + 4 && i < n; i++) { out[i] += bias[i % OC]; }
    }
}
