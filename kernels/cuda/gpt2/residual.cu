// residual.cu: out = inp1 + inp2 (kernels/cpu/gpt2/residual.py); float4, 3 floats moved a value
// where a layernorm follows, fused_residual_forward_kernel of layernorm.cu saves reading the sum back

// all (n); out may be one of the inputs
extern "C" __global__ void __launch_bounds__(256)
residual_forward_kernel(float* out, const float* inp1, const float* inp2, size_t n) {
    const size_t pack = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (4 * pack + 4 <= n && aligned(out, inp1, inp2)) {
        Pack<4> values = load<4>(inp1, pack);
        add(values, load<4>(inp2, pack));
        store<4>(out, pack, values);
    } else {
        for (size_t i = 4 * pack; i < 4 * pack + 4 && i < n; i++) { out[i] = inp1[i] + inp2[i]; }
    }
}
