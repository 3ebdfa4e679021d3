// expert_matmul.cu: fully connected layers of experts (kernels/cpu/deepseek/expert_matmul.py)
//
//   v1 a product an expert       the host has to wait for their numbers of rows; small products leave a GPU half empty
//   v2 all in one launch (this)  a block finds its expert in tile_expert, and writes zeros where a tile is not used. an
//                                element is added up k by k, whatever its row's place in the tile

#define BM 64  // rows at most that a tile has
#define BN 128
#define BK 8  // 16 would take a quarter more registers, for three blocks a multiprocessor in place of four

// the tile of rows that this block computes, as rows of a matrix of its own
struct ExpertTile {
    int expert;  // -1: not used
    size_t row0;

    __device__ __forceinline__ ExpertTile(const int* tile_expert, int tile)
        : expert(tile_expert[blockIdx.y]), row0((size_t)blockIdx.y * tile) {}

    __device__ __forceinline__ size_t used() const { return max(expert, 0); }
};

// out (rows,OC) from inp (rows,C), weight (E,OC,C); grid (ceil(OC / BN), tiles), 128 threads
extern "C" __global__ void __launch_bounds__(128)
expert_matmul_forward_kernel(float* __restrict__ out, const float* __restrict__ inp, const float* __restrict__ weight,
                             const int* __restrict__ tile_expert, int tile, int C, int OC) {
    using Tile = GemmTile<BM, BN, BK, 8, 8, true, true>;
    __shared__ Tile::Shared shared;
    const ExpertTile of(tile_expert, tile);
    const int oc0 = blockIdx.x * BN;
    const Tile::A a(inp + of.row0 * C, C, 0, tile);
    const Tile::B b(weight + of.used() * OC * C, C, oc0, OC);
    float total[8][8];
    Tile::multiply(total, shared, a, b, 0, of.expert < 0 ? 0 : C);
    write_tile<Tile>(out + of.row0 * OC, total, nullptr, 0, oc0, tile, OC);
}

// dinp (rows,C) from dout (rows,OC), weight (E,OC,C); grid (ceil(C / BN), tiles), 128 threads
extern "C" __global__ void __launch_bounds__(128)
expert_matmul_dinp_kernel(float* __restrict__ dinp, const float* __restrict__ dout, const float* __restrict__ weight,
                          const int* __restrict__ tile_expert, int tile, int C, int OC) {
    using Tile = GemmTile<BM, BN, BK, 8, 8, true, false>;
    __shared__ Tile::Shared shared;
    const ExpertTile of(tile_expert, tile);
    const int c0 = blockIdx.x * BN;
    const Tile::A a(dout + of.row0 * OC, OC, 0, tile);
    const Tile::B b(weight + of.used() * OC * C, C, c0, C);
    float total[8][8];
    Tile::multiply(total, shared, a, b, 0, of.expert < 0 ? 0 : OC);
    write_tile<Tile>(dinp + of.row0 * C, total, nullptr, 0, c0, tile, C);
}

// dweight (E,OC,C) = beta * dweight + dout^T inp over the expert's rows; dout (rows,OC), inp (rows,C);
// grid (ceil(C / BN), ceil(OC / BM), E), 128 threads
extern "C" __global__ void __launch_bounds__(128)
expert_matmul_dweight_kernel(float* __restrict__ dweight, const float* __restrict__ dout, const float* __restrict__ inp,
                             const int* __restrict__ tile_expert, int tiles, int tile, int C, int OC, int beta) {
    using Tile = GemmTile<BM, BN, BK, 8, 8, false, false>;
    __shared__ Tile::Shared shared;
    const int first = first_tile(tile_expert, tiles, blockIdx.z);
    const int last = first_tile(tile_expert, tiles, blockIdx.z + 1);
    const int oc0 = blockIdx.y * BM;
    const int c0 = blockIdx.x * BN;
    const size_t row0 = (size_t)first * tile;
    float total[8][8];
    Tile::multiply(total, shared, Tile::A(dout + row0 * OC, OC, oc0, OC), Tile::B(inp + row0 * C, C, c0, C), 0,
                   (last - first) * tile);
    float* gradient = dweight + (size_t)blockIdx.z * OC * C;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const int oc = oc0 + Tile::row(i);
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const int c = c0 + Tile::column(j);
            if (oc >= OC || c >= C) { continue; }
            const size_t index = (size_t)oc * C + c;
            gradient[index] = beta ? gradient[index] + total[i][j] : total[i][j];
        }
    }
}
