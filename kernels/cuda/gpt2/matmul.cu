// matmul.cu: what a fully connected layer needs besides cuBLAS, and the same product by hand (kernels/cpu/gpt2/matmul.py)
//
// The trainers' products are cuBLAS's, bias gradients column_sum.cu's. The three kernels that follow add_bias_kernel are
// a ladder: out (N,OC) = inp (N,C) weight (OC,C)^T + bias (OC). At N = OC = C = n each multiplies 2 n^3 times; what
// changes is how often a value comes from memory:
//   v1 one thread an output      every value n times, from L1 and L2 at best
//   v2 tiles of 32 x 32          through shared memory: n/32 times; but two shared reads a multiplication
//   v3 tiles of 128 x 128        n/128 times; 8 x 8 sums a thread in registers: 4 shared reads of 16 bytes for 64
//                                multiplications; the next piece is fetched meanwhile, the bias added in passing

// out (N,OC) += bias (OC)
extern "C" __global__ void __launch_bounds__(256)
add_bias_kernel(float* __restrict__ out, const float* __restrict__ bias, size_t N, int OC) {
    const size_t n = N * OC;
    const size_t pack = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (OC % 4 == 0 && aligned(out, bias)) {
        if (4 * pack >= n) { return; }
        Pack<4> values = load<4>(out, pack);
        add(values, load<4>(bias, pack % (OC / 4)));
        store<4>(out, pack, values);
    } else {
        for (size_t i = 4 * pack; i < 4 * pack + 4 && i < n; i++) { out[i] += bias[i % OC]; }
    }
}

// bias may not be null in these three
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
