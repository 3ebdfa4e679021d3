// adamw.cu: AdamW on flat parameters (kernels/cpu/gpt2/adamw.py; the formula is update_adamw of common.cuh)
//
// Read are p, g, m, v, written p, m, v: 7 floats a parameter.
//
//   v1 one thread a value
//   v2 one thread four            float4 in all seven streams; a launch for each tensor
//   v3 all tensors at once (this) a table says which tensor a block belongs to, and its row of rates. A step launches
//                                 1 instead of 16: expected are 0.2 ms less of the host (14 us a launch) and, at
//                                 124M, 0.03 of the GPU: 12 tensors are too small to fill it

#define COLUMNS 5
#define RATES 6

// params, grads, m, v: flat buffers, of which a block has 1024 values of one tensor. tensors (count,5): the tensor's
// first block, ascending; where it begins in params, and in grads, m and v; its size; its row of rates (groups,6)
extern "C" __global__ void __launch_bounds__(256)
adamw_kernel(float* __restrict__ params, const float* __restrict__ grads, float* __restrict__ m, float* __restrict__ v,
             const int* __restrict__ tensors, int count, const float* __restrict__ rates,
             const float* __restrict__ norm) {
    int own = -1;  // the last tensor whose first block is not behind this one; a lane looks at one
    for (int first = 0; first < count; first += WARP) {
        const int other = first + threadIdx.x % WARP;
        const bool begun = other < count && tensors[other * COLUMNS] <= (int)blockIdx.x;
        own += __popc(__ballot_sync(ALL_LANES, begun));
    }
    const int* tensor = tensors + own * COLUMNS;
    params += tensor[1];
    grads += tensor[2];
    m += tensor[2];
    v += tensor[2];
    const size_t n = tensor[3];
    const AdamwRates r = adamw_rates(rates + tensor[4] * RATES, norm);
    const size_t pack = (size_t)(blockIdx.x - tensor[0]) * blockDim.x + threadIdx.x;
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
