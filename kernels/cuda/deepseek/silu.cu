// silu.cu: SiLU and its derivative, element by element (kernels/cpu/deepseek/silu.py)
//
//   v1 one thread a value        four times the load instructions
//   v2 one thread four (this)    float4; exp hides behind memory: 2 floats move a value forward, 3 backward

// exp overflows to infinity for x far below 0, and a division by it gives the right 0
__device__ __forceinline__ float sigmoid(float x) {
    return 1.0f / (1.0f + expf(-x));
}

__device__ __forceinline__ float silu_slope(float x) {
    const float s = sigmoid(x);
    return s * (1.0f + x * (1.0f - s));
}

// out (n) from inp (n); out may be inp
extern "C" __global__ void __launch_bounds__(256)
silu_forward_kernel(float* out, const float* inp, size_t n) {
    const size_t pack = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (4 * pack + 4 <= n && aligned(out, inp)) {
        Pack<4> x = load<4>(inp, pack);
#pragma unroll
        for (int j = 0; j < 4; j++) { x.at[j] *= sigmoid(x.at[j]); }
        store<4>(out, pack, x);
    } else {
        for (size_t i = 4 * pack; i < 4 * pack + 4 && i < n; i++) { out[i] = inp[i] * sigmoid(inp[i]); }
    }
}

// dinp (n) = dout * slope(inp); dinp may be dout
extern "C" __global__ void __launch_bounds__(256)
silu_backward_kernel(float* dinp, const float* inp, const float* dout, size_t n) {
    const size_t pack = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (4 * pack + 4 <= n && aligned(dinp, inp, dout)) {
        Pack<4> dy = load<4>(dout, pack);
        const Pack<4> x = load<4>(inp, pack);
#pragma unroll
        for (int j = 0; j < 4; j++) { dy.at[j] *= silu_slope(x.at[j]); }
        store<4>(dinp, pack, dy);
    } else {
        for (size_t i = 4 * pack; i < 4 * pack + 4 && i < n; i++) { dinp[i] = dout[i] * silu_slope(inp[i]); }
    }
}
