// prefix_features.cu: statistics of a sequence up to each token (kernels/cpu/sparse/prefix_features.py)
//
// Sums go over positions in their order, so a sequence has the same bits whether it comes at once or token by token.
//   v1 a thread a channel, means to memory     x is read, (B,T,C) written and read again for the sums over channels
//   v2 and warp_sum at each position           x is read once, but 15 shuffles for a row of 32 channels
//   v3 tiles of 32 x 32 in shared memory (this)  a lane walks down a channel, then along a row: 6 accesses a value.
//                                              32 loads of a lane are in flight together
// Few warps do all the work, B * C / 32, each walking T steps: latency is the limit, not the bytes.

// partial (3,groups,B*Tq): for each group of 32 channels and each row the sums over the group of the running sums of
// squared deviations, of squared deviations, of the running sums of squared steps. state (B,4,C), x (B,Tq,C).
// grid (groups, B), a warp each. fmaf is written out: the compiler must not choose where a product is rounded
extern "C" __global__ void __launch_bounds__(32)
prefix_sums_kernel(float* __restrict__ partial, float* __restrict__ state, const float* __restrict__ x, int Tq, int C,
                   int start) {
    __shared__ float tile[3][WARP][WARP + 1];
    const int lane = threadIdx.x;
    const int c = blockIdx.x * WARP + lane;
    const bool inside = c < C;  // other lanes walk along with zeros
    const size_t b = blockIdx.y;
    float* kept = state + b * 4 * C + c;
    const float* column = x + b * Tq * C + c;
    float total = 0.0f;
    float squares = 0.0f;
    float errors = 0.0f;
    float before = 0.0f;
    if (inside && start > 0) {
        total = kept[0];
        squares = kept[C];
        errors = kept[2 * (size_t)C];
        before = kept[3 * (size_t)C];
    } else if (inside) {
        before = column[0];
    }
    for (int first = 0; first < Tq; first += WARP) {
        const int rows = min(WARP, Tq - first);
        float values[WARP];
#pragma unroll
        for (int i = 0; i < WARP; i++) {
            values[i] = inside && i < rows ? column[(size_t)(first + i) * C] : 0.0f;
        }
#pragma unroll
        for (int i = 0; i < WARP; i++) {
            if (i >= rows) { continue; }
            const float count = (float)(start + first + i + 1);
            total += values[i];
            const float deviation = values[i] - total / count;
            const float square = deviation * deviation;
            squares = fmaf(square, count / fmaxf(count - 1.0f, 1.0f), squares);
            const float step = values[i] - before;
            errors = fmaf(step, step, errors);
            before = values[i];
            tile[0][i][lane] = squares;
            tile[1][i][lane] = square;
            tile[2][i][lane] = errors;
        }
        __syncwarp();
        if (lane < rows) {
            const size_t n = b * Tq + first + lane;
            const size_t N = (size_t)gridDim.y * Tq;
#pragma unroll
            for (int sum = 0; sum < 3; sum++) {
                float over_channels = 0.0f;
#pragma unroll
                for (int j = 0; j < WARP; j++) { over_channels += tile[sum][lane][j]; }
                partial[((size_t)sum * gridDim.x + blockIdx.x) * N + n] = over_channels;
            }
        }
        __syncwarp();
    }
    if (!inside) { return; }
    kept[0] = total;
    kept[C] = squares;
    kept[2 * (size_t)C] = errors;
    kept[3 * (size_t)C] = before;
}

// features (N,5), columns 0..3, from partial (3,groups,N), a thread a row: row n is position start + n % Tq
extern "C" __global__ void __launch_bounds__(256)
prefix_features_kernel(float* __restrict__ features, const float* __restrict__ partial, int groups, int N, int Tq,
                       int C, int maxT, int start) {
    const int n = blockIdx.x * blockDim.x + threadIdx.x;
    if (n >= N) { return; }
    float sums[3];
#pragma unroll
    for (int sum = 0; sum < 3; sum++) {
        sums[sum] = 0.0f;
        for (int group = 0; group < groups; group++) {
            sums[sum] += partial[((size_t)sum * groups + group) * N + n];
        }
    }
    const float count = (float)(start + n % Tq + 1);
    float* row = features + (size_t)n * 5;
    row[0] = maxT > 1 ? logf(count) / logf((float)maxT) : 0.0f;
    row[1] = sums[0] / C / count;
    row[2] = sums[2] / C / fmaxf(count - 1.0f, 1.0f);
    row[3] = sums[1] / C;
}
