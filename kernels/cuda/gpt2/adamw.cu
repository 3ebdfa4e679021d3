// adamw.cu: AdamW on flat parameters (kernels/cpu/gpt2/adamw.py; the formula is update_adamw of common.cuh)
//
// The bias corrections are folded into rate and eps by the launcher, in double precision. Read are p, g, m, v, written
// p, m, v: 7 floats a parameter.
//
//   v1 one thread a value
//   v2 one thread four (this)    float4 in all seven streams

// params, grads, m, v (n)
extern "C" __global__ void __launch_bounds__(256)
adamw_kernel(float* __restrict__ params, const float* __restrict__ grads, float* __restrict__ m, float* __restrict__ v,
             size_t n, float rate, float one_minus_beta1, float one_minus_beta2, float eps, float decay,
             float grad_scale) {
    const AdamwRates r = {rate, one_minus_beta1, one_minus_beta2, eps, decay, grad_scale};
    const size_t pack = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (4 * pack + 4 <= n && aligned(params, grads, m, v)) {
        Pack<4> p4 = load<4>(params, pack), m4 = load<4>(m, pack), v4 = load<4>(v, pack);
        const Pack<4> g4 = load<4>(grads, pack);
#pragma unroll
        for (int j = 0; j < 4; j++) { update_adamw(p4.at[j], g4.at[j], m4.at[j], v4.at[j], r); }
        store<4>(params, pack, p4);
        store<4>(m, pack, m4);
        store<4>(v, pack, v4);
    } else {
        for (size_t i = 4 * pack; i < 4 * pack + 4 && i < n; i++) { update_adamw(params[i], grads[i], m[i], v[i], r); }
    }
}
