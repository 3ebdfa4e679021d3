// expert_plan.cu: the row of the experts' activations for each token's work (kernels/cpu/deepseek/expert_plan.py)
//
//   v1 one thread, in order         the reference
//   v2 atomic counters              an expert's rows in order of arrival: other bits every run
//   v3 one block an expert (this)   each reads all assignments, in order, and ranks its own by ballots: E * N * top
//                                   reads, from L2, but no order to be lost; 4 experts and 2048 assignments are 4 steps

#define BLOCK 512

// the sum over the block, the same in every thread; `shared` is free again after the next barrier
__device__ __forceinline__ int block_total(int value, int* shared) {
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) { value += __shfl_xor_sync(ALL_LANES, value, step); }
    if (threadIdx.x % WARP == 0) { shared[threadIdx.x / WARP] = value; }
    __syncthreads();
    int total = 0;
    for (int warp = 0; warp < BLOCK / WARP; warp++) { total += shared[warp]; }
    return total;
}

__device__ __forceinline__ int tiles_of(int load, int tile) {
    return (load + tile - 1) / tile;
}

// load (E) from experts (A); a block of BLOCK threads an expert
extern "C" __global__ void __launch_bounds__(512)
expert_load_kernel(int* __restrict__ load, const int* __restrict__ experts, int A) {
    __shared__ int shared[BLOCK / WARP];
    int count = 0;
    for (int a = threadIdx.x; a < A; a += BLOCK) { count += experts[a] == (int)blockIdx.x; }
    count = block_total(count, shared);
    if (threadIdx.x == 0) { load[blockIdx.x] = count; }
}

// slot (A), source (rows), tile_expert (rows/tile) from load (E), experts (A); a block of BLOCK threads an expert, and
// one for what is not used
extern "C" __global__ void __launch_bounds__(512)
expert_place_kernel(int* __restrict__ slot, int* __restrict__ source, int* __restrict__ tile_expert,
                    const int* __restrict__ load, const int* __restrict__ experts, int A, int E, int rows, int tile) {
    __shared__ int shared[2][BLOCK / WARP];
    __shared__ int shared_tiles[BLOCK / WARP];
    const int expert = blockIdx.x;
    const int lane = threadIdx.x % WARP;
    const int warp = threadIdx.x / WARP;
    int first = 0;  // tile
    for (int e = threadIdx.x; e < expert; e += BLOCK) { first += tiles_of(load[e], tile); }
    first = block_total(first, shared_tiles);
    const int mine = expert < E ? load[expert] : 0;
    const int end = expert < E ? first + tiles_of(mine, tile) : rows / tile;
    for (int i = first + threadIdx.x; i < end; i += BLOCK) { tile_expert[i] = expert < E ? expert : -1; }
    for (int row = first * tile + mine + threadIdx.x; row < end * tile; row += BLOCK) { source[row] = -1; }
    int placed = 0;
    for (int piece = 0; placed < mine; piece++) {  // `placed` is the same in every thread
        const int a = piece * BLOCK + threadIdx.x;
        const bool chosen = a < A && experts[a] == expert;
        const unsigned votes = __ballot_sync(ALL_LANES, chosen);
        int* counts = shared[piece % 2];
        if (lane == 0) { counts[warp] = __popc(votes); }
        __syncthreads();
        int rank = __popc(votes & ((1u << lane) - 1)), total = 0;
        for (int other = 0; other < BLOCK / WARP; other++) {
            if (other < warp) { rank += counts[other]; }
            total += counts[other];
        }
        if (chosen) {
            const int row = first * tile + placed + rank;
            slot[a] = row;
            source[row] = a;
        }
        placed += total;
    }
}
