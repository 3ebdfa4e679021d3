// share_topk.cu: keys that a tile of queries shares, chosen by the tile before (kernels/cpu/sparse/share_topk.py)
//
//   v1 a list a query        select_topk on rows of sums: a tile's list is found Q times
//   v2 a list a tile (this)  sums of all tiles of a block of queries, a thread a key, which walks down the queries in
//                            their order, so parts of a sequence have the bits of the whole; then a block of threads
//                            a tile finds its list (topk.cuh) and writes it for each of its queries
//
// Scores and sums are read once, and the choice has a Q-th of what it has for each query.

// the queries of tile i that are among first .. first + R - 1
__device__ __forceinline__ int begin_of(int i, int share, int first) { return max(i * share, first); }
__device__ __forceinline__ int end_of(int i, int share, int first, int R) { return min((i + 1) * share, first + R); }

// row i % M of sums (B,M,W), keys s < i * share, += the scores (B,R,S) of tile i. grid (ceil(keys / threads), tiles, B)
extern "C" __global__ void __launch_bounds__(256)
share_sums_kernel(float* __restrict__ sums, const float* __restrict__ scores, int R, int S, int M, int W, int share,
                  int first) {
    const int s = blockIdx.x * blockDim.x + threadIdx.x;
    const int i = first / share + blockIdx.y;
    if (s >= i * share) { return; }
    const int begin = begin_of(i, share, first);
    const int rows = end_of(i, share, first, R) - begin;
    const float* column = scores + ((size_t)blockIdx.z * R + begin - first) * S + s;
    float* sum = sums + ((size_t)blockIdx.z * M + i % M) * W + s;
    const bool starts = begin == i * share;
    float total = starts ? column[0] : *sum;
#pragma unroll 8
    for (int r = starts; r < rows; r++) { total += column[(size_t)r * S]; }
    *sum = total;
}

// index (B,Tq,K), count (B,Tq) at rows first - start .. from sums (B,M,W); a block for each of B * tiles, of threads as
// write_highest wants them
extern "C" __global__ void __launch_bounds__(512)
share_lists_kernel(int* __restrict__ index, int* __restrict__ count, const float* __restrict__ sums, int R, int M,
                   int W, int Tq, int K, int k, int share, int tiles, int first, int start, int sink) {
    const int b = blockIdx.x / tiles;
    const int i = first / share + blockIdx.x % tiles;
    const int begin = begin_of(i, share, first);
    const int rows = end_of(i, share, first, R) - begin;
    const int before = max(i - 1, 0) * share;  // keys before the tile before
    const int n = min(k - 2 * share, before);  // those that are chosen
    const size_t out = (size_t)b * Tq + begin - start;
    index += out * K;
    count += out;

    if (n == before) {
        for (int j = threadIdx.x; j < n; j += blockDim.x) { index[j] = j; }
    } else if (n > 0) {
        write_highest(index, sums + ((size_t)b * M + (i - 1) % M) * W, before - 1, n, 0, sink);
    }
    __syncthreads();
    for (int r = threadIdx.x / WARP; r < rows; r += blockDim.x / WARP) {
        const int t = begin + r;
        int* list = index + (size_t)r * K;
        for (int j = (r == 0 ? n : 0) + threadIdx.x % WARP; j < K; j += WARP) {
            const int s = before + j - n;
            list[j] = j < n ? index[j] : s <= t ? s : -1;
        }
        if (threadIdx.x % WARP == 0) { count[r] = n + t + 1 - before; }
    }
}
