// fused_kl.cu: divergence of scores from the attention they imitate, and its gradient (kernels/cpu/sparse/fused_kl.py)
//
//   v1 softmax, divergence, gradient    three kernels: scores and p cross memory nine times
//   v2 one warp a row (this)            maximum, sums, gradient one after another; a row of 1024 is 8 KiB of both,
//                                       which L1 keeps between the three

#define LOWEST -1e30f    // for -inf: times a p of 0 it is 0
#define TINIEST 1e-37f   // for a p of 0 in ln p; not a denormal, which -ftz would make 0

// x (S), p (S) -> the row's loss; x becomes its gradient
template <int W> __device__ __forceinline__ void kl_row(float* loss, float* x, const float* p, int S, float dscale) {
    const int lane = threadIdx.x % WARP;
    const int packs = S / W;
    float top = LOWEST;
    for (int i = lane; i < packs; i += WARP) {
        const Pack<W> values = load<W>(x, i);
#pragma unroll
        for (int j = 0; j < W; j++) { top = fmaxf(top, values.at[j]); }
    }
    top = warp_max(top);

    float total = 0.0f, mass = 0.0f, cross = 0.0f;
    for (int i = lane; i < packs; i += WARP) {
        const Pack<W> values = load<W>(x, i), target = load<W>(p, i);
#pragma unroll
        for (int j = 0; j < W; j++) {
            const float score = fmaxf(values.at[j], LOWEST) - top;
            total += expf(score);
            mass += target.at[j];
            cross += target.at[j] * (logf(fmaxf(target.at[j], TINIEST)) - score);
        }
    }
    total = warp_sum(total);
    mass = warp_sum(mass);
    cross = warp_sum(cross);
    if (lane == 0) { *loss = cross + mass * logf(total); }

    const float scale = mass * dscale / total;
    for (int i = lane; i < packs; i += WARP) {
        Pack<W> values = load<W>(x, i);
        const Pack<W> target = load<W>(p, i);
#pragma unroll
        for (int j = 0; j < W; j++) {
            // two roundings, not one of a fused multiply-add: a query with one key has a gradient of 0
            const float q = __fmul_rn(expf(fmaxf(values.at[j], LOWEST) - top), scale);
            values.at[j] = __fadd_rn(q, -__fmul_rn(target.at[j], dscale));
        }
        store<W>(x, i, values);
    }
}

// losses (B,T) at rows first .. first + R - 1, and the gradient over scores, from scores, p (B,R,S); rows = B * R
extern "C" __global__ void __launch_bounds__(256)
fused_kl_kernel(float* __restrict__ losses, float* __restrict__ scores, const float* __restrict__ p, float dscale,
                int rows, int R, int S, int T, int first) {
    const int n = (blockIdx.x * blockDim.x + threadIdx.x) / WARP;
    if (n >= rows) { return; }
    float* loss = losses + (size_t)(n / R) * T + first + n % R;
    if (S % 4 == 0 && aligned(scores, p)) {
        kl_row<4>(loss, scores + (size_t)n * S, p + (size_t)n * S, S, dscale);
    } else {
        kl_row<1>(loss, scores + (size_t)n * S, p + (size_t)n * S, S, dscale);
    }
}
