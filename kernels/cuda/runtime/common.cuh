// common.cuh: device functions that several .cu files use; it is compiled in front of each of them
//
// Everything here adds in a fixed order, so results do not depend on how threads are scheduled.

#define WARP 32
#define ALL_LANES 0xffffffffu
#define MINUS_INFINITY __int_as_float(0xff800000)
#define LOG2E 1.4426950408889634f  // exponentials are powers of 2: what the hardware has
#define LN2 0.6931471805599453f

// after a kernel's launch bound: bytes of dynamic shared memory that every launch has, which source.py reads
#define DYNAMIC_SHARED(bytes)

// W neighbouring floats, moved by one instruction if W is 4
template <int W> struct __align__(4 * W) Pack {
    float at[W];
};

// index counts packs; `array` must be aligned to a pack
template <int W> __device__ __forceinline__ Pack<W> load(const float* array, size_t index) {
    return reinterpret_cast<const Pack<W>*>(array)[index];
}

template <int W> __device__ __forceinline__ void store(float* array, size_t index, Pack<W> values) {
    reinterpret_cast<Pack<W>*>(array)[index] = values;
}

template <int W> __device__ __forceinline__ float sum(Pack<W> values) {
    float total = values.at[0];
#pragma unroll
    for (int j = 1; j < W; j++) { total += values.at[j]; }
    return total;
}

template <int W> __device__ __forceinline__ Pack<W> zeros() {
    Pack<W> values;
#pragma unroll
    for (int j = 0; j < W; j++) { values.at[j] = 0.0f; }
    return values;
}

template <int W> __device__ __forceinline__ void add(Pack<W>& total, Pack<W> values) {
#pragma unroll
    for (int j = 0; j < W; j++) { total.at[j] += values.at[j]; }
}

__device__ __forceinline__ void add_product(float& total, Pack<4> a, Pack<4> b) {
#pragma unroll
    for (int j = 0; j < 4; j++) { total += a.at[j] * b.at[j]; }
}

__device__ __forceinline__ float dot(Pack<4> a, Pack<4> b) {
    float total = a.at[0] * b.at[0];
#pragma unroll
    for (int j = 1; j < 4; j++) { total += a.at[j] * b.at[j]; }
    return total;
}

__device__ __forceinline__ void add_product(Pack<4>& total, float weight, Pack<4> x) {
#pragma unroll
    for (int j = 0; j < 4; j++) { total.at[j] += weight * x.at[j]; }
}

__device__ __forceinline__ Pack<4> times(float weight, Pack<4> x) {
#pragma unroll
    for (int j = 0; j < 4; j++) { x.at[j] *= weight; }
    return x;
}

// whether float4s can be read from all of these: rows that are views of a larger buffer may start anywhere
__device__ __forceinline__ bool aligned(const void* a, const void* b = nullptr, const void* c = nullptr,
                                        const void* d = nullptr) {
    return (((size_t)a | (size_t)b | (size_t)c | (size_t)d) & 15) == 0;
}

// row[column..column+3] of global memory, 0 from column `columns` on. packed: columns % 4 == 0, rows start at multiples
// of 16 bytes
__device__ __forceinline__ Pack<4> load_columns(const float* row, int column, int columns, bool packed) {
    if (packed && column < columns) { return load<4>(row + column, 0); }
    Pack<4> x = zeros<4>();
    if (!packed) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
            if (column + j < columns) { x.at[j] = row[column + j]; }
        }
    }
    return x;
}

__device__ __forceinline__ void store_columns(float* row, int column, int columns, bool packed, Pack<4> x) {
    if (packed && column < columns) { store<4>(row + column, 0, x); }
    if (!packed) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
            if (column + j < columns) { row[column + j] = x.at[j]; }
        }
    }
}

// over LANES neighbouring lanes, the same value in each of them
template <int LANES> __device__ __forceinline__ float group_sum(float value) {
#pragma unroll
    for (int step = LANES / 2; step > 0; step /= 2) { value += __shfl_xor_sync(ALL_LANES, value, step); }
    return value;
}

template <int LANES> __device__ __forceinline__ float group_max(float value) {
#pragma unroll
    for (int step = LANES / 2; step > 0; step /= 2) { value = fmaxf(value, __shfl_xor_sync(ALL_LANES, value, step)); }
    return value;
}

__device__ __forceinline__ float warp_sum(float value) { return group_sum<WARP>(value); }

__device__ __forceinline__ float warp_max(float value) { return group_max<WARP>(value); }

// the sum over a block of whole warps, the same in every thread; `shared` has a float for each warp. every thread must
// pass another barrier before `shared` is used again
__device__ __forceinline__ float block_sum(float value, float* shared) {
    value = warp_sum(value);
    if (threadIdx.x % WARP == 0) { shared[threadIdx.x / WARP] = value; }
    __syncthreads();
    float total = 0.0f;
    for (int warp = 0; warp < (int)blockDim.x / WARP; warp++) { total += shared[warp]; }
    return total;
}

// cosine and sine of the angle position * 10000^(-2 pair / rotated): kernels/cpu/rotation.py
struct Rotation {
    float cosine, sine;
};

// the angle is counted in turns, in double, and its whole turns are dropped before it becomes a float: as a float, the
// angle at position 4096 would be off by up to 2e-4. A power in double is some 60 operations, which consumer GPUs do at
// a 64th of the rate, so a kernel should use a rotation for all heads.
// sincosf keeps 32 bytes of stack for angles above 1e5, which never come
__device__ __forceinline__ Rotation rotation(int position, int pair, int rotated) {
    const double turns = position * (0.15915494309189535 * exp2(-13.287712379549449 * (2 * pair) / rotated));
    Rotation r;
    sincosf(6.2831853f * (float)(turns - rint(turns)), &r.sine, &r.cosine);
    return r;
}

// a pair of columns of each of `heads` heads, which are `width` columns apart. W = 2: all pairs are aligned to 8 bytes
template <int W>
__device__ __forceinline__ void rotate_heads(float* x, Rotation r, int heads, int width) {
#pragma unroll 4
    for (int h = 0; h < heads; h++, x += width) {
        float a, b;
        if (W == 2) {
            const Pack<2> pair = load<2>(x, 0);
            a = pair.at[0], b = pair.at[1];
        } else {
            a = x[0], b = x[1];
        }
        const float first = a * r.cosine - b * r.sine;
        const float second = a * r.sine + b * r.cosine;
        if (W == 2) {
            store<2>(x, 0, {first, second});
        } else {
            x[0] = first, x[1] = second;
        }
    }
}

// row i of `to` = R columns of row i of `from`, turned as at position first + i; by all threads of a block
__device__ __forceinline__ void turn_rows(float* to, size_t to_stride, const float* from, size_t from_stride, int rows,
                                          int R, int first) {
    for (int i = threadIdx.x; i < rows * (R / 2); i += blockDim.x) {
        const int row = i / (R / 2), pair = i - row * (R / 2);
        const Rotation r = rotation(first + row, pair, R);
        const float* x = from + row * from_stride + 2 * pair;
        float* turned = to + row * to_stride + 2 * pair;
        turned[0] = x[0] * r.cosine - x[1] * r.sine;
        turned[1] = x[0] * r.sine + x[1] * r.cosine;
    }
}

// columns start .. stop - 1 of a row of a (rows,columns) weight lie inside the band: kernels/cpu/band/band_mask.py
struct Band {
    int start, stop;
};

__device__ __forceinline__ Band band_of_row(int row, int rows, int columns, int bandwidth) {
    const int half = bandwidth / 2;
    Band band;
    if (rows > columns) {  // FC1: a row is a hidden unit
        band.start = row > half ? (row - half + 3) / 4 : 0;
        band.stop = (row + half) / 4 + 1;
    } else {  // FC2: a row is an output channel
        band.start = max(4 * row - half, 0);
        band.stop = 4 * row + half + 1;
    }
    band.start = min(band.start, columns);
    band.stop = max(band.start, min(band.stop, columns));
    return band;
}

// what rows row0 .. row0 + count - 1 keep together; both ends are multiples of 4, or the last column
__device__ __forceinline__ Band band_of_rows(int row0, int count, int rows, int columns, int bandwidth) {
    Band band = band_of_row(row0, rows, columns, bandwidth);  // both ends of the band move on with the row
    band.start &= ~3;
    band.stop = band_of_row(min(row0 + count, rows) - 1, rows, columns, bandwidth).stop;
    band.stop = min((band.stop + 3) & ~3, columns);
    return band;
}

// the first tile of rows whose expert is `expert` or a later one; experts ascend, -1, the largest unsigned number, is
// the last
__device__ __forceinline__ int first_tile(const int* tile_expert, int tiles, unsigned expert) {
    int low = 0, high = tiles;
    while (low < high) {
        const int middle = (low + high) / 2;
        if ((unsigned)tile_expert[middle] < expert) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low;
}

// AdamW's settings at one update, with the bias corrections folded in: kernels/cpu/gpt2/adamw.py, adamw_rates. They
// come from memory, not by value, as a CUDA graph keeps what it was given by value
struct AdamwRates {
    float rate, one_minus_beta1, one_minus_beta2, eps, decay, grad_scale;
};

// rates (6), the last of them the largest norm that gradients may have, 0: any; norm (1)
__device__ __forceinline__ AdamwRates adamw_rates(const float* rates, const float* norm) {
    const float clip = rates[5];
    const float scale = clip > 0.0f && norm[0] > clip ? clip / norm[0] : 1.0f;
    return {rates[0], rates[1], rates[2], rates[3], rates[4], scale};
}

__device__ __forceinline__ void update_adamw(float& p, float g, float& m, float& v, AdamwRates r) {
    g *= r.grad_scale;
    m += r.one_minus_beta1 * (g - m);
    v += r.one_minus_beta2 * (g * g - v);
    p -= r.rate * m / (sqrtf(v) + r.eps) + r.decay * p;
}
