// mass_count.cu: how many of a query's largest values hold a given part of their sum (kernels/cpu/sparse/mass_count.py)
//
//   v1 sort, then running sums   a sort of every row in memory, for one number
//   v2 one block a row (this)    what may be left out is all below some value: its bits are found one after another,
//                                each by a sum of what lies below. 31 sums of a row that stays in L1, in a fixed
//                                order

#define BITS 31  // bits of a float that is not negative: as integers these floats have the same order

__device__ __forceinline__ float value_of(float x, float top, int softmax) { return softmax ? expf(x - top) : x; }

// the sum of what lies below `bits` among the values of a row, the same in every thread
__device__ __forceinline__ float sum_below(const float* row, int keys, float top, int softmax, int bits,
                                           float* shared) {
    float total = 0.0f;
    for (int s = threadIdx.x; s < keys; s += blockDim.x) {
        const float value = value_of(row[s], top, softmax);
        if (__float_as_int(value) < bits) { total += value; }
    }
    return block_sum(total, shared);
}

// keep (B,Tq) at rows first - start .. from scores (B,R,S); a block for each of B * R rows
extern "C" __global__ void __launch_bounds__(256)
mass_count_kernel(int* __restrict__ keep, const float* __restrict__ scores, float left_out, int R, int S, int Tq,
                  int first, int start, int softmax) {
    __shared__ float shared[2][256 / WARP];  // by turns: the barrier of the next sum frees this one's
    const int b = blockIdx.x / R, r = blockIdx.x % R;
    const float* row = scores + (size_t)blockIdx.x * S;
    const int keys = first + r + 1;

    float top = MINUS_INFINITY;
    if (softmax) {
        for (int s = threadIdx.x; s < keys; s += blockDim.x) { top = fmaxf(top, row[s]); }
        top = warp_max(top);
        if (threadIdx.x % WARP == 0) { shared[1][threadIdx.x / WARP] = top; }
        __syncthreads();
        for (int warp = 0; warp < (int)blockDim.x / WARP; warp++) { top = fmaxf(top, shared[1][warp]); }
    }
    const float limit = left_out * sum_below(row, keys, top, softmax, 0x7fffffff, shared[0]);

    int bits = 0;  // the largest number below which no more than `limit` lies
    float low = 0.0f;
    for (int bit = BITS - 1; bit >= 0; bit--) {
        const int candidate = bits | 1 << bit;
        const float sum = sum_below(row, keys, top, softmax, candidate, shared[(bit + 1) % 2]);
        if (sum <= limit) {
            bits = candidate;
            low = sum;
        }
    }
    float from = 0.0f;  // values from `bits` on: at most 2^24, which floats count exactly
    for (int s = threadIdx.x; s < keys; s += blockDim.x) {
        if (__float_as_int(value_of(row[s], top, softmax)) >= bits) { from += 1.0f; }
    }
    from = block_sum(from, shared[0]);
    if (threadIdx.x == 0) {
        const float value = __int_as_float(bits);  // some of these equals may be left out as well
        const float equals = value > 0.0f ? floorf((limit - low) / value) : 0.0f;
        const int m = (int)from - (int)fminf(fmaxf(equals, 0.0f), from);
        keep[(size_t)b * Tq + first - start + r] = min(max(m, 1), keys);
    }
}
