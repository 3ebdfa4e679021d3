// depth_fusion.cu: the platters of a head mix after toroidal attention (kernels/cpu/torus/depth_fusion.py)
//
// depth_fusion_kernel: a head is D platters of hd channels, and adds up D of its values for each one of out
//   v1 a thread a channel        keeps its D values in registers; with few channels lanes read addresses far apart
//   v2 heads in shared (this)    a tile of whole heads comes once, as it lies in memory; omega is read once a block,
//                                which takes several tiles
// depth_fusion_backward_kernel: dinp and, by the way, domega (D,D)
//   v1 two kernels               dout is read twice
//   v2 one kernel (this)         a thread has 2 x 2 entries of domega in registers for part of the channels; in the
//                                end the parts are added up pair by pair, then column_sum adds up the blocks

#define THREADS 256
#define TILE 2048  // floats of an array in shared memory
#define SIDE 2     // side of the square of entries of domega that a thread has
#define SQUARE 32  // and of the square that a block has

// a thread's part of a tile: the pack at channel m of every `step`th platter from `platter` on. neighbouring
// threads take neighbouring packs
struct Lane {
    int platter, step, m;
};

template <int W> __device__ __forceinline__ Lane lane_of(int hd) {
    const int packs = hd / W;  // at most THREADS
    const int step = THREADS / packs;
    const int platter = threadIdx.x / packs;
    return {platter < step ? platter : TILE, step, (int)threadIdx.x % packs * W};
}

// where a platter begins, counted through all heads: in head-major rows [h][k][m], or depth-major ones [k][h][m]
__device__ __forceinline__ size_t place(int platter, int NH, int D, int hd, int depth_major) {
    if (depth_major) {
        const int n = platter / (NH * D);
        const int of_row = platter - n * NH * D;
        platter = n * NH * D + of_row % D * NH + of_row / D;
    }
    return (size_t)platter * hd;
}

template <int W>
__device__ __forceinline__ void read_tile(float* tile, const float* array, Lane lane, int first, int platters, int NH,
                                          int D, int hd, int depth_major) {
    for (int p = lane.platter; p < platters; p += lane.step) {
        const float* from = array + place(first + p, NH, D, hd, depth_major) + lane.m;
        store<W>(tile + p * hd + lane.m, 0, load<W>(from, 0));
    }
}

// omega (D,D), or its transpose
__device__ __forceinline__ void read_weights(float* weights, const float* omega, int D, int transposed) {
    for (int i = threadIdx.x; i < D * D; i += THREADS) {
        weights[i] = omega[transposed ? i % D * D + i / D : i];
    }
}

// out[l][m] = sum_k tile[k][m] weights[k * D + l] in each head of the tile. the first product is not added to 0, so
// that -0 stays one where D is 1
template <int W>
__device__ __forceinline__ void mix(float* out, const float* tile, const float* weights, Lane lane, int first,
                                    int platters, int NH, int D, int hd, int depth_major) {
    for (int p = lane.platter; p < platters; p += lane.step) {
        const int l = p % D;
        const float* x = tile + (p - l) * hd + lane.m;
        Pack<W> total = load<W>(x, 0);
#pragma unroll
        for (int j = 0; j < W; j++) { total.at[j] *= weights[l]; }
#pragma unroll 2
        for (int k = 1; k < D; k++) {
            const Pack<W> values = load<W>(x + k * hd, 0);
            const float weight = weights[k * D + l];
#pragma unroll
            for (int j = 0; j < W; j++) { total.at[j] = fmaf(values.at[j], weight, total.at[j]); }
        }
        store<W>(out + place(first + p, NH, D, hd, depth_major) + lane.m, 0, total);
    }
}

template <int W>
__device__ __forceinline__ void mix_tiles(float* out, const float* inp, const float* weights, float* tile, int heads,
                                          int NH, int D, int hd, int from_depth_major, int to_depth_major) {
    const Lane lane = lane_of<W>(hd);
    const int of_tile = TILE / (D * hd);
    for (int first = blockIdx.x * of_tile; first < heads; first += gridDim.x * of_tile) {
        const int count = min(of_tile, heads - first);
        read_tile<W>(tile, inp, lane, first * D, count * D, NH, D, hd, from_depth_major);
        __syncthreads();
        mix<W>(out, tile, weights, lane, first * D, count * D, NH, D, hd, to_depth_major);
        __syncthreads();
    }
}

// out from inp, both (heads,D*hd), NH heads a row, by omega (D,D) or its transpose; D * hd <= TILE, hd <= THREADS.
// blocks take tiles by turns; dynamic shared memory: a tile and omega
extern "C" __global__ void __launch_bounds__(256)
depth_fusion_kernel(float* __restrict__ out, const float* __restrict__ inp, const float* __restrict__ omega, int heads,
                    int NH, int D, int hd, int transposed, int from_depth_major, int to_depth_major) {
    extern __shared__ Pack<4> shared[];
    float* tile = reinterpret_cast<float*>(shared);
    float* weights = tile + TILE;
    read_weights(weights, omega, D, transposed);
    if (hd % 4 == 0 && aligned(out, inp)) {
        mix_tiles<4>(out, inp, weights, tile, heads, NH, D, hd, from_depth_major, to_depth_major);
    } else {
        mix_tiles<1>(out, inp, weights, tile, heads, NH, D, hd, from_depth_major, to_depth_major);
    }
}

// a square of domega in the registers of a block: thread (part,i,j) has the entries [i + a * groups][j + b * groups],
// a, b < SIDE, summed over packs of channels part, part + parts, ... groups = 1 << shift, parts * groups^2 = THREADS
struct Share {
    int groups, parts, part, i, j;
};

__device__ __forceinline__ Share share_of(int shift, int D) {
    const int groups = 1 << shift;
    const int squares = (D + SQUARE - 1) / SQUARE;  // in a row of domega; grid.y is their number
    const int i = (threadIdx.x >> shift) % groups + blockIdx.y / squares * SQUARE;
    const int j = threadIdx.x % groups + blockIdx.y % squares * SQUARE;
    return {groups, THREADS >> 2 * shift, (int)threadIdx.x >> 2 * shift, i, j};
}

// total[a][b] += sum over the tile's heads and their hd channels, `channels` in all, of inp[k][m] dout[l][m]
template <int W>
__device__ __forceinline__ void add_products(float (*total)[SIDE], const float* inp, const float* dout, Share s,
                                             int channels, int D, int hd) {
#pragma unroll 1
    for (int c = s.part * W; c < channels; c += s.parts * W) {
        const int m = c % hd;
        const int at = (c - m) * D + m;
        Pack<W> x[SIDE];
#pragma unroll
        for (int a = 0; a < SIDE; a++) {
            const int k = s.i + a * s.groups;
            x[a] = k < D ? load<W>(inp + at + k * hd, 0) : zeros<W>();
        }
#pragma unroll
        for (int b = 0; b < SIDE; b++) {
            const int l = s.j + b * s.groups;
            const Pack<W> dy = l < D ? load<W>(dout + at + l * hd, 0) : zeros<W>();
#pragma unroll
            for (int a = 0; a < SIDE; a++) {
#pragma unroll
                for (int j = 0; j < W; j++) { total[a][b] = fmaf(x[a].at[j], dy.at[j], total[a][b]); }
            }
        }
    }
}

// domega (D,D) = the sums of all parts, in the block's square; shared (SIDE,SIDE,THREADS), free before the call
__device__ __forceinline__ void write_products(float* domega, float (*total)[SIDE], float* shared, Share s, int D) {
    const int threads = s.groups * s.groups;  // threads of a part
    float* mine = shared + threadIdx.x;
#pragma unroll
    for (int e = 0; e < SIDE * SIDE; e++) { mine[e * THREADS] = total[e / SIDE][e % SIDE]; }
    for (int step = s.parts / 2; step > 0; step /= 2) {
        __syncthreads();
        if (s.part < step) {
#pragma unroll
            for (int e = 0; e < SIDE * SIDE; e++) { mine[e * THREADS] += mine[e * THREADS + step * threads]; }
        }
    }
    if (s.part > 0) { return; }
#pragma unroll
    for (int e = 0; e < SIDE * SIDE; e++) {
        const int k = s.i + e / SIDE * s.groups;
        const int l = s.j + e % SIDE * s.groups;
        if (k < D && l < D) { domega[k * D + l] = mine[e * THREADS]; }
    }
}

template <int W>
__device__ __forceinline__ void backward_tiles(float* dinp, float* partial, const float* dout, const float* inp,
                                               const float* omega, float* tiles, int heads, int NH, int D, int hd,
                                               int depth_major, int shift) {
    const Lane lane = lane_of<W>(hd);
    const Share share = share_of(shift, D);
    const int of_tile = TILE / (D * hd);
    float* weights = tiles + 2 * TILE;
    read_weights(weights, omega, D, 1);
    float total[SIDE][SIDE] = {};
    for (int first = blockIdx.x * of_tile; first < heads; first += gridDim.x * of_tile) {
        const int count = min(of_tile, heads - first);
        read_tile<W>(tiles, dout, lane, first * D, count * D, NH, D, hd, depth_major);
        read_tile<W>(tiles + TILE, inp, lane, first * D, count * D, NH, D, hd, 0);
        __syncthreads();
        if (blockIdx.y == 0) { mix<W>(dinp, tiles, weights, lane, first * D, count * D, NH, D, hd, 0); }
        add_products<W>(total, tiles + TILE, tiles, share, count * hd, D, hd);
        __syncthreads();
    }
    write_products(partial + (size_t)blockIdx.x * D * D, total, tiles, share, D);
}

// dinp (heads,D*hd) from dout, and partial (blocks,D,D): each block's sums for domega. sizes as above, 2 << shift at
// least min(D, SQUARE); grid (blocks, squares of domega); dynamic shared memory: two tiles and omega
extern "C" __global__ void __launch_bounds__(256)
depth_fusion_backward_kernel(float* __restrict__ dinp, float* __restrict__ partial, const float* __restrict__ dout,
                             const float* __restrict__ inp, const float* __restrict__ omega, int heads, int NH, int D,
                             int hd, int depth_major, int shift) {
    extern __shared__ Pack<4> shared[];
    float* tiles = reinterpret_cast<float*>(shared);
    if (hd % 4 == 0 && aligned(dinp, dout, inp)) {
        backward_tiles<4>(dinp, partial, dout, inp, omega, tiles, heads, NH, D, hd, depth_major, shift);
    } else {
        backward_tiles<1>(dinp, partial, dout, inp, omega, tiles, heads, NH, D, hd, depth_major, shift);
    }
}
