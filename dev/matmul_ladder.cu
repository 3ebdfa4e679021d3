// matmul_ladder.cu: a fully connected layer by hand, in three steps; dev/matmul_ladder.py checks and times them
//
// out (N,OC) = inp (N,C) weight (OC,C)^T + bias (OC), as kernels/cpu/gpt2/matmul.py. At N = OC = C = n each version
// multiplies n^3 times; what changes is how often a value comes from memory:
//   v1 one thread an output      every value n times, from L1 and L2 at best
//   v2 tiles of 32 x 32          through shared memory: n/32 times; but two shared reads a multiplication
//   v3 tiles of 128 x 128        n/128 times; 8 x 8 sums a thread in registers: 4 shared reads of 16 bytes for 64
//                                multiplications; the next piece is fetched meanwhile, the bias added in passing
// The tile of v3 is kernels/cuda/runtime/gemm_tile.cuh, on which band_matmul.cu and expert_matmul.cu build.

extern "C" __global__ void __launch_bounds__(256)
matmul_forward_kernel1(float* __restrict__ out, const float* __restrict__ inp, const float* __restrict__ weight,
                       const float* __restrict__ bias, int N, int C, int OC) {
    const int oc = blockIdx.x * 16 + threadIdx.x % 16;
    const int n = blockIdx.y * 16 + threadIdx.x / 16;
    if (n >= N || oc >= OC) { return; }
    float total = bias[oc];
    for (int c = 0; c < C; c++) { total += inp[(size_t)n * C + c] * weight[(size_t)oc * C + c]; }
    out[(size_t)n * OC + oc] = total;
}

extern "C" __global__ void __launch_bounds__(1024)
matmul_forward_kernel2(float* __restrict__ out, const float* __restrict__ inp, const float* __restrict__ weight,
                       const float* __restrict__ bias, int N, int C, int OC) {
    __shared__ float a[32][33], b[32][33];  // a column more than needed: a warp that reads down a column meets 32 banks
    const int x = threadIdx.x % 32;
    const int y = threadIdx.x / 32;
    const int n = blockIdx.y * 32 + y;
    const int oc = blockIdx.x * 32 + x;
    const int row = blockIdx.x * 32 + y;  // of the weight, for loading
    float total = 0.0f;
    for (int first = 0; first < C; first += 32) {
        const int c = first + x;
        a[y][x] = n < N && c < C ? inp[(size_t)n * C + c] : 0.0f;
        b[y][x] = row < OC && c < C ? weight[(size_t)row * C + c] : 0.0f;
        __syncthreads();
        for (int k = 0; k < 32; k++) { total += a[y][k] * b[x][k]; }
        __syncthreads();
    }
    if (n < N && oc < OC) { out[(size_t)n * OC + oc] = total + bias[oc]; }
}

extern "C" __global__ void __launch_bounds__(256)
matmul_forward_kernel3(float* __restrict__ out, const float* __restrict__ inp, const float* __restrict__ weight,
                       const float* __restrict__ bias, int N, int C, int OC) {
    using Tile = GemmTile<128, 128, 8, 8, 8, true, true>;
    __shared__ Tile::Shared shared;
    const int n0 = blockIdx.y * 128;
    const int oc0 = blockIdx.x * 128;
    float total[8][8];
    Tile::multiply(total, shared, Tile::A(inp, C, n0, N), Tile::B(weight, C, oc0, OC), 0, C);
    write_tile<Tile>(out, total, bias, n0, oc0, N, OC);
}
