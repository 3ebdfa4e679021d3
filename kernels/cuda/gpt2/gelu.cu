// gelu.cu: the tanh approximation of GELU and its derivative, element by element (kernels/cpu/gpt2/gelu.py)
//
//   v1 one thread a value        four times the load instructions
//   v2 one thread four (this)    float4; tanh hides behind memory: 2 floats move a value forward, 3 backward

#define GELU_S 0.7978845608028654f  // sqrt(2 / pi)
#define GELU_CUBIC 0.044715f

__device__ __forceinline__ float gelu(float x) {
    const float u = GELU_S * x * (1.0f + GELU_CUBIC * x * x);
    return 0.5f * x * (1.0f + tanhf(u));
}

__device__ __forceinline__ float gelu_slope(float x) {
    const float t = tanhf(GELU_S * x * (1.0f + GELU_CUBIC * x * x));
    return 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * GELU_S * (1.0f + 3.0f * GELU_CUBIC * x * x);
}

// out (n) from inp (n); out may be inp
extern "C" __global__ void __launch_bounds__(256)
gelu_forward_kernel(float* out, const float* inp, size_t n) {
    const size_t pack = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (4 * pack + 4 <= n && aligned(out, inp)) {
        Pack<4> x = load<4>(inp, pack);
#pragma unroll
        for (int j = 0; j < 4; j++) { x.at[j] = gelu(x.at[j]); }
        store<4>(out, pack, x);
    } else {
        for (size_t i = 4 * pack; i < 4 * pack + 4 && i < n; i++) { out[i] = gelu(inp[i]); }
    }
}

// dinp (n) = dout * slope(inp); dinp may be dout
extern "C" __global__ void __launch_bounds__(256)
gelu_backward_kernel(float* dinp, const float* inp, const float* dout, size_t n) {
    const size_t pack = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (4 * pack + 4 <= n && aligned(dinp, inp, dout)) {
        Pack<4> dy = load<4>(dout, pack);
        const Pack<4> x = load<4>(inp, pack);
#pragma unroll
        for (int j = 0; j < 4; j++) { dy.at[j] *= gelu_slope(x.at[j]); }
        store<4>(dinp, pack, dy);
    } else {
        for (size_t i = 4 * pack; i < 4 * pack + 4 && i < n; i++) { dinp[i] = dout[i] * gelu_slope(inp[i]); }
    }
}
