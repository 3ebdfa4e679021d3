// expert_gather.cu: tokens' rows to their experts and back (kernels/cpu/deepseek/expert_gather.py)
//
//   v1 scatter with atomicAdd     a token's sum in order of arrival: other bits every run
//   v2 gather both ways (this)    a warp a row of the result, which knows whence: by source for the experts' rows, by
//                                 slot for the tokens'; float4; nothing is read twice but by other warps

// out (C) = the row of inp of the assignment's token, 0 for padding, an assignment of -1
template <int W>
__device__ __forceinline__ void take_row(float* out, const float* inp, int assignment, int top, int C) {
    const float* from = inp + (size_t)(max(assignment, 0) / top) * C;
    for (int i = threadIdx.x % WARP; i < C / W; i += WARP) {
        store<W>(out, i, assignment < 0 ? zeros<W>() : load<W>(from, i));
    }
}

// rows_inp (rows,C) from inp (N,C), source (rows); a warp a row
extern "C" __global__ void __launch_bounds__(256)
expert_gather_kernel(float* __restrict__ rows_inp, const float* __restrict__ inp, const int* __restrict__ source,
                     int rows, int C, int top) {
    const int row = (blockIdx.x * blockDim.x + threadIdx.x) / WARP;
    if (row >= rows) { return; }
    float* out = rows_inp + (size_t)row * C;
    if (C % 4 == 0 && aligned(rows_inp, inp)) {
        take_row<4>(out, inp, source[row], top, C);
    } else {
        take_row<1>(out, inp, source[row], top, C);
    }
}

// out (C) = sum over j of inp[slot[j]], times gates[j] if there are any
template <int W>
__device__ __forceinline__ void sum_rows(float* out, const float* inp, const int* slot, const float* gates, int C,
                                         int top) {
    for (int i = threadIdx.x % WARP; i < C / W; i += WARP) {
        Pack<W> total = zeros<W>();
        for (int j = 0; j < top; j++) {
            Pack<W> values = load<W>(inp + (size_t)slot[j] * C, i);
            const float gate = gates ? gates[j] : 1.0f;
#pragma unroll
            for (int l = 0; l < W; l++) { values.at[l] *= gate; }
            add(total, values);
        }
        store<W>(out, i, total);
    }
}

__device__ __forceinline__ void sum_rows_of_token(float* out, const float* inp, const int* slot, const float* gates,
                                                  int N, int C, int top) {
    const int n = (blockIdx.x * blockDim.x + threadIdx.x) / WARP;
    if (n >= N) { return; }
    slot += (size_t)n * top;
    if (gates) { gates += (size_t)n * top; }
    if (C % 4 == 0 && aligned(out, inp)) {
        sum_rows<4>(out + (size_t)n * C, inp, slot, gates, C, top);
    } else {
        sum_rows<1>(out + (size_t)n * C, inp, slot, gates, C, top);
    }
}

// dinp (N,C) from drows (rows,C), slot (N,top); a warp a token
extern "C" __global__ void __launch_bounds__(256)
expert_scatter_kernel(float* __restrict__ dinp, const float* __restrict__ drows, const int* __restrict__ slot, int N,
                      int C, int top) {
    sum_rows_of_token(dinp, drows, slot, nullptr, N, C, top);
}

// out (N,C) from y (rows,C), gates, slot (N,top); a warp a token
extern "C" __global__ void __launch_bounds__(256)
expert_combine_forward_kernel(float* __restrict__ out, const float* __restrict__ y, const float* __restrict__ gates,
                              const int* __restrict__ slot, int N, int C, int top) {
    sum_rows_of_token(out, y, slot, gates, N, C, top);
}

// dy (C) = gate * dout -> this lane's part of dout . y; dy may be y
template <int W>
__device__ __forceinline__ float combine_backward(float* dy, const float* dout, const float* y, float gate, int C) {
    float dot = 0.0f;
    for (int i = threadIdx.x % WARP; i < C / W; i += WARP) {
        Pack<W> d = load<W>(dout, i);
        const Pack<W> values = load<W>(y, i);
#pragma unroll
        for (int l = 0; l < W; l++) {
            dot += d.at[l] * values.at[l];
            d.at[l] *= gate;
        }
        store<W>(dy, i, d);
    }
    return dot;
}

// dy (rows,C), dgates (A) from dout (N,C), y (rows,C), gates (A), source (rows); a warp a row; dy may be y
extern "C" __global__ void __launch_bounds__(256)
expert_combine_backward_kernel(float* dy, float* __restrict__ dgates, const float* __restrict__ dout, const float* y,
                               const float* __restrict__ gates, const int* __restrict__ source, int rows, int C,
                               int top) {
    const int row = (blockIdx.x * blockDim.x + threadIdx.x) / WARP;
    if (row >= rows) { return; }
    const int assignment = source[row];
    const bool packed = C % 4 == 0 && aligned(dy, dout, y);
    const size_t start = (size_t)row * C;
    if (assignment < 0) {
        if (packed) {
            take_row<4>(dy + start, dout, assignment, top, C);
        } else {
            take_row<1>(dy + start, dout, assignment, top, C);
        }
        return;
    }
    const float gate = gates[assignment];
    const float* from = dout + (size_t)(assignment / top) * C;
    float dot = packed ? combine_backward<4>(dy + start, from, y + start, gate, C)
                       : combine_backward<1>(dy + start, from, y + start, gate, C);
    dot = warp_sum(dot);
    if (threadIdx.x % WARP == 0) { dgates[assignment] = dot; }
}
