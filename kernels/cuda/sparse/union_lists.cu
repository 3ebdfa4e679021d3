// union_lists.cu: lists of keys for tiles of queries, and lists of queries for tiles of keys: who passes by a tile in
// attention over selected keys on tensor cores (union_attention.cu)
//
// index (B,Tq,K): keys that a query selected, ascending, -1 behind them. 64 queries that follow each other are a tile,
// and 64 keys that about as many queries selected. A tile's list has who was selected by one of the tile, or selected
// one of it, once, and 64 bits that say by or of whom:
//
//     ids (B,tiles,capacity), masks (B,tiles,2,capacity): rows 0..31 and 32..63 of the tile, size (B,tiles)
//
//   v1 sort what a tile's lists hold         16384 numbers for 64 lists of 256, a dozen passes
//   v2 bits in shared memory, list by list   of each tile, in chunks of keys; which queries selected a key takes
//                                            inverse lists, and those of popular keys are long
//   v3 a matrix of bits, 64 by 64 (this)     written once, T bits for each query; both kinds of lists read it, that of
//                                            keys its transpose by 5 shuffles. An eighth of a byte for a pair
//
// Order: keys of a tile ascend (by_first = 0), or come by the first query of the tile that selected them and ascend
// among equals: then where a query finds its keys does not depend on the lists behind its own, and neither does a bit
// of a sum over them. Queries of a tile ascend. Keys are sorted into classes, by the logarithm of how many queries
// selected them: consecutive ones would be selected, together, by nearly all.
//
// Sorting is by a few classes, and stable: each warp counts its share of the items, then places it. Every number is an
// integer, so that nothing depends on who comes first.

#define TILE 64           // queries or keys of a tile
#define CHUNK 4096        // keys whose bits a block has in shared memory
#define BITS_THREADS 512
#define CLASS_THREADS 256
#define LIST_THREADS 1024
#define LIST_WARPS (LIST_THREADS / WARP)
#define CLASSES 64

// of a pair of a tile and one that passes: bit r % 32 of of[r / 32] is for row r
struct __align__(8) Bits {
    unsigned of[2];
};

// bits (B,tiles,T): which queries of a tile selected a key; grid (tiles, T / CHUNK, B)
extern "C" __global__ void __launch_bounds__(512, 2)
selected_bits_kernel(int* __restrict__ bits, const int* __restrict__ index, int T, int Tq, int K) {
    __shared__ unsigned found[2][CHUNK];
    const int query = blockIdx.x * TILE, first = blockIdx.y * CHUNK;
    const unsigned keys = min(CHUNK, T - first);
    const size_t b = blockIdx.z;
    for (int s = threadIdx.x; s < keys; s += BITS_THREADS) { found[0][s] = found[1][s] = 0; }
    __syncthreads();
    const int* lists = index + (b * Tq + query) * K;
    const int pairs = min(TILE, Tq - query) * K;
#pragma unroll 4
    for (int i = threadIdx.x; i < pairs; i += BITS_THREADS) {
        const unsigned s = lists[i] - first, row = (unsigned)i / K;  // what is behind a list, -1, is beyond all keys
        if (s < keys) { atomicOr(&found[row / 32][s], 1u << row % 32); }
    }
    __syncthreads();
    Bits* to = reinterpret_cast<Bits*>(bits) + (b * gridDim.x + blockIdx.x) * T + first;
    for (int s = threadIdx.x; s < keys; s += BITS_THREADS) { to[s] = {found[0][s], found[1][s]}; }
}

// --- sorting ---------------------------------------------------------------------------------------------------------

// the lanes whose class is this lane's
__device__ __forceinline__ unsigned peers_of(int c) {
    unsigned peers = ALL_LANES;
#pragma unroll
    for (int bit = 1; bit <= CLASSES; bit *= 2) {
        const unsigned set = __ballot_sync(ALL_LANES, c & bit);
        peers &= c & bit ? set : ~set;
    }
    return peers;
}

// puts each of n items, if class_of(item) is below CLASSES, at the place that `places` has for its warp and class, and
// moves that on. A warp's share of the items follows that of the warp before
template <class ClassOf, class Put>
__device__ __forceinline__ void place_items(int (&places)[LIST_WARPS][CLASSES], int n, ClassOf class_of, Put put) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int share = (n + LIST_THREADS - 1) / LIST_THREADS * WARP;
    const int end = min(n, (warp + 1) * share);
    for (int first = warp * share; first < end; first += WARP) {
        const int item = first + lane;
        const int c = item < n ? class_of(item) : CLASSES;
        const unsigned peers = peers_of(c), before = peers & ((1u << lane) - 1);
        const int place = c < CLASSES ? places[warp][c] + __popc(before) : 0;
        __syncwarp();  // all lanes have read their places
        if (c < CLASSES) {
            if (before == 0) { places[warp][c] += __popc(peers); }
            put(item, place);
        }
        __syncwarp();
    }
}

// the same, to places 0, 1, ... by class and in an item's order; returns how many were put. All threads
template <class ClassOf, class Put> __device__ __forceinline__ int sort_items(int n, ClassOf class_of, Put put) {
    __shared__ int places[LIST_WARPS][CLASSES], totals[CLASSES];
    const int c = threadIdx.x;
    for (int i = threadIdx.x; i < LIST_WARPS * CLASSES; i += LIST_THREADS) { places[i / CLASSES][i % CLASSES] = 0; }
    __syncthreads();
    place_items(places, n, class_of, [](int, int) {});  // what has moved on are counts
    __syncthreads();
    if (c < CLASSES) {
        int total = 0;
#pragma unroll 8
        for (int warp = 0; warp < LIST_WARPS; warp++) { total += places[warp][c]; }
        totals[c] = total;
    }
    __syncthreads();
    int all = 0, start = 0;
    for (int other = 0; other < CLASSES; other++) {
        if (other == c) { start = all; }
        all += totals[other];
    }
    if (c < CLASSES) {
#pragma unroll 8
        for (int warp = 0; warp < LIST_WARPS; warp++) {
            const int count = places[warp][c];
            places[warp][c] = start;
            start += count;
        }
    }
    __syncthreads();
    place_items(places, n, class_of, put);
    return all;
}

// --- lists -----------------------------------------------------------------------------------------------------------

// keys that queries of a tile selected, from bits (B,tiles,T); grid (tiles, B)
extern "C" __global__ void __launch_bounds__(1024)
union_keys_kernel(int* __restrict__ ids, int* __restrict__ masks, int* __restrict__ size, const int* __restrict__ bits,
                  int T, int capacity, int by_first) {
    const size_t tile = blockIdx.y * gridDim.x + blockIdx.x;
    const Bits* selected = reinterpret_cast<const Bits*>(bits) + tile * T;
    ids += tile * capacity;
    masks += tile * 2 * capacity;
    const auto class_of = [=](int s) {
        const Bits by = selected[s];
        if ((by.of[0] | by.of[1]) == 0) { return CLASSES; }
        if (!by_first) { return 0; }
        return by.of[0] ? __ffs(by.of[0]) - 1 : __ffs(by.of[1]) + 31;
    };
    const int n = sort_items(T, class_of, [=](int s, int place) {
        const Bits by = selected[s];
        ids[place] = s;
        masks[place] = (int)by.of[0];
        masks[capacity + place] = (int)by.of[1];
    });
    if (threadIdx.x == 0) { size[tile] = n; }
}

// classes (B,T) of keys, the most popular ones first, from bits (B,tiles,T); a lane for each key, grid (T / 32, B)
extern "C" __global__ void __launch_bounds__(256)
key_classes_kernel(int* __restrict__ classes, const int* __restrict__ bits, int T, int tiles) {
    __shared__ int counts[CLASS_THREADS / WARP][WARP];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, s = blockIdx.x * WARP + lane;
    const size_t b = blockIdx.y;
    const Bits* selected = reinterpret_cast<const Bits*>(bits) + b * tiles * T + s;
    int queries = 0;
    if (s < T) {
#pragma unroll 4
        for (int tile = warp; tile < tiles; tile += CLASS_THREADS / WARP) {
            const Bits by = selected[(size_t)tile * T];
            queries += __popc(by.of[0]) + __popc(by.of[1]);
        }
    }
    counts[warp][lane] = queries;
    __syncthreads();
    if (warp > 0 || s >= T) { return; }
    for (int other = 1; other < CLASS_THREADS / WARP; other++) { queries += counts[other][lane]; }
    classes[b * T + s] = __clz(queries);
}

// order (B,T): keys by class, ascending in each; a block for each sequence
extern "C" __global__ void __launch_bounds__(1024)
key_order_kernel(int* __restrict__ order, const int* __restrict__ classes, int T) {
    order += (size_t)blockIdx.x * T;
    classes += (size_t)blockIdx.x * T;
    sort_items(T, [=](int s) { return classes[s]; }, [=](int s, int place) { order[place] = s; });
}

// 32 x 32 bits, of which a lane has a row -> of which it has a column
__device__ __forceinline__ unsigned transposed(unsigned row) {
    unsigned low = 0x0000ffffu;  // columns whose number lacks the bit `step`
#pragma unroll
    for (int step = 16; step > 0; step /= 2, low ^= low << step) {
        const unsigned other = __shfl_xor_sync(ALL_LANES, row, step);
        row = threadIdx.x & step ? (row & ~low) | (other >> step & low) : (row & low) | (other & low) << step;
    }
    return row;
}

// queries that selected keys of a tile, which are 64 of order (B,T), from bits (B,tiles,T); a warp for each tile of
// queries, grid (T / 64, B)
extern "C" __global__ void __launch_bounds__(1024)
union_queries_kernel(int* __restrict__ ids, int* __restrict__ masks, int* __restrict__ size,
                     const int* __restrict__ bits, const int* __restrict__ order, int T, int tiles, int capacity) {
    __shared__ int counts[2][LIST_WARPS];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const size_t b = blockIdx.y, list = b * gridDim.x + blockIdx.x;
    const Bits* selected = reinterpret_cast<const Bits*>(bits) + b * tiles * T;
    ids += list * capacity;
    masks += list * 2 * capacity;
    int key[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int place = blockIdx.x * TILE + 32 * half + lane;
        key[half] = place < T ? order[b * T + place] : -1;
    }
    int length = 0;
    for (int first = 0; first < tiles; first += LIST_WARPS) {
        const int tile = first + warp;
        unsigned of[2][2], found[2];  // halves of the queries, halves of the keys
#pragma unroll
        for (int half = 0; half < 2; half++) {
            Bits by = {{0, 0}};
            if (tile < tiles && key[half] >= 0) { by = selected[(size_t)tile * T + key[half]]; }
            of[0][half] = transposed(by.of[0]);
            of[1][half] = transposed(by.of[1]);
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            found[half] = __ballot_sync(ALL_LANES, (of[half][0] | of[half][1]) != 0);
        }
        int* count = counts[first / LIST_WARPS % 2];  // the other one may still be read
        if (lane == 0) { count[warp] = __popc(found[0]) + __popc(found[1]); }
        __syncthreads();
        int place = length;
#pragma unroll 8
        for (int other = 0; other < LIST_WARPS; other++) {
            if (other < warp) { place += count[other]; }
            length += count[other];
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            if (found[half] >> lane & 1u) {
                const int mine = place + __popc(found[half] & ((1u << lane) - 1));
                ids[mine] = tile * TILE + 32 * half + lane;
                masks[mine] = (int)of[half][0];
                masks[capacity + mine] = (int)of[half][1];
            }
            place += __popc(found[half]);
        }
    }
    if (threadIdx.x == 0) { size[list] = length; }
}
